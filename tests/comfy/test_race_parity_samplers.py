"""A race against the stock samplers, for every sampler and guider of ComfyUI and for every kind of Wan model.

See test_race_parity_patches.py for what must hold.
"""

import pytest
import torch

from .prism_material import node
from .race_material import (
    FRAMES,
    NotApplicableError,
    difference,
    load_parts,
    output_of,
    problems,
    prompt,
    race,
    refusal,
    scene_of,
    stock,
)  # fmt: skip


@pytest.fixture(scope="module")
def parts(comfy, models_dir):
    return load_parts(comfy, models_dir, "parity", layers=4)


@pytest.fixture(scope="module")
def scene(comfy, parts):
    return scene_of(comfy, parts)


def walk(comfy, head, scenes, **options) -> tuple[list[str], list[str]]:
    """(problems, names that were tried). scenes: name -> Scene."""
    wrong, tried = [], []
    for name, scene in scenes.items():
        try:
            wrong += problems(comfy, scene, head, name=name, **options)
            tried.append(name)
        except NotApplicableError:
            continue
    return wrong, tried


@pytest.mark.parametrize("cfg", [pytest.param(5.0, marks=pytest.mark.thorough), 1.0])
def test_every_sampler(comfy, parts, scene, cfg):
    from comfy.samplers import KSampler

    options = {} if cfg != 1.0 else {"finishes": ("continue",), "chunks": (3,), "alone": False}
    scenes = {name: scene.but(sampler=name, cfg=cfg) for name in KSampler.SAMPLERS}
    wrong, tried = walk(comfy, parts.head, scenes, **options)
    assert not wrong, "\n".join(wrong)
    # Some samplers are not for flow models: the stock node fails with them.
    assert len(tried) >= 40, sorted(set(scenes) - set(tried))


def nodes_that_give(comfy, kind: str) -> list[str]:
    return [
        class_id
        for class_id, cls in sorted(comfy.nodes.NODE_CLASS_MAPPINGS.items())
        if [str(t) for t in getattr(cls, "RETURN_TYPES", None) or ()] == [kind] and not class_id.startswith("IntrinsicReward_")
    ]


def test_every_sampler_node(comfy, parts, scene):
    def guider(model):
        return comfy.run("CFGGuider", model=model, positive=parts.positive, negative=parts.negative, cfg=4.0)[0]

    scenes = {}
    for class_id in nodes_that_give(comfy, "SAMPLER"):
        if class_id != "KSamplerSelect":
            sampler = output_of(comfy, class_id, {"MODEL": parts.model})
            scenes[class_id] = scene.but(sampler=sampler, guider=guider)
    wrong, tried = walk(comfy, parts.head, scenes, finishes=("continue",), chunks=(1, 3))
    assert not wrong, "\n".join(wrong)
    assert len(tried) >= 10, sorted(set(scenes) - set(tried))


def test_every_guider_node(comfy, parts, scene):
    other = prompt(7)
    scenes = {}
    for class_id in nodes_that_give(comfy, "GUIDER"):
        values = {"CONDITIONING": parts.positive, "negative": parts.negative, "cond2": other, "cfg": 4.0}

        def guider(model, class_id=class_id, values=values):
            return output_of(comfy, class_id, values | {"MODEL": model})

        scenes[class_id] = scene.but(guider=guider)
    scenes |= {
        f"DualCFGGuider, {style}": scene.but(
            guider=lambda model, style=style: comfy.run(
                "DualCFGGuider", model=model, cond1=parts.positive, cond2=other, negative=parts.negative, cfg_conds=3.0,
                cfg_cond2_negative=4.0, style=style,
            )[0]
        )
        for style in ("regular", "nested")
    }  # fmt: skip
    wrong, tried = walk(comfy, parts.head, scenes)
    assert not wrong, "\n".join(wrong)
    assert {"BasicGuider", "CFGGuider", "DualCFGGuider, regular", "DualCFGGuider, nested"} <= set(tried)


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp", "dpmpp_2m_sde", "uni_pc"])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_batches(comfy, parts, sampler, batch_size, cfg):
    scene = scene_of(comfy, parts, batch_size).but(sampler=sampler, cfg=cfg)
    assert not problems(comfy, scene, parts.head, chunks=(1, 2, 3))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("why", ["long negative prompt", "little memory"])
def test_where_cond_and_uncond_are_evaluated_apart(comfy, parts, batch_size, why, monkeypatch):
    scene = scene_of(comfy, parts, batch_size)
    if why == "long negative prompt":
        scene = scene.but(negative=prompt(3, words=13))
    else:
        # ComfyUI batches cond and uncond only where 1.5 times its estimate is free.
        monkeypatch.setattr(type(parts.model.model), "memory_required", lambda *args, **kwargs: 1e15)
    assert not problems(comfy, scene, parts.head, chunks=(1, 2, 3))


def test_keyframes_of_hooks_belong_to_a_candidate(comfy, parts, scene):
    """A LoRA whose strength changes over the steps: ComfyUI counts the steps in the hook itself."""
    from comfy.hooks import HookKeyframe, HookKeyframeGroup, create_hook_lora

    state = parts.model.model.diffusion_model.state_dict()
    generator = torch.Generator().manual_seed(4)
    lora = {}
    for index in range(2):
        name = f"blocks.{index}.self_attn.q"
        width = state[f"{name}.weight"].shape[0]
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        lora[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(width, 4, generator=generator)
    hooks = create_hook_lora(lora, strength_model=1.0, strength_clip=0.0)
    keyframes = HookKeyframeGroup()
    for strength, start, steps in ((0.1, 0.0, 2), (1.0, 0.05, 1), (0.3, 0.3, 1)):
        keyframes.add(HookKeyframe(strength=strength, start_percent=start, guarantee_steps=steps))
    hooks.set_keyframes_on_hooks(keyframes)
    hooked = [[text, {**values, "hooks": hooks}] for text, values in parts.positive]
    scene = scene.but(positive=hooked)
    assert difference(stock(comfy, scene, 5), stock(comfy, scene.but(positive=parts.positive), 5)) > 1e-2
    assert not problems(comfy, scene, parts.head, chunks=(1, 2))


class TestModels:
    """Other Wan models than text-to-video with 16 channels."""

    def test_wan22_5b(self, comfy, models_dir):
        parts = load_parts(comfy, models_dir, "tiny_wan22_5b", {"space": "wan22"}, layers=4, channels=48)
        # Its nodes give empty latents of 16 channels at a scale of 8, which the samplers turn into 48 at 16.
        scene = scene_of(comfy, parts, side=64)
        assert stock(comfy, scene, 5).shape == (1, 48, 3, 4, 4)
        assert not problems(comfy, scene, parts.head, chunks=(1, 2))

    def test_image_to_video(self, comfy, models_dir):
        parts = load_parts(comfy, models_dir, "tiny_wan_i2v_parity", layers=4, i2v=True)
        image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
        conds = {"positive": parts.positive, "negative": parts.negative, "vae": parts.vae}
        size = {"width": 64, "height": 64, "length": FRAMES, "batch_size": 1}
        positive, negative, latent = comfy.run("WanImageToVideo", **conds, **size, start_image=image)
        scene = scene_of(comfy, parts).but(positive=positive, negative=negative, latent=latent)
        assert not problems(comfy, scene, parts.head, chunks=(1, 2))

    def test_vace(self, comfy, models_dir):
        parts = load_parts(comfy, models_dir, "tiny_wan_vace", layers=4, vace_layers=2)
        video = torch.rand(FRAMES, 64, 64, 3, generator=torch.Generator().manual_seed(2))
        conds = {"positive": parts.positive, "negative": parts.negative, "vae": parts.vae}
        size = {"width": 64, "height": 64, "length": FRAMES, "batch_size": 1, "strength": 1.0}
        positive, negative, latent, _ = comfy.run("WanVaceToVideo", **conds, **size, control_video=video)
        scene = scene_of(comfy, parts).but(positive=positive, negative=negative, latent=latent)
        assert not problems(comfy, scene, parts.head, chunks=(1, 2))

    def test_a_latent_with_a_mask(self, comfy, parts):
        g = torch.Generator().manual_seed(1)
        mask = (torch.rand(1, 1, 64, 64, generator=g) > 0.5) * 1.0
        latent = {"samples": torch.randn(1, 16, 3, 8, 8, generator=g), "noise_mask": mask}
        assert not problems(comfy, scene_of(comfy, parts).but(latent=latent), parts.head, chunks=(1, 2))


def test_a_prompt_that_is_not_active_is_named(comfy, parts, scene):
    (early,) = comfy.run("ConditioningSetTimestepRange", conditioning=parts.positive, start=0.0, end=0.02)
    with pytest.raises(Exception, match=r"no prompt is active at sigma 0\.9.*the time ranges of the conditioning"):
        race(comfy, scene.but(positive=early), parts.head)
    (late,) = comfy.run("ConditioningSetTimestepRange", conditioning=parts.negative, start=0.02, end=1.0)
    # One prompt for the first steps and another for the rest: one is active at each checkpoint.
    both = scene.but(positive=[*early, *late])
    assert not problems(comfy, both, parts.head)
    assert "Best of 3" in race(comfy, both, parts.head)[3]


def test_what_cannot_be_scored_is_named(comfy, parts, scene):
    (two,) = comfy.run("ConditioningCombine", conditioning_1=parts.positive, conditioning_2=parts.negative)
    (area,) = comfy.run("ConditioningSetArea", conditioning=parts.positive, width=16, height=16, x=0, y=0, strength=1.0)
    windows = output_of(comfy, "WanContextWindowsManual", {"MODEL": parts.model}, context_length=5, context_overlap=1)
    cases = {
        "the reward reads one prompt": scene.but(positive=two),
        "the prompt has an area": scene.but(positive=area),
        "the model samples in several context windows": scene.but(model=windows),
    }
    for text, case in cases.items():
        for finish in ("restart", "continue"):
            with pytest.raises(Exception, match=text) as error:
                race(comfy, case, parts.head, finish=finish)
            assert refusal(error.value)
        # Nothing is scored, so nothing is refused.
        assert difference(race(comfy, case, parts.head, candidates=1)[0], stock(comfy, case, 5)) == 0


def test_patches_are_as_before_after_a_race(comfy, parts, scene):
    """The stock sampler's clip does not depend on whether a race ran before it."""
    (patched,) = comfy.run("APG", model=parts.model, eta=1.0, norm_threshold=5.0, momentum=0.5)
    case = scene.but(model=patched)
    before = stock(comfy, case, 5)
    race(comfy, case, parts.head, finish="continue", candidates=4, checkpoints="0.97")
    assert torch.equal(stock(comfy, case.but(), 5), before)


def test_the_report_names_what_stops_batches(comfy, parts, scene):
    (apg,) = comfy.run("APG", model=parts.model, eta=1.0, norm_threshold=5.0, momentum=0.5)
    text = race(comfy, scene.but(model=apg), parts.head, chunk=3)[3]
    assert "Candidates were evaluated one by one: APG (nodes_apg) keeps state between steps" in text
    (mahiro,) = comfy.run("Mahiro", model=parts.model)
    text = race(comfy, scene.but(model=mahiro), parts.head, chunk=3)[3]
    assert "a patch of the model looks at the whole batch" in text
    assert "one by one" not in race(comfy, scene, parts.head, chunk=3)[3]


def test_a_batch_of_winners_has_a_score_and_a_seed_for_every_clip(comfy, parts):
    samples, scores, seeds, _ = race(comfy, scene_of(comfy, parts, 2), parts.head, keep=2)
    assert samples.shape[0] == len(scores) == len(seeds) == 4
    assert seeds[0] == seeds[1]
    (top, _, best, indices) = comfy.run(
        node("SelectTopK"), lists={"scores": scores, "k": [1], "latent": [{"samples": samples}]}
    )
    assert best == [max(scores)]
    assert torch.equal(top["samples"], samples[indices])
