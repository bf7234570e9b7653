"""How a player turns and mirrors the stored picture: the display matrix of MP4 and MOV files."""

import struct

from torch import Tensor

# Entries that are smaller than this share of the largest are rounding of an upright matrix.
UPRIGHT = 0.05


def display_matrix(frame) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) of a decoded frame (PyAV): a stored pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift and a
    scale; None without a matrix."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            values = struct.unpack("=9i", bytes(data)[:36])
            return values[0], values[1], values[3], values[4]
    return None


def is_axis_aligned(matrix: tuple[int, int, int, int] | None) -> bool:
    """Whether a display matrix turns by a multiple of 90 degrees, or only mirrors."""
    if matrix is None:
        return True
    a, b, c, d = (abs(v) for v in matrix)
    return min(max(a, d), max(b, c)) <= UPRIGHT * max(a, b, c, d)


def swaps_axes(matrix: tuple[int, int, int, int] | None) -> bool:
    """Whether stored columns are shown as rows."""
    return matrix is not None and abs(matrix[1]) + abs(matrix[2]) > abs(matrix[0]) + abs(matrix[3])


def shown(picture: Tensor, matrix: tuple[int, int, int, int] | None) -> Tensor:
    """A picture [..., h, w] as it is shown, by the nearest of the eight matrices that turn by multiples of 90 degrees and
    mirror."""
    if matrix is None:
        return picture
    a, b, c, d = matrix
    if swaps_axes(matrix):
        picture, right, down = picture.transpose(-2, -1), c, b
    else:
        right, down = a, d
    mirrored = [dim for dim, sign in ((-1, right), (-2, down)) if sign < 0]
    return picture.flip(mirrored) if mirrored else picture
