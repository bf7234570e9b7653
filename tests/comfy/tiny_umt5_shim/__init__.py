"""Test only: lets the stock CLIPLoader and CLIPTextEncode run the tiny umt5 file that tiny_wan.py writes.

ComfyUI recognises umt5 by the shapes of the xxl model and reads its sizes from a bundled JSON file. The text encoder class
does accept other sizes through model_options, but no stock node passes them. The tiny file carries its sizes as JSON bytes
in the tensor `tiny_umt5_config`; every other file goes through ComfyUI's own functions untouched.
"""

import json

import comfy.sd

MARKER = "tiny_umt5_config"

stock_detect = comfy.sd.detect_te_model
stock_load = comfy.sd.load_text_encoder_state_dicts


def detect_te_model(state_dict):
    if MARKER in state_dict:
        return comfy.sd.TEModel.T5_XXL
    return stock_detect(state_dict)


def load_text_encoder_state_dicts(state_dicts, *args, model_options=None, **kwargs):
    options = dict(model_options or {})
    for state_dict in state_dicts:
        if MARKER in state_dict:
            options["umt5xxl_model_config"] = json.loads(bytes(state_dict[MARKER].tolist()))
    return stock_load(state_dicts, *args, model_options=options, **kwargs)


comfy.sd.detect_te_model = detect_te_model
comfy.sd.load_text_encoder_state_dicts = load_text_encoder_state_dicts

NODE_CLASS_MAPPINGS = {}
