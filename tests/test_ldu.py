"""LoLDU: the factorisation and what the published code got wrong."""

import copy
import warnings

import pytest
import torch
from torch import nn

import slimtune as st
from cases import shake
from slimtune.ops import diagonal_linear, ldu, pivot_rows

SIZES = [(15, 15), (12, 20), (20, 12), (150, 140)]


def factored(W, rank=None, **options):
    structure = st.LDU(*W.shape, rank=rank or min(W.shape), dtype=torch.float64, **options)
    structure.reset_parameters()
    structure.prepare(lambda dtype: W)
    return structure


def published(W, rank):
    """P L, D, U of the definition, by torch."""
    P, L, U = torch.linalg.lu(W)
    D = U.diagonal()
    return (P @ L)[:, :rank], D[:rank], (U / D[:, None])[:rank]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_factors_are_those_of_partial_pivoting(sizes, rank):
    torch.manual_seed(0)
    W = torch.randn(*sizes, dtype=torch.float64)
    structure = factored(W, rank, unit=False)
    L, D, U = published(W, rank)
    for mine, theirs in ((structure.L, L), (structure.start, D), (structure.U, U)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    unit_lower = structure.L[structure.pivots]
    assert torch.equal(unit_lower.triu(), torch.eye(rank, dtype=torch.float64)) and structure.L.abs().max() <= 1
    assert torch.equal(structure.U[:, :rank].tril(), torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("unit", [True, False])
def test_all_ranks_together_are_the_weight(sizes, unit):
    torch.manual_seed(0)
    W = torch.randn(*sizes, dtype=torch.float64)
    structure = factored(W, unit=unit)
    assert ((structure.L * structure.start) @ structure.U - W).norm() < 1e-12 * W.norm()
    if unit:
        torch.testing.assert_close(structure.L.norm(dim=0), torch.ones_like(structure.start))
        torch.testing.assert_close(structure.U.norm(dim=1), torch.ones_like(structure.start))


def test_residual_is_a_schur_complement():
    W = torch.randn(12, 20, dtype=torch.float64)
    s = factored(W, 5, unit=False)
    residual = W - (s.L * s.start) @ s.U
    assert residual[s.pivots].abs().max() < 1e-12 and residual[:, :5].abs().max() < 1e-12
    scaled = factored(3 * W, 5, unit=False)
    torch.testing.assert_close(scaled.start, 3 * s.start)
    torch.testing.assert_close(scaled.L, s.L)
    torch.testing.assert_close(scaled.U, s.U)


@pytest.mark.parametrize("start", st.LDU.starts)
@pytest.mark.parametrize("unit", [True, False])
def test_change_is_the_printed_one_and_zero_at_every_start(start, unit):
    """dW = P L_r diag(sigma z - sigma0 z0) U_r, sigma0 = alpha / R; the residual uses the z0 that was drawn."""
    torch.manual_seed(0)
    W = torch.randn(9, 7, dtype=torch.float64)
    structure = factored(W, 4, start=start, unit=unit)
    assert not structure.dense().any()
    z0, sigma0 = structure.start, 2.5
    z, sigma = torch.randn(4, dtype=torch.float64), 0.8
    with torch.no_grad():
        structure.dz.copy_(z - z0)
        structure.dsigma.fill_(sigma / sigma0 - 1)
    printed = structure.L @ torch.diag(sigma * z - sigma0 * z0) @ structure.U
    torch.testing.assert_close(sigma0 * structure.dense(), printed, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        structure.dz.copy_(sigma0 / sigma * z0 - z0)  # z = sigma0 / sigma z0 restores W
    assert structure.dense().abs().max() < 1e-12
    assert sum(p.numel() for p in structure.parameters()) == 5
    assert all(p.dim() for p in structure.parameters())


def test_gradient_is_the_papers():
    """d / d z_i = sigma l_i^T G u_i, G = g^T x; d / d sigma = sum_i z_i l_i^T G u_i."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9)).double()
    st.adapt(model, st.loldu(rank=4, alpha=3))
    adapter = model[0].adapters["default"]
    s = adapter.structure
    shake(model)
    x, g = torch.randn(11, 7, dtype=torch.float64), torch.randn(11, 9, dtype=torch.float64)
    (model(x) * g).sum().backward()
    along = ((s.L.t() @ g.t() @ x) * s.U).sum(1)
    sigma = adapter.scale * (1 + s.dsigma.detach())
    torch.testing.assert_close(s.dz.grad, sigma * along)
    torch.testing.assert_close(s.dsigma.grad, adapter.scale * (along @ (s.start + s.dz.detach()))[None])


@pytest.mark.parametrize("kind", ["column", "row", "duplicate", "zero", "low rank", "block"])
def test_zero_pivots(kind):
    torch.manual_seed(0)
    W = torch.randn(9, 8, dtype=torch.float64)
    if kind == "column":
        W[:, 0] = 0
    elif kind == "row":
        W[[1, 2]] = 0
    elif kind == "duplicate":
        W[:, 3] = W[:, 1]
    elif kind == "zero":
        W.zero_()
    elif kind == "low rank":
        W = torch.randn(9, 3, dtype=torch.float64) @ torch.randn(3, 8, dtype=torch.float64)
    else:
        W[:, :4] = 0
    for unit in (True, False):
        s = factored(W, unit=unit)
        assert all(t.isfinite().all() for t in (s.L, s.U, s.start))
        assert ((s.L * s.start) @ s.U - W).norm() <= 1e-12 * W.norm()
        assert s.U.norm(dim=1).max() < 1e4  # rounding has not become a direction
    model = nn.Sequential(nn.Linear(8, 9)).double()
    with torch.no_grad():
        model[0].weight.copy_(W)
    st.adapt(model, st.loldu(rank=8))
    model(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad.isfinite().all() for _, p in st.trainable_parameters(model))


def test_ties_between_pivots_do_not_matter_to_a_file(tmp_path):
    """Every entry ties: whichever rows were chosen, the file says so and the factors follow it."""
    H = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    W = torch.kron(torch.kron(H, H), H)
    order = torch.tensor([5, 2, 7, 0])
    model, other = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.copy_(W)
    other.load_state_dict(model.state_dict())
    st.adapt(model, st.loldu(rank=4))
    s = model[0].adapters["default"].structure
    assert not torch.equal(s.pivots, order)
    L, D, U = ldu(W[:, :4].double(), W[order].double(), order)
    with torch.no_grad():  # as another LAPACK might have settled them
        s.pivots.copy_(order)
        s.start.copy_(D * L.norm(dim=0) * U.norm(dim=1))
        s.dz.normal_()
    s.prepare(lambda dtype: W)
    st.save(model, tmp_path)
    st.load(other, tmp_path)
    assert torch.equal(other[0].adapters["default"].structure.pivots, order)
    x = torch.randn(5, 8)
    assert torch.equal(other(x), model(x))


def test_file_holds_what_was_trained_and_no_factors(tmp_path):
    """The published code forgets sigma, and keeps a dense P of size O x O."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Embedding(50, 6))
    st.adapt(model, st.loldu(rank=4, start="normal"), ["0", "1"])
    shake(model)
    base = copy.deepcopy(model)
    st.remove(base, "default")
    st.save(model, tmp_path)
    assert sum(t.numel() for t in st.io.own_tensors(model, "default").values()) == 2 * (4 + 1 + 4 + 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        st.load(base, tmp_path)
    x = torch.randn(3, 30)
    assert torch.equal(base[0](x), model[0](x))
    assert all(p.dim() for p in base.parameters())


def test_another_base_is_noticed(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    base = copy.deepcopy(model).bfloat16()
    st.adapt(model, st.loldu(rank=64))
    shake(model)
    st.save(model, tmp_path)
    with pytest.warns(UserWarning, match="not the one this adapter was trained on"):
        st.load(base, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_is_never_edited(dtype):
    """The published disable and remove leave the residual in the layer, and bf16 rounds it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    weight, x = model[0].weight.detach().clone(), torch.randn(3, 64).to(dtype)
    y = model(x)
    st.adapt(model, st.loldu(rank=32))
    assert torch.equal(model(x), y) and torch.equal(model[0].weight, weight)
    shake(model)
    assert not torch.equal(model(x), y)
    with st.disabled(model):
        assert torch.equal(model(x), y)
    with st.merged(model):
        pass
    st.remove(model, "default")
    assert torch.equal(model(x), y) and torch.equal(model[0].weight, weight)


def test_small_layers_have_as_many_directions_as_they_can():
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(2, 3, 3), nn.Linear(80, 70))
    st.adapt(model, st.loldu(rank=64), ["0", "1", "2"])
    assert [row.rank for row in st.summary(model).rows] == [4, 3, 64]
    assert [m.adapters["default"].scale.item() for m in model] == [1, 1, 1]
    with pytest.raises(st.StructureError, match="rank must be a whole number of at least 1, got 0"):
        st.LDU(4, 4, rank=0)
    with pytest.raises(st.StructureError, match="start must be one of lu, uniform"):
        st.LDU(4, 4, start="s_normal")


def test_nothing_grows_with_the_square_of_a_vocabulary():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3000, 8))
    st.adapt(model, st.loldu(rank=8), ["0"])
    s = model[0].adapters["default"].structure
    assert max(t.numel() for t in (*s.parameters(), *s.buffers())) == 8 * 3000


@pytest.mark.parametrize("rows", [2, 400])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_thin_and_dense_products_agree(rows, dropout):
    """At a high rank with many rows one product with W + dW is cheaper; it is the same layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20)).double()
    st.adapt(model, st.loldu(rank=20, dropout=dropout))
    shake(model)
    s = model[0].adapters["default"].structure
    assert s._weight_pays(rows) == (rows == 400)
    x = torch.randn(rows, 24, dtype=torch.float64, requires_grad=True)
    wanted = [*s.parameters(), x]

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), wanted)

    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    W, bias, scale = model[0].weight, model[0].bias, model[0].adapters["default"].scale
    thin = diagonal_linear(x, W, bias, s.L, s.coefficients(), s.U, scale, dropout)
    torch.testing.assert_close(y, thin)
    for a, b in zip(gradients(y), gradients(thin), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_second_derivatives(dropout):
    torch.manual_seed(0)
    x, c = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((5, 4), (2,)))
    W, L, U = (torch.randn(*n, dtype=torch.float64) for n in ((3, 4), (3, 2), (2, 4)))

    def f(x, c):
        torch.manual_seed(2)
        return diagonal_linear(x, W, None, L, c, U, torch.tensor(0.7, dtype=torch.float64), dropout)

    assert torch.autograd.gradcheck(f, (x, c))
    assert torch.autograd.gradgradcheck(f, (x, c))


@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_of_the_elimination_change_nothing(block):
    torch.manual_seed(0)
    W = torch.randn(11, 7, dtype=torch.float64)
    W[:, 2] = 0
    rows = pivot_rows(W)
    for a, b in zip(ldu(W, W[rows], rows, block), ldu(W, W[rows], rows, 2), strict=True):
        torch.testing.assert_close(a, b)
