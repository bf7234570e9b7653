"""Tiny random Wan2.1 model files that ComfyUI's stock loaders accept.

The tensors carry the names and ranks of the original Wan2.1 checkpoints, so model detection, LoRA key maps and latent formats
take the same branches as with real files; only the widths and depths are small. Videos made with them are coloured noise.
"""

import argparse
import io
import json
import math
from pathlib import Path

import torch

HEAD_DIM = 128
TEXT_DIM = 4096
CLIP_VISION_DIM = 1280
LATENT_CHANNELS = 16
# Two latents and the mask's 8 x 8 pixels.
VACE_CHANNELS = 96

T2V_NAME = "tiny_wan_t2v.safetensors"
I2V_NAME = "tiny_wan_i2v.safetensors"
VAE_NAME = "tiny_wan_vae.safetensors"
UMT5_NAME = "tiny_umt5.safetensors"

STAND_INS = {
    "wan2.1_t2v_1.3B_fp16.safetensors": T2V_NAME,
    "wan2.1_t2v_1.3B_bf16.safetensors": T2V_NAME,
    "wan2.1_t2v_14B_fp16.safetensors": T2V_NAME,
    "wan2.1_t2v_14B_fp8_scaled.safetensors": T2V_NAME,
    "wan2.1_i2v_480p_14B_fp16.safetensors": I2V_NAME,
    "wan2.1_i2v_720p_14B_fp16.safetensors": I2V_NAME,
    "wan_2.1_vae.safetensors": VAE_NAME,
    "umt5_xxl_fp16.safetensors": UMT5_NAME,
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": UMT5_NAME,
}


class RandomWeights(dict):
    """A state dict filled from its own seeded generator, so that a file's content depends on nothing but its arguments."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name, *shape, std=1.0, mean=0.0):
        self[name] = torch.randn(*shape, generator=self.generator) * std + mean

    def ones(self, name, *shape):
        self[name] = torch.ones(*shape)

    def layer(self, name, out_features, in_features, *kernel, gain=1.0, bias_std=0.02):
        """Weight and bias of a dense layer, or of a convolution when a kernel size is given."""
        std = gain / math.sqrt(in_features * math.prod(kernel))
        self.normal(f"{name}.weight", out_features, in_features, *kernel, std=std)
        self.normal(f"{name}.bias", out_features, std=bias_std)


def wan_dit(dim=HEAD_DIM, ffn_dim=256, layers=6, i2v=False, seed=0, channels=LATENT_CHANNELS, vace_layers=0):
    """State dict of a Wan2.1 T2V diffusion transformer, of the I2V variant, of VACE, or (48 channels) of Wan2.2 5B."""
    if dim % HEAD_DIM:
        raise ValueError(f"dim must be a multiple of {HEAD_DIM}: ComfyUI derives the number of heads from it")
    w = RandomWeights(seed)
    # I2V also gets a 4-channel mask and the first frame's latent.
    in_channels = 2 * channels + 4 if i2v else channels
    w.layer("patch_embedding", dim, in_channels, 1, 2, 2)
    w.layer("text_embedding.0", dim, TEXT_DIM)
    w.layer("text_embedding.2", dim, dim)
    w.layer("time_embedding.0", dim, 256)
    w.layer("time_embedding.2", dim, dim)
    w.layer("time_projection.1", 6 * dim, dim, gain=0.5)
    for index in range(layers):
        _dit_block(w, f"blocks.{index}", dim, ffn_dim, i2v)
    w.layer("head.head", 4 * channels, dim)
    w.normal("head.modulation", 1, 2, dim, std=dim**-0.5)
    if i2v:
        w.ones("img_emb.proj.0.weight", CLIP_VISION_DIM)
        w["img_emb.proj.0.bias"] = torch.zeros(CLIP_VISION_DIM)
        w.layer("img_emb.proj.1", CLIP_VISION_DIM, CLIP_VISION_DIM)
        w.layer("img_emb.proj.3", dim, CLIP_VISION_DIM)
        w.ones("img_emb.proj.4.weight", dim)
        w["img_emb.proj.4.bias"] = torch.zeros(dim)
    if vace_layers:
        w.layer("vace_patch_embedding", dim, VACE_CHANNELS, 1, 2, 2)
        for index in range(vace_layers):
            _dit_block(w, f"vace_blocks.{index}", dim, ffn_dim, False)
            if index == 0:
                w.layer("vace_blocks.0.before_proj", dim, dim)
            w.layer(f"vace_blocks.{index}.after_proj", dim, dim)
    return dict(w)


def _dit_block(w, name, dim, ffn_dim, i2v):
    for attention in ("self_attn", "cross_attn"):
        for projection in "qkvo":
            w.layer(f"{name}.{attention}.{projection}", dim, dim)
        w.normal(f"{name}.{attention}.norm_q.weight", dim, mean=1.0, std=0.05)
        w.normal(f"{name}.{attention}.norm_k.weight", dim, mean=1.0, std=0.05)
    if i2v:
        w.layer(f"{name}.cross_attn.k_img", dim, dim)
        w.layer(f"{name}.cross_attn.v_img", dim, dim)
        w.normal(f"{name}.cross_attn.norm_k_img.weight", dim, mean=1.0, std=0.05)
    w.normal(f"{name}.norm3.weight", dim, mean=1.0, std=0.05)
    w.normal(f"{name}.norm3.bias", dim, std=0.02)
    w.layer(f"{name}.ffn.0", ffn_dim, dim)
    w.layer(f"{name}.ffn.2", dim, ffn_dim)
    w.normal(f"{name}.modulation", 1, 6, dim, std=dim**-0.5)


def wan_vae(dim=8, seed=1):
    """State dict of the Wan2.1 VAE: 4x in time, 8x in space, 16 latent channels."""
    w = RandomWeights(seed)
    widths = [dim, 2 * dim, 4 * dim, 4 * dim]
    resamples_time = [False, True, True]
    _vae_encoder(w, widths, resamples_time)
    _conv(w, "conv1", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, 1, 1)
    _conv(w, "conv2", LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1)
    _vae_decoder(w, widths[::-1], resamples_time[::-1])
    return dict(w)


def _vae_encoder(w, widths, resamples_time):
    _conv(w, "encoder.conv1", widths[0], 3, 3, 3, 3)
    index, current = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(2):
            _residual(w, f"encoder.downsamples.{index}", current, width)
            index, current = index + 1, width
        if level < len(resamples_time):
            _conv(w, f"encoder.downsamples.{index}.resample.1", width, width, 3, 3)
            if resamples_time[level]:
                _conv(w, f"encoder.downsamples.{index}.time_conv", width, width, 3, 1, 1)
            index += 1
    _vae_middle(w, "encoder.middle", current)
    w.ones("encoder.head.0.gamma", current, 1, 1, 1)
    _conv(w, "encoder.head.2", 2 * LATENT_CHANNELS, current, 3, 3, 3)


def _vae_decoder(w, widths, resamples_time):
    _conv(w, "decoder.conv1", widths[0], LATENT_CHANNELS, 3, 3, 3)
    _vae_middle(w, "decoder.middle", widths[0])
    index, current = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(3):
            _residual(w, f"decoder.upsamples.{index}", current, width)
            index, current = index + 1, width
        if level < len(resamples_time):
            # Every upsampler halves the channels, which the next level's first block therefore receives.
            _conv(w, f"decoder.upsamples.{index}.resample.1", width // 2, width, 3, 3)
            if resamples_time[level]:
                _conv(w, f"decoder.upsamples.{index}.time_conv", 2 * width, width, 3, 1, 1)
            index, current = index + 1, width // 2
    w.ones("decoder.head.0.gamma", current, 1, 1, 1)
    _conv(w, "decoder.head.2", 3, current, 3, 3, 3, gain=0.6)


def _vae_middle(w, name, width):
    _residual(w, f"{name}.0", width, width)
    w.ones(f"{name}.1.norm.gamma", width, 1, 1)
    _conv(w, f"{name}.1.to_qkv", 3 * width, width, 1, 1)
    _conv(w, f"{name}.1.proj", width, width, 1, 1, gain=0.5)
    _residual(w, f"{name}.2", width, width)


def _residual(w, name, in_width, out_width):
    w.ones(f"{name}.residual.0.gamma", in_width, 1, 1, 1)
    _conv(w, f"{name}.residual.2", out_width, in_width, 3, 3, 3)
    w.ones(f"{name}.residual.3.gamma", out_width, 1, 1, 1)
    _conv(w, f"{name}.residual.6", out_width, out_width, 3, 3, 3, gain=0.5)
    if in_width != out_width:
        _conv(w, f"{name}.shortcut", out_width, in_width, 1, 1, 1)


def _conv(w, name, out_channels, in_channels, *kernel, gain=1.0):
    w.layer(name, out_channels, in_channels, *kernel, gain=gain, bias_std=0.01)


def umt5(layers=2, d_ff=16, heads=2, d_kv=8, seed=2):
    """State dict of a small umt5 encoder with its own tokenizer; it needs the test-only node pack tiny_umt5_shim.

    The width stays at umt5-xxl's 4096, because the diffusion transformer's text projection reads it.
    """
    tokenizer, vocabulary = _sentencepiece_model()
    config = {
        "d_ff": d_ff, "d_kv": d_kv, "d_model": TEXT_DIM, "num_heads": heads, "num_layers": layers, "vocab_size": vocabulary,
    }
    w = RandomWeights(seed)
    w.normal("shared.weight", vocabulary, TEXT_DIM)
    inner = heads * d_kv
    for index in range(layers):
        attention, dense = f"encoder.block.{index}.layer.0", f"encoder.block.{index}.layer.1"
        for projection in "qkv":
            w.normal(f"{attention}.SelfAttention.{projection}.weight", inner, TEXT_DIM, std=TEXT_DIM**-0.5)
        w.normal(f"{attention}.SelfAttention.o.weight", TEXT_DIM, inner, std=inner**-0.5)
        w.normal(f"{attention}.SelfAttention.relative_attention_bias.weight", 32, heads, std=0.5)
        w.ones(f"{attention}.layer_norm.weight", TEXT_DIM)
        w.normal(f"{dense}.DenseReluDense.wi_0.weight", d_ff, TEXT_DIM, std=TEXT_DIM**-0.5)
        w.normal(f"{dense}.DenseReluDense.wi_1.weight", d_ff, TEXT_DIM, std=TEXT_DIM**-0.5)
        w.normal(f"{dense}.DenseReluDense.wo.weight", TEXT_DIM, d_ff, std=d_ff**-0.5)
        w.ones(f"{dense}.layer_norm.weight", TEXT_DIM)
    # Real umt5-xxl embeddings have a standard deviation of the order of 0.1.
    w["encoder.final_layer_norm.weight"] = torch.full((TEXT_DIM,), 0.1)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in w.items()}
    tensors["spiece_model"] = _bytes_tensor(tokenizer)
    tensors["tiny_umt5_config"] = _bytes_tensor(json.dumps(config).encode())
    return tensors


def _sentencepiece_model():
    import sentencepiece

    sentences = [
        "a video of a camera moving through the room",
        "the cat walks on grass",
        "slow dolly shot orbit pan left right forward",
        "bright sunny day city street house",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20), model_writer=model, model_type="bpe", vocab_size=320, hard_vocab_limit=False,
        byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )
    proto = model.getvalue()
    return proto, sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()


def _bytes_tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def write_models(models_dir, dim=HEAD_DIM, layers=6):
    """Write all four files below a ComfyUI models folder and return their paths by file name."""
    # Not at the top, where a Python without ComfyUI's requirements would fail to collect the tests instead of skipping them.
    from safetensors.torch import save_file

    files = {
        ("diffusion_models", T2V_NAME): wan_dit(dim, layers=layers),
        ("diffusion_models", I2V_NAME): wan_dit(dim, layers=layers, i2v=True),
        ("vae", VAE_NAME): wan_vae(),
        ("text_encoders", UMT5_NAME): umt5(),
    }
    paths = {}
    for (folder, name), tensors in files.items():
        path = Path(models_dir) / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        paths[name] = path
    return paths


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models_dir", type=Path, help="ComfyUI models folder to write into")
    parser.add_argument("--dim", type=int, default=HEAD_DIM, help=f"width of the transformer, a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args(argv)
    for path in write_models(args.models_dir, args.dim, args.layers).values():
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
