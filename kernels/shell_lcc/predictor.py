"""Amortised coder of Shell-LCC (arXiv 2606.30248): a small MLP maps each token to softmax weights over a codebook.

The state dict has the released checkpoint's keys: `basis`, `global_scale`, `global_bias`, `predictor.0..5` and
`surface_head.0..2`.
"""

import torch
from torch import Tensor
from torch.nn import Linear

from ..files.header import require_shapes
from .coder import Code, Workspace, tokens_in_budget
from .naive import EPSILON


def relu_pullback(gradient: Tensor, output: Tensor) -> Tensor:
    """Backward of ReLU: `gradient` where ReLU's `output` is positive, else zero; same shape, in one pass."""
    return torch.ops.aten.threshold_backward(gradient, output, 0)


class Predictor(torch.nn.Module):
    """Linear-BatchNorm-ReLU-Linear-ReLU-Linear -> softmax weights over the codebook, and a surface head for thickness.

    embedding_dim: C, latent channels; num_bases: K, codebook size; hidden_dim: h, width of the hidden layers.
    """

    kind = "predictor"

    def __init__(self, embedding_dim: int = 16, num_bases: int = 4096, hidden_dim: int = 512):
        super().__init__()
        self.basis = torch.nn.Parameter(torch.randn(num_bases, embedding_dim) * (2.0 / (num_bases + embedding_dim)) ** 0.5)
        self.global_scale = torch.nn.Parameter(torch.ones(1))
        self.global_bias = torch.nn.Parameter(torch.zeros(1, embedding_dim))
        self.predictor = torch.nn.Sequential(
            Linear(embedding_dim, hidden_dim),
            torch.nn.BatchNorm1d(hidden_dim),
            torch.nn.ReLU(),
            Linear(hidden_dim, hidden_dim),
            torch.nn.ReLU(),
            Linear(hidden_dim, num_bases),
        )
        self.surface_head = torch.nn.Sequential(
            Linear(embedding_dim, hidden_dim),
            torch.nn.ReLU(),
            Linear(hidden_dim, embedding_dim),
        )

    @classmethod
    def shapes(cls, embedding_dim: int, num_bases: int, hidden_dim: int) -> dict[str, torch.Size]:
        """Shapes of the state dict of a coder of these sizes; no memory is used."""
        with torch.device("meta"):
            return {name: t.shape for name, t in cls(embedding_dim, num_bases, hidden_dim).state_dict().items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "Predictor":
        """Build a coder from a state dict. Raises KeyError, ValueError, IndexError or RuntimeError on missing, unexpected or
        misshapen tensors."""
        bases, dim = state["basis"].shape
        sizes = dim, bases, state["predictor.0.weight"].shape[0]
        # A tensor of no values can have any number of rows, and a coder of that size fills the memory.
        require_shapes(state, cls.shapes(*sizes))
        coder = cls(*sizes)
        coder.load_state_dict(state)
        return coder

    def config(self) -> dict:
        """Coder name and sizes, as stored in a manifold file's header."""
        num_bases, embedding_dim = self.basis.shape
        hidden = self.predictor[0].weight.shape[0]
        return {"coder": self.kind, "embedding_dim": embedding_dim, "num_bases": num_bases, "hidden_dim": hidden}

    @property
    def device(self) -> torch.device:
        return self.basis.device

    def chunk_tokens(self, device: torch.device) -> int:
        """Tokens per chunk: weights and logits take K values per token each."""
        return tokens_in_budget(2 * self.basis.shape[0], device)

    def weights(self, z: Tensor) -> Tensor:
        """Softmax weights [N, K] of tokens z [N, C], differentiable, with BatchNorm in the module's mode; for fitting."""
        return torch.softmax(self.predictor(z), dim=1)

    def skeleton(self, w: Tensor) -> Tensor:
        """Skeleton points s = (w @ basis) * global_scale + global_bias, [N, C], for weights w [N, K]."""
        return (w @ self.basis) * self.global_scale + self.global_bias

    def thickness(self, skeleton: Tensor) -> Tensor:
        """Thickness exp(surface_head(s)) + 1e-6 [N, C] at skeleton points s [N, C]; the head gives log standard deviations."""
        return self.surface_head(skeleton).exp() + EPSILON

    @torch.no_grad()
    def code(self, z: Tensor, workspace: Workspace | None = None) -> Code:
        """Skeleton and thickness of fp32 tokens z [n, C] (one chunk), and their pullback; BatchNorm uses running statistics.

        With dc the gradient to c = w @ basis, the gradient to the logits is w * (basis @ dc - c . dc). Value and pullback
        need two [n, K] buffers (weights and logits, kept in `workspace`) instead of autograd's several temporaries.
        """
        workspace = workspace or Workspace()
        rows, bases = z.shape[0], self.basis.shape[0]
        w1, b1 = self._folded_input_layer()
        w2, b2, w3, b3 = (p for layer in (self.predictor[3], self.predictor[5]) for p in (layer.weight, layer.bias))
        a1, a2 = self.surface_head[0], self.surface_head[2]
        h1 = torch.addmm(b1, z, w1.t()).relu_()
        h2 = torch.addmm(b2, h1, w2.t()).relu_()
        w = torch.mm(h2, w3.t(), out=workspace.take("weights", rows, bases, z)).add_(b3)
        torch.softmax(w, dim=1, out=w)
        c = w @ self.basis
        s = c * self.global_scale + self.global_bias
        g1 = torch.addmm(a1.bias, s, a1.weight.t()).relu_()
        deviation = torch.addmm(a2.bias, g1, a2.weight.t()).exp_()

        def pullback(grad_skeleton: Tensor, grad_thickness: Tensor) -> Tensor:
            hidden = relu_pullback((grad_thickness * deviation) @ a2.weight, g1)
            dc = (grad_skeleton + hidden @ a1.weight) * self.global_scale
            logits = torch.mm(dc, self.basis.t(), out=workspace.take("logits", rows, bases, z))
            logits.sub_((dc * c).sum(dim=1, keepdim=True)).mul_(w)
            hidden = relu_pullback(logits @ w3, h2)
            hidden = relu_pullback(hidden @ w2, h1)
            return hidden @ w1

        return Code(s, deviation + EPSILON, pullback)

    def _folded_input_layer(self) -> tuple[Tensor, Tensor]:
        linear, norm = self.predictor[0], self.predictor[1]
        gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return linear.weight * gain[:, None], (linear.bias - norm.running_mean) * gain + norm.bias
