"""Clips that a geometry scorer must not be deceived by, made from rendered rigid rooms (room.py).

Four groups of kinds (see KINDS): CORRUPTED scenes, which are not rigid; CHEATS, by which a generator could please a scorer
without showing a rigid scene; FLAT clips, in which nothing shows depth; NUISANCES, which change the pictures of a rigid scene
but not its geometry. `clips` yields them for one seed. All frames are uint8 [T, H, W, 3].
"""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import av
import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.kernels.geometry.tracks import key_frames

from . import room

RIGID = "rigid"
CORRUPTED = (
    "warp 0.5", "warp 1", "warp 2", "warp 4", "walls 0.1", "walls 0.3", "morph 0.1", "morph 0.3", "swap", "dissolve", "cut",
    "box drifts 0.5", "box grows 0.3", "box jumps 0.5",
)  # fmt: skip
CHEATS = ("still slides 8", "still slides 20", "still slides 20, grain", "still slides and zooms", "still tilts", "cards",
          "garbage between keys", "garbage in 3 frames", "melt 20", "melt 60", "boil 20", "freeze half")  # fmt: skip
FLAT = ("static", "slow", "zoom", "pan", "pan zoom", "turn 1.8", "turn 2.7", "pan, grain")
NUISANCES = ("flicker 15", "fade 20", "grain 8", "crf 35", "letterbox", "logo", "blur", "person 20")
KINDS = (RIGID, *CORRUPTED, *CHEATS, *FLAT, *NUISANCES, *(f"{kind}, warp 2" for kind in NUISANCES))
FOCAL = (0.68, 1.13)


def draw_scene(seed: int, **sizes) -> room.Scene:
    """A scene of room.py with a focal length between FOCAL[0] and FOCAL[1] picture widths."""
    share = float(torch.rand(1, generator=torch.Generator().manual_seed(7793 * seed + 13)))
    return replace(room.draw_scene(seed, **sizes), focal=FOCAL[0] + share * (FOCAL[1] - FOCAL[0]))


def clips(seed: int, wanted: set[str], **sizes) -> Iterator[tuple[str, room.Clip]]:
    """(kind, clip) of each wanted kind for one scene; only `frames` counts in clips of derived kinds. sizes: of room.Scene."""
    scene = draw_scene(seed, **sizes)
    rigid = room.render(scene)
    other = cache(lambda: room.render(replace(scene, path_seed=seed + 5000, move=room.MOVES[(seed + 1) % len(room.MOVES)])))
    blurred = cache(lambda: motion_blur(scene))
    warped = cache(lambda: room.warp(rigid, 2.0, seed)[0])
    changes = {
        "walls 0.1": {"breathing": 0.1}, "walls 0.3": {"breathing": 0.3}, "morph 0.1": {"morph": 0.1},
        "morph 0.3": {"morph": 0.3}, "swap": {"swap": True}, "box drifts 0.5": {"drift": 0.5},
        "box grows 0.3": {"grow": 0.3}, "box jumps 0.5": {"jump": 0.5}, "static": {"move": "static"},
        "slow": {"move": "slow"}, "zoom": {"move": "zoom"}, "pan": {"move": "pan"}, "pan zoom": {"move": "pan_zoom"},
        "turn 1.8": {"move": "pan", "focal": 1.8, "turn": 0.25}, "turn 2.7": {"move": "pan", "focal": 2.7, "turn": 0.17},
    }  # fmt: skip
    for kind in KINDS:
        if kind not in wanted:
            continue
        name, _, after = kind.partition(", ")
        if kind == RIGID:
            clip = rigid
        elif kind in changes:
            clip = room.render(replace(scene, **changes[kind]))
        elif kind.startswith("warp"):
            clip = room.warp(rigid, float(name.split()[1]), seed)[0]
        elif name in NUISANCES:
            if name == "blur":
                frames = blurred()
                frames = room.warp(replace(rigid, frames=frames), 2.0, seed)[0].frames if after else frames
            else:
                frames = _nuisance(name, warped().frames if after else rigid.frames, seed)
            clip = replace(rigid, frames=frames)
        elif kind == "pan, grain":
            clip = replace(rigid, frames=grain(room.render(replace(scene, move="pan")).frames, 8, seed))
        else:
            clip = replace(rigid, frames=_cheat(kind, rigid, other, seed))
        yield kind, clip


def _cheat(kind: str, rigid: room.Clip, other: Callable[[], room.Clip], seed: int) -> Tensor:
    frames = rigid.frames
    still = frames[len(frames) // 2]
    match kind:
        case "dissolve":
            return dissolve(frames, other().frames)
        case "cut":
            half = len(frames) // 2
            return torch.cat([frames[:half], other().frames[half:]])
        case "still slides 8":
            return slide(still, len(frames), 0.08, 0.0, seed)
        case "still slides 20":
            return slide(still, len(frames), 0.2, 0.0, seed)
        case "still slides 20, grain":
            return grain(slide(still, len(frames), 0.2, 0.0, seed), 8, seed)
        case "still slides and zooms":
            return slide(still, len(frames), 0.12, 0.25, seed)
        case "still tilts":
            return tilt(still, len(frames), seed)
        case "cards":
            return cards(rigid, seed)
        case "garbage between keys":
            return garbage(frames, other().frames, set(range(len(frames))) - set(key_frames(len(frames))))
        case "garbage in 3 frames":
            drawn = torch.randperm(len(frames) - 2, generator=_generator(seed))[:3] + 1
            return garbage(frames, other().frames, set(drawn.tolist()))
        case "melt 20":
            return melt(frames, 0.2, 40.0, seed)
        case "melt 60":
            return melt(frames, 0.6, 40.0, seed)
        case "boil 20":
            return boil(frames, 0.2, seed)
        case "freeze half":
            half = len(frames) // 2
            return torch.cat([frames[:half], frames[half : half + 1].expand(len(frames) - half, -1, -1, -1)])
    raise ValueError(f"unknown kind '{kind}'")


def _nuisance(name: str, frames: Tensor, seed: int) -> Tensor:
    match name:
        case "flicker 15":
            return scaled(frames, 1 + 0.15 * (2 * torch.rand(len(frames), generator=_generator(seed)) - 1))
        case "fade 20":
            return scaled(frames, torch.linspace(1.0, 0.8, len(frames)))
        case "grain 8":
            return grain(frames, 8, seed)
        case "crf 35":
            return compressed(frames, 35)
        case "letterbox":
            return letterbox(frames, 300 / 480)
        case "logo":
            return logo(frames, seed)
        case "person 20":
            return person(frames, 0.2, seed)
    raise ValueError(f"unknown nuisance '{name}'")


def dissolve(frames: Tensor, other: Tensor) -> Tensor:
    """A cross-fade over the middle third of the clip."""
    t = len(frames)
    weight = ((torch.arange(t) - t / 3) / (t / 3)).clamp(0, 1)[:, None, None, None]
    return torch.lerp(frames.float(), other.float(), weight).round().to(torch.uint8)


def slide(still: Tensor, count: int, share: float, zoom: float, seed: int) -> Tensor:
    """A crop that slides over a still picture. share: of the width; zoom: growth of the scale over the clip, as a share."""
    angle = 6.28 * float(torch.rand(1, generator=_generator(seed)))
    # The crop is small enough to stay inside the picture.
    size = 1 / (1 + 1.2 * share + zoom)
    out = []
    for s in torch.linspace(-0.5, 0.5, count).tolist():
        scale = size / (1 + zoom * s)
        out.append((scale, share * s * math.cos(angle), share * s * math.sin(angle)))
    return _cropped(still, out)


def tilt(still: Tensor, count: int, seed: int) -> Tensor:
    """A flat picture in space, seen by a camera that moves sideways and forward: one homography a frame."""
    h, w, _ = still.shape
    u = torch.rand(3, generator=_generator(seed)).tolist()
    yaw, focal = 0.5 + 0.3 * u[0], 0.9
    y, x = torch.meshgrid(torch.linspace(-h / w, h / w, h) / 2, torch.linspace(-0.5, 0.5, w), indexing="ij")
    normal = torch.tensor([math.sin(yaw), 0.0, -math.cos(yaw)])
    along = torch.tensor([math.cos(yaw), 0.0, math.sin(yaw)])
    out = []
    for s in torch.linspace(-0.5, 0.5, count).tolist():
        eye = torch.tensor([0.4 * s * (1 if u[1] > 0.5 else -1), 0.05 * s, 0.3 * s])
        ray = torch.stack([x / focal, y / focal, torch.ones_like(x)], dim=-1)
        # The plane passes through (0, 0, 1); the picture on it is large enough to cover the view.
        depth = ((torch.tensor([0.0, 0.0, 1.0]) - eye) @ normal) / (ray @ normal)
        point = eye + depth[..., None] * ray - torch.tensor([0.0, 0.0, 1.0])
        at = torch.stack([(point @ along) / 1.4, point[..., 1] / (1.4 * h / w)], dim=-1)
        out.append(_sampled(still, at * 1.2))
    return torch.stack(out)


def cards(clip: room.Clip, seed: int) -> Tensor:
    """The middle frame cut into two layers by depth, which slide at different speeds."""
    middle = len(clip.frames) // 2
    still, depth = clip.frames[middle].float(), clip.depth[middle]
    near = (depth < 0.75 * depth.median()).float()
    near = F.avg_pool2d(near[None, None], 5, 1, 2)[0, 0]
    # The background behind the near layer is filled from its surroundings, coarsely.
    known = 1 - (near > 0).float()[None, None]
    far = still.permute(2, 0, 1)[None] * known
    filled, weight = far, known
    for step in (4, 16, 64, 256):
        small = [max(1, side // step) for side in near.shape]
        more, share = (F.interpolate(F.interpolate(v, small, mode="area"), near.shape, mode="bilinear") for v in (far, known))
        filled = torch.where(weight > 0.5, filled, more / share.clamp(min=1e-4))
        weight = torch.maximum(weight, (share > 1e-2).float())
    background = filled[0].permute(1, 2, 0)
    sign = 1 if seed % 2 else -1
    out = []
    for s in torch.linspace(-0.5, 0.5, len(clip.frames)).tolist():
        back, front = ([(0.8, sign * 0.06 * s, 0.01 * s)], [(0.8 * (1 - 0.06 * s), sign * 0.14 * s, 0.02 * s)])
        a, b = _cropped(background, back)[0].float(), _cropped(still, front)[0].float()
        mask = _cropped(255 * near[..., None].expand(-1, -1, 3), front)[0].float() / 255
        out.append(torch.lerp(a, b, mask).round().to(torch.uint8))
    return torch.stack(out)


def garbage(frames: Tensor, other: Tensor, where: set[int]) -> Tensor:
    """Frames at the given indices replaced by mirrored frames of another clip."""
    out = frames.clone()
    for t in sorted(where):
        out[t] = other[(t * 7) % len(other)].flip(1)
    return out


def melt(frames: Tensor, share: float, pixels: float, seed: int) -> Tensor:
    """A region of the given share of the picture is blurred until it has no corners, and flows by up to `pixels`."""
    t, h, w, _ = frames.shape
    generator = _generator(seed)
    mask = _region(h, w, share, generator)[None, None]
    coarse = torch.randn(1, 2, 4, 4, 6, generator=generator)
    field = F.interpolate(coarse, (t, h // 8, w // 8), mode="trilinear", align_corners=True)[0].transpose(0, 1)
    field = field * (pixels * h / 480 / field.square().sum(1).amax().sqrt())
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    out = []
    for frame, shift in zip(frames, field, strict=True):
        picture = frame.permute(2, 0, 1)[None].float()
        smooth = F.interpolate(F.interpolate(picture, (h // 24, w // 24), mode="area"), (h, w), mode="bicubic").clamp(0, 255)
        shift = F.interpolate(shift[None], (h, w), mode="bicubic", align_corners=True)[0]
        at = torch.stack([x + shift[0] * 2 / w, y + shift[1] * 2 / h], dim=-1)
        flowed = F.grid_sample(smooth, at[None], padding_mode="border", align_corners=True)
        out.append(torch.lerp(picture, flowed, mask)[0].permute(1, 2, 0).round().to(torch.uint8))
    return torch.stack(out)


def boil(frames: Tensor, share: float, seed: int) -> Tensor:
    """A region whose texture is replaced by noise that changes from frame to frame by a fifth."""
    t, h, w, _ = frames.shape
    generator = _generator(seed)
    mask = _region(h, w, share, generator)[..., None]
    now, out = torch.randn(1, 1, h // 6, w // 6, generator=generator), []
    for frame in frames:
        now = 0.8**0.5 * now + 0.2**0.5 * torch.randn(now.shape, generator=generator)
        texture = 128 + 45 * F.interpolate(now, (h, w), mode="bicubic")[0, 0, ..., None]
        out.append(torch.lerp(frame.float(), texture.expand(-1, -1, 3), mask).clamp(0, 255).round().to(torch.uint8))
    return torch.stack(out)


def scaled(frames: Tensor, gain: Tensor) -> Tensor:
    """Frames times one gain each, saturated at 255."""
    return (frames.float() * gain[:, None, None, None]).round_().clamp_(0, 255).to(torch.uint8)


def grain(frames: Tensor, sigma: float, seed: int) -> Tensor:
    """Independent Gaussian noise on every pixel and frame, sigma in grey levels."""
    generator = _generator(seed)
    noisy = [f + sigma * torch.randn(f.shape, generator=generator) for f in frames.float()]
    return torch.stack([f.round_().clamp_(0, 255).to(torch.uint8) for f in noisy])


def compressed(frames: Tensor, crf: int) -> Tensor:
    """Encoded by H.264 at 16 frames a second and decoded again."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def letterbox(frames: Tensor, share: float) -> Tensor:
    """Black bars above and below; share: of the lines that stay."""
    out, bar = frames.clone(), round((1 - share) / 2 * frames.shape[1])
    out[:, :bar] = out[:, -bar:] = 0
    return out


def logo(frames: Tensor, seed: int) -> Tensor:
    """A half-transparent logo in a corner and a line of subtitles, the same in all frames."""
    t, h, w, _ = frames.shape
    generator = _generator(seed)
    out = frames.clone().float()
    mark = F.interpolate((torch.rand(1, 1, 6, 10, generator=generator) > 0.5).float(), (h // 9, w // 8), mode="nearest")[0, 0]
    top, left = h // 20, w - w // 8 - w // 30
    out[:, top : top + mark.shape[0], left : left + mark.shape[1]] = torch.lerp(
        out[:, top : top + mark.shape[0], left : left + mark.shape[1]], torch.tensor(255.0), 0.7 * mark[..., None]
    )
    letters = (torch.rand(1, 1, 7, 90, generator=generator) > 0.45).float()
    letters[..., ::6] = 0
    letters = F.interpolate(letters, (h // 16, round(0.6 * w)), mode="nearest")[0, 0, ..., None]
    low, start = h - h // 16 - h // 18, w // 5
    out[:, low : low + letters.shape[0], start : start + letters.shape[1]] = torch.lerp(
        out[:, low : low + letters.shape[0], start : start + letters.shape[1]], torch.tensor(250.0), letters
    )
    return out.round().clamp(0, 255).to(torch.uint8)


def motion_blur(scene: room.Scene, samples: int = 4) -> Tensor:
    """Frames averaged over `samples` moments of an exposure of half the time between frames."""
    frames = torch.stack([_exposed(scene, t, samples) for t in range(scene.frames)]).round_().to(torch.uint8)
    return grain(frames, scene.noise, scene.seed)


def _exposed(scene: room.Scene, t: int, samples: int) -> Tensor:
    world, K = room.world_of(scene.seed), room.intrinsics(scene)
    many = room.camera_poses(replace(scene, frames=(scene.frames - 1) * 2 * samples + 1))
    total = torch.zeros(scene.height, scene.width, 3)
    for i in range(samples):
        pose = many[min(max(0, 2 * samples * t + i - samples // 2), len(many) - 1)]
        total += room.view(scene, world, K[t], pose, t / max(scene.frames - 1, 1))[0]
    return total.div_(samples).clamp_(0, 1).mul_(255)


def person(frames: Tensor, share: float, seed: int) -> Tensor:
    """A textured figure that walks through the picture and swings its legs. share: of the picture that it covers."""
    t, h, w, _ = frames.shape
    generator = _generator(seed)
    tall = round(0.9 * h)
    # Head and limbs fill about four fifths of the figure's rectangle.
    wide = round(share * h * w / tall / 0.8)
    y, x = torch.meshgrid(torch.linspace(0, 1, tall), torch.linspace(-1, 1, wide), indexing="ij")
    cloth = torch.rand(1, 3, tall // 12, wide // 12, generator=generator) * 200 + 25
    cloth = F.interpolate(cloth, (tall, wide), mode="bicubic").clamp(0, 255)
    start, end = (0.2, 0.62) if seed % 2 else (0.62, 0.2)
    out = []
    for k, frame in enumerate(frames.float()):
        s = k / max(t - 1, 1)
        swing = 0.35 * math.sin(2 * math.pi * 2.5 * s)
        bend = swing * (y - 0.55).clamp(min=0) * torch.sign(x)
        body = ((x.abs() < 0.75) & (y > 0.2) & (y <= 0.6)) | (
            (y > 0.6) & ((x - bend).abs() > 0.12) & ((x - bend).abs() < 0.85)
        )
        head = (x / 0.4).square() + ((y - 0.1) / 0.1).square() < 1
        at = torch.stack([(x - bend).clamp(-1, 1), 2 * y - 1 + 0.02 * math.sin(12 * s)], dim=-1)
        figure = F.grid_sample(cloth, at[None], padding_mode="border", align_corners=True)[0].permute(1, 2, 0)
        left = round((start + (end - start) * s) * w)
        right = min(left + wide, w)
        top = h - tall
        mask = (body | head)[:, : right - left, None]
        region = frame[top:, left:right]
        frame[top:, left:right] = torch.where(mask, figure[:, : right - left], region)
        out.append(frame.round().clamp(0, 255).to(torch.uint8))
    return torch.stack(out)


def _cropped(picture: Tensor, crops: list[tuple[float, float, float]]) -> Tensor:
    """Crops (scale, x, y) of a picture [H, W, 3], enlarged to its size; scale: 1 for all of it; x, y: shares."""
    h, w, _ = picture.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return torch.stack([_sampled(picture, torch.stack([s * x + 2 * dx, s * y + 2 * dy], dim=-1)) for s, dx, dy in crops])


def _sampled(picture: Tensor, at: Tensor) -> Tensor:
    found = F.grid_sample(picture.permute(2, 0, 1)[None].float(), at[None], "bicubic", "reflection", align_corners=True)
    return found[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def _region(h: int, w: int, share: float, generator: torch.Generator) -> Tensor:
    """A soft ellipse that covers `share` of the picture, [H, W] from 0 to 1."""
    u = torch.rand(2, generator=generator).tolist()
    a = math.sqrt(share / math.pi)
    cx, cy = (0.5 + (u[i] - 0.5) * max(0.0, 1 - 2 * a) for i in range(2))
    y, x = torch.meshgrid(torch.linspace(0, 1, h) - cy, torch.linspace(0, 1, w) - cx, indexing="ij")
    return ((1 - (x * x + y * y).sqrt() / a) / 0.08).clamp(0, 1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(86028121 * seed + 7)
