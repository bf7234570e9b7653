"""Small pictures of a video latent without a VAE, by the linear latent-to-RGB map of ComfyUI's previews."""

import torch


def rgb_frames(latent: torch.Tensor, latent_format) -> torch.Tensor:
    """uint8 [T, H, W, 3] on the CPU: every frame of the first item of a latent [B, C, T, H, W] in model space.

    Grey if the format has no such map.
    """
    z = latent[0].float().cpu()
    factors = getattr(latent_format, "latent_rgb_factors", None)
    if factors is None:
        return torch.full((*z.shape[1:], 3), 128, dtype=torch.uint8)
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    if reshape is not None:
        z = reshape(z.movedim(1, 0)).movedim(0, 1)
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    rgb = torch.nn.functional.linear(z.movedim(0, -1), torch.tensor(factors).T, None if bias is None else torch.tensor(bias))
    return ((rgb + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def thumbnail(latent: torch.Tensor, latent_format) -> torch.Tensor:
    """uint8 [H, W, 3] on the CPU: the middle frame of the first item of a latent [B, C, T, H, W] in model space."""
    middle = latent.shape[2] // 2
    return rgb_frames(latent[:1, :, middle : middle + 1], latent_format)[0]
