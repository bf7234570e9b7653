"""Optimisers by their dotted names, and their state as tensors and JSON, so that loading a checkpoint runs no code."""

import ast
import inspect
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name

import torch
from torch import Tensor

from ..running.checkpoint import CheckpointError

DEFAULT = "torch.optim.AdamW"
# In a checkpoint: prefix of the optimiser's tensors.
PREFIX = "optimiser."


class OptimiserError(ValueError):
    """An optimiser cannot be used as asked; the message names it and the reason."""


def parse_arguments(arguments: Sequence[str]) -> dict[str, object]:
    """{name: value} of arguments such as weight_decay=0.01 or betas=(0.9,0.95). Raises OptimiserError."""
    found = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise OptimiserError(f"--optimizer_args {argument}: expected KEY=VALUE, each key once, such as weight_decay=0.01")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def make(
    name: str, arguments: Mapping[str, object], parameters: Sequence[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser `name`, such as torch.optim.AdamW or bitsandbytes.optim.AdamW8bit, for one group of parameters.

    Raises OptimiserError where there is no such class, or it refuses the arguments.
    """
    if "." not in name:
        raise OptimiserError(f"--optimizer {name}: expected a dotted name, such as {DEFAULT} or bitsandbytes.optim.AdamW8bit")
    try:
        made = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as e:
        raise OptimiserError(f"--optimizer {name}: cannot be imported ({e}); install its package, or check the name") from e
    if not (inspect.isclass(made) and issubclass(made, torch.optim.Optimizer)):
        raise OptimiserError(f"--optimizer {name}: is not a subclass of torch.optim.Optimizer")
    try:
        return made(list(parameters), lr=learning_rate, **arguments)
    except (TypeError, ValueError) as e:
        raise OptimiserError(f"--optimizer {name}: refuses its arguments ({' '.join(str(e).split())[:200]})") from e


def pack(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """(tensors by key, not copied; the rest as JSON) of an optimiser's state.

    Raises CheckpointError for a state that is neither.
    """
    tensors: dict[str, Tensor] = {}
    note = _flatten(optimiser.state_dict(), PREFIX.removesuffix("."), tensors, type(optimiser).__name__)
    return tensors, note


def unpack(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], note: dict) -> None:
    """Loads what `pack` returned into an optimiser of the same parameters."""
    state = _unflatten(note, tensors)
    optimiser.load_state_dict(state)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        own = optimiser.state[parameters[index]]
        for key, value in saved.items():
            # load_state_dict casts floats to the parameter's dtype, which rounds a state in fp32 of a parameter in bf16.
            if isinstance(value, Tensor) and isinstance(own.get(key), Tensor) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device, copy=True)


def _flatten(value, path: str, tensors: dict[str, Tensor], owner: str):
    if type(value) in (Tensor, torch.nn.Parameter):
        tensors[path] = value
        return {"tensor": path}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, dict):
        items = [[_flatten(k, path, {}, owner), _flatten(v, f"{path}.{k}", tensors, owner)] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_flatten(v, f"{path}.{i}", tensors, owner) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    raise CheckpointError(
        f"{owner} keeps a {type(value).__name__} in its state ({path}), and checkpoints hold plain tensors and JSON only; "
        "choose another --optimizer"
    )


def _unflatten(note: dict, tensors: Mapping[str, Tensor]):
    (kind, content), = note.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "value":
        return content
    if kind == "dict":
        return {_unflatten(k, tensors): _unflatten(v, tensors) for k, v in content}
    values = [_unflatten(v, tensors) for v in content]
    return tuple(values) if kind == "tuple" else values
