"""ComfyUI imported into the test process, with this pack loaded the way ComfyUI loads it."""

import asyncio
import importlib
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from .comfyui_install import PACK_NAME, SHIM_ROOT


class LogLines(logging.Handler):
    """Keeps what ComfyUI logs while it loads a pack: the loader reports failures nowhere else."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@dataclass
class InProcessComfyUI:
    """The imported ComfyUI; `base` is its base directory and `pack` this pack's root package as ComfyUI imported it."""

    version: str
    base: Path
    nodes: ModuleType
    execution: ModuleType
    pack: ModuleType
    ui: dict = field(default_factory=dict)

    def node(self, class_id):
        """The class registered under a node id, from this pack or from ComfyUI."""
        return self.nodes.NODE_CLASS_MAPPINGS[class_id]

    def module(self, name):
        """A module of the pack, such as "kernels.files.header", as the running nodes see it."""
        return importlib.import_module(f"{self.pack.__name__}.{name}")

    def run(self, class_id, /, extra_data=None, lists=None, **inputs):
        """Execute one node through ComfyUI's executor functions and return its outputs; `ui` keeps what it shows.

        extra_data: what comes with a prompt, such as {"extra_pnginfo": {...}}; lists: values of inputs that list outputs are
        connected to.

        Like the executor this runs under inference mode, sets the hidden inputs and locks the class of a V3 node.
        Inputs are not validated and no defaults are filled in.
        """
        cls = self.node(class_id)
        values, _, v3_data = self.execution.get_input_data(inputs, cls, "1", extra_data=extra_data or {})
        values |= lists or {}
        if unknown := inputs.keys() - values.keys():
            raise TypeError(f"{class_id} has no input {', '.join(sorted(unknown))}")
        with torch.inference_mode():
            outputs, self.ui, expands = asyncio.run(self._execute(cls(), values, v3_data))
        if expands:
            raise NotImplementedError(f"{class_id} expands into a subgraph, which only a whole prompt can execute")
        is_list = getattr(cls, "OUTPUT_IS_LIST", None) or [False] * len(outputs)
        # A node that only shows something may return none of its declared outputs.
        return tuple(output if keep else output[0] for output, keep in zip(outputs, is_list, strict=False))

    async def _execute(self, node, values, v3_data):
        outputs, ui, expands, pending = await self.execution.get_output_data("test", "1", node, values, v3_data=v3_data)
        if pending:
            results = await self.execution.resolve_map_node_over_list_results(outputs)
            outputs, ui, expands = self.execution.get_output_from_returns(results, node)
        return outputs, ui, expands


def load_comfyui(comfyui, base):
    """Import ComfyUI for the CPU, working in `base`, together with its own extra nodes, the shim and this pack."""
    sys.path.insert(0, str(comfyui))
    # The pack's folder nodes/ has no __init__.py; imported as a namespace package it would stand in for ComfyUI's nodes.py.
    if getattr(sys.modules.get("nodes"), "__file__", "") is None:
        del sys.modules["nodes"]
    _set_arguments(base)
    # In main.py's order: some versions of nodes.py put comfy/ first on sys.path, where utils.py would then hide utils/.
    for name in ("utils.extra_config", "folder_paths", "execution", "server", "nodes"):
        importlib.import_module(name)
    nodes, folder_paths = sys.modules["nodes"], sys.modules["folder_paths"]

    # A server process that shares the base directory empties temp/ when it starts.
    folder_paths.set_temp_directory(str(base / "temp_in_process"))
    sys.modules["server"].PromptServer(asyncio.new_event_loop())
    asyncio.run(_load_nodes(nodes, base))
    # The loader's own name for a pack's root package.
    pack = sys.modules[str(base / "custom_nodes" / PACK_NAME).replace(".", "_x_")]
    version = importlib.import_module("comfyui_version").__version__
    return InProcessComfyUI(version=version, base=base, nodes=nodes, execution=sys.modules["execution"], pack=pack)


def _set_arguments(base):
    # folder_paths and comfy.model_management read these while they are imported.
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base)
    args.disable_api_nodes = True


async def _load_nodes(nodes, base):
    await nodes.init_public_apis()
    await nodes.init_builtin_extra_nodes()
    log = LogLines()
    logging.getLogger().addHandler(log)
    try:
        # Not init_external_custom_nodes(): it only logs a pack's failure.
        for name in (SHIM_ROOT.name, PACK_NAME):
            if not await nodes.load_custom_node(str(base / "custom_nodes" / name), module_parent="custom_nodes"):
                raise AssertionError("\n".join([f"ComfyUI could not load {name}:", *log.lines]))
    finally:
        logging.getLogger().removeHandler(log)
