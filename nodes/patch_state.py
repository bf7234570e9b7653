"""State that patches of a model keep from step to step, saved and restored, so that interleaved runs do not share it.

Patches of other nodes keep state in variables of closures (APG's momentum), in attributes of objects (step caches), in
containers inside transformer_options, on the diffusion model (TeaCache), in hook keyframes, and in random generators. A run
that is suspended keeps its own copy of all of it. References are kept and not copies of tensors: a patch that overwrites a
tensor in place, or that keeps state in a global variable, is not seen.
"""

import collections
import functools
import types
from collections.abc import Iterator

import comfy.model_patcher
import torch

_EMPTY = object()
# Attributes that torch keeps on every module.
_MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))
# Not entered: they have no state of a run, or ComfyUI's memory management changes them in the meantime.
_SKIPPED = (
    torch.nn.Module, torch.Tensor, comfy.model_patcher.ModelPatcher, types.ModuleType, type, str, bytes, int, float, complex,
    torch.device, torch.dtype, types.BuiltinFunctionType,
)  # fmt: skip
_CONTAINERS = (dict, list, set, collections.deque)
# Larger containers hold weights and not state.
_LARGEST = 512
_DEPTH = 12


class PatchState:
    """Finds the state of the patches that a guider samples with.

    guider: while it samples; ignored: types of objects whose state is shared on purpose.
    """

    def __init__(self, guider, ignored: tuple[type, ...] = ()):
        self.guider, self.ignored = guider, ignored

    def save(self) -> "Saved":
        """The state as it is now."""
        return Saved([(place, name, place.read()) for place, name in self._places()])

    def restore(self, saved: "Saved", keyframes: bool = True) -> None:
        """Puts a saved state back. keyframes: also those of hooks."""
        stale = False
        for place, _, content in saved.entries:
            if isinstance(place, _Keyframe) and not keyframes:
                continue
            stale = stale or (isinstance(place, _Keyframe) and place.keyframe is not content.get("_current_keyframe"))
            place.write(content)
        if stale:
            # Weights patched at another keyframe's strength.
            self.guider.model_patcher.clear_cached_hook_weights()

    def changed_since(self, saved: "Saved") -> list[str]:
        """Names of the patches whose state is no longer what was saved."""
        names = [name for place, name, content in saved.entries if not _same(place.read(), content)]
        return list(dict.fromkeys(names))

    def _places(self) -> Iterator[tuple[object, str]]:
        """(place, name of the patch that it belongs to)."""
        yield _RandomNumbers(), "a random generator"
        guider, seen = self.guider, set()
        network = getattr(guider.inner_model, "diffusion_model", None)
        if network is not None:
            yield _ModuleAttributes(network), f"{type(network).__name__} (attributes)"
        conds = [c for several in guider.conds.values() for c in several or ()]
        # Of the guider itself only what it holds directly: its model and prompts are shared by all runs.
        yield _Attributes(guider), _name_of(guider)
        for root in (guider.model_options, [c.get("control") for c in conds], [c.get("hooks") for c in conds]):
            yield from self._walk(root, "", seen, 0)

    def _walk(self, value, name: str, seen: set[int], depth: int) -> Iterator[tuple[object, str]]:
        if value is None or isinstance(value, (*_SKIPPED, *self.ignored)) or id(value) in seen or depth > _DEPTH:
            return
        seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            if len(value) <= _LARGEST:
                if name:
                    yield _Container(value), name
                for item in list(value.values() if isinstance(value, dict) else value):
                    yield from self._walk(item, name, seen, depth + 1)
        elif isinstance(value, tuple | frozenset):
            for item in value:
                yield from self._walk(item, name, seen, depth + 1)
        elif isinstance(value, types.FunctionType):
            name = name or _name_of(value)
            for cell in value.__closure__ or ():
                if id(cell) not in seen:
                    seen.add(id(cell))
                    place = _Cell(cell)
                    yield place, name
                    yield from self._walk(place.read(), name, seen, depth + 1)
        elif isinstance(value, types.MethodType):
            yield from self._walk(value.__func__, name or _name_of(value.__self__), seen, depth + 1)
            yield from self._walk(value.__self__, name, seen, depth + 1)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                yield from self._walk(part, name or _name_of(value.func), seen, depth + 1)
        elif isinstance(value, torch.Generator):
            yield _Generator(value), name or "a random generator"
        elif hasattr(value, "__dict__") and not type(value).__module__.startswith(("torch", "threading")):
            name = name or _name_of(value)
            yield (_Keyframe if hasattr(value, "prepare_current_keyframe") else _Attributes)(value), name
            for item in list(vars(value).values()):
                yield from self._walk(item, name, seen, depth + 1)


class Saved:
    """A saved state. entries: (place, name of the patch, content)."""

    def __init__(self, entries: list[tuple[object, str, object]]):
        self.entries = entries


class _Cell:
    """A variable of a closure."""

    def __init__(self, cell):
        self.cell = cell

    def read(self):
        try:
            return self.cell.cell_contents
        except ValueError:
            return _EMPTY

    def write(self, content):
        if content is not _EMPTY:
            self.cell.cell_contents = content
        elif self.read() is not _EMPTY:
            del self.cell.cell_contents


class _Attributes:
    """The attributes of an object."""

    def __init__(self, owner):
        self.attributes = vars(owner)

    def read(self):
        return dict(self.attributes)

    def write(self, content):
        self.attributes.clear()
        self.attributes.update(content)


class _Keyframe(_Attributes):
    """Attributes of a HookKeyframeGroup."""

    @property
    def keyframe(self):
        return self.attributes.get("_current_keyframe")


class _ModuleAttributes:
    """The attributes of a module that torch does not keep there itself."""

    def __init__(self, module: torch.nn.Module):
        self.attributes = vars(module)

    def read(self):
        return {k: v for k, v in self.attributes.items() if k not in _MODULE_ATTRIBUTES}

    def write(self, content):
        for name in self.read().keys() - content.keys():
            del self.attributes[name]
        self.attributes.update(content)


class _Container:
    """A dict, list, set or deque."""

    def __init__(self, container):
        self.container = container

    def read(self):
        return self.container.copy()

    def write(self, content):
        self.container.clear()
        (self.container.update if isinstance(self.container, dict | set) else self.container.extend)(content)


class _Generator:
    """A random generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def read(self):
        return self.generator.get_state()

    def write(self, content):
        self.generator.set_state(content)


class _RandomNumbers:
    """The global random generators of the CPU and, once it is in use, of the current GPU."""

    def read(self):
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]

    def write(self, content):
        torch.set_rng_state(content[0])
        if len(content) > 1:
            torch.cuda.set_rng_state(content[1])


def _same(a, b) -> bool:
    """Whether contents hold the same objects, or equal numbers."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        # Only states of generators are new tensors each time that they are read.
        return a.dtype == torch.uint8 and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, int | float | str | set) and a == b


def _name_of(patch) -> str:
    """Such as "APG (nodes_apg)"."""
    where = patch if hasattr(patch, "__qualname__") else type(patch)
    # ComfyUI names modules of node packs after their paths.
    module = where.__module__.replace("\\", "/").rsplit("custom_nodes/", 1)[-1].rsplit("/", 1)[-1]
    return f"{where.__qualname__.split('.')[0]} ({module})"
