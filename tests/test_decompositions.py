"""Decompositions against definitions, closed forms and other libraries; no half-step raises an objective."""

import math

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.compress import describe_structures, shape_as
from slimtune.errors import DivergenceError, StructureError
from slimtune.factors import Part
from slimtune.ops import decompositions as d

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def tail(A, k):
    return torch.linalg.svdvals(A)[..., k:].square().sum(-1)


def error(A, found):
    return (found.dense() - A).square().sum((-2, -1))


def never_rises(trace, scale):
    assert len(trace) > 2
    assert float((trace.diff(dim=0) / scale).max()) <= 1e-12


# ---------------------------------------------------------------- least squares


def test_als_reaches_eckart_and_young_in_a_batch():
    A = draw(3, 14, 11)
    found = d.als(A, 4, sweeps=3000, tolerance=1e-14)
    assert found.converged and found.left.shape == (3, 14, 4) and found.trace.shape[1:] == (3,)
    torch.testing.assert_close(error(A, found), tail(A, 4), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.trace[-1], error(A, found))
    never_rises(found.trace, A.square().sum())
    alone = [d.als(a, 4, start=draw(3, 14, 4)[i], sweeps=20, tolerance=0.0) for i, a in enumerate(A)]
    torch.testing.assert_close(
        d.als(A, 4, start=draw(3, 14, 4), sweeps=20, tolerance=0.0).dense(), torch.stack([x.dense() for x in alone])
    )


@pytest.mark.parametrize("ridge", [(2.0, 2.0), (0.5, 3.0)])
def test_ridges_at_full_rank_lower_singular_values(ridge):
    A = draw(12, 9)
    found = d.als(A, 9, ridge, sweeps=5000, tolerance=1e-16)
    expected, _ = st.ops.singular_threshold(A, math.sqrt(ridge[0] * ridge[1]))
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-6)
    never_rises(found.trace, A.square().sum())


def slow_half_step(A, o, W, ridge):
    """Column by column, by lstsq on the rows that count."""
    columns = []
    for n in range(A.shape[1]):
        root = o[:, n].sqrt()
        M = torch.cat([root[:, None] * W, math.sqrt(ridge) * torch.eye(W.shape[1], dtype=F64)])
        columns.append(torch.linalg.lstsq(M, torch.cat([root * A[:, n], torch.zeros(W.shape[1], dtype=F64)])).solution)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("kind", ["mask", "weights"])
def test_weighted_half_steps_are_row_by_row_least_squares(kind):
    A, W = draw(10, 13), draw(10, 3, seed=1)
    o = draw(10, 13, seed=2)
    o = (o > -0.7).to(F64) if kind == "mask" else o.abs()
    found = d.als(A, 3, (0.3, 0.1), o, start=W, sweeps=1)
    Z = slow_half_step(A, o, W, 0.1)
    torch.testing.assert_close(found.right, Z)
    torch.testing.assert_close(found.left, slow_half_step(A.T, o.T, Z.T, 0.3).T)
    never_rises(d.als(A, 3, (0.3, 0.1), o).trace, A.square().sum())
    unit = d.als(A, 3, (0.3, 0.1), torch.ones(1, 1), start=W, sweeps=7, tolerance=0.0)
    torch.testing.assert_close(unit.dense(), d.als(A, 3, (0.3, 0.1), start=W, sweeps=7, tolerance=0.0).dense())


def test_missing_entries_are_found_again_and_never_read():
    A = draw(20, 3) @ draw(3, 15, seed=1)
    mask = draw(20, 15, seed=2) > -0.6
    found = d.als(torch.where(mask, A, torch.nan), 3, weights=mask, sweeps=3000, tolerance=1e-18)
    torch.testing.assert_close(found.dense(), A, rtol=0, atol=1e-5)
    mask[4] = False
    assert float(d.als(A, 3, weights=mask).left[4].norm()) == 0  # the smallest solution of no equations


def test_als_of_deficient_matrices_is_exact():
    A = draw(9, 2) @ draw(2, 8, seed=1)
    found = d.als(A, 5, sweeps=20)
    assert float(error(A, found)) < 1e-20 * float(A.square().sum())
    assert float(d.als(torch.zeros(4, 3), 2).dense().norm()) == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_autograd(weighted):
    A, W, Z = draw(6, 5), draw(6, 2, seed=1).requires_grad_(), draw(2, 5, seed=2).requires_grad_()
    o = draw(6, 5, seed=3).abs() if weighted else None
    E = (W @ Z - A).square()
    ((E if o is None else o * E).sum() + 0.3 * W.square().sum() + 0.7 * Z.square().sum()).backward()
    torch.testing.assert_close((W.grad, Z.grad), d.factor_gradients(A, W, Z, (0.3, 0.7), o))
    four = [draw(*s, seed=i).requires_grad_() for i, s in enumerate([(6, 2), (2, 5), (6, 3), (3, 5)])]
    E = ((four[0] @ four[1]) * (four[2] @ four[3]) - A).square() / 2
    (E if o is None else o * E).sum().backward()
    torch.testing.assert_close(tuple(t.grad for t in four), d.hadamard_gradients(A, *four, o))


def test_gradient_descent_reaches_what_als_reaches():
    A = draw(2, 12, 9)
    found = d.gradient_descent(A, 3, (0.2, 0.2), steps=20000, tolerance=1e-12)
    never_rises(found.trace, A.square().sum())
    best = d.als(A, 3, (0.2, 0.2), sweeps=3000, tolerance=1e-14)
    torch.testing.assert_close(found.trace[-1], best.trace[-1], rtol=1e-6, atol=0)


def test_stochastic_descent_does_what_is_printed():
    A, mask = draw(4, 5), torch.zeros(4, 5)
    mask[1, 2] = 1
    one = d.stochastic_descent(A, 2, (0.1, 0.2), mask, bias=True, rate=0.05, epochs=1, seed=3)
    g = torch.Generator().manual_seed(3)
    W, Z = (0.1 * torch.randn(n, 2, generator=g, dtype=F64) for n in (4, 5))
    w, z, mu = W[1].clone(), Z[2].clone(), A[1, 2]
    e = mu + w @ z - A[1, 2]
    W[1] -= 0.05 * (e * z + 0.1 * w)
    Z[2] -= 0.05 * (e * w + 0.2 * z)
    torch.testing.assert_close((one.left, one.right), (W, Z.T))
    torch.testing.assert_close((one.row[1], one.column[2]), (-0.05 * e, -0.05 * e))
    assert float(one.mean) == float(mu) and float(one.row[0]) == 0


def test_biases_explain_what_they_should():
    A = 3 + draw(15, 1) + draw(1, 12, seed=1) + 0.5 * draw(15, 2, seed=2) @ draw(2, 12, seed=3)
    mask = draw(15, 12, seed=4) > -0.8
    kept = {"rate": 0.05, "epochs": 300, "batch": 16}
    found = d.stochastic_descent(A, 2, (1e-4, 1e-4), mask, bias=True, **kept)
    assert float((found.dense() - A)[mask].square().mean()) == pytest.approx(float(found.trace[-1]))
    assert float(found.trace[-1]) < 1e-3 * float(A.var())
    assert found.trace[-1] < d.stochastic_descent(A, 2, (1e-4, 1e-4), mask, **kept).trace[-1]
    with pytest.raises(DivergenceError, match="lower rate"):
        d.stochastic_descent(A, 2, rate=50.0, epochs=20)


def test_nmf_takes_scikit_learns_steps():
    decomposition = pytest.importorskip("sklearn.decomposition")
    A = draw(9, 7).abs()
    W, Z = draw(9, 3, seed=1).abs(), draw(3, 7, seed=2).abs()
    ours = d.nmf(A, 3, (W, Z), sweeps=40, tolerance=0.0)
    # it updates its first factor first: the transposed problem
    theirs = decomposition.NMF(3, init="custom", solver="mu", beta_loss="frobenius", tol=0, max_iter=40)
    first = theirs.fit_transform(A.T.numpy(), W=Z.T.contiguous().numpy(), H=W.T.contiguous().numpy())
    torch.testing.assert_close(ours.dense().T, torch.from_numpy(first @ theirs.components_))
    never_rises(ours.trace, A.square().sum())
    assert bool((ours.left >= 0).all()) and bool((ours.right >= 0).all())


# ---------------------------------------------------------------- Kronecker, Khatri-Rao


def test_kronecker_svd_is_the_optimum_and_als_reaches_it():
    A = draw(2, 12, 15)
    R = torch.stack([torch.stack([b.flatten() for r in a.split(4) for b in r.split(5, 1)]) for a in A])
    assert torch.equal(d.kronecker_arrangement(A, (3, 3)), R)
    for k in (1, 2, 9):
        found = d.kronecker_svd(A, (3, 3), k)
        torch.testing.assert_close(error(A, found), tail(R, k), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.trace[-1], tail(R, k), rtol=1e-9, atol=1e-9)
    slow = sum(torch.kron(B, C) for B, C in zip(found.left[0], found.right[0], strict=True))
    torch.testing.assert_close(slow, found.dense()[0])
    for k in (1, 2):
        step = d.kronecker_als(A, (3, 3), k, sweeps=5000, tolerance=1e-15)
        torch.testing.assert_close(error(A, step), tail(R, k), rtol=1e-6, atol=0)
        never_rises(step.trace, A.square().sum())


def test_khatri_rao_svd_is_the_optimum_and_als_reaches_it():
    A = draw(2, 12, 7)
    columns = A.mT.reshape(2, 7, 4, 3)
    for k in (1, 3):
        found = d.khatri_rao_svd(A, (4, 3), k)
        best = tail(columns, k).sum(-1)
        torch.testing.assert_close(error(A, found), best, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.trace[-1], best, rtol=1e-9, atol=1e-9)
    F, G = (f[0] for f in d.khatri_rao_svd(A, (4, 3)).factors)
    torch.testing.assert_close(st.ops.khatri_rao([F[0], G[0]]), d.khatri_rao_svd(A, (4, 3)).dense()[0])
    step = d.khatri_rao_als(A, (4, 3), sweeps=3000, tolerance=1e-15)
    torch.testing.assert_close(error(A, step), tail(columns, 1).sum(-1), rtol=1e-6, atol=0)
    never_rises(step.trace, A.square().sum())


@pytest.mark.parametrize("seed", [None, 3])
def test_three_factors_are_found_again(seed):
    planted = st.ops.khatri_rao([draw(n, 6, seed=n) for n in (2, 3, 4)])
    found = d.khatri_rao_als(planted, (2, 3, 4), sweeps=500, tolerance=1e-18, seed=seed)
    assert float(error(planted, found)) < 1e-12 * float(planted.square().sum())
    noisy = d.khatri_rao_als(draw(24, 6), (2, 3, 4), seed=seed)
    never_rises(noisy.trace, noisy.trace[0])
    torch.testing.assert_close(noisy.trace[-1], error(draw(24, 6), noisy))
    norms = torch.stack([f.norm(dim=-2) for f in noisy.factors])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


# ---------------------------------------------------------------- Hadamard


def test_hadamard_from_the_svd_is_never_worse_and_never_rises():
    A = draw(2, 30, 24)
    found = d.hadamard_als(A, (3, 3), sweeps=60)
    assert bool((found.trace[0] <= tail(A, 3) * (1 + 1e-6)).all())
    never_rises(found.trace, A.square().sum())
    assert bool((error(A, found) < tail(A, 6)).all())  # Gaussian: better than the SVD of as many numbers
    polished = d.hadamard_descent(A, found[:4], steps=300)
    never_rises(polished.trace, A.square().sum())
    assert bool((error(A, polished) <= error(A, found) * (1 + 1e-9)).all())
    torch.testing.assert_close(polished.trace[-1], error(A, polished))


@pytest.mark.parametrize("missing", [False, True])
def test_a_planted_hadamard_product_is_found_again(missing):
    A = (draw(20, 2) @ draw(2, 16, seed=1)) * (draw(20, 2, seed=2) @ draw(2, 16, seed=3))
    mask = draw(20, 16, seed=4) > -1.4 if missing else None
    seen = A if mask is None else torch.where(mask, A, torch.nan)
    found = d.hadamard_als(seen, (2, 2), mask, starts=4, sweeps=250, tolerance=1e-16)
    assert float(error(A, found)) < 1e-10 * float(A.square().sum())
    never_rises(found.trace, A.square().sum())


def test_a_hadamard_half_step_is_row_by_row_least_squares():
    A, start = draw(6, 5), [draw(*s, seed=i) for i, s in enumerate([(6, 2), (2, 5), (6, 3), (3, 5)])]
    H = start[2] @ start[3]
    best = 0.0
    for m in range(6):
        M = (start[1] * H[m]).T
        c = torch.linalg.lstsq(M, A[m]).solution
        best += float((M @ c - A[m]).square().sum())
    found = d.hadamard_als(A, (2, 3), start=start, sweeps=1, ridge=1e-14, tolerance=0.0)
    torch.testing.assert_close(float(found.trace[1]), best)


def test_the_best_start_of_each_matrix_is_kept():
    A = draw(3, 12, 10)
    each = [d.hadamard_als(A, (2, 2), starts=n, sweeps=25, seed=5).trace[-1] for n in (1, 4)]
    assert bool((each[1] <= each[0]).all()) and bool((each[1] < each[0]).any())


# ---------------------------------------------------------------- triangles and skeletons


def test_pivoted_qr_is_that_of_lapack():
    linalg = pytest.importorskip("scipy.linalg")
    for A in (draw(9, 6), draw(6, 9), draw(8, 8)):
        found = d.pivoted_qr(A)
        _, R, order = linalg.qr(A.numpy(), mode="economic", pivoting=True)
        K = min(A.shape)
        assert found.order[:K].tolist() == order[:K].tolist()  # the rest has no order
        theirs = torch.from_numpy(R)[:, torch.from_numpy(order).argsort()]
        torch.testing.assert_close(found.R[:, found.order.argsort()].abs(), theirs.abs())
        torch.testing.assert_close(found.dense(), A)
        torch.testing.assert_close(found.Q.T @ found.Q, torch.eye(K, dtype=F64))


def test_pivoted_qr_cut_leaves_the_residual_it_says():
    A = draw(2, 9, 12)
    found = d.pivoted_qr(A, 5)
    torch.testing.assert_close(found.trace[-1], error(A, found))
    alone = d.pivoted_qr(A[1], 5)
    assert torch.equal(found.order[1, :5], alone.order[:5])
    torch.testing.assert_close(found.dense()[1], alone.dense())
    low = draw(9, 3) @ draw(3, 12, seed=1)
    torch.testing.assert_close(d.pivoted_qr(low, 6).dense(), low)
    torch.testing.assert_close(
        d.pivoted_qr(low, 6).coefficients()[:, d.pivoted_qr(low, 6).order[:6]], torch.eye(6).double()
    )


def kahan(n, c=0.285):
    """Where plain pivoting fails: R is A itself, with no column exchanged."""
    s = math.sqrt(1 - c * c)
    return torch.diag(s ** torch.arange(n, dtype=F64)) @ (
        torch.eye(n, dtype=F64) - c * torch.ones(n, n).double().triu(1)
    )


def test_strong_qr_keeps_gu_and_eisenstats_bounds_where_pivoting_does_not():
    n, f = 50, 1.5
    A = kahan(n) @ torch.diag(1 - 1e-6 * torch.arange(n, dtype=F64))  # pivoting exchanges nothing
    K = n - 1
    plain, strong = d.pivoted_qr(A, K), d.strong_qr(A, K, f)
    assert plain.order.tolist() == list(range(n)) and strong.converged
    s = torch.linalg.svdvals(A)
    c = math.sqrt(1 + f * f * K * (n - K))
    assert float(torch.linalg.svdvals(plain.R[:, :K])[-1]) < float(s[K - 1]) / c
    assert float(torch.linalg.svdvals(strong.R[:, :K])[-1]) >= float(s[K - 1]) / c
    assert float(strong.coefficients().abs().max()) <= f * (1 + 1e-9) < float(plain.coefficients().abs().max())
    assert math.sqrt(float(error(A, strong))) <= float(s[K]) * c
    assert bool((strong.trace.diff() >= math.log(f) - 1e-9).all()) and len(strong.trace) > 1


def test_qlp_is_orthogonal_triangular_and_follows_the_singular_values():
    A = draw(30, 20) @ torch.diag(2.0 ** -torch.arange(20, dtype=F64)) @ draw(20, 25, seed=1)
    found = d.qlp(A)
    torch.testing.assert_close(found.dense(), A)
    eye = torch.eye(25, dtype=F64)[:25, :25]
    torch.testing.assert_close(found.V.T @ found.V, eye)
    torch.testing.assert_close(found.U.T @ found.U, eye)
    assert torch.equal(found.T, found.T.tril())
    s = torch.linalg.svdvals(A)[:20]
    worst = [float((x.diagonal()[:20].abs() / s).log().abs().max()) for x in (found.T, d.pivoted_qr(A).R)]
    assert worst[0] < worst[1] and worst[0] < math.log(2)
    cut = d.qlp(draw(3, 8, 6), 4)
    torch.testing.assert_close(error(draw(3, 8, 6), cut), d.pivoted_qr(draw(3, 8, 6), 4).trace[-1])


def test_interpolative_against_scipy():
    interpolative = pytest.importorskip("scipy.linalg.interpolative")
    A = draw(20, 6) @ draw(6, 15, seed=1) + 1e-3 * draw(20, 15, seed=2)
    columns, _ = interpolative.interp_decomp(A.numpy(), 6, rand=False)
    found = d.interpolative(A, 6, bound=1e6)  # scipy's is plain pivoting
    assert found.columns.tolist() == columns[:6].tolist()
    theirs = interpolative.reconstruct_matrix_from_id(
        A[:, columns[:6]].numpy(), *interpolative.interp_decomp(A.numpy(), 6, rand=False)
    )
    torch.testing.assert_close(found.dense(), torch.from_numpy(theirs), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.trace[0], error(A, found))


def test_skeletons_are_exact_at_full_rank_and_hold_entries_of_a():
    A = draw(2, 14, 3) @ draw(2, 3, 11, seed=1)
    scale = A.square().sum()
    for found in (d.interpolative(A, 3), d.cur(A, 3), d.cur(A, 3, project=False)):
        assert float(error(A, found).sum() / scale) < 1e-22
    B = draw(2, 14, 11)
    one, best = d.cur(B, 4, project=False), d.cur(B, 4)
    assert bool((error(B, best) <= error(B, one)).all()) and bool((error(B, best) >= tail(B, 4)).all())
    for i in range(2):
        assert torch.equal(one.C[i], B[i][:, one.columns[i]]) and torch.equal(one.R[i], B[i][one.rows[i]])
        torch.testing.assert_close(one.dense()[i][one.rows[i]], B[i][one.rows[i]])
        slow = torch.linalg.pinv(best.C[i]) @ B[i] @ torch.linalg.pinv(best.R[i])
        torch.testing.assert_close(best.U[i], slow)


# ---------------------------------------------------------------- what all have in common

EVERY = {
    "als": lambda A: d.als(A, 2),
    "als-weighted": lambda A: d.als(A, 2, weights=A.abs()),
    "gradient": lambda A: d.gradient_descent(A, 2, steps=5),
    "nmf": lambda A: d.nmf(A.abs(), 2, sweeps=5),
    "kronecker-svd": lambda A: d.kronecker_svd(A, (2, 3)),
    "kronecker-als": lambda A: d.kronecker_als(A, (2, 3)),
    "khatri-rao-svd": lambda A: d.khatri_rao_svd(A, (2, 3)),
    "khatri-rao-als": lambda A: d.khatri_rao_als(A, (2, 3)),
    "hadamard": lambda A: d.hadamard_als(A, (2, 1), sweeps=5),
    "descent": lambda A: d.hadamard_descent(A, d.hadamard_als(A, (2, 1), sweeps=1)[:4], steps=5),
    "pivoted-qr": lambda A: d.pivoted_qr(A, 2),
    "strong-qr": lambda A: d.strong_qr(A, 2),
    "qlp": lambda A: d.qlp(A, 2),
    "interpolative": lambda A: d.interpolative(A, 2),
    "cur": lambda A: d.cur(A, 2),
}


@pytest.mark.parametrize("name", EVERY)
def test_dtypes_batches_and_refusals(name):
    make, A = EVERY[name], draw(2, 6, 9)
    assert make(A).dense().dtype is F64 and make(A.float()).dense().dtype is torch.float32
    half = make(A.bfloat16())
    assert half.dense().dtype is torch.float32 and half.dense().shape == A.shape
    torch.testing.assert_close(half.dense(), make(A.bfloat16().float()).dense())
    torch.testing.assert_close(make(A.float()).dense().double(), make(A.float().double()).dense(), rtol=1e-4, atol=1e-4)
    for bad, words in (
        (draw(6), "a matrix"),
        (torch.ones(2, 2, dtype=torch.int64), "real numbers"),
        (torch.full((6, 9), torch.nan), "finite"),
        (draw(0, 9), "real numbers"),
    ):
        with pytest.raises(StructureError, match=words):
            make(bad)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda A: d.als(A, 0), "rank must be a whole number from 1 to 9"),
        (lambda A: d.als(A, 2, (-1.0, 0.0)), "ridge must be a number of at least 0"),
        (lambda A: d.als(A, 2, weights=torch.ones(4, 4)), r"weights of shape \(4, 4\)"),
        (lambda A: d.als(A, 2, weights=-torch.ones(6, 9)), "not negative"),
        (lambda A: d.als(A, 2, start=torch.ones(6, 3)), r"expected \(6, 2\)"),
        (lambda A: d.nmf(-A.abs(), 2), "negative entries"),
        (lambda A: d.kronecker_svd(A, (4, 3)), "4 rows of left do not divide 6"),
        (lambda A: d.kronecker_svd(A, (2, 3), 7), "from 1 to 6"),
        (lambda A: d.khatri_rao_svd(A, (2, 2)), "the product 6"),
        (lambda A: d.khatri_rao_svd(A, (1, 2, 3)), "khatri_rao_als takes more"),
        (lambda A: d.hadamard_als(A, (2, 2), ridge=0.0), "above 0"),
        (lambda A: d.hadamard_als(A, (2,)), "two whole numbers"),
        (lambda A: d.hadamard_descent(A, [A, A]), "four matrices"),
        (lambda A: d.strong_qr(A, 2, 0.5), "at least 1"),
        (lambda A: d.pivoted_qr(A, 7), "from 1 to 6"),
        (lambda A: d.stochastic_descent(A[None], 2), "expected a matrix"),
        (lambda A: d.stochastic_descent(A, 2, mask=torch.zeros(6, 9)), "no entries"),
    ],
)
def test_refusals_name_what_came(call, words):
    with pytest.raises(StructureError, match=words):
        call(draw(6, 9))


# ---------------------------------------------------------------- in the place of weights

FACTORS = {
    "kronecker": (st.factors.kronecker(), lambda W, k: d.kronecker_svd(W, (4, 3), k)),
    "kronecker-left": (st.factors.kronecker(left=(8, 3)), lambda W, k: d.kronecker_svd(W, (8, 3), k)),
    "khatri-rao": (st.factors.khatri_rao(orientation="columns"), lambda W, k: d.khatri_rao_svd(W, (4, 6), k)),
    "hadamard": (
        st.factors.hadamard(sweeps=10, polish=0),
        lambda W, k: d.hadamard_als(W, (k, k), sweeps=10, tolerance=1e-6),
    ),
    "cur": (st.factors.cur(), d.cur),
    "interpolative": (
        st.factors.interpolative(nearest=False, side="columns"),
        lambda W, k: d.interpolative(W, k),
    ),
    "qr": (st.factors.qr(), d.pivoted_qr),
    "qr-strong": (st.factors.qr(bound=2.0), d.strong_qr),
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_layer_holds_what_the_decomposition_found(name):
    make, decompose = FACTORS[name]
    torch.manual_seed(0)
    layer = nn.Linear(18, 24).double()
    W, model = layer.weight.detach().clone(), nn.Sequential(layer)
    x, bias = torch.randn(3, 5, 18, dtype=F64), layer.bias.detach().clone()
    per_rank, largest = make.sizes(Part("0", W))
    for rank in sorted({1, min(2, largest)}):
        report = st.factorize(model, {"0": rank}, make)
        found = decompose(W, rank)
        torch.testing.assert_close(layer.weight, found.dense(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(model(x), x @ found.dense().T + bias, rtol=1e-9, atol=1e-12)
        numbers = report.layers[0].after - 24
        assert numbers == per_rank * rank or (name == "interpolative" and numbers == rank * (24 + 18 - rank))
        other = nn.Sequential(nn.Linear(18, 24).double())
        shape_as(other, describe_structures(model))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))
        st.expand(model)
        layer.weight.data.copy_(W)
    assert st.factorize(model, {"0": largest}, make).layers[0].after < W.numel() + 24
    st.expand(model)
    assert st.factorize(model, {"0": largest + 1}, make).layers[0].kept


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_the_interpolative_form_of_the_svd_is_the_svd(side):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 10, 3, padding=1).double()
    model, x = nn.Sequential(layer), torch.randn(2, 8, 6, 6, dtype=F64)
    W = layer.weight.detach().flatten(1)
    report = st.factorize(model, {"0": 6}, st.factors.interpolative(side=side))
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    best = (U[:, :6] * s[:6]) @ Vh[:6]
    torch.testing.assert_close(layer.weight.flatten(1), best)
    torch.testing.assert_close(model(x), torch.nn.functional.conv2d(x, best.view(10, 8, 3, 3), layer.bias, padding=1))
    assert report.after - 10 == 6 * (10 + 72 - 6) and layer.structure.T.abs().max() <= 2 + 1e-9


def test_by_rows_khatri_rao_is_that_of_the_transposed():
    W = draw(9, 12)
    held = st.factors.khatri_rao(orientation="rows")(Part("", W), 2).structure
    torch.testing.assert_close(held.dense(), d.khatri_rao_svd(W.T, (3, 4), 2).dense().T)
    free = st.factors.khatri_rao()
    assert free.sizes(Part("", draw(9, 12)))[0] == 9 * 7  # against 12 * 6
    assert free.sizes(Part("", draw(7, 11)))[1] == 0  # primes


def test_als_with_a_covariance_is_afm_and_with_weights_beats_the_svd():
    torch.manual_seed(0)
    W, x = draw(12, 9), draw(40, 9, seed=1) * torch.linspace(0, 2, 9)
    C, part = x.T @ x / 40, Part("0", W)
    held = st.factors.als(covariance={"0": C}, sweeps=3000)(part, 4).structure.dense()
    U = torch.linalg.svd(W @ x.T)[0][:, :4]
    torch.testing.assert_close(held @ x.T, U @ U.T @ W @ x.T, rtol=0, atol=1e-4)
    svd = st.factors.svd()(part, 4).structure.dense()
    for q in (draw(12, 9, seed=2).square(), draw(9, seed=3).square()):
        found = st.factors.als({"0": q}, sweeps=500)(part, 4).structure.dense()
        errors = [float((q * (M - W).square()).sum()) for M in (found, svd)]
        assert errors[0] < 0.9 * errors[1]
    best = tail(W * q.sqrt(), 4)  # weights of inputs alone have a closed form
    assert errors[0] == pytest.approx(float(best), rel=1e-6)
    torch.testing.assert_close(st.factors.als()(part, 4).structure.dense(), svd)
    for options, words in (
        ({"weights": {"0": q}, "covariance": {"0": C}}, "give one of them"),
        ({"covariance": {"0": -C}}, "semi-definite"),
        ({"covariance": {"0": C[:3]}}, "expected"),
        ({"weights": {"0": torch.ones(5)}}, r"\(5,\)"),
    ):
        with pytest.raises(StructureError, match=words):
            st.factors.als(**options)(part, 2)


@pytest.mark.parametrize("name", ["als", "cur", "qr"])
def test_groups_are_taken_one_by_one(name):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, groups=2).double()
    W, model = layer.weight.detach().clone(), nn.Sequential(layer)
    st.factorize(model, {"0": 4}, getattr(st.factors, name)(), guard=False)
    torch.testing.assert_close(layer.weight, W)
