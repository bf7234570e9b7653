"""The split preference step, which ComfyUI's node needs as well: see kernels.tuning.split_step."""

from ..kernels.tuning.split_step import (
    NoisyPair,
    PairFigures,
    Reference,
    Velocity,
    backward,
    measure,
    measure_reference,
    same_randomness,
)

__all__ = [
    "NoisyPair", "PairFigures", "Reference", "Velocity", "backward", "measure", "measure_reference", "same_randomness",
]  # fmt: skip
