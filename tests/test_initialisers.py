"""PiSSA, OLoRA, LoRA-GA, EVA: their starts by closed forms and by PEFT, and the change that starts from them."""

import copy
import math
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimtune as st
from cases import shake
from slimtune.initialisers import GradientStats, InputStats
from slimtune.ops import centred, centred_linear, truncated_svd
from slimtune.ranks import rank_sizes

SIZES = [(12, 12), (9, 20), (20, 9), (1, 7), (7, 1)]


def structure_of(model, layer="0"):
    return model.get_submodule(layer).adapters["default"].structure


def mlp(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8, bias=False)).to(dtype)


def gradient_stats(G, directions):
    left = torch.linalg.svd(G, full_matrices=False)[0][:, :directions]
    return GradientStats(G[:, :0], G[:0], left, left.T @ G)


# ---------------------------------------------------------------- the decomposition


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rank", [1, 5, 40])
@pytest.mark.parametrize("iterations", [None, 400])
def test_truncated_svd_is_the_head_of_torchs(size, rank, iterations):
    torch.manual_seed(0)
    W = torch.randn(*size, dtype=torch.float64)
    U, S, Vh = truncated_svd(W, rank, iterations, oversampling=1)
    k = min(rank, *size)
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    assert U.shape == (size[0], k) and Vh.shape == (k, size[1])
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if iterations is None else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(S, s[:k], **tolerance)
    torch.testing.assert_close(U * S @ Vh, u[:, :k] * s[:k] @ vh[:k], **tolerance)
    for basis in (U, Vh.T):
        torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64))
    assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("iterations", [0, 1, 4, 16])
def test_randomised_svd_keeps_to_the_bound(iterations):
    """Halko et al., corollary 10.10 and theorem 9.3, on a slowly falling spectrum; nearly the best at last."""
    generator = torch.Generator().manual_seed(1)
    Q, P = (torch.linalg.qr(torch.randn(n, 80, generator=generator, dtype=torch.float64)).Q for n in (120, 80))
    values = torch.arange(1, 81, dtype=torch.float64) ** -0.5
    U, S, Vh = truncated_svd(Q * values @ P.T, 6, iterations)
    error = torch.linalg.matrix_norm(Q * values @ P.T - U * S @ Vh, 2) / values[6]
    c = 1 + (6 / 9) ** 0.5 + math.e * (16 * 74) ** 0.5 / 10
    assert 1 - 1e-9 < error < 1 + c ** (1 / (2 * iterations + 1))
    assert error < {0: 1.3, 1: 1.2, 4: 1.1, 16: 1.002}[iterations]


def test_svd_of_few_directions_of_zeros_and_of_equal_values():
    torch.manual_seed(0)
    low = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 40, dtype=torch.float64)
    for W in (low, torch.zeros(30, 40, dtype=torch.float64), torch.eye(30, 40, dtype=torch.float64)):
        for iterations in (None, 0):
            U, S, Vh = truncated_svd(W, 6, iterations)
            best = W if W is low else torch.zeros_like(W)
            if W.any():
                best = U @ U.T @ W
            torch.testing.assert_close(U * S @ Vh, best)
            torch.testing.assert_close(U.T @ U, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(truncated_svd(low, 6, 0)[0][:, :3] @ truncated_svd(low, 6, 0)[0][:, :3].T @ low, low)


@pytest.mark.parametrize("iterations", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_svd_is_the_same_every_time_and_in_fp32(dtype, iterations):
    torch.manual_seed(0)
    W = torch.randn(30, 40).to(dtype)
    state = torch.random.get_rng_state()
    first = truncated_svd(W, 4, iterations)
    assert torch.equal(torch.random.get_rng_state(), state)  # its randomness is its own
    torch.manual_seed(9)
    for a, b, c in zip(first, truncated_svd(W, 4, iterations), truncated_svd(W.float(), 4, iterations), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("iterations", [None, 4])
def test_devices_agree(iterations):
    torch.manual_seed(0)
    W = torch.randn(300, 200)
    here, there = truncated_svd(W, 8, iterations), truncated_svd(W.cuda(), 8, iterations)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- CentredLowRank


@pytest.fixture
def parts():
    torch.manual_seed(0)
    sizes = ((24, 20), (24, 3), (3, 20), (24, 3), (3, 20))
    return [torch.randn(*s, dtype=torch.float64) for s in sizes]


@pytest.mark.parametrize("rows", [2, 400])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_thin_and_dense_products_are_the_definition(parts, rows, dropout, bias):
    W, B0, A0, dB, dA = parts
    b = torch.randn(24, dtype=torch.float64) if bias else None
    x = torch.randn(rows, 20, dtype=torch.float64)
    assert centred.weight_pays(rows, W, 3) == (rows == 400)
    wanted = [t.requires_grad_() for t in (x, dB, dA)]
    scale = torch.tensor(0.7, dtype=torch.float64)
    torch.manual_seed(1)
    y = centred_linear(x, W, b, B0, A0, dB, dA, scale, dropout)
    torch.manual_seed(1)
    z = x
    if dropout:
        z = st.ops.dropped(torch.ones_like(x), dropout, st.ops.draw_seed()) / st.ops.keep_probability(dropout) * x
    slow = F.linear(x, W, b) + 0.7 * z @ ((B0 + dB) @ (A0 + dA) - B0 @ A0).T
    torch.testing.assert_close(y, slow)
    g = torch.randn_like(y)
    for a, c in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(slow, wanted, g), strict=True):
        torch.testing.assert_close(a, c)
    with torch.no_grad():
        torch.manual_seed(1)
        torch.testing.assert_close(centred_linear(x, W, b, B0, A0, dB, dA, scale, dropout), slow)


@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rank_dropout", [0.0, 0.25])
def test_second_derivatives(rows, dropout, rank_dropout):
    torch.manual_seed(0)
    W, B0, A0 = (torch.randn(*n, dtype=torch.float64) for n in ((3, 4), (3, 2), (2, 4)))
    x, dB, dA = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((rows, 4), (3, 2), (2, 4)))
    assert centred.weight_pays(rows, W, 2) == (rows == 16)
    s = torch.tensor(0.7, dtype=torch.float64)

    def f(x, dB, dA):
        torch.manual_seed(2)
        return centred_linear(x, W, None, B0, A0, dB, dA, s, dropout, rank_dropout)

    assert torch.autograd.gradcheck(f, (x, dB, dA))
    assert torch.autograd.gradgradcheck(f, (x, dB, dA))


def test_only_what_trains_gets_a_gradient(parts):
    W, B0, A0, dB, dA = parts
    for rows in (2, 400):
        for frozen in (dB, dA):
            dB.requires_grad_(frozen is not dB)
            dA.requires_grad_(frozen is not dA)
            y = centred_linear(torch.ones(rows, 20).double(), W, None, B0, A0, dB, dA, torch.tensor(1.0).double())
            y.sum().backward()
            assert frozen.grad is None
            dB.grad = dA.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [st.pissa, st.olora])
def test_start_is_the_base_bit_for_bit(make, dtype):
    """The published edit leaves W - s B A in the layer, whose sum with s B A is W only up to rounding."""
    model = mlp(dtype)
    x = torch.randn(50, 16).to(dtype)
    before, weights = model(x), [p.clone() for p in model.parameters()]
    st.adapt(model, make(rank=4), ["0", "2"])
    for y in (model(x), model.eval()(x)):
        assert torch.equal(y, before)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert all(
        torch.equal(a, b) for a, b in zip(weights, [model[0].weight, model[0].bias, model[2].weight], strict=True)
    )


def test_a_small_step_survives_in_half_precision():
    """|dW| here is a thousandth of a unit in the last place of the bf16 weight."""
    model = mlp(torch.bfloat16)
    st.adapt(model, st.pissa(rank=4), ["2"])
    s = structure_of(model, "2")
    with torch.no_grad():
        s.dB.normal_(std=1e-6)
        s.dA.normal_(std=1e-6)
    wide = copy.deepcopy(s).double()
    exact = (wide.B0 + wide.dB) @ (wide.A0 + wide.dA) - wide.B0 @ wide.A0
    assert ((s.dense() - exact).norm() < 1e-6 * exact.norm()) and exact.norm() < 1e-4
    x = torch.randn(5, 24)
    torch.testing.assert_close(s(x).double(), x.double() @ exact.T, rtol=1e-5, atol=1e-5 * exact.norm().item())


def test_pair_and_rank_sizes(parts):
    s = st.CentredLowRank(24, 20, rank=3, dtype=torch.float64)
    for name, t in zip(("B0", "A0", "dB", "dA"), parts[1:], strict=True):
        getattr(s, name).data.copy_(t)
    pair = s.pair()
    assert pair.B_parameter is s.dB and pair.A_parameter is s.dA
    u, v = torch.randn_like(s.dB), torch.randn_like(s.dA)
    _, slope = torch.func.jvp(lambda dB, dA: (s.B0 + dB) @ (s.A0 + dA), (s.dB.detach(), s.dA.detach()), (u, v))
    torch.testing.assert_close(u @ pair.A + pair.B @ v, slope)
    B, A = s.B0 + s.dB, s.A0 + s.dA
    shares = [(B[:, j : j + 1] @ A[j : j + 1] - s.B0[:, j : j + 1] @ s.A0[j : j + 1]).norm() for j in range(3)]
    torch.testing.assert_close(rank_sizes(s), torch.stack(shares).detach())


def test_ranks_change_with_their_starts():
    """Taking ranks away takes their share of dW; adding some leaves dW and can be trained."""
    torch.manual_seed(0)
    model = mlp()
    st.adapt(model, st.pissa(rank=4), ["0"])
    shake(model)
    s = structure_of(model)
    optimizer = torch.optim.AdamW(st.param_groups(model))
    kept = rank_sizes(s).argsort(descending=True)[:2].sort().values
    expected = (s.dB[:, kept] @ (s.A0 + s.dA)[kept] + s.B0[:, kept] @ s.dA[kept]).detach()
    st.resize(model, {"0": 2}, optimizer)
    torch.testing.assert_close(s.dense(), expected)
    st.resize(model, {"0": 5}, optimizer)
    torch.testing.assert_close(s.dense(), expected)
    model(torch.randn(3, 16)).square().sum().backward()
    assert (s.dA.grad.norm(dim=1) + s.dB.grad.norm(dim=0) > 0).all()
    assert st.compact(model, optimizer) == {"0": 2}


# ---------------------------------------------------------------- PiSSA and OLoRA


@pytest.mark.parametrize("alpha", [None, 1.0, 32.0, -3.0])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_pissa_leaves_the_smaller_singular_values(rank, alpha):
    model = mlp()
    st.adapt(model, st.pissa(rank=rank, alpha=alpha), ["0"])
    s, scale, W = structure_of(model), model[0].adapters["default"].scale, model[0].weight
    values = torch.linalg.svdvals(W)
    left = torch.linalg.svdvals(W - scale * s.B0 @ s.A0)
    torch.testing.assert_close(left[: len(values) - rank], values[rank:])
    assert left[len(values) - rank :].max() < 1e-5
    torch.testing.assert_close(s.A0.norm(dim=1), s.B0.norm(dim=0))
    assert (s.A0.gather(1, s.A0.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(s.A0.norm(dim=1), (values[:rank] / scale.abs()).sqrt())


def test_randomised_pissa_comes_close():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 160))
    with torch.no_grad():  # with a spectrum to speak of
        U, _, Vh = torch.linalg.svd(model[0].weight, full_matrices=False)
        model[0].weight.copy_(U * torch.arange(1, 161) ** -0.7 @ Vh)
    other = copy.deepcopy(model)
    st.adapt(model, st.pissa(rank=6))
    st.adapt(other, st.pissa(rank=6, iterations=4))
    exact, near = (s.B0 @ s.A0 for s in (structure_of(model), structure_of(other)))
    assert 0 < (exact - near).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_olora_is_the_head_of_q_and_r(rank):
    model = mlp()
    st.adapt(model, st.olora(rank=rank), ["2"])
    s, W = structure_of(model, "2"), model[2].weight
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(s.B0 @ s.A0, Q[:, :rank] @ R[:rank], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(s.B0.T @ s.B0, torch.eye(rank))
    assert s.A0.tril(-1).abs().max() < 1e-6 and (s.A0.diagonal() > 0).all()


@pytest.mark.parametrize("make", [st.pissa, st.olora])
@pytest.mark.parametrize("kind", ["wide rank", "low rank", "zero"])
def test_every_rank_can_learn(make, kind):
    """A rank whose B0 and A0 are both zero gets no gradient, ever."""
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        if kind == "zero":
            model[0].weight.zero_()
        elif kind == "low rank":
            model[0].weight.copy_(torch.randn(4, 1) @ torch.randn(1, 6))
    st.adapt(model, make(rank=7 if kind == "wide rank" else 4), ["0"])
    s = structure_of(model)
    model(torch.randn(20, 6)).square().sum().backward()
    assert (s.dA.grad.norm(dim=1) + s.dB.grad.norm(dim=0) > 1e-4).all()
    if kind != "zero":
        torch.testing.assert_close(s.B0 @ s.A0, model[0].weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [st.pissa, st.olora])
def test_starts_do_not_hang_on_the_seed(make):
    first, second = mlp(), mlp()
    st.adapt(first, make(rank=4))
    torch.manual_seed(77)
    st.adapt(second, make(rank=4))
    a, b = structure_of(first).state_dict(), structure_of(second).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("make", "init"), [(st.pissa, "pissa"), (st.olora, "olora"), (lambda **o: st.pissa(iterations=16, **o), "pissa")]
)
@pytest.mark.parametrize("alpha", [4, 8])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_is_pefts(make, init, alpha, optimizer):
    """PEFT edits W and trains A and B; here W stays and their changes train: one and the same path."""
    ours, theirs = mlp(), mlp()
    st.adapt(ours, make(rank=4, alpha=alpha), ["0", "2"])
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0", "2"], init_lora_weights=init)
    theirs = peft.get_peft_model(theirs, config)
    torch.manual_seed(1)
    x, target = torch.randn(30, 16), torch.randn(30, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    start = ours(x).detach()
    for model in (ours, theirs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        step = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
            "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0),
        }
        stepper = step[optimizer](parameters)
        for _ in range(8):
            stepper.zero_grad()
            F.mse_loss(model(x), target).backward()
            stepper.step()
    assert (ours(x) - start).norm() > 0.05 * start.norm()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- LoRA-GA


def with_gradient(rank, dtype=torch.float64, **options):
    """(an adapted layer, its gradient, the loss) with the statistics of that gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(14, 20)).to(dtype)
    x, target = torch.randn(40, 14, dtype=dtype), torch.randn(40, 20, dtype=dtype)

    def loss():
        return (model(x) - target).square().mean()

    (G,) = torch.autograd.grad(loss(), [model[0].weight])
    recipe = st.loraga(rank=rank, **options)
    st.adapt(model, recipe, ["0"], stats={"0": gradient_stats(G, 2 * rank)})
    return model, G, loss


def best(G, rank):
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_loraga_takes_the_authors_vectors(direction):
    """All of norm O^(1/4) / sqrt(gamma): PEFT 0.21.2 leaves A at 1 and lets B carry the gradient's singular values."""
    model, G, _ = with_gradient(3, direction=direction, gamma=16.0)
    s = structure_of(model)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    c = 20**0.25 / 4
    of_A, of_B = {
        "ArB2r": ([0, 1, 2], [3, 4, 5]),
        "A2rBr": ([3, 4, 5], [0, 1, 2]),
        "ArBr": ([1, 3, 5], [0, 2, 4]),
    }[direction]
    torch.testing.assert_close((s.A0 @ Vh[of_A].T).abs(), c * torch.eye(3).double())
    torch.testing.assert_close((U[:, of_B].T @ s.B0).abs(), c * torch.eye(3).double())


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize(("size", "factor"), [("stable", None), ("gd_scale", 1.0), ("unit", None)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_first_step_is_full_trainings_at_rank_2r(rank, size, factor, direction):
    """Theorem 3.1: -lr s^2 c^2 times the best approximation of G at rank 2 R."""
    model, G, loss = with_gradient(rank, size=size, direction=direction, gamma=9.0)
    adapter = model[0].adapters["default"]
    lr = 1e-7
    optimizer = torch.optim.SGD(adapter.parameters(), lr=lr)
    loss().backward()
    optimizer.step()
    s = adapter.scale.item()
    assert s == 16 / rank**0.5
    factor = factor or s**2 * {"stable": 20**0.5 / 9, "unit": 1}[size]
    torch.testing.assert_close(adapter.dense().detach() / -lr, factor * best(G, 2 * rank), rtol=1e-4, atol=1e-6)


def test_loraga_does_not_hang_on_the_size_of_the_loss():
    torch.manual_seed(0)
    G = torch.randn(20, 14)
    starts = []
    for factor in (1.0, 1e-6, 1e4):
        model = nn.Sequential(nn.Linear(14, 20))
        st.adapt(model, st.loraga(rank=3), stats={"0": gradient_stats(factor * G, 6)})
        starts.append(structure_of(model))
    for s in starts[1:]:
        torch.testing.assert_close(s.A0, starts[0].A0)
        torch.testing.assert_close(s.B0, starts[0].B0)


def test_loraga_weight_svd_is_as_large_as_pissa():
    model, _, _ = with_gradient(2, size="weight_svd", alpha=5.0)
    values = torch.linalg.svdvals(model[0].weight)
    c = (values[:2] / (5 / 2**0.5)).sqrt().mean()
    torch.testing.assert_close(structure_of(model).A0.norm(dim=1), c.expand(2), rtol=1e-2, atol=0)


def test_loraga_weight_svd_of_a_weight_of_zeros_can_learn():
    """c = 0 would start both factors at zero, from where none moves."""
    model = nn.Sequential(nn.Linear(14, 20))
    nn.init.zeros_(model[0].weight)
    G = torch.randn(20, 14, generator=torch.Generator().manual_seed(0))
    st.adapt(model, st.loraga(rank=3, size="weight_svd"), stats={"0": gradient_stats(G, 6)})
    model(torch.randn(9, 14)).square().sum().backward()
    assert (structure_of(model).dB.grad.norm(dim=0) > 0).all()


def test_loraga_with_fewer_directions_than_it_wants():
    model, _, _ = with_gradient(9)  # 14 directions, 18 wanted
    s = structure_of(model)
    c = 20**0.25 / 4
    torch.testing.assert_close(s.A0.norm(dim=1), torch.full((9,), c, dtype=torch.float64))
    assert (s.B0[:, 5:] == 0).all()
    torch.testing.assert_close(s.B0[:, :5].norm(dim=0), torch.full((5,), c, dtype=torch.float64))
    dead = nn.Sequential(nn.Linear(14, 20))
    st.adapt(dead, st.loraga(rank=3), stats={"0": gradient_stats(torch.zeros(20, 14), 6)})
    dead(torch.randn(9, 14)).square().sum().backward()
    assert (structure_of(dead).dB.grad.norm(dim=0) > 0).all()


def test_loraga_from_batches():
    """Calibration streams; the start is that of the mean gradient over them."""
    model = mlp(torch.float64)
    torch.manual_seed(1)
    batches = [(torch.randn(30, 16).double(), torch.randn(30, 8).double()) for _ in range(4)]

    def loss(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    weights = [model[0].weight, model[2].weight]
    G = [sum(g) / 4 for g in zip(*(torch.autograd.grad(loss(model, b), weights) for b in batches), strict=True)]
    _, stats = st.calibrate.fit(st.loraga(rank=2), model, batches, loss, ["0", "2"])
    for layer, g in zip(("0", "2"), G, strict=True):
        found = torch.linalg.svdvals(stats[layer].right)[:4].norm() / torch.linalg.svdvals(g)[:4].norm()
        assert 0.995 < found < 1 + 1e-9
    recipe, stats = st.calibrate.fit(st.loraga(rank=2, power=30), model, batches, loss, ["0", "2"])
    st.adapt(model, recipe, ["0", "2"], stats=stats)
    for layer, g in zip(("0", "2"), G, strict=True):
        s = structure_of(model, layer)
        torch.testing.assert_close(
            s.B0 @ s.B0.T @ g + g @ s.A0.T @ s.A0, best(g, 4) * len(g) ** 0.5 / 16, rtol=1e-4, atol=1e-6
        )


# ---------------------------------------------------------------- EVA


def test_eva_takes_the_inputs_leading_directions():
    torch.manual_seed(0)
    X = torch.randn(300, 24) * torch.arange(24, 0, -1)
    _, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    stats = InputStats(-Vh[:5], sigma[:5], float(X.square().sum()), 300)
    for whiten in (False, True):
        model = mlp()
        st.adapt(model, st.eva(rank=3, rho=1, whiten=whiten), ["2"], stats={"2": stats})
        s = structure_of(model, "2")
        norms = sigma[:3].rsqrt() if whiten else torch.ones(3)
        torch.testing.assert_close((s.A @ Vh[:3].T).abs(), torch.diag(norms))
        assert (s.A.gather(1, s.A.abs().argmax(1, keepdim=True)) > 0).all() and not s.B.any()


def test_eva_beyond_the_directions_of_the_inputs():
    X = torch.randn(2, 24)
    _, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    model = mlp()
    st.adapt(model, st.eva(rank=4, rho=1), ["2"], stats={"2": InputStats(Vh, sigma, float(X.square().sum()), 2)})
    A = structure_of(model, "2").A
    torch.testing.assert_close((A[:2] @ Vh.T).abs(), torch.eye(2))
    assert (A[2:].norm(dim=1) > 0.1).all()


def test_eva_shares_out_ranks_and_keeps_the_scale():
    model = mlp()
    torch.manual_seed(1)
    batches = [torch.randn(200, 16) * torch.tensor([30.0, *[1.0] * 15]) for _ in range(3)]
    recipe, stats = st.calibrate.fit(st.eva(rank=4, alpha=6), model, batches, targets=["0", "2"])
    st.adapt(model, recipe, ["0", "2"], stats=stats)
    ranks = {row.name: row.rank for row in st.summary(model).rows}
    assert sum(ranks.values()) == 8 and ranks["0"] != 4
    assert {model[i].adapters["default"].scale.item() for i in (0, 2)} == {1.5}
    X = torch.cat(batches)
    for layer, x in ((0, X), (2, F.relu(F.linear(X, model[0].weight, model[0].bias)))):
        A = structure_of(model, str(layer)).A
        Vh = torch.linalg.svd(x, full_matrices=False)[2][: len(A)]
        torch.testing.assert_close(A.T @ A, Vh.T @ Vh, rtol=1e-3, atol=1e-3)


def test_eva_spans_what_pefts_spans():
    """PEFT's incremental PCA takes off the mean first, so the inputs here have none."""
    torch.manual_seed(0)
    X = torch.randn(200, 16) * torch.arange(16, 0, -1) ** 2
    X = X - X.mean(0)
    ours, theirs = mlp(), mlp()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)
    )
    theirs = peft.get_peft_model(theirs, config)
    peft.initialize_lora_eva_weights(
        theirs,
        [X],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0],
        show_progress_bar=False,
    )
    recipe, stats = st.calibrate.fit(st.eva(rank=4, alpha=8, rho=1), ours, [X], targets=["0"])
    st.adapt(ours, recipe, ["0"], stats=stats)
    A, B = structure_of(ours).A, theirs.base_model.model[0].lora_A["default"].weight
    torch.testing.assert_close((A @ B.T).abs(), torch.eye(4), rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------- files


def trained(recipe, steps=4, dtype=torch.float32):
    model = mlp(dtype)
    base = copy.deepcopy(model)
    st.adapt(model, recipe, ["0", "2"])
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2, weight_decay=0.01))
    _steps(model, optimizer, steps)
    return base, model, optimizer


def _steps(model, optimizer, count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x, target = torch.randn(30, 16, generator=generator), torch.randn(30, 8, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()


DORA_OVER_PISSA = replace(st.pissa(rank=3), composition=st.Magnitude)


@pytest.mark.parametrize(
    "recipe", [st.pissa(rank=3), st.olora(rank=3), DORA_OVER_PISSA], ids=["pissa", "olora", "dora"]
)
def test_file_fits_the_original_base_and_training_goes_on(recipe, tmp_path):
    """PEFT's file of such an adapter is wrong on the base it was made from, unless it is converted."""
    base, model, optimizer = trained(recipe)
    st.save(model, tmp_path)
    assert {k.split(".structure.")[1] for k in st.io.own_tensors(model, "default") if "structure" in k} == {
        *("A0", "B0", "dA", "dB"),
    }
    st.load(base, tmp_path)
    x = torch.randn(5, 16)
    assert torch.equal(base(x), model(x))
    resumed = torch.optim.AdamW(st.param_groups(base, lr=1e-2, weight_decay=0.01))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (base, resumed)):
        _steps(m, o, 3, seed=4)
    assert torch.equal(base(x), model(x))


@pytest.mark.parametrize("recipe", [st.pissa(rank=3), st.olora(rank=3, dropout=0.1)], ids=["pissa", "olora"])
def test_as_lora_it_has_twice_the_rank_and_peft_reads_it(recipe, tmp_path):
    base, model, _ = trained(recipe)
    x = torch.randn(50, 16)
    y = model.eval()(x)
    st.save(model, tmp_path / "own")
    report = st.convert(tmp_path / "own", tmp_path / "lora")
    assert report.rank == 6 and {layer.how for layer in report.layers} == {"exact"} and report.error < 1e-6
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(x), y, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.pissa(rank=0), "pissa: rank must be a whole number of at least 1, got 0"),
        (lambda: st.pissa(iterations=-1), "pissa: iterations must be a whole number of at least 0, got -1"),
        (lambda: st.olora(alpha=0), "alpha must not be 0"),
        (lambda: st.loraga(gamma=0), "gamma must be a positive number, got 0"),
        (lambda: st.loraga(size="gd"), "size must be one of stable, gd_scale, unit, weight_svd, got 'gd'"),
        (lambda: st.loraga(direction="random"), "direction must be one of ArB2r, A2rBr, ArBr, got 'random'"),
        (lambda: st.eva(rho=0.5), "rho must be a number of at least 1, got 0.5"),
        (lambda: st.eva(floor=9), "floor 9 is above the rank, 8"),
        (lambda: st.eva(whiten=1), "whiten must be true or false, got 1"),
        (lambda: st.CentredLowRank(4, 4, rank=0), "CentredLowRank: rank must be a whole number of at least 1"),
        (lambda: st.CentredLowRank(4, 4, rank_dropout=1.0), r"rank_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(st.StructureError, match=message):
        make()


@pytest.mark.parametrize("name", ["pissa", "olora", "loraga", "eva"])
def test_a_structure_that_does_not_fit_is_named(name):
    model = mlp()
    stats = {
        "loraga": gradient_stats(torch.randn(24, 16), 8),
        "eva": InputStats(torch.eye(16)[:4], torch.ones(4), 16.0, 99),
    }
    with pytest.raises(st.StructureError, match=rf"0: {name}: fills a \w*LowRank, not a Kronecker"):
        st.adapt(model, replace(st.kronecker(), init={name: {}}), ["0"], stats={"0": stats.get(name)})
    assert not hasattr(model[0], "adapters")
    other = st.LowRank if name != "eva" else st.CentredLowRank
    with pytest.raises(st.StructureError, match=f"not a {other.__name__}"):
        st.adapt(model, st.Recipe(other, {"rank": 4}, init={name: {}}), ["0"], stats={"0": stats.get(name)})


def test_statistics_that_do_not_serve():
    model = mlp()
    few = gradient_stats(torch.randn(24, 16), 5)
    with pytest.raises(st.StructureError, match=r"24 x 16 layer of rank 3 needs 6 directions.*have 5 of a 24 x 16"):
        st.adapt(model, st.loraga(rank=3), ["0"], stats={"0": few})
    with pytest.raises(st.StructureError, match="the statistics have none"):
        st.adapt(model, st.loraga(rank=3), ["0"], stats={"0": GradientStats(few.sketch, few.projection)})
    with pytest.raises(
        st.StructureError, match="3 components of 16 inputs do not serve a layer of 16 inputs at rank 4"
    ):
        st.adapt(model, st.eva(rank=4), ["0"], stats={"0": InputStats(torch.eye(16)[:3], torch.ones(3), 16.0, 99)})
    with pytest.raises(st.StructureError, match="calibrate first"):
        st.adapt(model, st.eva(rank=4), ["0"])
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    for make in (st.pissa, st.olora):
        with pytest.raises(st.StructureError, match=r"0: \w+: the weight has entries that are not finite"):
            st.adapt(model, make(), ["0"])
