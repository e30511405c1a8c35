"""Kronecker, Hadamard and Khatri-Rao changes against torch, PEFT and algebra."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimtune as st
from slimtune.ops import hadamard_factors, khatri_rao, kronecker_linear
from slimtune.ops.products import balanced_sizes, factor_pair

DOUBLE = torch.float64
SIZES = [(12, 12), (12, 8), (8, 12), (15, 9), (7, 5), (13, 12)]
sizes = pytest.mark.parametrize(("O", "I"), SIZES, ids=str)


def filled(structure):
    """Every parameter drawn from N(0, 1)."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in structure.parameters():
            p.normal_()
    return structure


def count(structure):
    return sum(p.numel() for p in structure.parameters())


def rank(matrix):
    return int(torch.linalg.matrix_rank(matrix))


# Kronecker


@pytest.mark.parametrize(("left", "right"), [((2, 3), (4, 5)), ((6, 2), (1, 7)), ((1, 5), (3, 2)), ((3, 1), (2, 6))])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (60, 5)], ids=str)
def test_kronecker_product_of_either_order(left, right, lead):
    """Values and gradients of W + s kron, and of kron alone, against torch.kron."""
    torch.manual_seed(0)
    w1, w2 = (torch.randn(*s, dtype=DOUBLE, requires_grad=True) for s in (left, right))
    W = torch.randn(left[0] * right[0], left[1] * right[1], dtype=DOUBLE)
    bias, scale = torch.randn(len(W), dtype=DOUBLE), torch.tensor(0.7, dtype=DOUBLE)
    x = torch.randn(*lead, W.shape[1], dtype=DOUBLE, requires_grad=True)
    for b in (None, bias):
        fast = kronecker_linear(x, W, b, w1, w2, scale)
        slow = nn.functional.linear(x, W + scale * torch.kron(w1, w2), b)
        check(fast, slow, [x, w1, w2])
    check(kronecker_linear(x, None, None, w1, w2), x @ torch.kron(w1, w2).T, [x, w1, w2])


def check(fast, slow, wanted):
    torch.testing.assert_close(fast, slow)
    probe = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, wanted, probe), torch.autograd.grad(slow, wanted, probe), strict=True):
        torch.testing.assert_close(a, b)


def test_kronecker_of_inputs_that_are_not_contiguous():
    torch.manual_seed(0)
    w1, w2 = (torch.randn(*s, dtype=DOUBLE, requires_grad=True) for s in ((2, 3), (4, 2)))
    whole = torch.randn(6, 9, dtype=DOUBLE, requires_grad=True)
    for x in (whole[:, 2:8], whole.t()[:, :6], whole[::2, 1:7], whole[:1, :6].expand(4, 6)):
        check(kronecker_linear(x, None, None, w1, w2), x @ torch.kron(w1, w2).T, [whole, w1, w2])
        y = kronecker_linear(x, None, None, w1, w2)
        (again,) = torch.autograd.grad(y.sum(), [w1])  # an expanded gradient
        torch.testing.assert_close(again, torch.autograd.grad((x @ torch.kron(w1, w2).T).sum(), [w1])[0])


def test_kronecker_second_derivatives():
    torch.manual_seed(0)
    w1, w2, x = (torch.randn(*s, dtype=DOUBLE, requires_grad=True) for s in ((2, 3), (2, 2), (3, 6)))
    W, s = torch.randn(4, 6, dtype=DOUBLE), torch.tensor(0.7, dtype=DOUBLE)
    assert torch.autograd.gradgradcheck(lambda x, a, b: kronecker_linear(x, W, None, a, b, s), (x, w1, w2))


class Shapes(TorchDispatchMode):
    """The shapes of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and "view" not in str(function) and str(function) != "aten.t.default":
                self.seen.add(tuple(t.shape))
        return out


@pytest.mark.parametrize("recipe", [st.kronecker(), st.lokr(rank=2)], ids=["kronecker", "lokr"])
def test_the_forward_never_makes_the_kronecker_product(recipe):
    """SURM's code and PEFT's LoKr build the (O, I) matrix in every forward, and keep it."""
    O, I = 96, 128
    model = nn.Sequential(nn.Linear(I, O))
    st.adapt(model, recipe, ["0"])
    filled(model[0].adapters["default"].structure)
    x = torch.randn(500, I, requires_grad=True)
    with Shapes() as shapes:
        y = model(x)
    assert (500, O) in shapes.seen
    y.sum().backward()
    assert not [s for s in shapes.seen if math.prod(s) == O * I and len(s) > 1 and s[0] != 500]


def test_order_of_the_factors():
    """kron(B, A), not kron(A, B), which one of SURM's layers computes: blocks of A weighted by B's entries."""
    structure = filled(st.Kronecker(12, 8, rank=2, dtype=DOUBLE))
    B, A = structure.w1, structure.w2
    assert B.shape == (12 // 2, 2) and A.shape == (2, 8 // 2)
    dW = structure.dense()
    for p, q, s, t in itertools.product(range(6), range(2), range(2), range(4)):
        assert dW[p * 2 + s, q * 4 + t] == B[p, q] * A[s, t]
    assert not torch.allclose(dW, torch.kron(A, B))


@pytest.mark.parametrize("options", [{}, {"factor": -1}, {"rank": 2, "factor": -1, "split": "both"}], ids=str)
def test_one_factor_starts_at_zero_and_only_one(options):
    """Both at zero, as SURM's tied factors are, would get zero gradients for ever."""
    structure = st.Kronecker(12, 8, dtype=DOUBLE, **options)
    structure.reset_parameters()
    assert not structure.dense().any()
    structure(torch.randn(3, 8, dtype=DOUBLE)).square().sum().backward()
    structure(torch.randn(3, 8, dtype=DOUBLE)).sum().backward()
    zero = {n for n, p in structure.named_parameters() if not p.any()}
    assert zero == {"w1_a"} if "split" in options else {"w1"}
    assert {n for n, p in structure.named_parameters() if p.grad.any()} == zero


@sizes
def test_kronecker_rank_and_norm_and_count(O, I):
    for options in ({}, {"factor": -1}, {"rank": 1, "factor": -1, "split": "both"}):
        structure = filled(st.Kronecker(O, I, dtype=DOUBLE, **options))
        w1, w2 = structure.factors()
        dW = structure.dense()
        assert rank(dW) == rank(w1) * rank(w2)
        torch.testing.assert_close(dW.norm(), w1.norm() * w2.norm())
        (a, b), (c, d) = w1.shape, w2.shape
        assert (a * c, b * d) == (O, I)
        B, A = structure.exact_factors()
        torch.testing.assert_close(B @ A, dW)
        split = "split" in options
        assert B.shape[1] == (1 if split else min(a, b) * min(c, d))
        assert count(structure) == (a + b + c + d if split else O + I if not options else a * b + c * d)


@pytest.mark.parametrize(("O", "I", "r"), [(12, 12, 2), (12, 12, 3), (24, 36, 4), (64, 16, 4)])
def test_kronecker_rank_is_r_squared(O, I, r):
    structure = filled(st.Kronecker(O, I, rank=r, dtype=DOUBLE))
    assert rank(structure.dense()) == r * r and count(structure) == O + I


def test_kronecker_chooses_the_rank_that_gives_the_most():
    assert st.Kronecker(768, 768).rank in (24, 32)
    assert st.Kronecker(512, 1408).rank == 32
    assert st.Kronecker(7, 5).rank == 1
    for O, I in SIZES:
        chosen = st.Kronecker(O, I)
        every = [r for r in range(1, math.gcd(O, I) + 1) if math.gcd(O, I) % r == 0]
        best = max(min(r, O // r) * min(r, I // r) for r in every)
        assert min(chosen.left) * min(chosen.right) == best


def test_kronecker_refusals_name_what_would_do():
    with pytest.raises(st.StructureError, match="rank 5 does not divide both 12 and 8; it can be 1, 2, 4, or"):
        st.Kronecker(12, 8, rank=5)
    with pytest.raises(st.StructureError, match="5 rows of w1 do not divide 12; it can be 1, 2, 3, 4, 6, 12"):
        st.Kronecker(12, 8, left=(5, 2))
    with pytest.raises(st.StructureError, match="factor or left, not both"):
        st.Kronecker(12, 8, left=(3, 2), factor=-1)
    with pytest.raises(st.StructureError, match="split='auto' needs a rank"):
        st.Kronecker(12, 8, factor=-1, split="auto")
    with pytest.raises(st.StructureError, match="factor must be -1 or"):
        st.Kronecker(12, 8, factor=0)
    with pytest.raises(st.StructureError, match="left must be two whole numbers"):
        st.Kronecker(12, 8, left=3)


@pytest.mark.parametrize("structure", [st.Kronecker, st.KhatriRao], ids=lambda c: c.__name__)
def test_options_rebuild_the_chosen_shapes(structure):
    kwargs = {st.Kronecker: {"rank": 2, "factor": -1, "split": "auto-both"}, st.KhatriRao: {"factors": 3}}[structure]
    first = structure(30, 42, **kwargs)
    again = structure(30, 42, **first.options())
    assert {n: p.shape for n, p in first.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
    assert first.options() == again.options()


# what PEFT has


@pytest.mark.parametrize("factor", [-1, 2, 4, 7, 16, 500])
def test_factor_pairs_are_pefts(factor):
    lokr = pytest.importorskip("peft.tuners.lokr.layer")
    for n in [*range(1, 200), 384, 768, 1408, 4096, 11008, 30522, 32000]:
        assert factor_pair(n, factor) == lokr.factorization(n, factor), n


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("factor", [-1, 4])
@pytest.mark.parametrize("r", [1, 2, 3, 8])
@sizes
def test_lokr_is_pefts(O, I, r, factor, both):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(I, O))
    config = peft.LoKrConfig(
        r=r, alpha=6, target_modules=["0"], decompose_factor=factor, decompose_both=both, init_weights=False
    )
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(I, O)), config).base_model.model[0]
    st.adapt(model, st.lokr(r, 6, factor, both), ["0"])
    ours = model[0].adapters["default"]
    state = {
        key: getattr(theirs, f"lokr_{key}")["default"].detach()
        for key in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
        if "default" in getattr(theirs, f"lokr_{key}")
    }
    ours.structure.load_state_dict(state)
    torch.testing.assert_close(ours.dense(), theirs.get_delta_weight("default"))


@sizes
def test_loha_is_pefts(O, I):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(I, O))
    config = peft.LoHaConfig(r=3, alpha=5, target_modules=["0"], init_weights=False)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(I, O)), config).base_model.model[0]
    st.adapt(model, st.loha(3, 5), ["0"])
    ours = model[0].adapters["default"]
    keys = ("w1_a", "w1_b", "w2_a", "w2_b")
    ours.structure.load_state_dict({key: getattr(theirs, f"hada_{key}")["default"].detach() for key in keys})
    torch.testing.assert_close(ours.dense(), theirs.get_delta_weight("default"))


# Hadamard


@sizes
@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (2, 3)], ids=str)
def test_hadamard_identity_and_rank_and_count(O, I, ranks):
    structure = filled(st.Hadamard(O, I, rank=ranks[0], second_rank=ranks[1], dtype=DOUBLE))
    dW = structure.dense()
    entry = torch.einsum("or,ri,os,si->oi", structure.w1_a, structure.w1_b, structure.w2_a, structure.w2_b)
    torch.testing.assert_close(dW, entry)
    B, A = structure.exact_factors()
    assert B.shape == (O, math.prod(ranks)) and A.shape == (math.prod(ranks), I)
    torch.testing.assert_close(B @ A, dW)
    assert rank(dW) == min(O, I, math.prod(ranks))
    assert count(structure) == sum(ranks) * (O + I)


def test_hadamard_factors_are_the_khatri_rao_identity():
    torch.manual_seed(0)
    B1, A1, B2, A2 = (torch.randn(*s, dtype=DOUBLE) for s in ((5, 2), (2, 4), (5, 3), (3, 4)))
    B, A = hadamard_factors(B1, A1, B2, A2)
    torch.testing.assert_close(B[2], torch.kron(B1[2], B2[2]))
    torch.testing.assert_close(A[:, 1], torch.kron(A1[:, 1], A2[:, 1]))


# Khatri-Rao


def test_khatri_rao_is_kron_in_every_column():
    torch.manual_seed(0)
    F = [torch.randn(n, 4, dtype=DOUBLE) for n in (2, 3, 5)]
    product = khatri_rao(F)
    for i in range(4):
        torch.testing.assert_close(product[:, i], torch.kron(torch.kron(F[0][:, i], F[1][:, i]), F[2][:, i]))
    B1, A1, B2, A2 = (torch.randn(*s, dtype=DOUBLE) for s in ((3, 2), (2, 4), (5, 3), (3, 4)))
    torch.testing.assert_close(khatri_rao([B1 @ A1, B2 @ A2]), torch.kron(B1, B2) @ khatri_rao([A1, A2]))


@sizes
@pytest.mark.parametrize("orientation", ["columns", "rows"])
@pytest.mark.parametrize("factors", [2, 3])
def test_khatri_rao_definition_and_count(O, I, orientation, factors):
    """Entry by entry, sizes that do not factor padded and cut."""
    structure = filled(st.KhatriRao(O, I, factors=factors, orientation=orientation, dtype=DOUBLE))
    tall, wide = (O, I) if orientation == "columns" else (I, O)
    dW = structure.dense() if orientation == "columns" else structure.dense().T
    assert dW.shape == (tall, wide)
    F = structure.factors()
    for n, index in zip(range(tall), itertools.product(*map(range, structure.sizes)), strict=False):
        row = torch.stack([f[j] for f, j in zip(F, index, strict=True)]).prod(0)
        torch.testing.assert_close(dW[n], row)
    assert count(structure) == wide * sum(structure.sizes)
    assert rank(dW) == min(O, I)
    assert structure.exact_factors() is None


@sizes
@pytest.mark.parametrize("orientation", ["columns", "rows"])
def test_khatri_rao_of_low_rank_factors(O, I, orientation):
    r = 2
    structure = filled(st.KhatriRao(O, I, rank=r, orientation=orientation, dtype=DOUBLE))
    B, A = structure.exact_factors()
    dW = structure.dense()
    assert B.shape == (O, r * r) and A.shape == (r * r, I)
    torch.testing.assert_close(B @ A, dW)
    assert rank(dW) <= r * r
    wide = I if orientation == "columns" else O
    assert count(structure) == r * (sum(structure.sizes) + 2 * wide)
    if orientation == "columns" and math.prod(structure.sizes) == O:  # the token-wise identity of the survey's form
        x = torch.randn(5, I, dtype=DOUBLE)
        z = (x @ khatri_rao([structure.A1, structure.A2]).T).view(5, r, r)
        y = torch.einsum("ip,tpq,jq->tij", structure.B1, z, structure.B2).flatten(1)
        torch.testing.assert_close(structure(x), y)


def test_khatri_rao_chain_of_a_token():
    """y = vec(B diag(x) C^T)."""
    structure = filled(st.KhatriRao(12, 5, dtype=DOUBLE))
    B, C = structure.factors()
    x = torch.randn(5, dtype=DOUBLE)
    torch.testing.assert_close(structure(x), (B @ torch.diag(x) @ C.T).flatten())


def test_khatri_rao_gradients_by_hand():
    """dF1[p, n] = sum_j G[(p, j), n] F2[j, n], dF2[j, n] = sum_p G[(p, j), n] F1[p, n]."""
    structure = filled(st.KhatriRao(12, 5, dtype=DOUBLE))
    F1, F2 = structure.factors()
    x, g = torch.randn(7, 5, dtype=DOUBLE), torch.randn(7, 12, dtype=DOUBLE)
    G = (g.T @ x).view(len(F1), len(F2), 5)
    model = nn.Sequential(nn.Linear(5, 12, bias=False)).double()
    for rows in (7, 700):  # the two products, and the one with W + dW
        st.adapt(model, st.Recipe(st.KhatriRao), ["0"])
        model[0].adapters["default"].structure.load_state_dict(structure.state_dict())
        xs, gs = x.repeat(rows // 7, 1), g.repeat(rows // 7, 1) * 7 / rows
        (model(xs) * gs).sum().backward()
        made = model[0].adapters["default"].structure
        torch.testing.assert_close(made.F1.grad, torch.einsum("pjn,jn->pn", G, F2))
        torch.testing.assert_close(made.F2.grad, torch.einsum("pjn,pn->jn", G, F1))
        st.remove(model, "default")


def test_balanced_sizes_are_the_smallest_that_are_balanced():
    for n in [*range(1, 300), 384, 768, 1408, 30522]:
        for k in (2, 3):
            sizes = balanced_sizes(n, k)
            assert len(sizes) == k and math.prod(sizes) >= n
            assert sum(sizes) <= 1.25 * k * math.prod(sizes) ** (1 / k) + 1e-9
            if n >= 100:
                assert math.prod(sizes) <= 1.1 * n
    assert balanced_sizes(4096, 4) == [8, 8, 8, 8] and balanced_sizes(4096, 2) == [64, 64]


def test_khatri_rao_counts_of_the_survey():
    """At 4096 x 4096: 131k for a chain of four or for rank 16, 524k for a chain of two; LoRA at rank 16 has 131k."""
    with torch.device("meta"):
        assert count(st.KhatriRao(4096, 4096, factors=4)) == 131_072
        assert count(st.KhatriRao(4096, 4096)) == 524_288
        assert count(st.KhatriRao(4096, 4096, rank=16)) == 16 * (64 + 64 + 2 * 4096)


def test_khatri_rao_refusals():
    with pytest.raises(st.StructureError, match=r"product of at least 12, got \[3, 3\]; \[3, 4\] would do"):
        st.KhatriRao(12, 5, sizes=[3, 3])
    with pytest.raises(st.StructureError, match="factors must be a whole number from 2 to 64, got 1"):
        st.KhatriRao(12, 5, factors=1)
    with pytest.raises(st.StructureError, match="orientation must be 'columns' or 'rows'"):
        st.KhatriRao(12, 5, orientation="diagonal")
    with pytest.raises(st.StructureError, match="second_rank must be a whole number"):
        st.Hadamard(12, 5, second_rank=0)


@pytest.mark.parametrize(
    ("structure", "options"),
    [
        (st.Kronecker, {"factor": -1}),
        (st.Hadamard, {"rank": 2}),
        (st.KhatriRao, {}),
        (st.KhatriRao, {"factors": 3, "orientation": "rows"}),
        (st.KhatriRao, {"rank": 2, "orientation": "rows"}),
    ],
    ids=str,
)
@sizes
def test_columns_are_those_of_the_definition(structure, options, O, I):
    made = filled(structure(O, I, dtype=DOUBLE, **options))
    index = torch.tensor([[0, I - 1, 3], [1, 0, I // 2]])
    torch.testing.assert_close(made.columns(index), made.dense().T[index])


@pytest.mark.parametrize("recipe", [st.kronecker, st.lokr, st.loha, st.lokh], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [0, -1, 2.5, "8", True], ids=str)
def test_recipes_refuse_impossible_ranks(recipe, bad):
    with pytest.raises(st.StructureError, match=f"{recipe.__name__}: rank must be a whole number of at least 1"):
        recipe(rank=bad)
