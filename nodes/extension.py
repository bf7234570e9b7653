"""The pack's ComfyUI extension: model folders, routes and the list of nodes."""

from comfy_api.latest import ComfyExtension, io

from . import (
    encode_clips,
    example_clip,
    geometry_best_of_n,
    geometry_da3,
    geometry_files,
    geometry_tracks,
    prism_best_of_n,
    prism_files,
    prism_score,
    record_preference,
    reward_score,
    rewards,
    select_top_k,
    shell_lcc_files,
    shell_lcc_fit,
    shell_lcc_guidance,
    shell_lcc_refine,
    shell_lcc_score,
    train_preference_lora,
    train_prism_head,
    web_routes,
)

MODULES = (
    shell_lcc_files,
    shell_lcc_guidance,
    shell_lcc_score,
    shell_lcc_refine,
    shell_lcc_fit,
    encode_clips,
    prism_files,
    prism_score,
    prism_best_of_n,
    rewards,
    reward_score,
    select_top_k,
    geometry_tracks,
    geometry_best_of_n,
    geometry_da3,
    geometry_files,
    record_preference,
    train_preference_lora,
    train_prism_head,
    example_clip,
)


class IntrinsicRewardExtension(ComfyExtension):
    async def on_load(self) -> None:
        shell_lcc_files.FOLDER.register()
        prism_files.FOLDER.register()
        geometry_da3.FOLDER.register()
        web_routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]
