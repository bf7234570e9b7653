"""Scores of clips: by geometry, by a PRISM head and by a Shell-LCC manifold; one clip, one number, higher is better."""
