"""Checkpoints in the layout of Shell-LCC's released code (.pth): {"model": state dict, "config": {...}}, read as a predictor.

Loaded with weights_only; names may begin with "module.". Such a checkpoint has no quantiles: until it is calibrated on latents
of real clips, the radius is the nominal 1 and there is no band.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files.header import describe_foreign, is_plain, not_finite
from ..latent_space import WAN21
from .predictor import Predictor

PREFIXES = ("module.", "_orig_mod.")
# Written by BatchNorm and not used.
OPTIONAL = {"predictor.1.num_batches_tracked"}
SIZES = ("embedding_dim", "num_bases", "hidden_dim")


class ReleasedError(ValueError):
    """A file is not a checkpoint in the released layout; the message names it and the reason."""


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(state dict with Predictor's names and shapes, fp32; the plain values of the checkpoint's config).

    Raises FileNotFoundError, or ReleasedError naming the entry that is missing, unexpected or of a wrong shape.
    """
    loaded = _load(path)
    if not isinstance(loaded, Mapping):
        raise ReleasedError(f"{path}: holds a {type(loaded).__name__}, expected {{'model': state dict, 'config': sizes}}")
    model = loaded.get("model", loaded)
    config = loaded.get("config")
    config = {} if config is None else config
    if not isinstance(model, Mapping) or not isinstance(config, Mapping):
        raise ReleasedError(f"{path}: its 'model' or 'config' is not a dictionary; expected a released Shell-LCC checkpoint")
    state = {_plain_name(k): v for k, v in model.items()}
    _require_keys(path, state)
    state = _require_shapes(path, state)
    _require_config(path, state, config)
    return state, {str(k): v for k, v in config.items() if v is None or isinstance(v, (bool, int, float, str))}


def _load(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" + (" (it is a folder)" if path.is_dir() else ""))
    if path.suffix == ".safetensors":
        raise ReleasedError(f"{path}: is already a safetensors file, no checkpoint in the released layout")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many unrelated types
        if "weights_only" in str(e) or "Weights only" in str(e):
            raise ReleasedError(
                f"{path}: holds objects other than tensors and plain values, which could run code; it was not executed. "
                "Ask its author for a checkpoint of tensors only"
            ) from e
        raise ReleasedError(f"{path}: {describe_foreign(path)}, damaged or not a checkpoint ({type(e).__name__})") from e


def _plain_name(name: object) -> str:
    name, before = str(name), None
    while name != before:
        before = name
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
    return name


def _require_keys(path: Path, state: dict) -> None:
    names = set(Predictor.shapes(1, 1, 1))
    missing, unknown = sorted(names - OPTIONAL - set(state)), sorted(set(state) - names)
    if missing or unknown:
        parts = [f"{what} {', '.join(found)}" for what, found in (("missing", missing), ("unexpected", unknown)) if found]
        raise ReleasedError(f"{path}: not a Shell-LCC checkpoint: {'; '.join(parts)}")


def _require_shapes(path: Path, state: dict) -> dict[str, Tensor]:
    bad = sorted(k for k, v in state.items() if not is_plain(v))
    if bad:
        found = state[bad[0]]
        what = "tensor without plain numbers of its own" if isinstance(found, Tensor) else type(found).__name__
        raise ReleasedError(f"{path}: '{bad[0]}' is a {what}, expected a tensor of numbers")
    basis, first = state["basis"], state["predictor.0.weight"]
    if basis.ndim != 2 or basis.shape[1] != WAN21.channels or first.ndim != 2:
        raise ReleasedError(
            f"{path}: basis {list(basis.shape)} and predictor.0.weight {list(first.shape)}, expected [K, {WAN21.channels}] "
            f"and [h, {WAN21.channels}]: released checkpoints are for '{WAN21.id}' latents"
        )
    expected = Predictor.shapes(basis.shape[1], basis.shape[0], first.shape[0])
    result = {"predictor.1.num_batches_tracked": torch.zeros((), dtype=torch.long)}
    wrong = []
    for name, value in state.items():
        if name in ("global_scale", "global_bias") and value.numel() == math.prod(expected[name]):
            value = value.reshape(expected[name])
        if value.shape != expected[name]:
            wrong.append(f"{name} {list(value.shape)} instead of {list(expected[name])}")
        elif not_finite({name: value}):
            wrong.append(f"{name} has NaN or infinite values")
        result[name] = value.long() if name in OPTIONAL else value.float()
    if wrong:
        raise ReleasedError(f"{path}: {'; '.join(wrong)}")
    return result


def _require_config(path: Path, state: dict[str, Tensor], config: Mapping) -> None:
    sizes = dict(zip(SIZES, (*reversed(state["basis"].shape), state["predictor.0.weight"].shape[0]), strict=True))
    stated = {k: config[k] for k in sizes if k in config}
    # A tensor has no truth value of its own.
    differ = {k: v for k, v in stated.items() if not isinstance(v, (int, float)) or v != sizes[k]}
    wrong = [f"{k} {str(v)[:40]} against {sizes[k]} of its tensors" for k, v in differ.items()]
    if wrong:
        raise ReleasedError(f"{path}: its config contradicts its tensors: {', '.join(wrong)}")
