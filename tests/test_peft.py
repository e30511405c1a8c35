"""Parity with PEFT 0.21.2: its files here, ours there, outputs and gradients."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import slimtune as st
from cases import METHODS, Chain, shake, tiny_llama

peft = pytest.importorskip("peft")
KNOWN = pytest.mark.parametrize("method", [m for m in METHODS if m.peft], ids=lambda m: m.id)


def peft_chain(**fields):
    torch.manual_seed(0)
    base = Chain().eval()
    config = peft.LoraConfig(target_modules=list(Chain.targets), modules_to_save=["classifier"], **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return base, theirs


PATTERNS = [
    {},
    {"rank_pattern": {"up": 5, "conv": 2}, "alpha_pattern": {"down": 9, "embed": 1}},
    {"rank_pattern": {"^(up|down)$": 4}, "alpha_pattern": {".*f": 3}},
]


@KNOWN
@pytest.mark.parametrize("patterns", PATTERNS, ids=["uniform", "patterns", "regex"])
def test_their_files_load_here(method, patterns, tmp_path):
    base, theirs = peft_chain(**method.peft, **patterns)
    theirs.save_pretrained(tmp_path)
    ids = Chain.ids()
    assert sorted(st.load(base, tmp_path)) == sorted(Chain.targets)
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(ids), theirs(ids), rtol=1e-6, atol=1e-6)
        assert (theirs(ids) - theirs.base_model.model(ids)).abs().max() == 0
        with st.disabled(base), theirs.disable_adapter():
            torch.testing.assert_close(base(ids), theirs(ids), rtol=1e-6, atol=1e-6)


@KNOWN
@pytest.mark.parametrize("patterns", PATTERNS[:2], ids=["uniform", "patterns"])
def test_our_files_load_there(method, patterns, tmp_path):
    torch.manual_seed(0)
    base = Chain().eval()
    model = copy.deepcopy(base)
    st.adapt(model, method.recipe(**patterns), Chain.targets, modules_to_save=["classifier"])
    shake(model)
    st.export_peft(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    ids = Chain.ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids), rtol=1e-6, atol=1e-6)


@KNOWN
def test_gradients_equal_theirs(method, tmp_path):
    base, theirs = peft_chain(**method.peft)
    theirs.save_pretrained(tmp_path)
    st.import_peft(base, tmp_path)
    ids = Chain.ids()
    base.eval()(ids).square().sum().backward()
    theirs(ids).square().sum().backward()
    names = {"structure.A": "lora_A.default.weight", "structure.B": "lora_B.default.weight"}
    for layer in ("up", "down", "hf", "conv"):
        own = base.get_submodule(layer).adapters["default"]
        other = theirs.base_model.model.get_submodule(layer)
        for ours, column in names.items():
            a, b = own.get_parameter(ours).grad, other.get_parameter(column).grad
            torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-5, atol=1e-4)
        if "use_dora" in method.peft:
            m = other.lora_magnitude_vector["default"].weight.grad
            torch.testing.assert_close(own.composition.magnitude.grad, m.reshape(-1), rtol=1e-5, atol=1e-4)


@KNOWN
def test_llama_both_ways(method, tmp_path):
    """A transformers model, targets by suffix and "all-linear", bf16 adapters of a bf16 base included."""
    base = tiny_llama()
    ids = torch.randint(0, 31, (2, 6))
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **method.peft)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    ours = copy.deepcopy(base)
    chosen = st.adapt(ours, method.recipe())
    assert sorted(chosen) == sorted(n.removeprefix("base_model.model.") for n in theirs.targeted_module_names)
    shake(ours, 0.1)
    st.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, again(ids).logits, rtol=1e-5, atol=1e-6)
    again.save_pretrained(tmp_path / "theirs")
    st.load(base, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, again(ids).logits, rtol=1e-5, atol=1e-6)


def test_names_that_are_suffixes_of_others(tmp_path):
    """PEFT takes names for suffixes; a file for 'fc' alone must not adapt 'block.fc' there."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"fc": nn.Linear(4, 4), "xfc": nn.Linear(4, 4)})

        def forward(self, x):
            return self.block["xfc"](self.block["fc"](self.fc(x)))

    base = Two()
    for targets, pattern in ((r"^fc$", {}), (["fc"], {"block.fc": 3}), (".*", {"*fc": 2, "block.fc": 3})):
        model = copy.deepcopy(base)
        st.adapt(model, st.lora(rank=2, rank_pattern=pattern), targets)
        shake(model)
        folder = tmp_path / str(len(pattern))
        st.save(model, folder)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
        x = torch.randn(3, 4)
        torch.testing.assert_close(model(x), theirs(x))
        touched = {n.removeprefix("base_model.model.") for n in theirs.targeted_module_names}
        assert touched == {r.name for r in st.summary(model).rows}


def test_embedding_copy_in_the_file(tmp_path):
    """PEFT may store the whole base embedding beside its adapter: the same one is skipped, another one refused."""
    base = tiny_llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    st.load(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(1)
    with pytest.raises(st.FileFormatError, match="another base embedding"):
        st.load(base, tmp_path)


def test_grouped_convolution_keeps_our_format(tmp_path):
    """PEFT's LoRA of a grouped convolution is another matrix; ours is written in our own format."""
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    model = copy.deepcopy(base)
    st.adapt(model, st.lora(rank=2), ["0"])
    shake(model)
    with pytest.raises(st.StructureError, match="cannot be written for PEFT"):
        st.export_peft(model, tmp_path)
    st.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SLIMTUNE"
    st.load(base, tmp_path)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(base(x), model(x))
