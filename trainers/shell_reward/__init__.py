"""Tunes a Wan model with the Shell-LCC reward (arXiv 2606.30248), as a LoRA that ComfyUI's stock loader takes.

  train   a LoRA (or all parameters): one-step predictions from pure noise are brought into the manifold's calibrated band
  eval    distances and band of a LoRA's clips and predictions against the base's, on held-out prompts
  merge   a LoRA into a full checkpoint

It needs prompts and a manifold (`python -m trainers.shell_lcc fit`), no video and no VAE. One GPU needs no launcher; several
work under `accelerate launch -m trainers.shell_reward train ...` or torchrun. Run the same command again after a crash or
Ctrl-C, with --resume_from_checkpoint latest for `train`.
"""
