"""A PRISM head's file, and the backbone that it names."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainers.kernels.files import header as formats
from trainers.kernels.files.header import FormatError
from trainers.kernels.latent_space import WAN21
from trainers.kernels.prism import files
from trainers.kernels.prism.backbone import Backbone, BackboneError, of_wan, of_wan_module
from trainers.kernels.prism.head import HeadConfig, PrismHead


def wan(width=128, depth=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    state = {
        "patch_embedding.weight": torch.randn(width, 16, 1, 2, 2, generator=g),
        "text_embedding.0.weight": torch.randn(width, 256, generator=g),
        "head.modulation": torch.randn(1, 2, width, generator=g) / width**0.5,
    }
    for i in range(depth):
        state[f"blocks.{i}.modulation"] = torch.randn(1, 6, width, generator=g) / width**0.5
        state[f"blocks.{i}.norm3.weight"] = 1 + 0.1 * torch.randn(width, generator=g)
    return state


@pytest.fixture
def loaded():
    torch.manual_seed(0)
    head = PrismHead(HeadConfig(128, dim=64, heads=4, dimensions=("quality", "motion"), sigmas=(0.1, 0.9)))
    metrics = {"accuracy": [{"sigma": 0.9, "without_ties": 0.7}]}
    return files.LoadedHead(head, of_wan(wan()), WAN21, (0.05, 0.99), {"quality": 0.3}, metrics, {"seed": 1}, "toy")


class TestFile:
    def test_a_head_comes_back_as_it_went(self, loaded, tmp_path):
        path = tmp_path / "toy.safetensors"
        files.save(loaded, path)
        again = files.load(path)
        for f in dataclasses.fields(files.LoadedHead):
            if f.name != "head":
                assert getattr(again, f.name) == getattr(loaded, f.name), f.name
        assert again.head.config == loaded.head.config
        visual, text, sigma = torch.randn(2, 9, 128), torch.randn(2, 5, 128), torch.tensor([0.1, 0.9])
        torch.testing.assert_close(again.head([visual], text, sigma=sigma), loaded.head([visual], text, sigma=sigma))
        assert not any(p.requires_grad for p in again.head.parameters())

    def test_a_foreign_or_broken_file_is_named(self, loaded, tmp_path):
        path = tmp_path / "toy.safetensors"
        files.save(loaded, path)
        header = formats.read_header(path, files.KIND)
        state = load_file(path)
        cases = {
            "header and its tensors": ({k: v for k, v in state.items() if k != "query"}, header),
            "NaN or infinite": (state | {"query": state["query"] * float("nan")}, header),
            "do not make a PRISM head": (state, dataclasses.replace(header, config={})),
        }
        for message, (tensors, changed) in cases.items():
            formats.write(path, tensors, changed)
            with pytest.raises(FormatError, match=message) as caught:
                files.load(path)
            assert "toy.safetensors" in str(caught.value)
        save_file(state, path)
        with pytest.raises(FormatError, match=r"not a PRISM head; make one with `python -m trainers.prism train`"):
            files.load(path)


class TestBackbone:
    def test_sizes_are_read_from_the_tensors(self):
        found = of_wan(wan())
        assert (found.width, found.depth, found.text_width, found.channels) == (128, 12, 256, 16)
        assert Backbone.from_json(found.to_json()) == found

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_rounded_weights_are_the_same_and_others_are_not(self, dtype):
        mine = of_wan(wan())
        assert mine.same_weights(of_wan({k: v.to(dtype) for k, v in wan().items()}))
        assert not mine.same_weights(of_wan(wan(seed=1)))
        slightly = {k: v + 0.2 * v.std() * torch.randn_like(v) for k, v in wan().items()}
        assert not mine.same_weights(of_wan(slightly))

    def test_another_architecture_is_refused_by_name(self):
        with pytest.raises(BackboneError, match="head 'mine' was trained on wan, 12 blocks of width 128.*model is wan, 30 "):
            of_wan(wan()).require_architecture(of_wan(wan(depth=30)), "mine")
        of_wan(wan()).require_architecture(of_wan(wan(seed=3)), "mine")

    def test_layers_stored_in_another_format_are_read_by_their_sizes(self):
        """GGUF keeps bytes: a BF16 weight [out, in] is a uint8 tensor [out, 2 in]."""
        network = torch.nn.Module()
        network.patch_embedding = torch.nn.Conv3d(16, 128, (1, 2, 2), (1, 2, 2))
        network.text_embedding = torch.nn.Sequential(torch.nn.Linear(4096, 128))
        network.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
        plain = of_wan_module(network)
        assert (plain.width, plain.depth, plain.text_width, plain.channels) == (128, 3, 4096, 16)
        for layer in (network.patch_embedding, network.text_embedding[0]):
            stored = layer.weight.to(torch.bfloat16).view(torch.uint8)
            layer.weight = torch.nn.Parameter(stored, requires_grad=False)
        found = of_wan_module(network)
        assert found.architecture == plain.architecture
        assert not found.fingerprint
        assert not plain.comparable(found)
        assert plain.comparable(plain)

    def test_shapes_alone_give_an_architecture_and_no_fingerprint(self):
        found = of_wan({k: v.to("meta") for k, v in wan().items()})
        assert found.architecture == of_wan(wan()).architecture
        assert not found.same_weights(of_wan(wan()))

    def test_what_is_no_wan_model_is_said(self):
        with pytest.raises(BackboneError, match="PRISM reads Wan transformers"):
            of_wan({"a": torch.zeros(1)})
