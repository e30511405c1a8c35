"""AdaLoRA: the published schedule, scores and masks, and none of the published faults."""

import copy
import io
import itertools
import json
import math
import types
from dataclasses import replace

import peft
import pytest
import torch
import torch._dynamo
from torch import nn

import slimtune as st
from slimtune.controllers.adalora import cubic_budget
from slimtune.controllers.allocator import Change, best_ranks
from slimtune.targets import hosts

MASKED = pytest.mark.parametrize("masked", [False, True], ids=["physical", "masked"])
REGROW = pytest.mark.parametrize("regrow", [True, False], ids=["regrow", "gone"])


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)


class Run:
    """The toy of every test: 64 samples, AdamW, and a recipe's controllers attached."""

    def __init__(
        self, dtype=torch.float32, total=24, masked=None, orthogonality=0.1, model=None, optimizer=None, **options
    ):
        options = {"rank": 3, "initial_rank": 6, "t_init": 2, "t_final": 6, "delta_t": 3, **options}
        self.model = model or base(dtype)
        self.recipe = st.adalora(alpha=24, orthogonality=orthogonality, **options)
        if model is None:
            torch.manual_seed(1)
            st.adapt(self.model, self.recipe, ["0", "2"])
        self.optimizer = (optimizer or torch.optim.AdamW)(st.param_groups(self.model, lr=1e-2))
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, total)
        self.controllers = st.controllers_of(self.recipe, total)
        self.ada = self.controllers[-1]
        self.ada.masked = masked
        self.handles = [st.attach(c, self.model, self.optimizer) for c in self.controllers]
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(64, 16, generator=generator).to(dtype)
        self.y = torch.randn(64, 8, generator=generator).to(dtype)

    def backward(self, rows=slice(None), share=1.0):
        loss = (self.model(self.x[rows]) - self.y[rows]).square().mean()
        (share * loss).backward()
        return loss.item()

    def steps(self, count=1):
        for _ in range(count):
            loss = self.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return loss

    @property
    def structures(self):
        return {n: h.adapters["default"].structure for n, h in hosts(self.model).items()}

    @property
    def ranks(self):
        return {n: int((s.core != 0).sum()) for n, s in self.structures.items()}

    def numbers(self):
        """Held by parameters and the optimizer's state."""
        held = [p for s in self.structures.values() for p in s.parameters()]
        states = [v for p in held for v in self.optimizer.state[p].values() if v.dim()]
        return sum(t.numel() for t in held + states)

    def again(self, folder):
        """Another process that goes on from what this one saved."""
        st.save(self.model, folder)
        file = io.BytesIO()
        torch.save([self.optimizer.state_dict(), self.schedule.state_dict()], file)
        states = json.loads(json.dumps([h.state_dict() for h in self.handles]))
        file.seek(0)
        optimizer, schedule = torch.load(file, weights_only=True)
        model = base(self.x.dtype)
        st.load(model, folder)
        made = st.controllers_of(self.recipe, self.ada.total_steps)
        other = object.__new__(Run)
        other.model, other.recipe, other.x, other.y = model, self.recipe, self.x, self.y
        other.optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2))
        for controller, state in zip(made, states, strict=True):
            controller.load_state_dict(state)
        other.handles = [st.attach(c, model, other.optimizer) for c in made]
        other.controllers, other.ada = made, made[-1]
        other.schedule = torch.optim.lr_scheduler.LinearLR(other.optimizer, 1.0, 0.1, self.ada.total_steps)
        other.optimizer.load_state_dict(optimizer)
        other.schedule.load_state_dict(schedule)
        return other


def same(a, b):
    one, two = a.model.state_dict(), b.model.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- the schedule


def test_budget_is_the_published_table():
    steps = (1, 2, 3, 5, 10, 30, 55, 60)
    assert [cubic_budget(t, 12, 6, 2, 5, 60) for t in steps] == [12, 12, 11, 11, 9, 6, 6, 6]
    run = Run(total=60, rank=3, initial_rank=6, t_init=2, t_final=5, delta_t=5)
    assert [run.ada.budget(t) for t in steps] == [12, 12, 11, 11, 9, 6, 6, 6]
    assert [run.ada.due(t) for t in steps] == [False, False, False, True, True, True, True, False]
    assert [t for t in range(1, 61) if run.ada.due(t)] == list(range(5, 56, 5))


def test_budget_is_what_peft_computes():
    config = types.SimpleNamespace(tinit=7, tfinal=20, total_step=90, deltaT=4)
    allocator = types.SimpleNamespace(peft_config=config, init_bgt=31, target_bgt=11)
    for t in range(91):
        budget, _ = peft.tuners.adalora.layer.RankAllocator.budget_schedule(allocator, t)
        assert cubic_budget(t, 31, 11, 7, 20, 90) == budget


def test_shares_are_of_all_steps():
    ada = st.AdaLoRA(4, total_steps=3000)
    assert (ada.t_init, ada.t_final, ada.delta_t) == (300, 1500, 10)
    ada = st.AdaLoRA(4, t_init=0.25, t_final=30, delta_t=0.001, total_steps=200)
    assert (ada.t_init, ada.t_final, ada.delta_t) == (50, 30, 1)
    for total in range(1, 40):
        st.AdaLoRA(4, total_steps=total)  # the defaults suit any run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "expected the total_steps of the run"),
        (
            {"total_steps": 10, "t_init": 5, "t_final": 5},
            "t_init = 5 and t_final = 5 leave no step .* total_steps = 10",
        ),
        ({"t_init": 0.6, "t_final": 0.4}, "leave no step to prune in"),
        ({"t_init": -1}, r"t_init must be a number of steps, at least 0, or a share of them in \[0, 1\), got -1"),
        ({"t_final": 1.5}, "t_final must be a number of steps"),
        ({"delta_t": 0}, "delta_t must be a number of steps, at least 1"),
        ({"delta_t": True}, "delta_t must be a number of steps"),
        ({"target": 0}, "target must be a whole number of at least 1, got 0"),
        ({"floor": 9}, "target must be a whole number of at least 9, got 8"),
        ({"ceiling": 7}, "ceiling must be at least target, 8, got 7"),
        ({"floor": 0}, "floor must be a whole number of at least 1"),
        ({"unit": "bytes"}, "unit must be 'ranks' or 'parameters', got 'bytes'"),
        ({"beta2": 1.0}, r"beta2 must be in \(0, 1\), got 1.0"),
        ({"regrow": 1}, "regrow must be true or false"),
        ({"masked": "no"}, "masked must be true, false or None"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(st.StructureError, match=message):
        st.AdaLoRA(**{"total_steps": 100, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.adalora(rank=4, initial_rank=3), "initial_rank must be a whole number of at least 4, got 3"),
        (lambda: st.adalora(rank=0), "adalora: rank"),
        (lambda: st.adalora(t_init=0.5, t_final=0.5), "leave no step to prune in"),
        (lambda: st.adalora(orthogonality=-1), "Orthogonality: coefficient must be a number of at least 0, got -1"),
        (lambda: st.adalora(unit="bytes"), "unit must be"),
        (lambda: st.Orthogonality(squared=1), "squared must be true or false"),
    ],
)
def test_the_recipe_refuses_by_itself(make, message):
    with pytest.raises(st.StructureError, match=message):
        make()


def test_what_cannot_be_pruned_is_refused_when_attached():
    model = nn.Sequential(nn.Linear(6, 6))
    recipe = st.lora(rank=4)
    st.adapt(model, recipe)
    optimizer = torch.optim.AdamW(st.param_groups(model))
    with pytest.raises(st.SlimtuneError, match="trains no adapter whose recipe names AdaLoRA"):
        st.attach(st.AdaLoRA(2, total_steps=9), model, optimizer)
    with pytest.raises(st.SlimtuneError, match="trains no adapter called 'gone'"):
        st.attach(st.AdaLoRA(2, total_steps=9, adapter="gone"), model, optimizer)
    with pytest.raises(st.StructureError, match="0: a pruned rank comes back from its core, which LowRank has not"):
        st.attach(st.AdaLoRA(2, total_steps=9, adapter="default"), model, optimizer)
    with pytest.raises(st.StructureError, match="target 8 is a budget of 8 ranks, of 4"):
        st.attach(st.AdaLoRA(8, total_steps=9, adapter="default"), model, optimizer)
    other = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(st.SlimtuneError, match="attach it to the optimizer that holds the adapter's parameters"):
        st.attach(st.AdaLoRA(2, regrow=False, total_steps=9, adapter="default"), model, other)
    st.attach(st.AdaLoRA(2, regrow=False, total_steps=9, adapter="default"), model, optimizer)  # plain factors will do
    uneven = base()
    st.adapt(uneven, replace(st.adalora(rank=6, initial_rank=12, ceiling=6), overrides={"0": {"rank": 4}}))
    with pytest.raises(st.StructureError, match="with a ceiling of 6 the layers cannot hold 12 ranks"):
        ada = st.controllers_of(uneven[0].adapters["default"].recipe, 9)[-1]
        st.attach(ada, uneven, torch.optim.AdamW(st.param_groups(uneven)))
    fixed = nn.Sequential(nn.Linear(6, 6))
    st.adapt(fixed, st.c3a(block=2))
    with pytest.raises(st.StructureError, match="0: the ranks of BlockCirculant cannot change"):
        st.attach(st.AdaLoRA(2, total_steps=9, adapter="default"), fixed, torch.optim.AdamW(st.param_groups(fixed)))


# ---- scores


def test_a_steady_rank_fades():
    """With |w g| = 1 for ever the score is known: sensitivity goes to 1, uncertainty to 0."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    st.adapt(model, st.adalora(rank=1, initial_rank=1, orthogonality=0))
    structure = model[0].adapters["default"].structure
    for p in structure.parameters():
        p.data.fill_(1.0)
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1e-300))
    ada = st.AdaLoRA(1, total_steps=10**6)
    st.attach(ada, model, optimizer)
    seen = {}
    for t in range(1, 201):
        optimizer.step()
        seen[t] = ada.scores()["0"][0] / 3  # A, B and the core alike
    assert [seen[t] for t in (1, 10, 50)] == pytest.approx([0.0191, 0.237, 2.2e-3], rel=1e-2)
    assert seen[200] < 1e-12


def test_the_score_of_two_triplets_made_by_hand():
    model = nn.Sequential(nn.Linear(2, 3))
    st.adapt(model, st.adalora(rank=1, initial_rank=2, orthogonality=0))
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1e-3))
    ada = st.AdaLoRA(1, total_steps=100)
    st.attach(ada, model, optimizer)
    structure = model[0].adapters["default"].structure
    one = {"core": [2.0, 3.0], "A": [[1.0, 3.0], [2.0, 4.0]], "B": [[3.0, 0.0], [6.0, 0.0], [0.0, 9.0]]}
    for name, values in one.items():
        state = optimizer.state[getattr(structure, name)]
        state["adalora_sensitivity"] = torch.tensor(values)
        state["adalora_uncertainty"] = torch.full_like(state["adalora_sensitivity"], 0.5)
    # s(E_j) + mean_c s(A[j, c]) + mean_o s(B[o, j])
    assert ada.scores() == {"0": {0: 1.0 + 1.0 + 1.5, 1: 1.5 + 1.5 + 1.5}}


def test_averages_are_kept_in_fp32_whatever_the_parameters():
    """(w g)^2 of 1e-12 is 0 in fp16, and all scores were ties."""
    model = nn.Sequential(nn.Linear(2, 3))
    st.adapt(model, st.adalora(rank=1, initial_rank=2, orthogonality=0))
    structure = model[0].adapters["default"].structure.half()
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1e-6))
    ada = st.AdaLoRA(1, total_steps=100)
    st.attach(ada, model, optimizer)
    for p in structure.parameters():
        p.data.fill_(1e-3)
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    Ib, Ub = (optimizer.state[structure.A][f"adalora_{what}"] for what in ("sensitivity", "uncertainty"))
    assert Ib.dtype == Ub.dtype == torch.float32
    scores = ada.scores()["0"]
    assert all(s == pytest.approx(3 * 0.15 * 0.85 * 0.15 * 1e-12, rel=0.02) for s in scores.values())


@MASKED
def test_scores_are_the_formula(masked):
    """With clipping: the gradient is what the step used; w is that after the step."""
    run = Run(torch.float64, masked=masked)
    Ib = {n: torch.zeros_like(p) for n, p in run.model.named_parameters() if p.requires_grad}
    Ub = copy.deepcopy(Ib)
    for _ in range(2):
        run.backward()
        total = torch.nn.utils.clip_grad_norm_([p for p in run.model.parameters() if p.requires_grad], 1e-3)
        assert total > 1e-3
        run.optimizer.step()
        for n, p in run.model.named_parameters():
            if p.requires_grad:
                I = (p * p.grad).abs().detach()
                Ib[n] = 0.85 * Ib[n] + 0.15 * I
                Ub[n] = 0.85 * Ub[n] + 0.15 * (I - Ib[n]).abs()
        run.optimizer.zero_grad()
    for layer, found in run.ada.scores().items():
        s = {k: Ib[key] * Ub[key] for k in "AB" for key in [f"{layer}.adapters.default.structure.{k}"]}
        core = f"{layer}.adapters.default.structure.core"
        S = Ib[core] * Ub[core] + s["A"].mean(1) + s["B"].mean(0)
        assert [found[j] for j in range(6)] == pytest.approx(S.tolist(), rel=1e-10)


def test_scores_and_masks_are_those_of_peft():
    """Its allocator is shown our parameters and gradients, step after step, and prunes the same ranks."""
    run = Run(torch.float64, masked=True, total=40, t_init=3, t_final=12, delta_t=4, rank=4)
    theirs = peft.get_peft_model(
        base(torch.float64),
        peft.AdaLoraConfig(
            init_r=6, target_r=4, tinit=3, tfinal=12, deltaT=4, total_step=40, lora_alpha=24, target_modules=["0", "2"]
        ),
    )
    names = {"A": "lora_A", "B": "lora_B", "core": "lora_E"}

    class Show(st.Controller):
        def after_step(self, model):
            for layer, structure in run.structures.items():
                for name, key in names.items():
                    p = getattr(theirs.base_model.model.get_submodule(layer), key)["default"]
                    own = getattr(structure, name)
                    p.data = own.detach().reshape(p.shape).clone()
                    p.grad = own.grad.reshape(p.shape).clone()
            theirs.base_model.update_and_allocate(run.ada.done + 1)

    run.handles[-1].remove()
    st.attach(Show(), run.model, run.optimizer)
    st.attach(run.ada, run.model, run.optimizer)
    pruned = 0
    for t in range(1, 29):
        run.steps()
        for layer, structure in run.structures.items():
            module = theirs.base_model.model.get_submodule(layer)
            with torch.no_grad():
                structure_scale = torch.tensor(24 / (6 + 1e-5), dtype=torch.float64)
                change = structure_scale * structure.dense()
                assert torch.allclose(change, module.get_delta_weight("default"), rtol=1e-12, atol=1e-14)
            assert torch.equal(structure.core == 0, module.lora_E["default"].flatten() == 0), (t, layer)
            pruned += int((structure.core == 0).sum())
    assert pruned > 10 and sum(run.ranks.values()) == 8
    pattern = theirs.peft_config["default"].rank_pattern
    for layer in run.structures:
        kept = [j for j, yes in enumerate(pattern[f"{layer}.lora_E.default"]) if yes]
        assert run.ada.live(layer) == kept


# ---- plans


def test_the_best_are_kept():
    scores = {"a": dict(enumerate([0.1, 0.9, 0.5])), "b": dict(enumerate([0.2, 0.3, 0.4])), "c": {0: 0.05, 2: 0.01}}
    ones = dict.fromkeys(scores, 1)
    assert best_ranks(scores, ones, 4) == {"a": [1, 2], "b": [2], "c": [0]}
    assert best_ranks(scores, ones, 6, floor=2) == {"a": [1, 2], "b": [1, 2], "c": [0, 2]}
    assert best_ranks(scores, ones, 5, ceiling={"a": 1, "b": 3, "c": 2}) == {"a": [1], "b": [0, 1, 2], "c": [0]}


@pytest.mark.parametrize("budget", range(3, 10))
def test_equal_scores_never_prune_too_many(budget):
    scores = {layer: dict.fromkeys(range(3), 0.0) for layer in "abc"}
    kept = best_ranks(scores, dict.fromkeys(scores, 1), budget)
    assert sum(map(len, kept.values())) == budget and all(kept.values())
    assert kept == best_ranks(scores, dict.fromkeys(scores, 1), budget)


@pytest.mark.parametrize("seed", range(8))
def test_a_budget_of_parameters_is_used_up_and_kept(seed):
    draw = torch.Generator().manual_seed(seed)
    costs = dict(zip("abcd", torch.randint(5, 40, (4,), generator=draw).tolist(), strict=True))
    scores = {layer: dict(enumerate(torch.rand(4, generator=draw).tolist())) for layer in costs}
    budget = int(2.3 * sum(costs.values()))
    kept = best_ranks(scores, costs, budget)
    left = budget - sum(costs[layer] * len(slots) for layer, slots in kept.items())
    assert left >= 0
    for layer, slots in kept.items():
        assert slots
        worth = {j: s / costs[layer] for j, s in scores[layer].items()}
        assert all(worth[j] >= worth[k] for j in slots for k in worth if k not in slots)
        assert len(slots) == 4 or costs[layer] > left


# ---- what a run does


@MASKED
@REGROW
def test_the_total_is_the_target(masked, regrow):
    """Under a plain loop, by itself; PEFT's has to be called, and is often forgotten."""
    run = Run(masked=masked, regrow=regrow)
    noted = {}
    for t in range(1, 25):
        run.steps()
        if run.ada.note():
            noted[t] = run.ada.note()["ranks"]
            assert json.loads(json.dumps(run.ada.note())) == run.ada.note()
            assert sum(noted[t].values()) == run.ada.budget(t)
            assert run.ranks == noted[t]
    # the budget is down at 12; only ranks that came back are there to be pruned later
    assert sorted(noted) == [3, 6, 9, 12, 15, 18] if regrow else [3, 6, 9, 12]
    last = noted[max(noted)]
    assert sum(last.values()) == 6 == sum(run.ranks.values())
    x = torch.randn(5, 16)
    before = run.model(x)
    for handle in run.handles:
        handle.finish()
    assert torch.allclose(run.model(x), before, atol=1e-6)
    assert {n: s.rank for n, s in run.structures.items()} == last
    assert {row.name: row.rank for row in st.summary(run.model).rows} == last


def test_pruned_ranks_come_back_until_the_last_round():
    run = Run()
    run.steps(3)
    pruned = 12 - sum(run.ranks.values())
    assert pruned > 0
    run.steps()
    assert sum(run.ranks.values()) == 12  # they have a gradient, and trained on
    run.steps(14)
    assert [s.rank for s in run.structures.values()] == list(run.ranks.values())
    run.steps(3)
    assert sum(run.ranks.values()) == 6


def test_a_pruned_rank_starts_without_momentum_and_within_a_learning_rate():
    run = Run(orthogonality=0, optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0))
    run.steps(2)
    before = {n: s.core.detach().clone() for n, s in run.structures.items()}
    run.steps()
    for n, structure in run.structures.items():
        for j in (structure.core == 0).nonzero().flatten().tolist():
            assert before[n][j] != 0
            for p, row in ((structure.core, j), (structure.A, j), (structure.B.t(), j)):
                state = run.optimizer.state[structure.B if p is not structure.core and p is not structure.A else p]
                m, v = (state[k].t() if p.shape != state[k].shape else state[k] for k in ("exp_avg", "exp_avg_sq"))
                assert not m[row].any() and v[row].any()
    off = {n: structure.core == 0 for n, structure in run.structures.items()}
    assert any(mask.any() for mask in off.values())
    run.steps()
    for n, structure in run.structures.items():
        assert (structure.core[off[n]].abs() <= 1.01e-2).all()


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_masked_and_physical_ranks_train_alike(dtype, optimizer):
    """A rank that is off is zero everywhere, and no optimizer, decay or penalty moves it."""
    make = (lambda g: torch.optim.SGD(g, momentum=0.9, weight_decay=0.1)) if optimizer is torch.optim.SGD else optimizer
    runs = [Run(dtype, masked=masked, regrow=False, optimizer=make) for masked in (False, True)]
    for _ in range(24):
        for run in runs:
            run.steps()
        physical, masked = runs
        assert physical.ada.ranks() == masked.ada.ranks()
        for n, structure in physical.structures.items():
            other, live = masked.structures[n], masked.ada.live(n)
            assert other.rank == 6
            assert torch.allclose(other.A[live], structure.A, rtol=1e-9, atol=1e-12)
            assert torch.allclose(other.B[:, live], structure.B, rtol=1e-9, atol=1e-12)
            off = masked.ada.off.get(n, [])
            assert not other.A[off].any() and not other.core[off].any() and not other.B[:, off].any()
    assert sum(physical.ada.ranks().values()) == 6


class Coded(torch.optim.AdamW):
    """Keeps codes and blocks, as 8-bit optimizers do: code 0 is not zero."""

    def step(self, closure=None):
        super().step(closure)
        for p, state in self.state.items():
            state["codes"] = torch.full_like(p, 128, dtype=torch.uint8)
            state["absmax"] = torch.ones(2 + p.numel() // 256)


@pytest.mark.parametrize("regrow", [True, False])
def test_codes_of_another_optimizer_are_not_taken_for_numbers(regrow):
    run = Run(masked=True, regrow=regrow, optimizer=Coded)
    with pytest.warns(UserWarning, match="Coded keeps state of another shape"):
        run.steps(24)
    for n, structure in run.structures.items():
        off = run.ada.off[n]
        assert off and not structure.A[off].any() and not structure.B[:, off].any() and not structure.core[off].any()
        for p in structure.parameters():
            assert (run.optimizer.state[p]["codes"] == 128).all()
            assert run.optimizer.state[p]["step"] < 24


def test_masked_ranks_do_not_recompile():
    run = Run(masked=True, regrow=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    bare, run.model = run.model, torch.compile(run.model, backend="eager", fullgraph=True)
    run.steps(1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run.steps(23)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1
    run.model = bare
    assert sum(run.ranks.values()) == 6


def test_what_is_pruned_costs_nothing_afterwards():
    run = Run(regrow=False)
    run.steps(2)
    ranks = 6 * (16 + 24 + 1) + 6 * (24 + 8 + 1)
    assert run.numbers() == 5 * ranks  # value, two moments, sensitivity, uncertainty
    seen = [run.numbers()]
    for _ in range(16):
        run.steps()
        seen.append(run.numbers())
    assert seen == sorted(seen, reverse=True)
    left = sum(s.rank * (s.out_features + s.in_features + 1) for s in run.structures.values())
    assert run.numbers() == 3 * left < seen[0] / 2  # the scores have gone, too


def test_the_rest_of_training_does_not_notice():
    """Learning rates, step counts and the rows of the ranks kept are the same before and after a round."""
    run = Run(orthogonality=0, regrow=False)
    run.steps(2)
    run.backward()
    kept = {}

    class Look(st.Controller):
        def after_step(self, model):
            for n, s in run.structures.items():
                kept[n] = {k: v.clone() for k, v in run.optimizer.state[s.A].items()} | {"A": s.A.detach().clone()}

    run.handles[-1].remove()
    st.attach(Look(), run.model, run.optimizer)
    slots = {}
    plan = run.ada.carry_out
    run.ada.carry_out = lambda changes: (slots.update(changes), plan(changes))
    st.attach(run.ada, run.model, run.optimizer)
    rates, objects = [g["lr"] for g in run.optimizer.param_groups], list(map(id, run.model.parameters()))
    run.optimizer.step()
    assert slots and rates == [g["lr"] for g in run.optimizer.param_groups]
    assert objects == list(map(id, run.model.parameters()))
    for n, change in slots.items():
        s = run.structures[n]
        state = run.optimizer.state[s.A]
        assert state["step"] == 3 and torch.equal(s.A, kept[n]["A"][change.keep])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], kept[n][key][change.keep])


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_no_pruning_where_the_start_is_the_target(unit):
    """PEFT: kthvalue of nothing."""
    run = Run(rank=4, initial_rank=4, unit=unit)
    run.steps(24)
    assert run.ranks == {"0": 4, "2": 4}


def test_equal_scores_in_a_run():
    """PEFT prunes everything. Here no layer sees an input, so every gradient and every score is 0."""
    run = Run(regrow=False, orthogonality=0)
    run.x.zero_()
    run.model[0].bias.data.fill_(-1.0)
    for t in range(1, 25):
        run.steps()
        if run.ada.note():
            assert sum(run.ada.ranks().values()) == run.ada.budget(t) and min(run.ada.ranks().values()) >= 1
    assert sum(run.ada.ranks().values()) == 6


def test_floor_and_ceiling():
    run = Run(rank=3, floor=3)
    run.steps(24)
    assert run.ranks == {"0": 3, "2": 3}
    run = Run(rank=2, floor=1, ceiling=2)
    run.steps(24)
    assert run.ranks == {"0": 2, "2": 2}
    with pytest.raises(st.StructureError, match="ceiling must be at least target"):
        st.adalora(rank=3, ceiling=2)


def test_a_budget_of_parameters():
    run = Run(unit="parameters")
    costs = {n: s.out_features + s.in_features + 1 for n, s in run.structures.items()}
    run.steps(24)
    assert run.ada.budget(24) == 3 * (41 + 33) and costs == {"0": 41, "2": 33}
    left = run.ada.budget(24) - sum(s.rank * costs[n] for n, s in run.structures.items())
    assert 0 <= left < 41 and sum(p.numel() for s in run.structures.values() for p in s.parameters()) <= 3 * 74


def test_accumulated_batches_are_one_step():
    whole, parts = Run(torch.float64), Run(torch.float64)
    for _ in range(24):
        whole.backward()
        for i in range(4):
            parts.backward(slice(16 * i, 16 * i + 16), 0.25)
        for run in (whole, parts):
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert whole.ranks == parts.ranks and sum(whole.ranks.values()) == 6
    one, two = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.allclose(one[k], two[k], rtol=0, atol=1e-10) for k in one)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_the_scores_alone(fused):
    """A fused optimizer is called for the step that it then skips: the hooks of both kinds are not fooled."""
    run = Run(optimizer=lambda groups: torch.optim.AdamW(groups, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def step(factor):
        scaler.scale(factor * (run.model(run.x) - run.y).square().mean()).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()

    step(1.0)
    A = run.structures["0"].A
    before = [run.optimizer.state[A][f"adalora_{what}"].clone() for what in ("sensitivity", "uncertainty")]
    weights = A.detach().clone()
    step(math.inf)
    after = [run.optimizer.state[A][f"adalora_{what}"] for what in ("sensitivity", "uncertainty")]
    assert run.ada.done == 1 and all(map(torch.equal, before, after)) and torch.equal(weights, A)
    step(1.0)
    assert run.ada.done == 2 and not torch.equal(before[0], after[0]) and all(t.isfinite().all() for t in after)


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_mixed_precision_does_not_change_the_penalty(scale):
    plain, scaled = Run(), Run(optimizer=lambda groups: torch.optim.AdamW(groups, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for _ in range(3):
        plain.steps()
        scaler.scale((scaled.model(scaled.x) - scaled.y).square().mean()).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        scaled.schedule.step()
        scaled.optimizer.zero_grad()
    for n, structure in plain.structures.items():
        assert torch.allclose(structure.A, scaled.structures[n].A, atol=1e-5)


def test_gradients_that_are_not_finite_are_named():
    run = Run()
    run.steps(2)
    run.backward()
    run.structures["2"].core.grad[1] = math.nan
    with pytest.raises(st.DivergenceError, match="AdaLoRA: 2: a score is not finite"):
        run.optimizer.step()


def test_a_layer_without_a_gradient_keeps_its_score():
    run = Run()
    run.steps(2)
    before = run.ada.scores()
    run.backward()
    for p in run.structures["0"].parameters():
        p.grad = None
    run.ada.due = lambda t: False
    run.optimizer.step()
    after = run.ada.scores()
    assert before["0"] == after["0"] and before["2"] != after["2"]


# ---- resuming


@MASKED
@REGROW
@pytest.mark.parametrize("stopped", [0, 2, 3, 4, 17, 18, 19, 22])
def test_resumes_bit_for_bit(stopped, masked, regrow, tmp_path):
    """Before, at and after a round, the last one too; PEFT prunes again, or fails."""
    run = Run(masked=masked, regrow=regrow)
    if stopped:
        run.steps(stopped)
    other = run.again(tmp_path)
    assert same(run, other)
    run.steps(24 - stopped)
    other.steps(24 - stopped)
    assert same(run, other) and sum(other.ada.ranks().values()) == 6
    for a in (run, other):
        for handle in a.handles:
            handle.finish()
    assert same(run, other)


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
@pytest.mark.parametrize("stopped", [7, 20])
def test_state_put_back_after_attaching(stopped, unit, tmp_path):
    """In the order of transformers' Trainer."""
    run = Run(regrow=False, unit=unit)
    run.steps(stopped)
    other = run.again(tmp_path)
    for handle in other.handles:
        handle.remove()
    made = st.controllers_of(run.recipe, 24)
    handles = [st.attach(c, other.model, other.optimizer) for c in made]
    for handle, before in zip(handles, run.handles, strict=True):
        handle.load_state_dict(before.state_dict())
    run.steps(24 - stopped)
    other.steps(24 - stopped)
    assert same(run, other)


def test_files_between_two_prunings_hold_what_has_come_back(tmp_path):
    """PEFT slices by the last mask: what grew since is lost."""
    run = Run()
    run.steps(4)
    x = torch.randn(5, 16)
    st.save(run.model, tmp_path)
    other = base()
    st.load(other, tmp_path)
    assert torch.equal(other(x), run.model(x))


def test_a_state_of_other_ranks_is_refused():
    run = Run(regrow=False)
    run.steps(12)
    fresh = Run(regrow=False)
    with pytest.raises(
        st.SlimtuneError, match=r"AdaLoRA: \d: its state is of a run with rank \d there, the model has 6"
    ):
        fresh.handles[-1].load_state_dict(run.ada.state_dict())
    state = run.ada.state_dict()
    state["sizes"] = {"0": 6, "gone": 6}
    with pytest.raises(
        st.SlimtuneError, match="AdaLoRA: its state is of a run that adapts 0, gone, the model has 0, 2"
    ):
        fresh.handles[-1].load_state_dict(state)


def test_ranks_that_something_else_has_changed_are_named():
    run = Run()
    run.steps(1)
    st.resize(run.model, {"2": 4}, run.optimizer)
    with pytest.raises(st.SlimtuneError, match="AdaLoRA: 2: something else has changed its rank from 6 to 4"):
        run.steps(24)


def test_two_adapters_need_a_name():
    model = base()
    recipe = st.adalora(rank=2)
    st.adapt(model, recipe, ["0"], name="one")
    st.adapt(model, recipe, ["2"], name="two")
    ada = st.controllers_of(recipe, 9)[-1]
    st.attach(ada, model, torch.optim.AdamW(st.param_groups(model)))  # only the second one trains
    assert list(ada.layers) == ["2"]
    for p in model[0].adapters["one"].parameters():
        p.requires_grad_(True)
    with pytest.raises(st.SlimtuneError, match="several adapters train: one, two; say which"):
        st.attach(st.controllers_of(recipe, 9)[-1], model, torch.optim.AdamW(st.param_groups(model)))


def test_a_plan_that_cannot_be_carried_out_is_refused():
    run = Run(masked=True)
    with pytest.raises(st.SlimtuneError, match=r"0: cannot keep \[7\] of the ranks \[0, 1, 2, 3, 4, 5\] and add 0"):
        st.controllers.allocator.Allocator.carry_out(run.ada, {"0": Change([7])})
    with pytest.raises(st.SlimtuneError, match="0: no room for 2 more ranks, 6 slots hold 5"):
        st.controllers.allocator.Allocator.carry_out(run.ada, {"0": Change([0, 1, 2, 3, 4], 2)})


# ---- the penalty


def penalty(structures, squared=False):
    """As PEFT writes it into the loss."""
    factors = [f for s in structures for f in (s.A, s.B.t())]
    norms = [(M @ M.t() - torch.eye(len(M), dtype=M.dtype)).norm() for M in factors]
    return sum(n.square() if squared else n for n in norms) / len(norms)


@pytest.mark.parametrize("squared", [False, True])
def test_the_penalty_is_a_gradient(squared):
    model = nn.Sequential(base(torch.float64), nn.Linear(8, 24), nn.Linear(24, 8)).double()
    st.adapt(model, st.adalora(rank=2, initial_rank=5))
    structures = [h.adapters["default"].structure for h in hosts(model).values()]
    parameters = [p for s in structures for p in s.parameters()]
    torch.manual_seed(3)
    for p in parameters:
        p.data.add_(torch.randn_like(p) * 0.1)
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in parameters]
    wanted = torch.autograd.grad(0.3 * penalty(structures, squared), parameters, allow_unused=True)
    control = st.Orthogonality(0.3, squared=squared)
    st.attach(control, model, torch.optim.SGD(parameters, lr=1.0))
    control.before_step(model)
    assert torch.allclose(control.value(), 0.3 * penalty(structures, squared), rtol=1e-12)
    for p, old, w in zip(parameters, before, wanted, strict=True):
        assert torch.allclose(p.grad - old, torch.zeros_like(p) if w is None else w, rtol=1e-10, atol=1e-12)


def test_the_penalty_is_that_of_peft():
    theirs = nn.Module()
    theirs.inner = base(torch.float64)
    theirs.forward = lambda x: types.SimpleNamespace(loss=theirs.inner(x).sum() * 0)
    config = peft.AdaLoraConfig(init_r=6, total_step=9, orth_reg_weight=0.5, target_modules=["0", "2"])
    wrapped = peft.get_peft_model(theirs, config)
    wrapped.double()
    run = Run(torch.float64, orthogonality=0.5)
    for layer, structure in run.structures.items():
        module = wrapped.base_model.model.inner.get_submodule(layer)
        structure.A.data.copy_(module.lora_A["default"])
        structure.B.data.copy_(module.lora_B["default"])
        for p in structure.parameters():
            p.grad = torch.zeros_like(p)
    loss = wrapped.base_model(torch.zeros(1, 16, dtype=torch.float64)).loss
    assert run.controllers[0].value().item() == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    run.controllers[0].before_step(run.model)
    for layer, structure in run.structures.items():
        module = wrapped.base_model.model.inner.get_submodule(layer)
        assert torch.allclose(structure.A.grad, module.lora_A["default"].grad, rtol=1e-10)
        assert torch.allclose(structure.B.grad, module.lora_B["default"].grad, rtol=1e-10)


def test_the_penalty_at_the_start_is_the_root_of_the_rank():
    run = Run(torch.float64, orthogonality=1.0)
    assert 0.98 * math.sqrt(6) < run.controllers[0].value() < math.sqrt(6)
    for structure in run.structures.values():
        structure.A.data.copy_(torch.eye(6, structure.in_features))
        structure.B.data.copy_(torch.eye(structure.out_features, 6))
        for p in structure.parameters():
            p.grad = torch.zeros_like(p)
    run.controllers[0].before_step(run.model)
    assert run.controllers[0].value() == 0
    assert not any(p.grad.any() for structure in run.structures.values() for p in structure.parameters())


@pytest.mark.parametrize("coefficient", [1.0, 1e3])
def test_the_penalty_of_orthonormal_and_of_zero_factors_has_no_gradient(coefficient):
    """B of LoRA's start, and rows of the identity: the norm has a corner there, where 0 is its least gradient."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    st.adapt(model, st.lora(rank=2))
    structure = model[0].adapters["default"].structure
    structure.A.data.copy_(torch.eye(2, 6))
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1.0))
    st.attach(st.Orthogonality(coefficient, adapter="default"), model, optimizer)
    structure.A.grad, structure.B.grad = torch.zeros(2, 6), torch.zeros(6, 2)
    optimizer.step()
    assert torch.equal(structure.A.detach(), torch.eye(2, 6)) and not structure.B.any()


def test_masked_ranks_have_no_part_in_the_penalty():
    run = Run(torch.float64, orthogonality=1.0, masked=True, regrow=False)
    run.steps(24)
    control = run.controllers[0]
    assert run.ada.off
    before = control.value()
    run.handles[-1].finish()
    assert torch.allclose(control.value(), before, rtol=1e-12)


def test_the_penalty_on_factors_of_two_optimizers():
    grads = []
    for parts in (1, 2):
        run = Run(torch.float64, orthogonality=0)
        factors = [p for s in run.structures.values() for p in (s.A, s.B)]
        for p in factors:
            p.grad = torch.zeros_like(p)
        for some in (factors[k::parts] for k in range(parts)):
            optimizer = torch.optim.SGD(some, lr=0.0)
            st.attach(st.Orthogonality(1.0, adapter="default"), run.model, optimizer)
            optimizer.step()
        grads.append([p.grad for p in factors])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))
    cores = torch.optim.SGD([s.core for s in run.structures.values()], lr=0.0)
    with pytest.raises(st.SlimtuneError, match="optimizer that holds the adapter's factors"):
        st.attach(st.Orthogonality(1.0, adapter="default"), run.model, cores)


def test_the_penalty_needs_thin_factors():
    model = nn.Sequential(nn.Linear(6, 6))
    st.adapt(model, st.c3a(block=2))
    optimizer = torch.optim.SGD(st.param_groups(model, lr=1.0))
    with pytest.raises(st.StructureError, match="0: BlockCirculant has no thin factors"):
        st.attach(st.Orthogonality(adapter="default"), model, optimizer)
    with pytest.raises(st.SlimtuneError, match="trains no adapter whose recipe names Orthogonality"):
        st.attach(st.Orthogonality(), model, optimizer)


def test_it_learns_orthonormal_directions():
    run = Run(total=400, orthogonality=1.0)
    before = run.controllers[0].value().item()
    losses = [run.steps() for _ in itertools.repeat(None, 400)]
    assert losses[-1] < 0.9 * losses[0] and run.controllers[0].value() < 0.2 * before
