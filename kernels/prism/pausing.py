"""Plain functions that stop in the middle and go on later, with everything they remember.

Samplers are loops that call a model. To hold several of them at a checkpoint and go on with some, or to answer the calls of
several by one forward, each runs on a thread of its own. Only one runs at any time. Nothing is split, so a multistep sampler
keeps its history and a stochastic one its noise.
"""

import contextvars
import threading
from collections.abc import Callable

import torch


class Dropped(BaseException):
    """Raised inside a function that is not to go on. Not an Exception: no sampler must catch it."""


class Pausing:
    """One function under way. `value`: what it last stopped with, or returned once `done`."""

    def __init__(self, function: Callable[[Callable[[object], None]], object]):
        """function: takes `stop`, which hands a value out, waits until the function may go on, and returns the answer."""
        self.value, self.done, self.started = None, False, False
        self._answer = None
        self._function, self._error, self._dropped = function, None, False
        self._go, self._here = threading.Semaphore(0), threading.Semaphore(0)
        # ComfyUI keeps what it is executing in context variables, and gradients' state belongs to a thread.
        self._context = contextvars.copy_context()
        self._inference = torch.is_inference_mode_enabled()
        self._thread = threading.Thread(target=self._context.run, args=(self._run,), daemon=True)

    def resume(self, answer: object = None) -> object:
        """Runs until the function stops or returns; gives the value. What it raises is raised here.

        answer: what the `stop` that it waits in returns.
        """
        if self.done:
            raise RuntimeError("the function has returned already")
        if not self.started:
            self.started = True
            self._thread.start()
        self._answer = answer
        self._go.release()
        self._here.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.value

    def drop(self) -> None:
        """Ends the function where it stands. Safe to call at any time, and twice."""
        if self.done:
            return
        self.done, self._dropped = True, True
        if self.started:
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._dropped:
                with torch.inference_mode(self._inference):
                    self.value = self._function(self._stop)
        except Dropped:
            pass
        except BaseException as e:  # noqa: BLE001 (handed over to the thread that resumed)
            self._error = e
        finally:
            self.done = True
            self._here.release()

    def _stop(self, value: object) -> object:
        self.value = value
        self._here.release()
        self._go.acquire()
        if self._dropped:
            raise Dropped
        answer, self._answer, self.value = self._answer, None, None
        return answer
