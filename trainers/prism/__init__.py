"""PRISM reward heads on noisy latents: data collected or cached, heads trained on preferences and measured by noise level.

    python -m trainers.prism cache --pairs pairs.csv --vae wan_2.1_vae.safetensors --text_encoder umt5_xxl.safetensors \\
        --output runs/

or from samples of a Wan model:

    python -m trainers.prism embed --prompts prompts.txt --text_encoder umt5_xxl.safetensors --output prompts.safetensors
    python -m trainers.prism collect --backbone wan2.1_t2v_1.3B_bf16.safetensors --texts prompts.safetensors --output runs/
    python -m trainers.prism label --data runs/ --scores scores.jsonl

and then:

    python -m trainers.prism train --data runs/ --backbone wan2.1_t2v_1.3B_bf16.safetensors --output head.safetensors
    python -m trainers.prism eval --head head.safetensors --data other/ --backbone wan2.1_t2v_1.3B_bf16.safetensors

The exit code is 0 on success, 2 when an argument or a file cannot be used, 130 after Ctrl-C.
"""
