"""The caption grammar of the toy world: five attributes, a few templates, and combinations held out from training."""

import itertools
from dataclasses import dataclass

import torch

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("ball", "cube", "cone")
ROOMS = ("wood", "brick", "tile", "checker")
MOVES = ("still", "left", "right", "forward", "orbit")
SPEEDS = ("slow", "fast")
VALUES = {"colour": COLOURS, "shape": SHAPES, "room": ROOMS, "move": MOVES, "speed": SPEEDS}

# Every word occurs once in a caption and has one meaning, because Wan's cross-attention has no positions.
OBJECT = ("a {colour} {shape}", "one {colour} {shape}", "the {colour} {shape}")
PLACE = (" in a {room} room", " inside a {room} room", ", {room} room")
CAMERA = {
    "still": (", static camera", ", camera holds still"),
    "left": (", {speed} pan left", ", camera pans left {speed}"),
    "right": (", {speed} pan right", ", camera pans right {speed}"),
    "forward": (", {speed} dolly in", ", camera moves forward {speed}"),
    "orbit": (", {speed} orbit", ", camera orbits {speed}"),
}


@dataclass(frozen=True)
class Attributes:
    """The attributes that a caption names. speed is None where the camera is still."""

    colour: str
    shape: str
    room: str
    move: str
    speed: str | None

    def items(self) -> list[tuple[str, str]]:
        """(attribute, value) of every attribute that this clip has."""
        return [(k, v) for k, v in self.__dict__.items() if v is not None]


def combinations() -> list[Attributes]:
    """All 432 combinations, in a fixed order."""
    camera = [(m, s) for m in MOVES for s in (SPEEDS if m != "still" else (None,))]
    return [Attributes(*values, *path) for *values, path in itertools.product(COLOURS, SHAPES, ROOMS, camera)]


def is_held_out(a: Attributes) -> bool:
    """Whether the combination is one of the eighth that training never sees. Every pair of values still occurs in training."""
    speed = 0 if a.speed is None else 1 + SPEEDS.index(a.speed)
    code = COLOURS.index(a.colour) + 3 * SHAPES.index(a.shape) + 5 * ROOMS.index(a.room) + 7 * MOVES.index(a.move) + 2 * speed
    return code % 8 == 3


def draw(generator: torch.Generator, held_out: bool = False) -> Attributes:
    """Random attributes, uniform over moves and over the values of each other attribute, held out from training or not."""
    while True:
        move = _choice(MOVES, generator)
        speed = None if move == "still" else _choice(SPEEDS, generator)
        a = Attributes(*(_choice(v, generator) for v in (COLOURS, SHAPES, ROOMS)), move, speed)
        if is_held_out(a) == held_out:
            return a


def caption(a: Attributes, generator: torch.Generator | None = None) -> str:
    """A caption of at most 12 words from random templates; without a generator, from the first template of each part."""
    parts = (OBJECT, PLACE, CAMERA[a.move])
    chosen = [p[0] if generator is None else _choice(p, generator) for p in parts]
    return "".join(chosen).format(**dict(a.items()))


def other_than(a: Attributes, attribute: str, generator: torch.Generator) -> Attributes:
    """The same attributes with a different value of one of them, for wrong captions."""
    values = [v for v in VALUES[attribute] if v != getattr(a, attribute)]
    changed = a.__dict__ | {attribute: _choice(values, generator)}
    if changed["move"] == "still":
        changed["speed"] = None
    elif changed["speed"] is None:
        changed["speed"] = _choice(SPEEDS, generator)
    return Attributes(**changed)


def vocabulary() -> list[str]:
    """All words of all captions, sorted; the comma counts as a word."""
    return sorted({word for text in every_caption() for word in text.replace(",", " , ").split()})


def every_caption() -> list[str]:
    """All captions of all combinations and templates, in a fixed order."""
    return [
        "".join(parts).format(**dict(a.items()))
        for a in combinations()
        for parts in itertools.product(OBJECT, PLACE, CAMERA[a.move])
    ]


def _choice(values, generator: torch.Generator):
    return values[int(torch.randint(0, len(values), (), generator=generator))]
