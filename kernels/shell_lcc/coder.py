"""Shell-LCC distance d = || (z - s) / thickness ||_2 (arXiv 2606.30248), computed in chunks for any coder.

A coder gives each token z its skeleton point s and the shell's thickness per dimension.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Memory of one chunk of tokens: on a CPU, sizes up to 128 MiB are equally fast; a GPU needs more rows to be fully used.
CPU_CHUNK_BYTES = 64 << 20
GPU_CHUNK_BYTES = 256 << 20
LEAST_CHUNK_TOKENS = 32


class Code(NamedTuple):
    """Skeleton points and shell thickness [n, C] of a chunk of tokens.

    pullback: vector-Jacobian product of the coding, (gradient to the skeleton [n, C], gradient to the thickness [n, C])
    -> gradient to the tokens [n, C]. It may read the workspace: call it before coding the next chunk.
    """

    skeleton: Tensor
    thickness: Tensor
    pullback: Callable[[Tensor, Tensor], Tensor]


class Workspace:
    """Buffers shared by the chunks of one pass: allocating memory for each chunk would cost as much as the arithmetic."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """First `rows` rows of buffer `name`, created like `like` if missing or too short; has old or uninitialised values."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < rows:
            buffer = self._buffers[name] = like.new_empty(rows, columns)
        return buffer[:rows]


class Coder(Protocol):
    """Interface of Shell-LCC coders: modules that code fp32 tokens [n, C] on their own device."""

    def code(self, z: Tensor, workspace: Workspace | None = None) -> Code: ...

    def chunk_tokens(self, device: torch.device) -> int: ...


@torch.no_grad()
def distance(coder: Coder, z: Tensor) -> Tensor:
    """Distance d [N] (unitless, >= 0) of tokens z [N, C] (fp32), in chunks: only the result's memory grows with N."""
    d, workspace = z.new_empty(z.shape[0]), Workspace()
    for rows in chunks(coder, z):
        s, thickness, _ = coder.code(z[rows], workspace)
        torch.linalg.vector_norm((z[rows] - s).div_(thickness), dim=1, out=d[rows])
    return d


@torch.no_grad()
def distance_and_gradient(coder: Coder, z: Tensor) -> tuple[Tensor, Tensor]:
    """Distance d [N] of tokens z [N, C] (fp32) and its analytic gradient [N, C], in one pass without autograd graph."""
    d, gradient = z.new_empty(z.shape[0]), torch.empty_like(z, memory_format=torch.contiguous_format)
    workspace = Workspace()
    for rows in chunks(coder, z):
        s, thickness, pullback = coder.code(z[rows], workspace)
        u = (z[rows] - s).div_(thickness)
        torch.linalg.vector_norm(u, dim=1, out=d[rows])
        # Where a token lies on the skeleton (d = 0) the norm is not differentiable: use zero, as autograd does.
        direction = u / d[rows, None].clamp_min(torch.finfo(z.dtype).tiny)
        direct = direction / thickness
        gradient[rows] = pullback(-direct, -direct * u).add_(direct)
    return d, gradient


def tokens_in_budget(values: int, device: torch.device) -> int:
    """Tokens that fit into one chunk's memory on this device, at `values` fp32 values per token; at least 32."""
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(LEAST_CHUNK_TOKENS, budget // (4 * values))


def chunks(coder: Coder, z: Tensor):
    """Slices that cover the rows of z [N, C] in chunks of coder.chunk_tokens."""
    size = coder.chunk_tokens(z.device)
    return (slice(i, i + size) for i in range(0, z.shape[0], size))


class Distance(torch.autograd.Function):
    """`distance` for autograd: computes the gradient [N, C] in the forward pass and saves only that for backward."""

    @staticmethod
    def forward(ctx, z: Tensor, coder: Coder) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return distance(coder, z)
        d, gradient = distance_and_gradient(coder, z)
        ctx.save_for_backward(gradient)
        return d

    @staticmethod
    def backward(ctx, grad_d: Tensor):
        (gradient,) = ctx.saved_tensors
        return grad_d[:, None] * gradient, None
