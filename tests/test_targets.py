"""Choosing layers, and what a wrong choice gets."""

import pytest
import torch
from torch import nn

import slimtune as st
from cases import Chain, tiny_llama
from slimtune.targets import select


def test_all_linear_leaves_the_head_out():
    names = select(tiny_llama())
    assert len(names) == 14 and not any("lm_head" in n or "embed" in n for n in names)
    assert select(Chain()) == ["up", "down", "hf"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], 2),
        (["model.layers.0.self_attn.q_proj"], 1),
        (["layers.1.*.?_proj"], 4),
        (r"\.(q|k)_proj$", 4),
        (["q_proj", "*.mlp.*"], 8),
        (["lm_head"], 1),
    ],
)
def test_forms_of_targets(targets, expected):
    assert len(select(tiny_llama(), targets)) == expected


def test_exclude():
    assert len(select(tiny_llama(), exclude=["mlp"])) == 8
    assert len(select(tiny_llama(), exclude=r"layers\.0\.")) == 7
    with pytest.raises(st.TargetError, match="leaves nothing"):
        select(tiny_llama(), ["q_proj"], exclude=["self_attn"])
    with pytest.raises(st.TargetError, match="exclude: 'qproj' matches nothing; nearest: "):
        select(tiny_llama(), exclude=["qproj"])


def test_no_match_lists_the_five_nearest():
    with pytest.raises(st.TargetError, match="targets: 'qproj' matches nothing; nearest: ") as e:
        select(tiny_llama(), ["v_proj", "qproj"])
    near = str(e.value).split("nearest: ")[1].split(", ")
    assert len(near) == 5 and near[0].endswith("q_proj")
    with pytest.raises(st.TargetError, match="'Q_PROJ' matches nothing"):
        select(tiny_llama(), "Q_PROJ")
    with pytest.raises(st.TargetError, match="not a regular expression"):
        select(tiny_llama(), "(")
    with pytest.raises(st.TargetError, match="no linear layer apart"):
        st.adapt(nn.Sequential(nn.ReLU()), st.lora())


def test_layers_that_cannot_be_adapted_are_named():
    with pytest.raises(st.TargetError, match=r"'model.norm' \(LlamaRMSNorm\) cannot be adapted: adapters fit Linear"):
        st.adapt(tiny_llama(), st.lora(), ["model.norm"])
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(st.TargetError, match="reads its weight without calling it"):
        st.adapt(attention, st.lora(), ["out_proj"])
    with pytest.raises(st.TargetError, match="no linear layer"):
        st.adapt(attention, st.lora())
    with pytest.raises(st.TargetError, match="max_norm"):
        st.adapt(nn.Sequential(nn.Embedding(3, 4, max_norm=1.0)), st.lora(), ["0"])

    class Doubled(nn.Embedding):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(st.TargetError, match="not a plain look-up"):
        st.adapt(nn.Sequential(Doubled(3, 4)), st.lora(), ["0"])


def test_torch_encoder_fast_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    with pytest.raises(st.TargetError, match="set_fastpath_enabled"):
        st.adapt(model, st.lora(), ["linear1"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        st.adapt(model, st.lora(), ["linear1"])
        with torch.no_grad():
            x = torch.randn(1, 3, 8)
            before = model(x)
            model.layers[0].linear1.adapters["default"].structure.B.normal_()
            assert not torch.equal(model(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_embed_scale_is_followed():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    model = nn.Sequential(Scaled(5, 4)).double()
    ids = torch.tensor([0, 3, 4])
    st.adapt(model, st.dora(rank=2), ["0"])
    with torch.no_grad():
        model[0].adapters["default"].structure.B.normal_()
    y = model(ids)
    with st.merged(model):
        torch.testing.assert_close(model(ids), y)


def test_linear_subclasses_keep_their_forward():
    class Packed(nn.Linear):
        """A stand-in for a quantised layer: integers and a step, unpacked in its own forward."""

        def __init__(self, o, i):
            super().__init__(i, o)
            step = self.weight.abs().max() / 127
            packed = (self.weight / step).round().to(torch.int8)
            del self.weight
            self.register_buffer("weight", packed)
            self.register_buffer("step", step.detach())

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)

    for recipe in (st.lora(rank=2), st.dora(rank=2)):
        torch.manual_seed(0)
        model = nn.Sequential(Packed(5, 6))
        plain = nn.Sequential(nn.Linear(6, 5))
        plain[0].load_state_dict({"weight": model[0].weight * model[0].step, "bias": model[0].bias})
        x = torch.randn(3, 6)
        before = model(x)
        st.adapt(model, recipe, ["0"])
        assert torch.allclose(model(x), before, atol=1e-6)
        st.adapt(plain, recipe, ["0"])
        plain[0].adapters.load_state_dict(model[0].adapters.state_dict())
        for m in (model, plain):
            with torch.no_grad():
                m[0].adapters["default"].structure.B.fill_(0.3)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)
        with pytest.raises(st.TargetError, match="packed"):
            st.merge(model)


def test_an_unfrozen_base_still_gets_its_gradient():
    model = nn.Sequential(nn.Linear(4, 4))
    st.adapt(model, st.lora(rank=2), ["0"])
    model[0].weight.requires_grad_(True)
    model(torch.randn(2, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_failed_adapt_changes_nothing():
    model = tiny_llama()
    kinds = [type(m) for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    for recipe, targets in ((st.Recipe(st.LowRank, {"rank": -1}), ["q_proj"]), (st.lora(), ["q_proj", "norm"])):
        with pytest.raises(st.SlimtuneError):
            st.adapt(model, recipe, targets)
    with pytest.raises(st.TargetError, match="modules_to_save: 'nope' matches nothing"):
        st.adapt(model, st.lora(), modules_to_save=["nope"])
    with pytest.raises(st.TargetError, match="lie wholly inside modules_to_save"):
        st.adapt(model, st.lora(), ["lm_head"], modules_to_save=["lm_head"])
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == wants


def test_recipes_refuse_bad_options():
    with pytest.raises(st.StructureError, match="dropout must be a number in"):
        st.lora(dropout=1.0)
    with pytest.raises(st.StructureError, match="no option 'ranks'; it has rank, rank_dropout"):
        st.Recipe(st.LowRank, {"ranks": 3})
    with pytest.raises(st.StructureError, match="override 'up': LowRank has no option 'r'"):
        st.Recipe(st.LowRank, overrides={"up": {"r": 3}})
    with pytest.raises(st.StructureError, match="unknown structure"):
        st.Recipe.from_dict({"structure": "Nope"})


@pytest.mark.parametrize("recipe", [st.lora, st.rslora, st.dora])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "8"}, "lora: rank must be a whole number of at least 1, got '8'"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be a whole number of at least 1, got 2.0"),
        ({"rank": True}, "rank must be a whole number of at least 1, got True"),
        ({"rank_pattern": {"up": "4"}}, "rank of 'up' must be a whole number of at least 1, got '4'"),
        ({"rank_pattern": [4]}, r"rank_pattern must be a table \{name: value\}, got \[4\]"),
        ({"alpha_pattern": "up"}, "alpha_pattern must be a table"),
        ({"alpha": 0}, "alpha must not be 0"),
    ],
)
def test_ranks_and_alphas_that_cannot_be(recipe, options, message):
    with pytest.raises(st.StructureError, match=message):
        recipe(**options)


def test_activate_checks_names():
    model = Chain()
    st.adapt(model, st.lora())
    with pytest.raises(st.AdapterNameError, match="no adapter named 'b'; attached: default"):
        st.activate(model, ["default", "b"])
    with pytest.raises(st.AdapterNameError, match="comes twice"):
        st.activate(model, ["default", "default"])
    with pytest.raises(st.AdapterNameError, match="no adapter named 'b'"):
        st.remove(model, "b")
