"""What the panels in the browser are given: states of nodes, events while they run, sprite sheets, and the gallery's routes.

test_browser.py shows that the real frontend draws them.
"""

import base64
import io
import json
import re
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from .comfyui_install import PACK_ROOT
from .prism_material import make_head, node
from .shell_lcc_material import FIT, GUIDANCE, sheet
from .tiny_wan import T2V_NAME, UMT5_NAME

WEB = PACK_ROOT / "web"
STEPS = 8
# Ways to run text as code, or to put text of others into the page as HTML.
FORBIDDEN = r"\beval\(|new Function|innerHTML|insertAdjacentHTML|document\.write|importScripts|WebSocket\("


@pytest.fixture(scope="module")
def wan(comfy):
    (model,) = comfy.run("UNETLoader", unet_name=T2V_NAME, weight_dtype="default")
    (clip,) = comfy.run("CLIPLoader", clip_name=UMT5_NAME, type="wan", device="default")
    prompts = [comfy.run("CLIPTextEncode", clip=clip, text=t)[0] for t in ("a cat walks on grass", "blurry")]
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1)
    return model, *prompts, latent


@pytest.fixture(scope="module")
def head(comfy, models_dir, wan):
    backbone = comfy.module("kernels.prism.backbone").of_wan(wan[0].model.diffusion_model.state_dict())
    make_head(comfy, models_dir / "prism" / "panels.safetensors", backbone, taps=(1, 3))
    return comfy.run(node("LoadPrism"), file="panels.safetensors")[0]


@pytest.fixture(scope="module")
def manifold(comfy):
    return comfy.run(node("FitShellLCC"), latents=raw(comfy, sheet(8)), **FIT)[0]


def raw(comfy, z):
    """A LATENT of normalised latents of Wan 2.1."""
    return {"samples": comfy.module("kernels.latent_space").WAN21.denormalise(z)}


@pytest.fixture
def events(comfy, monkeypatch):
    """(event, data) that nodes send to the browser, each checked to be JSON."""
    found, module = [], comfy.module("nodes.panel_events")
    monkeypatch.setattr(module, "send", lambda event, node_id, data: found.append((event, json.loads(json.dumps(data)))))
    return found


def open_sheet(comfy, state):
    """The frames of a sprite sheet, uint8 [count, height, width, 3]."""
    import folder_paths

    picture = Image.open(Path(folder_paths.get_temp_directory()) / state["filename"])
    whole = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    whole = whole.view(picture.height, picture.width, 3)
    w, h, columns = state["width"], state["height"], state["columns"]
    places = [(i % columns * w, i // columns * h) for i in range(state["count"])]
    return torch.stack([whole[y : y + h, x : x + w] for x, y in places])


class TestSpriteSheet:
    @pytest.mark.parametrize(("count", "height", "width"), [(1, 8, 8), (7, 24, 40), (33, 40, 24)])
    def test_frames_come_back(self, comfy, count, height, width):
        levels = torch.linspace(0, 255, count).round().to(torch.uint8)
        frames = levels[:, None, None, None].expand(count, height, width, 3)
        state = comfy.module("nodes.sprite_sheet").save(frames, "test_sheet")
        found = open_sheet(comfy, state)
        assert found.shape == frames.shape
        assert (found.float().mean(dim=(1, 2, 3)) - levels.float()).abs().max() < 3
        assert state["indices"] == list(range(count))

    def test_long_and_large_clips_are_thinned_and_reduced(self, comfy):
        module = comfy.module("nodes.sprite_sheet")
        state = module.save(torch.zeros(250, 500, 900, 3, dtype=torch.uint8), "test_large")
        assert state["count"] == 100
        assert (state["indices"][0], state["indices"][-1]) == (0, 249)
        assert max(state["columns"] * state["width"], -(-100 // state["columns"]) * state["height"]) <= module.LARGEST_SIDE

    def test_nothing_partial_is_left(self, comfy, monkeypatch):
        import folder_paths

        module, folder = comfy.module("nodes.sprite_sheet"), Path(folder_paths.get_temp_directory())

        def fail(self, *args, **kwargs):
            raise OSError("no space")

        monkeypatch.setattr(Image.Image, "save", fail)
        before = sorted(folder.iterdir())
        with pytest.raises(OSError, match="no space"):
            module.save(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "test_full")
        assert sorted(folder.iterdir()) == before

    def test_a_poster_is_small_enough_for_a_workflow(self, comfy):
        frame = (torch.rand(60, 104, 3, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
        text = comfy.module("nodes.sprite_sheet").poster(frame)
        assert len(text) < 6000
        assert Image.open(io.BytesIO(base64.b64decode(text.split(",")[1]))).width == 96


class TestRace:
    def run(self, comfy, wan, head, **changes):
        model, positive, negative, empty = wan
        options = {"candidates": 4, "keep": 1, "checkpoints": "0.97, 0.9", "finish": "restart", "seed": 5} | changes
        outputs = comfy.run(
            node("PrismKSampler"), model=model, head=head, positive=positive, negative=negative, latent_image=empty,
            steps=STEPS, cfg=6.0, sampler_name="euler", scheduler="simple", denoise=1.0, **options,
        )  # fmt: skip
        return outputs, comfy.ui["intrinsic_reward_race"][0]

    def test_the_state_is_sent_after_every_ranking(self, comfy, wan, head, events):
        (_, scores, seeds, _, _), last = self.run(comfy, wan, head)
        states = [data["state"] for event, data in events if event == "intrinsic_reward.race"]
        assert [s["done"] for s in states] == [False, False, False]
        assert [len(s["checkpoints"]) for s in states] == [2, 2, 2]
        assert [sum(len(c["scores"]) for c in s["candidates"]) for s in states] == [0, 4, 6]
        assert any(event == "intrinsic_reward.race_step" for event, _ in events)
        assert last["done"]
        assert [c["seed"] for c in last["candidates"]] == ["5", "6", "7", "8"]
        assert sorted(c["rank"] for c in last["candidates"]) == [1, 2, 3, 4]
        (best,) = [c for c in last["candidates"] if c["dropped"] is None]
        assert best["rank"] == 1
        assert best["seed"] == str(seeds[0])
        assert best["scores"][-1][1] == pytest.approx(scores[0])

    def test_previews_are_of_every_frame(self, comfy, wan, head, events):
        _, last = self.run(comfy, wan, head)
        for candidate in last["candidates"]:
            # 9 frames are 3 of the latent, 64 pixels 8.
            assert open_sheet(comfy, candidate["sheet"]).shape == (3, 8, 8, 3)
            assert candidate["poster"].startswith("data:image/jpeg;base64,")

    def test_the_winner_shows_its_finished_clip(self, comfy, wan, head, events):
        (latent, *_), last = self.run(comfy, wan, head)
        (best,) = [c for c in last["candidates"] if c["dropped"] is None]
        model = wan[0].model
        frames = comfy.module("nodes.latent_thumbnail").rgb_frames(
            model.process_latent_in(latent["samples"]), model.latent_format
        )
        # JPEG keeps brightness better than the colour of single pixels.
        pair = torch.stack([open_sheet(comfy, best["sheet"]), frames]).float().mean(dim=-1).flatten(1)
        assert torch.corrcoef(pair)[0, 1] > 0.95

    @pytest.mark.parametrize("changes", [{"plan": "drafts", "draft_steps": 3}, {"candidates": 1}, {"keep": 4}])
    def test_other_plans_have_a_board_too(self, comfy, wan, head, events, changes):
        _, last = self.run(comfy, wan, head, **changes)
        assert last["done"]
        assert all(c["rank"] for c in last["candidates"])
        assert all(c["sheet"] for c in last["candidates"])

    def test_large_seeds_stay_exact(self, comfy, wan, head, events):
        _, last = self.run(comfy, wan, head, seed=2**64 - 2, candidates=3)
        assert [c["seed"] for c in last["candidates"]] == [str(2**64 - 2), str(2**64 - 1), "0"]

    def test_watching_changes_nothing(self, comfy, wan, head, monkeypatch):
        (watched, *_), _ = self.run(comfy, wan, head, finish="continue")
        module = comfy.module("nodes.prism_best_of_n")
        monkeypatch.setattr(module.LiveRace, "step", lambda *args: None)
        monkeypatch.setattr(module.LiveRace, "preview", lambda *args: None)
        (alone, *_), _ = self.run(comfy, wan, head, finish="continue")
        assert torch.equal(watched["samples"], alone["samples"])

    def test_with_many_candidates_a_workflow_file_stays_small(self, comfy, wan, head):
        module = comfy.module("nodes.live_race")
        reward = comfy.module("nodes.reward_type").as_reward(head).reward
        race = module.LiveRace("1", range(1000), reward)
        x0 = torch.zeros(1, 16, 3, 8, 8)
        race.preview(0, x0, wan[0].model.latent_format)
        board = [comfy.module("kernels.prism.race").CandidateResult(i) for i in range(1000)]
        state = race.state(board, [0])
        assert state["candidates"][0]["poster"] is None
        assert len(json.dumps(state)) < 150_000


class TestShell:
    def test_a_value_after_every_step(self, comfy, wan, manifold, events):
        model, positive, negative, empty = wan
        (guided,) = comfy.run(
            node("ShellLCCGuidance"), model=model, manifold=manifold, **GUIDANCE | {"method": "band"}
        )
        comfy.run(
            "KSampler", model=guided, positive=positive, negative=negative, latent_image=empty, seed=1, steps=STEPS, cfg=6.0,
            sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        sent = [data for event, data in events if event == "intrinsic_reward.shell"]
        assert [d["step"] for d in sent] == list(range(STEPS))
        assert all(d["steps"] == STEPS and 0 <= d["after"] <= d["before"] <= 1 for d in sent)
        assert ["clips" in d for d in sent] == [False] * (STEPS - 1) + [True]
        (clip,) = sent[-1]["clips"]["clips"]
        assert [s["label"] for s in clip["series"]] == ["before", "after"]
        assert open_sheet(comfy, clip["before"]).shape == open_sheet(comfy, clip["after"]).shape == (3, 8, 8, 3)

    def test_steps_between_noise_levels_belong_to_the_nearest(self, comfy):
        step_of = comfy.module("nodes.shell_strip").step_of
        schedule = [1.0, 0.8, 0.5, 0.0]
        assert [step_of(s, schedule) for s in (1.0, 0.95, 0.8, 0.6, 0.1)] == [0, 0, 1, 2, 2]

    def test_the_share_of_few_tokens_is_that_of_all(self, comfy, manifold):
        module, shell = comfy.module("nodes.shell_strip"), manifold.manifold
        z = torch.randn(1, 16, 4, 64, 64, generator=torch.Generator().manual_seed(3))
        whole = float(shell.outside_band(shell.distance(z)).float().mean())
        assert module.outside_share(shell, z) == pytest.approx(whole, abs=0.04)

    def test_refine_compares_before_and_after(self, comfy, manifold):
        z = sheet(2)
        noisy = raw(comfy, z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))
        comfy.run(
            node("ShellLCCRefine"), latent=noisy, manifold=manifold, strength=1.0, method="band", target="auto", radius=1.0,
            trust=2.0,
        )  # fmt: skip
        (state,) = comfy.ui["intrinsic_reward_timeline"]
        for clip in state["clips"]:
            before, after = (s["points"] for s in clip["series"])
            assert sum(v for _, v in after) < sum(v for _, v in before)

    def test_score_shows_distances_and_what_is_typical(self, comfy, manifold):
        outputs = comfy.run(node("ShellLCCScore"), latent=raw(comfy, sheet(2)), manifold=manifold, frames="latent frames")
        (state,) = comfy.ui["intrinsic_reward_timeline"]
        points = [v for clip in state["clips"] for _, v in clip["series"][0]["points"]]
        assert points == pytest.approx(outputs[3], abs=1e-4)
        low, high = state["typical"]
        assert 0 < low < high
        assert len(state["legend"]["colours"]) == 9


class TestGeometry:
    def test_errors_of_every_frame_that_was_looked_at(self, comfy):
        images, _ = comfy.run(node("ExampleClip"), clip="warped room")
        outputs = comfy.run(node("GeometryTracks"), images=images, clips=1, backend="torch")
        (state,) = comfy.ui["intrinsic_reward_timeline"]
        (clip,) = state["clips"]
        record = json.loads(outputs[5][0])
        shown = dict(map(tuple, clip["series"][0]["points"]))
        assert sorted(shown) == sorted({*record["frame_indices"], *record["between_indices"]})
        for frame, error in zip(record["frame_indices"], record["frame_errors"], strict=True):
            assert shown[frame] == (None if error is None else pytest.approx(error, abs=1e-4))
        assert clip["frames"] == 33
        assert clip["before"]["count"] == clip["after"]["count"] == 33
        before = open_sheet(comfy, clip["before"]).float()
        wanted = torch.nn.functional.interpolate(images.movedim(-1, 1) * 255, before.shape[1:3], mode="area").movedim(1, -1)
        assert (before - wanted).abs().mean() < 12

    def test_at_most_eight_clips_are_shown(self, comfy):
        timeline = comfy.module("nodes.timeline")
        clip = timeline.TimelineClip("x", 2, [], torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
        state = timeline.state([clip] * 11, "unit")
        assert (len(state["clips"]), state["left_out"]) == (8, 3)


def write_clip(path, metadata, frames=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "use_metadata_tags"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as out:
        out.metadata.update(metadata)
        stream = out.add_stream("mpeg4" if path.suffix == ".mp4" else "libvpx-vp9", rate=Fraction(16))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            out.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        out.mux(stream.encode())


PROMPT = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox in snow", "clip": ["9", 0]}},
    "3": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["4", 0]}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry"}},
    "5": {"class_type": "VAELoader", "inputs": {"vae_name": "vae.safetensors"}},
    "6": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "negative": ["3", 0], "seed": 7}},
}
SAVED = {"8": {"node": "Reward Score", "reward": "prompt gap", "scores": [0.25, 0.75]}}


class TestGallery:
    @pytest.mark.parametrize("suffix", [".mp4", ".webm"])
    def test_a_saved_clip(self, comfy, tmp_path, suffix):
        metadata = {"prompt": json.dumps(PROMPT), "intrinsic_reward": json.dumps(SAVED)}
        write_clip(tmp_path / "video" / f"a{suffix}", metadata)
        write_clip(tmp_path / f"without{suffix}", {"prompt": json.dumps(PROMPT)})
        (found,) = comfy.module("nodes.gallery").clips(tmp_path)
        assert found.pop("changed") > 0
        assert found.pop("frames") in (0, 3)
        assert found == {
            "filename": f"a{suffix}", "subfolder": "video", "type": "output", "scores": [{"name": "prompt gap", "value": 0.5}],
            "seed": "7", "size": [64, 48], "prompt": "a fox in snow", "negative": "blurry", "model": "wan.safetensors",
            "vae": "vae.safetensors",
        }  # fmt: skip

    def test_the_winner_of_a_race(self, comfy):
        gallery = comfy.module("nodes.gallery")
        board = [{"seed": 3, "scores": [0.1, 0.4]}, {"seed": 2**63, "scores": [0.2, 0.9]}]
        saved = {"5": {"reward": "prism", "winners": [2**63], "candidates": board}}
        assert gallery.scores_of(saved) == [{"name": "prism", "value": 0.9}]
        assert gallery.seed_of(saved, PROMPT) == str(2**63)

    def test_a_link_out_of_the_output_folder_is_not_followed(self, comfy, tmp_path):
        write_clip(tmp_path / "outside" / "a.mp4", {"intrinsic_reward": json.dumps(SAVED)})
        output = tmp_path / "output"
        output.mkdir()
        (output / "link.mp4").symlink_to(tmp_path / "outside" / "a.mp4")
        (output / "folder").symlink_to(tmp_path / "outside", target_is_directory=True)
        assert comfy.module("nodes.gallery").clips(output) == []

    def test_a_file_that_is_no_video_or_holds_nonsense_is_left_out(self, comfy, tmp_path):
        (tmp_path / "a.mp4").write_bytes(b"no video")
        (tmp_path / "b.webp").write_bytes(b"RIFF")
        # A list of other files, which libav would read.
        (tmp_path / "c.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
        for i, text in enumerate(["{", "[]", "3", '{"1": {"scores": ["x"]}}', '{"1": {"scores": []}}', "[" * 5000, '{"1": 1}',
                                  '{"1": {"candidates": [1], "winners": 5}}']):  # fmt: skip
            write_clip(tmp_path / f"{i}.mp4", {"intrinsic_reward": text, "prompt": text})
        assert comfy.module("nodes.gallery").clips(tmp_path) == []

    def test_a_changed_file_is_read_again(self, comfy, tmp_path):
        gallery, path = comfy.module("nodes.gallery"), tmp_path / "a.mp4"
        write_clip(path, {"intrinsic_reward": json.dumps(SAVED)})
        assert gallery.clips(tmp_path)[0]["scores"][0]["value"] == 0.5
        write_clip(path, {"intrinsic_reward": json.dumps({"8": {"node": "x", "scores": [2.0]}})}, frames=5)
        assert gallery.clips(tmp_path)[0]["scores"][0]["value"] == 2.0

    def test_preference_counts(self, comfy, tmp_path):
        gallery, records = comfy.module("nodes.gallery"), comfy.module("kernels.files.preference_records")
        space = comfy.module("kernels.latent_space").WAN21
        lines = b""
        for prompt, preference in (("a", (0, 1)), ("a", (1, 0)), ("b", None)):
            z = torch.zeros(2, 16, 1, 4, 4)
            record = records.new_record(tmp_path / "mine", prompt, z, space, preference=preference)
            lines += records.to_line(record, tmp_path / "mine")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / records.RECORDS).write_bytes(lines + b"damaged")
        assert gallery.preference_counts(tmp_path) == [{"name": "mine", "records": 3, "chosen": 2, "prompts": 1}]


def test_routes_of_the_gallery(server, base_dir):
    write_clip(base_dir / "output" / "gallery_test.mp4", {"intrinsic_reward": json.dumps(SAVED)})
    found = server.get("/intrinsic_reward/clips")
    assert "gallery_test.mp4" in {c["filename"] for c in found}
    assert isinstance(server.get("/intrinsic_reward/preferences"), list)


class TestJavaScript:
    FILES = sorted(WEB.rglob("*.js"))

    def test_it_weighs_less_than_100_kb_and_needs_no_other_host(self):
        assert len(self.FILES) > 5
        assert sum(p.stat().st_size for p in self.FILES) < 100_000
        for path in self.FILES:
            text = path.read_text(encoding="utf-8")
            imports = re.findall(r'^(?:import|export)[^;]*?from "([^"]+)"', text, re.M)
            assert all(i.startswith(("./", "../../../scripts/")) for i in imports), path
            assert not re.search(FORBIDDEN, text)
            # The one address is in a text that users read.
            hosts = set(re.findall(r"https?://([\w.-]+)", text))
            assert hosts <= {"github.com", "www.w3.org"}, path

    def test_every_text_is_translated(self):
        text = (WEB / "js" / "texts.js").read_text(encoding="utf-8")
        parts = re.split(r"^const (EN|ZH|JA) = \{$", text, flags=re.M)[1:]
        keys = {name: re.findall(r"(?:^  |, )(\w+): (?=[\"(\w])", body.split("\n};")[0], re.M)
                for name, body in zip(parts[::2], parts[1::2], strict=True)}  # fmt: skip
        assert len(keys["EN"]) > 50
        assert sorted(keys["EN"]) == sorted(keys["ZH"]) == sorted(keys["JA"])
        used = {k for p in self.FILES for k in re.findall(r'\btext\("(\w+)"', p.read_text(encoding="utf-8"))}
        assert used <= set(keys["EN"])
