"""ARD-LoRA in our reading: gates, proximal steps, schedule, and ranks that follow."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

import slimtune as st
from cases import tiny_llama
from slimtune.controllers.ard import fill_ranks
from slimtune.ranks import compact
from slimtune.targets import hosts


def structures(model):
    return {name: host.adapters["default"].structure for name, host in hosts(model).items()}


def toy(dtype=torch.float32, seed=0, **options):
    """Two layers, 64 samples, AdamW."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
    x, y = torch.randn(64, 16, dtype=dtype), torch.randn(64, 8, dtype=dtype)
    recipe = st.ardlora(**{"rank": 4, "heads": 2, "travel": 1.0} | options)
    st.adapt(model, recipe)
    return model, recipe, x, y


def attached(model, recipe, steps, lr=1e-2, kind=torch.optim.AdamW):
    optimizer = kind(st.param_groups(model, lr=lr))
    (controller,) = st.controllers_of(recipe, steps)
    return optimizer, controller, st.attach(controller, model, optimizer)


def train(model, optimizer, x, y, steps, parts=1):
    for _ in range(steps):
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ((model(a) - b).square().mean() / parts).backward()
        optimizer.step()


# ---------------------------------------------------------------- gates


def gated(rho, rank=8, rows=16, **options):
    structure = st.GatedHeads(6, 5, rank=rank, heads=1, rows=rows, **options).double()
    structure.reset_parameters()
    with torch.no_grad():
        structure.alpha.fill_(rho / rank)
        structure.B.normal_()
    return structure


@pytest.mark.parametrize(("rho", "rank"), [(2.4, 2), (6.5, 6), (8, 8), (11.92, 12), (15.2, 15), (0, 0), (0.5, 0)])
def test_hard_gates_are_the_rounded_rank(rho, rank):
    structure = gated(rho)
    structure.hard.fill_(True)
    g = structure.gates()
    assert g.tolist() == [1.0] * rank + [0.0] * (16 - rank)
    assert structure.hard_ranks().tolist() == [rank]


def test_soft_gates():
    structure = gated(8.0)
    structure.tau.fill_(0.25)
    g = structure.gates()
    assert g[7].item() == pytest.approx(1 / (1 + math.exp(-2))) and g[8].item() == pytest.approx(1 - g[7].item())
    for rho in (4.0, 7.5, 11.0):  # the sum is the rank wanted, at whole numbers and halves
        with torch.no_grad():
            structure.alpha.fill_(rho / 8)
        assert structure.gates().sum().item() == pytest.approx(rho, abs=1e-6)


def test_gradient_of_the_gates():
    """d/d alpha = R0 sum_j g_j (1 - g_j) / tau dL/dg_j, against finite differences too."""
    structure = gated(6.3)
    x, probe = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)

    def loss():
        return (structure(x) * probe).sum()

    loss().backward()
    found = structure.alpha.grad.item()
    g = structure.gates().detach()
    each = torch.einsum("ti,ri,or,to->r", x, structure.A.detach(), structure.B.detach(), probe)
    assert found == pytest.approx(float(8 * (g * (1 - g) / 0.5 * each).sum()), rel=1e-10)
    with torch.no_grad():
        values = []
        for change in (1e-6, -1e-6):
            structure.alpha.add_(change)
            values.append(loss().item())
            structure.alpha.sub_(change)
    assert found == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


class Reference(nn.Module):
    """Per-head LoRA with gates as the sheet writes it, heads on the outputs."""

    def __init__(self, heads, width, inputs, rank, rows, tau):
        super().__init__()
        self.A = nn.Parameter(torch.randn(heads, rows, inputs, dtype=torch.float64))
        self.B = nn.Parameter(torch.randn(heads, width, rows, dtype=torch.float64))
        self.alpha = nn.Parameter(torch.rand(heads, dtype=torch.float64) + 0.5)
        self.rank, self.tau = rank, tau

    def forward(self, x):
        j = torch.arange(self.A.shape[1])
        g = torch.sigmoid((self.rank * self.alpha[:, None] - j - 0.5) / self.tau)
        h = torch.einsum("...n,hrn->...hr", x, self.A) * g
        return torch.einsum("...hr,hdr->...hd", h, self.B).flatten(-2)


def test_is_gated_lora_head_by_head():
    torch.manual_seed(0)
    reference, x = Reference(3, 4, 5, 2, 6, 0.3), torch.randn(7, 5, dtype=torch.float64)
    structure = st.GatedHeads(12, 5, rank=2, heads=3, rows=6).double()
    structure.reset_parameters()
    structure.tau.fill_(0.3)
    with torch.no_grad():
        structure.A.copy_(reference.A.flatten(0, 1))
        structure.B.copy_(reference.B.permute(1, 0, 2).flatten(1))
        structure.alpha.copy_(reference.alpha)
    probe = torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(structure(x), reference(x))
    (structure(x) * probe).sum().backward()
    (reference(x) * probe).sum().backward()
    torch.testing.assert_close(structure.alpha.grad, reference.alpha.grad)
    torch.testing.assert_close(structure.A.grad, reference.A.grad.flatten(0, 1))
    torch.testing.assert_close(structure.B.grad, reference.B.grad.permute(1, 0, 2).flatten(1))


@pytest.mark.parametrize("side", ["output", "input"])
def test_exact_factors_are_block_diagonal_and_without_closed_ranks(side):
    torch.manual_seed(0)
    structure = st.GatedHeads(6, 8, rank=3, heads=2, side=side, rows=[5, 2]).double()
    structure.reset_parameters()
    with torch.no_grad():
        structure.B.normal_()
        structure.alpha.copy_(torch.tensor([1.0, 0.4]))
    structure.hard.fill_(True)
    B, A = structure.exact_factors()
    assert B.shape == (6, 4) and A.shape == (4, 8)  # 3 of 5 and 1 of 2 are open
    torch.testing.assert_close(B @ A, structure.dense(), rtol=0, atol=0)
    own = (B[3:, :3], B[:3, 3:]) if side == "output" else (A[:3, 4:], A[3:, :4])
    assert all(not t.any() for t in own)
    torch.testing.assert_close(structure.dense()[:3, :4], structure.B[:3, :3] @ structure.A[:3, :4])


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize(
    ("held", "batched"),
    [([3, 3], True), ([4, 3], True), ([2, 3], True), ([3, 0], False), ([1, 6], False)],
    ids=["even", "first", "last", "none", "uneven"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_batched_heads_are_the_definition(side, held, batched, dropout):
    """Values and both derivatives, with heads lined up or, where too uneven, by the zeros between them."""
    torch.manual_seed(0)
    structure = st.GatedHeads(6, 8, rank=3, heads=2, side=side, rows=held).double()
    structure.reset_parameters()
    with torch.no_grad():
        for p in structure.parameters():
            p.add_(0.3 * torch.randn_like(p))
    W, bias, scale = torch.randn(6, 8).double(), torch.randn(6).double(), torch.tensor(0.7).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

    def f(x, *_):
        torch.manual_seed(1)
        return structure.linear(x, W, bias, scale, dropout)

    assert (type(f(x).grad_fn).__name__ == "_HeadsBackward") == batched
    if not dropout:
        torch.testing.assert_close(f(x), nn.functional.linear(x, W + 0.7 * structure.dense(), bias))
    inputs = (x, *structure.parameters())
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_converted_to_one_lora_at_the_sum_of_its_ranks():
    model, recipe, x, y = toy()
    optimizer, _, handle = attached(model, recipe, 30)
    train(model, optimizer, x, y, 30)
    handle.finish()
    want = model(x)
    ranks = {name: s.hard_ranks().sum().item() for name, s in structures(model).items()}
    report = st.to_lora(model)
    for entry in report.layers:
        smaller = min(model.get_submodule(entry.name).weight.shape)
        assert entry.how == "exact" and entry.rank == min(ranks[entry.name], smaller)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- phases 1 and 3: plain LoRA


def test_one_head_with_hard_gates_is_lora_bit_for_bit():
    runs = []
    for recipe in (st.ardlora(rank=4, alpha=8, heads=1, warmup=20), st.lora(rank=4, alpha=8)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        x, y = torch.randn(64, 16), torch.randn(64, 8)
        torch.manual_seed(1)
        st.adapt(model, recipe)
        optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-2))
        for controller in st.controllers_of(recipe, 100):
            st.attach(controller, model, optimizer)
        train(model, optimizer, x, y, 10)
        runs.append({n: (s.A, s.B, model(x)) for n, s in structures(model).items()})
    for name in ("0", "2"):
        assert all(torch.equal(a, b) for a, b in zip(runs[0][name], runs[1][name], strict=True))


@pytest.mark.parametrize("side", ["output", "input"])
def test_heads_with_hard_gates_are_a_lora_each(side):
    """H heads train as H LoRAs on slices of the layer would, and dW is theirs bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    x, y = torch.randn(32, 8, dtype=torch.float64), torch.randn(32, 6, dtype=torch.float64)
    recipe = st.ardlora(rank=2, alpha=4, heads={"0": [2, side]}, warmup=20, penalty=0.0)
    st.adapt(model, recipe, ["0"])
    structure = structures(model)["0"]
    As = [nn.Parameter(a.detach().clone()) for a in structure.A.chunk(2)]
    Bs = [nn.Parameter(b.detach().clone()) for b in structure.B.chunk(2, 1)]
    optimizer, _, _ = attached(model, recipe, 100)
    plain = torch.optim.AdamW([*As, *Bs], lr=1e-2, weight_decay=0.0)
    for _ in range(10):
        train(model, optimizer, x, y, 1)
        plain.zero_grad()
        blocks = [b @ a for a, b in zip(As, Bs, strict=True)]
        W = model[0].weight + 2 * torch.cat(blocks, 0 if side == "output" else 1)
        (x @ W.T - y).square().mean().backward()
        plain.step()
    torch.testing.assert_close(structure.A.detach(), torch.cat([a.detach() for a in As]))
    torch.testing.assert_close(structure.B.detach(), torch.cat([b.detach() for b in Bs], 1))
    blocks = [b @ a for a, b in zip(structure.A.chunk(2), structure.B.chunk(2, 1), strict=True)]
    assert torch.equal(structure.dense(), torch.cat(blocks, 0 if side == "output" else 1))


# ---------------------------------------------------------------- the proximal steps


def still(model, optimizer, gradient=0.0):
    """A step on a task whose gradient is nothing but this in every gate."""
    for _, p in st.trainable_parameters(model):
        p.grad = torch.zeros_like(p)
    for s in structures(model).values():
        s.alpha.grad.fill_(gradient)
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("penalty", [1e-3, 0.1, 0.5, 3.0])
def test_l1_is_proximal(kind, penalty):
    """Without a task alpha_t = max(0, 1 - eta lambda t). As a gradient in Adam it would fall at the same rate for any
    lambda."""
    model, recipe, _, _ = toy(torch.float64, penalty=penalty, travel=0.8, least=0, warmup=5, final=5, interval=1000)
    optimizer, _, _ = attached(model, recipe, 60, kind=kind)
    for t in range(60):
        still(model, optimizer)
        steps = min(max(t + 1 - 5, 0), 50)
        for s in structures(model).values():
            want = max(0.0, 1 - 0.8 / 50 * penalty * steps)
            torch.testing.assert_close(s.alpha.detach(), torch.full_like(s.alpha, want), rtol=0, atol=1e-12)


def test_rate_follows_the_schedule():
    """eta is the group's rate as a share of its peak."""
    model, recipe, _, _ = toy(torch.float64, penalty=0.5, warmup=2, final=0, interval=1000)
    optimizer, _, _ = attached(model, recipe, 12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 12)
    for _ in range(12):
        still(model, optimizer)
        schedule.step()
    want = 1 - 0.5 * sum(1 - t / 12 for t in range(2, 12)) / 10
    assert structures(model)["0"].alpha.tolist() == pytest.approx([want, want], abs=1e-12)


def test_variation_over_time():
    """A step D of alpha is shortened by eta lambda beta, and a shorter one does not happen."""
    for gradient, moved in ((0.7, 0.7 - 0.2), (-0.7, -(0.7 - 0.2)), (0.15, 0.0), (0.0, 0.0)):
        model, recipe, _, _ = toy(torch.float64, penalty=0.4, variation=0.5, warmup=1, final=0, interval=1000)
        optimizer, _, _ = attached(model, recipe, 11, kind=torch.optim.SGD)
        still(model, optimizer)
        still(model, optimizer, gradient)
        alpha = structures(model)["0"].alpha
        assert alpha.tolist() == pytest.approx([1 - moved / 10 - 0.4 / 10] * 2, abs=1e-12)


def test_variation_over_depth():
    """The gradient of beta sum |alpha_{l+1} - alpha_l| over layers of one kind: +-beta at a jump, 0 where flat."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 4)).double()
    recipe = st.ardlora(rank=4, heads=2, penalty=0.5, variation=0.2, over="depth", travel=1.0, warmup=1, final=0)
    st.adapt(model, recipe)
    optimizer, _, _ = attached(model, recipe, 11, kind=torch.optim.SGD)
    still(model, optimizer)
    with torch.no_grad():
        for layer, values in enumerate([(1.2, 1.0), (1.0, 1.0), (1.0, 1.3), (1.0, 1.0)]):
            structures(model)[str(layer)].alpha.copy_(torch.tensor(values))
    still(model, optimizer)
    found = torch.stack([s.alpha.detach() for s in structures(model).values()])
    step = 0.5 * 0.2 / 10
    want = torch.tensor([[1.2 - step, 1.0], [1.0 + step, 1.0 + step], [1.0, 1.3 - 2 * step], [1.0, 1.0 + step]])
    torch.testing.assert_close(found, want.double() - 0.5 / 10, rtol=0, atol=1e-7)


def test_by_cost_weighs_the_l1():
    model, recipe, _, _ = toy(torch.float64, penalty=0.5, by_cost=True, warmup=1, final=0, interval=1000)
    optimizer, _, _ = attached(model, recipe, 11)
    for _ in range(2):
        still(model, optimizer)
    costs = {"0": 16 + 12, "2": 24 + 4}
    assert {n: s.rank_cost for n, s in structures(model).items()} == costs
    for name, s in structures(model).items():
        assert s.alpha.tolist() == pytest.approx([1 - 0.05 * costs[name] / 28] * 2)
    heavier = toy(torch.float64, penalty=0.5, by_cost=True, heads={"0": 1, "2": 2}, warmup=1, final=0)
    optimizer, _, _ = attached(*heavier[:2], 11)
    for _ in range(2):
        still(heavier[0], optimizer)
    mean = (40 + 2 * 28) / 3
    assert structures(heavier[0])["0"].alpha.item() == pytest.approx(1 - 0.05 * 40 / mean)


@pytest.mark.parametrize(("least", "penalty", "rank"), [(1, 1e6, 1), (2, 1e6, 2), (0, 1e6, 0), (1, 0.0, 4)])
def test_limits_of_the_penalty(least, penalty, rank):
    """lambda to infinity leaves the floor; without lambda nothing shrinks."""
    model, recipe, _, _ = toy(least=least, penalty=penalty)
    optimizer, controller, handle = attached(model, recipe, 20)
    for _ in range(20):
        still(model, optimizer)
    handle.finish()
    assert controller.ranks() == {"0": [rank] * 2, "2": [rank] * 2}
    assert {s.rank for s in structures(model).values()} == {max(1, 2 * rank)}  # a layer cannot be without any rank
    if not rank:
        assert not any(s.dense().any() for s in structures(model).values())


# ---------------------------------------------------------------- the schedule


def test_phases():
    model, recipe, x, y = toy(warmup=4, final=5, interval=3)
    optimizer, controller, _ = attached(model, recipe, 20)
    structure, taus, seen = structures(model)["0"], [], []
    for t in range(20):
        before, hard = structure.alpha.detach().clone(), bool(structure.hard)
        taus.append(structure.tau.item())
        train(model, optimizer, x, y, 1)
        moved = not torch.equal(before, structure.alpha)
        assert hard == (not 4 <= t < 15) and moved == (4 <= t < 15)
        if controller.note():
            seen.append(t + 1)
        if not 3 <= t < 14:  # what every head holds besides its ranks
            assert structure.rows() == structure.hard_ranks().tolist()
        elif (t - 3) % 3 == 0:
            assert structure.rows() == (structure.hard_ranks() + 2).clamp_max(8).tolist()
    assert seen == [4, 7, 10, 13, 15]
    assert taus[4] == pytest.approx(0.5) and taus[14] == pytest.approx(0.05)
    assert taus[9] == pytest.approx(0.5 * 0.1**0.5)
    assert all(b / a == pytest.approx(0.1**0.1) for a, b in itertools.pairwise(taus[4:15]))


def test_note_is_plain():
    model, recipe, x, y = toy(warmup=1, final=0, interval=1)
    optimizer, controller, _ = attached(model, recipe, 20)
    train(model, optimizer, x, y, 5)
    note = json.loads(json.dumps(controller.note()))
    assert note["heads"] == controller.ranks()
    assert note["ranks"] == {name: sum(own) for name, own in note["heads"].items()}


def test_short_runs():
    for steps in (1, 2, 3):
        model, recipe, x, y = toy()
        optimizer, _, handle = attached(model, recipe, steps)
        train(model, optimizer, x, y, steps)
        handle.finish()
        assert model(x).isfinite().all()


# ---------------------------------------------------------------- ranks that come and go


def test_growth_and_dropping_leave_the_function():
    """New ranks do nothing yet; closed ones do nothing any more."""
    model, recipe, x, y = toy(penalty=0.0, slack=2, interval=1, warmup=2, final=5)
    optimizer, controller, _ = attached(model, recipe, 40, lr=3e-3)
    train(model, optimizer, x, y, 10)
    structure = structures(model)["0"]
    with torch.no_grad():
        for s in structures(model).values():
            s.tau.fill_(0.05)
            s.alpha.copy_(s.alpha.new_tensor([2.0, 0.3]))  # 8 and 1 of the 6 that each holds or so
    before, held = model(x), dict(zip(zip(*places(structure), strict=True), structure.A.tolist(), strict=True))
    moments, old = optimizer.state[structure.B]["exp_avg"].clone(), list(zip(*places(structure), strict=True))
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    controller._round(2)
    assert structure.rows() == [8, 3]
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    now = list(zip(*places(structure), strict=True))
    assert now == sorted(now)
    for i, place in enumerate(now):
        if place in held:  # untouched rows and their moments are the same bits
            assert structure.A[i].tolist() == held[place]
            assert torch.equal(optimizer.state[structure.B]["exp_avg"][:, i], moments[:, old.index(place)])
        else:
            assert not structure.B[:, i].any() and not optimizer.state[structure.B]["exp_avg"][:, i].any()
            assert (optimizer.state[structure.B]["exp_avg_sq"][:, i] > 0).all()
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == parameters
    train(model, optimizer, x, y, 3)


def places(structure):
    return structure.heads.tolist(), structure.index.tolist()


def test_parameters_and_moments_shrink_as_the_ranks_say():
    model, recipe, x, y = toy(penalty=0.9, interval=5)
    optimizer, controller, handle = attached(model, recipe, 60)
    train(model, optimizer, x, y, 60)
    want = model(x)
    handle.finish()
    assert torch.equal(model(x), want)
    for name, s in structures(model).items():
        total = sum(controller.ranks()[name])
        assert s.A.numel() + s.B.numel() == total * s.rank_cost
        for p in (s.A, s.B):
            assert p.grad.shape == p.shape == optimizer.state[p]["exp_avg"].shape
    assert compact(model, optimizer) == {name: sum(own) for name, own in controller.ranks().items()}


def test_every_rank_held_learns():
    """Dead growth: behind a hard or straight-through gate a new rank gets no gradient, and with B = 0 alpha neither."""
    model, recipe, x, y = toy(warmup=2, final=5)
    optimizer, _, _ = attached(model, recipe, 40)
    train(model, optimizer, x, y, 3)
    for s in structures(model).values():
        assert max(s.rows()) > 4
        assert (s.B.grad.norm(dim=0) > 0).all() and (s.alpha.grad != 0).all()
        s.hard.fill_(True)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    for s in structures(model).values():
        closed = s.index >= 4
        assert closed.any() and not s.B.grad[:, closed].any() and not s.alpha.grad.any()


def test_equal_heads_stay_equal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    with torch.no_grad():
        model[0].weight[3:] = model[0].weight[:3]
    x, y = torch.randn(32, 8, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64).repeat(1, 2)
    recipe = st.ardlora(rank=2, heads=2, warmup=2, interval=1000)
    st.adapt(model, recipe, ["0"])
    structure = structures(model)["0"]
    with torch.no_grad():
        structure.A[2:] = structure.A[:2]
    optimizer, _, _ = attached(model, recipe, 1000)
    train(model, optimizer, x, y, 2)
    with torch.no_grad():  # the ranks added now, which start in other directions in every head
        structure.A[4:] = structure.A[:4]
    train(model, optimizer, x, y, 20)
    a, b = structure.alpha.tolist()
    assert a == pytest.approx(b, abs=1e-12) and abs(a - 1) > 0.01


def test_masked_keeps_shapes_until_the_end():
    model, recipe, x, y = toy(masked=True, rows=6, penalty=0.7, interval=3)
    shapes = {n: p.shape for n, p in st.trainable_parameters(model)}
    optimizer, controller, handle = attached(model, recipe, 40)
    train(model, optimizer, x, y, 40)
    assert {n: p.shape for n, p in st.trainable_parameters(model)} == shapes
    assert all(own <= 6 for ranks in controller.ranks().values() for own in ranks)
    want = model(x)
    handle.finish()
    torch.testing.assert_close(model(x), want, rtol=1e-6, atol=1e-6)
    assert {n: s.rows() for n, s in structures(model).items()} == controller.ranks()
    assert sum(p.numel() for _, p in st.trainable_parameters(model)) < sum(s.numel() for s in shapes.values())


def test_stopped_early_leaves_soft_gates_alone():
    model, recipe, x, y = toy()
    optimizer, _, handle = attached(model, recipe, 100)
    train(model, optimizer, x, y, 50)
    want = model(x)
    handle.finish()
    assert torch.equal(model(x), want)


# ---------------------------------------------------------------- budgets


def test_fill_ranks():
    assert fill_ranks([2.6, 1.2, 3.0], [10, 10, 10], 60) == [2, 1, 3]
    assert fill_ranks([2.6, 1.2, 3.0], [10, 10, 10], 60, most=[2, 2, 2]) == [2, 2, 2]
    assert fill_ranks([0.0, 5.0], [1, 1], 4, least=1) == [1, 3]
    assert fill_ranks([1.0, 1.0, 1.0], [1, 1, 1], 4) == [2, 1, 1]  # ties: the earlier one
    assert fill_ranks([3.0, 1.0], [7, 2], 20) == [2, 3]  # what does not fit leaves its place to what does


@pytest.mark.parametrize("budget", [1.0, 0.5, 300, 1.7])
def test_budget_is_kept_and_used_up(budget):
    model, recipe, x, y = toy(budget=budget, heads={"0": 2, "2": 1}, interval=4)
    start = sum(p.numel() for n, p in st.trainable_parameters(model) if "alpha" not in n)
    most = budget if isinstance(budget, int) else int(budget * start)
    optimizer, controller, handle = attached(model, recipe, 60)
    train(model, optimizer, x, y, 60)
    handle.finish()
    used = sum(p.numel() for n, p in st.trainable_parameters(model) if "alpha" not in n)
    assert most - 32 < used <= most  # 32: the dearer rank
    assert {n: s.rows() for n, s in structures(model).items()} == controller.ranks()


def test_dual_ascent_presses_towards_the_budget():
    model, recipe, x, y = toy(budget=0.3, interval=1000)
    optimizer, controller, _ = attached(model, recipe, 200, lr=1e-3)
    used = []
    for t in range(160):
        train(model, optimizer, x, y, 1)
        used.append(sum(4 * s.alpha.sum().item() * s.rank_cost for s in structures(model).values()))
        assert controller.penalty >= (0.1 if t < 20 else 0)
    assert controller.penalty > 1 and used[-1] < 0.6 * used[0]


# ---------------------------------------------------------------- heads of a model


def test_heads_of_a_model_with_grouped_queries():
    model = tiny_llama()
    st.adapt(model, st.ardlora(rank=2, alpha=4))
    found = {n.rpartition(".")[2]: (s.head_count, s.side) for n, s in structures(model).items()}
    assert found == {
        "q_proj": (4, "output"),
        "k_proj": (2, "output"),
        "v_proj": (2, "output"),
        "o_proj": (4, "input"),
        "gate_proj": (1, "output"),
        "up_proj": (1, "output"),
        "down_proj": (1, "output"),
    }
    assert {float(h.adapters["default"].scale) for h in hosts(model).values()} == {2.0}


def _bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 12, "intermediate_size": 18, "num_attention_heads": 3, "num_hidden_layers": 1}
    return BertModel(BertConfig(vocab_size=11, **sizes))


def _gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=11, n_embd=12, n_head=3, n_layer=1))


def _t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=11, d_model=8, d_kv=4, num_heads=3, d_ff=12, num_layers=1))


def _distilbert():
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(DistilBertConfig(vocab_size=11, dim=12, n_heads=3, hidden_dim=18, n_layers=1))


@pytest.mark.parametrize(
    ("make", "outputs", "inputs"),
    [
        (_bert, {"query", "key", "value"}, {"attention.output.dense"}),
        (_gpt2, set(), {"attn.c_proj"}),  # c_attn holds three projections at once
        (_t5, {"q", "k", "v"}, {"o"}),
        (_distilbert, {"q_lin", "k_lin", "v_lin"}, {"out_lin"}),
    ],
    ids=["bert", "gpt2", "t5", "distilbert"],
)
def test_heads_of_other_models(make, outputs, inputs):
    model = make()
    st.adapt(model, st.ardlora(rank=2))
    for name, s in structures(model).items():
        side = next(
            (side for own, side in ((outputs, "output"), (inputs, "input")) for n in own if ends(name, n)), None
        )
        assert (s.head_count, s.side) == ((3, side) if side else (1, "output")), name


def ends(name, end):
    return f".{name}".endswith(f".{end}")


def test_heads_one_by_one():
    model = tiny_llama()
    st.adapt(model, st.ardlora(heads={"q_proj": 2, "down_proj": [3, "input"]}, rank_pattern={"q_proj": 5}))
    found = {n: (s.head_count, s.side, s.base_rank) for n, s in structures(model).items() if "layers.1" in n}
    assert found["model.layers.1.self_attn.q_proj"] == (2, "output", 5)
    assert found["model.layers.1.mlp.down_proj"] == (3, "input", 8)
    assert found["model.layers.1.self_attn.k_proj"] == (2, "output", 8)


def test_refusals_name_what_would_do():
    model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(st.StructureError, match=r"0: .*4 heads do not divide .* 1, 2, 3, 6 for 6 outputs$"):
        st.adapt(model, st.ardlora(heads={"0": [4, "output"]}), ["0"])
    with pytest.raises(st.StructureError, match=r"5 heads .* 6 outputs or 1, 2, 4, 8 for 8 inputs"):
        st.adapt(model, st.ardlora(heads=5), ["0"])
    with pytest.raises(st.StructureError, match="side must be one of"):
        st.adapt(model, st.ardlora(heads={"0": [2, "left"]}), ["0"])
    for options, words in (
        ({"rank": 0}, "rank must be a whole number"),
        ({"heads": {"q": "2"}}, "heads of 'q' must be a whole number"),
        ({"heads": 1.5}, "heads must be 'auto'"),
        ({"penalty": -1.0}, "penalty must be a number of at least 0"),
        ({"travel": 0}, "travel must be"),
        ({"over": "space"}, "over must be 'time' or 'depth'"),
        ({"warmup": 1.5}, "warmup must be"),
        ({"final": "x"}, "final must be"),
        ({"interval": 0}, "interval must be"),
        ({"least": -1}, "least must be"),
        ({"least": 3, "most": 2}, "most must be"),
        ({"budget": 0}, "budget must be"),
        ({"masked": 1}, "masked must be true or false"),
        ({"alpha": 0}, "alpha must not be 0"),
    ):
        with pytest.raises(st.StructureError, match=words):
            st.ardlora(**options)
    with pytest.raises(st.StructureError, match="leave none of 20 steps"):
        st.ARD(total_steps=20, warmup=10, final=10)
    for rows, words in (([1], "one for each of 2 heads"), ([0, 0], "not all be 0"), ([1, -1], "rows must be")):
        with pytest.raises(st.StructureError, match=words):
            st.GatedHeads(6, 8, heads=2, rows=rows)


def test_attach_refuses():
    model, recipe, _, _ = toy()
    (controller,) = st.controllers_of(recipe, 10)
    with pytest.raises(st.SlimtuneError, match="optimizer that holds"):
        st.attach(controller, model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    optimizer = torch.optim.SGD(st.param_groups(model), lr=0.1)
    with pytest.raises(st.SlimtuneError, match="no adapter called 'x'"):
        st.attach(st.ARD(total_steps=10, adapter="x"), model, optimizer)
    with pytest.raises(st.StructureError, match="budget of 10 parameters is below the 112 of rank 1"):
        st.attach(st.ARD(total_steps=10, budget=10), model, optimizer)


def test_factors_of_another_optimizer_are_refused_where_their_shapes_change():
    model, recipe, x, y = toy()
    gates = [s.alpha for s in structures(model).values()]
    factors = [p for s in structures(model).values() for p in (s.A, s.B)]
    one, other = torch.optim.SGD(gates, lr=0.01), torch.optim.AdamW(factors, lr=0.01)
    with pytest.raises(st.SlimtuneError, match="holds the gates, but not A and B"):
        st.attach(*st.controllers_of(recipe, 20), model, one)
    recipe = st.ardlora(rank=4, heads=2, penalty=3.0, masked=True)
    st.attach(*st.controllers_of(recipe, 20), model, one)
    for _ in range(20):
        (model(x) - y).square().mean().backward()
        for optimizer in (one, other):
            optimizer.step()
            optimizer.zero_grad()
    assert all(s.rank == 8 and sum(s.hard_ranks()) < 8 for s in structures(model).values())


@pytest.mark.parametrize("controller", [st.ARD(total_steps=20), st.LoRAPro()], ids=lambda c: type(c).__name__)
def test_a_learning_rate_is_asked_for(controller):
    """Adafactor that finds its own has None."""
    model, *_ = toy()
    if isinstance(controller, st.LoRAPro):
        st.adapt(model, st.lora(rank=2), name="second")
    optimizer = torch.optim.SGD(st.param_groups(model), lr=0.1)
    for group in optimizer.param_groups:
        group["lr"] = None
    with pytest.raises(st.SlimtuneError, match=f"{type(controller).__name__}: it needs the optimizer's learning rate"):
        st.attach(controller, model, optimizer)


def test_two_adapters_on_one_layer_need_a_name():
    model, recipe, _, _ = toy()
    st.adapt(model, recipe, name="second")
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(st.SlimtuneError, match="0: several adapters train there"):
        st.attach(*st.controllers_of(recipe, 20), model, optimizer)
    controller = st.ARD(total_steps=20, adapter="second")
    st.attach(controller, model, optimizer)
    second = {model[i].adapters["second"].structure for i in (0, 2)}
    assert set(controller._structures.values()) == second


@pytest.mark.parametrize("budget", [None, 1.0])
def test_gates_that_are_not_finite_are_named(budget):
    model, recipe, x, y = toy(budget=budget)
    optimizer, _, _ = attached(model, recipe, 20)
    train(model, optimizer, x, y, 5)
    with torch.no_grad():
        structures(model)["0"].alpha[1] = math.nan
    with pytest.raises(st.DivergenceError, match="ARD: 0: a gate is not finite"):
        train(model, optimizer, x, y, 15)


def test_a_budget_of_one_is_what_there_is(monkeypatch):
    """In fp32 it would come to 272,000,000 or 272,000,032."""
    monkeypatch.setattr(st.GatedHeads, "rank_cost", 17_000_001)
    model, recipe, _, _ = toy(budget=1.0)
    _, controller, _ = attached(model, recipe, 20)
    assert controller.budget == 2 * 2 * 4 * 17_000_001


# ---------------------------------------------------------------- going on, and several micro-batches


@pytest.mark.parametrize("cut", [1, 2, 5, 6, 7, 20, 24, 25, 28])
@pytest.mark.parametrize("options", [{}, {"budget": 1.0}, {"over": "depth", "masked": True, "rows": 6}], ids=str)
def test_resume_is_exact(cut, options, tmp_path):
    """Before, at and after rounds and the edges of the phases."""
    options = {"warmup": 2, "final": 5, "interval": 5, **options}
    straight, recipe, x, y = toy(**options)
    base = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    base.load_state_dict({k: t for k, t in straight.state_dict().items() if "adapters" not in k})
    optimizer, controller, handle = attached(straight, recipe, 30)
    train(straight, optimizer, x, y, cut)
    st.save(straight, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    kept = json.loads(json.dumps(controller.state_dict()))
    train(straight, optimizer, x, y, 30 - cut)
    handle.finish()

    st.load(base, tmp_path)
    again = torch.optim.AdamW(st.param_groups(base, lr=1e-2))
    again.load_state_dict(state)
    (other,) = st.controllers_of(recipe, 30)
    other.load_state_dict(kept)
    handle = st.attach(other, base, again)
    train(base, again, x, y, 30 - cut)
    handle.finish()
    assert other.state_dict() == controller.state_dict()
    for (n, p), (m, q) in zip(st.trainable_parameters(straight), st.trainable_parameters(base), strict=True):
        assert n == m and torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], again.state[q]["exp_avg_sq"])
    assert torch.equal(straight(x), base(x))


def test_micro_batches_are_one_step():
    runs = []
    for parts in (1, 4):
        model, recipe, x, y = toy(torch.float64, interval=3)
        optimizer, controller, handle = attached(model, recipe, 40)
        train(model, optimizer, x, y, 40, parts)
        handle.finish()
        runs.append((controller.ranks(), {n: p.detach() for n, p in st.trainable_parameters(model)}))
    assert runs[0][0] == runs[1][0] != {"0": [4, 4], "2": [4, 4]}
    for name, p in runs[0][1].items():
        torch.testing.assert_close(p, runs[1][1][name], rtol=0, atol=1e-10)


def test_uneven_ranks_are_saved(tmp_path):
    model, recipe, x, y = toy(penalty=0.5, interval=2)
    optimizer, _, _ = attached(model, recipe, 40)
    train(model, optimizer, x, y, 25)
    with torch.no_grad():
        structures(model)["0"].alpha[0] = 0.5
    train(model, optimizer, x, y, 4)
    rows = structures(model)["0"].rows()
    assert rows[0] != rows[1]
    base = copy.deepcopy(model)
    st.remove(base, "default")
    st.save(model, tmp_path)
    st.load(base, tmp_path)
    assert structures(base)["0"].rows() == rows and torch.equal(base(x), model(x))
