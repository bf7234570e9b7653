"""Remove EasyCache or LazyCache from model options, or give them fresh state."""

import comfy.model_patcher

# The key of both nodes' state in transformer_options, and the keys of their wrappers.
STATE = "easycache"
WRAPPERS = ("easycache", "lazycache")


def is_used(options: dict) -> bool:
    """Whether the model options contain a step cache."""
    return STATE in options.get("transformer_options", {})


def without(options: dict) -> dict:
    """The options without a step cache: the forward neither reads nor updates its state."""
    if not is_used(options):
        return options
    out = comfy.model_patcher.create_model_options_clone(options)
    inner = out["transformer_options"]
    inner.pop(STATE)
    for wrappers in inner.get("wrappers", {}).values():
        for key in WRAPPERS:
            wrappers.pop(key, None)
    return out


def with_fresh_state(options: dict, model_sampling) -> dict:
    """The options with the step cache's state replaced by an empty one."""
    out = comfy.model_patcher.create_model_options_clone(options)
    inner = out["transformer_options"]
    inner[STATE] = inner[STATE].clone().prepare_timesteps(model_sampling)
    return out
