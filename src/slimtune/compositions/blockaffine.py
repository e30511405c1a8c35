"""W' = W (1 + dW) + dW, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import patched_linear, replayed_dropout
from ..ops.blocks import (
    block_column_change,
    block_row_change,
    block_row_linear,
    block_sum,
    blocks,
    blockwise_product,
    tiled,
)
from ..structures import BlockTiled, Structure
from ..structures.base import check_count
from .base import Composition, LinearMap

__all__ = ["BlockAffine"]


class BlockAffine(Composition):
    """W'_ac = W_ac + W_ac dW_ac + dW_ac for all N x N blocks (a, c), or W_ac + dW_ac W_ac + dW_ac with `left`.

    Bone, Kang & Yin 2024, arXiv 2409.15371v1 (today's Bat). dW may be any structure; the last blocks are cut and count
    as padded with zeros where N does not divide a size. Over `BlockTiled` of the same block there are cheaper exact
    ways on a Linear or transformers' Conv1D, packed weights included:

    - "row" (W'_ac = W_ac (1 + B_c) + B_c), where N divides O: with u_c = B_c x_c, y = W (x + u) + tiled(sum_c u_c).
    - "col" and `left` (W'_ac = (1 + B_a) W_ac + B_a), where N divides I: with z = W x, y_a = z_a +
      B_a (z_a + sum_c x_c). Keeps one (T, O) tensor. In bf16 a bias much larger than z costs precision.
    - "col", as published, has none; W' is a temporary, made again in the backward pass.

    Dropout: only the change W' - W sees the dropped input; the published code ignores it. "col" and `left` pay a
    second product of W's size then. In half precision x + u and W' round as a merged weight does: a change
    below the last digit is not seen.

    Args:
        block: N >= 1.
        left: multiply W by dW from the left.

    Raises:
        StructureError: block below 1.

    Example:
        >>> import slimtune as st
        >>> W, dW = torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> st.BlockAffine(block=2).weight(W, dW)
        tensor([[3., 4.],
                [6., 9.]])
    """

    def __init__(self, *, block: int = 64, left: bool = False) -> None:
        super().__init__()
        check_count(block, "BlockAffine: block")
        self.block, self.left = block, left

    def options(self) -> dict[str, Any]:
        return {"block": self.block, "left": self.left}

    def weight(self, W: Tensor, dW: Tensor) -> Tensor:
        product = blockwise_product(dW, W, self.block) if self.left else blockwise_product(W, dW, self.block)
        return W + product + dW

    def forward(self, x: Any, base: LinearMap, delta: Structure, scale: Tensor, dropout: float) -> Tensor:
        if base.is_matrix and isinstance(delta, BlockTiled) and delta.block == self.block:
            W = base.plain()
            if delta.side == "row" and not self.left and delta.out_features % self.block == 0:
                return self._row(x, base, W, delta.B, scale, dropout)
            if delta.side == "col" and self.left and delta.in_features % self.block == 0:
                return self._left(x, base, delta, scale, dropout)
            if delta.side == "col" and not self.left and W is not None:
                return self._column(x, base, W, delta.B, scale, dropout)
        return super().forward(x, base, delta, scale, dropout)

    def _row(self, x: Tensor, base: LinearMap, W: Tensor | None, B: Tensor, scale: Tensor, dropout: float) -> Tensor:
        if W is not None:
            return block_row_linear(x, W, base.bias, B, scale, dropout)

        def change(z: Tensor) -> Tensor:
            return torch.cat(block_row_change(z, scale.to(B.dtype) * B), -1)

        change_of_x = replayed_dropout(change, x, dropout) if dropout else change(x)
        u, total = change_of_x.split([x.shape[-1], self.block], -1)
        y = base(x + u)
        return y + tiled(total, y.shape[-1]).to(y.dtype)

    def _left(self, x: Tensor, base: LinearMap, delta: BlockTiled, scale: Tensor, dropout: float) -> Tensor:
        y, bias = base(x), base.bias

        def change(z: Tensor, Wz: Tensor) -> Tensor:
            m = blocks(Wz, self.block) + block_sum(z, self.block).to(Wz.dtype)[..., None, :]
            B = (scale.to(delta.B.dtype) * delta.B).to(m.dtype)
            return torch.einsum("...aj,aij->...ai", m, B).flatten(-2)[..., : y.shape[-1]]

        def product(v: Tensor) -> Tensor:  # W v
            return v if bias is None else v - bias.to(v.dtype)

        if dropout:
            return y + replayed_dropout(lambda z: change(z, product(base(z))), x, dropout)
        return y + change(x, product(y))

    def _column(self, x: Tensor, base: LinearMap, W: Tensor, B: Tensor, scale: Tensor, dropout: float) -> Tensor:
        def patched(x: Tensor, below: Tensor, bias: Tensor | None) -> Tensor:
            return patched_linear(
                x, below, bias, scale, [B], lambda new: block_column_change(W, new[0]), lambda new, x, g: None
            )

        if not dropout:
            return patched(x, W, base.bias)
        nothing = torch.zeros((), dtype=W.dtype, device=W.device).expand(W.shape)
        return base(x) + replayed_dropout(lambda z: patched(z, nothing, None), x, dropout)
