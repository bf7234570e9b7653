"""Latents on disk: reading clips from files, and the shards that encoders write."""
