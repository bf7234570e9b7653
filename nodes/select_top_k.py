"""Select Top-K: select the best clips of a batch by their scores."""

import torch
from comfy_api.latest import io

from ..kernels.prism.plan import rank


def select_latent(latent: dict, indices: list[int], clips: int) -> dict:
    """The LATENT with the batch items `indices`, in that order, and with their other entries (masks, batch indices)."""
    out = dict(latent)
    for key, value in latent.items():
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == clips:
            out[key] = value[indices]
        elif isinstance(value, list) and len(value) == clips:
            out[key] = [value[i] for i in indices]
    return out


class SelectTopK(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_SelectTopK",
            display_name="Select Top-K",
            category="model/latent/batch",
            description=(
                "Keeps the best clips of a batch, best first, by a list of scores such as PRISM Score's clip_scores. Takes "
                "latents, decoded frames, or both."
            ),
            search_aliases=["best of n", "pick best", "rank", "top k", "intrinsic reward"],
            inputs=[
                io.Float.Input(
                    "scores", force_input=True, tooltip="One score per clip, higher is better: a clip_scores output."
                ),
                io.Int.Input("k", default=1, min=1, max=4096, tooltip="How many clips to keep."),
                io.Latent.Input("latent", optional=True, tooltip="A batch of latents, one item per score."),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Decoded frames of all clips, one after another, equally many per clip.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The best k latents, best first."),
                io.Image.Output(display_name="images", tooltip="The frames of the best k clips, best first."),
                io.Float.Output(display_name="scores", is_output_list=True, tooltip="Their scores."),
                io.Int.Output(
                    display_name="indices", is_output_list=True, tooltip="Their indices in the batch, from 0."
                ),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, scores, k, latent=None, images=None) -> io.NodeOutput:
        if latent is None and images is None:
            raise ValueError("Select Top-K: connect a batch of latents, decoded images, or both")
        n, keep = len(scores), k[0]
        if keep > n:
            raise ValueError(f"Select Top-K, input 'k': {keep} of {n} scored clips; lower k, or score more clips")
        indices = rank(scores, keep)
        picked = None
        if latent is not None:
            found = latent[0]["samples"].shape[0]
            if found != n:
                raise ValueError(f"Select Top-K, input 'latent': {found} clips for {n} scores; score the same batch")
            picked = select_latent(latent[0], indices, n)
        frames = None
        if images is not None:
            count = images[0].shape[0]
            if count % n:
                raise ValueError(
                    f"Select Top-K, input 'images': {count} frames are not {n} clips of equal length; decode the scored batch"
                )
            frames = images[0].view(n, count // n, *images[0].shape[1:])[indices].flatten(0, 1)
        return io.NodeOutput(picked, frames, [scores[i] for i in indices], indices)


NODES = [SelectTopK]
