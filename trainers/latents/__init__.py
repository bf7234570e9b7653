"""Latents on disk: reading clips, encoding videos, and the shards that both use."""
