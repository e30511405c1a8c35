"""TRP and the nuclear norm: the published loop step for step, theorems as properties, its authors' faults."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import slimtune as st
from slimtune.controllers.matrices import layer_matrices
from slimtune.errors import DivergenceError, SlimtuneError, StructureError, TargetError, UninitializedError
from slimtune.ops.spectral import rank_by_tail
from slimtune.ops.truncation import Spectra


class Net(nn.Module):
    """Every kind of layer that has a matrix: strided, biased, dilated, grouped, not square, pointwise, 1-d, linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.dilated = nn.Conv2d(8, 8, (5, 3), padding=(4, 1), dilation=(2, 1))
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(6, 6, 3, padding=1)
        self.hf = Conv1D(7, 6)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        x = self.stem(x).tanh()
        for layer in (self.strided, self.dilated, self.grouped, self.point):
            x = layer(x).tanh()
        return self.head(self.hf(self.line(x.flatten(2)).tanh().mean(2)))


CONVOLUTIONS = ["strided", "dilated", "grouped", "line"]
ALL = [*CONVOLUTIONS, "point", "hf", "head"]
BATCHES = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(9)]


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double()


def optimizer_of(kind, model, lr=0.05):
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9 if kind == "momentum" else 0.0, weight_decay=1e-3)


def train(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model


def to_matrices(layer, W, form):
    """The reshapes as printed, group by group."""
    if isinstance(layer, Conv1D):
        return [W.t()]
    if isinstance(layer, nn.Linear):
        return [W]
    O = W.shape[0] // layer.groups
    if form == "spatial" and W.dim() == 4 and layer.groups == 1 and W.shape[2] * W.shape[3] > 1:
        return [W.permute(1, 2, 0, 3).reshape(W.shape[1] * W.shape[2], W.shape[0] * W.shape[3])]
    return [W[g * O : (g + 1) * O].reshape(O, -1) for g in range(layer.groups)]


def from_matrices(layer, found, W, form):
    if isinstance(layer, Conv1D):
        return found[0].t()
    if isinstance(layer, nn.Linear):
        return found[0]
    if form == "spatial" and W.dim() == 4 and layer.groups == 1 and W.shape[2] * W.shape[3] > 1:
        N, C, h, w = W.shape
        return found[0].reshape(C, h, N, w).permute(2, 0, 1, 3)
    return torch.cat(found).reshape(W.shape)


def project(layer, tail, form):
    """(D_e(W), U V^T of it, the rank), by the definition."""
    W = layer.weight.detach()
    parts = [torch.linalg.svd(M, full_matrices=False) for M in to_matrices(layer, W, form)]
    squares = sum(s.square() for _, s, _ in parts)
    rank = next(k for k in range(len(squares) + 1) if squares[k:].sum() <= tail * squares.sum())
    T = [(U[:, :rank] * s[:rank]) @ Vh[:rank] for U, s, Vh in parts]
    G = [U[:, :rank] @ Vh[:rank] for U, s, Vh in parts]
    return from_matrices(layer, T, W, form), from_matrices(layer, G, W, form), rank


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_it_is_the_published_loop(kind, form):
    options = {"period": 3, "tail": 0.1, "weight": 0.02, "form": form}
    slow, fast = net(), net()
    loop, other = optimizer_of(kind, slow), optimizer_of(kind, fast)
    attached = st.attach(st.TRP(**options, targets=ALL), fast, other)
    for t, x in enumerate(BATCHES[:8]):
        gradients = {}
        if t % 3 == 0:
            for name in ALL:
                layer = slow.get_submodule(name)
                T, gradients[name], rank = project(layer, 0.1, form)
                layer.weight.data.copy_(T)
                assert attached.controller.ranks[name] == rank
        loop.zero_grad()
        (slow(x) - 1).square().mean().backward()
        for name, G in gradients.items():
            slow.get_submodule(name).weight.grad.add_(G, alpha=0.02)
        loop.step()
        train(fast, other, [x])
    for (name, p), q in zip(slow.named_parameters(), fast.parameters(), strict=True):
        if t % 3 != 2:  # its next projection is not yet due
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_a_projection_is_the_best_of_its_rank_and_drops_no_more_than_its_share(form):
    model = net()
    before = copy.deepcopy(model)
    trp = st.TRP(tail=0.15, targets=ALL, form=form)
    st.attach(trp, model, optimizer_of("sgd", model))
    for name in ALL:
        layer, was = model.get_submodule(name), before.get_submodule(name)
        squares = sum(torch.linalg.svdvals(M).square() for M in to_matrices(was, was.weight.detach(), form))
        rank, total = trp.ranks[name], squares.sum()
        lost = (layer.weight - was.weight).square().sum()
        torch.testing.assert_close(lost.detach(), squares[rank:].sum(), rtol=1e-9, atol=1e-12)
        assert squares[rank:].sum() <= 0.15 * total < squares[rank - 1 :].sum()
        for M in to_matrices(layer, layer.weight.detach(), form):
            assert torch.linalg.matrix_rank(M) == rank


def test_without_a_tail_it_is_plain_training_bit_for_bit():
    plain, projected = net(), net()
    opt = optimizer_of("momentum", projected)
    st.attach(st.TRP(period=2, tail=0, weight=0, targets=ALL), projected, opt)
    train(plain, optimizer_of("momentum", plain), BATCHES)
    train(projected, opt, BATCHES)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), projected.parameters(), strict=True))


def test_with_an_endless_period_it_is_plain_training_from_the_projected_start():
    projected = net()
    opt = optimizer_of("momentum", projected)
    st.attach(st.TRP(period=10**9, weight=0), projected, opt)
    plain = copy.deepcopy(projected)
    train(plain, optimizer_of("momentum", plain), BATCHES)
    train(projected, opt, BATCHES)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), projected.parameters(), strict=True))


def test_small_updates_do_not_raise_the_rank():
    """Theorem 1: |W' - T| < sqrt(e) |W'| leaves the rank where it is, or lower."""
    generator, tried = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        rows, columns = (int(n) for n in torch.randint(3, 30, (2,), generator=generator))
        tail = float(torch.rand((), generator=generator)) * 0.3 + 1e-3
        layer = nn.Linear(columns, rows, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
        opt = torch.optim.SGD(layer.parameters(), lr=1.0)
        trp = st.TRP(period=1, tail=tail, weight=0, targets=["0"])
        st.attach(trp, nn.Sequential(layer), opt)
        before = trp.ranks["0"]
        D = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        # the largest c with |c D| < sqrt(e) (|T| - |c D|), a little less
        size = tail**0.5 * layer.weight.detach().norm() / (1 + tail**0.5)
        layer.weight.grad = -0.999 * size * D / D.norm()
        opt.step()
        tried += trp.ranks["0"] < min(rows, columns)
        assert trp.ranks["0"] <= before
    assert tried > 200


@pytest.mark.parametrize("turned", [False, True])
def test_the_subgradient_of_a_projected_matrix_is_one(turned):
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    A = A.t().contiguous() if turned else A
    found = Spectra.of(A[None, None])
    rank = rank_by_tail(found.s[0, 0], 0.2)
    T, G = found.cut(0, rank)[0], found.polar(0, rank)[0]
    norm = torch.linalg.matrix_norm(T, "nuc")
    torch.testing.assert_close((G * T).sum(), norm)
    torch.testing.assert_close(torch.linalg.matrix_norm(G, 2), torch.ones((), dtype=torch.float64))
    for scale in (1e-3, 0.1, 1.0, 10.0):
        for _ in range(100):
            B = T + scale * torch.randn(T.shape, generator=generator, dtype=torch.float64)
            assert torch.linalg.matrix_norm(B, "nuc") >= norm + (G * (B - T)).sum() - 1e-9


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_momentum_keeps_what_does_not_leave_the_rank(shape):
    torch.manual_seed(2)
    M, D = torch.randn(2, *shape, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    P, Q = U[:, :3] @ U[:, :3].T, Vh[:3].T @ Vh[:3]
    expected = D - (torch.eye(shape[0]) - P) @ D @ (torch.eye(shape[1]) - Q)
    torch.testing.assert_close(Spectra.of(M[None, None]).tangent(0, 3, D[None])[0], expected)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False).double())
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    st.attach(st.TRP(period=1, tail=0.3, weight=0, targets=["0"], momentum=True), model, opt)
    model[0].weight.grad = D.clone()
    opt.step()
    W, momentum = model[0].weight.detach(), opt.state[model[0].weight]["momentum_buffer"]
    rank = int(torch.linalg.matrix_rank(W))
    U, _, Vh = torch.linalg.svd(W)
    assert rank < min(shape)
    assert (U[:, rank:].T @ momentum @ Vh[rank:].T).abs().max() < 1e-9 < (U[:, rank:].T @ D @ Vh[rank:].T).abs().max()


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("steps", [6, 8])  # the last one projects, or does not
def test_factorizing_in_the_end_changes_nothing_that_the_last_projection_did_not(form, steps):
    model = net()
    opt = optimizer_of("momentum", model)
    options = {"period": 3, "tail": 0.3, "weight": 1e-3, "form": form}
    attached = st.attach(st.TRP(**options, factorize=True), model, opt)
    train(model, opt, BATCHES[:steps])
    expected = copy.deepcopy(model)
    if steps == 8:  # a best checkpoint lies between projections: one more comes first
        for name in CONVOLUTIONS:
            layer = expected.get_submodule(name)
            T = project(layer, 0.3, form)[0]
            layer.weight.data.copy_(T)
    attached.finish()
    held = [name for name in CONVOLUTIONS if hasattr(model.get_submodule(name), "structure")]
    assert held == CONVOLUTIONS  # the strided one, and those with a bias, too
    assert {name: model.get_submodule(name).structure.rank for name in held} == attached.controller.ranks
    assert (model(BATCHES[0]) - expected(BATCHES[0])).abs().max() < 1e-12
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in expected.parameters())
    train(model, opt, BATCHES[:2])  # the optimizer has followed
    assert {id(p) for group in opt.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert not any("trp_subgradient" in state for state in opt.state.values())


def test_ranks_by_value_in_the_end():
    model = nn.Sequential(nn.Linear(8, 8, bias=False).double())
    values = torch.tensor([4.0, 3.0, 2.0, 0.5, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(values))
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = st.attach(st.TRP(tail=1e-6, targets=["0"], factorize=True, value=1.0), model, opt)
    model[0].weight.grad = torch.zeros(8, 8, dtype=torch.float64)
    opt.step()
    handle.finish()
    assert model[0].structure.rank == 3
    torch.testing.assert_close(model[0].weight.diagonal().detach(), values * (values >= 1))


def test_a_half_trained_end_does_not_cut_twice():
    """D_e is not idempotent: projecting what the last step has projected would cut again."""
    model = net()
    opt = optimizer_of("sgd", model, lr=0.0)
    attached = st.attach(st.TRP(period=2, tail=0.2, weight=0), model, opt)
    train(model, opt, BATCHES[:2])
    before, ranks = copy.deepcopy(model.state_dict()), dict(attached.controller.ranks)
    attached.finish()
    assert attached.controller.ranks == ranks
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- faults of the authors' code


def test_projecting_at_every_step_cuts_without_any_training():
    """The ratchet of period 1, which the default of 20 does not have."""
    model = net()
    model.point = nn.Linear(144, 24).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    trp = st.TRP(period=1, tail=0.1, weight=0, targets=["point"])
    st.attach(trp, model, opt)
    ranks = [trp.ranks["point"]]
    for _ in range(12):
        opt.step()
        ranks.append(trp.ranks["point"])
    assert ranks == sorted(ranks, reverse=True) and ranks[0] < 24 and ranks[-1] < ranks[0] - 5


def test_the_share_is_an_option():
    ranks = []
    for tail in (0.1, 0.02, 0.005):
        model = net()
        trp = st.TRP(tail=tail)
        st.attach(trp, model, optimizer_of("sgd", model))
        ranks.append(sum(trp.ranks.values()))
    assert ranks[0] < ranks[1] <= ranks[2]


def test_the_penalty_acts_on_projection_steps_alone():
    model = nn.Sequential(nn.Linear(6, 6, bias=False).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=torch.float64)))
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    st.attach(st.TRP(period=3, tail=0, weight=0.1, targets=["0"]), model, opt)
    traces = []
    for _ in range(7):
        model[0].weight.grad = torch.zeros(6, 6, dtype=torch.float64)
        opt.step()
        traces.append(float(model[0].weight.detach().trace()))
    drops = [a - b for a, b in zip([21.0, *traces], traces, strict=False)]
    assert drops == pytest.approx([0.3, 0, 0, 0.3, 0, 0, 0.3], abs=1e-12)


def test_shrinking_singular_values_before_they_are_cut():
    model = nn.Sequential(nn.Linear(4, 4, bias=False).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([6.0, 3.0, 0.2, 0.1], dtype=torch.float64)))
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    st.attach(st.TRP(period=2, tail=0, weight=0.3, penalty="prox", targets=["0"]), model, opt)
    seen = []
    for _ in range(4):
        model[0].weight.grad = torch.zeros(4, 4, dtype=torch.float64)
        opt.step()
        seen.append(model[0].weight.detach().diagonal().tolist())
    assert seen[0] == pytest.approx([6.0, 3.0, 0.2, 0.1]) and seen[1] == seen[2]
    assert seen[1] == pytest.approx([5.85, 2.85, 0.05, 0.0]) and seen[3] == pytest.approx([5.7, 2.7, 0.0, 0.0])


@pytest.mark.parametrize("matrix", ["channel", "spatial"])
def test_without_projections_the_penalty_is_the_nuclear_norms_gradient(matrix):
    """And not that of the sum of the k largest singular values, which leaves the tail alone."""
    model, other = net(), net()
    opt = optimizer_of("sgd", model)
    penalty = st.NuclearNorm(ALL, 0.1, matrix=matrix)
    st.attach(penalty, model, opt)
    x = BATCHES[0]
    model(x).square().mean().backward()
    total = sum(
        torch.linalg.matrix_norm(M, "nuc")
        for name in ALL
        for M in to_matrices(other.get_submodule(name), other.get_submodule(name).weight, matrix)
    )
    torch.testing.assert_close(penalty.value(), 0.1 * total.detach())
    (other(x).square().mean() + 0.1 * total).backward()
    opt.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10, msg=name)
    A = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    single = nn.Sequential(nn.Linear(12, 12, bias=False).double())
    single[0].weight.data.copy_(A)
    single[0].weight.grad = torch.zeros_like(A)
    opt = torch.optim.SGD(single.parameters(), lr=0.0)
    st.attach(st.NuclearNorm(["0"], 1.0), single, opt)
    opt.step()
    G, norm = single[0].weight.grad, torch.linalg.matrix_norm(A, "nuc")
    generator = torch.Generator().manual_seed(4)
    for _ in range(300):
        B = A + 0.3 * torch.randn(12, 12, dtype=torch.float64, generator=generator)
        assert torch.linalg.matrix_norm(B, "nuc") >= norm + (G * (B - A)).sum() - 1e-9


# ---------------------------------------------------------------- the nuclear norm


def test_the_ratio_is_autograds_and_does_not_see_scale():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2).double(), nn.Linear(5, 7).double())
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    penalty = st.NuclearNorm(["0", "1"], 0.7, form="ratio")
    st.attach(penalty, model, opt)
    weights = [layer.weight for layer in model]
    for W in weights:
        W.grad = torch.zeros_like(W)
    total = sum(
        0.7 * sum(torch.linalg.matrix_norm(M, "nuc") for M in to_matrices(layer, layer.weight, "channel")) / W.norm()
        for layer, W in zip(model, weights, strict=True)
    )
    expected = torch.autograd.grad(total, weights)
    torch.testing.assert_close(penalty.value(), total.detach())
    opt.step()
    for W, g in zip(weights, expected, strict=True):
        torch.testing.assert_close(W.grad, g)
        assert abs(float((W.grad * W.detach()).sum())) < 1e-9
    before = penalty.value()
    with torch.no_grad():
        model[1].weight *= 8
    torch.testing.assert_close(penalty.value(), before)


def test_gradients_stay_finite_at_deficient_matrices():
    for rows in (0, 1):
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].weight[:rows, 0] = 1
        for form in ("subgradient", "ratio"):
            model[0].weight.grad = torch.zeros(4, 4)
            opt = torch.optim.SGD(model.parameters(), lr=0.0)
            st.attach(st.NuclearNorm(["0"], 1.0, form=form), model, opt)
            opt.step()
            assert torch.linalg.matrix_norm(model[0].weight.grad, 2) <= 1 + 1e-5


def test_named_parameters_and_intervals():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.latent = nn.Parameter(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
            self.rest = nn.Linear(3, 3)

    model = Odd()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    penalty = st.NuclearNorm(["latent"], 0.25, every=2)
    st.attach(penalty, model, opt)
    seen = []
    for _ in range(3):
        model.latent.grad = torch.zeros(3, 3)
        opt.step()
        seen.append(float(model.latent.detach().trace()))
    assert seen == pytest.approx([5.25, 5.25, 4.5])


# ---------------------------------------------------------------- in a loop


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("at", [1, 3, 4])  # before, at and after a projection
def test_resuming_goes_on_bit_for_bit(kind, at):
    def start():
        model = net()
        opt = optimizer_of(kind, model, 0.01)
        return model, opt, st.TRP(period=3, tail=0.1, weight=0.01)

    model, opt, trp = start()
    handle = st.attach(trp, model, opt)
    train(model, opt, BATCHES[:at])
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), handle.state_dict()))
    train(model, opt, BATCHES[at:])
    for before in (True, False):  # the state is put back before attaching, or after
        other, opt2, trp2 = start()
        other.load_state_dict(saved[0])
        opt2.load_state_dict(copy.deepcopy(saved[1]))
        if before:
            trp2.load_state_dict(saved[2])
            st.attach(trp2, other, opt2)
        else:
            st.attach(trp2, other, opt2).load_state_dict(saved[2])
        train(other, opt2, BATCHES[at:])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
        assert trp2.state_dict() == trp.state_dict()


def test_accumulated_gradients_are_one_step():
    whole, parts = net(), net()
    for model, pieces in ((whole, 1), (parts, 3)):
        opt = optimizer_of("momentum", model)
        st.attach(st.TRP(period=2, tail=0.1, weight=0.05), model, opt)
        for x in BATCHES[:5]:
            opt.zero_grad()
            for piece in x.chunk(pieces):
                ((model(piece) - 1).square().mean() / pieces).backward()
            opt.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def test_what_is_told():
    model = net()
    opt = optimizer_of("sgd", model)
    trp = st.TRP(period=2, tail=0.1)
    st.attach(trp, model, opt)
    notes = []
    for x in BATCHES[:4]:
        train(model, opt, [x])
        notes.append(trp.note())
    assert notes[0] is notes[2] is None and notes[3] == {"ranks": trp.ranks}
    assert list(notes[1]["ranks"]) and set(notes[1]["ranks"]) == set(CONVOLUTIONS)


def test_layers_of_one_shape_are_what_each_would_be_alone():
    torch.manual_seed(5)
    model = nn.Sequential(*(nn.Linear(8, 6) for _ in range(4)))
    alone = copy.deepcopy(model)
    st.attach(st.TRP(tail=0.2, targets="all-linear"), model, torch.optim.SGD(model.parameters()))
    for name in "0123":
        st.attach(st.TRP(tail=0.2, targets=[name]), alone, torch.optim.SGD(alone.parameters()))
    for layer, other in zip(model, alone, strict=True):
        torch.testing.assert_close(layer.weight, other.weight)


def test_a_layer_whose_decomposition_fails_is_left_out_and_told(monkeypatch):
    torch.manual_seed(6)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    trp = st.TRP(period=1, tail=0.2, targets="all-linear")
    st.attach(trp, model, opt)
    known = {n: W.clone() for n, W in model.state_dict().items()}
    of = Spectra.of.__func__
    bad = model[1].weight.detach()

    def fails(cls, M, exact=True):
        if (M[:, 0] == bad).flatten(1).all(1).any():
            raise torch.linalg.LinAlgError("did not converge")
        return of(cls, M, exact)

    monkeypatch.setattr(Spectra, "of", classmethod(fails))
    opt.step()  # nothing has a gradient
    assert trp.note() == {"ranks": trp.ranks, "skipped": ["1"]}
    assert torch.equal(model[1].weight, known["1.weight"])
    assert all(not torch.equal(model[i].weight, known[f"{i}.weight"]) for i in (0, 2))


def test_half_precision_weights():
    model = nn.Sequential(nn.Linear(16, 16)).to(torch.bfloat16)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    trp = st.TRP(period=1, tail=0.3, weight=1e-3, targets=["0"])
    st.attach(trp, model, opt)
    model(torch.randn(4, 16, dtype=torch.bfloat16)).square().mean().backward()
    opt.step()
    s = torch.linalg.svdvals(model[0].weight.detach().double())
    assert model[0].weight.dtype == torch.bfloat16 and s[trp.ranks["0"]] < 0.02 * s[0]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"period": 0}, "period must be a whole number"),
        ({"tail": 1.0}, r"tail must be a share in \[0, 1\)"),
        ({"weight": -1}, "weight must be a number"),
        ({"penalty": "l1"}, "penalty must be one of subgradient, prox"),
        ({"form": "depth"}, "form must be one of channel, spatial"),
        ({"factorize": 1}, "factorize must be true or false"),
        ({"value": 0.1}, "value is for factorize=True"),
        ({"factorize": True, "value": -0.1}, "value must be a number"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(StructureError, match=words):
        st.TRP(**options)
    with pytest.raises(StructureError, match="form must be one of"):
        st.NuclearNorm(form="l1")


def test_refusals_leave_the_model_as_it_is():
    model = net()
    before = copy.deepcopy(model.state_dict())
    opt = optimizer_of("sgd", model)

    def refused(error, words, make, of=opt):
        with pytest.raises(error, match=words):
            st.attach(make, model, of)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    refused(TargetError, "matches nothing", st.TRP(targets=["gone"]))
    refused(TargetError, "matches nothing", st.NuclearNorm(["gone"]))
    refused(SlimtuneError, "the optimizer that holds 'strided'", st.TRP(), torch.optim.SGD([model.head.weight]))
    model.hf.requires_grad_(False)
    refused(TargetError, "'hf' is frozen", st.TRP(targets=["hf"]))
    refused(TargetError, "'hf' is frozen", st.NuclearNorm(["hf"]))
    model.hf.requires_grad_(True)
    with torch.no_grad():
        model.line.weight[0, 0, 0] = torch.nan
    before = {key: value for key, value in before.items() if key != "line.weight"}
    with pytest.raises(DivergenceError, match="of line are no longer finite"):
        st.attach(st.TRP(targets=["line"]), model, opt)
    with pytest.raises(TargetError, match="targets 'convolutions'"):
        st.attach(st.TRP(), nn.Sequential(nn.Linear(2, 2)), opt)
    model.head.weight = nn.Parameter(torch.randn(4, 7, dtype=torch.float64))
    model.twin = nn.Linear(7, 4)
    model.twin.weight = model.head.weight
    with pytest.raises(TargetError, match="shares its weight with twin"):
        st.attach(st.TRP(targets=["head"]), model, optimizer_of("sgd", model))
    with torch.device("meta"):
        ghost = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UninitializedError, match="meta device"):
        st.attach(st.TRP(targets=["0"]), ghost, torch.optim.SGD(ghost.parameters()))


def test_adapted_layers_are_left_to_their_adapters():
    model = net()
    st.adapt(model, st.lora(rank=2), ["head"])
    with pytest.raises(TargetError, match="carries adapters"):
        layer_matrices(model, ["head"], (), "channel", "TRP")


def test_rounding_is_no_direction_of_a_weight_of_low_rank():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(40, 3, generator=g) @ torch.randn(3, 60, generator=g)
    spectra = Spectra.of(M[None, None])
    rank = rank_by_tail(spectra.joint[0], 0.0)
    assert rank > 3
    U, _, Vh = torch.linalg.svd(M.double())
    torch.testing.assert_close(spectra.polar(0, rank)[0].double(), U[:, :3] @ Vh[:3], rtol=0, atol=1e-5)
    assert spectra.tangent(0, rank, torch.randn(1, 40, 60, generator=g)).norm() < 60
