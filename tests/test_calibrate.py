"""Calibration: what is streamed is what a stored gradient gives, and the model does not notice."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import slimtune as st
from cases import Chain, tiny_llama
from slimtune.targets import hosts

BATCHES = [torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(i)) for i in range(3)]
TOY = ("0", "2")


def square(model, batch):
    return model(batch).square().mean()


def toy(dtype=torch.float64):
    """The sheet's toy: two linear layers and a ReLU."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)


def rows(count, dtype=torch.float64, size=8, width=16):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, width, generator=generator, dtype=dtype) for _ in range(count)]


def stored(model, batches, targets, loss=square):
    """{layer: (W, mean dL/dW)} as (O, I), from whole weight gradients."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for batch in batches:
        loss(model, batch).backward()
    found = {}
    for n in targets:
        layer = model.get_submodule(n)
        turned = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
        W, G = layer.weight.detach(), layer.weight.grad / len(batches)
        found[n] = (W.t(), G.t()) if turned else (W.flatten(1), G.flatten(1))
    return found


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) + 1e-300)


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_stored_gradients_on_every_kind_of_layer(count):
    """Every layer gets every batch: GoRA's code gives the last layer to finish one too few, of a single one none."""
    torch.manual_seed(0)
    model = Chain(torch.float64)
    stats = st.calibrate.gradients(
        model, BATCHES[:count], square, Chain.targets, sketch=4, directions=3, importance=tuple(st.allocate.MEASURES)
    )
    for n, (W, G) in stored(model, BATCHES[:count], Chain.targets).items():
        s = stats[n]
        assert s.batches == count
        same(s.sketch, G @ s.projection.t())
        same(s.left.t() @ s.left, torch.eye(3, dtype=torch.float64))
        same(s.left @ s.left.t() @ G @ s.projection[:3].t(), G @ s.projection[:3].t(), 1e-10)
        same(s.right, s.left.t() @ G)
        values = torch.linalg.svdvals(G)
        want = {
            "union_mean": (W * G).abs().mean(),
            "union_frobenius": (W * G).square().sum().sqrt(),
            "union_spectral": torch.linalg.svdvals(W * G)[0],
            "union_nuclear": torch.linalg.svdvals(W * G).sum(),
            "gradient_mean": G.abs().mean(),
            "gradient_frobenius": G.square().sum().sqrt(),
            "gradient_nuclear": values.sum(),
        }
        assert s.importance == pytest.approx({k: float(v) for k, v in want.items()}, rel=1e-10)


def test_streaming_is_exact():
    """Without rounding, streamed and stored agree to the last bits; the sheet's figure is 3e-16."""
    model, batches = toy(), rows(4)
    stats = st.calibrate.gradients(model, batches, square, TOY, sketch=8)
    for n, (_, G) in stored(model, batches, TOY).items():
        want = G @ stats[n].projection.t()
        assert float((stats[n].sketch - want).abs().max()) < 3e-16


def test_projection_is_a_start_of_lora_and_fewer_rows_are_the_first_of_more():
    few, many = (st.calibrate.gradients(toy(), rows(1), square, TOY, sketch=k) for k in (3, 400))
    for n in TOY:
        A, I = many[n].projection, many[n].projection.shape[1]
        assert torch.equal(few[n].projection, A[:3])
        assert A.abs().max() <= I**-0.5 and float(A.square().mean()) == pytest.approx(1 / (3 * I), rel=0.05)
    assert not torch.equal(many["0"].projection[:3, :4], many["2"].projection[:3, :4])
    other = st.calibrate.gradients(toy(), rows(1), square, TOY, sketch=3, seed=1)
    assert not torch.equal(other["0"].projection, few["0"].projection)


def test_sums_are_fp32_on_bf16_weights():
    """256 and then ones: a bf16 sum, as in GoRA's code, stays at 256."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
    batches = [torch.full((1, 1), 256.0).bfloat16(), *[torch.ones(1, 1).bfloat16()] * 255]
    s = st.calibrate.gradients(model, batches, lambda m, x: m(x).sum(), ["0"], sketch=1, importance=["gradient_mean"])
    assert s["0"].sketch.dtype == torch.float32
    assert s["0"].importance["gradient_mean"] == pytest.approx(511 / 256, rel=1e-6)
    assert float(s["0"].sketch / s["0"].projection) == pytest.approx(511 / 256, rel=1e-5)


def test_a_layer_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.layer(torch.tanh(self.layer(x))))

    model = Twice().double()
    stats = st.calibrate.gradients(model, rows(2), square, ["layer"], sketch=3, directions=2)
    G = stored(model, rows(2), ["layer"])["layer"][1]
    same(stats["layer"].sketch, G @ stats["layer"].projection.t())
    same(stats["layer"].right, stats["layer"].left.t() @ G)


class Packed(nn.Linear):
    """A stand-in for a quantised layer: integers, unpacked in its own forward."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        with torch.no_grad():
            self.bias.copy_(layer.bias)
        packed = (layer.weight * 100).round().to(torch.int8)
        del self.weight
        self.register_buffer("weight", packed)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)


def test_packed_weights():
    plain = toy(torch.float32)
    packed = copy.deepcopy(plain)
    packed[0], packed[2] = Packed(plain[0]), Packed(plain[2])
    with torch.no_grad():
        for i in (0, 2):
            plain[i].weight.copy_(packed[i].weight.float() / 100)
    options = {"sketch": 4, "directions": 2, "importance": ["union_mean", "union_frobenius_probes"]}
    a, b = (st.calibrate.gradients(m, rows(2, torch.float32), square, TOY, **options) for m in (plain, packed))
    for n in TOY:
        same(b[n].sketch, a[n].sketch, 1e-6)
        same(b[n].right, a[n].right, 1e-5)
        assert b[n].importance == pytest.approx(a[n].importance, rel=1e-5)
    assert type(packed[0]) is Packed


def test_directions_reach_the_best_approximation():
    """With rounds of power iteration |G - Q Q^T G| comes down to the tail of the singular values (Eckart and Young)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 8)).double()
    batches = rows(3, size=64, width=40)
    G = stored(model, batches, ["0"])["0"][1]
    best = float(torch.linalg.svdvals(G)[6:].norm())
    lost = []
    for power in (0, 1, 4):
        s = st.calibrate.gradients(model, batches, square, ["0"], directions=6, power=power)["0"]
        same(s.right, s.left.t() @ G, 1e-9)
        lost.append(float((G - s.left @ s.right).norm()))
    assert lost[0] > lost[1] > lost[2] > 0
    assert best <= lost[2] < 1.05 * best


def test_estimates_have_unbiased_squares():
    model, batches = toy(), rows(2)
    names = ["gradient_frobenius_sketch", "union_frobenius_probes"]
    runs = [st.calibrate.gradients(model, batches, square, TOY, importance=names, seed=i) for i in range(60)]
    for n, (W, G) in stored(model, batches, TOY).items():
        for name, exact in zip(names, (G, W * G), strict=True):
            squares = torch.tensor([r[n].importance[name] ** 2 for r in runs])
            error = squares.std() / len(runs) ** 0.5
            assert abs(float(squares.mean() - exact.square().sum())) < 3 * error
            assert error < 0.1 * squares.mean()


@pytest.mark.parametrize("memory", [0, 24 * 16 * 8, 10**9])
def test_memory_decides_the_passes_and_nothing_else(memory):
    seen = []

    def counted(model, batch):
        seen.append(1)
        return square(model, batch)

    options = {"sketch": 4, "importance": ["union_mean"]}
    stats = st.calibrate.gradients(toy(), rows(3), counted, TOY, **options, memory=memory)
    assert len(seen) == (3 if memory == 10**9 else 6)
    whole = st.calibrate.gradients(toy(), rows(3), square, TOY, **options)
    for n in TOY:
        assert torch.equal(stats[n].sketch, whole[n].sketch) and stats[n].importance == whole[n].importance


def test_micro_batches_with_weights_are_one_batch():
    x = rows(1, size=32)[0]
    one, equal, odd = (
        st.calibrate.gradients(toy(), batches, loss, TOY, sketch=4, importance=["union_mean"])
        for batches, loss in (
            ([x], square),
            (x.chunk(4), square),
            (x.split([3, 9, 20]), lambda m, b: (square(m, b), len(b))),
        )
    )
    for n in TOY:
        same(equal[n].sketch, one[n].sketch, 1e-10)
        same(odd[n].sketch, one[n].sketch, 1e-10)
    ranks = [st.allocate.gora(s, 4, floor=1, ceiling=8) for s in (one, equal, odd)]
    assert ranks[0] == ranks[1] == ranks[2]


# ---------------------------------------------------------------- the model does not notice


def snapshot(model):
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "needed": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "names": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def unchanged(before, after):
    for key, value in before.items():
        if key in ("tensors", "random"):
            a, b = (value, after[key]) if key == "tensors" else ({"": value}, {"": after[key]})
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), key
        else:
            assert value == after[key], key


def noticing():
    """Dropout, statistics of batches, a frozen part, mixed modes, a hook, and gradients waiting."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(24, 8)
    )
    model = model.double().train()
    model[4].eval()
    model[1].weight.requires_grad_(False)
    model[4].register_forward_hook(lambda *_: None)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


def test_nothing_is_left_behind_and_two_runs_agree():
    model = noticing()
    before = snapshot(model)
    options = {"sketch": 4, "directions": 3, "importance": ["union_mean"], "memory": 0}
    first = st.calibrate.gradients(model, iter(rows(3)), square, ["0", "4"], **options)
    unchanged(before, snapshot(model))
    second = st.calibrate.gradients(model, rows(3), square, ["0", "4"], **options)
    for n, (_, G) in stored(model, rows(3), ["0", "4"]).items():
        assert torch.equal(first[n].sketch, second[n].sketch) and torch.equal(first[n].right, second[n].right)
        assert first[n].importance == second[n].importance
        same(first[n].sketch, G @ first[n].projection.t())  # without dropout, with the statistics as they stand
        same(first[n].right, first[n].left.t() @ G)
    st.calibrate.inputs(model, rows(3), ["0", "4"], components=2)
    unchanged(before, snapshot(model))


def test_random_losses_repeat_in_every_pass():
    """Masks drawn in the loss are the same in the pass for Q and in that for Q^T G."""

    def loss(model, x):
        return (model(x) * torch.rand(8)).square().mean()

    options = {"sketch": 16, "directions": 8, "importance": ["gradient_frobenius"]}
    first, second = (st.calibrate.gradients(toy(), rows(2), loss, TOY, **options) for _ in range(2))
    for n in TOY:
        s = first[n]
        assert torch.equal(s.sketch, second[n].sketch) and torch.equal(s.right, second[n].right)
        same(s.right @ s.projection.t(), s.left.t() @ s.sketch, 1e-10)


def test_work_in_place_behind_a_layer():
    model, plain = (nn.Sequential(nn.Linear(16, 24), nn.ReLU(inplace=i), nn.Linear(24, 8)) for i in (True, False))
    plain.load_state_dict(model.state_dict())
    a, b = (st.calibrate.gradients(m, rows(2, torch.float32), square, TOY, sketch=4) for m in (model, plain))
    assert all(torch.equal(a[n].sketch, b[n].sketch) and b[n].sketch.any() for n in TOY)


def broken(model, batch):
    model(batch)
    raise RuntimeError("inside")


def test_errors_leave_nothing_behind_either():
    model = noticing()
    before = snapshot(model)
    for loss, error, match in [
        (broken, RuntimeError, "inside"),
        (lambda m, x: m(x), st.DataError, r"0-d tensor or \(tensor, weight\), got a tensor of shape \(8, 8\)"),
        (lambda m, x: 3.0, st.DataError, "got float"),
        (lambda m, x: x.sum(), st.TargetError, "depends on none of the 2 layers, such as '0'"),
        (lambda m, x: m(x).sum() / 0, st.DivergenceError, "loss of batch 0 is"),
        (lambda m, x: (m(x).sum(), 0), st.DataError, r"weight of batch 0 must be positive and finite, got 0\.0"),
        (lambda m, x: (m(x) - m(x)).sqrt().sum(), st.DivergenceError, "gradient of '0' is not finite"),
        (None, st.DataError, "a batch is a Tensor; expected a mapping with labels"),
    ]:
        with pytest.raises(error, match=match):
            st.calibrate.gradients(model, rows(2), loss, ["0", "4"], sketch=2)
        unchanged(before, snapshot(model))
    with pytest.raises(st.DivergenceError, match="inputs of '0' are not finite"):
        st.calibrate.inputs(model, [torch.full((4, 16), float("inf")).double()], ["0"], components=2)
    unchanged(before, snapshot(model))


def test_bad_requests_are_refused_before_a_pass():
    def never():
        raise AssertionError("a batch was asked for")
        yield

    for options, error, match in [
        ({"importance": ["magic"]}, st.ConfigError, "unknown importance 'magic'; known: union_mean"),
        ({"sketch": -1}, st.StructureError, "sketch must be a whole number of at least 0"),
        ({}, st.ConfigError, "nothing is asked for"),
        ({"sketch": 2, "targets": ["nine"]}, st.TargetError, "'nine' matches nothing"),
    ]:
        with pytest.raises(error, match=match):
            st.calibrate.gradients(toy(), never(), square, options.pop("targets", TOY), **options)
    with pytest.raises(st.DataError, match="no batches"):
        st.calibrate.gradients(toy(), [], square, TOY, sketch=2)
    with pytest.raises(st.DataError, match="no input reaches '0'"):
        st.calibrate.inputs(toy(), [], TOY, components=2)
    with pytest.raises(st.TargetError, match=r"'embed' \(Embedding\): inputs are kept of linear layers only"):
        st.calibrate.inputs(Chain(), BATCHES, ["embed"], components=2)


def test_a_layer_the_loss_does_not_reach_is_named():
    model = nn.ModuleDict({"used": nn.Linear(16, 4), "idle": nn.Linear(16, 4)}).double()
    loss = lambda m, x: m["used"](x).square().mean()  # noqa: E731
    with pytest.warns(UserWarning, match=r"does not reach 1 of 2 layers, whose gradient counts as 0: idle"):
        stats = st.calibrate.gradients(
            model, rows(2), loss, ["used", "idle"], sketch=3, directions=2, importance=["union_mean"]
        )
    assert stats["idle"].sketch.shape == (4, 3) and not stats["idle"].sketch.any()
    assert stats["idle"].importance == {"union_mean": 0.0} and stats["idle"].right.shape == (2, 16)


# ---------------------------------------------------------------- other ways to run a model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.body, self.again = toy(), again

        def forward(self, x):
            if not self.again:
                return self.body(x)
            return checkpoint(self.body, x.requires_grad_(reentrant), use_reentrant=reentrant)

    targets = ["body.0", "body.2"]
    plain, again = (
        st.calibrate.gradients(Checkpointed(a), rows(2), square, targets, sketch=4, directions=2) for a in (False, True)
    )
    for n in targets:
        assert torch.equal(plain[n].sketch, again[n].sketch) and torch.equal(plain[n].right, again[n].right)


def test_autocast_in_the_loss_leaves_the_sums_fp32():
    def loss(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return square(model, x).float()

    model, batches = toy(torch.float32), rows(3, torch.float32)
    exact = st.calibrate.gradients(model, batches, square, TOY, sketch=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = st.calibrate.gradients(model, batches, loss, TOY, sketch=8)
    for n in TOY:
        assert half[n].sketch.dtype == torch.float32
        assert (half[n].sketch - exact[n].sketch).norm() < 0.02 * exact[n].sketch.norm()

    def total(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().sum()

    x = torch.full((1, 1), 1 + 2.0**-12)  # bf16 would make it 1
    s = st.calibrate.gradients(nn.Sequential(nn.Linear(1, 1)), [x], total, ["0"], sketch=1)["0"]
    assert float(s.sketch / s.projection) == pytest.approx(1 + 2.0**-12, rel=1e-6)


def test_a_new_adapter_is_calibrated_on_top_of_the_active_ones():
    model, merged = toy(), toy()
    for m in (model, merged):
        torch.manual_seed(1)
        st.adapt(m, st.lora(rank=2), ["0", "2"], name="below")
        with torch.no_grad():
            for _, p in st.trainable_parameters(m):
                p.add_(torch.ones_like(p) * 0.3)
    st.merge(merged)
    options = {"sketch": 4, "importance": ["union_mean"]}
    a, b = (st.calibrate.gradients(m, rows(2), square, TOY, **options) for m in (model, merged))
    for n in TOY:
        same(a[n].sketch, b[n].sketch, 1e-10)
        assert a[n].importance == pytest.approx(b[n].importance, rel=1e-10)
    assert len(hosts(model)) == 2 and len([p for _, p in st.trainable_parameters(model)]) == 4


def test_transformers_model_with_its_own_loss():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable()
    batches = [{"input_ids": b, "labels": b} for b in BATCHES]
    stats = st.calibrate.gradients(model, batches, sketch=3)
    assert len(stats) == 14 and model.training
    plain = st.calibrate.gradients(tiny_llama(), batches, sketch=3)
    for n in stats:
        same(stats[n].sketch, plain[n].sketch, 1e-6)
    with pytest.raises(st.DataError, match="has no loss; put labels into the batches"):
        st.calibrate.gradients(model, [{"input_ids": BATCHES[0]}], sketch=3)


def test_progress_counts_batches_of_all_passes():
    told = []
    st.calibrate.gradients(toy(), rows(2), square, TOY, directions=2, progress=lambda *v: told.append(v))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    st.calibrate.gradients(toy(), iter(rows(2)), square, TOY, sketch=2, progress=lambda *v: told.append(v))
    assert told == [(1, 0), (2, 0)]


class Largest(TorchDispatchMode):
    """The most numbers in one tensor made inside, the model's own apart."""

    def __init__(self, model):
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.own:
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_no_weight_gradient_is_made_while_streaming():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 160), nn.Tanh(), nn.Linear(160, 120))
    batches = rows(2, torch.float32, size=6, width=200)
    names = ["gradient_frobenius_sketch", "union_frobenius_probes"]
    for options, most in [
        ({"sketch": 8, "directions": 8, "importance": names}, 16 * 200),
        ({"importance": ["union_mean"]}, 160 * 200),
    ]:
        with Largest(model) as largest:
            st.calibrate.gradients(model, batches, square, TOY, **options)
        assert largest.numel == most


# ---------------------------------------------------------------- several processes


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    options = {"floor": 1, "ceiling": 8}
    # three batches here, one there
    batches = rows(4)[:3] if rank == 0 else rows(4)[3:]
    recipe, stats = st.calibrate.fit(st.gora(rank=4, **options), toy(), batches, square, TOY)
    seen = st.calibrate.inputs(toy(), batches, TOY, components=3)
    found = {n: (s.sketch, s.importance, seen[n].components, seen[n].rows, seen[n].total) for n, s in stats.items()}
    torch.save((recipe.to_dict(), found), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    recipe, stats = st.calibrate.fit(st.gora(rank=4, floor=1, ceiling=8), toy(), rows(4), square, TOY)
    seen = st.calibrate.inputs(toy(), rows(4), TOY, components=3)
    for rank in (0, 1):
        theirs, tensors = torch.load(tmp_path / f"{rank}.pt")
        assert theirs == recipe.to_dict()
        for n in TOY:
            same(tensors[n][0], stats[n].sketch)
            assert tensors[n][1] == pytest.approx(stats[n].importance, rel=1e-12)
            same(tensors[n][2], seen[n].components, 1e-9 if n == "0" else 0.05)  # nearly, where rows are cut
            assert tensors[n][3:] == pytest.approx((seen[n].rows, seen[n].total))


# ---------------------------------------------------------------- inputs


def test_inputs_are_the_singular_vectors_of_all_of_them():
    model, batches = toy(), rows(5)
    stats = st.calibrate.inputs(model, batches, TOY, components=4)
    X = torch.cat(batches)
    for n, given in (("0", X), ("2", model[:2](X).detach())):
        _, values, vectors = torch.linalg.svd(given)
        s = stats[n]
        assert s.rows == 40 and s.total == pytest.approx(float(given.square().sum()))
        # 16 of 16 kept, and 16 of 24: exact there, nearly here
        tolerance = 1e-10 if n == "0" else 0.02
        same(s.singular_values, values[:4], tolerance)
        overlap = (s.components * vectors[:4]).sum(1).abs()
        assert float(overlap.min()) > 1 - tolerance
        same(s.components @ s.components.t(), torch.eye(4, dtype=torch.float64))


def test_batches_without_rows_count_nothing():
    """As of an expert that gets no token, or text that is all padding."""
    model, batches = toy(), rows(3)
    empty = batches[0][:0]
    with_empty = st.calibrate.inputs(model, [empty, *batches[:1], empty, *batches[1:]], TOY, components=4)
    plain = st.calibrate.inputs(model, batches, TOY, components=4)
    for n, s in plain.items():
        assert with_empty[n].rows == s.rows == 24
        assert torch.equal(with_empty[n].components, s.components)
    with pytest.raises(st.DataError, match="no input reaches '0'"):
        st.calibrate.inputs(model, [empty], TOY, components=4)


class Residual(nn.Module):
    """Changes a layer's input in place behind its back, which no backward pass would forgive; and two layers that are
    given one tensor, with a change in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x.clone()
        x += self.a(x) + self.b(x)
        return self.c(x)


def test_inputs_are_those_at_the_time():
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(9, 6)
    with torch.no_grad():
        later = x + model.a(x) + model.b(x)
    stats = st.calibrate.inputs(model, [x], ["a", "b", "c"], components=3)
    for n, given in (("a", x), ("b", x), ("c", later)):
        assert stats[n].total == pytest.approx(float(given.square().sum()))
        torch.testing.assert_close(stats[n].singular_values, torch.linalg.svdvals(given)[:3])
    assert stats["a"].components.equal(stats["b"].components)


def test_inputs_of_large_layers_by_random_projections():
    torch.manual_seed(0)
    scale = 0.9 ** torch.arange(200.0)
    batches = [torch.randn(150, 200) * scale for _ in range(4)]
    stats = st.calibrate.inputs(nn.Sequential(nn.Linear(200, 4)), batches, ["0"], components=8)["0"]
    _, values, vectors = torch.linalg.svd(torch.cat(batches))
    assert float(((stats.singular_values - values[:8]) / values[:8]).abs().max()) < 0.01
    inside = (stats.components @ vectors[:8].t()).norm(dim=1)
    assert float(inside.min()) > 0.98


def test_padding_does_not_count_as_input():
    model = tiny_llama()
    ids = torch.randint(0, 31, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    targets = ["q_proj", "k_proj", "down_proj"]
    stats = st.calibrate.inputs(model, [{"input_ids": ids, "attention_mask": mask}], targets, components=3)
    caught = {}
    for n, m in model.named_modules():
        if n in stats:
            m.register_forward_pre_hook(lambda _, a, n=n: caught.__setitem__(n, a[0][mask.bool()]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for n, s in stats.items():
        assert s.rows == 10
        same(s.singular_values, torch.linalg.svdvals(caught[n])[:3], 1e-5)
    q, k = (stats[f"model.layers.0.self_attn.{n}"] for n in ("q_proj", "k_proj"))
    assert torch.equal(q.components, k.components)


def test_padding_by_a_mask_that_is_added_does_not_count_as_input():
    x, real = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    added = torch.zeros(2, 1, 1, 6).masked_fill(~real[:, None, None], -1e9)
    batch = {"input": x, "attention_mask": added}
    model = nn.Sequential(nn.Linear(8, 4))
    stats = st.calibrate.inputs(model, [batch], ["0"], components=3, forward=lambda m, b: m(b["input"]))["0"]
    assert stats.rows == 10
    same(stats.singular_values, torch.linalg.svdvals(x[real])[:3], 1e-5)


# ---------------------------------------------------------------- fit


def test_a_recipe_that_needs_nothing_comes_back_and_no_batch_is_taken():
    def never():
        raise AssertionError("a batch was asked for")
        yield

    recipe = st.dora(rank=2)
    assert st.calibrate.fit(recipe, toy(), never(), square, TOY) == (recipe, {})


def test_fit_refuses_what_it_does_not_know():
    for recipe, match in [
        (st.Recipe(st.LowRank, init={"magic": {}}), "unknown initialiser 'magic'"),
        (st.Recipe(st.LowRank, allocation={"magic": {}}), "unknown allocator 'magic'; known: eva, gora"),
        (st.Recipe(st.LowRank, allocation={"gora": {"magic": 1}}), "gora has no option 'magic'"),
        (st.Recipe(st.LowRank, allocation={"gora": {}, "eva": {}}), "from gradients and from inputs"),
        (st.Recipe(st.BlockCirculant, {"block": 4}, allocation={"gora": {}}), "allocates ranks, and BlockCirculant"),
    ]:
        with pytest.raises(st.StructureError, match=match):
            st.calibrate.fit(recipe, toy(), rows(1), square, TOY)


def test_names_that_end_in_another_keep_their_own_rank():
    model = nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 4)}), "[x]": nn.Linear(4, 4)})
    recipe = st.allocate.with_ranks(st.lora(), {"b.a": 3, "a": 2, "[x]": 1})
    assert [recipe.for_layer(n).options["rank"] for n in ("a", "b.a", "[x]")] == [2, 3, 1]
    st.adapt(model, recipe)
    assert {r.name: r.rank for r in st.summary(model).rows} == {"a": 2, "b.a": 3, "[x]": 1}
