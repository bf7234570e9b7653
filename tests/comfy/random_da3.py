"""A Depth Anything 3 (Small) of random weights with a thin head: it sees nothing, but is loaded and run as any other."""

import torch

NAME = "random_da3_small.safetensors"
MONO_NAME = "random_da3_mono.safetensors"
STAND_IN = {"depth_anything_3_small.safetensors": NAME}


def write_model(path, poses=True):
    """Needs an imported ComfyUI. poses: with the camera decoder and the head of DA3-Small, else as its monocular models."""
    import comfy.ops
    from comfy.ldm.depth_anything_3.model import DepthAnything3Net
    from safetensors.torch import save_file

    shared = {"head_features": 16, "head_out_channels": (16, 16, 16, 16), "operations": comfy.ops.disable_weight_init}
    if poses:
        shared |= {"alt_start": 4, "qknorm_start": 4, "rope_start": 4, "cat_token": True, "has_cam_dec": True}
        shared |= {"head_type": "dualdpt", "head_dim_in": 768, "head_output_dim": 2}
    else:
        shared |= {"head_dim_in": 384, "head_use_sky_head": False}
    with torch.inference_mode(False):
        net = DepthAnything3Net("vits", out_layers=(5, 7, 9, 11), dtype=torch.float32, **shared)
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, value in net.state_dict().items():
        fan_in = value[0].numel() if value.ndim > 1 else 1
        weights[name] = torch.randn(value.shape, generator=generator) * (0.02 if value.ndim < 2 else fan_in**-0.5)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "lambda1")):
            weights[name] = torch.ones(value.shape)
    if poses:
        # Cameras close to each other that look forward, with fields of view of about 57 degrees.
        weights["cam_dec.fc_qvec.bias"] = torch.tensor([0.0, 0.0, 0.0, 20.0])
        weights["cam_dec.fc_fov.0.bias"] = torch.tensor([1.0, 1.0])
        weights["cam_dec.fc_fov.0.weight"] *= 0
    path.parent.mkdir(exist_ok=True)
    save_file({k: v.half() for k, v in weights.items()}, path)
