"""The socket type of rewards. PRISM heads and Shell-LCC manifolds are rewards too and connect to the same inputs."""

from dataclasses import dataclass

from comfy_api.latest import io

from ..kernels.rewards.prism import PrismReward
from ..kernels.rewards.reward import Reward
from ..kernels.rewards.shell_lcc import ShellReward
from .latents import require_model_space
from .prism_type import Prism, PrismType
from .shell_lcc_type import ShellLCC, ShellLCCType

RewardType = io.Custom("INTRINSIC_REWARD")
# Everything that a reward input takes.
TYPES = [RewardType, PrismType, ShellLCCType]


@dataclass(frozen=True)
class ScoredBy:
    """The value of an INTRINSIC_REWARD wire.

    reward: scores clips; sources: the values of PRISM head and manifold wires that it needs, which are loaded before sampling
    and checked against the model.
    """

    reward: Reward
    sources: tuple[Prism | ShellLCC, ...] = ()

    @property
    def patchers(self) -> list:
        """What ComfyUI must load together with the model."""
        return [source.patcher for source in self.sources]

    def require_model(self, model) -> str | None:
        """A warning, or None. Raises BackboneError or LatentSpaceError for a source that does not fit the model."""
        warnings = []
        for source in self.sources:
            if isinstance(source, Prism):
                warnings.append(source.require_model(model))
            else:
                require_model_space(model, source.manifold.space, f"Shell-LCC manifold '{source.manifold.name}'")
        return "\n".join(w for w in warnings if w) or None


def as_reward(value) -> ScoredBy:
    """The value of any wire of TYPES as a reward."""
    if isinstance(value, Prism):
        return ScoredBy(PrismReward(value.loaded), (value,))
    if isinstance(value, ShellLCC):
        return ScoredBy(ShellReward(value.manifold), (value,))
    return value


def reward_input(name: str, tooltip: str, optional: bool = False, types=TYPES) -> io.Input:
    """An input for rewards, PRISM heads and manifolds."""
    return io.MultiType.Input(name, types=types, optional=optional, tooltip=tooltip)
