"""Wan outside ComfyUI: transformer, VAE, text encoder, prompts and sampling, from ComfyUI's files or diffusers folders."""
