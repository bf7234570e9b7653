"""Geometry Best-of-N: select the clip that is most consistent with one rigid scene."""

import torch
from comfy_api.latest import io

from ..kernels.geometry.heat_map import full_error
from ..kernels.geometry.record import TRACKS, UNDETERMINED, GeometryRecord
from ..kernels.prism.plan import rank as best_first
from ..kernels.rewards.reward import FINISHED, Reward, RewardError
from ..kernels.rewards.schedule import at
from . import geometry_clips as shared
from .reward_type import RewardType, reward_input
from .select_top_k import select_latent

TITLE = "Geometry Best-of-N"


def rank(records: list[GeometryRecord]) -> list[int]:
    """Indices of the clips, best first.

    The order is that of the scores: consistent clips, then inconsistent ones, each by error (residual over parallax), then
    undetermined ones in input order.
    """
    return sorted(range(len(records)), key=lambda i: -records[i].score)


def board(records: list[GeometryRecord], order: list[int]) -> str:
    """The best clip and its verdict, and every clip from the best to the worst."""
    best = records[order[0]]
    if best.verdict == UNDETERMINED:
        first = f"None of {len(records)} clips can be judged, so the first is returned. Clip 1: {best.reason}"
    else:
        first = f"Best of {len(records)}: clip {order[0] + 1}, {best.verdict}"
    # The first line says what a score means and which way is better.
    first += ". Scores, higher is better: consistency with one rigid scene, 0 to 1, 0 where a clip cannot be judged"
    lines = [first]
    for i in order:
        r = records[i]
        error = f", error {r.error:.4g}" if r.verdict != UNDETERMINED else ""
        lines.append(f"  clip {i + 1}: {r.verdict}, score {r.score:.3f}{error}; {r.reason}")
    return "\n".join(lines)


def pick_latent(latents: list[dict], index: int, count: int) -> dict:
    """Item `index` of LATENTs with `count` items in total. Raises ValueError for another total."""
    sizes = [latent["samples"].shape[0] for latent in latents]
    if sum(sizes) != count:
        raise ValueError(
            f"{TITLE}, input 'latent': {sum(sizes)} latents for {count} clips; connect the latents of the images"
        )
    for latent, size in zip(latents, sizes, strict=True):
        if index < size:
            return select_latent(latent, [index], size)
        index -= size


class FramesView:
    """A ClipView of decoded clips: there is no latent and no model."""

    sigma = FINISHED

    def __init__(self, clips: list[torch.Tensor]):
        self._clips = clips

    def frames(self) -> list[torch.Tensor]:
        return self._clips

    def _missing(self, *_, **__):
        raise RewardError(
            f"{TITLE}, input 'reward': this node has decoded frames only; connect a reward of frames (Geometry Reward, Image "
            "Scorer Reward or a mix of them), or use Reward Score"
        )

    noisy = clean = velocity = features = _missing


def reward_board(records: list[GeometryRecord], order: list[int], scores: list[float], reward: Reward) -> str:
    """As `board`, for an order by a reward."""
    sign = "" if reward.info.higher_is_better else "minus "
    lines = [f"Best of {len(records)}: clip {order[0] + 1}. Scores, higher is better: {sign}{reward.info.meaning}"]
    lines += [f"  clip {i + 1}: score {scores[i]:.4g}; geometry: {records[i].verdict}, {records[i].score:.3f}" for i in order]
    return "\n".join(lines)


class GeometryBestOfN(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_GeometryBestOfN",
            display_name=TITLE,
            category=shared.CATEGORY,
            description=(
                "Selects, from several clips of one prompt, the one that is most consistent with one rigid scene, by the "
                "residual of the point tracks relative to the parallax. Slow, still, panned and flat clips gain nothing: an "
                "undetermined clip never wins over one that can be judged."
            ),
            search_aliases=["best of n", "pick best", "3d consistency", "geometry", "seed search", "rank", "intrinsic reward"],
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip=(
                        "The frames of all clips one after another, as VAE Decode returns a batch of video latents; or a "
                        "list of clips, which may differ in length and size."
                    ),
                ),
                io.Int.Input(
                    "clips",
                    default=4,
                    min=1,
                    max=4096,
                    tooltip="Number of clips in images, one after another; 1 for a list of single clips.",
                ),
                shared.backend_input(),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The latents that the images were decoded from; the best is selected too."
                ),
                reward_input(
                    "reward",
                    "Selects by this reward of frames instead: Geometry Reward, Image Scorer Reward or a mix.",
                    optional=True,
                    types=[RewardType],
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames of the best clip."),
                io.Latent.Output(display_name="latent", tooltip="Its latent, if latents are connected."),
                io.Int.Output(
                    display_name="index",
                    tooltip="Its index, from 0. If no clip can be judged: 0, with the verdict undetermined.",
                ),
                io.String.Output(
                    display_name="verdict", tooltip="Verdict of the best clip: consistent, inconsistent or undetermined."
                ),
                io.Float.Output(
                    display_name="clip_scores",
                    is_output_list=True,
                    tooltip=(
                        "The score of every clip, higher is better, in input order: 0 to 1 for geometry, 0 if undetermined; "
                        "or the reward's."
                    ),
                ),
                io.String.Output(
                    display_name="record",
                    is_output_list=True,
                    tooltip="All measurements of every clip as JSON, as a list, for Record Preference.",
                ),
                io.Image.Output(
                    display_name="heat_map", tooltip="Errors as colours over the dimmed frames of the best clip."
                ),
                io.String.Output(display_name="report", tooltip="The clips from the best to the worst, as text."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, clips, backend, latent=None, reward=None) -> io.NodeOutput:
        # Every input is a list here; widgets have one value.
        source = f"{TITLE}, input 'images'"
        parts = [clip for batch in images for clip in shared.split(batch, clips[0], source)]
        scored = shared.score(parts, backend[0], source)
        records = [s.record for s in scored]
        order, scores, text = rank(records), [r.score for r in records], None
        if reward is not None:
            used = at(reward[0].reward, FINISHED)
            scores = used.scores(used.measure(FramesView(parts))).tolist()
            order = best_first(scores, len(scores))
            text = reward_board(records, order, scores, used)
        best = order[0]
        picked = None if latent is None else pick_latent(latent, best, len(parts))
        # The colour scale covers all clips, though only the best is drawn.
        full = full_error([s.error_map for s in scored], TRACKS)
        drawn = shared.drawn(parts[best], scored[best], full)
        heat = shared.on_wire(drawn)
        text = text or board(records, order)
        shared.add_metadata(cls, TITLE, scored)
        return io.NodeOutput(
            parts[best],
            picked,
            best,
            records[best].verdict,
            scores,
            [r.dumps() for r in records],
            heat,
            text,
            ui=shared.show(cls, text, [parts[best]], [drawn], [records[best]], full, [f"Clip {best + 1}"]),
        )


NODES = [GeometryBestOfN]
