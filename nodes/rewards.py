"""Nodes that make rewards: of the video model itself, of geometry, of other packs' image scorers, and combinations."""

from comfy_api.latest import io

from ..kernels.geometry.tracks import BACKENDS
from ..kernels.geometry.views import MAX_VIEWS
from ..kernels.rewards.flow_residual import SIGMAS as RESIDUAL_SIGMAS
from ..kernels.rewards.flow_residual import FlowResidual
from ..kernels.rewards.geometry import GeometryReward
from ..kernels.rewards.mix import NORMALISATIONS, Mix
from ..kernels.rewards.prompt_gap import SIGMAS as GAP_SIGMAS
from ..kernels.rewards.prompt_gap import PromptGap
from ..kernels.rewards.schedule import Schedule
from .dense_reward import DenseGeometryReward
from .geometry_type import DA3ModelType
from .image_scorer import ImageScorerReward, parse_settings
from .prism_score import parse_sigmas
from .reward_type import RewardType, ScoredBy, as_reward, reward_input

CATEGORY = "model/sampling/rewards"
GAP, RESIDUAL, BOTH = "prompt gap", "flow residual", "both"


def model_reward(kind: str, draws: int, seed: int, sigmas: str, motion: float, title: str):
    """A reward that the video model itself computes. Raises ValueError naming the node `title`."""
    levels = tuple(parse_sigmas(sigmas, f"{title}, input 'sigmas'")) if sigmas.strip() else None
    outside = [s for s in levels or () if not 0 < s < 1]
    if outside:
        raise ValueError(f"{title}, input 'sigmas': {outside[0]:g} leaves no noise or no clip; expected between 0 and 1")
    residual = FlowResidual(levels or RESIDUAL_SIGMAS, draws, seed, motion)
    gap = PromptGap(levels or GAP_SIGMAS, draws, seed)
    return {GAP: gap, RESIDUAL: residual}.get(kind) or Mix([(gap, 1.0), (residual, 1.0)])


def draw_inputs() -> list[io.Input]:
    """draws, draw_seed, sigmas and motion."""
    return [
        io.Int.Input(
            "draws",
            default=4,
            min=1,
            max=64,
            tooltip="Noise samples per noise level, the same for all clips. More is steadier, and the cost is proportional.",
        ),
        io.Int.Input("draw_seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Seed of the noise samples."),
        io.String.Input(
            "sigmas",
            default="",
            tooltip=(
                "Noise levels, 0 (clean) to 1 (noise). Empty: "
                + ", ".join(f"{s:g}" for s in RESIDUAL_SIGMAS)
                + " for the flow residual, "
                + ", ".join(f"{s:g}" for s in GAP_SIGMAS)
                + " for the prompt gap."
            ),
            advanced=True,
        ),
        io.Float.Input(
            "motion",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Flow residual: weight of what moves, 0.8 in Proprio's hybrid. 0: all parts alike.",
            advanced=True,
        ),
    ]


class ModelReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_ModelReward",
            display_name="Model Reward",
            category=CATEGORY,
            description=(
                "A reward that needs no training, no file and no decoder: the video model itself judges its clips. The prompt "
                "gap tells whether a clip shows the prompt, the flow residual how well the model explains it."
            ),
            search_aliases=["flow residual", "proprio", "training free", "prompt gap", "reward", "rank", "intrinsic reward"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=[GAP, RESIDUAL, BOTH],
                    default=GAP,
                    tooltip=(
                        "prompt gap: works on early predictions and on finished clips; needs a negative prompt. flow "
                        "residual: for finished clips and drafts; drops bad clips. both: their mix, for finished clips."
                    ),
                ),
                *draw_inputs(),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="For Best-of-N, Reward Score and Mix Rewards.")],
        )

    @classmethod
    def execute(cls, kind, draws, draw_seed, sigmas, motion) -> io.NodeOutput:
        return io.NodeOutput(ScoredBy(model_reward(kind, draws, draw_seed, sigmas, motion, "Model Reward")))


class GeometryRewardNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_GeometryReward",
            display_name="Geometry Reward",
            category=CATEGORY,
            description=(
                "Consistency with one rigid scene as a reward of decoded frames, as the Geometry Consistency nodes measure "
                "it: by point tracks, or with Depth Anything 3. Best-of-N and Reward Score need a VAE; for finished clips."
            ),
            search_aliases=["geometry", "3d consistency", "reward", "rank", "intrinsic reward"],
            inputs=[
                io.Combo.Input(
                    "backend", options=list(BACKENDS), default=BACKENDS[0],
                    tooltip="Point tracker. auto: OpenCV if installed, which is faster, else torch.",
                ),
                DA3ModelType.Input(
                    "da3_model", optional=True,
                    tooltip="From Load Depth Anything 3 (Small or Base): depth and cameras instead of point tracks.",
                ),
                io.Int.Input(
                    "views", default=MAX_VIEWS, min=2, max=MAX_VIEWS, optional=True,
                    tooltip="With da3_model: number of frames given to it.",
                ),
                io.Int.Input(
                    "resolution", default=504, min=140, max=2520, step=14, optional=True,
                    tooltip="With da3_model: longest side in pixels that it runs at.",
                ),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="For Best-of-N, Reward Score and Mix Rewards.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, backend, da3_model=None, views=MAX_VIEWS, resolution=504) -> io.NodeOutput:
        if da3_model is None:
            return io.NodeOutput(ScoredBy(GeometryReward(backend)))
        return io.NodeOutput(ScoredBy(DenseGeometryReward(da3_model, views, resolution)))


class ImageScorer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_ImageScorerReward",
            display_name="Image Scorer Reward",
            category=CATEGORY,
            description=(
                "Uses a node of another pack that scores images (frames in, number out), such as an aesthetic score, as a "
                "reward of decoded frames."
            ),
            search_aliases=["aesthetic score", "image scorer", "wrap", "reward", "rank", "intrinsic reward"],
            inputs=[
                io.String.Input(
                    "node_id", default="", tooltip="Id of the node (in its properties): IMAGE input, FLOAT output."
                ),
                io.String.Input(
                    "settings", default="", multiline=True,
                    tooltip='Its other inputs as JSON, such as {"strength": 0.5}; left out ones have their defaults.',
                ),
                io.Int.Input("every", default=4, min=1, max=1000, tooltip="Every how many frames one is scored."),
                io.Boolean.Input("higher_is_better", default=True, tooltip="Off: a lower number is a better clip."),
                io.AnyType.Input(
                    "extra", optional=True, tooltip="What the node needs besides, such as its model: for its first such input."
                ),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="For Best-of-N, Reward Score and Mix Rewards.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, node_id, settings, every, higher_is_better, extra=None) -> io.NodeOutput:
        values = parse_settings(settings, "Image Scorer Reward, input 'settings'")
        return io.NodeOutput(ScoredBy(ImageScorerReward(node_id, values, extra, every, higher_is_better)))


class MixRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for number in range(1, 5):
            inputs += [
                reward_input(f"reward_{number}", "A reward, a PRISM head or a Shell-LCC manifold.", optional=number > 1),
                io.Float.Input(
                    f"weight_{number}", default=1.0, min=-100.0, max=100.0, step=0.05,
                    tooltip=f"Weight of reward {number}. A negative weight prefers what the reward calls worse.",
                ),
            ]  # fmt: skip
        return io.Schema(
            node_id="IntrinsicReward_MixRewards",
            display_name="Mix Rewards",
            category=CATEGORY,
            description=(
                "Weighted sum of rewards. Each is normalised among the candidates of a run, because figures of different "
                "units have no common scale."
            ),
            search_aliases=["combine", "weighted", "ensemble", "reward", "rank", "intrinsic reward"],
            inputs=[
                io.Combo.Input(
                    "normalise", options=list(NORMALISATIONS), default=NORMALISATIONS[0],
                    tooltip="z-score: difference from the mean in standard deviations. rank: the order only; robust.",
                ),
                *inputs,
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="For Best-of-N and Reward Score.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, normalise, reward_1, weight_1, weight_2, weight_3, weight_4, reward_2=None, reward_3=None, reward_4=None
    ) -> io.NodeOutput:
        given = [(reward_1, weight_1), (reward_2, weight_2), (reward_3, weight_3), (reward_4, weight_4)]
        parts = [(as_reward(value), weight) for value, weight in given if value is not None]
        sources = tuple(source for part, _ in parts for source in part.sources)
        if any(isinstance(part.reward, Schedule) for part, _ in parts):
            raise ValueError("Mix Rewards: a Reward Schedule cannot be mixed; mix first, then schedule the mixes")
        return io.NodeOutput(ScoredBy(Mix([(part.reward, weight) for part, weight in parts], normalise), sources))


class RewardSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_RewardSchedule",
            display_name="Reward Schedule",
            category=CATEGORY,
            description=(
                "Uses one reward while clips are noisy and another one later: a cheap one for the early checkpoints of "
                "Best-of-N, a good one for late checkpoints or for finished clips."
            ),
            search_aliases=["early late", "switch", "reward", "best of n", "intrinsic reward"],
            inputs=[
                reward_input("early", "The reward above the noise level until."),
                reward_input("late", "The reward at and below it, and for finished clips."),
                io.Float.Input(
                    "until", default=0.0, min=0.0, max=1.0, step=0.001, round=0.001,
                    tooltip="Noise level (sigma) from which the late reward is used. 0: for finished clips only (finalists).",
                ),
            ],
            outputs=[RewardType.Output(display_name="reward", tooltip="For Best-of-N.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, early, late, until) -> io.NodeOutput:
        a, b = as_reward(early), as_reward(late)
        return io.NodeOutput(ScoredBy(Schedule(a.reward, b.reward, until), a.sources + b.sources))


NODES = [ModelReward, GeometryRewardNode, ImageScorer, MixRewards, RewardSchedule]
