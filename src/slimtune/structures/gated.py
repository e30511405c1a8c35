"""Low-rank matrices head by head, with a gate on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StructureError
from ..ops.fused import traced
from ..ops.heads import heads_linear
from .base import Factored, check_count

__all__ = ["GatedHeads"]

SIDES = ("auto", "output", "input")
QUERY = ("q_proj", "query", "q_lin", "query_proj", "q")
KEY_VALUE = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "key_proj", "value_proj", "k", "v")
MERGE = ("o_proj", "out_proj", "out_lin", "o", "attention.output.dense", "attn.c_proj", "attention.dense")
"""Last parts of the names that attention's projections have in transformers."""


class GatedHeads(Factored):
    """dW made of one block per head h, dW_h = B_h diag(g_h) A_h, whose ranks j = 0, 1, ... open and close in order.

    The gate of rank j is g_hj = sigmoid((R0 alpha_h - j - 1/2) / tau) or, when `hard`, 1 where R0 alpha_h - j > 1/2
    and else 0, so that sum_j g_hj is round(R0 alpha_h) with halves rounded down. With N = O / H outputs per head the
    blocks are the rows of dW (side "output": B_h (N, R_h), A_h (R_h, I)); with N = I / H inputs its columns (side
    "input": B_h (O, R_h), A_h (R_h, N)). One head is a low-rank dW with one gate parameter.

    The ranks of all heads lie side by side, A (R, I or N) and B (N or O, R), and the buffers `heads` (R,) and `index`
    (R,) say whose they are and which j: heads may hold different numbers. alpha (H,) starts at 1, B at zero and A at
    U(-1/sqrt(F), 1/sqrt(F)) with F its columns. `tau` and `hard` are 0-d buffers, 1/2 and false at the start.

    Args:
        rank: R0 >= 1, the ranks that alpha_h = 1 opens.
        heads: H, or "auto": what the model's configuration says where the layer is one of attention's projections by
            its name and size, 1 elsewhere.
        side: "output" or "input"; "auto" takes what the name says, else the outputs where H divides them, else the
            inputs.
        rows: R_h of every head, or of each one as a list; `rank` when None.

    Raises:
        StructureError: sizes that H does not divide, with those it could be; a rank below 1, no rows at all.

    Example:
        >>> structure = GatedHeads(6, 4, rank=2, heads=3)
        >>> structure.reset_parameters()
        >>> structure.A.shape, structure.B.shape, structure.hard_ranks().tolist()
        (torch.Size([6, 4]), torch.Size([2, 6]), [2, 2, 2])
    """

    fast_parameters = ("B",)
    plain_parameters = ("alpha",)
    rank_dims: ClassVar[dict[str, int]] = {"A": 0, "B": 1, "heads": 0, "index": 0}
    heads: Tensor
    index: Tensor
    tau: Tensor
    hard: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int = 8,
        heads: int | str = "auto",
        side: str = "auto",
        rows: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)
        check_count(rank, "GatedHeads: rank")
        count: Any = 1 if heads == "auto" else heads
        check_count(count, "GatedHeads: heads")
        self.base_rank, self.head_count, self.side = rank, int(count), _side(out_features, in_features, count, side)
        self._rows = _rows(rank if rows is None else rows, count)
        total, narrow = sum(self._rows), (out_features if self.side == "output" else in_features) // count
        wide = in_features if self.side == "output" else narrow
        tall = narrow if self.side == "output" else out_features
        self.A = nn.Parameter(torch.empty(total, wide, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(tall, total, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        for name in ("heads", "index"):
            self.register_buffer(name, torch.empty(total, dtype=torch.long, device=device))
        if not self.heads.is_meta:
            self._place()
        self._known: Any = None
        self.register_buffer("tau", torch.tensor(0.5, device=device, dtype=dtype))
        self.register_buffer("hard", torch.tensor(False, device=device))

    @classmethod
    def fit(cls, options: Mapping[str, Any], layer: str, module: nn.Module, model: nn.Module) -> Mapping[str, Any]:
        """`heads` and `side` where they are "auto", from the layer's name and the model's configuration."""
        options = dict(options)
        count, side, size = _attention(layer, model)
        if options.get("side", "auto") == "auto" and side is not None:
            options["side"] = side
        if options.get("heads", "auto") == "auto":
            weight = getattr(module, "weight", None)
            transposed = type(module).__name__.endswith("Conv1D")
            if side is None or weight is None or weight.dim() != 2:
                options["heads"] = 1
            else:
                long = weight.shape[(side == "input") != transposed]
                exact = long % count == 0 and (size is None or long == count * size)
                options["heads"] = count if exact else 1
        return options

    def _place(self) -> None:
        """`heads` and `index` as at the start, head by head and j in order, unless ranks have come or gone since."""
        if len(self.heads) == sum(self._rows):
            self.heads.copy_(torch.tensor([h for h, n in enumerate(self._rows) for _ in range(n)], device="cpu"))
            self.index.copy_(torch.tensor([j for n in self._rows for j in range(n)], device="cpu"))

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def work(self) -> float:
        return self.rank * (self.A.shape[1] + self.B.shape[0])

    def _own(self) -> Tensor:
        """Whose rank it is, (H, R)."""
        return self.heads == torch.arange(self.head_count, device=self.heads.device)[:, None]

    def _logits(self) -> Tensor:
        """R0 alpha_h - j - 1/2, (R,)."""
        alpha: Tensor = self.alpha
        if self.head_count > 1:  # as a sum, whose gradient is the same in every run; that of an index is not on a GPU
            alpha = torch.where(self._own(), alpha[:, None], 0.0).sum(0)
        return self.base_rank * alpha - self.index - 0.5

    def gates(self) -> Tensor:
        """g, (R,)."""
        z = self._logits()
        return torch.where(self.hard, (z > 0).to(z.dtype), torch.sigmoid(z / self.tau))

    @torch.no_grad()
    def hard_ranks(self) -> Tensor:
        """round(R0 alpha_h), halves down, (H,): what the gates come to when hard, whatever rows there are."""
        alpha: Any = self.alpha
        rho = self.base_rank * (alpha.full_tensor() if hasattr(alpha, "full_tensor") else alpha)
        j = torch.arange(int(rho.max().clamp_min(0)) + 2, device=rho.device)
        return (rho[:, None] - j - 0.5 > 0).sum(1)

    @property
    def rank_cost(self) -> int:
        """The numbers one rank of one head takes."""
        return self.A.shape[1] + self.B.shape[0]

    def dense(self) -> Tensor:
        g, blocks = self.gates(), []
        for head in range(self.head_count):
            own = self.heads == head
            blocks.append(self.B[:, own] @ (g[own, None] * self.A[own]))
        return torch.cat(blocks, 0 if self.side == "output" else 1)

    def matrix(self) -> Tensor:
        B, A = self.factors()
        return B @ A

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B, A) of rank R: the gates in A, and zeros where a rank does not reach."""
        B: Tensor = self.B
        A = self.gates()[:, None] * self.A
        if self.head_count > 1:
            own = self._own()
            if self.side == "output":
                B = (own[:, None] * B).flatten(0, 1)
            else:
                A = (own.t()[..., None] * A[:, None]).flatten(1)
        return B, A

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor, dropout: float = 0.0) -> Tensor:
        if self.head_count == 1 or traced(x) or scale.requires_grad or not torch.is_grad_enabled():
            return super().linear(x, W, bias, scale, dropout)
        size, pad = self._even()
        if size * self.head_count * (self.A.shape[1] + self.B.shape[0]) > self.rank * (x.shape[-1] + W.shape[0]):
            return super().linear(x, W, bias, scale, dropout)  # so uneven that the zeros between heads cost less
        B: Tensor = self.B
        A = self.gates()[:, None] * self.A
        if pad is not None:  # B's column of zeros makes it no matter which row of A meets it
            B = F.pad(B, (0, 1)).index_select(1, pad)
            A = A.index_select(0, pad.clamp_max(self.rank - 1))
        return heads_linear(x, W, bias, B, A, scale, self.head_count, dropout)

    def _even(self) -> tuple[int, Tensor | None]:
        """(S, which ranks to line up so that every head has S of them in turn, R for none); None if they do already."""
        version = -1 if self.heads.is_inference() else self.heads._version
        if self._known is None or self._known[0] is not self.heads or self._known[1] != version:
            own: list[list[int]] = [[] for _ in range(self.head_count)]
            heads = self.heads.tolist()
            for i, head in enumerate(heads):
                own[head].append(i)
            size = max(map(len, own))
            line = [i for ranks in own for i in ranks + [len(heads)] * (size - len(ranks))]
            pad = None if line == list(range(len(heads))) else torch.tensor(line, device=self.heads.device)
            self._known = (self.heads, version, size, pad)
        return self._known[2], self._known[3]

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        """`factors` without the ranks whose gate is closed."""
        B, A = self.factors()
        open = self.gates() > 0
        if not open.any():
            open[0] = True
        return B[:, open], A[open]

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = 1 / math.sqrt(self.A.shape[1])
            self.A.uniform_(-bound, bound)
            self.B.zero_()
            self.alpha.fill_(1.0)
            self.tau.fill_(0.5)
            self.hard.fill_(False)
            self._place()

    def new_ranks(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The next ranks of the heads that hold fewest; they open when alpha_h has grown that far."""
        held = [self.index[self.heads == h].tolist() for h in range(self.head_count)]
        places = []
        for _ in range(count):
            head = min(range(self.head_count), key=lambda h: len(held[h]))
            held[head].append(max(held[head], default=-1) + 1)
            places.append((head, held[head][-1]))
        return self.ranks_at(places, generator)

    def ranks_at(self, places: Sequence[tuple[int, int]], generator: torch.Generator) -> dict[str, Tensor]:
        """`new_ranks` for these (h, j)."""
        bound = 1 / math.sqrt(self.A.shape[1])
        A = torch.empty(len(places), self.A.shape[1]).uniform_(-bound, bound, generator=generator)
        heads, index = (torch.tensor([place[k] for place in places], dtype=torch.long) for k in (0, 1))
        return {"A": A, "B": torch.zeros(self.B.shape[0], len(places)), "heads": heads, "index": index}

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"rank": self.base_rank, "heads": self.head_count, "side": self.side}
        rows = self._rows if self.heads.is_meta else self.rows()
        return options if rows == [self.base_rank] * self.head_count else options | {"rows": rows}

    def rows(self) -> list[int]:
        """R_h of every head."""
        return torch.bincount(self.heads, minlength=self.head_count).tolist()

    def extra_repr(self) -> str:
        heads = f", {self.head_count} heads of the {self.side}" if self.head_count > 1 else ""
        return f"{super().extra_repr()}, rank {self.rank}{heads}"


def _side(out_features: int, in_features: int, heads: int, side: str) -> str:
    if side not in SIDES:
        raise StructureError(f"GatedHeads: side must be one of {', '.join(SIDES)}, got {side!r}")
    sizes = {"output": out_features, "input": in_features}
    if side != "auto":
        sizes = {side: sizes[side]}
    for name, size in sizes.items():
        if size % heads == 0:
            return name
    could = " or ".join(
        f"{', '.join(str(d) for d in range(1, size + 1) if size % d == 0)} for {size} {name}s"
        for name, size in sizes.items()
    )
    raise StructureError(f"GatedHeads: {heads} heads do not divide this layer; heads could be {could}")


def _rows(rows: int | Sequence[int], heads: int) -> list[int]:
    if isinstance(rows, int):
        rows = [rows] * heads
    if not isinstance(rows, Sequence) or isinstance(rows, str) or len(rows) != heads:
        raise StructureError(f"GatedHeads: rows must be a number, or one for each of {heads} heads, got {rows!r}")
    for row in rows:
        check_count(row, "GatedHeads: rows", 0)
    if not sum(rows):
        raise StructureError("GatedHeads: rows must not all be 0")
    return list(rows)


def _attention(layer: str, model: nn.Module) -> tuple[int, str | None, int | None]:
    """(H, side, size of a head) of attention's projection of this name; side None for any other layer."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    count = getattr(config, "num_attention_heads", None)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return 1, None, None
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    size = size if isinstance(size, int) else None
    for names, side in ((QUERY, "output"), (KEY_VALUE, "output"), (MERGE, "input")):
        if any(f".{layer}".endswith(f".{name}") for name in names):
            if names is KEY_VALUE:
                groups = getattr(config, "num_key_value_heads", None)
                count = groups if isinstance(groups, int) and groups > 0 else count
            return count, side, size
    return 1, None, None
