"""LoRA-Pro: what theorems 2.1 to 2.3 of arXiv 2407.18242 promise, in fp64, and a test per published fault."""

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.ops.lorapro import X_CHOICES, adjusted_gradients, carried, retracted, tangent
from test_distributed import Two

O, I, R, S = 12, 10, 3, 1.7
STARTS = {"moved": (1.0, 1.0), "B=0": (1.0, 0.0), "A=0": (0.0, 1.0)}
every_x = pytest.mark.parametrize("X", X_CHOICES)


def problem(a=1.0, b=1.0, rank=R, seed=0):
    """A, B, the gradient of W, and those of A and B."""
    torch.manual_seed(seed)
    A, B, g = (torch.randn(s, dtype=torch.float64) for s in ((rank, I), (O, rank), (O, I)))
    A, B = a * A, b * B
    return A, B, g, S * B.T @ g, S * g @ A.T


def projected(A, B, g):
    """P_B g + (1 - P_B) g P_A."""
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return P_B @ g + (g - P_B @ g) @ P_A


# ---------------------------------------------------------------- theorem 2.1


@every_x
@pytest.mark.parametrize("start", STARTS)
def test_no_step_of_the_factors_is_nearer_to_the_gradient_of_the_product(start, X):
    """Least squares over all (hA, hB), the residual |(1 - P_B) g (1 - P_A)|, and X without influence on it."""
    A, B, g, gA, gB = problem(*STARTS[start])
    step = tangent(A, B, *adjusted_gradients(A, B, gA, gB, S, X), S)
    columns = [
        S * torch.kron(B, torch.eye(I, dtype=g.dtype)),
        S * torch.kron(torch.eye(O, dtype=g.dtype), A.T.contiguous()),
    ]
    M = torch.cat(columns, 1)  # rows of hA, then rows of hB
    best = (M @ torch.linalg.lstsq(M, g.reshape(-1, 1), driver="gelsd").solution).reshape(g.shape)
    torch.testing.assert_close(step, best, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(step, projected(A, B, g), rtol=1e-9, atol=1e-11)
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    rest = (g - P_B @ g) @ (torch.eye(I, dtype=g.dtype) - P_A)
    torch.testing.assert_close((step - g).norm(), rest.norm())


def test_the_distance_of_the_sheet_three_ways():
    """One number: what the closed form leaves, what least squares leaves, what the projectors leave."""
    A, B, g, gA, gB = problem(seed=3)
    left = (tangent(A, B, *adjusted_gradients(A, B, gA, gB, S), S) - g).norm()
    hA, hB = torch.zeros_like(A, requires_grad=True), torch.zeros_like(B, requires_grad=True)
    search = torch.optim.LBFGS([hA, hB], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def distance():
        search.zero_grad()
        loss = (tangent(A, B, hA, hB, S) - g).square().sum()
        loss.backward()
        return loss

    search.step(distance)
    torch.testing.assert_close(left, distance().detach().sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(left, (projected(A, B, g) - g).norm(), rtol=1e-12, atol=0)


@every_x
def test_a_rank_that_is_still_zero_needs_no_case_of_its_own(X):
    """As after growing: one column of B is zero, its row of A is not, and the step is still the nearest."""
    A, B, g, _, _ = problem()
    B[:, 1] = 0
    hA, hB = adjusted_gradients(A, B, S * B.T @ g, S * g @ A.T, S, X)
    torch.testing.assert_close(tangent(A, B, hA, hB, S), projected(A, B, g), rtol=1e-9, atol=1e-11)


def test_the_first_step_from_either_start():
    """B = 0: hA = 0 and hB = gB (A A^T)^-1 / s^2; A = 0 the other way round. Whatever X."""
    for X in X_CHOICES:
        A, B, _, gA, gB = problem(b=0.0)
        hA, hB = adjusted_gradients(A, B, gA, gB, S, X)
        assert not hA.any()
        torch.testing.assert_close(hB, gB @ torch.linalg.inv(A @ A.T) / S**2)
        A, B, _, gA, gB = problem(a=0.0)
        hA, hB = adjusted_gradients(A, B, gA, gB, S, X)
        assert not hB.any()
        torch.testing.assert_close(hA, torch.linalg.inv(B.T @ B) @ gA / S**2)


def test_one_call_for_many_layers_decides_for_each_by_its_values():
    """A layer at its start beside one that has moved; in one call as each for itself."""
    parts = [problem(b=0.0), problem(seed=1), problem(a=0.0, seed=2)]
    A, B, _, gA, gB = (torch.stack([p[k] for p in parts]) for k in range(5))
    scale = torch.tensor([S] * 3, dtype=A.dtype)[:, None, None]
    hA, hB = adjusted_gradients(A, B, gA, gB, scale)
    for i, (a, b, _, ga, gb) in enumerate(parts):
        alone = adjusted_gradients(a, b, ga, gb, S)
        torch.testing.assert_close((hA[i], hB[i]), alone)


def test_as_many_ranks_as_inputs_is_full_fine_tuning():
    A, B, g, gA, gB = problem(rank=I)
    torch.testing.assert_close(tangent(A, B, *adjusted_gradients(A, B, gA, gB, S), S), g, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------- theorem 2.2: descent


@every_x
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_loss_goes_down(X, damping):
    """<g, step> = |step|^2 undamped, and the paper's sum; positive with damping and with limits too."""
    A, B, g, gA, gB = problem()
    hA, hB = adjusted_gradients(A, B, gA, gB, S, X, damping)
    step = tangent(A, B, hA, hB, S)
    descent = (gA * hA).sum() + (gB * hB).sum()
    torch.testing.assert_close(descent, (g * step).sum())
    assert descent > 0
    if damping == 0:
        iB, iA = torch.linalg.inv(B.T @ B), torch.linalg.inv(A @ A.T)
        paper = (gA * (iB @ gA)).sum() + (gB * (gB @ iA - B @ iB @ B.T @ gB @ iA)).sum()
        torch.testing.assert_close(descent, paper / S**2)
        torch.testing.assert_close(descent, step.square().sum())
    limits = torch.tensor(0.01, dtype=g.dtype), torch.tensor(0.02, dtype=g.dtype)
    kA, kB = adjusted_gradients(A, B, gA, gB, S, X, damping, limits=limits)
    assert 0 < (gA * kA).sum() + (gB * kB).sum() < descent
    short = adjusted_gradients(A, B, gA, gB, S, "zero", damping, limits=limits)
    assert [round(float(k.norm()), 9) for k in short] == [0.01, 0.02]


def test_limits_that_are_wide_change_nothing():
    A, B, _, gA, gB = problem()
    wide = (torch.tensor(math.inf, dtype=A.dtype),) * 2
    assert all(map(torch.equal, adjusted_gradients(A, B, gA, gB, S, limits=wide), adjusted_gradients(A, B, gA, gB, S)))


# ---------------------------------------------------------------- theorem 2.3: X


def test_sylvesters_equation_holds():
    A, B, _, gA, gB = problem()
    hA, _ = adjusted_gradients(A, B, gA, gB, S)
    U = torch.linalg.inv(B.T @ B) @ gA / S**2
    X = (hA - U) @ A.T @ torch.linalg.inv(A @ A.T)
    torch.testing.assert_close(B.T @ B @ X + X @ (A @ A.T), -U @ A.T, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("X", "cost"),
    [
        ("sylvester", lambda A, B, hA, hB, gA, gB: (hA - gA).square().sum() + (hB - gB).square().sum()),
        ("symmetric", lambda A, B, hA, hB, gA, gB: (B @ hA - hB @ A).square().sum()),
    ],
)
def test_x_is_stationary_for_what_it_minimises(X, cost):
    A, B, _, gA, gB = problem()
    hA, hB = adjusted_gradients(A, B, gA, gB, S, X)
    shift = torch.zeros(R, R, dtype=A.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(cost(A, B, hA + shift @ A, hB - B @ shift, gA, gB), shift)
    scale = cost(A, B, *adjusted_gradients(A, B, gA, gB, S, "zero"), gA, gB)
    assert slope.abs().max() < 1e-11 * scale


def test_symmetric_x_uses_the_inverse():
    """Published copies multiply by A A^T there. With the inverse the two halves of the step meet in the middle."""
    A, B, _, gA, gB = problem()
    hA, hB = adjusted_gradients(A, B, gA, gB, S, "symmetric")
    iB, iA = torch.linalg.inv(B.T @ B), torch.linalg.inv(A @ A.T)
    torch.testing.assert_close(hA, iB @ gA @ (torch.eye(I, dtype=A.dtype) - A.T @ iA @ A / 2) / S**2)
    torch.testing.assert_close(hB, (torch.eye(O, dtype=A.dtype) - B @ iB @ B.T / 2) @ gB @ iA / S**2)
    wrong = -iB @ gA @ A.T @ (A @ A.T) / (2 * S**2)
    U, V = adjusted_gradients(A, B, gA, gB, S, "zero")
    assert (B @ hA - hB @ A).norm() < 0.1 * (B @ (U + wrong @ A) - (V - B @ wrong) @ A).norm()


def test_the_step_does_not_depend_on_the_basis():
    A, B, g, gA, gB = problem()
    step = tangent(A, B, *adjusted_gradients(A, B, gA, gB, S), S)
    G = torch.randn(R, R, dtype=A.dtype)
    A2, B2 = torch.linalg.solve(G, A), B @ G
    plain = S * S * (B @ B.T @ g + g @ A.T @ A)
    plain2 = S * S * (B2 @ B2.T @ g + g @ A2.T @ A2)
    step2 = tangent(A2, B2, *adjusted_gradients(A2, B2, S * B2.T @ g, S * g @ A2.T, S), S)
    torch.testing.assert_close(step2, step, rtol=1e-8, atol=1e-10)
    assert (plain - plain2).norm() > 0.1 * plain.norm()


# ---------------------------------------------------------------- damping, precision, size


def test_damping_is_added_to_both_gram_matrices():
    A, B, _, gA, gB = problem()
    for damping, absolute in ((0.2, False), (0.3, True)):
        added = [damping if absolute else damping * M.trace() / R for M in (B.T @ B, A @ A.T)]
        iB, iA = (
            torch.linalg.inv(M + d * torch.eye(R, dtype=A.dtype))
            for M, d in zip((B.T @ B, A @ A.T), added, strict=True)
        )
        hA, hB = adjusted_gradients(A, B, gA, gB, S, "zero", damping, absolute)
        torch.testing.assert_close(hA, iB @ gA / S**2)
        torch.testing.assert_close(hB, (gB - B @ iB @ B.T @ gB) @ iA / S**2)


def test_half_precision_is_computed_in_fp32():
    A, B, _, gA, gB = (t.to(torch.bfloat16) for t in problem())
    with torch.autocast("cpu", torch.bfloat16):
        half = adjusted_gradients(A, B, gA, gB, S)
    whole = adjusted_gradients(*(t.float() for t in (A, B, gA, gB)), S)
    assert all(torch.equal(h, w.to(torch.bfloat16)) for h, w in zip(half, whole, strict=True))


@pytest.mark.parametrize("X", X_CHOICES)
def test_nothing_of_the_weights_size_is_formed(X):
    """The authors' code builds an (O, O) identity."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if torch.is_tensor(t):
                    self.numbers = max(self.numbers, t.numel())
            return out

    A, B, dA, dB = torch.randn(4, 300), torch.randn(200, 4), torch.randn(4, 300), torch.randn(200, 4)
    with Largest() as largest:
        adjusted_gradients(A, B, dA, dB, S, X)
        carried(A, B, dA, dB, A + dA, B + dB, S)
        retracted(A, B, dA, dB)
    assert largest.numbers <= 2 * 4 * 300


def test_a_change_that_is_carried_is_seen_as_a_gradient():
    A, B, _, gA, gB = problem()
    A1, B1 = A + 0.1 * gA, B - 0.2 * gB
    M = tangent(A, B, gA, gB, S)
    torch.testing.assert_close(carried(A, B, gA, gB, A1, B1, S), (S * B1.T @ M, S * M @ A1.T))


@pytest.mark.parametrize("rank", [1, R, I, O + 2])
def test_retraction_is_the_nearest_matrix_of_that_rank(rank):
    A, B, _, gA, gB = problem(rank=rank)
    dA, dB = 0.3 * gA, -0.2 * gB
    A1, B1 = retracted(A, B, dA, dB)
    U, s, Vh = torch.linalg.svd(B @ A + B @ dA + dB @ A, full_matrices=False)
    torch.testing.assert_close(B1 @ A1, U[:, :rank] * s[:rank] @ Vh[:rank], rtol=1e-9, atol=1e-9)
    assert A1.shape == A.shape and B1.shape == B.shape


def test_a_rank_of_which_nothing_is_left_can_learn_again():
    A, B, _, _, _ = problem(b=0.0)
    dB = torch.zeros_like(B)
    dB[:, :1] = torch.randn(O, 1, dtype=B.dtype)
    A1, B1 = retracted(A, B, torch.zeros_like(A), dB)
    assert torch.linalg.matrix_rank(B1) == 1 and torch.linalg.matrix_rank(A1) == R
    torch.testing.assert_close(A1.norm(), A.norm())


# ---------------------------------------------------------------- attached to an optimizer


def layer(recipe=None, b=0.5, dtype=torch.float64, sizes=(O, I), layers=1):
    """A model of linear layers, and a batch with a target."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(sizes[1], sizes[0], bias=False, dtype=dtype) for _ in range(layers)))
    st.adapt(model, recipe or st.lora(rank=R))
    for m in model:
        m.adapters["default"].awaited.clear()
        with torch.no_grad():
            m.adapters["default"].structure.B.normal_(std=b) if b else None
    x = torch.randn(40, sizes[1], dtype=dtype)
    return model, x, torch.randn(40, sizes[0], dtype=dtype)


def adapter_of(model, k=0):
    return model[k].adapters["default"]


def weight(model, k=0):
    return model[k].weight.detach() + adapter_of(model, k).dense().detach()


def loss_of(model, x, y):
    return sum((m(x) - y).square().mean() for m in model)


def gradient_of_weight(model, x, y):
    W = weight(model).requires_grad_()
    return torch.autograd.grad((x @ W.T - y).square().mean(), W)[0]


def still(model):
    """An optimizer that moves nothing."""
    return torch.optim.SGD([p for _, p in st.trainable_parameters(model)], lr=0.0)


EXACT = {"damping": 0.0, "cap": None}
"""The paper's formula."""


def trained(form, steps, make=torch.optim.AdamW, lr=1e-3, model=None, **options):
    model, x, y = model or layer()
    optimizer = make(st.param_groups(model, lr=lr))
    st.attach(st.LoRAPro(form, **{**EXACT, **options}), model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    return model, optimizer


@every_x
@pytest.mark.parametrize("recipe", [st.lora, st.rslora], ids=["lora", "rslora"])
@pytest.mark.parametrize("alpha", [3, 16])
def test_sgd_moves_the_weight_along_the_projected_gradient(X, recipe, alpha):
    """Whatever the scale: published code has 16 / 8 hard-coded."""
    model, x, y = layer(recipe(rank=R, alpha=alpha))
    structure, before, g = adapter_of(model).structure, weight(model), gradient_of_weight(model, x, y)
    step = projected(structure.A.detach(), structure.B.detach(), g)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1e-7))
    st.attach(st.LoRAPro(X=X, **EXACT), model, optimizer)
    loss_of(model, x, y).backward()
    optimizer.step()
    torch.testing.assert_close((before - weight(model)) / 1e-7, step, rtol=1e-4, atol=1e-6)


def test_sgd_with_all_ranks_is_full_fine_tuning():
    model, x, y = layer(st.lora(rank=I))
    before, g = weight(model), gradient_of_weight(model, x, y)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1e-7))
    st.attach(st.LoRAPro(**EXACT), model, optimizer)
    loss_of(model, x, y).backward()
    optimizer.step()
    change = weight(model) - (before - 1e-7 * g)
    assert change.norm() < 1e-5 * (1e-7 * g).norm()


def test_full_with_all_ranks_is_adamw_on_the_weight():
    """Several steps; they agree to first order in the learning rate, so the difference falls with its square."""
    apart = []
    for lr in (1e-4, 1e-5):
        model, x, y = layer(st.lora(rank=I))
        W = nn.Parameter(weight(model))
        reference = torch.optim.AdamW([W], lr=lr, weight_decay=0.0)
        start = W.detach().clone()
        trained("full", 5, lr=lr, model=(model, x, y))
        for _ in range(5):
            reference.zero_grad()
            (x @ W.T - y).square().mean().backward()
            reference.step()
        apart.append(float((weight(model) - W.detach()).norm() / (W.detach() - start).norm()))
    assert apart[0] < 0.05 and apart[1] < 0.15 * apart[0]


@pytest.mark.parametrize("form", ["full", "lean"])
def test_the_first_update_of_adam_is_one(form):
    """DeepSpeed's version counts the step before it corrects the bias and starts at 0.744. From B = 0 all of u A^T
    arrives: with as many ranks as inputs W moves by lr in every entry, or by that in the mean square of a row."""
    model, x, y = layer(st.lora(rank=I), b=0.0)
    before = weight(model)
    trained(form, 1, lr=1e-6, model=(model, x, y))
    u = (before - weight(model)) / 1e-6
    if form == "full":
        torch.testing.assert_close(u.abs(), torch.ones_like(u), rtol=1e-3, atol=0)  # eps is 1e-8
        return
    model, x, y = layer(st.lora(rank=I), b=0.0)
    g = gradient_of_weight(model, x, y)
    square = g.square()
    v = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
    torch.testing.assert_close(u, g / v.sqrt(), rtol=1e-4, atol=1e-6)


def test_lean_is_full_where_the_squares_are_of_rank_one():
    """One row of x at a time makes g of rank one, g^2 too: the second moment then loses nothing in the first step,
    and the first moment nothing while the factors can express it (all ranks)."""
    results = []
    for form in ("full", "lean"):
        model, x, y = layer(st.lora(rank=I))
        trained(form, 1, lr=1e-6, model=(model, x[:1], y[:1]))
        results.append(weight(model))
    model, _, _ = layer(st.lora(rank=I))
    moved = (results[0] - weight(model)).norm()
    assert (results[0] - results[1]).norm() < 1e-4 * moved


def test_leans_first_moment_is_the_mean_of_projected_gradients():
    """With all ranks nothing is lost when it is carried: it shows b1-weighted sums of g to the present factors."""
    model, x, y = layer(st.lora(rank=I))
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-3), betas=(0.8, 0.99))
    st.attach(st.LoRAPro("lean", **EXACT), model, optimizer)
    M = torch.zeros(O, I, dtype=torch.float64)
    for _ in range(4):
        g = gradient_of_weight(model, x, y)
        M = 0.8 * M + 0.2 * g
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    structure, s = adapter_of(model).structure, adapter_of(model).scale
    kept = optimizer.state[structure.A]["lorapro_moment"], optimizer.state[structure.B]["lorapro_moment"]
    expected = (s * structure.B.T @ M).detach(), (s * M @ structure.A.T).detach()
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_state_is_as_large_as_promised(form):
    model, optimizer = trained(form, 2)
    state = [v for p in adapter_of(model).structure.parameters() for v in optimizer.state[p].values()]
    numbers = sum(t.numel() for t in state if torch.is_tensor(t) and t.dim())
    assert numbers == {"factors": 2 * R * (O + I), "full": 2 * O * I, "lean": R * (O + I) + O + I}[form]


@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_training_gets_somewhere(form):
    """A change of rank R in the weight is found, from B = 0, at the defaults."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, O, bias=False))
    target = model[0].weight.detach() + torch.randn(O, 2) @ torch.randn(2, I)
    st.adapt(model, st.lora(rank=R))
    x = torch.randn(64, I)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.03))
    st.attach(st.LoRAPro(form), model, optimizer)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x) - x @ target.T).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]
    assert max(losses) <= 1.01 * losses[0]


# ---------------------------------------------------------------- the first steps


def test_the_second_step_jumps_without_the_cap_only():
    """After one step B is of the size of the learning rate, and the formula moves A by as much as A is, however small
    that rate. The cap holds the step of either factor to a fifth of the larger one."""
    for cap, jumps in ((None, True), (0.2, False)):
        model, x, y = layer(b=0.0)
        optimizer = torch.optim.SGD(st.param_groups(model, lr=1e-5))
        st.attach(st.LoRAPro(X="zero", damping=0.0, cap=cap), model, optimizer)
        A = adapter_of(model).structure.A
        for half in (slice(0, 20), slice(20, 40)):
            before = A.detach().clone()
            optimizer.zero_grad()
            loss_of(model, x[half], y[half]).backward()
            optimizer.step()
        moved = float((A.detach() - before).norm() / before.norm())
        assert (moved > 0.5) if jumps else (moved == pytest.approx(0.2))


@pytest.mark.parametrize("lr", [0.1, 1.0, 10.0])
def test_small_noisy_batches_from_zero_do_not_diverge(lr):
    """Four rows a step for eight ranks, so B^T B is singular after the first step. Without the cap the loss grows by
    half at a rate of 1 and without bounds at 10."""

    def worst(cap):
        torch.manual_seed(0)
        x = torch.randn(512, 64) * torch.logspace(0.5, -1, 64)
        model = nn.Sequential(nn.Linear(64, 48, bias=False))
        y = x @ (model[0].weight.detach() + torch.randn(48, 3) @ torch.randn(3, 64) / 8).T
        noisy = y + y.std() * torch.randn_like(y)
        st.adapt(model, st.lora(rank=8))
        optimizer = torch.optim.SGD(st.param_groups(model, lr=lr))
        st.attach(st.LoRAPro(cap=cap), model, optimizer)
        losses = [loss_of(model, x, y).item()]
        for k in range(0, 160, 4):
            optimizer.zero_grad()
            loss_of(model, x[k : k + 4], noisy[k : k + 4]).backward()
            optimizer.step()
            losses.append(loss_of(model, x, y).item())
            if losses[-1] > 5 * losses[0]:
                return math.inf
        return max(losses) / losses[0]

    assert worst(st.LoRAPro().cap) < 1.2
    assert lr < 1 or worst(None) > 1.5


@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_a_first_step_at_rate_zero_leaves_the_second_as_the_first(form):
    """As warm-up schedules have it: B is still zero at the second step, and the formula must see that."""
    model, x, y = layer(b=0.0)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.01 * step)
    st.attach(st.LoRAPro(form), model, optimizer)
    for moved in (False, True):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        schedule.step()
        structure = adapter_of(model).structure
        assert bool(structure.B.any()) == moved
        assert all(p.isfinite().all() for p in structure.parameters())


@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_retraction_takes_the_step_without_its_square(form):
    lr = 0.02
    stepped = {}
    for retract in (False, True):
        model, x, y = layer()
        structure = adapter_of(model).structure
        A, B, s = structure.A.detach().clone(), structure.B.detach().clone(), adapter_of(model).scale
        trained(form, 1, torch.optim.SGD, lr, (model, x, y), retract=retract)
        stepped[retract] = structure
    plain = stepped[False]
    asked = B @ A + B @ (plain.A.detach() - A) + (plain.B.detach() - B) @ A
    U, sigma, Vh = torch.linalg.svd(asked)
    torch.testing.assert_close(stepped[True].dense().detach(), U[:, :R] * sigma[:R] @ Vh[:R], rtol=1e-8, atol=1e-9)
    assert s > 0


# ---------------------------------------------------------------- loops, clipping, groups


@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_accumulated_batches_are_one(form):
    """Four times eight rows are thirty-two."""
    results = []
    for parts in (1, 4):
        model, x, y = layer()
        x, y = x[:32], y[:32]
        optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.01))
        st.attach(st.LoRAPro(form), model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_of(model, xs, ys) / parts).backward()
            optimizer.step()
        results.append(weight(model))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_clipping_comes_first():
    """It measures LoRA's gradients, and the adjusted ones are the adjusted clipped ones."""
    model, x, y = layer()
    structure, s = adapter_of(model).structure, adapter_of(model).scale
    optimizer = still(model)
    st.attach(st.LoRAPro(**EXACT), model, optimizer)
    loss_of(model, x, y).backward()
    before = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    raw = structure.A.grad.clone(), structure.B.grad.clone()
    assert before > 1 and torch.cat([g.flatten() for g in raw]).norm() == pytest.approx(0.1)
    optimizer.step()
    expected = adjusted_gradients(structure.A.detach(), structure.B.detach(), *raw, s)
    torch.testing.assert_close((structure.A.grad, structure.B.grad), expected)


@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_a_step_that_mixed_precision_skips_is_not_seen(form):
    model, x, y = layer(dtype=torch.float32)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=0.1))
    st.attach(st.LoRAPro(form), model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = weight(model)
    for bad in (True, False):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        scaler.scale(loss * math.inf if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight(model)) == bad
        assert bool(optimizer.state[adapter_of(model).structure.A]) == (form != "factors" and not bad)


@pytest.mark.parametrize("form", ["full", "lean"])
def test_gradients_are_back_after_the_step(form):
    model, x, y = layer()
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.1))
    st.attach(st.LoRAPro(form), model, optimizer)
    loss_of(model, x, y).backward()
    grads = [p.grad for _, p in st.trainable_parameters(model)]
    values = [g.clone() for g in grads]
    optimizer.step()
    assert all(p.grad is g for (_, p), g in zip(st.trainable_parameters(model), grads, strict=True))
    assert all(map(torch.equal, grads, values))


@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_what_has_no_gradient_stays(form):
    model, x, y = layer(layers=3)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.1))
    st.attach(st.LoRAPro(form), model, optimizer)
    before = [weight(model, k) for k in range(3)]
    sum((model[k](x) - y).square().mean() for k in (0, 2)).backward()
    optimizer.step()
    assert [torch.equal(before[k], weight(model, k)) for k in range(3)] == [False, True, False]
    loss_of(model, x, y).backward()  # counts of steps differ from here on
    optimizer.step()
    assert not torch.equal(before[1], weight(model, 1))


@pytest.mark.parametrize("form", ["full", "lean"])
def test_layers_in_one_call_step_as_each_alone(form):
    """With counts of steps, scales and rates of their own."""
    recipe = st.lora(rank=R, alpha_pattern={"1": 5.0})
    together, x, y = layer(recipe, layers=2)
    alone = copy.deepcopy(together)

    def groups(model, own):
        return [{"params": list(adapter_of(model, k).parameters()), "lr": 0.01 * (k + 1)} for k in own]

    one = [torch.optim.AdamW(groups(together, (0, 1)))]
    two = [torch.optim.AdamW(groups(alone, (k,))) for k in (0, 1)]
    st.attach(st.LoRAPro(form), together, one[0])
    for k, optimizer in enumerate(two):
        single = nn.Sequential(alone[k])
        st.attach(st.LoRAPro(form), single, optimizer)
    for step in range(3):
        for model, optimizers in ((together, one), (alone, two)):
            model.zero_grad()
            sum((m(x) - y).square().mean() for m in list(model)[: 1 if step == 0 else 2]).backward()
            for optimizer in optimizers:
                optimizer.step()
    for k in (0, 1):
        torch.testing.assert_close(weight(together, k), weight(alone, k))


@pytest.mark.parametrize("form", ["full", "lean"])
def test_weight_decay_shrinks_the_product(form):
    """By 1 - lr * decay, and the frozen weight not at all."""
    model, x, y = layer()
    before, base = adapter_of(model).dense().detach(), model[0].weight.clone()
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.1, weight_decay=0.5))
    st.attach(st.LoRAPro(form), model, optimizer)
    (0 * loss_of(model, x, y)).backward()
    optimizer.step()
    torch.testing.assert_close(adapter_of(model).dense().detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(model[0].weight, base)


@pytest.mark.parametrize("form", ["full", "lean"])
def test_maximize_goes_up(form):
    model, x, y = layer()
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-3), maximize=True)
    st.attach(st.LoRAPro(form), model, optimizer)
    start = loss_of(model, x, y)
    start.backward()
    optimizer.step()
    assert loss_of(model, x, y) > start


def test_two_rates_descend_with_x_zero_and_are_refused_where_the_product_steps():
    model, x, y = layer()
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1e-6, b_ratio=16))
    handle = st.attach(st.LoRAPro(X="zero"), model, optimizer)
    start = loss_of(model, x, y)
    start.backward()
    optimizer.step()
    assert loss_of(model, x, y) < start
    handle.remove()
    for form in ("full", "lean"):
        with pytest.raises(st.SlimtuneError, match=r"0, adapter 'default': A learns at 1e-06 and B at 1\.6e-05"):
            st.attach(st.LoRAPro(form), model, optimizer)


def test_other_parameters_are_the_optimizers():
    """A head and DoRA's magnitudes train as without the controller."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, O), nn.Linear(O, 2))
    st.adapt(model, st.dora(rank=R), ["0"], modules_to_save=["1"])
    plain = copy.deepcopy(model)
    for m, pro in ((plain, False), (model, True)):
        optimizer = torch.optim.AdamW(st.param_groups(m, lr=0.01))
        if pro:
            st.attach(st.LoRAPro("full"), m, optimizer)
        m(torch.ones(5, I)).square().sum().backward()
        optimizer.step()
    ours, theirs = (dict(st.trainable_parameters(m)) for m in (model, plain))
    differ = {n.rpartition(".adapters.default.")[2] for n in ours if not torch.equal(ours[n], theirs[n])}
    assert differ == {"structure.B"}  # A's gradient is zero in the first step
    assert "exp_avg" not in optimizer.state[ours["0.adapters.default.structure.B"]]


def test_under_a_magnitude_the_inner_weights_gradient_is_met():
    """DoRA holds |V| constant: the gradient of V = W + s B A is that of the output weight, its rows scaled."""
    model, x, y = layer(st.dora(rank=R))
    adapter = adapter_of(model)
    A, B, s = adapter.structure.A.detach(), adapter.structure.B.detach(), adapter.scale
    optimizer = still(model)
    st.attach(st.LoRAPro(**EXACT), model, optimizer)
    V = weight(model)
    ratio = (adapter.composition.magnitude.detach() / V.norm(dim=1))[:, None]
    W = (ratio * V).requires_grad_()
    g = ratio * torch.autograd.grad((x @ W.T - y).square().mean(), W)[0]
    loss_of(model, x, y).backward()
    optimizer.step()
    step = tangent(A, B, adapter.structure.A.grad, adapter.structure.B.grad, s)
    torch.testing.assert_close(step, projected(A, B, g), rtol=1e-8, atol=1e-9)


def test_factors_that_are_stored_as_changes_are_taken_whole():
    """A centred start keeps dA and dB; the products of B0 + dB and A0 + dA are what counts."""
    model, x, y = layer(st.pissa(rank=R), b=0)
    structure = adapter_of(model).structure
    g = gradient_of_weight(model, x, y)
    _, _, B, A = (t.detach() for t in structure.pair())
    optimizer = still(model)
    st.attach(st.LoRAPro(**EXACT), model, optimizer)
    loss_of(model, x, y).backward()
    optimizer.step()
    pair = structure.pair()
    step = tangent(A, B, pair.A_parameter.grad, pair.B_parameter.grad, adapter_of(model).scale)
    torch.testing.assert_close(step, projected(A, B, g), rtol=1e-8, atol=1e-9)


def test_peft_scales_gradients_and_counts_one_part_twice():
    """ScaledGD, (B^T B)^-1 gA and gB (A A^T)^-1: s^2 (P_B g + g P_A), which has P_B g P_A twice."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_riemannian_optimizer

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(I, O, bias=False, dtype=torch.float64))
    config = peft.LoraConfig(r=R, lora_alpha=S * R, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    inner = theirs.base_model.model[0]
    A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(torch.randn_like(A))
        B.copy_(torch.randn_like(B))
    st.adapt(base, st.lora(rank=R, alpha=S * R))
    structure = adapter_of(base).structure
    with torch.no_grad():
        structure.A.copy_(A)
        structure.B.copy_(B)
    x = torch.randn(9, I, dtype=torch.float64)
    optimizer = create_riemannian_optimizer(theirs, torch.optim.SGD, lr=0.0, reg=0.0)
    own = still(base)
    st.attach(st.LoRAPro(**EXACT), base, own)
    for model, opt in ((theirs, optimizer), (base, own)):
        model(x).square().sum().backward()
        opt.step()
    A, B = A.detach(), B.detach()
    W = (base[0].weight + S * B @ A).detach().requires_grad_()
    (g,) = torch.autograd.grad((x @ W.T).square().sum(), W)
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    scaled = tangent(A, B, inner.lora_A["default"].weight.grad, inner.lora_B["default"].weight.grad, S)
    ours = tangent(A, B, structure.A.grad, structure.B.grad, S)
    torch.testing.assert_close(scaled, S**2 * (P_B @ g + g @ P_A), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ours, scaled / S**2 - P_B @ g @ P_A, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("retract", [False, True])
@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_resumes_to_the_same_bits(form, retract, tmp_path):
    """Moments are in the optimizer's state, options in plain JSON; a checkpoint holds no pickled class."""

    def make():
        model, x, y = layer(layers=2, dtype=torch.float32)
        optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.01))
        return model, x, y, optimizer, st.attach(st.LoRAPro(form, retract=retract), model, optimizer)

    def go(model, x, y, optimizer, attached, steps):
        for k in steps:
            optimizer.zero_grad()
            loss_of(model, x[k * 5 : k * 5 + 5], y[k * 5 : k * 5 + 5]).backward()
            optimizer.step()

    straight = make()
    go(*straight, range(6))
    first = make()
    go(*first, range(3))
    torch.save({"model": first[0].state_dict(), "optimizer": first[3].state_dict()}, tmp_path / "x.pt")
    state = json.loads(json.dumps(first[4].state_dict()))
    again = make()
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    again[0].load_state_dict(saved["model"])
    again[3].load_state_dict(saved["optimizer"])
    again[4].load_state_dict(state)
    go(*again, range(3, 6))
    assert all(map(torch.equal, straight[0].state_dict().values(), again[0].state_dict().values()))
    assert state == st.LoRAPro(form, retract=retract).state_dict()


@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_transformers_trainer(form, tmp_path):
    """The tiny Llama learns, and a run cut in two is the run in one piece."""
    pytest.importorskip("accelerate")
    import transformers

    from cases import tiny_llama
    from slimtune.hf import ControllerCallback

    torch.manual_seed(0)
    rows = [{"input_ids": t, "labels": t} for t in torch.randint(3, 29, (12, 8))]

    def run(folder, steps, resume=None):
        model = tiny_llama()
        torch.manual_seed(0)
        st.adapt(model, st.lorapro(rank=2, form=form))
        args = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            warmup_steps=1,
            learning_rate=0.02,
            lr_scheduler_type="constant_with_warmup",
            max_steps=steps,
            save_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=[ControllerCallback()])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight", 6)
    run(tmp_path / "two", 3)
    resumed = run(tmp_path / "two", 6, str(tmp_path / "two" / "checkpoint-3"))
    state, other = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(state[k], other[k]) for k in state)
    losses = [row["loss"] for row in straight.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] and len(losses) == 6


# ---------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def processes():
    pair = Two()
    yield pair
    pair.stop()


def steps_of(form, how):
    """Three steps on this process's share of each batch; the change of each layer, gathered."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x, y = layer(layers=2, sizes=(O, O))
    runner = model
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for m in model:
            fully_shard(m, mesh=mesh)
        runner = fully_shard(model, mesh=mesh)
    elif how == "ddp":
        runner = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.01))
    st.attach(st.LoRAPro(form), model, optimizer)
    share = slice(None) if how == "alone" else slice(distributed.get_rank(), None, 2)
    for _ in range(3):
        optimizer.zero_grad()
        (runner(x[share]) - y[share]).square().mean().backward()
        optimizer.step()
    whole = [adapter_of(model, k).structure.pair() for k in (0, 1)]
    gathered = [[t.full_tensor() if hasattr(t, "full_tensor") else t for t in (p.B, p.A)] for p in whole]
    return [(B @ A).detach().numpy() for B, A in gathered]


def refused(form):
    try:
        steps_of(form, "fsdp")
    except st.SlimtuneError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("form", "how"), [("factors", "ddp"), ("factors", "fsdp"), ("full", "ddp"), ("lean", "ddp")], ids="-".join
)
def test_two_processes_step_as_one(processes, form, how):
    alone = steps_of(form, "alone")
    for changes in processes(steps_of, form, how):
        for ours, expected in zip(changes, alone, strict=True):
            torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-7, atol=1e-9)


def test_the_forms_that_step_by_themselves_refuse_shards(processes):
    for words in processes(refused, "lean"):
        assert words.startswith("0, adapter 'default': A is sharded, which LoRAPro's form='lean' cannot step")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "efficient"}, "form must be one of factors, full, lean, got 'efficient'"),
        ({"X": "sym"}, "X must be one of sylvester, zero, symmetric, got 'sym'"),
        ({"damping": -1.0}, r"damping must be a finite number of at least 0, got -1\.0"),
        ({"damping": True}, "damping must be a finite number of at least 0, got True"),
        ({"cap": 0}, "cap must be a finite number above 0, or None, got 0"),
        ({"cap": math.nan}, "cap must be a finite number above 0, or None, got nan"),
        ({"absolute": 1}, "absolute must be true or false, got 1"),
    ],
)
def test_options_are_checked_at_once(options, words):
    with pytest.raises(st.StructureError, match=words):
        st.LoRAPro(**options)
    if "absolute" not in options:
        with pytest.raises(st.StructureError, match=words):
            st.lorapro(**options)


def test_what_is_no_pair_is_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    st.adapt(model, st.singlora(rank=2), ["1"], name="other")
    st.adapt(model, st.lora(rank=2), ["0"])
    for _, p in model.named_parameters():
        p.requires_grad_("adapters" in _)
    optimizer = torch.optim.SGD([p for _, p in st.trainable_parameters(model)], lr=0.1)
    with pytest.raises(st.StructureError, match=r"1, adapter 'other': LoRAPro needs .* Symmetric \(singlora\) is not"):
        st.attach(st.LoRAPro(), model, optimizer)
    st.attach(st.LoRAPro(adapter="default"), model, optimizer)


def test_a_core_between_the_factors_is_refused():
    model = nn.Sequential(nn.Linear(6, 6))
    st.adapt(model, st.Recipe(st.LowRank, {"rank": 2, "core": True}))
    with pytest.raises(st.StructureError, match=r"0, adapter 'default': LoRAPro needs .* LowRank"):
        st.attach(st.LoRAPro(), model, torch.optim.SGD(st.param_groups(model, lr=0.1)))


def test_what_it_cannot_do_is_said_when_attached():
    model, _, _ = layer()
    structure = adapter_of(model).structure
    with pytest.raises(st.SlimtuneError, match="and B is not among the optimizer's parameters"):
        st.attach(st.LoRAPro(), model, torch.optim.SGD([structure.A], lr=0.1))
    both = torch.optim.SGD(st.param_groups(model, lr=0.1))
    structure.A.requires_grad_(False)
    with pytest.raises(st.SlimtuneError, match="and A is frozen"):
        st.attach(st.LoRAPro(), model, both)
    structure.B.requires_grad_(False)
    with pytest.raises(st.SlimtuneError, match=r"LoRAPro: the model trains no adapter$"):
        st.attach(st.LoRAPro(), model, both)
    with pytest.raises(st.SlimtuneError, match="LoRAPro: the model trains no adapter called 'x'"):
        st.attach(st.LoRAPro(adapter="x"), model, both)


def test_factors_that_are_no_longer_numbers_are_named():
    model, x, y = layer(layers=2)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=0.1))
    st.attach(st.LoRAPro(), model, optimizer)
    loss_of(model, x, y).backward()
    with torch.no_grad():
        adapter_of(model, 1).structure.B[0, 0] = math.nan
    with pytest.raises(st.DivergenceError, match="the factors of 1, adapter 'default' are no longer finite"):
        optimizer.step()


def test_a_retraction_that_diverges_is_named():
    model, x, y = layer(layers=2)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=0.1))
    st.attach(st.LoRAPro("lean", retract=True), model, optimizer)
    loss_of(model, x, y).backward()
    adapter_of(model, 1).structure.B.grad[0, 0] = math.nan
    with pytest.raises(st.DivergenceError, match="the factors of 1, adapter 'default' are no longer finite"):
        optimizer.step()


@pytest.mark.parametrize("form", ["full", "lean"])
def test_adam_s_numbers_where_the_optimizer_has_others(form):
    """Adafactor's eps are a pair, and some betas three."""
    weights = []
    for kind in (torch.optim.SGD, torch.optim.Adafactor):
        model, x, y = layer()
        groups = st.param_groups(model, lr=0.01, weight_decay=0.0)
        optimizer = kind(groups) if kind is torch.optim.Adafactor else kind(groups, lr=0.01)
        if kind is torch.optim.Adafactor:
            for group in optimizer.param_groups:
                group["betas"] = (0.9, 0.999, 0.9999)
        st.attach(st.LoRAPro(form), model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
        weights.append(weight(model))
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("form", ["factors", "full", "lean"])
def test_ranks_changed_on_the_way(form):
    """A square A has the shape of full's moments of W, which ranks do not touch."""
    model, x, y = layer(sizes=(4, 7), recipe=st.lora(rank=4))
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.01))
    st.attach(st.LoRAPro(form), model, optimizer)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moments that start afresh
        for n in range(12):
            if n == 4:
                st.resize(model, {"0": 3}, optimizer)
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert adapter_of(model).structure.rank == 3 and losses[-1] < losses[4]
