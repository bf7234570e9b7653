"""For all tests: one thread per process, defaults for pytest-xdist, and fixtures that several modules share."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

# Before torch is imported; processes that tests start inherit it. `pytest -n` runs one process for each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from . import fast_convolutions

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With `-n` alone, every file goes to one process, so that fixtures of a module are made once.

    Files start in the order of their names, which puts the two demos, the slowest, first. Not in pyproject.toml: there
    the options would be errors for a Python without pytest-xdist, such as ComfyUI's.
    """
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    fast_convolutions.use()


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A shell starts background jobs with SIGINT ignored; Python then installs no handler, which tests of Ctrl-C need."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """torch.empty gives NaN, so that a kernel which leaves a value unwritten is seen."""

    def poison(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and not t.is_meta else t

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(scope="session")
def pack():
    """The root package under a name of its own, its modules reached as attributes of sys.modules."""
    spec = importlib.util.spec_from_file_location(
        "intrinsic_reward", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["intrinsic_reward"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy_world():
    """The toy world's stack as the trainers run it, to be left unchanged. Skips the test where diffusers is missing."""
    pytest.importorskip("diffusers")
    from benchmarks.toy_world import pipeline

    return pipeline.load()


@pytest.fixture(scope="session")
def toy_judge():
    """The toy world's oracle judge."""
    from benchmarks.toy_world import judge

    return judge.load()
