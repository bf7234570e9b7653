"""Demo of Shell-LCC and PRISM in the toy world, on a CPU in minutes: fit, sample, score, race seeds, write a page.

    python -m trainers.demo [--output_dir outputs/demo] [--prompts 16]

The toy world is a complete Wan 2.1 stack in miniature, trained, and part of the checkout. The demo fits a manifold on its
latents, samples the same prompts and seeds with and without guidance, scores the decoded clips with an independent judge,
races seeds with a PRISM head, and writes an HTML page. `python -m trainers.demo_clips` fits a manifold on real videos.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.toy_world import judge, pipeline, statistics, weights
from benchmarks.toy_world.clips import clip
from trainers.kernels import colours
from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.shell_lcc import heat_map
from trainers.kernels.shell_lcc.manifold import ShellManifold, load
from trainers.shell_lcc import cli as shell_lcc

from .clips import run
from .page import Shown, legend, page, prompt_row, table
from .race import SIZE, race_all, section, summary

# Combinations of attributes on which the model was not trained.
SPLIT = "unseen"
REAL = "render, through the VAE"
SETTINGS = {"no guidance": None, "project (the node's default)": "project", "minimise (released objective)": "minimise"}
COLUMNS = {
    "outside": "tokens outside the band",
    "distance": "mean distance",
    "sharpness": "Laplacian variance / render's",
    "alignment": "shows the caption",
    "overall": "judge, overall",
}
BATCH = 4
# Number of prompts for which seeds are raced; each takes as long as about four clips.
RACED = 8

INTRODUCTION = """<h1>Shell-LCC and PRISM in the toy world</h1>
<h2>Shell-LCC</h2>
<p>Latents of good clips lie on a shell around a manifold. A manifold was fitted on the latents of {fitted} rendered clips,
and {count} prompts, with combinations of attributes that training did not contain, were sampled with the same seeds under
each setting. An oracle judge, which uses pixels only, scored the decoded clips.</p>
<p>Below every clip: the distance of its latent to the shell, {legend} from smoother than real clips to noisier; dark is
within the band that holds the central 90&#8239;% of real tokens.</p>"""
EXPLANATION = """<p>Mean &#177; half of the 95&#8239;% interval over {count} clips. Laplacian variance measures fine detail;
it is relative to the same scene rendered and reconstructed by the VAE. <i>project</i> moves every token onto the shell;
<i>minimise</i>, the released objective, minimises the distance and so moves tokens through the shell. Expect small changes of
pixels: no token is moved by more than 20&#8239;% of its length.</p>"""
FOOTER = """<footer>Made by <code>python -m trainers.demo</code>, seed {seed}. For more clips, strengths and windows:
<code>python -m benchmarks.toy_world.report</code>. The model has 3.4 million weights and makes clips of 64x64 pixels: this
page shows the mechanism, not the look of Wan2.1's own clips.</footer>"""


def sample_all(world, manifold: ShellManifold, captions: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Setting -> latents [N, 16, 5, 8, 8], the same seeds in each."""
    found = {name: [] for name in SETTINGS}
    with tqdm(total=len(captions) * len(SETTINGS), desc="sampling", unit="clip") as bar:
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            seeds = [seed + start + i for i in range(len(part))]
            for name, method in SETTINGS.items():
                hook = method and (lambda x0, sigma, step, method=method: manifold.pull(x0, method))
                found[name].append(world.sample(part, seeds, hook))
                bar.update(len(part))
    return {name: torch.cat(parts) for name, parts in found.items()}


def measure(frames: torch.Tensor, z: torch.Tensor, truth: list, real: dict, manifold: ShellManifold, the_judge) -> dict:
    """All columns of the table, [N] each, and "map", the distances [N, T, h, w]."""
    distance = manifold.distance(z)
    reading = the_judge.read(frames)
    scores = reading.scores(truth)
    return {
        "map": distance,
        "outside": manifold.outside_band(distance).float().mean(dim=(1, 2, 3)),
        "distance": distance.mean(dim=(1, 2, 3)),
        "sharpness": reading.laplacian / real["laplacian"],
        "alignment": scores["alignment"],
        "overall": scores["overall"],
    }


def heat_frames(manifold: ShellManifold, distance: torch.Tensor) -> torch.Tensor:
    """uint8 [frames, 3, H, W] of one clip's distances [T, h, w]."""
    picture = heat_map.heat_map(manifold, distance[None], video_frames=True)
    return (picture * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def compose(captions: list[str], clips: dict, figures: dict, manifold: ShellManifold, shown: int, seed: int, race: str) -> str:
    """The page. clips: name -> frames [N, T, 3, H, W]; figures: name -> result of `measure`; race: HTML."""
    rows = []
    for name, values in figures.items():
        rows.append([name, *(statistics.mean(values[k]).text() for k in COLUMNS)])
    body = []
    for i, caption in enumerate(captions[:shown]):
        row = []
        for name, frames in clips.items():
            f = figures[name]
            notes = (f"{100 * f['outside'][i]:.1f} % outside the band", f"detail {f['sharpness'][i]:.2f} of the render's")
            row.append(Shown(name, frames[i], heat_frames(manifold, f["map"][i]), notes))
        body.append(prompt_row(caption, row))
    known = {
        "count": len(captions),
        "fitted": manifold.provenance["fitted_clips"],
        "seed": seed,
        "legend": legend(colours.HEAT_MAP),
    }
    return page(
        "Shell-LCC and PRISM in the toy world",
        INTRODUCTION.format_map(known),
        "<h2>Measured</h2>",
        table(["", *COLUMNS.values()], rows),
        EXPLANATION.format_map(known),
        f"<h2>The first {min(shown, len(captions))} prompts</h2>",
        *body,
        race,
        FOOTER.format_map(known),
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainers.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts to sample under each setting (16)")
    parser.add_argument("--shown", type=int, default=8, help="number of prompts to show on the page (8)")
    parser.add_argument("--coder", choices=("anchors", "predictor"), default="anchors")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.prompts < 2:
        raise SystemExit(f"--prompts {args.prompts}: expected 2 or more, to give intervals")
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "manifold.safetensors"
    run("latents of the toy world -> manifold", shell_lcc, "fit", "--latents", weights.FOLDER / weights.LATENTS, "--output",
        path, "--coder", args.coder, "--held_out", 0.25, "--seed", args.seed, "--overwrite")  # fmt: skip
    manifold, world, the_judge = load(path), pipeline.load(), judge.load()
    scenes = [clip(SPLIT, i) for i in range(args.prompts)]
    captions, truth = [s.caption for s in scenes], [s.scene.attributes for s in scenes]
    print(f"\n== {args.prompts} prompts x {len(SETTINGS)} settings, the same seeds", flush=True)
    latents = {REAL: world.encode(torch.stack([s.frames for s in scenes]))} | sample_all(world, manifold, captions, args.seed)
    decoded = [world.decode(z) for z in tqdm(latents.values(), desc="decoding", unit="setting")]
    clips = dict(zip(latents, decoded, strict=True))
    real = {"laplacian": the_judge.read(clips[REAL]).laplacian}
    figures = {name: measure(clips[name], z, truth, real, manifold, the_judge) for name, z in latents.items()}
    print(f"\n== measured, mean +- half of the 95 % interval\n{'':<32}", *(f"{c:>30}" for c in COLUMNS.values()))
    for name, values in figures.items():
        texts = (statistics.mean(values[k]).text().replace("\u00b1", "+-") for k in COLUMNS)
        print(f"{name:<32}", *(f"{t:>30}" for t in texts))
    raced_prompts = min(args.prompts, RACED)
    print(f"\n== Best-of-{SIZE} for {raced_prompts} of the same prompts", flush=True)
    raced = race_all(world, the_judge, SPLIT, raced_prompts)
    plain = {k: v.replace("\u00b1", "+-") for k, v in summary(raced).items()}
    print(f"judge, overall: first seed {plain['first']}, winner {plain['winner']}, change {plain['change']}")
    race = section(raced, args.shown)
    text = compose(captions, clips, figures, manifold, args.shown, args.seed, race)
    target = args.output_dir / "index.html"
    write_atomic(target, lambda partial: Path(partial).write_text(text, encoding="utf-8"))
    print(f"\nThe page is {target.resolve()}: open it in a browser.")


if __name__ == "__main__":
    main()
