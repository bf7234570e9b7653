"""Coroutines from plain functions: each runs on a thread of its own and is suspended and resumed with its full state.

Samplers are loops that call a model. To suspend several of them at a checkpoint and resume some, or to answer the calls of
several by one forward, each runs as a coroutine. Only one runs at any time. The sampler's code is not changed, so a multistep
sampler keeps its history and a stochastic one its noise.
"""

import contextvars
import threading
from collections.abc import Callable

import torch


class Cancelled(BaseException):
    """Raised inside a cancelled function. Not an Exception, so that no sampler catches it."""


class Coroutine:
    """A function that can be suspended. value: what it was last suspended with, or its result once `done`."""

    def __init__(self, function: Callable[[Callable[[object], object]], object]):
        """function: called with `suspend(value)`, which hands the value to `resume`, blocks, and returns the next answer."""
        self.value, self.done, self.started = None, False, False
        self._answer = None
        self._function, self._error, self._cancelled = function, None, False
        self._resumed, self._suspended = threading.Semaphore(0), threading.Semaphore(0)
        # ComfyUI keeps the current node in context variables, and the inference mode belongs to a thread.
        self._context = contextvars.copy_context()
        self._inference = torch.is_inference_mode_enabled()
        self._thread = threading.Thread(target=self._context.run, args=(self._run,), daemon=True)

    def resume(self, answer: object = None) -> object:
        """Runs the function until it is suspended or returns; returns `value`. Raises what the function raises.

        answer: what the `suspend` call that the function is blocked in returns. Raises RuntimeError once it is done.
        """
        if self.done:
            raise RuntimeError("the function has returned already")
        if not self.started:
            self.started = True
            self._thread.start()
        self._answer = answer
        self._resumed.release()
        self._suspended.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.value

    def cancel(self) -> None:
        """Ends the function at its current `suspend` call. Safe to call at any time, and twice."""
        if self.done:
            return
        self.done, self._cancelled = True, True
        if self.started:
            self._resumed.release()
            self._thread.join()

    def _run(self) -> None:
        self._resumed.acquire()
        try:
            if not self._cancelled:
                with torch.inference_mode(self._inference):
                    self.value = self._function(self._suspend)
        except Cancelled:
            pass
        except BaseException as e:  # noqa: BLE001 (handed over to the thread that resumed)
            self._error = e
        finally:
            self.done = True
            self._suspended.release()

    def _suspend(self, value: object) -> object:
        self.value = value
        self._suspended.release()
        self._resumed.acquire()
        if self._cancelled:
            raise Cancelled
        answer, self._answer, self.value = self._answer, None, None
        return answer
