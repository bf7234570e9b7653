"""The arithmetic of docs/scale.md: against cases counted by hand, and against PyTorch's counter of FLOPs."""

import pkgutil
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import scale_costs as costs
from benchmarks.scale_costs import DitSize, Flops
from trainers import encode
from trainers.running import command_line
from trainers.tuning.lora import LoraOptions
from trainers.tuning.memory_plan import adapter_numbers, step_plan

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
TINY = DitSize(width=8, ffn=24, layers=3, channels=16, text_width=12)


@pytest.fixture(autouse=True)
def poisoned_empty():
    """In place of the one for all tests: torch.device("meta") does not know a patched torch.empty, and 14B would be made."""
    from torch.utils import _device

    _device._device_constructors.cache_clear()


def test_a_small_case_by_hand():
    """Width 2, feed-forward 3, one block, 1 channel, texts of width 5; 10 tokens, 4 of the text."""
    size = DitSize(width=2, ffn=3, layers=1, channels=1, text_width=5)
    # Per token: 6 matrices of 2 x 2 and two of 2 x 3, 36 products; the text's keys and values: 8 a token.
    block = 2 * 10 * 36 + 2 * 4 * 8
    # Patches of 4 numbers in and out; text 5 -> 2 -> 2; time 256 -> 2 -> 2 -> 12.
    around = 2 * 10 * (8 + 8) + 2 * 4 * (10 + 4) + 2 * (512 + 4 + 24)
    # Queries with keys, and with values, of 10 + 4 tokens.
    attention = 2 * 2 * 10 * 14 * 2
    found = size.forward(10, 4)
    assert (found.linear, found.attention) == (block + around, attention)
    assert found.backward(full=False) == found.linear + 2.5 * attention
    assert found.backward(full=True) == 2 * found.linear + 2.5 * attention
    total = block + around + attention
    assert costs.sampling_flops(size, 10, 50) == 100 * size.forward(10).total
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DitSize, "forward", lambda self, tokens: Flops(100.0, 40.0))
        # Reference 2, loser 1, then each side forward, again, and backward: 7 x 140 + 2 x (100 + 100).
        assert costs.pair_flops(size, 10) == 7 * 140 + 2 * 200
        assert costs.pair_flops(size, 10, cached=True) == 5 * 140 + 2 * 200
        assert costs.pair_flops(size, 10, cached=True, full=True) == 5 * 140 + 2 * 300
    assert total == 784 + 320 + 112 + 1080 + 1120


def test_the_clip_of_the_papers():
    latent = costs.latent_shape(832, 480, 81)
    assert latent == (16, 21, 60, 104)
    assert costs.tokens_of(latent) == 21 * 30 * 52 == 32_760
    assert costs.tokens_of(costs.latent_shape(64, 48, 5)) == 2 * 3 * 4


def transformer(size):
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=max(1, size.width // 128), attention_head_dim=min(size.width, 128), in_channels=size.channels,
            out_channels=size.channels, text_dim=size.text_width, freq_dim=256, ffn_dim=size.ffn, num_layers=size.layers,
            cross_attn_norm=True,
        )  # fmt: skip


@pytest.mark.parametrize("size", [TINY, *costs.SIZES.values()], ids=["tiny", *costs.SIZES])
def test_formulas_are_what_pytorch_counts(size):
    from torch.utils.flop_counter import FlopCounterMode

    model = transformer(size)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.block_parameters == sum(p.numel() for p in model.blocks[0].parameters())
    # Few tokens, and a short text, so that every part has a share.
    latent = torch.zeros(1, size.channels, 3, 8, 12, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(latent, torch.zeros(1, device="meta"), torch.zeros(1, 7, size.text_width, device="meta"), return_dict=False)
    assert counter.get_total_flops() == size.forward(3 * 4 * 6, 7).total


def test_the_text_encoder_is_what_pytorch_counts(monkeypatch):
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(costs, "TEXT_ENCODER", (16, 40, 3))
    config = transformers.UMT5Config(d_model=16, d_ff=40, num_layers=3, num_heads=2, d_kv=8, vocab_size=50)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformers.UMT5EncoderModel(config)(torch.zeros(1, 11, dtype=torch.long))
    assert counter.get_total_flops() == costs.text_flops(11)


def test_the_vae_grows_with_the_area_and_the_frames():
    config = (("base_dim", 4), ("dim_mult", (1, 1, 1, 1)))
    encode, decode = costs.vae_flops(64, 32, 5, config)
    assert decode > encode > 0
    assert costs.vae_flops(128, 32, 5, config)[1] / decode == pytest.approx(2, rel=0.02)
    # Behind the first frame, every four frames cost the same.
    nine, thirteen = (costs.vae_flops(64, 32, n, config)[1] for n in (9, 13))
    assert thirteen - nine == pytest.approx(nine - decode, rel=0.05)


def test_hours():
    assert costs.hours(3.6e18, 1e15, (0.5, 0.25)) == (2, 4)
    assert costs.hours(3.6e18, 1e15, (0.25, 0.5), gpus=8) == (0.25, 0.5)


def test_sharding_divides_what_does_not_depend_on_the_clip():
    size = costs.SIZES["14B"]
    plan = step_plan(size.shapes(4, 4), (16, 21, 60, 104), None)
    state = 16 * size.parameters
    activations = plan.total - state
    assert costs.sharded_bytes(plan, size, 1) == plan.total
    blocks = 2 * 4 * size.block_parameters
    assert costs.sharded_bytes(plan, size, 8) == pytest.approx(state / 8 + blocks + activations, rel=1e-9)
    needed = costs.gpus_needed(plan, size)
    assert costs.sharded_bytes(plan, size, needed) <= costs.USABLE < costs.sharded_bytes(plan, size, needed // 2)
    assert costs.gpus_needed(plan, size, plan.total) == 1
    assert costs.gpus_needed(plan, size, activations) is None
    frozen = step_plan(size.shapes(2, 2), (16, 21, 60, 104), LoraOptions())
    adapter = adapter_numbers(size.shapes(2, 2), LoraOptions())
    activations = frozen.total - 2 * size.parameters - 16 * adapter
    expected = (2 * size.parameters + 16 * adapter) / 4 + 4 * size.block_parameters + activations
    assert costs.sharded_bytes(frozen, size, 4) == pytest.approx(expected, rel=1e-9)


def test_bytes_of_a_clip_by_hand():
    table = costs.storage_table(832, 480, 81, 10_000, 8)
    # 16 x 21 x 60 x 104 numbers of two bytes, 80,000 times.
    assert f"| finished latent, fp16 | {2 * 16 * 21 * 60 * 104 / 1e6:.3g} MB | 335 GB |" in table
    assert costs.size_of(999) == "0.999 kB"


def test_the_document_has_the_tables_of_the_script():
    text = DOCUMENT.read_text(encoding="utf-8")
    for table in costs.tables(costs.parse([])):
        assert table in text, f"docs/scale.md lacks, or has an old:\n{table}"


def commands_of(text):
    """Argument lists of the document's commands, [name of the trainer, arguments]."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [line.partition("-m trainers.")[2].split() for line in lines if "-m trainers." in line]
    return [[re.sub(r"\$\w+", "0", word) for word in words] for words in found]


def test_the_documents_commands_exist(capsys):
    """Each is parsed; a flag that was renamed would be an error."""
    commands = commands_of(DOCUMENT.read_text(encoding="utf-8"))
    assert len(commands) >= 11
    assert {c[0] for c in commands} == {"prism", "pairs", "geometry", "dpo", "encode"}
    for name, *argv in commands:
        if name == "encode":
            encode.parse(argv)
        else:
            cli = pkgutil.resolve_name(f"trainers.{name}.cli")
            command_line._parser(name, "", cli.COMMANDS).parse_args(argv)


def test_the_documents_other_figures_are_the_scripts():
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    gradients = [4 * adapter_numbers(size.shapes(2, 2), LoraOptions()) / 1e6 for size in costs.SIZES.values()]
    assert "{:.0f} MB (1.3B) or {:.0f} MB (14B) in fp32".format(*gradients) in text
    for low, high in (costs.DIT_SHARE, costs.VAE_SHARE):
        assert f"{100 * low:.0f} to {100 * high:.0f} %" in text
    assert "{} s with OpenCV, {} s with torch".format(*costs.GEOMETRY_S) in text
    prompt = costs.hours(8 * costs.sampling_flops(costs.SIZES["14B"], 32_760, 50), costs.PEAK["H100 SXM"], costs.DIT_SHARE)
    assert "{:.0f} to {:.0f} minutes of an H100".format(*(60 * h for h in prompt)) in text
    assert f"holds {costs.USABLE // 2**30} GiB" in text
    assert "H100 SXM {:.0f}, A100 {:.0f} TFLOP/s".format(*(p / 1e12 for p in costs.PEAK.values())) in text
