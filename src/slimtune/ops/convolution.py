"""How a convolution slides its kernel, apart from the kernel.

Shapes: O out, C in channels of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

__all__ = ["CONVOLVE", "Convolution"]

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution(NamedTuple):
    """How a layer slides its kernel, whose flattened rows are the (O, I) matrix."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """Before and after, of the last dimension first, as `F.pad` takes them."""
    mode: str
    """Of `nn.Conv2d`; "zeros" is "constant" in `F.pad`."""
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(cls, layer: Any) -> Convolution:
        """That of an nn.Conv1d, Conv2d or Conv3d."""
        pads = tuple(layer._reversed_padding_repeated_twice)
        return cls(layer.kernel_size, layer.stride, pads, layer.padding_mode, layer.dilation, layer.groups)

    def along(self, dims: Sequence[int]) -> Convolution:
        """The same along some of the dimensions; along the others the kernel is 1 and nothing is skipped."""
        n = len(self.kernel)
        one = [d in dims for d in range(n)]
        pads = [p if one[n - 1 - i // 2] else 0 for i, p in enumerate(self.padding)]

        def pick(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(v if own else 1 for v, own in zip(values, one, strict=True))

        return self._replace(
            kernel=pick(self.kernel), stride=pick(self.stride), padding=tuple(pads), dilation=pick(self.dilation)
        )

    def patches(self, x: Tensor) -> Tensor:
        """What every output sees of x (*T, G C, *size): (positions, G, I), a view's copy; W (O, I) times it is x * W.

        Example:
            >>> import torch
            >>> by = Convolution.of(torch.nn.Conv2d(2, 4, 3, stride=2, padding=1))
            >>> by.patches(torch.randn(5, 2, 8, 8)).shape
            torch.Size([80, 1, 18])
        """
        n = len(self.kernel)
        x = x.reshape(-1, *x.shape[-n - 1 :])
        if any(self.padding):
            x = F.pad(x, self.padding, mode="constant" if self.mode == "zeros" else self.mode)
        for dim, (k, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(dim, gap * (k - 1) + 1, step)[..., ::gap]
        x = x.movedim(1, n + 1)  # (T, *positions, G C, *kernel)
        return x.reshape(-1, self.groups, x.shape[n + 1 :].numel() // self.groups)

    def __call__(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """x * W + bias for a kernel W (O, C, *kernel)."""
        n, pads = len(self.kernel), self.padding
        even = self.mode == "zeros" and pads[::2] == pads[1::2]
        if not even and any(pads):
            x = F.pad(x, pads, mode="constant" if self.mode == "zeros" else self.mode)
        inner = tuple(pads[::2][::-1]) if even else (0,) * n
        return CONVOLVE[n](x, W, bias, self.stride, inner, self.dilation, self.groups)
