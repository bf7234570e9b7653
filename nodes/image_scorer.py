"""A node of another pack that scores images, as a reward of decoded frames."""

import inspect
import json

import torch

import nodes as comfyui_nodes

from ..kernels.rewards.reward import FRAMES, ClipView, RewardError, RewardInfo, SingleFigure

IMAGE, FLOAT, WIDGETS = "IMAGE", "FLOAT", ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class ImageScorerReward(SingleFigure):
    """The mean of what a node returns for a clip's frames.

    node_id: of a node with an IMAGE input and a FLOAT output; settings: values of its other inputs by name; extra: the value
    of its first input that no widget can give, such as a model; step: every step-th frame is scored.
    """

    def __init__(self, node_id: str, settings: dict, extra=None, step: int = 1, higher_is_better: bool = True):
        cls = comfyui_nodes.NODE_CLASS_MAPPINGS.get(node_id)
        if cls is None:
            raise RewardError(
                f"there is no node with the id '{node_id}'; open the node's properties for its id, or install its pack"
            )
        self.node_id, self.cls, self.step = node_id, cls, step
        self.image, self.inputs = _inputs_of(node_id, cls, settings, extra)
        kinds = [str(kind) for kind in cls.RETURN_TYPES]
        if FLOAT not in kinds:
            raise RewardError(f"node '{node_id}' returns {', '.join(kinds) or 'nothing'}, expected a FLOAT")
        run = cls.execute if hasattr(cls, "PREPARE_CLASS_CLONE") else getattr(cls, cls.FUNCTION)
        if inspect.iscoroutinefunction(run):
            raise RewardError(f"node '{node_id}' runs asynchronously, and cannot be called while a model samples")
        self.output = kinds.index(FLOAT)
        self.info = RewardInfo(
            name=f"node '{node_id}'",
            reads=FRAMES,
            meaning=f"what the node '{node_id}' returns for the decoded frames, in its own unit",
            higher_is_better=higher_is_better,
            decodes=1,
        )

    def measure(self, view: ClipView) -> torch.Tensor:
        """Figures [B, 1]."""
        return torch.tensor([[self._score(frames[:: self.step])] for frames in view.frames()])

    def _score(self, frames: torch.Tensor) -> float:
        inputs = {**self.inputs, self.image: frames}
        if getattr(self.cls, "INPUT_IS_LIST", False):
            inputs = {name: [value] for name, value in inputs.items()}
        if hasattr(self.cls, "PREPARE_CLASS_CLONE"):
            # As ComfyUI's executor calls a V3 node, without hidden inputs.
            found = self.cls.execute.__func__(self.cls.PREPARE_CLASS_CLONE(None), **inputs)
            found = getattr(found, "args", found)
        else:
            found = getattr(self.cls(), self.cls.FUNCTION)(**inputs)
            found = found["result"] if isinstance(found, dict) else found
        value = found[self.output]
        # A list or a tensor has a value for every frame.
        values = torch.as_tensor(value, dtype=torch.float32).flatten()
        if not values.numel() or not bool(torch.isfinite(values).all()):
            raise RewardError(f"node '{self.node_id}' returned {value!r}, expected numbers")
        return float(values.mean())


def parse_settings(text: str, source: str) -> dict:
    """The settings of a JSON object, {} of an empty text. Raises ValueError naming `source`."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{source}: not JSON ({e}); expected inputs by name, such as {{"strength": 0.5}}') from None
    if not isinstance(found, dict):
        raise ValueError(f'{source}: found {text[:40]!r}, expected inputs by name, such as {{"strength": 0.5}}')
    return found


def _inputs_of(node_id: str, cls, settings: dict, extra) -> tuple[str, dict]:
    """(name of the node's image input, values of all others that it requires)."""
    described = cls.INPUT_TYPES()
    required, optional = described.get("required", {}), described.get("optional", {})
    unknown = settings.keys() - required.keys() - optional.keys()
    if unknown:
        known = ", ".join([*required, *optional])
        raise RewardError(f"node '{node_id}' has no input '{sorted(unknown)[0]}'; its inputs are {known}")
    images = [name for name, (kind, *_) in {**required, **optional}.items() if kind == IMAGE]
    if not images:
        raise RewardError(f"node '{node_id}' has no IMAGE input: it scores no frames")
    inputs = dict(settings)
    for name, (kind, *options) in required.items():
        if name in inputs or name == images[0]:
            continue
        options = options[0] if options else {}
        if isinstance(kind, list) or kind in WIDGETS:
            choices = kind if isinstance(kind, list) else options.get("options", [])
            if "default" not in options and not choices:
                raise RewardError(f"node '{node_id}': its input '{name}' has no default; give it in 'settings'")
            inputs[name] = options.get("default", choices[0] if choices else None)
        elif extra is not None:
            inputs[name], extra = extra, None
        else:
            raise RewardError(f"node '{node_id}' needs a {kind} for its input '{name}': connect it to 'extra'")
    return images[0], inputs
