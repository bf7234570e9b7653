"""The pack as ComfyUI sees it: the root loaded as a package from its file, and one thread, so that runs are repeatable."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
