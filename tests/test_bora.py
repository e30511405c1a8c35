"""Magnitudes of columns, and of rows and columns: what their formulas promise, and gradients written out by hand."""

import copy

import pytest
import torch
from torch import nn

import slimtune as st
from cases import Chain, Diagonal, dense_forward, shake
from slimtune.ops import lowrank_linear, square_rmatmul

F64 = torch.float64


def one(recipe, out_features=7, in_features=5, dtype=F64, bias=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias)).to(dtype).eval()
    W = model[0].weight.detach().clone()
    st.adapt(model, recipe, ["0"])
    return model, model[0], model[0].adapters["default"], W


def parts(adapter):
    s = adapter.structure
    return s.A, s.B, adapter.scale, adapter.composition.row_magnitude, adapter.composition.column_magnitude


@pytest.mark.parametrize("sizes", [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_starts_as_the_layer_bit_for_bit(sizes, dtype):
    for recipe in (st.bora(rank=2), st.dora(rank=2, axis="column")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(sizes[1], sizes[0])).to(dtype)
        with torch.no_grad():
            model[0].weight[0], model[0].weight[:, -1] = 0, 0  # real checkpoints have dead units
        before = copy.deepcopy(model)
        st.adapt(model, recipe, ["0"])
        x = torch.randn(3, sizes[1]).to(dtype)
        assert torch.equal(model(x), before(x))
        W = model[0].map().weight()
        torch.testing.assert_close(W, before[0].weight.to(W.dtype), rtol=1e-6 if dtype != F64 else 1e-15, atol=0)


@pytest.mark.parametrize("make", [st.bora, lambda **o: st.dora(axis="column", **o)], ids=["bora", "column"])
def test_columns_have_the_magnitudes_exactly(make):
    model, host, adapter, _ = one(make(rank=2))
    shake(model)
    c = adapter.composition
    m = c.column_magnitude if isinstance(c, st.BiMagnitude) else c.magnitude
    W = host.map().weight()
    torch.testing.assert_close(W.norm(dim=0), m.abs(), rtol=1e-13, atol=0)
    if isinstance(c, st.BiMagnitude):
        assert (W.norm(dim=1) - c.row_magnitude.abs()).abs().max() > 0.01  # rows come first, so theirs are not kept


def test_rows_then_columns_and_the_order_matters():
    model, host, adapter, W = one(st.bora(rank=2))
    shake(model)
    A, B, s, m_row, m_column = parts(adapter)
    V = W + s * B @ A
    H = m_row[:, None] * V / V.norm(dim=1, keepdim=True)
    expected = m_column * H / H.norm(dim=0)
    torch.testing.assert_close(host.map().weight(), expected, rtol=1e-13, atol=1e-14)
    K = m_column * V / V.norm(dim=0)
    other = m_row[:, None] * K / K.norm(dim=1, keepdim=True)
    assert (expected - other).norm() > 0.01 * expected.norm()


def test_scaling_all_row_magnitudes_changes_nothing():
    """One direction of m_row does nothing; the exact gradient is orthogonal to it, the detached one is not."""
    x = torch.randn(4, 5, dtype=F64)
    slopes = {}
    for detach in (True, False):
        model, _, adapter, _ = one(st.bora(rank=2, detach=detach))
        shake(model)
        y = model(x)
        y.square().sum().backward()
        m = adapter.composition.row_magnitude
        slopes[detach] = float((m.detach() * m.grad).sum())
        with torch.no_grad():
            m.mul_(1.7)
        torch.testing.assert_close(model(x), y.detach(), rtol=1e-12, atol=1e-13)
    assert abs(slopes[False]) < 1e-10 < 1e-2 < abs(slopes[True])


def test_reduces_to_dora():
    """With m_column = |H|_column the columns are left alone: DoRA."""
    model, host, adapter, W = one(st.bora(rank=2))
    other, twin, plain, _ = one(st.dora(rank=2))
    shake(model)
    A, B, s, m_row, m_column = parts(adapter)
    with torch.no_grad():
        plain.structure.A.copy_(A), plain.structure.B.copy_(B), plain.composition.magnitude.copy_(m_row)
        V = W + s * B @ A
        m_column.copy_((m_row[:, None] * V / V.norm(dim=1, keepdim=True)).norm(dim=0))
    torch.testing.assert_close(host.map().weight(), twin.map().weight(), rtol=1e-13, atol=1e-14)
    x = torch.randn(4, 5, dtype=F64)
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_are_the_formulas(detach):
    model, _host, adapter, W = one(st.bora(rank=2, detach=detach))
    shake(model)
    A, B, s, m_row, m_column = (t.detach() for t in parts(adapter))
    x = torch.randn(6, 5, dtype=F64, requires_grad=True)
    g = torch.randn(6, 7, dtype=F64)
    got = torch.autograd.grad((model(x) * g).sum(), [x, *parts(adapter)[:2], *parts(adapter)[3:]])
    G = g.t() @ x.detach()  # dL/dW'
    V = W + s * B @ A
    n_row = V.norm(dim=1)
    d = m_row / n_row
    H = d[:, None] * V
    n_column = H.norm(dim=0)
    e = m_column / n_column
    New = H * e
    if detach:
        GV = d[:, None] * G * e
        d_row, d_column = (G * New).sum(1) / m_row, (G * New).sum(0) / m_column
    else:
        h, v = H / n_column, V / n_row[:, None]
        GH = e * (G - h * (h * G).sum(0))
        GV = d[:, None] * (GH - v * (v * GH).sum(1, keepdim=True))
        d_row, d_column = (GH * v).sum(1), (G * h).sum(0)
    for a, b in zip(got, (g @ New, s * B.t() @ GV, s * GV @ A.t(), d_row, d_column), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", ["row", "column", "both"])
def test_second_derivatives(axis, bias):
    recipe = st.bora(rank=2, detach=False) if axis == "both" else st.dora(rank=2, detach=False, axis=axis)
    model, _, adapter, _ = one(recipe, 3, 4, bias=bias)
    shake(model)
    x = torch.randn(2, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (x, *adapter.parameters()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [3, 40])  # fewer and more than columns: either temporary of the backward pass
@pytest.mark.parametrize("scaled", ["row", "column", "both"])
def test_scaled_product_against_autograd(scaled, rows, dropout):
    torch.manual_seed(0)
    O, I, R = 6, 9, 2
    x, W, B, A, d, e = (torch.randn(*n, dtype=F64) for n in ((rows, I), (O, I), (O, R), (R, I), (O,), (I,)))
    s = torch.tensor(0.7, dtype=F64)
    leaves = [t.requires_grad_() for t in (x, B, A, d, e)]
    dd, ee = d if scaled != "column" else None, e if scaled != "row" else None
    torch.manual_seed(1)
    y = lowrank_linear(x, W, None, B, A, s, dd, dropout, 0.0, ee)
    from slimtune.ops.dropout import draw_seed, dropped, keep_probability

    torch.manual_seed(1)
    z = x if ee is None else x * ee
    branch = dropped(z, dropout, draw_seed()) / keep_probability(dropout) if dropout else z
    slow = z @ W.t() + s * branch @ A.t() @ B.t()
    slow = slow if dd is None else slow * dd
    torch.testing.assert_close(y, slow)
    g = torch.randn_like(y)
    pairs = [torch.autograd.grad((v * g).sum(), leaves, allow_unused=True) for v in (y, slow)]
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_sums_of_squares_down_columns():
    torch.manual_seed(0)
    W = torch.randn(1500, 400, dtype=F64)  # several pieces
    v = torch.rand(1500, dtype=F64, requires_grad=True)
    torch.testing.assert_close(square_rmatmul(W, v), (W * W).t() @ v)
    (a,) = torch.autograd.grad(square_rmatmul(W, v).sin().sum(), [v], create_graph=True)
    (b,) = torch.autograd.grad(((W * W).t() @ v).sin().sum(), [v])
    torch.testing.assert_close(a, b)
    small, u = torch.randn(3, 4, dtype=F64), torch.rand(3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda u: square_rmatmul(small, u).square(), (u,))
    half = torch.randn(30, 20).bfloat16()
    before = half.clone()
    assert square_rmatmul(half, torch.ones(30)).dtype == torch.float32
    torch.testing.assert_close(square_rmatmul(half, torch.ones(30)), half.float().square().sum(0))
    assert torch.equal(half, before)


def test_zero_rows_and_columns_stay_finite_and_right():
    for detach in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
        with torch.no_grad():
            model[0].weight[2], model[0].weight[:, 3] = 0, 0
        st.adapt(model, st.bora(rank=2, detach=detach), ["0"])
        adapter = model[0].adapters["default"]
        x = torch.randn(4, 6, dtype=F64)
        model(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in adapter.parameters())
        with torch.no_grad():
            adapter.structure.B.normal_()
            adapter.composition.row_magnitude[1], adapter.composition.row_magnitude[3] = 0.0, -0.5
            adapter.composition.column_magnitude[0] = -0.3
        torch.testing.assert_close(model(x), dense_forward(model[0], x), rtol=1e-9, atol=1e-11)


def test_gradients_see_every_change_of_weight_and_parameters():
    """What is remembered of the frozen weight between steps must not outlive it."""
    for recipe in (st.dora(rank=2), st.bora(rank=2), st.dora(rank=2, axis="column")):
        model, host, adapter, _ = one(recipe, bias=True)
        shake(model)
        x = torch.randn(4, 5, dtype=F64)

        def check(model=model, host=host, x=x):
            torch.testing.assert_close(model(x), dense_forward(host, x), rtol=1e-10, atol=1e-12)

        check()
        for t in (host.weight, *adapter.parameters()):
            with torch.no_grad():
                t.mul_(1.5)
            check()
            t.data = t.data * 1.1
            check()
        host.weight.data.mul_(2)  # behind autograd's back: a mode switch is what makes it seen
        model.train()
        check()
        host.weight = nn.Parameter(torch.randn_like(host.weight), requires_grad=False)
        check()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[0].weight.mul_(3)
        check(twin, twin[0])
        check()


def test_small_problems_tell_the_three_apart():
    """W = diag(r) W0, W0 diag(c) and both: magnitudes of rows fit the first only, of columns the second only."""
    torch.manual_seed(0)
    W = torch.randn(16, 12) / 12**0.5
    r, c = 1 + torch.rand(16), 1 + torch.rand(12)
    x = torch.randn(256, 12)
    targets = {"rows": r[:, None] * W, "columns": W * c, "both": r[:, None] * W * c}
    recipes = {"row": st.dora(rank=1), "column": st.dora(rank=1, axis="column"), "bora": st.bora(rank=1)}
    loss = {}
    for name, recipe in recipes.items():
        for kind, target in targets.items():
            model = nn.Sequential(nn.Linear(12, 16, bias=False))
            with torch.no_grad():
                model[0].weight.copy_(W)
            st.adapt(model, recipe, ["0"])
            for p in model[0].adapters["default"].structure.parameters():
                p.requires_grad_(False)  # the magnitudes alone
            wanted = x @ target.t()
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
            for _ in range(400):
                optimizer.zero_grad()
                error = (model(x) - wanted).square().mean()
                error.backward()
                optimizer.step()
            loss[name, kind] = float(error.detach() / wanted.square().mean())
    solved = {key for key, value in loss.items() if value < 1e-5}
    wanted = {("row", "rows"), ("column", "columns"), ("bora", "rows"), ("bora", "columns"), ("bora", "both")}
    assert solved == wanted, loss
    assert all(value > 1e-3 for key, value in loss.items() if key not in solved), loss


def test_merge_and_back():
    model = Chain(F64).eval()
    ids = Chain.ids()
    st.adapt(model, st.bora(rank=2), Chain.targets)
    shake(model)
    y, weight = model(ids), model.up.weight
    with st.merged(model):
        torch.testing.assert_close(model(ids), y, rtol=1e-10, atol=1e-11)
    assert model.up.weight is weight and torch.equal(model(ids), y)


def test_over_any_structure():
    for composition in (st.ColumnMagnitude, st.BiMagnitude, st.Magnitude):
        model = Chain(F64).eval()
        ids = Chain.ids()
        before = model(ids)
        st.adapt(model, st.Recipe(Diagonal, {}, composition), Chain.targets)
        assert torch.equal(model(ids), before)
        shake(model)
        for name in Chain.targets:
            host = model.get_submodule(name)
            W = host.layout(host).weight()
            a = host.adapters["default"]
            torch.testing.assert_close(host.map().weight(), a.composition.weight(W, a.dense()))
            x = {"embed": ids}.get(name, torch.randn(2, host.layout.sizes(host)[1], dtype=F64))
            if name != "conv":
                torch.testing.assert_close(host(x), dense_forward(host, x), rtol=1e-10, atol=1e-12)
        y = model(ids)
        with st.merged(model):
            torch.testing.assert_close(model(ids), y, rtol=1e-10, atol=1e-11)


def test_refuses_an_unknown_axis():
    with pytest.raises(st.StructureError, match="axis must be 'row' or 'column', got 'both'"):
        st.dora(axis="both")
