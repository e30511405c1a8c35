"""LORD: the error that the moments foretell is the error, no other map of the rank has less, and budgets are exact."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import slimtune as st
from cases import Chain, tiny_llama
from slimtune.calibrate.covariances import _groups, _Watch
from slimtune.compress import part_of, structured_layers
from slimtune.errors import ConfigError, DataError, DivergenceError, StructureError, TargetError, UninitializedError
from slimtune.factors import LayerMoments, Part, Principal, afm
from slimtune.ops import Moments
from slimtune.substitutes import substitute, substituted

O, I, T = 24, 16, 300


def data(offset=1.0, rank=I, rows=T, seed=0):
    """Correlated rows with a mean, (rows, I)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank, generator=g, dtype=torch.float64) @ torch.randn(
        rank, I, generator=g, dtype=torch.float64
    )
    return x + offset * torch.randn(I, generator=g, dtype=torch.float64)


def linear(bias=True):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(I, O, bias=bias)).double()


def lost(model, other, x):
    """E|y - y'|^2 a row, by forward passes."""
    with torch.no_grad():
        return float((model(x) - other(x)).square().sum() / (model(x).numel() / model(x).shape[1]))


def compressed(model, x, rank, factors=None, side="input", **options):
    moments = st.calibrate.moments(model, [x], ["0"], side=side)
    other = copy.deepcopy(model)
    st.factorize(other, {"0": rank}, factors or afm(moments, **options), guard=False)
    return other


def part(model):
    return part_of(model[0], "0")


# ---------------------------------------------------------------- moments


def exact(x):
    return torch.cov(x.T, correction=0)


def test_moments_are_those_of_all_rows_in_any_division():
    x = data()
    whole = Moments.of(x)
    torch.testing.assert_close(whole.covariance(), exact(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.second(), x.T @ x / T, rtol=1e-12, atol=1e-12)
    for sizes in ([T], [1] * T, [7, 0, 200, 93], [299, 1]):
        parts = [Moments.of(rows) for rows in x.split(sizes)]
        left = parts[0]
        for one in parts[1:]:
            left = left + one
        right = parts[-1]
        for one in reversed(parts[:-1]):
            right = one + right
        for m in (left, right):
            assert m.count == T
            torch.testing.assert_close(m.mean, whole.mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(m.M2, whole.M2, rtol=1e-10, atol=1e-10)


def test_fp32_moments_hold_at_a_mean_of_a_thousand():
    x = torch.randn(4000, 8, dtype=torch.float64) + 1000
    narrow = x.float()
    m = Moments.none(8)
    for rows in narrow.split(128):
        m = m + Moments.of(rows)
    assert m.M2.dtype == torch.float32
    want = exact(narrow.double())
    wrong = float((m.covariance() - want).norm() / want.norm())
    naive = (narrow.T @ narrow / 4000 - torch.outer(narrow.mean(0), narrow.mean(0))).double()
    assert wrong < 2e-5 < 0.01 < float((naive - want).norm() / want.norm())


def test_masked_rows_do_not_count():
    x = data().view(30, 10, I)
    mask = torch.rand(30, 10) < 0.6
    torch.testing.assert_close(Moments.of(x, mask).M2, Moments.of(x[mask]).M2)
    assert Moments.of(x, mask.long()).count == int(mask.sum())
    with pytest.raises(StructureError, match="mask"):
        Moments.of(x, mask[:, :3])
    with pytest.raises(StructureError, match="numbers"):
        Moments.of(x) + Moments.of(x[..., :3])


def test_groups_are_apart():
    x = data().view(T, 4, 4)
    m = Moments.of(x[:100], groups=1) + Moments.of(x[100:], groups=1)
    for g in range(4):
        torch.testing.assert_close(m.covariance()[g], exact(x[:, g]))


# ---------------------------------------------------------------- AFM


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("rank", [1, 7, 15])
def test_the_error_is_the_tail_of_the_eigenvalues(rank, side, centred, bias):
    model, x = linear(bias), data()
    factors = afm(st.calibrate.moments(model, [x], ["0"], side=side), centred)
    other = compressed(model, x, rank, factors)
    B = other[0].structure.B
    torch.testing.assert_close(B.T @ B, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    assert factors.predicted(part(model), rank) == pytest.approx(lost(model, other, x), rel=1e-10)
    y = model(x).detach()
    y = y if centred or not bias else y - model[0].bias.detach()
    values = torch.linalg.eigvalsh(exact(y) if centred else y.T @ y / T).flip(0)
    assert factors.predicted(part(model), rank) == pytest.approx(float(values[rank:].sum()), rel=1e-9)
    assert factors.energy(part(model)) == pytest.approx(float(exact(y).trace()), rel=1e-12)


def test_both_sides_give_the_same_map():
    model, x = linear(), data()
    a, b = (compressed(model, x, 5, side=side) for side in ("input", "output"))
    torch.testing.assert_close(a[0].weight, b[0].weight, rtol=0, atol=1e-11)
    torch.testing.assert_close(a[0].bias, b[0].bias, rtol=0, atol=1e-11)


def test_no_map_of_the_rank_is_better():
    model, x = linear(), data(offset=5)
    y = model(x).detach()
    moments = st.calibrate.moments(model, [x], ["0"])
    errors = {
        name: lost(model, compressed(model, x, 5, factors), x)
        for name, factors in (("afm", afm(moments)), ("uncentred", afm(moments, False)), ("svd", st.factors.svd()))
    }
    assert errors["afm"] < errors["uncentred"] < errors["svd"]
    best = compressed(model, x, 5)[0].structure
    for seed in range(20):  # others of the rank, with the best B and bias for their A
        torch.manual_seed(seed)
        h = x @ (best.A + 10.0 ** -(seed % 5) * torch.randn_like(best.A)).T
        h = torch.cat([h, torch.ones(T, 1, dtype=h.dtype)], 1).detach()
        left = (y - h @ torch.linalg.lstsq(h, y).solution).square().sum() / T
        assert float(left) >= errors["afm"] * (1 - 1e-12)


def test_uncentred_is_svd_of_the_whitened_weight():
    """SVD-LLM: the singular vectors of W L with L L^T = X^T X, by a Cholesky factor, where there is one."""
    model, x = linear(), data()
    L = torch.linalg.cholesky(x.T @ x)
    U, s, Vh = torch.linalg.svd(model[0].weight.detach() @ L, full_matrices=False)
    W = (U[:, :5] * s[:5]) @ Vh[:5] @ torch.linalg.inv(L)
    other = compressed(model, x, 5, centred=False)
    torch.testing.assert_close(other[0].weight, W, rtol=0, atol=1e-10)
    assert torch.equal(other[0].bias, model[0].bias)


def test_a_singular_covariance_is_exact_at_its_rank():
    """A Cholesky factor does not exist: SVD-LLM stops, or adds to the diagonal."""
    model, x = linear(), data(rank=6)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(exact(x) - 1e-12 * torch.eye(I, dtype=torch.float64))
    for side in ("input", "output"):
        assert lost(model, compressed(model, x, 6, side=side), x) < 1e-24
        assert lost(model, compressed(model, x, 12, side=side), x) < 1e-24
    few = x[:4]  # fewer rows than numbers
    assert lost(model, compressed(model, few, 3), few) < 1e-24


def test_error_falls_with_the_rank():
    model, x = linear(), data()
    factors = afm(st.calibrate.moments(model, [x], ["0"]))
    errors = factors.errors(part(model))
    assert (errors.diff() <= 0).all() and float(errors[0]) == pytest.approx(factors.energy(part(model)))
    assert [factors.predicted(part(model), r) for r in (1, 16)] == pytest.approx([float(errors[1]), 0.0], abs=1e-9)


def test_the_mean_is_met():
    model, x = linear(), data(offset=100)
    other = compressed(model, x, 2)
    torch.testing.assert_close(other(x.mean(0)), model(x).mean(0), rtol=1e-12, atol=1e-10)


def test_a_constant_in_the_bias_changes_the_bias_alone():
    model, x = linear(), data()
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted[0].bias += 3
    for side in ("input", "output"):
        a, b = compressed(model, x, 5, side=side), compressed(shifted, x, 5, side=side)
        torch.testing.assert_close(a[0].weight, b[0].weight, rtol=0, atol=1e-11)
        torch.testing.assert_close(b[0].bias, a[0].bias + 3, rtol=0, atol=1e-11)


def test_without_a_mean_or_correlation_there_is_nothing_to_know():
    """C = I and a mean of 0: AFM is the SVD of W, centred or not."""
    model = linear()
    x = torch.linalg.qr(data(offset=0) - data(offset=0).mean(0))[0]
    x = torch.linalg.qr(x - x.mean(0))[0] * T**0.5
    plain = compressed(model, x, 5, st.factors.svd())
    for centred in (True, False):
        other = compressed(model, x, 5, centred=centred)
        torch.testing.assert_close(other[0].weight, plain[0].weight, rtol=0, atol=1e-10)
        torch.testing.assert_close(other[0].bias, plain[0].bias, rtol=0, atol=1e-10)


@pytest.mark.parametrize("add_bias", [True, False])
def test_a_bias_is_added_only_where_it_may_be(add_bias):
    model, x = linear(bias=False), data()
    factors = afm(st.calibrate.moments(model, [x], ["0"]), add_bias=add_bias)
    other = compressed(model, x, 5, factors)
    assert (other[0].bias is not None) == add_bias
    assert factors.predicted(part(model), 5) == pytest.approx(lost(model, other, x), rel=1e-10)
    per_rank, largest = factors.sizes(part(model))
    after = per_rank * largest + (O if add_bias else 0)
    assert after < O * I <= after + per_rank


# ---------------------------------------------------------------- kinds of layers

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 10, 3),
    "strided": nn.Conv2d(4, 10, (3, 5), stride=(2, 1), padding=(1, 2), bias=False),
    "dilated": nn.Conv2d(4, 10, (3, 2), padding=1, dilation=(2, 1)),
    "same": nn.Conv2d(4, 10, (2, 3), padding="same"),
    "circular": nn.Conv2d(4, 10, 3, padding=(1, 2), padding_mode="circular"),
    "grouped": nn.Conv2d(4, 10, 3, stride=(1, 2), groups=2),
    "pointwise": nn.Conv2d(4, 10, 1, stride=2),
    "1d": nn.Conv1d(4, 10, 3, padding=1),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind):
    torch.manual_seed(3)
    layer = CONVOLUTIONS[kind]
    model = nn.Sequential(copy.deepcopy(layer)).double()
    model[0].reset_parameters()
    batches = [torch.randn(n, 4, 9, 8, dtype=torch.float64).cumsum(-1) + 1 for n in (1, 3)]
    if kind == "1d":
        batches = [b[:, :, 0] for b in batches]
    x = torch.cat(batches)
    for side, form, centred in itertools.product(("input", "output"), ("channel", "spatial"), (True, False)):
        spatial = form == "spatial" and kind not in ("grouped", "pointwise", "1d")
        if spatial and side == "output":
            continue
        factors = afm(st.calibrate.moments(model, batches, ["0"], side=side), centred, form=form)
        for rank in (1, 3):
            other = copy.deepcopy(model)
            st.factorize(other, {"0": rank}, factors, guard=False)
            assert type(other[0].structure).__name__ == (
                "SeparableKernel" if spatial else "GroupedLowRank" if kind == "grouped" else "LowRank"
            )
            assert factors.predicted(part(model), rank) == pytest.approx(lost(model, other, x), rel=1e-9)
            plain = copy.deepcopy(model)
            st.factorize(plain, {"0": rank}, st.factors.svd(form=form), guard=False)
            assert lost(model, other, x) <= lost(model, plain, x)


def test_the_spatial_form_at_full_rank_is_exact_and_its_errors_fall():
    model = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1)).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    factors = afm(st.calibrate.moments(model, [x], ["0"], side="input"), form="spatial")
    errors = factors.errors(part(model))
    assert (errors.diff() <= 1e-12).all() and float(errors[-1]) < 1e-20
    assert float(errors[0]) == pytest.approx(factors.energy(part(model)))
    other = copy.deepcopy(model)
    st.factorize(other, {"0": 9}, factors, guard=False)
    assert lost(model, other, x) < 1e-20
    with pytest.raises(StructureError, match="side='input'"):
        afm(st.calibrate.moments(model, [x], ["0"], side="output"), form="spatial")(part(model), 2)


def test_conv1d_is_turned():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(O, I)).double()
    with torch.no_grad():
        model[0].bias.normal_()
    same = linear()
    with torch.no_grad():
        same[0].weight.copy_(model[0].weight.T)
        same[0].bias.copy_(model[0].bias)
    x = data()
    for side in ("input", "output"):
        a, b = compressed(model, x, 5, side=side), compressed(same, x, 5, side=side)
        torch.testing.assert_close(a(x), b(x), rtol=0, atol=1e-10)


# ---------------------------------------------------------------- calibration


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = tiny_llama().double().eval()
    ids = torch.randint(3, 13, (4, 6))
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in (6, 4, 5, 2)])
    found = st.calibrate.moments(model, [{"input_ids": ids, "attention_mask": mask}])
    rows = [{"input_ids": i[m.bool()][None]} for i, m in zip(ids, mask, strict=True)]
    apart = st.calibrate.moments(model, rows)
    for name, entry in found.items():
        assert entry.moments.count == int(mask.sum())
        torch.testing.assert_close(entry.moments.M2, apart[name].moments.M2, rtol=1e-8, atol=1e-10)


def test_layers_given_one_tensor_share_its_moments():
    model = tiny_llama()
    batches = [{"input_ids": torch.randint(3, 13, (2, 6))} for _ in range(2)]
    found = st.calibrate.moments(model, batches, side="input")
    by_layer = {name.partition(".0.")[2]: m.moments for name, m in found.items() if ".0." in name}
    assert by_layer["self_attn.q_proj"] is by_layer["self_attn.k_proj"] is by_layer["self_attn.v_proj"]
    assert by_layer["mlp.gate_proj"] is by_layer["mlp.up_proj"]
    assert by_layer["self_attn.o_proj"] is not by_layer["self_attn.q_proj"]
    alone = st.calibrate.moments(model, batches, ["q_proj"], side="input")
    for name, m in alone.items():
        assert torch.equal(m.moments.M2, found[name].moments.M2)


def test_an_input_changed_in_place_is_not_shared():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(I, O), nn.Linear(I, O)

        def forward(self, x):
            y = self.a(x)
            x.mul_(2)
            return y + self.b(x)

    model = Changed().double()
    found = st.calibrate.moments(model, [data()], ["a", "b"], side="input")
    torch.testing.assert_close(found["b"].moments.M2, 4 * found["a"].moments.M2)


def test_the_smaller_side_is_taken_and_memory_decides_the_passes():
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 4))
    calls, told = [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    batches, names = [torch.randn(5, 6) for _ in range(3)], ["0", "2", "4"]
    found = st.calibrate.moments(model, iter(batches), names, progress=lambda *at: told.append(at))
    assert [m.side for m in found.values()] == ["input", "output", "input"]
    assert len(calls) == 3 and told == [(1, 0), (2, 0), (3, 0)]
    for memory, passes in ((0, 3), (36 * 4 + 16 * 4, 2), (36 * 4 + 32 * 4, 1)):
        calls.clear()
        again = st.calibrate.moments(model, batches, names, memory=memory)
        assert len(calls) == 3 * passes
        for name in names:
            assert torch.equal(again[name].moments.M2, found[name].moments.M2)
    kept = st.calibrate.moments(model, batches, names, keep=lambda name, m: (name, m.moments.count))
    assert kept == {n: (n, 15) for n in names}


def test_the_model_is_left_as_it_was():
    model = Chain().train()
    model.up.weight.requires_grad_(False)
    batch = torch.randint(0, 13, (2, 5))
    before, state, kinds = copy.deepcopy(model.state_dict()), torch.get_rng_state(), [type(m) for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    st.calibrate.moments(model, [batch], ["up", "down", "conv"])
    with pytest.raises(TargetError, match="linear layers and convolutions"):
        st.calibrate.moments(model, [batch], ["embed"])
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_calibration_refusals():
    model = linear()
    for options, error, words in (
        ({"side": "left"}, ConfigError, "auto, input, output"),
        ({"memory": -1}, StructureError, "memory"),
        ({"batches": []}, DataError, "no row"),
        ({"targets": ["gone"]}, TargetError, "gone"),
        ({"batches": [torch.full((2, I), torch.inf).double()]}, DivergenceError, "not finite"),
    ):
        with pytest.raises(error, match=words):
            st.calibrate.moments(model, **({"batches": [data()], "targets": ["0"]} | options))
    for moments, words in (
        ({}, "no moments of layer '0'"),
        ({"0": LayerMoments("input", Moments.of(torch.randn(9, 5)))}, "of 5 numbers, expected 16"),
    ):
        with pytest.raises(StructureError, match=words):
            afm(moments)(part(model), 3)
    with pytest.raises(StructureError, match="form"):
        afm({}, form="round")


def test_measured_errors_are_those_of_the_forward_pass():
    model, x = linear(), data()
    other = compressed(model, x, 5)
    wrong, energy = st.calibrate.errors(model, {"0": other[0]}, [x[:10], x[10:]])["0"]
    assert wrong == pytest.approx(lost(model, other, x), rel=1e-12)
    assert energy == pytest.approx(float(exact(model(x).detach()).trace()), rel=1e-12)
    with pytest.raises(TargetError, match="no layer 'gone'"):
        st.calibrate.errors(model, {"gone": other[0]}, [x])
    with pytest.raises(DataError, match="no row"):
        st.calibrate.errors(model, {"0": other[0]}, [])


def test_fisher_is_the_square_of_the_outputs_gradients():
    model = nn.Sequential(nn.Linear(I, O), nn.Tanh(), nn.Linear(O, 5)).double()
    batches = [data()[:4], data()[4:12]]
    found = st.calibrate.fisher(model, batches, lambda m, x: m(x).square().mean(), ["0", "2"])
    for i in (0, 2):
        squares = []
        for x in batches:
            y = model[: i + 1](x).detach().requires_grad_()
            (g,) = torch.autograd.grad(model[i + 1 :](y).square().mean(), y)
            squares.append(float(g.square().sum()) / y.shape[1])
        assert found[str(i)] == pytest.approx(sum(squares) / 2, rel=1e-5)


def test_importance_is_of_squared_errors():
    """A layer whose output is halved, and the next one's weight doubled, is the same to the loss and gets its rank."""
    model, x = chain(), inputs()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight.mul_(0.01)
        other[1].bias.mul_(0.01)
        other[2].weight.mul_(100)
    ranks = []
    for one in (model, other):
        costs = st.calibrate.fisher(one, [x], lambda m, x: m(x).square().mean(), NAMES)
        ranks.append(st.lord(one, [x], NAMES, keep=0.5, importance=costs, measure=False).ranks)
    assert ranks[0] == ranks[1]
    with pytest.raises(StructureError, match="weight of '0'"):
        st.lord(chain(), [x], NAMES, importance={})


def test_directions_stand_for_moments():
    """What is kept of a layer when memory is short gives the same factors; a weight changed since is noticed."""
    model, x = linear(), data()
    entry = st.calibrate.moments(model, [x], ["0"])["0"]
    kept = afm({"0": entry}).principal(part(model))
    assert isinstance(kept, Principal)
    a, b = (compressed(model, x, 4, afm({"0": e})) for e in (entry, kept))
    assert torch.equal(a[0].weight, b[0].weight) and torch.equal(a[0].bias, b[0].bias)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(StructureError, match="another weight"):
        afm({"0": kept})(part(model), 4)
    factors = afm({"0": LayerMoments("input", Moments.of(x))})
    before = factors.predicted(part(model), 3)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert factors.predicted(part(model), 3) == pytest.approx(4 * before)


# ---------------------------------------------------------------- faults of published code


def test_the_weight_that_is_decomposed_is_the_layers_own():
    """SFSD-LLM's DecomposeLinearSVD takes the SVD of the random weight that its constructor drew."""
    model, x = linear(), data()
    torch.manual_seed(99)
    other = compressed(model, x, I, st.factors.svd())
    torch.testing.assert_close(other[0].weight, model[0].weight, rtol=0, atol=1e-12)


def test_the_mean_that_is_cut_off_comes_back():
    """SFSD-LLM's DecomposeLinearEigen projects with all of V and loses it, and the layer's bias too."""
    model, x = linear(), data(offset=20)
    other = compressed(model, x, 3)
    W, b = model[0].weight.detach(), model[0].bias.detach()
    U = other[0].structure.B.detach()
    mean = model(x).detach().mean(0)
    want = U @ (U.T @ b) + mean - U @ (U.T @ mean)
    torch.testing.assert_close(other[0].bias.detach(), want, rtol=0, atol=1e-10)
    forgotten = (model(x) - (x @ W.T @ U @ U.T + b)).square().sum() / T
    assert float(forgotten.detach()) > 3 * lost(model, other, x)


def test_names_are_no_characters():
    """SFSD-LLM goes through `--layers` letter by letter, and so takes nearly every layer."""
    names = list(st.allocate.prices(tiny_llama(), targets=["q_proj"]))
    assert names and all(name.endswith("q_proj") for name in names)


@pytest.mark.parametrize("count", [31, 32, 33, 64])
def test_no_batch_is_dropped_or_counted_twice(count):
    """Bolaco empties its covariance after every 32 sequences; AFM's sample adds the sums of fc twice."""
    model = linear()
    x = data(rows=2 * count)
    for side in ("input", "output"):
        m = st.calibrate.moments(model, list(x.split(2)), ["0"], side=side)["0"].moments
        rows = x if side == "input" else model(x).detach()
        assert m.count == 2 * count
        torch.testing.assert_close(m.covariance(), exact(rows), rtol=1e-10, atol=1e-10)


def test_nothing_lies_between_the_factors():
    """AFM's sample puts a ReLU there."""
    model, x = linear(), data()
    other = compressed(model, x, 5)
    s = other[0].structure
    torch.testing.assert_close(other(x), x @ s.A.T @ s.B.T + other[0].bias, rtol=0, atol=1e-11)


# ---------------------------------------------------------------- ranks


def chain(bias=True):
    torch.manual_seed(2)
    sizes = [(12, 30), (30, 30), (30, 8), (8, 20)]
    return nn.Sequential(*[nn.Linear(i, o, bias=bias) for i, o in sizes]).double()


def inputs(rows=200):
    g = torch.Generator().manual_seed(5)
    return torch.randn(rows, 12, generator=g, dtype=torch.float64) + 1


def count(model):
    return sum(p.numel() for p in model.parameters())


NAMES = ["0", "1", "2", "3"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("multiple", [1, 3])
@pytest.mark.parametrize("keep", [0.5, 0.7, 0.95])
@pytest.mark.parametrize("policy", ["uniform", "tail"])
def test_the_budget_is_kept_and_the_size_is_foretold(policy, keep, multiple, bias):
    model = chain(bias)
    factors = afm(st.calibrate.moments(model, [inputs()], NAMES))
    prices = st.allocate.prices(model, factors, NAMES)
    ranks = getattr(st.allocate, policy)(prices, keep, multiple=multiple)
    before = count(model)
    assert sum(p.before for p in prices.values()) == before
    report = st.factorize(model, ranks, factors)
    assert not any(layer.kept for layer in report.layers)
    assert count(model) == st.allocate.parameters(prices, ranks)
    if policy == "tail" or len(ranks) == 4:
        assert count(model) <= keep * before
    assert all(r % multiple == 0 or r < multiple for r in ranks.values())


def brute_force(prices, budget, weights):
    """The least weighted error of all ranks that the budget pays for."""
    options = []
    for name, p in prices.items():
        ranks = [*range(1, p.largest + 1), None]
        options.append([(p.after(r), 0.0 if r is None else weights[name] * float(p.errors[r])) for r in ranks])
    return min(sum(e for _, e in c) for c in itertools.product(*options) if sum(n for n, _ in c) <= budget)


@pytest.mark.parametrize("keep", [0.35, 0.45, 0.6, 0.75, 0.9])
def test_one_budget_is_spent_nearly_best(keep):
    torch.manual_seed(0)
    prices = {}
    for name, (o, i) in {"a": (10, 10), "b": (12, 8), "c": (20, 6)}.items():
        values = torch.rand(min(o, i)).sort(descending=True).values.square()
        errors = torch.cat([values.flip(0).cumsum(0).flip(0), torch.zeros(1)]) / values.sum()
        prices[name] = st.allocate.Price(o * i, o + i, 0, -(-o * i // (o + i)) - 1, errors)
    weights = {"a": 1.0, "b": 3.0, "c": 0.5}
    ranks = st.allocate.tail(prices, keep, weights=weights)
    got = sum(weights[n] * (float(p.errors[ranks[n]]) if n in ranks else 0.0) for n, p in prices.items())
    budget = keep * sum(p.before for p in prices.values())
    best = brute_force(prices, budget, weights)
    step = max(p.before - p.after(p.largest - 1) for p in prices.values())  # what may be left over
    assert best - 1e-9 <= got <= brute_force(prices, budget - step, weights) + 1e-9
    assert st.allocate.parameters(prices, ranks) <= budget


def test_weights_pull_the_budget():
    model = chain()
    factors = afm(st.calibrate.moments(model, [inputs()], NAMES))
    prices = st.allocate.prices(model, factors, NAMES)
    heavy = st.allocate.tail(prices, 0.6, weights=dict.fromkeys(NAMES, 1e-6) | {"1": 1.0})
    plain = st.allocate.tail(prices, 0.6)
    assert "1" not in heavy or heavy["1"] > plain["1"]


def test_kinds_of_layers_keep_different_shares():
    model = tiny_llama()
    prices = st.allocate.prices(model)
    ranks = st.allocate.uniform(prices, {"*v_proj": 1.0, "*q_proj": 0.4, "*": 0.6})
    assert not any(n.endswith("v_proj") for n in ranks)
    for name, rank in ranks.items():
        share = 0.4 if name.endswith("q_proj") else 0.6
        p = prices[name]
        assert p.after(rank) <= share * p.before < p.after(rank + 1) or rank == 1
    fixed = st.allocate.fixed(prices, {"*q_proj": 2, "*_proj": 3})
    assert {r for n, r in fixed.items() if n.endswith("q_proj")} == {2}
    with pytest.raises(TargetError, match="fits none"):
        st.allocate.uniform(prices, {"*gone": 0.5})
    for keep in (0, 1.2, "half", True):
        with pytest.raises(ConfigError, match="share"):
            st.allocate.uniform(prices, keep)
    with pytest.raises(ConfigError, match="lowest ranks"):
        st.allocate.tail(prices, 0.01)
    with pytest.raises(StructureError, match="weight of"):
        st.allocate.tail(prices, 0.5, weights={})
    with pytest.raises(StructureError, match="not known"):
        st.allocate.tail({"a": st.allocate.Price(9, 1, 0, 8)}, 0.5)
    assert st.allocate.tail(prices, 1.0) == {}


def test_sensitivity_leaves_every_bit():
    model, x = chain(), inputs()
    before, objects = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    y = model(x).detach()

    def metric(m):
        return float((m(x) - y).detach().square().mean())

    found = st.allocate.sensitivity(model, metric, st.factors.svd(), NAMES, keeps=[0.8, 0.5], types={"in": ["0", "1"]})
    assert found.base == 0 and found.layers == {"in": ["0", "1"]}
    other = copy.deepcopy(model)
    st.factorize(other, st.allocate.uniform(st.allocate.prices(other, targets=["0", "1"]), 0.5))
    assert found.metric["in"][0.5] == pytest.approx(metric(other), rel=1e-12)
    assert found.metric["in"][0.8] < found.metric["in"][0.5]
    assert found.keeps(found.metric["in"][0.8]) == {"in": 0.8} and found.keeps(0.0) == {"in": 1.0}
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(objects[n] is p for n, p in model.named_parameters())

    def broken(m):
        if structured_layers(m):
            raise RuntimeError("metric")
        return 0.0

    with pytest.raises(RuntimeError, match="metric"):
        st.allocate.sensitivity(model, broken, targets=NAMES)
    assert all(objects[n] is p for n, p in model.named_parameters()) and type(model[0]) is nn.Linear


def test_substitutes_share_nothing_with_the_layer():
    model, x = linear(), data()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    replacement = afm(st.calibrate.moments(model, [x], ["0"]))(part(model), 4)
    seen.clear()
    other = substitute(model[0], replacement)
    assert "weight" in model[0]._parameters and "weight" not in other._parameters
    with torch.no_grad():
        y = other(x)
    assert not seen
    with substituted(model, {"0": replacement}):
        torch.testing.assert_close(model(x), y)
    assert type(model[0]) is nn.Linear and list(model[0]._parameters) == ["weight", "bias"]


# ---------------------------------------------------------------- in one call


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("memory", [2**31, 0])
def test_predicted_is_measured(sequential, memory):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(I, O), nn.Tanh(), nn.Linear(O, I)) for _ in range(2)]).double()
    dense = copy.deepcopy(model)
    before = count(model)
    report = st.lord(model, [data()[:150], data()[150:]], keep=0.6, sequential=sequential, memory=memory)
    assert report.before == before and report.after == count(model) <= 0.6 * before
    assert set(structured_layers(model)) == set(report.ranks)
    for layer in report.layers:
        if layer.rank is not None:
            assert layer.measured == pytest.approx(layer.predicted, rel=1e-8)
    x, name = data(), "1.0"
    inner = (model if sequential else dense)[0](x)  # what the second block was calibrated on
    if name in report.ranks:
        wrong = (dense[1][0](inner) - model[1][0](inner)).square().sum() / T
        energy = exact(dense[1][0](inner).detach()).trace()
        found = next(layer for layer in report.layers if layer.name == name)
        assert found.measured == pytest.approx(float(wrong / energy) ** 0.5, rel=1e-8)


def test_lord_takes_ranks_or_a_policy():
    model = tiny_llama()
    batches = [{"input_ids": torch.randint(3, 13, (4, 8))} for _ in range(4)]
    expected = st.allocate.uniform(
        st.allocate.prices(model, afm(st.calibrate.moments(model, batches))), {"*v_proj": 1.0, "*": 0.6}
    )
    other = copy.deepcopy(model)
    report = st.lord(model, batches, ranks=lambda p: st.allocate.uniform(p, {"*v_proj": 1.0, "*": 0.6}), measure=False)
    assert report.ranks == expected and all(layer.measured is None for layer in report.layers)
    again = st.lord(other, iter(batches), ranks=expected, add_bias=False)
    assert again.ranks == expected
    assert not any(name.endswith("bias") for name in other.state_dict())
    assert any(name.endswith("bias") for name in model.state_dict())
    with pytest.raises(TargetError, match="already"):
        st.lord(other, batches)
    st.adapt(model := tiny_llama(), st.lora(rank=2))
    with pytest.raises(TargetError, match="adapters"):
        st.lord(model, batches)
    with pytest.raises(TargetError, match="not among"):
        st.lord(tiny_llama(), batches, ["q_proj"], ranks={"model.layers.0.mlp.up_proj": 2})


def test_half_precision_is_calibrated_in_single():
    model, x = linear().to(torch.bfloat16), data().to(torch.bfloat16)
    found = st.calibrate.moments(model, [x], ["0"])["0"]
    assert found.moments.M2.dtype == torch.float32
    report = st.lord(model, [x], ["0"], keep=0.6)
    assert model[0].structure.A.dtype == model[0].bias.dtype == torch.bfloat16
    assert report.layers[0].measured == pytest.approx(report.layers[0].predicted, abs=0.02)


def test_lists_of_memory_are_filled_in_order():
    with_sizes = {}
    for name, size in zip("abc", (6, 4, 5), strict=True):
        watch = _Watch.__new__(_Watch)
        watch.groups, watch.size, watch.dtype = 1, size, torch.float32
        with_sizes[name] = watch
    assert [len(g) for g in _groups(with_sizes, (36 + 16) * 4)] == [2, 1]


def test_part_of_a_group_is_that_groups():
    """A grouped convolution's price is that of what takes its place."""
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2, bias=False))
    x = torch.randn(6, 8, 7, 7)
    report = st.lord(model, [x], ["0"], ranks={"0": 3}, add_bias=False)
    assert report.after == 3 * 2 * (6 + 36) == count(model)
    assert Part("x", torch.zeros(12, 36), groups=2).W.numel() == report.before


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, attention_mask=None):
        return self.layer(x)


@pytest.mark.parametrize("kind", ["numbers", "pairs", "one for all queries", "added", "added to pairs"])
def test_padding_is_known_by_masks_of_pairs_and_masks_that_are_added(kind):
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    added = torch.zeros(3, 5).masked_fill(~real, torch.finfo(torch.float32).min)
    mask = {
        "numbers": real.float(),
        "pairs": (real[:, None, None] & torch.ones(5, 5, dtype=torch.bool).tril()),
        "one for all queries": real[:, None, None].long(),
        "added": added[:, None, None],
        "added to pairs": added[:, None, None].expand(3, 2, 5, 5),
    }[kind]
    x = torch.randn(3, 5, 6).masked_fill(~real[..., None], 100.0)
    found = st.calibrate.moments(Masked(), [{"x": x, "attention_mask": mask}], side="input")["layer"].moments
    assert found.count == 9
    torch.testing.assert_close(found.mean, x[real].double().mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ranks", "error", "match"),
    [
        ({"0": 4, "1": 0}, StructureError, "rank of '1'"),
        ({"0": 4, "1": 2.5}, StructureError, "rank of '1'"),
        (None, TargetError, "shares its weight with 2"),
    ],
    ids=["no rank", "no count", "shared"],
)
def test_block_after_block_refuses_before_the_first_is_changed(ranks, error, match):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    if ranks is None:
        model[2].weight = model[1].weight
    with pytest.raises(error, match=match):
        st.lord(model, [torch.randn(40, 16)], ["0", "1"], ranks=ranks, sequential=True)
    assert not structured_layers(model)


def test_weights_that_are_not_there_or_not_finite_are_told():
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match="weight of '1'"):
        st.lord(model, [torch.randn(40, 16)])
    with pytest.raises(UninitializedError, match="meta"):
        st.lord(model.to("meta"), [torch.randn(40, 16)])
