"""What a coder gives for a chunk of tokens, and the streamed distance that any coder serves."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Memory of one chunk of tokens, for every coder: up to 128 MiB make no difference on a CPU; a GPU needs more rows to be busy.
CPU_CHUNK_BYTES = 64 << 20
GPU_CHUNK_BYTES = 256 << 20
LEAST_CHUNK_TOKENS = 32


class Code(NamedTuple):
    """Skeleton points and shell thickness [n, C] of a chunk of tokens.

    pullback: (gradient to the skeleton [n, C], gradient to the thickness [n, C]) -> gradient to the tokens [n, C]
    through the coding; it reads the workspace, so call it before the next chunk is coded.
    """

    skeleton: Tensor
    thickness: Tensor
    pullback: Callable[[Tensor, Tensor], Tensor]


class Workspace:
    """Buffers that the chunks of one pass share: fresh pages for every chunk cost as much as the arithmetic on them."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """The first `rows` rows of the buffer `name`, uninitialised or with what was left in them."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < rows:
            buffer = self._buffers[name] = like.new_empty(rows, columns)
        return buffer[:rows]


class Coder(Protocol):
    """A Shell-LCC coder: a module that codes fp32 tokens [n, C] on its own device."""

    def code(self, z: Tensor, workspace: Workspace | None = None) -> Code: ...

    def chunk_tokens(self, device: torch.device) -> int: ...


@torch.no_grad()
def distance(coder: Coder, z: Tensor) -> Tensor:
    """d [N] of tokens z [N, C] (fp32), a chunk at a time: extra memory does not grow with N beyond the result."""
    d, workspace = z.new_empty(z.shape[0]), Workspace()
    for rows in chunks(coder, z):
        s, thickness, _ = coder.code(z[rows], workspace)
        torch.linalg.vector_norm((z[rows] - s).div_(thickness), dim=1, out=d[rows])
    return d


@torch.no_grad()
def distance_and_gradient(coder: Coder, z: Tensor) -> tuple[Tensor, Tensor]:
    """d [N] and its analytic gradient [N, C], value and gradient in one pass over chunks; no autograd graph."""
    d, gradient = z.new_empty(z.shape[0]), torch.empty_like(z, memory_format=torch.contiguous_format)
    workspace = Workspace()
    for rows in chunks(coder, z):
        s, thickness, pullback = coder.code(z[rows], workspace)
        u = (z[rows] - s).div_(thickness)
        torch.linalg.vector_norm(u, dim=1, out=d[rows])
        # On the skeleton itself the norm has no gradient; autograd's convention there is zero.
        direction = u / d[rows, None].clamp_min(torch.finfo(z.dtype).tiny)
        direct = direction / thickness
        gradient[rows] = pullback(-direct, -direct * u).add_(direct)
    return d, gradient


def tokens_in_budget(values: int, device: torch.device) -> int:
    """How many tokens fit into the memory of a chunk on this device, at `values` fp32 values a token; at least 32."""
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(LEAST_CHUNK_TOKENS, budget // (4 * values))


def chunks(coder: Coder, z: Tensor):
    """Slices that cover z [N, C] in pieces of the coder's own size."""
    size = coder.chunk_tokens(z.device)
    return (slice(i, i + size) for i in range(0, z.shape[0], size))


class Distance(torch.autograd.Function):
    """The streamed distance for autograd: the gradient is made with the value, so that nothing else is kept."""

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
