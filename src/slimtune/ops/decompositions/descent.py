"""Two-factor approximations by gradients, over all entries or a few at a time.

Shapes: A (*, M, N), K inner size, W (*, M, K), Z (*, K, N).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import DivergenceError, StructureError
from .common import check_least, check_whole, checked, drawn, narrowed, settled, square, weights_of
from .leastsquares import Factorization

__all__ = ["BiasedFactorization", "factor_gradients", "gradient_descent", "stochastic_descent"]


class BiasedFactorization(NamedTuple):
    """A ~ mean + row 1^T + 1 column^T + left right."""

    left: Tensor  # (M, K)
    right: Tensor  # (K, N)
    mean: Tensor  # 0-d
    row: Tensor  # (M,)
    column: Tensor  # (N,)
    trace: Tensor  # (S,)
    converged: bool

    def dense(self) -> Tensor:
        """(M, N)."""
        return self.mean + self.row[:, None] + self.column + self.left @ self.right


def factor_gradients(
    A: Tensor, W: Tensor, Z: Tensor, ridge: tuple[float, float] = (0.0, 0.0), weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(2 (O * (W Z - A)) Z^T + 2 l_w W, 2 W^T (O * (W Z - A)) + 2 l_z Z), the gradients of the objective of `als`.

    Example:
        >>> A, W, Z = torch.ones(1, 1), torch.tensor([[2.0]]), torch.tensor([[3.0]])
        >>> [g.item() for g in factor_gradients(A, W, Z)]
        [30.0, 20.0]
    """
    E = W @ Z - A
    if weights is not None:
        E = weights * E
    return 2 * E @ Z.mT + 2 * ridge[0] * W, 2 * W.mT @ E + 2 * ridge[1] * Z


@torch.no_grad()
def gradient_descent(
    A: Tensor,  # (*, M, N)
    rank: int,
    ridge: tuple[float, float] = (0.0, 0.0),
    weights: Tensor | None = None,  # (*, M, N)
    start: tuple[Tensor, Tensor] | None = None,
    steps: int = 2000,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> Factorization:
    """The objective of `als` by gradient descent on W and Z together.

    Each matrix of the batch has its own step size: a step that would raise its objective is not taken and halves it,
    one that is taken lengthens it by a tenth; the first is 1 / (4 |A|_F). So the objective never rises. `als` needs
    far fewer steps; this is for comparison, and a start for what has no closed form.

    Args:
        ridge, weights: as in `als`.
        start: (W, Z); when None drawn from N(0, 1), scaled so that |W Z| is about |A|.
        steps: at most.
        tolerance: stop when a hundred steps lower the objective by no more than this share of sum_mn o_mn a_mn^2.
        seed: of the start.

    Returns:
        W, Z; the objective after each step.

    Raises:
        StructureError: as `als`.

    Example:
        >>> A = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0, 2.0]))
        >>> torch.allclose(gradient_descent(A, 1).dense(), A, atol=1e-2)
        True
    """
    what = "gradient_descent"
    o = weights_of(weights, A, what)
    X = checked(A if o is None else torch.where(o > 0, A, torch.zeros_like(A)), what)
    M, N = X.shape[-2:]
    check_whole(rank, f"{what}: rank", 1, max(M, N))
    check_whole(steps, f"{what}: steps")
    for value in ridge:
        check_least(value, f"{what}: a ridge")
    shapes = ((*X.shape[:-1], rank), (*X.shape[:-2], rank, N))
    if start is None:
        g = torch.Generator().manual_seed(seed)
        size = (square(X)[..., None, None] / (M * N * rank)) ** 0.25
        W, Z = (size * drawn(shape, X, g) for shape in shapes)
    else:
        W, Z = (checked(t, f"{what}: the start").to(X.device) for t in start)
        if (tuple(W.shape), tuple(Z.shape)) != shapes:
            raise StructureError(f"{what}: the start must have the shapes {shapes[0]} and {shapes[1]}")

    def objective(W: Tensor, Z: Tensor) -> Tensor:
        E = (W @ Z - X).square()
        return (E if o is None else o * E).sum((-2, -1)) + ridge[0] * square(W) + ridge[1] * square(Z)

    scale = (X.square() if o is None else o * X.square()).sum((-2, -1)).clamp_min(1e-300)
    rate = (1 / (4 * scale.sqrt()))[..., None, None]
    loss, trace, done = objective(W, Z), [], False
    for step in range(steps):
        g_w, g_z = factor_gradients(X, W, Z, ridge, o)
        V, Y = W - rate * g_w, Z - rate * g_z
        new = objective(V, Y)
        better = (new <= loss)[..., None, None]
        W, Z = torch.where(better, V, W), torch.where(better, Y, Z)
        loss, rate = torch.minimum(new, loss), torch.where(better, 1.1 * rate, 0.5 * rate)
        trace.append(loss)
        done = step % 100 == 99 and settled(trace, 99, scale, tolerance)
        if done:
            break
    return Factorization(narrowed(W, A), narrowed(Z, A), torch.stack(trace), done)


@torch.no_grad()
def stochastic_descent(
    A: Tensor,  # (M, N)
    rank: int,
    ridge: tuple[float, float] = (0.0, 0.0),
    mask: Tensor | None = None,  # (M, N)
    bias: bool = False,
    rate: float = 0.02,
    epochs: int = 50,
    batch: int = 1,
    seed: int = 0,
) -> BiasedFactorization:
    """Stochastic gradient descent over the observed entries of one matrix, with or without biases: of entry (m, n),
    with e = mu + b_m + c_n + w_m . z_n - a_mn,

        w_m -= eta (e z_n + l_w w_m),  z_n -= eta (e w_m + l_z z_n),
        b_m -= eta (e + l_w b_m),      c_n -= eta (e + l_z c_n),

    all with the values before the step. It is a gradient step of e^2 / 2 and half the ridges; a row that is observed
    more often is also shrunk more often. mu is the mean of the observed entries, or 0 without biases. Not monotone.

    Args:
        ridge: (l_w, l_z).
        mask: which entries are observed; None for all.
        bias: learn b and c. In the two-factor form these are W = [W, 1, b] and Z = [Z; c; 1] with the ones held fixed.
        rate: eta.
        epochs: passes over the observed entries, each in a new order.
        batch: entries a step, their updates added up; 1 is the published form, more is faster.
        seed: of the start N(0, 0.1^2) and the orders.

    Returns:
        The factors and biases; the mean squared error of the observed entries after each epoch. `converged`: whether
        the last epoch changed it by at most a thousandth.

    Raises:
        StructureError: a batch of matrices, a mask of another shape or of nothing, counts below 1, negative ridges.
        DivergenceError: the factors are no longer finite.

    Example:
        >>> A = torch.arange(3.0)[:, None] + 10 * torch.arange(4.0)
        >>> found = stochastic_descent(A, 1, bias=True, rate=0.05, epochs=200)
        >>> float((found.dense() - A).abs().max()) < 0.1
        True
    """
    what = "stochastic_descent"
    o = weights_of(None if mask is None else mask != 0, A, what)
    X = checked(A if o is None else torch.where(o > 0, A, torch.zeros_like(A)), what, 2)
    M, N = X.shape
    for value, name in ((epochs, "epochs"), (batch, "batch")):
        check_whole(value, f"{what}: {name}")
    check_whole(rank, f"{what}: rank", 1, max(M, N))
    for number, name in ((ridge[0], "a ridge"), (ridge[1], "a ridge"), (rate, "rate")):
        check_least(number, f"{what}: {name}")
    seen = torch.arange(M * N, device=X.device) if o is None else o.flatten().nonzero()[:, 0]
    if not len(seen):
        raise StructureError(f"{what}: the mask leaves no entries")
    g = torch.Generator().manual_seed(seed)
    W, Z = 0.1 * drawn((M, rank), X, g), 0.1 * drawn((N, rank), X, g)
    b, c = X.new_zeros(M), X.new_zeros(N)
    values = X.flatten()
    mean = values[seen].mean() if bias else X.new_zeros(())
    trace: list[Tensor] = []
    for _ in range(epochs):
        order = seen[torch.randperm(len(seen), generator=g).to(seen.device)]
        for entries in order.split(batch):
            m, n = torch.div(entries, N, rounding_mode="floor"), entries % N
            w, z = W[m], Z[n]
            e = mean + b[m] + c[n] + (w * z).sum(1) - values[entries]
            W.index_add_(0, m, e[:, None] * z + ridge[0] * w, alpha=-rate)
            Z.index_add_(0, n, e[:, None] * w + ridge[1] * z, alpha=-rate)
            if bias:
                step_b, step_c = e + ridge[0] * b[m], e + ridge[1] * c[n]
                b.index_add_(0, m, step_b, alpha=-rate)
                c.index_add_(0, n, step_c, alpha=-rate)
        error = (mean + b[:, None] + c + W @ Z.t()).flatten()[seen] - values[seen]
        trace.append(error.square().mean())
        if not bool(torch.isfinite(trace[-1])):
            raise DivergenceError(f"{what}: the factors are not finite after {len(trace)} epochs; lower rate={rate}")
    done = len(trace) > 1 and bool((trace[-1] - trace[-2]).abs() <= 1e-3 * trace[-2])
    W, Zt, mean, b, c = (narrowed(t, A) for t in (W, Z.t().contiguous(), mean, b, c))
    return BiasedFactorization(W, Zt, mean, b, c, torch.stack(trace), done)
