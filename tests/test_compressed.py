"""Models of structures: adapters merged into them, and their files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import slimtune as st
from cases import LAYERS, METHODS, Chain, adapted, shake
from slimtune.structured import Structured

HELD = [layer for layer in LAYERS if layer.id.startswith("structured")]


# ---------------------------------------------------------------- adapters on layers that hold structures


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.id)
@pytest.mark.parametrize("layer", HELD, ids=lambda x: x.id)
def test_merging_into_a_structure(method, layer):
    """Outputs of before; while merged for a while, everything comes back bit for bit and in its order."""
    model, x = adapted(method, layer)
    with torch.no_grad():
        y = model(x)
        before = {k: t.clone() for k, t in model.state_dict().items()}
        cls = type(model.layer)
        with st.merged(model) as report:
            torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
            assert report.layers[0].delta_norm > 0 and report.layers[0].share < 1e-12
        assert type(model.layer) is cls and [*model.state_dict()] == [*before]
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
        assert torch.equal(model(x), y)
        report = st.merge(model)
        torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    assert isinstance(model.layer, Structured) != bool(report.densified)
    assert not any("adapters" in key for key in model.state_dict())


def test_factors_are_joined_while_that_is_smaller_than_the_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).double()
    st.factorize(model, {"0": 4, "2": 9})
    st.adapt(model, st.lora(rank=3), ["0", "2"])
    shake(model)
    x = torch.randn(5, 24, dtype=torch.float64)
    y = model(x)
    report = st.merge(model)
    assert report.densified == ["2"] and "dense now: 2" in str(report)  # 12 (24 + 24) = 24 * 24
    assert model[0].structure.rank == 7 and type(model[2]) is nn.Linear
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_a_forward_never_builds_the_weight(monkeypatch):
    model = Chain()
    st.factorize(model, {"up": 2, "down": 2, "hf": 2, "conv": 1}, guard=False)
    st.adapt(model, st.lora(rank=2), ["up", "down", "hf", "conv"])
    shake(model)

    def built(*_):
        raise AssertionError("the weight was built")

    monkeypatch.setattr(Structured, "weight", property(built))
    monkeypatch.setattr(st.LowRank, "dense", built)
    model(Chain.ids()).sum().backward()
    assert all(p.grad is not None for _, p in st.trainable_parameters(model))


def test_one_graph_and_copies():
    torch.manual_seed(0)
    model, ids = Chain().eval(), Chain.ids()
    st.factorize(model, {"up": 2, "down": 2, "hf": 2, "conv": 1}, guard=False)
    st.adapt(model, st.lora(rank=2), ["up", "conv"])
    shake(model)
    y = model(ids)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), y)


def test_conversion_of_an_adapter_on_structures(tmp_path):
    """Folders tell the sizes of their layers as for layers with weights: no base is needed."""
    torch.manual_seed(0)
    model, ids = Chain().eval(), Chain.ids()
    st.factorize(model, {"up": 2, "hf": 2, "conv": 1}, guard=False)
    bare = copy.deepcopy(model)
    st.adapt(model, st.loha(rank=2), ["up", "hf", "conv"])
    shake(model)
    st.save(model, tmp_path / "loha")
    report = st.convert(tmp_path / "loha", tmp_path / "lora")
    assert report.base is None
    st.load(bare, tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(bare(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert {row.name for row in st.summary(bare).rows} == {"up", "hf", "conv"}
    other = Chain()
    st.factorize(other, {"up": 2, "hf": 2, "conv": 1}, guard=False)
    with pytest.warns(UserWarning, match="other base weights"):
        st.load(other, tmp_path / "loha")
