"""A pretend GPU: runs code on CPU data and raises where a real GPU would, for tests on machines that have none.

    with PretendGPU() as gpu:
        manifold = manifold.to(DEVICE)
        out = manifold.pull(z.to(DEVICE))
    assert not gpu.synchronisations

Inside `PretendGPU` the device is torch's own `meta`, which every build of torch knows and which no other code on a GPU's path
uses. Tensors moved or created there are `PretendTensor`: they carry their values on the CPU in `held`, and every operator

- raises PretendGPUError where tensors of the GPU and of the CPU meet and CUDA would refuse them: CPU tensors without
  dimensions, and CPU indices of GPU tensors, are allowed, as in CUDA; so are copies from one to the other;
- raises PretendGPUError where a CPU generator is to draw numbers on the GPU;
- is counted in `PretendGPU.synchronisations`, by kind, file and line, where a CPU has to wait for the GPU: item(), tolist(),
  copies to the CPU, results whose size depends on values (nonzero, boolean indices), checks for errors in torch.linalg;
- fills new uninitialised floating point tensors with NaN.

That shows that devices agree and where the CPU waits. It shows nothing about kernels, speed, precision or memory, and copies
to the GPU are not counted.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
_TORCH = str(Path(torch.__file__).parent)
_aten = torch.ops.aten

# Operators whose result, or whose size, the CPU has to know: by name, with the word that they are counted under.
WAITING = {
    "_local_scalar_dense": "item", "is_nonzero": "item", "equal": "equal", "nonzero": "nonzero", "masked_select": "nonzero",
    "_unique": "unique", "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique", "bincount": "bincount",
    "repeat_interleave": "repeat_interleave", "_linalg_check_errors": "linalg check", "histc": "histc",
}  # fmt: skip
# Operators that accept indices on the CPU with values on the GPU.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Operators that join tensors and make no exception for those without dimensions.
STRICT = {"cat", "stack", "mm", "bmm", "addmm", "baddbmm", "index_add_", "index_add", "gather", "scatter_", "bucketize"}


class PretendGPUError(RuntimeError):
    """An operator that CUDA would refuse; the message names the operator and the device and shape of its tensors."""


class PretendTensor(torch.Tensor):
    """A tensor of the pretend GPU. held: its values, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        # A view of a normal tensor must be one as well: in inference mode torch would make it an inference tensor.
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(
                cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
            )

    def __init__(self, held: torch.Tensor):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"PretendTensor({self.held!r})"

    def __deepcopy__(self, memo):
        return PretendTensor(self.held.clone()).requires_grad_(self.requires_grad)

    def tolist(self):
        _count("tolist")
        return self.held.tolist()

    def numpy(self, **_):
        raise TypeError("cannot convert a tensor of the pretend GPU to numpy: copy it to the CPU first")


class PretendGPU:
    """A context in which DEVICE is a GPU. synchronisations: Counter of "kind at file:line" where the CPU waited."""

    _inside: "list[PretendGPU]" = []  # noqa: RUF012

    def __init__(self):
        self.synchronisations: Counter[str] = Counter()

    def __enter__(self) -> "PretendGPU":
        self._stack = ExitStack()
        self._stack.enter_context(_Operators())
        self._stack.enter_context(_Creation())
        self._inside.append(self)
        return self

    def __exit__(self, *exc_info):
        self._inside.remove(self)
        self._stack.close()

    def count(self, part: str = "") -> int:
        """How often the CPU waited, in all or at places whose text contains `part`."""
        return sum(n for place, n in self.synchronisations.items() if part in place)


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # In inference mode operators such as to(device, dtype) arrive whole, not yet taken apart into _to_copy. Optional
        # tensors are more than decompose() can pass on.
        if torch.is_inference_mode_enabled() and None not in args:
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return _run(func, args, kwargs or {})


class _Creation(TorchFunctionMode):
    """Creates tensors from Python values on the CPU and moves them: torch itself gives meta tensors no values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device, data = kwargs.pop("device", None), args[0]
            if isinstance(data, torch.Tensor) and func is not torch.tensor:
                return data.to(device=device or data.device, dtype=kwargs.get("dtype"))
            if isinstance(data, PretendTensor):
                return func(data.held, *args[1:], **kwargs).to(device or DEVICE)
            data = tree_map_only(PretendTensor, lambda t: t.item(), data)
            return func(data, *args[1:], **kwargs).to(device or "cpu")
        if func is torch.Tensor.new_tensor and isinstance(args[0], PretendTensor):
            like, data = args[0], args[1]
            device = kwargs.pop("device", None) or like.device
            return torch.tensor(data, **({"dtype": like.dtype} | kwargs)).to(device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], PretendTensor):
            args = (args[0], _without_lists(args[1]), *args[2:])
        return func(*args, **kwargs)


def _without_lists(index):
    """An index whose lists are tensors of the CPU."""
    if isinstance(index, tuple):
        return tuple(_without_lists(i) for i in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _run(func, args, kwargs):
    """One operator: checks the devices, counts it if the CPU waits, runs it on the values and wraps the results."""
    name = func._schema.name.removeprefix("aten::")
    values, _ = tree_flatten((args, kwargs))
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if any(t.is_meta and not isinstance(t, PretendTensor) for t in tensors):
        raise NotImplementedError(f"{name}: torch created a meta tensor without values, which the pretend GPU has to learn of")
    on_gpu = any(isinstance(t, PretendTensor) for t in tensors)
    asked = kwargs.get("device")
    target = torch.device(asked) if asked is not None else DEVICE if on_gpu else torch.device("cpu")
    if name == "_to_copy":
        if on_gpu and target != DEVICE:
            _count("copy to the CPU")
    elif name in ("copy_", "copy"):
        if isinstance(args[1], PretendTensor) and not isinstance(args[0], PretendTensor):
            _count("copy to the CPU")
    elif on_gpu:
        _require_one_device(name, args, tensors)
        _count_waiting(name, args)
    if target == DEVICE and any(isinstance(v, torch.Generator) for v in values):
        raise PretendGPUError(f"{name}: a generator of the CPU cannot draw numbers on the GPU")

    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    held_args, held_kwargs = tree_map_only(PretendTensor, lambda t: t.held, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    if name == "_to_copy" and out is held_args[0]:
        out = out.clone()
    if name in UNINITIALISED and out.is_floating_point():
        out.fill_(torch.nan)
    written = _written(func, args, kwargs)
    if written:
        if any(isinstance(t, PretendTensor) and (t.shape, t.stride()) != (t.held.shape, t.held.stride()) for t in written):
            # squeeze_() and the like: as a meta tensor the wrapper takes the new shape itself.
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
        if out is None:
            return None
        return written[0] if isinstance(out, torch.Tensor) else type(out)(written)
    return tree_map_only(torch.Tensor, PretendTensor, out) if target == DEVICE else out


def _require_one_device(name, args, tensors):
    foreign = [t for t in tensors if not isinstance(t, PretendTensor) and (t.dim() or name in STRICT)]
    if name in INDEXING and isinstance(args[0], PretendTensor):
        indices = tree_flatten(args[1])[0]
        foreign = [t for t in foreign if not any(t is i for i in indices)]
    if foreign:
        found = ", ".join(f"{'GPU' if isinstance(t, PretendTensor) else 'CPU'} {list(t.shape)}" for t in tensors)
        raise PretendGPUError(f"{name}: expected all tensors to be on the same device, found {found} at {_place()}")


def _count_waiting(name, args):
    if name in WAITING:
        _count(WAITING[name])
    elif name in INDEXING:
        masks = [i for i in tree_flatten(args[1])[0] if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
        # One value put through a mask is a masked fill, whose size does not depend on the mask's values.
        filled = name not in ("index", "_unsafe_index") and len(masks) == 1 and args[2].numel() == 1
        if masks and not filled:
            _count("boolean index")


def _written(func, args, kwargs):
    """The arguments that an operator writes into: in-place operators and those with out=."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [given[n] for n in names if isinstance(given.get(n), torch.Tensor)]


def _count(kind):
    if PretendGPU._inside:
        PretendGPU._inside[-1].synchronisations[f"{kind} at {_place()}"] += 1


def _place() -> str:
    """file:line of the innermost call that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith((_TORCH, "<")):
            # ComfyUI imports the pack through a link.
            path = Path(name).resolve()
            return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
