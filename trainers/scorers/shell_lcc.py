"""Shell-LCC score of a clip: minus |RMS distance of its tokens - the shell's radius| (arXiv 2606.30248), at most 0."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ..kernels.latent_space import LatentSpaceError
from ..kernels.shell_lcc import evaluation, manifold
from ..preferences.clips import BAD_CLIP, ClipReader
from ..preferences.groups import Group
from ..running.device import pick_device
from ..running.identity import digest_of, file_digest
from ..running.progress import Bar
from .cache import ScoreCache, skipped

SHELL_LCC = "shell_lcc"


def score(groups: Sequence[Group], path: str | Path, device: str, reader: ClipReader, cache: ScoreCache) -> Iterator[dict]:
    """Rows of the cache for every candidate, by the manifold of a file.

    device: as --device, such as "auto". Raises FormatError for another kind of file, and VaeError where the VAE cannot be
    loaded; a clip that cannot be read gives a row with "skipped".
    """
    path = Path(path)
    shell = manifold.load(path, pick_device(device))
    settings = digest_of({"manifold": file_digest(path)} | reader.described(cache.groups))
    with Bar("Shell-LCC", sum(len(g.candidates) for g in groups), "clip", cache.shown) as bar:
        for candidate in (c for g in groups for c in g.candidates):
            row = cache.find(candidate, SHELL_LCC, settings)
            if row is None:
                reader.prepare(candidate)
                try:
                    z, space = reader.latents(candidate)
                    if not space.same_as(shell.space):
                        raise LatentSpaceError(
                            f"{path}: a manifold of '{shell.space.id}' latents, the clip has '{space.id}' latents"
                        )
                    found = {"value": distance_to_shell(shell, z)}
                except BAD_CLIP as e:
                    found = skipped(candidate, e)
                row = cache.add(candidate, SHELL_LCC, settings, found)
            yield row
            bar.add()


def distance_to_shell(shell: manifold.ShellManifold, z: Tensor) -> float:
    """The score of normalised latents z [C, T, h, w]; at most 0."""
    return -abs(float(evaluation.score(shell, z).double().square().mean().sqrt()) - shell.radius)
