"""Shell-LCC (arXiv 2606.30248): manifolds of video latents, fitted, measured, or imported from a released checkpoint.

    python -m trainers.shell_lcc fit --latents latents/ --output models/shell_lcc/mine.safetensors
    python -m trainers.shell_lcc eval --manifold mine.safetensors --latents other/ --json figures.json
    python -m trainers.shell_lcc info mine.safetensors
    python -m trainers.shell_lcc import released.pth --output released.safetensors --calibrate latents/

The default coder, anchors, is fitted in closed form in minutes on a CPU; `fit --coder predictor` trains the paper's
network and also runs under `accelerate launch -m trainers.shell_lcc fit ...`. The exit code is 0 on success, 2 when an
argument or a file cannot be used, 130 after Ctrl-C.
"""
