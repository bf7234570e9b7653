"""Shared by all commands: command line, inputs, device, training loop, checkpoints, progress, output files and logs."""
