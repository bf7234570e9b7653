"""Patches in the manner of other packs, which keep state in different places: every candidate has its own."""

import functools

import pytest
import torch

from .race_material import difference, load_parts, problems, race, scene_of, stock

KEY = "a pack's cache"


@pytest.fixture(scope="module")
def parts(comfy, models_dir):
    return load_parts(comfy, models_dir, "parity", layers=4)


class Average:
    """Keeps the mean of what it has seen, in an attribute."""

    def __init__(self):
        self.seen = None

    def __call__(self, args):
        x0 = args["denoised"]
        self.seen = x0 if self.seen is None else 0.5 * self.seen + 0.5 * x0
        return 0.8 * x0 + 0.2 * self.seen


def in_an_object(model):
    model.set_model_sampler_post_cfg_function(Average())


def in_a_method_of_an_object(model):
    model.set_model_sampler_post_cfg_function(Average().__call__)


def in_a_partial(model):
    def run(held, args):
        held.append(args["denoised"])
        return sum(held) / len(held)

    model.set_model_sampler_post_cfg_function(functools.partial(run, []))


def in_a_closure(model):
    count = 0

    def run(args):
        nonlocal count
        count += 1
        return args["denoised"] * (1 + 0.02 * count)

    model.set_model_sampler_post_cfg_function(run)


def on_the_network(model):
    """As TeaCache for Wan: attributes of the diffusion model, made at the first call."""

    def wrapper(apply_model, args):
        network = model.model.diffusion_model
        out = apply_model(args["input"], args["timestep"], **args["c"])
        held = getattr(network, "pack_previous_residual", None)
        network.pack_previous_residual = out
        return out if held is None else 0.7 * out + 0.3 * held

    model.set_model_unet_function_wrapper(wrapper)


def in_transformer_options(model):
    """A container that a wrapper fills, and an object that was put there by the node."""
    model.model_options["transformer_options"][KEY] = Average()

    def run(args):
        options = args["model_options"]["transformer_options"]
        options.setdefault("pack_steps", []).append(float(args["sigma"][0]))
        return options[KEY](args) * (1 + 0.02 * len(options["pack_steps"]))

    model.set_model_sampler_post_cfg_function(run)


def in_a_generator(model):
    generator = torch.Generator().manual_seed(3)

    def run(args):
        x0 = args["denoised"]
        return x0 + 0.05 * torch.randn(x0.shape, generator=generator)

    model.set_model_sampler_post_cfg_function(run)


def in_the_global_generator(model):
    def run(args):
        return args["denoised"] + 0.05 * torch.randn_like(args["denoised"])

    model.set_model_sampler_post_cfg_function(run)


PLACES = [
    in_an_object, in_a_method_of_an_object, in_a_partial, in_a_closure, on_the_network, in_transformer_options, in_a_generator,
    in_the_global_generator,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.__name__)
def test_a_candidate_has_its_own_state(comfy, parts, place):
    def fresh():
        """The model with a new patch: the stock sampler starts from the patch's first state, as in a new session."""
        patched = parts.model.clone()
        place(patched)
        parts.model.model.diffusion_model.__dict__.pop("pack_previous_residual", None)
        return scene_of(comfy, parts).but(model=patched)

    assert difference(stock(comfy, fresh(), 5), stock(comfy, scene_of(comfy, parts), 5)) > 1e-3
    for chunk in (1, 3):
        samples, _, (seed,), text = race(comfy, fresh(), parts.head, finish="continue", chunk=chunk, candidates=4)
        assert difference(samples, stock(comfy, fresh(), seed)) == 0, f"chunk {chunk}"
        assert ("one by one" in text) == (chunk > 1)
    parts.model.model.diffusion_model.__dict__.pop("pack_previous_residual", None)
    samples, _, (seed,), _ = race(comfy, fresh(), parts.head, finish="restart", candidates=4)
    assert difference(samples, stock(comfy, fresh(), seed)) == 0
    parts.model.model.diffusion_model.__dict__.pop("pack_previous_residual", None)


def test_a_patch_without_state_does_not_stop_batches(comfy, parts):
    patched = parts.model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: 0.9 * args["denoised"])
    scene = scene_of(comfy, parts).but(model=patched)
    assert not problems(comfy, scene, parts.head, chunks=(3,))
    text = race(comfy, scene, parts.head, chunk=3)[3]
    assert "one by one" not in text
    assert "own state" not in text
