"""Command-line trainers, which make the files that the nodes read. Run them from the repository root.

Commands, as `python -m trainers.<name>`; each package's docstring lists its subcommands:

  encode       video files -> shards of normalised latents
  shell_lcc    fit, eval, info, import: Shell-LCC manifolds of video latents
  prism        cache, embed, collect, label, train, eval: PRISM reward heads
  geometry     score: geometry consistency of clips
  pairs        build: preference pairs from groups of candidate clips
  demo, demo_clips   the methods from end to end on a CPU, on toy clips and on real ones; in a checkout only

Rooms, shared by the commands; none of them imports a command:

  running      command line, devices and processes, checkpoints, progress, output files and logs
  wan          Wan's transformer, VAE and text encoder outside ComfyUI, prompts and sampling
  latents      latents on disk: reading, encoding of videos, shards
  video        decoding of video files, sizes and tone mapping
  preferences  tables and manifests of compared clips, groups of candidates
  scorers      scores of clips: geometry, PRISM, Shell-LCC
"""

from pathlib import Path

# Makes `from .kernels.x import y` find the repository's folder `kernels`, whatever the repository's folder is called. A
# top-level `kernels` could be Hugging Face's distribution of that name, which transformers and diffusers import.
__path__.append(str(Path(__file__).resolve().parents[1]))
