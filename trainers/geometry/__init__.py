"""Geometry consistency of clips: how well one rigid scene under a moving camera explains them.

    python -m trainers.geometry score --videos clips/ --output scores/

The exit code is 0 when all went well, 1 when none of the clips could be scored, 2 when an argument or a file cannot be
used, 130 after Ctrl-C.
"""
