"""Direct preference optimisation of a Wan model (Flow-DPO), as a LoRA that ComfyUI's stock loader takes.

  cache   latents and embedded prompts of preference pairs, once, into a folder
  train   a LoRA (or all parameters) on that folder; neither a VAE nor a text encoder is in memory
  eval    a LoRA's implicit accuracy, and the errors of winners and losers apart, on held-out prompts
  merge   a LoRA into a full checkpoint

Pairs come from `python -m trainers.pairs build`, from preference records, or from a table. One GPU needs no launcher; several
work under `accelerate launch -m trainers.dpo train ...` or torchrun. Run the same command again after a crash or Ctrl-C, with
--resume_from_checkpoint latest for `train`.
"""
