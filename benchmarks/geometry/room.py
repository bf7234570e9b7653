"""Ray-caster of a textured room with boxes at video resolution, with ground truth, for measuring geometry scorers.

Axes follow OpenCV: x right, y down, z forward, in metres; pixel centres at integers. A clip depends on its Scene only.
Unlike the toy world's renderer (64x64, smooth patterns, one object) it has corners to track and occlusions, and is fast enough
for 832x480. Defects of the scene (walls, box, textures) change the world between frames; `warp` deforms the frames.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

TEXELS = 512
TILE = 3.0
MOVES = ("dolly", "truck", "arc", "crane", "walk", "dolly_pan")
STILL_MOVES = ("static", "slow", "zoom", "pan")


@dataclass(frozen=True)
class Scene:
    """Everything that determines a clip.

    seed: of textures, boxes and path; move: one of MOVES or STILL_MOVES; reach: metres of camera path over the clip;
    frames, width, height: of the clip; breathing: peak swing of the side and back walls, metres; drift: metres that a box
    slides over the clip; morph: metres that the textures flow over the clip, unevenly; noise: grey levels per frame; focal:
    focal length as a share of the width; grow: by how much that box is larger at the end, as a share; jump: metres that it
    moves at once half-way; swap: whether the back wall changes its texture half-way; path_seed: of the camera path, None:
    `seed`; turn: yaw of a "pan", radians, None: drawn.
    """

    seed: int
    move: str
    reach: float = 1.0
    frames: int = 49
    width: int = 832
    height: int = 480
    breathing: float = 0.0
    drift: float = 0.0
    morph: float = 0.0
    noise: float = 1.0
    focal: float = 0.83
    grow: float = 0.0
    jump: float = 0.0
    swap: bool = False
    path_seed: int | None = None
    turn: float | None = None


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [T, H, W, 3]; depth: [T, H, W] metres; K: [T, 3, 3]; world_to_camera: [T, 4, 4]; object_mask: bool
    [T, H, W], the box that drifts where one does."""

    frames: Tensor
    depth: Tensor
    K: Tensor
    world_to_camera: Tensor
    object_mask: Tensor


@dataclass(frozen=True)
class _Box:
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    turn: float
    layer: int


@dataclass(frozen=True)
class _World:
    half_x: float
    floor: float
    ceiling: float
    back: float
    front: float
    boxes: list[_Box]
    atlas: Tensor


def draw_scene(seed: int, move: str | None = None, **sizes) -> Scene:
    """A scene with a random camera path; `move` None: one of MOVES, by the seed."""
    u = torch.rand(2, generator=torch.Generator().manual_seed(7919 * seed + 1)).tolist()
    return Scene(seed, move or MOVES[seed % len(MOVES)], reach=0.6 + 0.8 * u[1], **sizes)


@torch.no_grad()
def render(scene: Scene) -> Clip:
    """The clip and its ground truth."""
    world, poses, K = world_of(scene.seed), camera_poses(scene), intrinsics(scene)
    noise = torch.Generator().manual_seed(104729 * scene.seed + len(scene.move))
    frames, depths, masks = [], [], []
    for t in range(scene.frames):
        colour, depth, mask = view(scene, world, K[t], poses[t], t / max(scene.frames - 1, 1))
        if scene.noise:
            colour = colour + scene.noise / 255 * torch.randn(colour.shape, generator=noise)
        frames.append((colour.clamp_(0, 1) * 255).round_().to(torch.uint8))
        depths.append(depth)
        masks.append(mask)
    return Clip(torch.stack(frames), torch.stack(depths), K, poses, torch.stack(masks))


def view(scene: Scene, world, k: Tensor, pose: Tensor, phase: float) -> tuple[Tensor, Tensor, Tensor]:
    """One picture without noise: colour [H, W, 3] in [0, 1], depth [H, W] in metres, mask [H, W] of the first box.

    world: of `world_of`; k: [3, 3]; pose: world to camera [4, 4]; phase: 0 at the first frame to 1 at the last.
    """
    grid = torch.stack(torch.meshgrid(torch.arange(scene.width).float(), torch.arange(scene.height).float(), indexing="xy"))
    local = torch.stack([(grid[0] - k[0, 2]) / k[0, 0], (grid[1] - k[1, 2]) / k[1, 1], torch.ones_like(grid[0])])
    rays = (pose[:3, :3].T @ local.flatten(1)).view(3, scene.height, scene.width)
    centre = -(pose[:3, :3].T @ pose[:3, 3])
    return _trace(scene, world, centre.tolist(), rays, (k @ pose[:3]).tolist(), phase)


def warp(clip: Clip, pixels: float, seed: int) -> tuple[Clip, Tensor]:
    """The clip warped by a smooth random displacement field, and the length [T, H, W] of the displacement in pixels.

    pixels: root mean square length of the displacement over the clip, for pictures of 480 lines.
    """
    t, h, w, _ = clip.frames.shape
    generator = torch.Generator().manual_seed(15485863 * seed + 3)
    coarse = torch.randn(1, 2, max(3, t // 8), 4, 6, generator=generator)
    field = F.interpolate(coarse, (t, h // 8, w // 8), mode="trilinear", align_corners=True)[0].transpose(0, 1)
    field = field * (pixels * h / 480 / field.square().sum(1).mean().sqrt())
    out, lengths = [], []
    y, x = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    for frame, shift in zip(clip.frames, field, strict=True):
        shift = F.interpolate(shift[None], (h, w), mode="bicubic", align_corners=True)[0]
        at = torch.stack([(x + shift[0]) * (2 / (w - 1)) - 1, (y + shift[1]) * (2 / (h - 1)) - 1], dim=-1)
        picture = frame.permute(2, 0, 1)[None].float()
        # Bicubic: bilinear blurs at half-pixel displacements, and then sharpness alone would separate the clips.
        picture = F.grid_sample(picture, at[None], mode="bicubic", padding_mode="border", align_corners=True)[0]
        out.append(picture.permute(1, 2, 0).round_().clamp_(0, 255).to(torch.uint8))
        lengths.append(shift.square().sum(0).sqrt())
    return replace(clip, frames=torch.stack(out)), torch.stack(lengths)


def intrinsics(scene: Scene) -> Tensor:
    """[T, 3, 3] in pixels; with moves "zoom" and "pan_zoom", the focal length grows to 1.4 times."""
    focal = torch.full((scene.frames,), scene.focal * scene.width)
    if scene.move in ("zoom", "pan_zoom"):
        focal = focal * torch.linspace(1.0, 1.4, scene.frames)
    K = torch.zeros(scene.frames, 3, 3)
    K[:, 0, 0] = K[:, 1, 1] = focal
    K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = (scene.width - 1) / 2, (scene.height - 1) / 2, 1.0
    return K


def camera_poses(scene: Scene) -> Tensor:
    """World-to-camera matrices [T, 4, 4]."""
    seed = scene.seed if scene.path_seed is None else scene.path_seed
    u = torch.rand(12, generator=torch.Generator().manual_seed(6151 * seed + 2)).tolist()
    s = torch.linspace(-0.5, 0.5, scene.frames)
    side = 1.0 if u[0] > 0.5 else -1.0
    at = torch.zeros(scene.frames, 3)
    at[:, 0], at[:, 1], at[:, 2] = 0.8 * (u[1] - 0.5), -0.2 - 0.4 * u[2], -2.6 - 0.6 * u[3]
    yaw = torch.full((scene.frames,), 0.3 * (u[4] - 0.5))
    pitch = torch.full((scene.frames,), 0.05 + 0.10 * u[5])
    reach, move = scene.reach, scene.move
    if move == "slow":
        move, reach = "dolly", 0.15 * reach
    if move in ("dolly", "dolly_pan"):
        at[:, 2] += s * reach
        at[:, 0] += s * 0.3 * reach * (u[6] - 0.5)
    if move in ("pan", "pan_zoom", "dolly_pan"):
        angle = 0.25 + 0.25 * u[7] if scene.turn is None else scene.turn
        yaw = yaw + side * s * angle * (0.5 if move == "dolly_pan" else 1.0)
    if move == "truck":
        at[:, 0] += side * s * reach
        at[:, 2] += s * 0.3 * reach * (u[6] - 0.5)
    if move == "crane":
        at[:, 1] += side * s * 0.8 * reach
        pitch = pitch + side * s * 0.15 * u[7]
    if move == "arc":
        angle = side * s * reach / 2.6
        at[:, 0] += 2.6 * angle.sin()
        at[:, 2] += 2.6 * (1 - angle.cos())
        yaw = yaw - angle
    if move == "walk":
        for axis in range(3):
            phase, rate = 6.28 * u[6 + axis], 1.0 + u[9]
            at[:, axis] += (0.35, 0.15, 0.5)[axis] * reach * (6.28 * rate * s * 0.6 + phase).sin()
        yaw = yaw + 0.06 * (5.0 * s + 6.28 * u[10]).sin()
    c, n, zero, one = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
    turn = torch.stack([c, zero, -n, zero, one, zero, n, zero, c], dim=-1).view(-1, 3, 3)
    c, n = pitch.cos(), pitch.sin()
    tilt = torch.stack([one, zero, zero, zero, c, -n, zero, n, c], dim=-1).view(-1, 3, 3)
    rotation = tilt @ turn
    poses = torch.eye(4).repeat(scene.frames, 1, 1)
    poses[:, :3, :3] = rotation
    poses[:, :3, 3] = -(rotation @ at[:, :, None])[:, :, 0]
    return poses


@lru_cache(maxsize=2)
def world_of(seed: int) -> _World:
    generator = torch.Generator().manual_seed(31337 * seed + 5)
    u = torch.rand(64, generator=generator).tolist()
    floor, boxes = 1.1 + 0.3 * u.pop(), []
    places = [(-1.0, 0.4), (0.9, 0.9), (0.1, -0.1), (1.6, 0.0), (-1.8, 1.4)]
    for i in range(2 + int(2.99 * u.pop())):
        half = tuple(0.22 + 0.28 * u.pop() for _ in range(3))
        x, z = places[i][0] + 0.5 * (u.pop() - 0.5), places[i][1] + 0.5 * (u.pop() - 0.5)
        boxes.append(_Box((x, floor - half[1], z), half, 1.57 * u.pop(), 6 + i))
    layers = torch.stack([_texture(generator) for _ in range(6 + len(boxes))])
    # One tall atlas, each texture padded periodically, so that one lookup serves all surfaces.
    atlas = F.pad(layers, (1, 1, 1, 1), mode="circular").permute(1, 0, 2, 3).reshape(3, -1, TEXELS + 2)
    return _World(2.6 + u.pop(), floor, -1.4 - 0.5 * u.pop(), 2.4 + 1.4 * u.pop(), -6.0, boxes, atlas)


def _texture(generator: torch.Generator) -> Tensor:
    """[3, TEXELS, TEXELS], periodic: noise of several scales and random rectangles."""
    base = torch.rand(3, generator=generator)[:, None, None] * 0.5 + 0.25
    out = base.expand(3, TEXELS, TEXELS).clone()
    for cells, weight in ((4, 0.12), (16, 0.12), (64, 0.10), (128, 0.05)):
        noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        noise = F.pad(noise, (2, 2, 2, 2), mode="circular")
        step = TEXELS // cells
        noise = F.interpolate(noise, scale_factor=step, mode="bicubic", align_corners=False)
        out += weight * 2 * noise[0, :, 2 * step : -2 * step, 2 * step : -2 * step]
    for _ in range(30):
        x, y, w, h = (torch.rand(4, generator=generator) * torch.tensor([TEXELS, TEXELS, 90.0, 90.0])).long().tolist()
        colour = torch.rand(3, generator=generator)[:, None, None]
        out[:, y : y + h + 6, x : x + w + 6] = 0.5 * out[:, y : y + h + 6, x : x + w + 6] + 0.5 * colour
    # Random contrast: some walls are nearly plain.
    contrast = 0.15 + 0.85 * torch.rand(1, generator=generator)
    out = out.mean(dim=(1, 2), keepdim=True) + contrast * (out - out.mean(dim=(1, 2), keepdim=True))
    kernel = torch.tensor([0.25, 0.5, 0.25])
    kernel = (kernel[:, None] * kernel)[None, None].expand(3, 1, 3, 3)
    return F.conv2d(F.pad(out[None], (1, 1, 1, 1), mode="circular"), kernel, groups=3)[0].clamp_(0, 1)


def _window(camera, centre, half, shape) -> tuple[slice, slice]:
    """Rows and columns of an image of `shape` that a box with any rotation about y may cover. camera: 3x4 projection."""
    x, y, z = centre
    around, us, vs = math.hypot(half[0], half[2]), [], []
    for dx in (-around, around):
        for dy in (-half[1], half[1]):
            for dz in (-around, around):
                point = (x + dx, y + dy, z + dz, 1.0)
                u, v, w = (sum(a * b for a, b in zip(row, point, strict=True)) for row in camera)
                if w < 0.05:
                    return slice(0, shape[0]), slice(0, shape[1])
                us.append(u / w)
                vs.append(v / w)
    return (
        slice(max(0, math.floor(min(vs))), max(0, min(shape[0], math.ceil(max(vs)) + 1))),
        slice(max(0, math.floor(min(us))), max(0, min(shape[1], math.ceil(max(us)) + 1))),
    )


def _trace(scene: Scene, world: _World, o, d: Tensor, camera, phase: float) -> tuple[Tensor, Tensor, Tensor]:
    """Colour [H, W, 3], depth [H, W] along the camera's z (rays have camera z 1), mask [H, W] of the first box."""
    swing = scene.breathing * math.sin(2 * math.pi * phase)
    half, back, front = world.half_x + swing, world.back + swing, world.front
    d = torch.where(d.abs() < 1e-6, 1e-6, d)
    tx = torch.where(d[0] > 0, half - o[0], -half - o[0]) / d[0]
    ty = torch.where(d[1] > 0, world.floor - o[1], world.ceiling - o[1]) / d[1]
    tz = torch.where(d[2] > 0, back - o[2], front - o[2]) / d[2]
    depth = torch.minimum(torch.minimum(tx, ty), tz)
    p = [oc + depth * dc for oc, dc in zip(o, d, strict=True)]
    flat, side = ty <= depth, tx <= depth
    layer = torch.where(flat, torch.where(d[1] > 0, 0, 1), torch.where(side, torch.where(d[0] > 0, 2, 3), 4))
    if scene.swap and phase >= 0.5:
        layer = torch.where(layer == 4, 5, layer)
    u, v = torch.where(side & ~flat, p[2], p[0]), torch.where(flat, p[2], p[1])
    shade = torch.where(flat, 1.0, torch.where(side, 0.85, 0.95))
    mask = torch.zeros_like(flat)
    for index, box in enumerate(world.boxes):
        # The first box, left of the middle, is the one that drifts.
        x, y, z = box.centre
        if index == 0 and scene.drift:
            angle = 6.28 * ((scene.seed * 0.618034) % 1.0)
            x, z = x + scene.drift * math.cos(angle) * (phase - 0.5), z + scene.drift * math.sin(angle) * (phase - 0.5)
        if index == 0 and scene.jump and phase >= 0.5:
            x = x + scene.jump * (1 if x < 0 else -1)
        half = box.half
        if index == 0 and scene.grow:
            scale = 1 + scene.grow * phase
            y, half = y + half[1] * (1 - scale), tuple(scale * side for side in half)
        rows, columns = _window(camera, (x, y, z), half, depth.shape)
        if rows.stop <= rows.start or columns.stop <= columns.start:
            continue
        at = (rows, columns)
        dx, dy, dz = (q[at] for q in d)
        c, n = math.cos(box.turn), math.sin(box.turn)
        lo = (c * (o[0] - x) - n * (o[2] - z), o[1] - y, n * (o[0] - x) + c * (o[2] - z))
        ld = (c * dx - n * dz, dy, n * dx + c * dz)
        near, far = [], []
        for p0, q, size in zip(lo, ld, half, strict=True):
            q = torch.where(q.abs() < 1e-6, 1e-6, q)
            a, b = (-size - p0) / q, (size - p0) / q
            near.append(torch.minimum(a, b))
            far.append(torch.maximum(a, b))
        enter = torch.maximum(torch.maximum(near[0], near[1]), near[2])
        leave = torch.minimum(torch.minimum(far[0], far[1]), far[2])
        hit = (enter < leave) & (enter > 0.05) & (enter < depth[at])
        depth[at] = torch.where(hit, enter, depth[at])
        local = [p0 + enter * q for p0, q in zip(lo, ld, strict=True)]
        top, along_x = near[1] == enter, near[0] == enter
        u[at] = torch.where(hit, torch.where(along_x, local[2], local[0]) + 0.37 * index, u[at])
        v[at] = torch.where(hit, torch.where(top, local[2], local[1]), v[at])
        layer[at] = torch.where(hit, box.layer, layer[at])
        shade[at] = torch.where(hit, torch.where(top, 1.05, torch.where(along_x, 0.75, 0.95)), shade[at])
        mask[at] = torch.where(hit, index == 0, mask[at])
    if scene.morph:
        flow = scene.morph * phase
        wave = (2.1 * u + 1.3 * v + 3 * phase).sin()
        u, v = u + flow * (0.6 + 0.6 * wave), v + 0.5 * flow * (1.9 * u - v).cos()
    return _shade(world.atlas, layer, u, v) * shade[..., None], depth, mask


def _shade(atlas: Tensor, layer: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear colour [H, W, 3] of the atlas at metres (u, v) of a layer, repeated every TILE."""
    x = (u / TILE - (u / TILE).floor()) * TEXELS + 0.5
    y = (v / TILE - (v / TILE).floor()) * TEXELS + 0.5 + layer * (TEXELS + 2)
    at = torch.stack([x * (2 / (TEXELS + 1)) - 1, y * (2 / (atlas.shape[1] - 1)) - 1], dim=-1)
    return F.grid_sample(atlas[None], at[None], mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
