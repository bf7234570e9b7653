"""Trains the oracle judge on renders and prints its accuracy on held-out renders.

    python -m benchmarks.toy_world.train_judge

Looks is trained on clean, blurred and noisy frames, whose blur and noise it estimates; Motion on clean clips, and on clips
with rubber sheets, drifting objects, breathing walls, morphing textures and jitter, which it learns to classify as not rigid.
About five minutes on one core. Writes judge.safetensors, fp16.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command_line import make_parser
from trainers.kernels.files.atomic import write_atomic

from .captions import ROOMS, VALUES
from .clips import Labelled, clips
from .corruptions import corrupt
from .judge import LOOKS, MOTION, REFERENCE, WEIGHTS, Judge, Looks, Motion, grey, measure

UNRIGID = ("rubber_sheet", "drifting_object", "breathing_walls", "texture_morph", "jitter")
IGNORE = -100


def train_looks(material: list[Labelled], steps: int, generator: torch.Generator) -> Looks:
    """AdamW on 64 single frames per step."""
    model, target = Looks(), _targets(material, LOOKS)
    frames = torch.stack([c.frames for c in material])
    optimiser, schedule = _optimiser(model, steps)
    for step in range(steps):
        i = torch.randint(0, len(material), (64,), generator=generator)
        t = torch.randint(0, 17, (64,), generator=generator)
        x, quality = _spoil(frames[i, t].float() / 255, generator)
        out = model(x)
        loss = F.mse_loss(out["quality"], quality) + sum(F.cross_entropy(out[k], target[k][i]) for k in LOOKS)
        _step(optimiser, schedule, loss)
        _say("looks", step, steps, loss)
    return model


def train_motion(material: list[Labelled], unrigid: list[Labelled], steps: int, generator: torch.Generator) -> Motion:
    """AdamW on 32 whole clips per step, 10 of them not rigid, which do not contribute to the losses of move and speed."""
    model = Motion()
    clean, bad = (torch.stack([grey(c.frames) for c in m]).to(torch.uint8) for m in (material, unrigid))
    target = _targets(material, MOTION)
    optimiser, schedule = _optimiser(model, steps)
    for step in range(steps):
        i = torch.randint(0, len(clean), (22,), generator=generator)
        j = torch.randint(0, len(bad), (10,), generator=generator)
        x = torch.cat([clean[i], bad[j]]).float() / 255
        # Reconstructions and samples are slightly blurred and noisy, which must not look like a defect of the scene.
        if float(torch.rand((), generator=generator)) < 0.5:
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = x + 0.02 * float(torch.rand((), generator=generator)) * torch.randn(x.shape, generator=generator)
        out = model(x)
        rigid = torch.cat([torch.ones(22), torch.zeros(10)])
        loss = F.binary_cross_entropy_with_logits(out["rigid"].flatten(), rigid)
        loss = loss + sum(F.cross_entropy(out[k][:22], target[k][i], ignore_index=IGNORE) for k in MOTION)
        _step(optimiser, schedule, loss)
        _say("motion", step, steps, loss)
    return model


def accuracies(judge: Judge, material: list[Labelled]) -> dict[str, float]:
    """Share of clips classified correctly, per attribute."""
    reading = judge.read(torch.stack([c.frames for c in material]))
    truth = [c.scene.attributes for c in material]
    return {k: float(reading.correct(truth, k).float().mean()) for k in VALUES}


def reference(material: list[Labelled]) -> dict[str, Tensor]:
    """Mean sharpness figures of clips of each room: figure -> [rooms]."""
    figures = measure(torch.stack([c.frames for c in material]))
    rooms = torch.tensor([ROOMS.index(c.scene.attributes.room) for c in material])
    return {k: torch.stack([figures[k][rooms == i].mean() for i in range(len(ROOMS))]) for k in REFERENCE}


def save(judge: Judge, path: Path, notes: dict[str, str]) -> None:
    """fp16 weights, references in fp32, `notes` in the header."""
    state = {f"looks.{k}": v for k, v in judge.looks.state_dict().items()}
    state |= {f"motion.{k}": v for k, v in judge.motion.state_dict().items()}
    state = {k: v.half().contiguous() for k, v in state.items()}
    state |= {f"reference.{k}": v for k, v in judge.reference.items()}
    write_atomic(
        path, lambda partial: save_file(state, partial, metadata={"format": "pt", "title": "Toy world judge"} | notes)
    )


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.train_judge", __doc__)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--max_train_steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    material = clips("judge", args.clips)
    unrigid = [corrupt(c, UNRIGID[i % len(UNRIGID)], 0.35 + 0.65 * (i % 7) / 6, i) for i, c in enumerate(material[::3])]
    test = clips("judge_test", 200)
    looks = train_looks(material, args.max_train_steps, generator)
    motion = train_motion(material, unrigid, args.max_train_steps, generator)
    judge = Judge(looks, motion, reference(test))
    found = accuracies(judge, test)
    print("accuracy on 200 unseen renders:", {k: round(v, 3) for k, v in found.items()})
    rigid = {"clean": judge.read(torch.stack([c.frames for c in test])).rigid.mean()}
    for d in UNRIGID:
        rigid[d] = judge.read(torch.stack([corrupt(c, d, 1.0, i).frames for i, c in enumerate(test[:40])])).rigid.mean()
    print("mean probability of a rigid world:", {k: round(float(v), 3) for k, v in rigid.items()})
    save(judge, args.output, {"seed": str(args.seed)} | {f"accuracy_{k}": f"{v:.3f}" for k, v in found.items()})
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")
    return 0


def _targets(material: list[Labelled], attributes) -> dict[str, Tensor]:
    def index(c: Labelled, k: str) -> int:
        value = getattr(c.scene.attributes, k)
        return IGNORE if value is None else VALUES[k].index(value)

    return {k: torch.tensor([index(c, k) for c in material]) for k in attributes}


def _spoil(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(frames, amounts [N, 2] in 0..1): half the frames blurred by mixing in a 5x5 mean, and half made noisy, at random."""
    amount = torch.rand(len(x), 2, generator=generator) * (torch.rand(len(x), 2, generator=generator) < 0.5)
    a, b = amount[:, :1, None, None], amount[:, 1:, None, None]
    x = x + a * (F.avg_pool2d(x, 5, 1, 2, count_include_pad=False) - x)
    gain = 1 + 0.1 * (torch.rand(len(x), 3, 1, 1, generator=generator) - 0.5)
    return gain * x + 0.08 * b * torch.randn(x.shape, generator=generator), amount


def _optimiser(model, steps: int):
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)


def _step(optimiser, schedule, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    schedule.step()


def _say(name: str, step: int, steps: int, loss: Tensor) -> None:
    if (step + 1) % 100 == 0:
        print(f"{name} step {step + 1} of {steps} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
