"""Ranks taken away and added in place: what must stay the same does so bit for bit, the optimizer's rows included."""

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn

import slimtune as st
from cases import METHODS, Chain, One, adapt, dense_forward, gradients, shake
from slimtune.peft_format.names import lookup, pattern_table
from slimtune.ranks import change_ranks, rank_sizes, seeded
from slimtune.targets import hosts

CORE = st.Recipe(st.LowRank, {"rank": 4, "core": True}, alpha=4.0, rank_power=1.0, name="core")


def structures(model):
    return {name: host.adapters["default"].structure for name, host in hosts(model).items()}


def one_layer(recipe, dtype=torch.float64):
    torch.manual_seed(0)
    model = One(nn.Linear(6, 5).to(dtype)).eval()
    adapt(model, recipe, ["layer"])
    shake(model)
    return model, torch.randn(3, 7, 6, dtype=dtype, requires_grad=True)


def is_resizable(method):
    if "linear" in method.refuses:
        return False
    structure = structures(one_layer(method.recipe())[0])["layer"]
    return bool(structure.rank_dims) and isinstance(structure, st.Factored)


RESIZABLE = pytest.mark.parametrize("method", [m for m in METHODS if is_resizable(m)], ids=lambda m: m.id)


def toy(recipe=None, dtype=torch.float32):
    """The sheet's: Linear(16, 24), ReLU, Linear(24, 8), 64 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
    x, y = torch.randn(64, 16, dtype=dtype), torch.randn(64, 8, dtype=dtype)
    st.adapt(model, recipe or st.lora(rank=4), ["0", "2"])
    return model, x, y


def step(model, x, y, optimizer, *after):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    for function in after:
        function()
    optimizer.step()
    return loss.item()


def snapshot(model, optimizers=()):
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = [copy.deepcopy(o.state_dict()) for o in optimizers]
    return state, moments


def assert_same(a, b):
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(t, b[0][n]) for n, t in a[0].items())
    for left, right in zip(a[1], b[1], strict=True):
        assert left["param_groups"] == right["param_groups"]
        assert left["state"].keys() == right["state"].keys()
        for p, state in left["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(right["state"][p][key])), key


# ---------------------------------------------------------------- what the model computes


@RESIZABLE
def test_growing_changes_neither_outputs_nor_gradients(method):
    model, x = one_layer(method.recipe())
    structure = structures(model)["layer"]
    before, old = model(x), structure.rank
    grads = dict(zip([n for n, _ in st.trainable_parameters(model)], gradients(before, model, x), strict=False))
    assert st.resize(model, {"layer": old + 3}) == {"layer": old + 3}
    after = model(x)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense_forward(model.layer, x), before, rtol=1e-12, atol=1e-12)
    now = dict(zip(grads, gradients(after, model, x), strict=False))
    moved = 0.0
    for name, grad in grads.items():
        dim = structure.rank_dims.get(name.rpartition(".")[2])
        kept = now[name] if dim is None else now[name].narrow(dim, 0, old)
        torch.testing.assert_close(kept, grad, rtol=1e-10, atol=1e-10)
        moved += 0.0 if dim is None else float(now[name].narrow(dim, old, 3).abs().sum())
    assert moved > 0  # new ranks are alive


def test_growing_is_exact():
    """Numbers that add without rounding: not a bit of the output differs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24))
    st.adapt(model, st.lora(rank=4, alpha=4), ["0"])
    x = torch.randint(-4, 5, (7, 40)).float()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-8, 9, p.shape) / 8)
    before = model(x)
    st.resize(model, {"0": 9})
    assert torch.equal(model(x), before)


@RESIZABLE
def test_shrinking_keeps_the_largest(method):
    model, _ = one_layer(method.recipe())
    structure = structures(model)["layer"]
    old, sizes = copy.deepcopy(structure), rank_sizes(structure)
    shares = []
    for j in range(len(sizes)):
        without = copy.deepcopy(structure)
        change_ranks(without, [i for i in range(len(sizes)) if i != j])
        shares.append((structure.dense() - without.dense()).detach())
    expected = torch.stack([share.norm() for share in shares])
    torch.testing.assert_close(sizes, expected)
    keep = sorted(range(len(sizes)), key=lambda j: -float(sizes[j]))[: len(sizes) - 1]
    st.resize(model, {"layer": len(sizes) - 1})
    for name, dim in structure.rank_dims.items():
        kept = getattr(old, name).index_select(dim, torch.tensor(sorted(keep)))
        assert torch.equal(getattr(structure, name), kept), name
    smallest = min(range(len(sizes)), key=lambda j: float(sizes[j]))
    torch.testing.assert_close(old.dense() - structure.dense(), shares[smallest], rtol=1e-10, atol=1e-12)


def test_the_scale_stays():
    model, _, _ = toy(st.lora(rank=4, alpha=6))
    st.resize(model, {"0": 7, "2": 1})
    assert [host.adapters["default"].scale.item() for host in hosts(model).values()] == [1.5, 1.5]
    assert [row.rank for row in st.summary(model).rows] == [7, 1]


def test_new_ranks_come_from_the_seed_and_the_name():
    found = []
    for seed, disturbance in ((0, 0), (0, 1), (1, 0)):
        model, _, _ = toy()
        torch.manual_seed(disturbance)
        st.resize(model, {"0": 6, "2": 6}, seed=seed)
        found.append([s.A[4:].clone() for s in structures(model).values()])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1][:, :16])
    assert seeded(0, "a").initial_seed() != seeded(0, "b").initial_seed()


def test_norms_kept_without_gradients_are_computed_anew():
    """DoRA keeps m / |V| by its tensors' addresses and versions, and an address comes back after two changes."""
    model, x = one_layer(st.dora(rank=6))
    structure = structures(model)["layer"]
    whole = {name: getattr(structure, name).detach().clone() for name in structure.rank_dims}
    with torch.no_grad():
        for round in range(3):
            model(x)
            before = [p._version for p in structure.parameters()]
            change_ranks(structure, [0, 1], None)
            new = {n: (1 + round) * t.narrow(structure.rank_dims[n], 2, 4) for n, t in whole.items()}
            change_ranks(structure, [0, 1], new)
            assert [p._version for p in structure.parameters()] == [v + 2 for v in before]
            torch.testing.assert_close(model(x), dense_forward(model.layer, x), rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- the optimizer

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd-plain": lambda p: torch.optim.SGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}
AT_THE_MEAN = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "acc_delta", "step_size"}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("recipe", [st.lora(rank=4), CORE], ids=lambda r: r.name)
def test_kept_rows_keep_their_state(name, recipe):
    """Shrink, then grow: rows that stay have the same bits, new ones a zero momentum and the mean second moment."""
    model, x, y = toy(recipe)
    shake(model, 0.1)
    optimizer = OPTIMIZERS[name](st.param_groups(model, lr=1e-2))
    for _ in range(3):
        step(model, x, y, optimizer)
    schedule = [(group["lr"], [id(p) for p in group["params"]]) for group in optimizer.param_groups]
    for rank in (2, 5):
        before = {
            (layer, key): (p, p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {})))
            for layer, structure in structures(model).items()
            for key, p in structure.named_parameters()
        }
        sizes = {layer: rank_sizes(structure) for layer, structure in structures(model).items()}
        st.resize(model, {"0": rank, "2": rank}, optimizer)
        for (layer, key), (p, value, state) in before.items():
            structure = structures(model)[layer]
            assert getattr(structure, key) is p
            dim = structure.rank_dims[key]
            keep = torch.tensor(sorted(sizes[layer].argsort(descending=True)[:rank].tolist()))
            assert torch.equal(p.narrow(dim, 0, len(keep)), value.index_select(dim, keep))
            now = optimizer.state.get(p, {})
            assert now.keys() == state.keys()
            for what, old in state.items():
                if not torch.is_tensor(old) or old.shape != value.shape:
                    assert torch.equal(torch.as_tensor(now[what]), torch.as_tensor(old)), what  # the count of steps
                    continue
                kept = old.index_select(dim, keep)
                assert now[what].shape == p.shape
                assert torch.equal(now[what].narrow(dim, 0, len(keep)), kept), what
                new = now[what].narrow(dim, len(keep), rank - len(keep))
                fill = kept.mean(dim, keepdim=True) if what in AT_THE_MEAN else torch.zeros(())
                assert torch.equal(new, fill.expand_as(new)), what
    assert schedule == [(group["lr"], [id(p) for p in group["params"]]) for group in optimizer.param_groups]
    losses = [step(model, x, y, optimizer) for _ in range(3)]
    assert all(map(math.isfinite, losses))


def test_the_first_step_of_a_new_rank_is_no_longer_than_a_learning_rate():
    """A second moment of 0 under a step count of 1000 makes it 2.5 of them."""
    for fresh, least, most in ((False, 0.0, 1.0), (True, 2.5, 3.2)):
        model, x, y = toy()
        optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-4), weight_decay=0.0)
        step(model, x, y, optimizer)
        for p, state in optimizer.state.items():  # as after a thousand steps of such gradients
            state["step"].fill_(1000)
            state["exp_avg_sq"].copy_(p.grad.square().mean().expand_as(p))
        st.resize(model, {"0": 6}, optimizer)
        B = structures(model)["0"].B
        if fresh:  # what a plain padding with zeros does
            optimizer.state[B]["exp_avg_sq"][:, 4:] = 0
        step(model, x, y, optimizer)
        longest = (B[:, 4:].abs().max() / 1e-4).item()
        assert least < longest < most, longest


def test_a_run_goes_on_as_if_the_ranks_had_never_been_there():
    """Two of four ranks are dead; taken away in mid-run, with decay, a schedule, accumulation, and a list for clipping
    made at the start, the end is that of a run at rank 2."""
    ends = []
    for rank in (2, 4):
        model, x, y = toy(st.lora(rank=rank, alpha=rank), torch.float64)
        torch.manual_seed(1)
        with torch.no_grad():
            for structure in structures(model).values():
                A, B = torch.randn(2, structure.in_features), torch.randn(structure.out_features, 2)
                for p, value in ((structure.A, A), (structure.B, B)):
                    p.zero_()[: value.shape[0], : value.shape[1]] = value * 0.3
        clipped = [p for _, p in st.trainable_parameters(model)]
        optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2, b_ratio=4, weight_decay=0.1))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for number in range(12):
            if number == 5 and rank == 4:
                assert st.compact(model, optimizer) == {"0": 2, "2": 2}
            optimizer.zero_grad()
            for part in range(2):
                (model(x[part::2]) - y[part::2]).square().mean().div(2).backward()
            nn.utils.clip_grad_norm_(clipped, 0.05)
            optimizer.step()
            schedule.step()
        ends.append(snapshot(model)[0])
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, rtol=1e-10, atol=1e-12)


def test_gradients_between_two_batches_are_cut_along():
    model, x, y = toy(dtype=torch.float64)
    shake(model)
    (model(x[:32]) - y[:32]).square().sum().backward()
    structure = structures(model)["0"]
    keep = torch.tensor(sorted(rank_sizes(structure).argsort(descending=True)[:2].tolist()))
    A, B = structure.A.grad.clone(), structure.B.grad.clone()
    st.resize(model, {"0": 2})
    assert torch.equal(structure.A.grad, A[keep]) and torch.equal(structure.B.grad, B[:, keep])
    st.resize(model, {"0": 3})
    first = {n: p.grad.clone() for n, p in st.trainable_parameters(model)}
    assert not structure.A.grad[2:].any() and not structure.B.grad[:, 2:].any()
    (model(x[32:]) - y[32:]).square().sum().backward()
    total = {n: p.grad.clone() for n, p in st.trainable_parameters(model)}
    model.zero_grad()
    (model(x[32:]) - y[32:]).square().sum().backward()
    for n, p in st.trainable_parameters(model):
        torch.testing.assert_close(total[n], first[n] + p.grad)


@pytest.mark.parametrize("ranks", [{"0": 6, "2": 5}, {"0": 2, "2": 1}], ids=["grow", "shrink"])
def test_a_loss_that_is_still_alive(ranks):
    """Autograd remembers shapes through it; new graphs must not see them, and its own backward must not pass."""
    model, x, y = toy()
    shake(model)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2))
    step(model, x, y, optimizer)
    alive = (model(x) - y).square().mean()
    seen = []
    structures(model)["0"].A.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    st.resize(model, ranks, optimizer)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        alive.backward(retain_graph=True)
    assert_same(before, snapshot(model))
    assert not seen
    assert math.isfinite(step(model, x, y, optimizer))
    assert seen == [(ranks["0"], 16)]


@pytest.mark.parametrize("rank", [3, 1, 6])
@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_factored_moments(library, rank):
    """Adafactor's means over the other dimension are cut and extended, those over ranks stay."""
    model, x, y = toy(CORE)
    shake(model, 0.1)
    if library == "torch":
        optimizer = torch.optim.Adafactor(st.param_groups(model, lr=1e-2), lr=1e-2)
        names = {"row_var": 1, "col_var": 0}
    else:
        adafactor = pytest.importorskip("transformers").Adafactor
        optimizer = adafactor(st.param_groups(model, lr=1e-2), lr=1e-2, relative_step=False, scale_parameter=False)
        names = {"exp_avg_sq_row": 1, "exp_avg_sq_col": 0}
    for _ in range(3):
        step(model, x, y, optimizer)
    structure = structures(model)["0"]
    keep = torch.tensor(sorted(rank_sizes(structure).argsort(descending=True)[:rank].tolist()))
    before = {key: copy.deepcopy(optimizer.state[p]) for key, p in structure.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        st.resize(model, {"0": rank}, optimizer)
        for name, over in names.items():
            for key, dim in (("A", 0), ("B", 1)):
                old, new = before[key][name], optimizer.state[getattr(structure, key)][name]
                if over == dim:
                    assert torch.equal(new, old)
                    continue
                old, new = old.flatten(), new.flatten()
                assert torch.equal(new, torch.cat([old[keep], old[keep].mean().expand(rank - len(keep))]))
        assert all(math.isfinite(step(model, x, y, optimizer)) for _ in range(2))
        st.resize(model, {"0": 5}, optimizer)
        assert all(math.isfinite(step(model, x, y, optimizer)) for _ in range(2))


class Blocks(torch.optim.AdamW):
    """Keeps something in blocks, as 8-bit optimizers do."""

    def step(self, closure=None):
        super().step(closure)
        for p, state in self.state.items():
            state["absmax"] = torch.ones(2 + p.numel() // 256)


def test_moments_that_cannot_be_told_apart_start_afresh():
    model, x, y = toy()
    optimizer = Blocks(st.param_groups(model, lr=1e-2))
    for _ in range(3):
        step(model, x, y, optimizer)
    first, second = structures(model).values()
    other = copy.deepcopy(optimizer.state[second.A])
    with pytest.warns(UserWarning, match="Blocks keeps state of another shape"):
        st.resize(model, {"0": 6}, optimizer)
    assert first.A not in optimizer.state and first.B not in optimizer.state
    assert all(torch.equal(v, other[k]) for k, v in optimizer.state[second.A].items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(math.isfinite(step(model, x, y, optimizer)) for _ in range(2))
    assert optimizer.state[first.A]["step"] == 2 and optimizer.state[second.A]["step"] == 5


def test_several_optimizers_and_wrapped_ones():
    """The factors in two optimizers; one of them comes twice, once inside a wrapper. Its rows are cut once."""

    class Wrapper:  # what accelerate makes of an optimizer
        def __init__(self, optimizer):
            self.optimizer = optimizer

    ends = []
    for several in (False, True):
        model, x, y = toy()
        shake(model, 0.1)
        A = [s.A for s in structures(model).values()]
        B = [s.B for s in structures(model).values()]
        make = torch.optim.AdamW
        optimizers = [make(A, lr=1e-2), make(B, lr=1e-2)] if several else [make([*A, *B], lr=1e-2)]
        for number in range(6):
            for o in optimizers:
                o.zero_grad()
            (model(x) - y).square().mean().backward()
            for o in optimizers:
                o.step()
            if number in (2, 4):
                target = [*optimizers, Wrapper(optimizers[0])] if several else Wrapper(optimizers[0])
                st.resize(model, {"0": 3 + number % 4, "2": 3}, target)
        ends.append(snapshot(model))
    assert_same(*ends)


# ---------------------------------------------------------------- errors


def test_nothing_is_half_changed():
    """The second layer is refused: neither it nor the first one has changed."""
    torch.manual_seed(0)
    model = Chain()
    st.adapt(model, st.lora(rank=3), ["up", "down"])
    shake(model)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2))
    model(Chain.ids()).sum().backward()
    optimizer.step()
    structure = model.down.adapters["default"].structure
    before = snapshot(model, [optimizer])
    for bad, kind, words in (
        ({"up": 2, "down": 0}, st.StructureError, "resize: rank of 'down' must be a whole number of at least 1, got 0"),
        ({"up": 2, "down": True}, st.StructureError, "rank of 'down' must be a whole number"),
        ({"up": 2, "down": 2.0}, st.StructureError, "rank of 'down' must be a whole number"),
        ({"up": 2, "hf": 2}, st.TargetError, "no layer 'hf' carries adapter 'default'; it has up, down"),
    ):
        with pytest.raises(kind, match=words):
            st.resize(model, bad, optimizer)
        assert_same(before, snapshot(model, [optimizer]))
    with pytest.raises(st.AdapterNameError, match="no adapter named 'other'"):
        st.resize(model, {"up": 2}, optimizer, "other")
    with pytest.raises(st.AdapterNameError, match="no adapter named 'other'"):
        st.compact(model, optimizer, "other")
    for wrong in (None, "adamw", [optimizer, model]):
        with pytest.raises(st.SlimtuneError, match="expected a torch optimizer"):
            st.resize(model, {"up": 2}, wrong)
        with pytest.raises(st.SlimtuneError, match="expected a torch optimizer"):
            st.compact(model, wrong)
    sharded = structure.B
    sharded.full_tensor = lambda: sharded  # all that tells a sharded tensor
    with torch.no_grad():
        structure.A[0] = model.up.adapters["default"].structure.A[0] = 0
    before = snapshot(model, [optimizer])
    for change in (lambda: st.resize(model, {"up": 2, "down": 2}, optimizer), lambda: st.compact(model, optimizer)):
        with pytest.raises(st.SlimtuneError, match="down: B is sharded"):
            change()
        assert_same(before, snapshot(model, [optimizer]))
    del sharded.full_tensor
    assert st.compact(model, optimizer) == {"up": 2, "down": 2}


def test_structures_whose_ranks_cannot_change():
    model = nn.Sequential(nn.Linear(6, 6))
    st.adapt(model, st.bone(rank=2), ["0"])
    with pytest.raises(st.StructureError, match=r"resize: 0: the ranks of \w+ cannot change"):
        st.resize(model, {"0": 3})
    assert st.compact(model) == {}
    with pytest.raises(st.StructureError, match="ranks cannot be added"):
        structures(model)["0"].new_ranks(1, seeded(0))
    with pytest.raises(st.StructureError, match="not a product of two thin factors"):
        rank_sizes(st.Circulant(6, 6))


def test_adapters_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6))
    st.adapt(model, st.lora(rank=2), ["0"])
    for change in (lambda: st.resize(model, {"0": 3}), lambda: st.compact(model)):
        with pytest.raises(st.UninitializedError, match="0: A is still on the meta device"):
            change()


@pytest.mark.parametrize(
    ("keep", "new", "words"),
    [
        ([0, 0], None, r"must be different ones of 0 .. 3, got \[0, 0\]"),
        ([4], None, r"must be different ones of 0 .. 3, got \[4\]"),
        ([-1], None, r"must be different ones of 0 .. 3, got \[-1\]"),
        ([], None, "at least one rank must be left"),
        ([0], {"A": (1, 6)}, "new ranks need A, B, got A"),
        ([0], {"A": (1, 6), "B": (5, 2)}, r"of different number: \[1, 2\]"),
        ([0], {"A": (1, 7), "B": (5, 1)}, r"new ranks of A have shape \(1, 7\), its own is \(4, 6\)"),
        ([0], {"A": (1, 6), "B": (5,)}, r"new ranks of B have shape \(5,\), its own is \(5, 4\)"),
    ],
    ids=str,
)
def test_changes_that_do_not_fit(keep, new, words):
    model, _ = one_layer(st.lora(rank=4))
    structure = structures(model)["layer"]
    before = snapshot(model)
    with pytest.raises(st.StructureError, match=words):
        change_ranks(structure, keep, new and {name: torch.ones(shape) for name, shape in new.items()})
    assert_same(before, snapshot(model))


def test_all_ranks_may_be_replaced():
    model, x, y = toy()
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2))
    step(model, x, y, optimizer)
    structure = structures(model)["0"]
    mean = optimizer.state[structure.B]["exp_avg_sq"].mean(1, keepdim=True)
    change_ranks(structure, [], structure.new_ranks(2, seeded(0)), [optimizer])
    assert torch.equal(optimizer.state[structure.B]["exp_avg_sq"], mean.expand(24, 2))
    assert math.isfinite(step(model, x, y, optimizer))


# ---------------------------------------------------------------- compact


def test_compact_takes_away_what_contributes_nothing():
    model, x, y = toy(CORE, torch.float64)
    shake(model, 0.1)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2))
    step(model, x, y, optimizer)
    with torch.no_grad():
        structures(model)["0"].core[[0, 2]] = 0
        structures(model)["2"].core.zero_()
    before = model(x)
    kept = {k: p.detach().clone() for k, p in structures(model)["0"].named_parameters()}

    def numbers():
        own = [p for _, p in st.trainable_parameters(model)]
        moments = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
        return sum(p.numel() for p in own), sum(p.grad.numel() for p in own), moments

    per_rank = {"0": 16 + 24 + 1, "2": 24 + 8 + 1}
    assert numbers() == (n := 4 * sum(per_rank.values()), n, 2 * n)
    assert st.compact(model, optimizer) == {"0": 2, "2": 1}  # one is left, though it does nothing
    assert numbers() == (n := 2 * per_rank["0"] + per_rank["2"], n, 2 * n)
    structure = structures(model)["0"]
    for key, dim in structure.rank_dims.items():
        assert torch.equal(getattr(structure, key), kept[key].index_select(dim, torch.tensor([1, 3])))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert math.isfinite(step(model, x, y, optimizer))
    assert st.compact(model, optimizer) == {"0": 2, "2": 1}


# ---------------------------------------------------------------- files


class Names(nn.Module):
    """Layers whose names are suffixes of others', or fit others as regular expressions."""

    names = ("fc", "a.fc", "axfc", "b.a.fc", "q+k", "w(1|2)", "w1", "w", "d-e")

    def __init__(self):
        super().__init__()
        for name in self.names:
            parent = self
            *path, last = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.add_module(last, nn.Linear(8, 8))

    def forward(self, x):
        for name in self.names:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


METHODS_OF_PEFT = {
    "lora": lambda: st.lora(rank=3, alpha=4),
    "rslora": lambda: st.rslora(rank=3, alpha=4),
    "dora": lambda: st.dora(rank=3, alpha=4),
}


def resized(make, model):
    """Nine layers of ranks 1 to 9."""
    st.adapt(model, make(), ".*")
    shake(model)
    st.resize(model, {name: 1 + number for number, name in enumerate(Names.names)})
    shake(model, 0.1)
    return model.eval()


@pytest.mark.parametrize("method", METHODS_OF_PEFT)
def test_ranks_of_their_own_in_peft(method, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Names()
    model = resized(METHODS_OF_PEFT[method], copy.deepcopy(base))
    st.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert len(config["rank_pattern"]) == len(Names.names) - 1
    x = torch.randn(5, 8)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
        for name in Names.names:
            assert theirs.base_model.model.get_submodule(name).lora_A["default"].weight.shape[0] == (
                1 + Names.names.index(name)
            )
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-6, atol=1e-6)
        again = copy.deepcopy(base)
        st.load(again, tmp_path)
        assert torch.equal(again(x), model(x))  # the scale is in the manifest
        theirs.save_pretrained(tmp_path / "theirs")
        st.load(base, tmp_path / "theirs")
        torch.testing.assert_close(base(x), model(x), rtol=1e-6, atol=1e-6)
    assert [row.rank for row in st.summary(base).rows] == [row.rank for row in st.summary(model).rows]


def test_pattern_keys_fit_nothing_else():
    """Whatever the values: every name finds its own, though PEFT takes the first key that fits."""
    for number in range(40):
        draw = torch.Generator().manual_seed(number)
        values = {name: int(torch.randint(1, 4, (), generator=draw)) for name in Names.names}
        table = dict(sorted(pattern_table(values, 1).items()))
        assert {name: lookup(table, name, 1, "table") for name in Names.names} == values
    assert pattern_table({"x.q": 1, "x.k": 2, "x.v": 2}, 1) == {"x.k": 2, "x.v": 2}  # plain where it can be


@RESIZABLE
def test_ranks_of_their_own_in_our_format(method, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    model = copy.deepcopy(base)
    adapt(model, method.recipe(), ["0", "1"])
    shake(model)
    old = structures(model)["0"].rank
    st.resize(model, {"0": old + 2, "1": old - 1})
    st.save(model, tmp_path)
    st.load(base, tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(base.eval()(x), model.eval()(x))
    assert [row.rank for row in st.summary(base).rows] == [old + 2, old - 1]
    for one, two in zip(hosts(base).values(), hosts(model).values(), strict=True):
        assert torch.equal(one.adapters["default"].scale, two.adapters["default"].scale)


@pytest.mark.parametrize("make", [*METHODS_OF_PEFT.values(), lambda: CORE], ids=[*METHODS_OF_PEFT, "core"])
def test_conversion_pads_to_one_rank(make, tmp_path):
    torch.manual_seed(0)
    model = resized(make, Names().double())
    x = torch.randn(5, 8, dtype=torch.float64)
    before = model(x)
    report = st.to_lora(model, rank=8)
    # DoRA is fitted; the others have factors by algebra, at no more than min(O, I) of them
    assert {row.rank for row in st.summary(model).rows} == {report.rank} == {8}
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [METHODS_OF_PEFT["lora"], lambda: CORE], ids=["lora", "core"])
def test_conversion_can_leave_ranks_of_their_own(make, tmp_path):
    """Which PEFT reads as plain LoRA; nothing is padded."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Names()
    model = resized(make, copy.deepcopy(base))
    ranks = {row.name: min(row.rank, 8) for row in st.summary(model).rows}
    x = torch.randn(5, 8)
    before = model(x)
    report = st.to_lora(model, padded=False)
    assert {row.name: row.rank for row in st.summary(model).rows} == ranks
    assert report.rank == 8 and report.numbers == 16 * sum(ranks.values())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    st.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-6, atol=1e-6)
    st.load(base, tmp_path)
    assert torch.equal(base.eval()(x), model(x))


@pytest.mark.parametrize("cut", [2, 4, 6], ids=["before", "at", "after"])
@pytest.mark.parametrize("recipe", [st.lora(rank=4), CORE], ids=lambda r: r.name)
def test_a_run_whose_ranks_change_is_resumed_to_the_bit(recipe, cut, tmp_path):
    """A plain loop, saved before, at and after a change of ranks; another process would do the same from the files."""

    def start(load):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        if load:
            st.load(model, tmp_path / "adapter")
        else:
            st.adapt(model, recipe, ["0", "2"])
            shake(model, 0.1)
        optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2, b_ratio=4), weight_decay=0.1)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def train(model, optimizer, schedule, steps):
        for number in steps:
            draw = torch.Generator().manual_seed(number)
            x, y = torch.randn(32, 16, generator=draw), torch.randn(32, 8, generator=draw)
            step(model, x, y, optimizer)
            schedule.step()
            if number == 3:
                st.resize(model, {"0": 6, "2": 2}, optimizer, seed=7)

    whole = start(False)
    train(*whole, range(10))
    first = start(False)
    train(*first, range(cut))
    st.save(first[0], tmp_path / "adapter")
    torch.save([part.state_dict() for part in first[1:]], tmp_path / "rest.pt")
    second = start(True)
    for part, state in zip(second[1:], torch.load(tmp_path / "rest.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, range(cut, 10))
    assert_same(snapshot(whole[0], [whole[1]]), snapshot(second[0], [second[1]]))
