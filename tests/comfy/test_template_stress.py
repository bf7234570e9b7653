"""The most stateful templates in one server: memory over a few prompts, interruptions, and that all was clean afterwards.

`python -m benchmarks.template_stress` does the same for all templates, with more prompts and interruptions.
"""

from dataclasses import replace

import pytest

from benchmarks import template_stress

from .template_runs import LORA, RACE, TEMPLATES, WORKFLOWS, TemplateServer

# Widgets that make these runs shorter still.
SHORT = {
    "05 Guide sampling with Shell-LCC": {"KSampler.steps": 16},
    "09 Train a preference LoRA": {f"{LORA}.steps": 3, f"{LORA}.save_every": 2},
    "12 Best of N with a PRISM head": {f"{RACE}.steps": 8, f"{RACE}.candidates": 3},
}


@pytest.fixture(scope="module")
def stressed(comfyui_path, tmp_path_factory):
    """{template: its figures} of three prompts and two interruptions."""
    before = dict(TEMPLATES)
    TEMPLATES.update({n: replace(TEMPLATES[n], smaller=TEMPLATES[n].smaller | more) for n, more in SHORT.items()})
    try:
        with TemplateServer(comfyui_path, tmp_path_factory.mktemp("stress"), list(SHORT)) as server:
            return template_stress.run_all(server, list(SHORT), 3, 2, 0)
    finally:
        TEMPLATES.update(before)


def test_every_template_has_its_variations():
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == set(TEMPLATES)


@pytest.mark.thorough
@pytest.mark.parametrize("name", SHORT)
def test_memory_is_flat(stressed, name):
    memory = stressed[name]["memory"]
    assert memory.tensors[1] <= memory.tensors[0]
    assert memory.growth_collected < 32


@pytest.mark.thorough
@pytest.mark.parametrize("name", SHORT)
def test_interruptions_leave_nothing(stressed, name):
    found = stressed[name]["interruptions"]
    assert found.interrupted
    assert found.different == []
    assert found.threads == []
    assert found.files == []
    assert stressed[name]["last"] == []
