"""Preference records as the Record Preference node writes them, for tests that have no ComfyUI."""

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def preference_folder():
    """The pack's module nodes.preference_folder, with the pack loaded as ComfyUI loads it."""
    if "intrinsic_reward" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "intrinsic_reward", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["intrinsic_reward"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["intrinsic_reward"])
    return importlib.import_module("intrinsic_reward.nodes.preference_folder")


def append_record(*args, **details) -> str:
    """preference_folder.append."""
    return preference_folder().append(*args, **details)
