"""Record Preference: save the latents of a prompt's candidates with their scores, for the trainers."""

import json
import logging

import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.files.header import DAMAGED
from ..kernels.geometry.record import GeometryRecord
from ..kernels.latent_space import KNOWN, LatentSpace
from . import preference_folder
from .latents import AUTO, choose_space, normalised_warning, read_raw
from .output_names import in_output, require_plain

TITLE = "Record Preference"
FOLDER = "intrinsic_reward_preferences"
NOT_CHOSEN = -1


def folder_of(name: str) -> str:
    """The folder of records `name` in the output directory. Raises ValueError unless it is a plain folder name."""
    return in_output(FOLDER, require_plain(name, f"{TITLE}, input 'name'", "folder"))


def read_latents(latents: list[dict], choice: str) -> tuple[torch.Tensor, LatentSpace, str | None]:
    """(normalised latents [N, C, T, h, w], their space, a warning or None) of a list of LATENT batches of one size."""
    source = f"{TITLE}, input 'latent'"
    space = choose_space(latents[0]["samples"].shape[1], choice, source)
    raw = [read_raw(latent, space, source).float().cpu() for latent in latents]
    shapes = {tuple(z.shape[1:]) for z in raw}
    if len(shapes) > 1:
        raise ValueError(f"{source}: found latents of {sorted(shapes)}, expected candidates of one size and length")
    raw = torch.cat(raw)
    return space.normalise(raw), space, normalised_warning(raw, space, source)


def read_geometry(texts: list[str]) -> list[GeometryRecord]:
    """Parses the records of geometry nodes. Raises ValueError naming the input for any other text."""
    found = []
    for number, text in enumerate(texts, 1):
        try:
            found.append(GeometryRecord.from_json(json.loads(text)))
        except (*DAMAGED, AttributeError) as e:
            raise ValueError(
                f"{TITLE}, input 'geometry', clip {number}: found {text[:40]!r} ({type(e).__name__}), expected the record "
                "output of a geometry node"
            ) from e
    return found


def parse_seeds(text: str) -> list[int] | None:
    """Seeds from a text such as "5, 9"; None for an empty one. Raises ValueError naming the input."""
    parts = text.replace(",", " ").split()
    if not all(part.isascii() and part.isdecimal() and len(part) <= 20 and int(part) < 1 << 64 for part in parts):
        raise ValueError(f"{TITLE}, input 'seed_list': found {text[:80]!r}, expected seeds such as 5, 9, or nothing")
    return [int(part) for part in parts] or None


def require_one_each(name: str, values: list | None, count: int, hint: str) -> None:
    if values is not None and len(values) != count:
        raise ValueError(f"{TITLE}, input '{name}': found {len(values)} for {count} latents; {hint}")


class RecordPreference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_RecordPreference",
            display_name=TITLE,
            category="model/latent/advanced",
            description=(
                "Adds the candidates of one prompt, with their scores, to a folder of preference records in the output "
                "directory, as latents and so without video compression loss. "
                "`python -m trainers.pairs build` makes training pairs from them."
            ),
            search_aliases=["preference", "save pairs", "dpo", "dataset", "winner", "loser", "record", "intrinsic reward"],
            inputs=[
                io.Latent.Input(
                    "latent", tooltip="The candidates: a batch of video latents from a sampler, or a list."
                ),
                io.String.Input(
                    "prompt", default="", multiline=True, tooltip="The prompt that the candidates were made from, as text."
                ),
                io.String.Input("negative", default="", multiline=True, tooltip="The negative prompt, as text."),
                io.String.Input(
                    "model", default="", tooltip="Name of the model, as free text: pairs are built only within one model."
                ),
                io.String.Input(
                    "name",
                    default="my_preferences",
                    tooltip=f"The folder output/{FOLDER}/<name>; new records are appended.",
                ),
                io.Combo.Input(
                    "latent_space",
                    options=[AUTO, *KNOWN],
                    default=AUTO,
                    tooltip="The VAE that the latents belong to. auto: 16 channels are wan21, 48 are wan22.",
                ),
                io.String.Input(
                    "score_name",
                    default="score",
                    tooltip="Name of the scores in the record, such as prism or shell_lcc.",
                ),
                io.Int.Input(
                    "winner",
                    default=NOT_CHOSEN,
                    min=NOT_CHOSEN,
                    max=4095,
                    tooltip="Optional choice: index of the better candidate, from 0. -1: none.",
                ),
                io.Int.Input(
                    "loser", default=NOT_CHOSEN, min=NOT_CHOSEN, max=4095, tooltip="The worse candidate, from 0. -1: none."
                ),
                io.Int.Input(
                    "seeds",
                    force_input=True,
                    optional=True,
                    tooltip=(
                        "One seed per candidate, such as the seeds of PRISM Best-of-N. Leave unconnected for a batch of "
                        "one KSampler, whose items have no separate seeds."
                    ),
                ),
                io.Float.Input(
                    "scores",
                    force_input=True,
                    optional=True,
                    tooltip="One score per candidate, higher is better: a clip_scores output.",
                ),
                io.String.Input(
                    "geometry",
                    force_input=True,
                    optional=True,
                    tooltip="The record output of a geometry node, one per candidate.",
                ),
                io.String.Input(
                    "seed_list",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="The candidates' seeds as text, such as 5, 9, where seeds is not connected; may be empty.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="record", tooltip="The record's id; file names of its latents contain it."),
                io.String.Output(display_name="folder", tooltip="The folder of the records, for `trainers.pairs build`."),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, latent, prompt, negative, model, name, latent_space, score_name, winner, loser, seeds=None, scores=None,
        geometry=None, seed_list=("",),
    ) -> io.NodeOutput:  # fmt: skip
        # Every input is a list here; widgets have one value.
        if seeds is None:
            seeds = parse_seeds(seed_list[0])
        folder = folder_of(name[0])
        z, space, warning = read_latents(latent, latent_space[0])
        count = z.shape[0]
        require_one_each("seeds", seeds, count, "items of a KSampler batch have no separate seeds: leave it unconnected")
        require_one_each("scores", scores, count, "score the same batch, and connect clip_scores")
        require_one_each("geometry", geometry, count, "score the same batch: set 'clips' of the geometry node to its size")
        if (winner[0] == NOT_CHOSEN) != (loser[0] == NOT_CHOSEN):
            raise ValueError(f"{TITLE}: winner {winner[0]} and loser {loser[0]}; give both, or -1 for both")
        record = preference_folder.append(
            folder,
            prompt[0],
            z,
            space,
            negative=negative[0],
            model=model[0],
            seeds=seeds,
            scores=None if scores is None else {score_name[0]: scores},
            geometry=None if geometry is None else read_geometry(geometry),
            preference=None if winner[0] == NOT_CHOSEN else (winner[0], loser[0]),
        )
        text = f"Recorded {count} candidate{'' if count == 1 else 's'} as {record} in output/{FOLDER}/{name[0]}"
        if warning is not None:
            logging.warning(warning)
            text = f"{warning}\n{text}"
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        return io.NodeOutput(record, folder, ui=ui.PreviewText(text))

    @classmethod
    def validate_inputs(cls, name):
        # Inputs are lists here too; a connected value is None before the workflow runs.
        if name[0] is not None:
            try:
                folder_of(name[0])
            except ValueError as e:
                return str(e)
        return True


NODES = [RecordPreference]
