"""Cuttlefish: stable ranks and the detector by the sheet's numbers, the switch exact, nothing lost on the way."""

import copy
import itertools
import json
import math
import pickle
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimtune as st
from slimtune import speedup
from slimtune.compress import describe_structures, part_of, shape_as
from slimtune.controllers import cuttlefish as module
from slimtune.controllers.plateau import settled
from slimtune.controllers.stableranks import frobenius_decay, random_stable_rank, scaled_rank, stable_ranks
from slimtune.errors import DivergenceError, SlimtuneError, StructureError, TargetError
from slimtune.factors.base import matrices
from slimtune.ops import effective_rank, lanczos, participation_rank, rank_by_energy
from slimtune.structured import Structured


class Net(nn.Module):
    """Strided, grouped, dilated, with biases, batch norm and a shortcut; defined in another order than it is called."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 5)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.downsample = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.second = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.weigh = nn.Linear(16, 32)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.norm(self.first(x)) + self.downsample(x)).relu()
        return self.head(self.weigh(self.second(x).mean((2, 3))).relu())


CHOSEN = ["second", "first", "weigh"]


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, 8, 8, generator=generator)
    return x, (x.mean((2, 3)) @ torch.randn(3, 5, generator=generator)).argmax(1)


def make(optimizer="sgd", seed=0, **options):
    torch.manual_seed(seed)
    model = Net()
    if optimizer == "sgd":
        made = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
    else:
        made = torch.optim.AdamW(model.parameters(), 3e-3)
    cuttlefish = st.Cuttlefish(**{"prefix": 0, "total_steps": 40, "period": 1, "multiple": 1, **options})
    return model, made, cuttlefish, st.attach(cuttlefish, model, made)


def train(model, optimizer, steps, after=lambda: None):
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- stable ranks


def rank_of(M):
    layer = nn.Linear(M.shape[1], M.shape[0], dtype=M.dtype)
    layer.weight.data = M
    return stable_ranks({"": layer})[""]


@pytest.mark.parametrize("shape", [(5, 9), (40, 7), (1, 6)])
def test_stable_rank_is_bounded_and_invariant(shape):
    torch.manual_seed(0)
    for _ in range(20):
        M = torch.randn(shape, dtype=torch.float64) * torch.rand(shape[1], dtype=torch.float64) ** 3
        s = torch.linalg.svdvals(M)
        rho = rank_of(M)
        assert rho == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-10)
        chain = [1, rho, participation_rank(s), effective_rank(s), min(shape)]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(chain))
        Q = torch.linalg.qr(torch.randn(shape[0], shape[0], dtype=torch.float64)).Q
        assert rank_of(-7.3 * Q @ M) == pytest.approx(rho, rel=1e-10)


def test_stable_rank_at_its_ends():
    Q = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert rank_of(Q) == pytest.approx(12, rel=1e-12)
    assert rank_of(torch.outer(torch.randn(12), torch.randn(7)).double()) == pytest.approx(1, rel=1e-12)
    assert rank_of(torch.zeros(3, 4)) == 0
    with pytest.raises(DivergenceError, match="'bad'"):
        layer = nn.Linear(3, 3)
        layer.weight.data[0, 0] = math.nan
        stable_ranks({"good": nn.Linear(3, 3), "bad": layer})


@pytest.mark.parametrize("shape", [(512, 4608), (768, 768), (64, 576)])
def test_stable_rank_of_random_weights(shape):
    torch.manual_seed(0)
    assert rank_of(torch.randn(shape)) == pytest.approx(random_stable_rank(*shape), rel=0.06)


def test_layers_of_all_kinds_each_have_their_own():
    torch.manual_seed(0)
    layers = {
        "a": nn.Linear(6, 9),
        "b": nn.Conv2d(4, 6, (3, 2), bias=False),
        "c": nn.Linear(6, 9),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "d": nn.Linear(9, 6),
        "half": nn.Linear(6, 9, dtype=torch.bfloat16),
    }
    with torch.no_grad():
        for factor, layer in enumerate(layers.values(), 1):
            layer.weight[0] *= factor
    for form in ("channel", "spatial"):
        found = stable_ranks(layers, form)
        assert list(found) == list(layers)
        for name, layer in layers.items():
            s = torch.linalg.svdvals(matrices(part_of(layer, name), form))
            assert found[name] == pytest.approx(float((s.square().sum(1) / s[:, 0] ** 2).max()), rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 40, 60), (2, 90, 36), (1, 200, 400)])
def test_lanczos_finds_the_largest_singular_value(shape, monkeypatch):
    torch.manual_seed(0)
    M = torch.randn(shape)
    M[0] *= 0.5 ** torch.arange(shape[2])
    exact = torch.linalg.svdvals(M)[:, 0]
    torch.testing.assert_close(lanczos.spectral_norm(M), exact, rtol=1e-5, atol=0)
    monkeypatch.setattr(lanczos, "EXACT", {"cpu": 1})
    found = lanczos.spectral_norm(M)
    torch.testing.assert_close(found, exact, rtol=3e-4, atol=0)
    assert torch.equal(found, lanczos.spectral_norm(M))
    assert lanczos.spectral_norm(torch.zeros(1, 50, 50)).item() == 0


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e12])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_lanczos_stops_where_a_matrix_of_low_rank_has_no_more_directions(rank, scale):
    g = torch.Generator().manual_seed(0)
    M = torch.randn(700, rank, generator=g) @ torch.randn(rank, 900, generator=g) * scale
    exact = torch.linalg.svdvals(M.double())[:1]
    torch.testing.assert_close(lanczos.spectral_norm(M[None]).double(), exact, rtol=1e-5, atol=0)


def test_a_layer_called_in_two_places_is_refused_when_attached_not_at_the_switch():
    layer = nn.Linear(32, 32)
    model = nn.Sequential(nn.Linear(32, 32), layer, nn.ReLU(), layer, nn.Linear(32, 32), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"total_steps": 8, "prefix": 0}
    with pytest.raises(TargetError, match="shared"):
        st.attach(st.Cuttlefish(targets=["1"], **options), model, optimizer)
    chosen = st.Cuttlefish(**options)
    st.attach(chosen, model, optimizer)
    assert chosen.layers == ["4"]


def test_copies_of_a_model_that_is_listened_to_work():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    st.attach(st.Cuttlefish(total_steps=8), model, optimizer)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    x = torch.randn(3, 16)
    model(x).sum().backward()
    optimizer.step()
    for other in copies:
        other(x).sum().backward()


# ---------------------------------------------------------------- the rank


@pytest.mark.parametrize("full", [1, 10, 27, 64, 512])
def test_the_scaled_rank_is_full_at_the_start_and_never_more(full):
    for first in (1.0, 1.3, 13, 13.7, full / 3, full * 0.99):
        assert scaled_rank(first, first, full) == full  # a rounded xi gives 28 of 27 at 13
        assert scaled_rank(first * 1.5, first, full) == full
        assert scaled_rank(first / 1e9, first, full) == 1


def test_the_scaled_rank_is_exact():
    for first in range(1, 40):
        for now in range(1, first + 1):
            for full in (7, 27, 64):
                r = scaled_rank(now, first, full)
                assert r - 1 < Fraction(full * now, first) <= r


def test_stable_ranks_are_not_cut_to_whole_numbers():
    assert scaled_rank(10.9, 11.9, 100) == 92  # cut, 91
    cuttlefish = make()[2]
    assert cuttlefish.history["first"] == [cuttlefish.first["first"]] != [int(cuttlefish.first["first"])]
    _, _, published, _ = make(published=True)
    assert published.history["first"] == [int(cuttlefish.first["first"])]


# ---------------------------------------------------------------- the detector


def detected(values, count=1, **options):
    """The look at which `count` layers with these values have all settled."""
    history, known = {f"{i}": [] for i in range(count)}, []
    for t in range(200):
        for row in history.values():
            row.append(values(t))
        known += settled(history, known, **options)
        if len(known) == count:
            return t
    return None


def test_constant_ranks_are_detected_at_epoch_15():
    assert detected(lambda t: 50, count=3) == 15


@pytest.mark.parametrize(("tau", "epoch"), [(3, 53), (6, 59), (10, 72)])
def test_decaying_ranks_are_detected_when_published_code_does(tau, epoch):
    assert detected(lambda t: int(40 + 248 * math.exp(-t / tau)), count=3) == epoch


def test_the_last_layers_are_given_more_room():
    def ramp(t):
        return 0.2 * t  # a slope of twice the tolerance

    assert detected(ramp, count=3) is None
    assert detected(ramp, count=2) == detected(ramp, count=1) == 15
    assert detected(ramp, count=6, relax=((3, 5.0), (6, 2.5))) == 15
    assert detected(ramp, count=1, relax=()) is None
    history = {"still": [4.0] * 16, "falls": [40.0 - t for t in range(16)]}
    assert settled(history, ()) == ["still"] and settled(history, ["still"], tail=1) == []


def test_the_published_switch_comes_one_epoch_after_the_detection():
    model, optimizer, cuttlefish, _ = make(total_steps=None, period=1, published=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 15)
    assert cuttlefish.settled_at == 15 and cuttlefish.ranks is None
    train(model, optimizer, 1)
    assert cuttlefish.switched_at == 16 and cuttlefish.ranks == {}  # xi makes all of them full


# ---------------------------------------------------------------- the decision


def rest(model, optimizer):
    """Steps that change nothing."""
    for group in optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)


def test_ranks_at_rest_from_the_start_are_not_settled():
    model, optimizer, cuttlefish, _ = make(rule="scaled")
    rest(model, optimizer)
    train(model, optimizer, 19)
    assert sorted(cuttlefish.stable) == sorted(CHOSEN) and cuttlefish.ranks is None
    train(model, optimizer, 1)
    assert cuttlefish.switched_at == 20 and cuttlefish.ranks == {}  # forced at half of the run
    model, optimizer, cuttlefish, _ = make(rule="energy", keep=0.5)
    rest(model, optimizer)
    train(model, optimizer, 6)
    assert cuttlefish.switched_at == 5 and set(cuttlefish.ranks) == set(CHOSEN)


def test_no_layer_settles_too_early():
    model, optimizer, cuttlefish, _ = make(rule="energy", keep=0.5, earliest=0.3)
    rest(model, optimizer)
    train(model, optimizer, 20)
    assert cuttlefish.switched_at == 12


def test_ranks_are_those_of_their_own_layers():
    model, optimizer, cuttlefish, _ = make(rule="scaled", guard=False, tolerance=0.0)
    first = {name: stable_ranks({name: getattr(model, name)})[name] for name in CHOSEN}
    weights = {}
    x, y = data()
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        cuttlefish.automatic = False
        optimizer.step()
        weights = {name: getattr(model, name).weight.detach().clone() for name in CHOSEN}
    assert cuttlefish.ready and list(cuttlefish.ranks) == CHOSEN  # neither stem, head nor shortcut
    for name, W in weights.items():
        layer = copy.deepcopy(getattr(model, name))
        layer.weight.data = W
        now = stable_ranks({name: layer})[name]
        full = min(matrices(part_of(layer, name)).shape[1:])
        assert cuttlefish.ranks[name] == min(full, math.ceil(full * now / first[name]))
    assert len({round(v, 3) for v in first.values()}) == 3


def test_rules_by_the_spectrum():
    model, _, cuttlefish, _ = make(rule="energy", keep=0.7, guard=False)
    s = torch.linalg.svdvals(model.weigh.weight)
    assert cuttlefish._decide(cuttlefish._modules)["weigh"] == rank_by_energy(s, 0.7)
    model, _, cuttlefish, _ = make(rule="accumulative", keep=0.9, guard=False)
    cuttlefish.history["weigh"].append(0.1)
    sums = torch.linalg.svdvals(model.weigh.weight).cumsum(0)
    wanted = 1 + int((sums < 0.9 * sums[-1]).sum())
    assert cuttlefish._decide(cuttlefish._modules)["weigh"] == wanted
    _, _, cuttlefish, _ = make(floor=0.5, guard=False)
    for name in CHOSEN:
        cuttlefish.history[name].append(1.0)
    assert cuttlefish._decide(cuttlefish._modules) == {"second": 4, "first": 8, "weigh": 8}


def test_no_layer_is_factorised_that_would_not_shrink():
    _, _, cuttlefish, _ = make(multiple=8)
    largest = {"second": 7, "first": 13, "weigh": 10}  # 8 x 72 twice, 16 x 72, 32 x 16
    for name, most in largest.items():
        full = min(matrices(part_of(cuttlefish._modules[name], name)).shape[1:])
        for rank in range(1, full + 1):
            cuttlefish.first[name], cuttlefish.history[name] = float(full), [float(rank)]
            found = cuttlefish._decide({name: cuttlefish._modules[name]})
            up = -(-rank // 8) * 8
            assert found == ({} if rank > most else {name: up if up <= most else rank})


def test_the_rule_follows_from_the_weights():
    assert make()[2].chosen == "scaled"
    torch.manual_seed(0)
    model = Net()
    for name in CHOSEN:
        with torch.no_grad():
            getattr(model, name).weight[0] *= 30
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cuttlefish = st.Cuttlefish(total_steps=10)
    st.attach(cuttlefish, model, optimizer).remove()
    assert cuttlefish.chosen == "energy" and cuttlefish.rule is None
    with pytest.warns(UserWarning, match="do not start at random"):
        st.attach(st.Cuttlefish(total_steps=10, rule="scaled"), model, optimizer)


def test_a_weight_that_starts_at_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 2))
    nn.init.zeros_(model[2].weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cuttlefish = st.Cuttlefish(total_steps=4, prefix=0, rule="scaled")
    st.attach(cuttlefish, model, optimizer)
    for _ in range(4):
        F.mse_loss(model(torch.randn(5, 8)), torch.randn(5, 2)).backward()
        optimizer.step()
    assert cuttlefish.first["2"] == 0 and cuttlefish.ranks["2"] == 8  # of rank 5 at most, by energy


# ---------------------------------------------------------------- which layers


def test_stem_head_and_shortcuts_stay_dense():
    assert make()[2].layers == CHOSEN
    assert make(targets=["weigh", "downsample"])[2].layers == ["downsample", "weigh"]  # the model's order
    assert make(exclude=["weigh"])[2].layers == ["second", "first"]
    assert make(targets="convolutions")[2].layers == ["second", "first"]
    assert make(targets="all-linear")[2].layers == ["weigh"]


def test_names_that_end_in_letters_of_weight():
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(16, 16) for n in ("stem", "u", "high_weight", "blow_u", "v", "out")})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cuttlefish = st.Cuttlefish(total_steps=2, rule="energy", keep=0.3, prefix=0, multiple=1)
    st.attach(cuttlefish, model, optimizer)
    x = torch.randn(4, 16)
    for layer in model.values():
        x = layer(x)
    x.sum().backward()
    optimizer.step()
    assert list(cuttlefish.ranks) == ["u", "high_weight", "blow_u", "v"]
    assert all(isinstance(model[n], Structured) for n in cuttlefish.ranks)


def test_refusals():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def refuses(error, words, **options):
        with pytest.raises(error, match=words):
            st.attach(st.Cuttlefish(total_steps=9, **options), model, optimizer)

    refuses(TargetError, "matches nothing", targets=["conv"])
    model.weigh.weight.requires_grad_(False)
    refuses(TargetError, "'weigh' is frozen", targets=["weigh"])
    model.weigh.weight.requires_grad_(True)
    model.other = nn.Linear(16, 32)
    refuses(TargetError, "'other' is shared with another layer, or not among", targets=["other"])
    model.weigh.weight.full_tensor = None
    refuses(SlimtuneError, "'weigh' is sharded.*train unsharded", targets=["weigh"])
    with pytest.raises(TargetError, match="no layer in training"):
        st.attach(st.Cuttlefish(total_steps=9), nn.Sequential(nn.Embedding(3, 4)), optimizer)


def test_several_processes_are_refused_unless_one_switches_oneself(monkeypatch):
    monkeypatch.setattr(module, "several", lambda: True)
    with pytest.raises(SlimtuneError, match="automatic=False"):
        make()
    assert make(automatic=False)[2].layers == CHOSEN


@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": None},
        {"rule": "vanilla"},
        {"rule": "scaled", "keep": 0.5},
        {"keep": 0},
        {"keep": 1.5},
        {"floor": -0.1},
        {"multiple": 0},
        {"form": "nd"},
        {"prefix": "first"},
        {"prefix": -1},
        {"speedup": 0},
        {"published": 1},
        {"window": 0},
        {"tolerance": -1},
        {"relax": [1, 2]},
        {"earliest": 0.5},
        {"latest": 0},
        {"decay": math.nan},
        {"rate": 0},
        {"rewarm": -1},
        {"period": 2.0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(StructureError, match=f"{'form' if 'form' in options else next(iter(options))}"):
        st.Cuttlefish(**{"total_steps": 10, **options})


# ---------------------------------------------------------------- the dense prefix


def test_the_prefix_ends_at_the_first_stack_that_becomes_faster(monkeypatch):
    times = {"first": (10, 9), "second": (10, 5), "weigh": (10, 1)}  # "first" is called before "second": one stack
    monkeypatch.setattr(module, "measure", lambda layer, name, *_: speedup.Times(*times[name]))

    def dense(least):
        model, optimizer, cuttlefish, _ = make(prefix="auto", speedup=least)
        train(model, optimizer, 1)
        return cuttlefish

    assert dense(1.4).dense == []  # (10 + 10) / (9 + 5)
    assert dense(2.0).dense == ["first", "second"] and list(dense(2.0).history) == ["weigh"]
    assert dense(2.0).speedups == [[["first", "second"], 1.429], [["weigh"], 10.0]]
    assert dense(11.0).dense == ["first", "second", "weigh"]
    again = st.Cuttlefish(total_steps=40, period=1, prefix="auto", multiple=1, speedup=2.0)
    again.load_state_dict(json.loads(json.dumps(dense(2.0).state_dict())))
    monkeypatch.setattr(module, "measure", None)  # would be called
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    st.attach(again, model, optimizer)
    train(model, optimizer, 3)
    assert again.dense == ["first", "second"]


def test_when_nothing_becomes_faster_it_says_so(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *_: speedup.Times(1.0, 2.0))
    model, optimizer, _, handle = make(prefix="auto")
    train(model, optimizer, 25)
    assert not any(isinstance(m, Structured) for m in model.modules())
    with pytest.warns(UserWarning, match="no layer would have become smaller, or faster"):
        handle.finish()


@pytest.mark.parametrize(("steps", "period"), [(4, 1), (40, 2), (200, 10), (800, 10), (3000, 30)])
def test_looks_are_a_hundredth_of_the_run_apart(steps, period):
    assert st.Cuttlefish(total_steps=steps).period == period


def test_a_prefix_by_number():
    _, _, cuttlefish, _ = make(prefix=2)
    assert cuttlefish.dense == ["second", "first"] and list(cuttlefish.history) == ["weigh"]


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_measuring_leaves_the_layer_alone(kind, form):
    layer = {
        "linear": nn.Linear(12, 10),
        "conv": nn.Conv2d(12, 10, 3, bias=False),
        "grouped": nn.Conv2d(12, 10, 3, groups=2),
    }[kind]
    called = []
    layer.register_forward_hook(lambda *_: called.append(1))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = torch.get_rng_state()
    shape = (3, 12) if kind == "linear" else (3, 12, 6, 6)
    call = speedup.Call(shape, torch.float32, torch.device("cpu"))
    times = speedup.measure(layer, "layer", call, 2, form, repeats=2)
    assert times.dense > 0 and times.thin > 0
    assert not called and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in layer.parameters()) and not isinstance(layer, Structured)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_training_is_timed_and_then_left_alone():
    model, optimizer, cuttlefish, _ = make(prefix="auto", speedup=1e-9)
    with torch.no_grad():
        model(data()[0])  # an evaluation before the first step does not count
    assert cuttlefish.dense is None
    train(model, optimizer, 1)
    assert cuttlefish.dense == [] and cuttlefish.speedups[0][0] == ["first", "second"]
    assert not any(m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------- the switch


def test_at_full_rank_the_switch_changes_nothing():
    model, optimizer, cuttlefish, _ = make(floor=1.0, guard=False)
    train(model, optimizer, 19)
    before, norm = copy.deepcopy(model).eval(), model.norm
    buffers = {k: v.clone() for k, v in norm.state_dict().items()}
    cuttlefish.done = 20  # half of the run
    cuttlefish._look(model)
    assert cuttlefish.ranks == {"second": 8, "first": 16, "weigh": 16}
    model.eval()
    x = data(1)[0]
    assert (model(x) - before(x)).abs().max() <= 1e-5
    assert model.norm is norm and all(torch.equal(v, buffers[k]) for k, v in norm.state_dict().items())


def test_the_switch_is_balanced_and_loses_the_tail():
    model, optimizer, cuttlefish, _ = make(rule="energy", keep=0.6, automatic=False)
    train(model, optimizer, 20)
    W = model.first.weight.detach().flatten(1)
    s = torch.linalg.svdvals(W)
    r = cuttlefish.ranks["first"]
    st.factorize(model, cuttlefish.ranks, optimizer=optimizer)
    A, B = model.first.structure.A.detach(), model.first.structure.B.detach()
    assert (W - B @ A).square().sum().item() == pytest.approx(s[r:].square().sum().item(), rel=1e-4)
    for p in (A, B):
        assert p.square().sum().item() == pytest.approx(s[:r].sum().item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_loss_keeps_falling(optimizer):
    model, made, cuttlefish, handle = make(optimizer, total_steps=80, latest=0.3, rule="energy", keep=0.8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, 80)
    losses, groups = train(model, made, 80, schedule.step), made.param_groups
    at = cuttlefish.switched_at
    assert at <= 24 and set(cuttlefish.ranks) == set(CHOSEN)
    assert losses[-1] < 0.75 * losses[at - 1]
    assert max(losses[at : at + 3]) < losses[0]
    assert made.param_groups is groups and len(groups) == 1
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.parameters()}
    handle.finish()


def test_steps_are_counted_not_batches():
    model, optimizer, cuttlefish, _ = make(rule="energy", keep=0.5)
    x, y = data()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for i in range(60):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if i % 3 == 2:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert cuttlefish.done == 20 and cuttlefish.switched_at is not None


def test_in_ones_own_loop_it_is_one_if():
    a, optimizer, automatic, _ = make(rule="energy", keep=0.5)
    train(a, optimizer, 30)
    b, optimizer, manual, _ = make(rule="energy", keep=0.5, automatic=False)

    def switch():
        if manual.ready:
            st.factorize(b, manual.ranks, optimizer=optimizer)

    train(b, optimizer, 30, switch)
    assert manual.ranks == automatic.ranks and describe_structures(a) == describe_structures(b)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not manual.ready and manual.switched_at == automatic.switched_at


def test_a_switch_that_nobody_made_is_told():
    model, optimizer, _, handle = make(automatic=False, rule="energy", keep=0.5)
    train(model, optimizer, 30)
    with pytest.warns(UserWarning, match="nobody factorised"):
        handle.finish()
    model, optimizer, _, handle = make()
    train(model, optimizer, 3)
    with pytest.warns(UserWarning, match="yet to be made"):
        handle.finish()


@pytest.mark.parametrize("reset", [False, True])
def test_moments_at_the_switch(reset):
    model, optimizer, cuttlefish, _ = make(rule="energy", keep=0.5, reset=reset, latest=0.2, tolerance=0.0, decay=0.0)
    train(model, optimizer, 7)
    twin = copy.deepcopy(model)
    M = optimizer.state[model.first.weight]["momentum_buffer"].clone()
    x, y = data()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    M = 0.9 * M + model.first.weight.grad + 1e-2 * twin.first.weight
    optimizer.step()
    assert cuttlefish.switched_at == 8
    A, B = model.first.structure.A, model.first.structure.B
    if reset:
        assert not optimizer.state[A] and not optimizer.state[model.head.weight]
    else:
        torch.testing.assert_close(optimizer.state[A]["momentum_buffer"], B.detach().T @ M.flatten(1))
        torch.testing.assert_close(optimizer.state[B]["momentum_buffer"], M.flatten(1) @ A.detach().T)


def test_notes():
    model, optimizer, cuttlefish, _ = make(rule="energy", keep=0.5, period=2)
    notes = []
    train(model, optimizer, 30, lambda: notes.append(cuttlefish.note()))
    assert notes[0] is None and set(notes[1]) == {"stable_ranks"} and set(notes[1]["stable_ranks"]) == set(CHOSEN)
    at = cuttlefish.switched_at
    assert notes[at - 1]["ranks"] == cuttlefish.ranks and not any(notes[at:])
    assert json.loads(json.dumps(notes)) == notes


def test_a_compiled_model_goes_on():
    def losses(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        st.attach(st.Cuttlefish(total_steps=4, rule="energy", keep=0.5, prefix=0, multiple=1), model, optimizer)
        run = torch.compile(model, backend="eager") if compiled else model
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = run(torch.ones(3, 6)).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert isinstance(model[1], Structured)
        return found

    assert losses(True) == losses(False)


# ---------------------------------------------------------------- decay and rates after the switch


STRUCTURES = {
    "low rank": st.LowRank(6, 10, rank=3),
    "grouped": st.GroupedLowRank(6, 10, rank=2, groups=2),
    "separable": st.SeparableKernel(6, 18, rank=3, kernel=(3, 2)),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_frobenius_decay_is_the_gradient_of_the_product(kind):
    torch.manual_seed(0)
    structure = copy.deepcopy(STRUCTURES[kind]).double()
    for p in structure.parameters():
        nn.init.normal_(p)
    own = list(structure.parameters())
    expected = torch.autograd.grad(structure.dense().square().sum() / 2, own)
    torch.testing.assert_close(frobenius_decay(structure), list(expected), rtol=1e-12, atol=1e-12)
    sizes, falls, eta = [], [], 1e-4
    for _ in range(50):  # its flow alone: d/dt |dW|^2 / 2 = -(|B^T dW|^2 + |dW A^T|^2)
        gradients = frobenius_decay(structure)
        sizes.append(float(structure.dense().detach().square().sum() / 2))
        falls.append(sum(float(g.square().sum()) for g in gradients))
        with torch.no_grad():
            for p, g in zip(own, gradients, strict=True):
                p -= eta * g
    assert (sizes[0] - sizes[1]) / eta == pytest.approx(falls[0], rel=0.05)
    assert all(a > b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_decay_takes_the_place_of_weight_decay(kind, decay):
    model, _, _, _ = make(rule="energy", keep=0.5)
    group = {"lr": 0.1, "weight_decay": 0.5}
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    optimizer = made(model.parameters(), **group)
    cuttlefish = st.Cuttlefish(total_steps=4, rule="energy", keep=0.5, prefix=0, multiple=1, decay=decay, latest=0.4)
    st.attach(cuttlefish, model, optimizer)
    rates = [g["lr"] for g in optimizer.param_groups]
    rest(model, optimizer)
    train(model, optimizer, 1)
    assert cuttlefish.switched_at == 1
    optimizer.param_groups[0].update(group)
    factors = [p for name in CHOSEN for p in getattr(model, name).structure.parameters()]
    others = [p for p in model.parameters() if not any(p is f for f in factors)]
    twins = {id(p): nn.Parameter(p.detach().clone()) for p in model.parameters()}
    wanted = [
        {"params": [twins[id(p)] for p in factors], "lr": 0.1, "weight_decay": 0.0 if decay else 0.5},
        {"params": [twins[id(p)] for p in others], "lr": 0.1, "weight_decay": 0.5},
    ]
    by_hand = made(wanted)
    for p, twin in ((p, twins[id(p)]) for p in model.parameters()):
        by_hand.state[twin] = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state.get(p, {}).items()}
    x, y = data()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        twins[id(p)].grad = p.grad.clone()
    for name in CHOSEN:
        structure = getattr(model, name).structure
        for p, g in zip(structure.parameters(), frobenius_decay(structure), strict=True):
            twins[id(p)].grad += decay * g
    optimizer.step()
    by_hand.step()
    for p in model.parameters():
        torch.testing.assert_close(p, twins[id(p)], rtol=1e-6, atol=1e-7)
    assert [g["lr"] for g in optimizer.param_groups] == rates and optimizer.param_groups[0]["weight_decay"] == 0.5
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_learning_rates_after_the_switch():
    options = {"rule": "energy", "keep": 0.5, "latest": 0.1, "earliest": 0.0, "decay": 0.0}
    model, optimizer, cuttlefish, _ = make(**options, rate=0.5, rewarm=4)
    optimizer.param_groups[0].update(momentum=0.0, weight_decay=0.0)
    train(model, optimizer, 4)
    assert cuttlefish.switched_at == 4
    x, y = data()
    for factor in (0.125, 0.25, 0.375, 0.5, 0.5):
        before = model.head.weight.detach().clone()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        moved = before - 0.05 * factor * model.head.weight.grad
        torch.testing.assert_close(model.head.weight.detach(), moved)
        assert optimizer.param_groups[0]["lr"] == 0.05


def test_groups_are_given_back_after_a_step_that_failed():
    model, optimizer, cuttlefish, _ = make(rule="energy", keep=0.5, rate=0.5, latest=0.2)
    train(model, optimizer, 10)
    cuttlefish.before_step(model)
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, 1)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 0.05


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [3, 10])
@pytest.mark.parametrize("shaped", [False, True])
def test_a_resumed_run_gives_the_same_bits(optimizer, stop, shaped):
    options = {"rule": "energy", "keep": 0.5, "rate": 0.7, "rewarm": 5, "latest": 0.2}
    model, made, cuttlefish, _ = make(optimizer, **options)
    train(model, made, stop)
    assert (cuttlefish.switched_at is None) == (stop == 3)
    saved = copy.deepcopy((model.state_dict(), made.state_dict()))
    state, shapes = json.loads(json.dumps([cuttlefish.state_dict(), describe_structures(model)]))
    order = [n for held in made.param_groups[0]["params"] for n, p in model.named_parameters() if p is held]
    train(model, made, 8)

    again = st.Cuttlefish(prefix=0, total_steps=40, period=1, multiple=1, **options)
    if shaped:  # by what a checkpoint says of the shapes, before anything else
        torch.manual_seed(1)
        other = Net()
        shape_as(other, shapes)
        twin = dict(other.named_parameters())
        made_again = type(made)([twin[n] for n in order], lr=1.0)
        again.load_state_dict(state)
        st.attach(again, other, made_again)
    else:  # by the controller's state
        torch.manual_seed(1)
        other = Net()
        made_again = type(made)(other.parameters(), lr=1.0)
        st.attach(again, other, made_again).load_state_dict(state)
    other.load_state_dict(saved[0])
    made_again.load_state_dict(saved[1])
    train(other, made_again, 8)
    assert again.state_dict() == cuttlefish.state_dict()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_state_of_another_model_is_refused():
    _, _, cuttlefish, _ = make()
    state = cuttlefish.state_dict()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    other = st.attach(
        st.Cuttlefish(total_steps=40, prefix=0, period=1, multiple=1), model, torch.optim.SGD(model.parameters())
    )
    with pytest.raises(TargetError, match="'second', which this one lacks"):
        other.load_state_dict(state)
