"""Convolutions over time as several threads run them, on the one thread that tests have.

On one thread torch takes a plain loop for small batches (`ConvParams::use_mkldnn`), which is up to ten times slower than
oneDNN's convolution and gives the same result up to rounding. The VAEs of tests spend most of their time there.
"""

import torch
from torch import Tensor, nn

_original = nn.Conv3d._conv_forward


def _conv_forward(self: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    given = (x, weight)
    # Tests also use subclasses of tensors, and other dtypes.
    plain = type(x) is Tensor and x.ndim == 5 and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
    if not plain or isinstance(self.padding, str) or self.padding_mode != "zeros":
        return _original(self, x, weight, bias)
    return torch.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, self.groups)


def use() -> None:
    """Makes every Conv3d of this process use them."""
    if torch.backends.mkldnn.is_available():
        nn.Conv3d._conv_forward = _conv_forward
