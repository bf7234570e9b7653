"""What every command needs: command line, inputs, device, training loop, checkpoints, progress, output files and logs."""
