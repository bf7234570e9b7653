"""Command-line trainers: they make the files that the nodes read. From the repository root: `python -m trainers.<name>`."""

from pathlib import Path

# `from .kernels.x import y` then finds the folder beside this one, whatever the repository's folder is called, and never
# the unrelated distribution `kernels` that transformers and diffusers look for at the top level.
__path__.append(str(Path(__file__).resolve().parents[1]))
