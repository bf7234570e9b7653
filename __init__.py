"""Intrinsic Reward for Wan Video: better Wan clips from rewards that the data, the backbone and geometry already hold."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry point; the imports are here so that importing the pack needs no ComfyUI and costs nothing."""
    from .nodes.extension import IntrinsicRewardExtension

    return IntrinsicRewardExtension()
