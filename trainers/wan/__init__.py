"""Wan 2.1 outside ComfyUI: transformer, VAE, text encoder, prompts and sampling, from the files that ComfyUI users have."""
