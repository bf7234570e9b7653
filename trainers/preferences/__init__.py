"""Preference data: tables and manifests of compared clips, groups of candidates, and their latents and frames."""
