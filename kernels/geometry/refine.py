"""Small corrections of estimated depth and cameras, so that what is left over is what the clip itself does.

Robust Gauss-Newton over pairs of views at coarse resolution. Residuals are differences of brightness, as in direct bundle
adjustment (DSO, Engel et al. 2016), and of the two depth maps. Corrected are the pose of each view, a smooth field of relative
depth errors for each view, and one factor of all focal lengths. All of them have priors and bounds of what a depth network
errs, so that a deformed picture is not explained away. Brightness and contrast of the views are fitted as well. Runs on the
CPU, where the small matrices would have the GPU wait.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .photometric import luminance, smoothed

# Longest side in pixels of the images that the fit reads.
LONGEST = 160
# Distance in those pixels of the points that are compared, for each iteration; the first steps need no precision.
STRIDES = (6, 5, 4, 3)
# Knots of the depth correction, rows and columns, bilinear in between: the errors of depth networks are smooth.
ROWS, COLUMNS = 5, 7
KNOTS = ROWS * COLUMNS
# Parameters of a view: translation as a share of the median depth, rotation in radians, logarithms of factors of depth. The
# last parameter of all is the logarithm of the focal length factor. Standard deviations of the priors, and bounds.
PER_VIEW = 6 + KNOTS
PRIORS = (*[0.006] * 3, *[0.004] * 3, *[0.01] * KNOTS, 0.02)
BOUNDS = (*[0.03] * 3, *[math.radians(1)] * 3, *[0.05] * KNOTS, 0.05)
# Number of independent observations that the points of a pair of views are worth: neighbours have the same errors.
OBSERVATIONS = 96
# Smallest scales of the residuals: standardised brightness, relative depth.
MIN_GREY, MIN_DEPTH = 0.02, 0.002
# Points whose depths in the two views differ by more, as a share, are occluded or moved.
SAME_SURFACE = 0.1
# Depths that differ from the median by a larger factor are left out: nothing moves there, or they are no depths.
DEPTH_RANGE = 1000.0
# Range of the factors of contrast.
MIN_GAIN, MAX_GAIN = 0.4, 2.5


@dataclass(frozen=True)
class Corrections:
    """field: [S, ROWS, COLUMNS], logarithm of the factor of depth; motions: [S, 4, 4], multiplied to world_to_camera from the
    left; focal: factor of the focal lengths; gain, bias: [3, S], colours are multiplied by the one and added to the other;
    noise: px at 480 lines, mean displacement between views of the points by all corrections but gain and bias.
    """

    field: Tensor
    motions: Tensor
    focal: float
    gain: Tensor
    bias: Tensor
    noise: float

    def of_geometry(self, depth: Tensor, K: Tensor, world_to_camera: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Corrected depth [S, H, W], K [S, 3, 3] and world_to_camera [S, 4, 4]."""
        field = F.interpolate(self.field.to(depth)[:, None], depth.shape[1:], mode="bilinear", align_corners=True)[:, 0]
        K = K.clone()
        K[:, (0, 1), (0, 1)] *= self.focal
        return field.exp_().mul_(depth), K, (self.motions @ world_to_camera.double()).to(world_to_camera)

    def of_images(self, images: Tensor) -> Tensor:
        """Images [3, S, H, W] with the brightness and contrast of the views made equal."""
        gain, bias = (x.to(images)[:, :, None, None] for x in (self.gain, self.bias))
        return torch.addcmul(bias, images, gain)


@dataclass(frozen=True)
class _Coarse:
    """Views of the fit. planes: [S, 6 or 9, h, w], brightness and its two derivatives, inverse depth and its derivatives, NaN
    where depth is unknown, and with 9 the colours; K, poses: in coarse pixels and with median depth 1.
    """

    planes: Tensor
    K: Tensor
    poses: Tensor


@dataclass(frozen=True)
class _Matches:
    """N points of one view in P others. at: [P, N, 2], positions in pixels; X [3, N] in the view's coordinates, Y [P, 3, N]
    in the others'; R: [P, 3, 3], from the one to the others; basis [N, KNOTS] and theirs [P, N, KNOTS]: weights of the knots
    of both depth corrections; own [6 or 9, N] and there [P, 6 or 9, N]: planes; gap: [P, N], logarithm of the ratio of the two
    depths; seen: bool [P, N].
    """

    others: list[int]
    at: Tensor
    X: Tensor
    Y: Tensor
    R: Tensor
    basis: Tensor
    theirs: Tensor
    own: Tensor
    there: Tensor
    gap: Tensor
    seen: Tensor


def fit(images: Tensor, depth: Tensor, K: Tensor, world_to_camera: Tensor) -> Corrections:
    """Fit the corrections. images: [3, S, H, W]; depth: [S, H, W], NaN for pixels that do not count; K: [S, 3, 3];
    world_to_camera: [S, 4, 4].
    """
    coarse, unit = _coarse(images, depth, K, world_to_camera)
    s = len(depth)
    prior, bound = (torch.tensor([*p[:-1] * s, p[-1]], dtype=torch.float64) for p in (PRIORS, BOUNDS))
    value = torch.zeros(s * PER_VIEW + 1, dtype=torch.float64)
    # The colours are for gain and bias only.
    without_colours = replace(coarse, planes=coarse.planes[:, :-3].contiguous())
    for stride in STRIDES:
        H, g = torch.diag(prior**-2), -value / prior.square()
        for i in range(s):
            _add_equations(H, g, without_colours, value, i, stride)
        value = (value + torch.linalg.solve(H, g)).clamp(-bound, bound)
    gain, bias, noise = _light_and_noise(coarse, value)
    moves = _motions(value)
    moves[:, :3, 3] *= unit
    field = _fields(value).view(s, ROWS, COLUMNS)
    k = _shrinkage(depth)
    return Corrections(field, moves, math.exp(float(value[-1])), gain, bias, noise * k * 480 / depth.shape[1])


def _shrinkage(depth: Tensor) -> int:
    """Pixels of the views along each side of a pixel of the fit."""
    return max(1, -(-max(depth.shape[1:]) // LONGEST))


def _coarse(images: Tensor, depth: Tensor, K: Tensor, world_to_camera: Tensor) -> tuple[_Coarse, float]:
    """Views of the fit, and the median depth."""
    k = _shrinkage(depth)
    known = depth.isfinite()
    both = F.avg_pool2d(torch.stack([known.to(depth), torch.where(known, 1 / depth, 0)], dim=1), k).cpu().float()
    # Where more than a quarter is missing there is an edge.
    inverse = torch.where(both[:, 0] > 0.75, both[:, 1] / both[:, 0], torch.nan)
    colours = F.avg_pool2d(images.transpose(0, 1), k).cpu().float()
    middle = float(inverse.nanmedian())
    unit = 1 / middle if math.isfinite(middle) else 1.0
    inverse = inverse * unit
    # Comparisons with NaN are false.
    inverse = torch.where((inverse > 1 / DEPTH_RANGE) & (inverse < DEPTH_RANGE), inverse, torch.nan)
    grey = smoothed(luminance(colours.transpose(0, 1)))
    grey = (grey - grey.mean(dim=(1, 2), keepdim=True)) / grey.std(dim=(1, 2), keepdim=True).clamp(min=0.01)
    planes = torch.stack([grey, *_derivatives(grey), inverse, *_derivatives(inverse)], dim=1)
    planes = torch.cat([planes, colours], dim=1)
    K, poses = K.cpu().double().clone(), world_to_camera.cpu().double().clone()
    K[:, :2] /= k
    # Pixel centres are at integers in both sizes.
    K[:, :2, 2] += 0.5 / k - 0.5
    poses[:, :3, 3] /= unit
    return _Coarse(planes, K, poses), unit


def _derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along columns and rows of [S, h, w]."""
    padded = F.pad(x[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    return (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2, (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2


def _fields(value: Tensor) -> Tensor:
    """Corrections of the depth, [S, KNOTS]."""
    return value[:-1].view(-1, PER_VIEW)[:, 6:].float()


def _motions(value: Tensor) -> Tensor:
    """Corrections of the poses, [S, 4, 4]."""
    twist = value[:-1].view(-1, PER_VIEW)
    out = torch.eye(4, dtype=torch.float64).repeat(len(twist), 1, 1)
    skew = torch.zeros(len(twist), 3, 3, dtype=torch.float64)
    for row, column, k in ((2, 1, 3), (0, 2, 4), (1, 0, 5)):
        skew[:, row, column], skew[:, column, row] = twist[:, k], -twist[:, k]
    out[:, :3, :3], out[:, :3, 3] = torch.linalg.matrix_exp(skew), twist[:, :3]
    return out


def _basis(u: Tensor, v: Tensor, height: int, width: int) -> Tensor:
    """Weights [..., KNOTS] of the knots at pixels (u, v)."""
    weights = []
    for x, size, count in ((v, height, ROWS), (u, width, COLUMNS)):
        at = x.clamp(0, size - 1) * ((count - 1) / max(size - 1, 1))
        weights.append((1 - (at[..., None] - torch.arange(count)).abs()).clamp(min=0))
    return (weights[0][..., :, None] * weights[1][..., None, :]).flatten(-2)


def _partners(i: int, s: int) -> list[int]:
    """Views that view i is compared with, as the source: every pair of views once, half of them from the earlier view."""
    return [j for j in range(s) if j != i and (i + j) % 2 == (j > i)]


def _match(coarse: _Coarse, value: Tensor, i: int, others: list[int], stride: int) -> _Matches:
    """Points of view i in views `others`."""
    h, w = coarse.planes.shape[2:]
    first = min(stride // 2, h - 1, w - 1)
    rows, columns = torch.arange(first, h, stride), torch.arange(first, w, stride)
    v, u = (x.flatten().float() for x in torch.meshgrid(rows, columns, indexing="ij"))
    own = coarse.planes[i, :, first::stride, first::stride].flatten(1)
    known = own[3].isfinite()
    u, v, own = u[known], v[known], own[:, known]
    fields, poses, K = _fields(value), _motions(value) @ coarse.poses, coarse.K.clone()
    K[:, (0, 1), (0, 1)] *= math.exp(float(value[-1]))
    basis = _basis(u, v, h, w)
    rays = torch.linalg.inv(K[i]).float() @ torch.stack([u, v, torch.ones_like(u)])
    X = rays * ((basis @ fields[i]).exp() / own[3])
    relative = (poses[others] @ torch.linalg.inv(poses[i])).float()
    R = relative[:, :3, :3]
    Y = R @ X + relative[:, :3, 3:]
    projected = K[others].float() @ Y
    at = (projected[:, :2] / projected[:, 2:].clamp(min=1e-3)).transpose(1, 2)
    limits = torch.tensor([w - 1.0, h - 1.0])
    seen = (Y[:, 2] > 1e-3) & (at >= 0).all(dim=-1) & (at <= limits).all(dim=-1)
    grid = at.clamp(-w - h, 2 * (w + h)) * (2 / limits.clamp(min=1)) - 1
    there = F.grid_sample(coarse.planes[others], grid[:, None], align_corners=True)[:, :, 0]
    theirs = _basis(at[..., 0], at[..., 1], h, w)
    gap = (Y[:, 2] * there[:, 3]).clamp(min=1e-6).log() - (theirs @ fields[others, :, None])[..., 0]
    # Comparisons with NaN are false.
    seen &= gap.abs() < SAME_SURFACE
    there = there.nan_to_num()
    return _Matches(others, at, X, Y, R, basis, theirs, own, there, gap.nan_to_num(), seen)


def _standardise(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x [P, N] less its mean over the mask, and its standard deviation [P, 1] there."""
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    x = x - (x * mask).sum(dim=1, keepdim=True) / count
    return x, ((x.square() * mask).sum(dim=1, keepdim=True) / count).sqrt()


def _brightness(m: _Matches) -> tuple[Tensor, Tensor]:
    """Residuals [P, N] of brightness, with each pair's difference in brightness and contrast removed; the target's gain."""
    mask = m.seen.float()
    (own, wide), (there, narrow) = (_standardise(x, mask) for x in (m.own[0].expand_as(mask), m.there[:, 0]))
    gain = (wide.clamp(min=0.01) / narrow.clamp(min=0.01)).clamp(MIN_GAIN, MAX_GAIN)
    return gain * there - own, gain


def _robust(residual: Tensor, seen: Tensor, smallest: float) -> tuple[Tensor, float]:
    """Weights [P, N] (Geman-McClure at three standard deviations), 0 where unseen, and the standard deviation."""
    sigma = max(smallest, 1.48 * float(residual[seen].abs().median()))
    return seen / (1 + (residual / (3 * sigma)).square()).square(), sigma


def _terms(coarse: _Coarse, value: Tensor, m: _Matches) -> list[tuple[Tensor, float, Tensor]]:
    """(residual [P, N], its smallest scale, derivatives [P, N, ...]) of brightness and of depth. Derivatives are by the
    parameters of the source view, by those of the target view (of brightness: only by its pose) and by the focal length.
    """
    K = coarse.K[m.others].float()
    f = math.exp(float(value[-1]))
    away = m.at - K[:, None, :2, 2]
    near = 1 / m.Y[:, 2].clamp(min=1e-3)
    fx, fy = K[:, 0, 0, None] * f * near, K[:, 1, 1, None] * f * near

    def by_point(du: Tensor, dv: Tensor) -> Tensor:
        """Derivative [P, N, 3] by the point Y of a value with these derivatives by the pixel."""
        return torch.stack([du * fx, dv * fy, -(du * away[..., 0] + dv * away[..., 1]) * near], dim=-1)

    grey, gain = _brightness(m)
    slopes = gain * m.there[:, 1], gain * m.there[:, 2]
    inverse = m.there[:, 3].clamp(min=1e-6)
    falls = m.there[:, 4] / inverse, m.there[:, 5] / inverse
    by_depth = by_point(*falls)
    by_depth[..., 2] += near
    X, Y = m.X.T, m.Y.transpose(1, 2)
    widened = X * torch.tensor([-1.0, -1.0, 0.0])
    terms = []
    for residual, smallest, of_Y, (du, dv), of_field in (
        (grey, MIN_GREY, by_point(*slopes), slopes, []),
        (m.gap, MIN_DEPTH, by_depth, falls, [-m.theirs]),
    ):
        of_X = of_Y @ m.R
        of_focal = (of_X * widened).sum(-1) + du * away[..., 0] + dv * away[..., 1]
        parts = [
            -of_X, torch.linalg.cross(of_X, X.expand_as(of_X)), (of_X * X).sum(-1, keepdim=True) * m.basis,
            of_Y, torch.linalg.cross(Y, of_Y), *of_field, of_focal[..., None],
        ]  # fmt: skip
        terms.append((residual, smallest, torch.cat(parts, dim=-1)))
    return terms


def _add_equations(H: Tensor, g: Tensor, coarse: _Coarse, value: Tensor, i: int, stride: int) -> None:
    """Add the normal equations of all pairs with source view i to H and g."""
    m = _match(coarse, value, i, _partners(i, len(coarse.planes)), stride)
    if not bool(m.seen.any()):
        return
    for residual, smallest, J in _terms(coarse, value, m):
        weight, sigma = _robust(residual, m.seen, smallest)
        weighted = (J * (weight * (OBSERVATIONS / (m.X.shape[1] * sigma**2)))[..., None]).transpose(1, 2)
        squares, slope = (weighted @ J).double(), (weighted @ residual[..., None])[..., 0].double()
        of_target = range(J.shape[2] - PER_VIEW - 1)
        at = [[*range(i * PER_VIEW, (i + 1) * PER_VIEW), *(j * PER_VIEW + k for k in of_target), len(g) - 1] for j in m.others]
        at = torch.tensor(at)
        H.view(-1).index_add_(0, (at[:, :, None] * len(g) + at[:, None]).flatten(), squares.flatten())
        g.index_add_(0, at.flatten(), -slope.flatten())


def _light_and_noise(coarse: _Coarse, value: Tensor) -> tuple[Tensor, Tensor, float]:
    """Gain and bias [3, S] of the views, and the mean displacement in coarse pixels between the geometry and its correction.

    Least squares of gain_i a + bias_i - gain_j b - bias_j over pairs of matched colours; mean gain 1, mean bias 0.
    """
    s = len(coarse.planes)
    squares = torch.zeros(3, 2 * s, 2 * s, dtype=torch.float64)
    lengths = []
    for i in range(s):
        others = _partners(i, s)
        m = _match(coarse, value, i, others, STRIDES[0])
        if not bool(m.seen.any()):
            continue
        before = _match(coarse, torch.zeros_like(value), i, others, STRIDES[0])
        lengths.append((m.at - before.at).norm(dim=-1)[m.seen])
        weight, _ = _robust(_brightness(m)[0], m.seen, MIN_GREY)
        one = torch.ones_like(weight)
        for channel in range(3):
            terms = torch.stack([m.own[6 + channel] * one, one, -m.there[:, 6 + channel], -one], dim=-1)
            moments = ((terms * weight[..., None]).transpose(1, 2) @ terms).double()
            for k, j in enumerate(others):
                at = torch.tensor([i, s + i, j, s + j])
                squares[channel, at[:, None], at] += moments[k]
    noise = float(torch.cat(lengths).mean()) if lengths else 0.0
    # The means are held by large weights, views without matches by a small one.
    weight = squares.diagonal(dim1=1, dim2=2).amax(dim=1)[:, None, None].clamp(min=1)
    mean = torch.block_diag(torch.ones(s, s), torch.ones(s, s)).double() / s
    small = 1e-4 * torch.eye(2 * s, dtype=torch.float64)
    wanted = torch.cat([torch.ones(s), torch.zeros(s)]).double()[:, None]
    found = torch.linalg.solve(squares + weight * (mean + small), weight * ((mean + small) @ wanted))[..., 0].float()
    return found[:, :s].clamp(MIN_GAIN, MAX_GAIN), found[:, s:], noise
