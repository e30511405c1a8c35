"""Weights replaced by structures: exact at full rank, as good as Eckart and Young allow below, and back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import slimtune as st
from cases import Chain
from slimtune.compress import describe_structures, part_of, shape_as, structured_layers
from slimtune.errors import DivergenceError, FileFormatError, SlimtuneError, StructureError, TargetError

CONVOLUTIONS = {
    "plain": nn.Conv2d(6, 10, 3),
    "strided": nn.Conv2d(6, 10, (3, 5), stride=2, padding=(1, 2)),
    "dilated": nn.Conv2d(6, 10, (3, 5), padding=(1, 2), dilation=(2, 1), bias=False),
    "same": nn.Conv2d(6, 10, (2, 3), padding="same"),
    "circular": nn.Conv2d(6, 10, 3, padding=(1, 2), padding_mode="circular"),
    "grouped": nn.Conv2d(6, 10, 3, stride=(1, 2), groups=2),
    "pointwise": nn.Conv2d(6, 10, 1, stride=2),
    "1d": nn.Conv1d(6, 10, 3, padding=1),
}


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_at_full_rank_is_itself(kind, form):
    layer = copy.deepcopy(CONVOLUTIONS[kind]).double()
    model = nn.Sequential(layer)
    x = torch.randn(2, 6, 13, 14, dtype=torch.float64) if kind != "1d" else torch.randn(2, 6, 13, dtype=torch.float64)
    before = model(x)
    st.factorize(model, {"0": 200}, st.factors.svd(form=form), guard=False)
    assert (model(x) - before).abs().max() < 1e-12
    assert st.expand(model) == ["0"] and type(model[0]) is type(CONVOLUTIONS[kind])
    assert (model(x) - before).abs().max() < 1e-12


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("split", ["balanced", "left"])
def test_the_error_is_that_of_eckart_and_young(form, split):
    layer = nn.Conv2d(6, 10, 3).double()
    M = layer.weight.detach()
    M = M.flatten(1) if form == "channel" else M.permute(1, 2, 0, 3).reshape(18, 30)
    s = torch.linalg.svdvals(M)
    report = st.factorize(nn.Sequential(layer), {"0": 4}, st.factors.svd(split=split, form=form))
    assert report.layers[0].error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-10)
    A, B = layer.structure.A, layer.structure.B
    if split == "balanced":
        least = float(s[:4].sum())
        assert float(A.square().sum() + B.square().sum()) / 2 == pytest.approx(least, rel=1e-10)


def test_a_layer_that_would_not_shrink_stays_dense():
    model = nn.Sequential(nn.Linear(12, 12), nn.Conv2d(4, 4, 3))
    assert st.factorize(model, {"0": 6, "1": 4}).layers[0].kept  # 6 (12 + 12) = 12 * 12
    assert not st.factorize(model, {"0": 5}).layers[0].kept
    assert type(model[1]) is nn.Conv2d  # 4 (36 + 4) > 144


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_moments_go_through_the_switch(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    made = {"sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "adamw": torch.optim.AdamW}[optimizer]
    opt = made(model.parameters())
    x = torch.randn(20, 9, dtype=torch.float64)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    weight = model[0].weight
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in opt.state[weight].items()}
    grad = weight.grad.clone()
    st.factorize(model, {"0": 2}, optimizer=opt)
    A, B = model[0].structure.A, model[0].structure.B
    held = [p for g in opt.param_groups for p in g["params"]]
    assert len({id(p) for p in held}) == len(held) == len(list(model.parameters()))
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and weight not in opt.state
    key = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    torch.testing.assert_close(opt.state[A][key], B.detach().T @ state[key])
    torch.testing.assert_close(opt.state[B][key], state[key] @ A.detach().T)
    torch.testing.assert_close(A.grad, B.detach().T @ grad)
    if optimizer == "adamw":
        torch.testing.assert_close(opt.state[A]["exp_avg_sq"], B.detach().T.square() @ state["exp_avg_sq"])
        assert opt.state[B]["step"] == state["step"]
    opt.step()


def test_optimizers_that_cannot_follow():
    model = nn.Sequential(nn.Linear(9, 7))
    with pytest.raises(SlimtuneError, match="LBFGS"):
        st.factorize(model, {"0": 2}, optimizer=torch.optim.LBFGS(model.parameters()))
    assert type(model[0]) is nn.Linear


def test_the_mean_of_centred_rmsprop_stays_below_that_of_squares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7))
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-4, centered=True)
    x = torch.randn(20, 9)
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - x[:, :7]).square().mean().backward()
        optimizer.step()
    st.factorize(model, {"0": 3}, optimizer=optimizer)
    for p in model[0].structure.parameters():
        state = optimizer.state[p]
        assert (state["square_avg"] >= state["grad_avg"].square()).all() and state["square_avg"].any()


def test_a_description_remakes_the_shape():
    torch.manual_seed(0)
    model, ids = Chain(), Chain.ids()
    st.factorize(model, {"up": 2, "hf": 2, "conv": 1}, guard=False)
    other = Chain()
    shape_as(other, describe_structures(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(ids), model(ids))
    st.adapt(model, st.lora(rank=2), ["up", "conv"])
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), model(ids))


def test_refusals_change_nothing():
    model = Chain()
    model.classifier.weight = nn.Parameter(torch.randn(4, 8))
    twin = nn.Linear(8, 12)
    twin.weight = model.up.weight
    model.twin = twin
    before = set(model.state_dict())
    for ranks, error, words in (
        ({"down": 2, "up": 2}, TargetError, "shares its weight with twin"),
        ({"down": 2, "gone": 2}, TargetError, "no layer 'gone'"),
        ({"down": 2, "embed": 2}, TargetError, "only Linear"),
        ({"down": 2, "hf": 0}, StructureError, "whole number"),
    ):
        with pytest.raises(error, match=words):
            st.factorize(model, ranks)
        assert set(model.state_dict()) == before
    st.adapt(model, st.lora(rank=2), ["down"])
    with pytest.raises(TargetError, match="carries adapters"):
        st.factorize(model, {"down": 2})
    with pytest.raises(TargetError, match="holds no structure"):
        st.expand(model, ["up"])
    with pytest.raises(SlimtuneError, match="torch optimizer"):
        st.factorize(model, {"hf": 2}, optimizer=model)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"structure": "nn.Linear", "options": {}, "bias": True},
        {"structure": "LowRank", "options": {"rank": -1}, "bias": True},
        {"structure": "LowRank", "options": {"rank": 1, "strange": 1}, "bias": True},
        {"structure": "LowRank", "options": {"rank": 1}, "bias": "yes"},
        {"structure": ["LowRank"], "options": {"rank": 1}, "bias": True},
    ],
)
def test_a_bad_description_is_refused(entry):
    model = Chain()
    good = {"structure": "LowRank", "options": {"rank": 1}, "bias": True}
    with pytest.raises(FileFormatError, match="up"):
        shape_as(model, {"down": good | {"bias": False}, "up": entry})
    assert type(model.down) is nn.Linear


def test_parts_are_fp32_and_oriented():
    model = Chain(torch.bfloat16)
    part = part_of(model.hf, "hf")
    assert part.W.dtype == torch.float32
    torch.testing.assert_close(part.W, model.hf.weight.detach().t().float())
    st.factorize(model, {"hf": 2})
    assert model.hf.structure.A.dtype == torch.bfloat16


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_told(number):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight.data[2, 3] = number
    with pytest.raises(DivergenceError, match="'1'"):
        st.factorize(model, {"0": 2, "1": 2})
    with pytest.raises(DivergenceError, match="'1'"):
        st.allocate.prices(model)
    assert not structured_layers(model)


def test_expanding_a_layer_named_twice_gives_the_order_of_parameters_back():
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv1d(4, 4, 3))
    before = list(model.state_dict())
    st.factorize(model, {"0": 2, "1": 1})
    assert st.expand(model, ["0", "1", "0"]) == ["0", "1"]
    assert list(model.state_dict()) == before


def test_an_optimizer_that_knows_names_knows_the_new_ones():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    st.factorize(model, {"0": 2}, optimizer=optimizer)
    named = dict(model.named_parameters())
    (group,) = optimizer.param_groups
    assert [id(named[name]) for name in group["param_names"]] == [id(p) for p in group["params"]]
