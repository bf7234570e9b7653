"""A deterministic ray-caster with ground truth: a textured box room, one object on its floor, a moving camera.

World and camera axes follow OpenCV: x right, y down, z forward, in metres. The object stands on the floor y = FLOOR, near
x = z = 0. Clips have 17 frames of 64x64 pixels at 16 fps; they depend on the Scene only.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .captions import Attributes, draw

SIZE = 64
FRAMES = 17
FPS = 16
FOCAL = 55.0
FLOOR, CEILING = 1.0, -1.7
WALL_X = 2.7
BACK, FRONT = -6.0, 2.3
DISTANCE = 3.4

RGB = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.68, 0.18),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.95, 0.83, 0.10),
}
RADIUS = {"ball": 0.90, "cube": 0.76, "cone": 1.00}
CONE_HEIGHT = 1.75
LIGHT = (-0.45, -0.75, -0.48)
# Total degrees of pan and orbit, metres of dolly, over the 16 steps of a clip.
AMOUNT = {
    "left": {"slow": 18.0, "fast": 44.0},
    "right": {"slow": 18.0, "fast": 44.0},
    "forward": {"slow": 0.45, "fast": 1.3},
    "orbit": {"slow": 22.0, "fast": 60.0},
}


@dataclass(frozen=True)
class Scene:
    """Everything that determines a clip: attributes, and what captions do not mention.

    position: x and z of the object; size: factor on RADIUS; turn: of the object about y, radians; yaw, pitch: of the
    camera's middle pose, radians; height: y of the camera; tint: RGB factors of the room; shift: of the textures, metres;
    drift: metres per frame that the object moves, (x, z); breathing: peak displacement of the walls, metres;
    morph: 0 to 1, how far the textures flow over the clip.
    """

    attributes: Attributes
    position: tuple[float, float] = (0.0, 0.0)
    size: float = 1.0
    turn: float = 0.6
    yaw: float = 0.0
    pitch: float = 0.06
    height: float = -0.25
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shift: float = 0.0
    drift: tuple[float, float] = (0.0, 0.0)
    breathing: float = 0.0
    morph: float = 0.0


@dataclass(frozen=True)
class Truth:
    """Ground truth of a clip, at pixel centres.

    depth: [T, H, W] metres along the camera's z axis; object_mask: bool [T, H, W]; K: [3, 3] pixels, for points
    (x, y, z) -> pixel (u, v) with the first pixel's centre at 0.5; world_to_camera: [T, 4, 4];
    object_centre: [T, 3] world metres.
    """

    depth: Tensor
    object_mask: Tensor
    K: Tensor
    world_to_camera: Tensor
    object_centre: Tensor
    attributes: Attributes = field(default=None)


def draw_scene(attributes: Attributes, generator: torch.Generator) -> Scene:
    """A scene with these attributes; everything that captions do not mention is random."""
    u = torch.rand(11, generator=generator).tolist()

    def between(low: float, high: float) -> float:
        return low + (high - low) * u.pop()

    return Scene(
        attributes,
        position=(between(-0.22, 0.22), between(-0.15, 0.15)),
        size=between(0.92, 1.08),
        turn=between(0.15, 1.42),
        yaw=between(-0.05, 0.05),
        pitch=between(0.03, 0.10),
        height=between(-0.45, -0.10),
        tint=tuple(between(0.92, 1.06) for _ in range(3)),
        shift=between(0.0, 2.0),
    )


def random_clip(generator: torch.Generator, held_out: bool = False) -> tuple[Scene, Tensor]:
    """A random scene and its frames."""
    scene = draw_scene(draw(generator, held_out), generator)
    return scene, render(scene)


@torch.no_grad()
def render(scene: Scene, supersample: int = 2) -> Tensor:
    """Frames uint8 [T, 3, H, W]; each pixel is the mean of supersample^2 rays."""
    poses = camera_poses(scene)
    origins, rays = _rays(poses, supersample)
    colour = _trace(scene, origins, rays)[0]
    n = SIZE
    colour = colour.view(FRAMES, n, supersample, n, supersample, 3).mean(dim=(2, 4))
    return (colour.clamp_(0, 1) * 255).round_().to(torch.uint8).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def truth(scene: Scene) -> Truth:
    """Depth, mask, intrinsics and poses of the clip that `render` returns."""
    poses = camera_poses(scene)
    origins, rays = _rays(poses, 1)
    _, distance, mask = _trace(scene, origins, rays)
    # Rays are scaled so that their camera z is 1: the parameter along them is the depth.
    shape = (FRAMES, SIZE, SIZE)
    K = torch.tensor([[FOCAL, 0, SIZE / 2], [0, FOCAL, SIZE / 2], [0, 0, 1]])
    return Truth(distance.view(shape), mask.view(shape), K, poses, _centres(scene), scene.attributes)


def camera_poses(scene: Scene) -> Tensor:
    """World-to-camera matrices [T, 4, 4]."""
    a = scene.attributes
    s = torch.linspace(-0.5, 0.5, FRAMES)
    amount = 0.0 if a.move == "still" else AMOUNT[a.move][a.speed]
    yaw = torch.full((FRAMES,), scene.yaw)
    position = torch.zeros(FRAMES, 3)
    position[:, 1] = scene.height
    position[:, 2] = -DISTANCE
    if a.move in ("left", "right"):
        yaw = yaw + s * math.radians(amount) * (1.0 if a.move == "right" else -1.0)
    elif a.move == "forward":
        position[:, 2] += s * amount
    elif a.move == "orbit":
        angle = s * math.radians(amount)
        position[:, 0] = DISTANCE * angle.sin()
        position[:, 2] = -DISTANCE * angle.cos()
        yaw = yaw - angle
    rotation = _pitch(scene.pitch) @ _yaw(yaw)
    poses = torch.eye(4).repeat(FRAMES, 1, 1)
    poses[:, :3, :3] = rotation
    poses[:, :3, 3] = -(rotation @ position[:, :, None])[:, :, 0]
    return poses


def _yaw(angle: Tensor) -> Tensor:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, zero, -s, zero, one, zero, s, zero, c], dim=-1).view(-1, 3, 3)


def _pitch(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]])


def _rays(poses: Tensor, supersample: int) -> tuple[Tensor, Tensor]:
    """Camera centres [T, 1, 3] and ray directions [T, N, 3] in the world, scaled to camera z 1."""
    n = SIZE * supersample
    at = ((torch.arange(n) + 0.5) / supersample - SIZE / 2) / FOCAL
    local = torch.stack([at.expand(n, n), at[:, None].expand(n, n), torch.ones(n, n)], dim=-1).view(-1, 3)
    rotation = poses[:, :3, :3]
    centres = -(rotation.transpose(1, 2) @ poses[:, :3, 3:])[:, :, 0]
    return centres[:, None], local @ rotation


def _centres(scene: Scene) -> Tensor:
    """The centre of the object [T, 3], halfway up the axis for a cone."""
    steps = torch.arange(FRAMES) - FRAMES // 2
    x, z = (p + d * steps for p, d in zip(scene.position, scene.drift, strict=True))
    radius = RADIUS[scene.attributes.shape] * scene.size
    y = FLOOR - (radius if scene.attributes.shape != "cone" else CONE_HEIGHT * scene.size / 2)
    return torch.stack([x, torch.full((FRAMES,), y), z], dim=-1)


def _trace(scene: Scene, origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colour [T, N, 3], parameter along the ray [T, N], and whether the object was hit [T, N]."""
    d = [c.contiguous() for c in rays.unbind(-1)]
    o = origins.unbind(-1)
    phase = torch.linspace(0, 2 * math.pi, FRAMES)[:, None]
    distance, colour, centres = *_room(scene, o, d, phase), _centres(scene)
    local = [(oc - c) for oc, c in zip(o, centres[:, None].unbind(-1), strict=True)]
    hit, normal = SHAPES[scene.attributes.shape](local, d, scene.size, scene.turn)
    mask = hit < distance
    light = torch.tensor(LIGHT) / torch.tensor(LIGHT).norm()
    lambert = sum(n * l for n, l in zip(normal, light.tolist(), strict=True)).clamp_(min=0)
    shade = 0.42 + 0.62 * lambert
    surface = [shade * c for c in RGB[scene.attributes.colour]]
    out = torch.stack([torch.where(mask, s, c) for s, c in zip(surface, colour, strict=True)], dim=-1)
    return out, torch.minimum(hit, distance), mask


def _room(scene: Scene, o, d, phase: Tensor) -> tuple[Tensor, list[Tensor]]:
    swing = scene.breathing * phase.sin()
    half, back, front = WALL_X + swing, BACK - swing, FRONT + swing
    far = 1e9
    tx = torch.where(d[0].abs() < 1e-6, far, (torch.where(d[0] > 0, half, -half) - o[0]) / d[0])
    ty = torch.where(d[1].abs() < 1e-6, far, (torch.where(d[1] > 0, FLOOR, CEILING) - o[1]) / d[1])
    tz = torch.where(d[2].abs() < 1e-6, far, (torch.where(d[2] > 0, front, back) - o[2]) / d[2])
    distance = torch.minimum(torch.minimum(tx, ty), tz)
    x, y, z = (oc + distance * dc for oc, dc in zip(o, d, strict=True))
    flat, side = ty <= distance, tx <= distance
    across = torch.where(side, z, x) + scene.shift
    upward = torch.where(flat, z + 0.35 * scene.shift, FLOOR - y)
    if scene.morph:
        flow = scene.morph * phase / (2 * math.pi)
        wave = (1.7 * across + 2 * upward + phase).sin()
        across, upward = across + flow * (0.55 * wave + 0.35), upward + 0.45 * flow * (2.3 * across + phase).cos()
    wall, floor = TEXTURES[scene.attributes.room](across, upward, flat)
    # Light falls off with the distance from the room's centre and side walls are darker, so that corners are visible.
    glow = 1.06 - 0.035 * (x * x + z * z).clamp(max=16.0).sqrt()
    glow = torch.where(side, glow * 0.84, glow)
    ceiling = flat & (d[1] < 0)
    foot = _centres(scene)[:, None]
    gap = ((x - foot[..., 0]).square() + (z - foot[..., 2]).square()).sqrt() / (RADIUS[scene.attributes.shape] * scene.size)
    shadow = torch.where(flat & ~ceiling, 1 - 0.55 * (1.5 - gap).clamp_(0, 0.7) / 0.7, 1.0)
    glow = glow * shadow
    colour = []
    for w, f, top, tint in zip(wall, floor, CEILING_RGB, scene.tint, strict=True):
        base = torch.where(flat, torch.where(ceiling, top, f), w)
        colour.append(base * glow * tint)
    return distance, colour


CEILING_RGB = (0.80, 0.80, 0.78)


def _smooth_step(x: Tensor, width: float) -> Tensor:
    """0 below -width, 1 above width."""
    return ((x + width) / (2 * width)).clamp(0, 1)


def _groove(x: Tensor, period: float, half_width: float, soft: float = 0.03) -> Tensor:
    """1 within half_width of a multiple of period, 0 elsewhere, with soft edges."""
    to_line = (x - (x / period).round() * period).abs()
    return 1 - _smooth_step(to_line - half_width, soft)


def _mix(a, b, w: Tensor) -> list[Tensor]:
    """(1 - w) a + w b per channel."""
    return [p + (q - p) * w for p, q in zip(a, b, strict=True)]


def _wood(u: Tensor, v: Tensor, flat: Tensor):
    board = u.floor()
    tone = 0.5 + 0.5 * (board * 2.39996).sin()
    grain = 0.5 + 0.5 * (3.0 * v + 3.0 * (board * 1.7).sin() + 1.2 * (1.6 * v + board).sin()).sin()
    wood = _mix((0.50, 0.30, 0.13), (0.72, 0.49, 0.25), (0.7 * tone + 0.3 * grain).clamp(0, 1))
    wood = _mix(wood, (0.34, 0.19, 0.08), _groove(u, 1.0, 0.05))
    return wood, [0.66 * c for c in wood]


def _brick(u: Tensor, v: Tensor, flat: Tensor):
    row = (v / 0.8).floor()
    along = u + 0.8 * (row % 2)
    tone = 0.5 + 0.5 * ((along / 1.6).floor() * 2.1 + row * 4.3).sin()
    stone = _mix((0.46, 0.21, 0.18), (0.58, 0.31, 0.26), tone)
    mortar = torch.maximum(_groove(v, 0.8, 0.07), _groove(along, 1.6, 0.07))
    slabs = torch.maximum(_groove(u, 1.8, 0.05), _groove(v, 1.8, 0.05))
    return _mix(stone, (0.72, 0.62, 0.57), mortar), _mix((0.50, 0.48, 0.47), (0.38, 0.36, 0.35), slabs)


def _tile(u: Tensor, v: Tensor, flat: Tensor):
    lines = torch.maximum(_groove(u, 1.35, 0.07), _groove(v, 1.35, 0.07))
    tone = 0.5 + 0.5 * ((u / 1.35).floor() * 3.3 + (v / 1.35).floor() * 1.9).sin()
    wall = _mix(_mix((0.57, 0.80, 0.80), (0.68, 0.88, 0.86), tone), (0.36, 0.58, 0.60), lines)
    return wall, _mix((0.84, 0.88, 0.88), (0.58, 0.72, 0.73), lines)


def _checker(u: Tensor, v: Tensor, flat: Tensor):
    wave = (u * (math.pi / 1.3)).sin() * (v * (math.pi / 1.3)).sin()
    board = _smooth_step(wave, 0.12)
    return _mix((0.30, 0.29, 0.35), (0.66, 0.66, 0.70), board), _mix((0.22, 0.22, 0.26), (0.48, 0.47, 0.52), board)


TEXTURES = {"wood": _wood, "brick": _brick, "tile": _tile, "checker": _checker}


def _ball(o, d, size: float, turn: float) -> tuple[Tensor, list[Tensor]]:
    r = RADIUS["ball"] * size
    a = sum(c * c for c in d)
    b = sum(p * q for p, q in zip(o, d, strict=True))
    root = b * b - a * (sum(p * p for p in o) - r * r)
    t = torch.where(root > 0, (-b - root.clamp(min=0).sqrt()) / a, 1e9)
    normal = [(p + t.clamp(max=100) * q) / r for p, q in zip(o, d, strict=True)]
    return t, normal


def _cube(o, d, size: float, turn: float) -> tuple[Tensor, list[Tensor]]:
    half = RADIUS["cube"] * size
    c, s = math.cos(turn), math.sin(turn)
    o = (c * o[0] - s * o[2], o[1], s * o[0] + c * o[2])
    d = (c * d[0] - s * d[2], d[1], s * d[0] + c * d[2])
    enter, leave, axes = None, None, []
    for p, q in zip(o, d, strict=True):
        q = torch.where(q.abs() < 1e-6, 1e-6, q)
        near = (-half * q.sign() - p) / q
        axes.append(near)
        end = (half * q.sign() - p) / q
        enter = near if enter is None else torch.maximum(enter, near)
        leave = end if leave is None else torch.minimum(leave, end)
    t = torch.where((enter < leave) & (enter > 0), enter, 1e9)
    n = [torch.where(near == enter, -q.sign(), 0.0) for near, q in zip(axes, d, strict=True)]
    return t, [c * n[0] + s * n[2], n[1], -s * n[0] + c * n[2]]


def _cone(o, d, size: float, turn: float) -> tuple[Tensor, list[Tensor]]:
    # Apex at the top: x^2 + z^2 = (k (y - apex))^2 for y between the apex and the floor.
    height, r = CONE_HEIGHT * size, RADIUS["cone"] * size
    k = r / height
    y = o[1] + height / 2
    a = d[0] * d[0] + d[2] * d[2] - k * k * d[1] * d[1]
    b = o[0] * d[0] + o[2] * d[2] - k * k * y * d[1]
    c = o[0] * o[0] + o[2] * o[2] - k * k * y * y
    root = b * b - a * c
    a = torch.where(a.abs() < 1e-9, 1e-9, a)
    t = (-b - root.clamp(min=0).sqrt()) / a
    at = y + t * d[1]
    t = torch.where((root > 0) & (t > 0) & (at > 0) & (at < height), t, 1e9)
    near = t.clamp(max=100)
    x, z = o[0] + near * d[0], o[2] + near * d[2]
    norm = (x * x + z * z).sqrt().clamp(min=1e-6) * math.sqrt(1 + k * k)
    return t, [x / norm, torch.full_like(x, -k / math.sqrt(1 + k * k)), z / norm]


SHAPES = {"ball": _ball, "cube": _cube, "cone": _cone}

__all__ = ["Scene", "Truth", "camera_poses", "draw_scene", "random_clip", "render", "replace", "truth"]
