"""GoRA: the sheet's golden allocations, its start in closed form, and a test for each published fault."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.allocate import with_ranks
from slimtune.initialisers import GradientStats, InputStats
from slimtune.initialisers.gradients import GAMMAS
from slimtune.structures import LowRank
from test_calibrate import BATCHES, TOY, rows, same, square, stored, toy


def shares(importance, sizes=None):
    """Statistics of layers of these sizes that say nothing but their importance."""
    sizes = sizes or [(64, 64)] * len(importance)
    return {
        f"layers.{i}": GradientStats(torch.zeros(o, 0), torch.zeros(0, n), importance={"union_mean": float(value)})
        for i, (value, (o, n)) in enumerate(zip(importance, sizes, strict=True))
    }


def ranks(stats, *args, **options):
    return tuple(st.allocate.gora(stats, *args, **options).values())


def cost(stats, found):
    return sum(r * (len(s.sketch) + s.projection.shape[1]) for r, s in zip(found, stats.values(), strict=True))


# ---------------------------------------------------------------- ranks

LLAMA = [(4096, 4096)] * 4 + [(4096, 14336)] * 3


@pytest.mark.parametrize(
    ("importance", "sizes", "rule", "want", "spent"),
    [
        ([1] * 7, LLAMA, "paper", (10, 10, 10, 10, 6, 6, 6), 0.936),
        ([1] * 7, LLAMA, "code", (12, 12, 12, 12, 5, 5, 5), 0.951),
        ([1, 2, 3, 10], None, "paper", (4, 4, 6, 20), 34 / 32),
        ([1, 2, 3, 10], None, "code", (4, 4, 6, 20), 34 / 32),
        ([1, 2, 3, 10], None, "budget", (4, 4, 5, 19), 1.0),
        ([1, 1, 1, 97], None, "paper", (4, 4, 4, 31), 43 / 32),
        ([1, 1, 1, 97], None, "code", (4, 4, 4, 31), 43 / 32),
        ([1, 1, 1, 97], None, "budget", (4, 4, 4, 20), 1.0),
        ([5, 5, 5], None, "paper", (8, 8, 8), 1.0),
        ([5, 5, 5], None, "code", (8, 8, 8), 1.0),
        ([5, 5, 5], None, "budget", (8, 8, 8), 1.0),
        ([0, 0, 0], None, "budget", (8, 8, 8), 1.0),
    ],
)
def test_golden_allocations(importance, sizes, rule, want, spent):
    stats = shares(importance, sizes)
    found = ranks(stats, 8, rule=rule)
    assert found == want
    assert cost(stats, found) / cost(stats, [8] * len(found)) == pytest.approx(spent, abs=5e-4)


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_kept_and_used_up(seed):
    """sum R_i f_i <= B, and no layer below its ceiling could be given another rank of what is left."""
    g = torch.Generator().manual_seed(seed)
    sizes = [tuple(torch.randint(20, 200, (2,), generator=g).tolist()) for _ in range(12)]
    stats = shares((torch.rand(12, generator=g) ** 4).tolist(), sizes)
    found = ranks(stats, 8, floor=3, ceiling=19)
    left = cost(stats, [8] * 12) - cost(stats, found)
    open_ = [o + i for r, (o, i) in zip(found, sizes, strict=True) if r < 19]
    assert left >= 0 and all(3 <= r <= 19 for r in found)
    assert open_ and left < min(open_)
    louder = {n: replace(s, importance={"union_mean": 8 * s.importance["union_mean"]}) for n, s in stats.items()}
    assert ranks(louder, 8, floor=3, ceiling=19) == found


def test_no_rank_beyond_the_shorter_side():
    stats = shares([100, 1], [(2, 50), (60, 50)])
    assert ranks(stats, 4, floor=3, ceiling=32)[0] == 2


def test_reference_ranks_per_layer():
    stats = shares([1, 1])
    assert ranks(stats, {"layers.0": 6, "layers.1": 10}, floor=1) == (8, 8)
    with pytest.raises(st.StructureError, match=r"no rank is given for layer 'layers\.1'"):
        ranks(stats, {"layers.0": 6})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"floor": 0}, "floor must be a whole number of at least 1"),
        ({"floor": 9, "ceiling": 8}, "ceiling 8 is below floor 9"),
        ({"rule": "best"}, "rule must be 'budget', 'paper' or 'code', got 'best'"),
        ({"importance": "magic"}, "importance must be one of union_mean"),
        ({"floor": 9}, r"a floor of 9 costs 3,456 parameters, the budget of the reference ranks is 3,072"),
        ({"importance": "gradient_mean"}, r"'layers\.0' has no importance 'gradient_mean'; measured: union_mean"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(st.StructureError, match=match):
        st.allocate.gora(shares([1, 2, 3]), 8, **options)
    if match.startswith(("floor", "ceiling", "rule", "importance")):
        with pytest.raises(st.StructureError, match=match):
            st.gora(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank must be a whole number"),
        ({"gamma": -1.0}, "gamma must be a number of at least 0"),
        ({"gamma": math.inf}, "gamma must be a number of at least 0"),
        ({"alpha": 0}, "alpha must not be 0"),
    ],
)
def test_recipe_refuses_early(options, match):
    with pytest.raises(st.StructureError, match=match):
        st.gora(**options)


def test_importance_that_is_not_finite():
    with pytest.raises(st.StructureError, match=r"importance of 'layers\.0' is nan"):
        st.allocate.gora(shares([math.nan, 1]), 8)


# ---------------------------------------------------------------- the start


def start(rank=4, gamma=0.05, targets=TOY, count=3, **changes):
    """A toy with GoRA's start at one rank, and {layer: (G, s, B, A)}."""
    model, batches = toy(), rows(count)
    recipe = replace(st.gora(rank=rank, gamma=gamma), allocation={}, **changes)
    recipe, stats = st.calibrate.fit(recipe, model, batches, square, targets)
    gradients = {n: G for n, (_, G) in stored(model, batches, targets).items()}
    st.adapt(model, recipe, targets, stats=stats)
    found = {}
    for n in targets:
        adapter = model.get_submodule(n).adapters["default"]
        s = adapter.structure
        found[n] = (gradients[n], adapter.scale.detach(), s.B.detach(), s.A.detach())
    return model, batches, found


@pytest.mark.parametrize("rule", [{}, {"rank_power": 1.0}, {"rank_power": 0.0, "alpha": 0.3}], ids=str)
def test_start_in_closed_form(rule):
    gamma, R = 0.05, 4
    for G, s, B, A in start(R, gamma, **rule)[2].values():
        I = A.shape[1]
        least = torch.linalg.lstsq(A.t(), G.t()).solution.t()
        own = -B * s / (gamma * math.sqrt(I / R))
        assert float(((G - own @ A) @ A.t()).norm()) < 1e-10 * float(G.norm())  # what is left is orthogonal to A
        same(own, least, 1e-9)
        P = A.t() @ torch.linalg.solve(A @ A.t(), A)
        same(s * B @ A, -gamma * math.sqrt(I / R) * G @ P, 1e-9)
        assert float((s * B @ A * G).sum()) < 0  # a step down: the authors' present code starts upwards


def test_full_rank_is_the_step_itself():
    for G, s, B, A in start(16, 0.05, targets=["0"])[2].values():
        same(s * B @ A, -0.05 * G, 1e-8)


def test_norm_of_the_start_is_gamma_times_the_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300)).double()
    recipe = replace(st.gora(rank=8, gamma=0.1), allocation={})
    batches = rows(2, size=64, width=400)
    G = stored(model, batches, ["0"])["0"][1]
    _, stats = st.calibrate.fit(recipe, model, batches, square, ["0"])
    st.adapt(model, recipe, ["0"], stats=stats)
    ratio = model[0].adapters["default"].dense().norm() / (0.1 * G.norm())
    assert float(ratio.detach()) == pytest.approx(1.0, abs=0.1)


def test_loss_goes_down_on_the_calibration_batches():
    def mean(model):
        with torch.no_grad():
            return float(sum(square(model, b) for b in batches) / len(batches))

    model, batches, found = start(4, 0.05)
    after = mean(model)
    with st.disabled(model):
        before = mean(model)
    slope = sum(float((s * B @ A * G).sum()) for G, s, B, A in found.values())
    assert slope < 0 and after - before == pytest.approx(slope, rel=0.05)


def test_gamma_towards_zero_leaves_the_base():
    x = rows(1)[0]
    changes = []
    for gamma in (1e-3, 1e-6, 0.0):
        model = start(4, gamma)[0]
        y = model(x)
        with st.disabled(model):
            changes.append(float((y - model(x)).norm().detach()))
    assert changes[1] == pytest.approx(1e-3 * changes[0], rel=1e-2) and changes[2] == 0


def test_gamma_of_least_loss():
    """Found on the first batch; 0, the base itself, where the mean step does not lower that batch's loss."""
    model, batches = toy(), rows(3)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    recipe, stats = st.calibrate.fit(st.gora(rank=4, gamma=None, floor=2, ceiling=8), model, batches, square, TOY)
    losses = {}
    for gamma in (recipe.init["gora"]["gamma"], *GAMMAS):
        one = toy()
        st.adapt(one, replace(recipe, init={"gora": {"gamma": gamma}}), TOY, stats=stats)
        losses.setdefault(gamma, float(square(one, batches[0]).detach()))
    assert len(losses) == len(GAMMAS) == 53 and next(iter(losses.values())) == min(losses.values()) < losses[0.0]
    assert type(model[0]) is nn.Linear and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())

    def signed(model, batch):
        return batch[0] * square(model, batch[1])

    turned = [(sign, batches[0]) for sign in (-1, 1, 1)]
    assert st.calibrate.fit(st.gora(gamma=None), toy(), turned, signed, TOY)[0].init == {"gora": {"gamma": 0.0}}
    with pytest.raises(st.StructureError, match="gamma must be a number of at least 0"):
        st.adapt(toy(), replace(recipe, init={"gora": {"gamma": None}}), TOY, stats=stats)


def test_one_step_of_sgd_on_B_is_the_gradient_compressed():
    """From B = 0 with A held, one step is dW = -eta s^2 G A^T A (Hao et al. 2024): what the sketch is."""
    model, batches, found = start(4, 0.0)
    optimizer = torch.optim.SGD([p for n, p in st.trainable_parameters(model) if n.endswith("B")], lr=0.1)
    for b in batches:
        (square(model, b) / len(batches)).backward()
    optimizer.step()
    for n, (G, s, _, A) in found.items():
        same(model.get_submodule(n).adapters["default"].dense().detach(), -0.1 * s**2 * G @ A.t() @ A, 1e-10)


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_start_follows_the_gradient_and_ranks_do_not(scale):
    """Scaling the loss scales the step and leaves the ranks, and W -> c W, G -> G / c leaves the importance."""
    model, batches = toy(), rows(2)
    recipe, stats = st.calibrate.fit(
        st.gora(rank=4, floor=1, ceiling=8), model, batches, lambda m, b: scale * square(m, b), TOY
    )
    plain, base = st.calibrate.fit(st.gora(rank=4, floor=1, ceiling=8), model, batches, square, TOY)
    assert recipe == plain
    for n in TOY:
        assert torch.equal(stats[n].sketch, scale * base[n].sketch)
        assert stats[n].importance["union_mean"] == scale * base[n].importance["union_mean"]


def test_only_products_of_two_factors_of_the_size_calibrated():
    stats = GradientStats(torch.zeros(6, 3), torch.zeros(3, 5))
    fill = st.initialisers.gora
    for structure, match in [
        (st.Circulant(6, 5), "fills the factors of LowRank, not of Circulant"),
        (LowRank(6, 5, rank=2, core=True), "fills the factors"),
        (LowRank(6, 5, rank=4), "sketch of 3 do not serve a 6 x 5 layer of rank 4"),
        (LowRank(5, 6, rank=2), "statistics of 6 x 5"),
    ]:
        with pytest.raises(st.StructureError, match=match):
            fill(structure, None, stats, 1.0)


# ---------------------------------------------------------------- the whole


def test_fit_then_adapt_on_a_transformers_model(tmp_path):
    from cases import tiny_llama

    model = tiny_llama()
    batches = [{"input_ids": b, "labels": b} for b in BATCHES]
    recipe, stats = st.calibrate.fit(st.gora(rank=4, floor=2, ceiling=8), model, batches)
    with pytest.raises(st.StructureError, match="gora starts from the data: calibrate first"):
        st.adapt(tiny_llama(), recipe)
    chosen = st.adapt(model, recipe, stats=stats)
    rows_ = {r.name: r.rank for r in st.summary(model).rows}
    assert rows_ == st.allocate.gora(stats, 4, floor=2, ceiling=8) and len(set(rows_.values())) > 1
    plain = tiny_llama()
    st.adapt(plain, st.rslora(rank=4))
    budget, smallest = st.summary(plain).trainable, 16 + 8
    assert budget - smallest < st.summary(model).trainable <= budget
    for n in chosen:
        adapter = model.get_submodule(n).adapters["default"]
        assert float(adapter.scale) == pytest.approx(16 / math.sqrt(rows_[n]))
    # saved, and loaded without the data
    st.save(model, tmp_path)
    again = tiny_llama()
    st.load(again, tmp_path)
    assert torch.equal(again(BATCHES[0]).logits, model(BATCHES[0]).logits)


# ---------------------------------------------------------------- ranks for any recipe


def wide():
    return nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 120), nn.ReLU(), nn.Linear(120, 40))


RECIPES = {
    "lora": lambda r: st.lora(rank=r),
    "dora": lambda r: st.dora(rank=r),
    "singlora": lambda r: st.singlora(rank=r),
    "loldu": lambda r: st.loldu(rank=r),
    "gralora": lambda r: st.gralora(rank=r, k=4),
    "loha": lambda r: st.loha(rank=r),
    "bone": lambda r: st.bone(rank=r),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("parameters", [1700, 3137, 9000])
def test_budget_is_the_largest_that_fits(name, parameters):
    """What is left would not pay any layer's next rank, counted on real adapters."""

    def trainable(ranks):
        model = wide()
        st.adapt(model, with_ranks(recipe, ranks), list(ranks))
        return st.summary(model).trainable

    recipe, targets = RECIPES[name](8), ["0", "2", "4"]
    ranks = st.allocate.budget(wide(), recipe, parameters, targets)
    assert trainable(ranks) <= parameters
    for n, rank in ranks.items():
        for more in range(rank + 1, 41):
            try:
                new = trainable(ranks | {n: more})
            except st.StructureError:
                continue
            assert new > parameters
            break


def test_budget_by_importance_and_between_bounds():
    even = st.allocate.budget(wide(), st.lora(), 3200, ["0", "2", "4"])
    assert even == {"0": 8, "2": 8, "4": 8}
    found = st.allocate.budget(wide(), st.lora(), 3200, ["0", "2", "4"], importance={"0": 6.0, "2": 1.0, "4": 2.0})
    assert found == {"0": 20, "2": 3, "4": 7}
    assert sum(r * f for r, f in zip(found.values(), (80, 160, 160), strict=True)) <= 3200
    bounded = st.allocate.budget(wide(), st.lora(), 10**6, ["0", "2"], floor=2, ceiling=5)
    assert bounded == {"0": 5, "2": 5}
    assert st.allocate.budget(wide(), st.lora(), 10**6, ["0", "2"]) == {"0": 40, "2": 40}


def test_budget_refusals():
    for recipe, parameters, options, error, match in [
        (
            st.lora(),
            399,
            {},
            st.ConfigError,
            "lora on 3 layers costs at least 400 parameters, the budget is 399",
        ),
        (st.c3a(block=4), 4000, {}, st.StructureError, "BlockCirculant has no option rank"),
        (st.lora(), 0, {}, st.StructureError, "parameters must be a whole number of at least 1"),
        (st.lora(), 4000, {"importance": {"0": 1.0}}, st.StructureError, "importance of '2' is missing"),
        (st.gralora(rank=8, k=4), 4000, {"ceiling": 3}, st.StructureError, "gralora takes no rank from 1 to 3"),
    ]:
        with pytest.raises(error, match=match):
            st.allocate.budget(wide(), recipe, parameters, ["0", "2", "4"], **options)


def test_with_ranks_and_the_scale():
    recipe = st.lora(rank=8, alpha=16)
    follows, stays = (with_ranks(recipe, {"up": 2}, keep_scale=k).for_layer("up") for k in (True, False))
    assert (follows.scale(2), stays.scale(2)) == (2.0, 8.0)
    assert with_ranks(with_ranks(recipe, {"up": 2}), {"up": 3}).overrides == {"up": {"rank": 3}}
    with pytest.raises(st.StructureError, match="'up' is given no rank; leave it out of the targets"):
        with_ranks(recipe, {"up": 0})


# ---------------------------------------------------------------- EVA's ranks


def test_eva_takes_the_largest_shares_and_keeps_the_total():
    g = torch.Generator().manual_seed(0)
    stats = {}
    for i in range(6):
        values = (torch.rand(16, generator=g, dtype=torch.float64) ** (1 + i)).sort(descending=True).values
        stats[str(i)] = InputStats(torch.eye(16), values, float(values.square().sum()) * (1 + i / 3), 100)
    found = st.allocate.eva(stats, 8, rho=2.0, floor=0)
    assert sum(found.values()) == 48 and max(found.values()) <= 16
    shares_ = {n: s.singular_values.square() / s.total for n, s in stats.items()}
    pool = sorted((float(v) for s in shares_.values() for v in s), reverse=True)[:48]
    assert sorted((float(v) for n, s in shares_.items() for v in s[: found[n]]), reverse=True) == pool
    assert min(st.allocate.eva(stats, 8, floor=3).values()) >= 3
    assert sum(st.allocate.eva(stats, 8, floor=3).values()) == 48
    for options, match in [
        ({"rho": 0.5}, "rho must be a number of at least 1"),
        ({"floor": 9}, "floor 9 is above the rank of '0', 8"),
    ]:
        with pytest.raises(st.StructureError, match=match):
            st.allocate.eva(stats, 8, **options)
    with pytest.raises(st.StructureError, match="120 ranks to share out, the inputs have 96 components"):
        st.allocate.eva(stats, 20)


def test_eva_gives_inputs_that_are_all_zero_the_floor():
    values = {"a": torch.zeros(4), "b": torch.tensor([4.0, 3.0, 2.0, 1.0]), "c": torch.zeros(4)}
    stats = {n: InputStats(torch.eye(4), s, float(s.square().sum()), 9) for n, s in values.items()}
    assert st.allocate.eva(stats, 2, floor=1) == {"a": 1, "b": 4, "c": 1}
