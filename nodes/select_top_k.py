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


def select_from_list(latents: list[dict], indices: list[int], clips: int) -> dict:
    """The LATENT with the clips `indices`, in that order, of one batch or of a list of LATENTs with `clips` items in total.

    Raises ValueError when the list has another number of clips, or when the chosen clips do not fit into one batch.
    """
    sizes = [latent["samples"].shape[0] for latent in latents]
    if sum(sizes) != clips:
        raise ValueError(f"Select Top-K, input 'latent': {sum(sizes)} clips for {clips} scores; score the same batch")
    if len(latents) == 1:
        return select_latent(latents[0], indices, clips)
    places = [(number, item) for number, size in enumerate(sizes) for item in range(size)]
    chosen = [select_latent(latents[number], [item], sizes[number]) for number, item in (places[i] for i in indices)]
    _require_one_shape([c["samples"].shape[1:] for c in chosen], "latent")
    out = dict(chosen[0])
    for key, value in chosen[0].items():
        parts = [c.get(key) for c in chosen]
        if isinstance(value, torch.Tensor) and all(isinstance(p, torch.Tensor) and p.shape == value.shape for p in parts):
            out[key] = torch.cat(parts)
        elif isinstance(value, list) and all(isinstance(p, list) for p in parts):
            out[key] = [entry for part in parts for entry in part]
    return out


def select_frames(images: list[torch.Tensor], indices: list[int], clips: int) -> torch.Tensor:
    """The frames [T, H, W, 3] of the clips `indices`, one after another, of one batch or of a list of batches.

    Every batch holds equally many of the `clips` clips, of equal length within the batch. Raises ValueError otherwise, or when
    the chosen clips differ in size.
    """
    per_batch, rest = divmod(clips, len(images))
    counts = [batch.shape[0] for batch in images]
    if rest or any(count % per_batch for count in counts):
        raise ValueError(
            f"Select Top-K, input 'images': {sum(counts)} frames are not {clips} clips of equal length (in {len(images)} "
            "batches); decode the scored batch"
        )
    split = [clip for batch in images for clip in batch.reshape(per_batch, -1, *batch.shape[1:])]
    chosen = [split[i] for i in indices]
    _require_one_shape([c.shape[1:] for c in chosen], "images")
    return torch.cat(chosen)


def _require_one_shape(shapes: list[torch.Size], socket: str) -> None:
    if len(set(shapes)) > 1:
        found = " and ".join(str(list(s)) for s in sorted(set(shapes)))
        raise ValueError(
            f"Select Top-K, input '{socket}': the best clips have shapes {found} and do not fit into one batch; set k to 1"
        )


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
                io.Latent.Input(
                    "latent", optional=True, tooltip="A batch of latents, or a list of batches, with one item per score."
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Decoded frames of all clips, one after another, equally many per clip; or a list of clips.",
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
        picked = None if latent is None else select_from_list(latent, indices, n)
        frames = None if images is None else select_frames(images, indices, n)
        return io.NodeOutput(picked, frames, [scores[i] for i in indices], indices)


NODES = [SelectTopK]
