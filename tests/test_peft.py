"""Parity with PEFT 0.21.2: its files here, ours there, outputs and gradients."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slimtune as st
from cases import LAYERS, METHODS, Chain, One, adapt, adapted, layers, shake, tiny_llama
from slimtune import peft_format
from slimtune.ops.products import factor_pair
from slimtune.peft_format.frame import CODECS

peft = pytest.importorskip("peft")
KNOWN = pytest.mark.parametrize("method", [m for m in METHODS if m.peft], ids=lambda m: m.id)

ROWS = {m.id: m for m in METHODS}

CHAIN = {
    "LORA": ("embed", "up", "down", "hf", "conv"),
    "ADALORA": ("up", "down", "hf", "conv"),
    "C3A": ("up", "down"),
    "GRALORA": ("up", "down", "hf"),
    "MISS": ("up", "down"),
    "LOHA": ("up", "down", "conv"),
    "LOKR": ("up", "down", "conv"),
}
"""The layers of Chain that a PEFT type takes."""

OWN_PATTERNS = {
    "LORA": {"up": {"rank": 5}, "conv": {"rank": 2}, "down": {"alpha": 9}, "embed": {"alpha": 1}},
    "ADALORA": {"up": {"rank": 5}, "conv": {"rank": 2}, "down": {"alpha": 9}},
    "C3A": {"up": {"block": 4}},
    "LOHA": {"up": {"rank": 1}, "down": {"alpha": 9}, "conv": {"rank": 3}},
    "LOKR": {"up": {"rank": 3}, "down": {"alpha": 9}},
}
PATTERNS = {
    "LORA": [
        {"rank_pattern": {"up": 5, "conv": 2}, "alpha_pattern": {"down": 9, "embed": 1}},
        {"rank_pattern": {"^(up|down)$": 4}, "alpha_pattern": {".*f": 3}},
    ],
    "C3A": [{"block_size_pattern": {"up": 4}}],
    "LOHA": [{"rank_pattern": {"up": 5, "conv": 1}, "alpha_pattern": {"^d.*n$": 9}}],
    "LOKR": [
        {"rank_pattern": {"up": 5, "conv": 1}, "alpha_pattern": {"^d.*n$": 9}},
        {"decompose_factor": 4, "rank_pattern": {"down": 1}},
        {"decompose_factor": 3},
    ],
}
"""Fields that give layers sizes of their own, by PEFT type."""


def kind_of(method):
    return method.peft(peft).peft_type.value


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def wrap(base, config):
    """PEFT's adapter on a copy, moved away from its start."""
    theirs = quietly(peft.get_peft_model, copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return theirs


def peft_chain(method, targets=None, **fields):
    torch.manual_seed(0)
    base = Chain().eval()
    targets = targets or CHAIN[kind_of(method)]
    return base, wrap(base, method.peft(peft, target_modules=list(targets), modules_to_save=["classifier"], **fields))


def strictly(base, folder):
    """PEFT's reading of a folder, without a word of warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        # it looks for LoRA's rank_pattern in AdaLoRA's
        warnings.filterwarnings("ignore", message=r"The following rank_pattern keys did not match .*\.lora_E'")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def written_as(folder):
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def refusal_of(model, folder):
    """Why the adapter cannot be written for PEFT; "" if it has been."""
    try:
        st.export_peft(model, folder)
    except st.StructureError as e:
        return str(e)
    return ""


def every_pattern():
    for method in METHODS:
        if method.peft:
            for number, fields in enumerate([{}, *PATTERNS.get(kind_of(method), [])]):
                yield pytest.param(method, fields, id=f"{method.id}-{number}")


@pytest.mark.parametrize(("method", "fields"), list(every_pattern()))
def test_their_files_load_here(method, fields, tmp_path):
    base, theirs = peft_chain(method, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = Chain.ids()
    again = copy.deepcopy(base)
    assert sorted(st.load(base, tmp_path / "theirs")) == sorted(CHAIN[kind_of(method)])
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(ids), theirs(ids), rtol=1e-6, atol=1e-6)
        with st.disabled(base), theirs.disable_adapter():
            torch.testing.assert_close(base(ids), theirs(ids), rtol=1e-6, atol=1e-6)
    st.save(base, tmp_path / "ours")  # the very numbers and keys they wrote
    assert written_as(tmp_path / "ours") == kind_of(method)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    own = {k: t for k, t in one.items() if not k.endswith("base_layer.weight")}
    assert {k: t.shape for k, t in own.items()} == {k: t.shape for k, t in two.items()}
    assert all(torch.equal(t, two[k]) for k, t in own.items())
    with torch.no_grad():
        torch.testing.assert_close(strictly(again, tmp_path / "ours")(ids), theirs(ids), rtol=1e-6, atol=1e-6)


@KNOWN
@pytest.mark.parametrize("overridden", [False, True], ids=["uniform", "patterns"])
def test_our_files_load_there(method, overridden, tmp_path):
    torch.manual_seed(0)
    base = Chain().eval()
    model = copy.deepcopy(base)
    kind = kind_of(method)
    if overridden and kind not in OWN_PATTERNS:
        pytest.skip(f"{kind} has one size for all layers")
    recipe = replace(method.recipe(), overrides=OWN_PATTERNS[kind] if overridden else {})
    # LoKr's shapes are those of the flattened kernel, PEFT's those of the channels
    targets = [t for t in CHAIN[kind] if (kind, t) != ("LOKR", "conv")]
    adapt(model, recipe, targets, modules_to_save=["classifier"])
    shake(model)
    st.export_peft(model, tmp_path)
    theirs = strictly(copy.deepcopy(base), tmp_path)
    assert written_as(tmp_path) == kind
    ids = Chain.ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids), rtol=1e-6, atol=2e-6)
    st.load(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(base(ids), model(ids), rtol=1e-6, atol=2e-6)


TAKEN = {
    "LORA": [
        *("linear", "linear-flat", "linear-vector", "conv1d-hf", "conv2d", "conv2d-strided", "conv1d"),
        *("embedding", "embedding-padded", "structured-linear", "structured-conv2d"),
    ],
    "ADALORA": [
        *("linear", "linear-flat", "linear-vector", "conv1d-hf", "conv2d", "conv2d-strided", "conv2d-dilated"),
        *("structured-linear", "structured-conv2d"),
    ],
    "GRALORA": ["linear", "linear-flat", "linear-vector", "conv1d-hf", "structured-linear"],
    "MISS": ["linear", "linear-flat", "linear-vector", "structured-linear"],
    "LOHA": [
        x.id
        for x in LAYERS
        if x.id.startswith(("linear", "conv2d", "conv1d", "structured")) and x.id[-3:] not in ("lar", "-hf")
    ],
    "LOKR": ["linear", "linear-flat", "linear-vector", "structured-linear"],
}
"""Layers that a PEFT type holds exactly as slimtune adapts them."""
FEWER = {"bone-mini": ["linear-flat", "linear-vector"], "bone-bat": []}
"""Methods whose sizes do not fit all of those."""


CLAIMED = [m for m in METHODS if any(codec.claims(m.recipe()) for codec in CODECS)]


@pytest.mark.parametrize("method", CLAIMED, ids=lambda m: m.id)
@layers
def test_what_is_written_for_peft_is_right(method, layer, tmp_path):
    """Any sizes, every layer: PEFT computes the same from the file, or the file is not written."""
    if layer.id in method.refuses:
        pytest.skip(f"{method.id} refuses {layer.id}")
    model, x = adapted(method, layer, torch.float32)
    known = bool(method.peft) and layer.id in FEWER.get(method.id, TAKEN.get(kind_of(method), []))
    refusal = refusal_of(model, tmp_path)
    if refusal or method.peft:
        assert known == (not refusal), refusal
    if refusal:
        st.save(model, tmp_path)
        assert written_as(tmp_path) == "SLIMTUNE"
        return
    torch.manual_seed(0)
    base = One(layer.make()).requires_grad_(False)  # its AdaLoRA freezes `weight`, which a structure computes
    theirs = quietly(peft.PeftModel.from_pretrained, base, str(tmp_path)).eval()
    flat = x.dim() == 1  # PEFT's GraLoRA wants two dimensions
    with torch.no_grad():
        expected = theirs(x[None])[0] if flat else theirs(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@KNOWN
def test_gradients_equal_theirs(method, tmp_path):
    kind = kind_of(method)
    alone = [(name,) for name in CHAIN[kind]]
    for number, targets in enumerate(alone if kind == "C3A" else [*alone, CHAIN[kind]]):
        base, theirs = peft_chain(method, targets)
        theirs.save_pretrained(tmp_path / str(number))
        st.import_peft(base, tmp_path / str(number))
        ids = Chain.ids()
        base.eval()(ids).square().sum().backward()
        theirs(ids).square().sum().backward()
        state = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        grads = quietly(peft.get_peft_model_state_dict, theirs, state_dict=state, save_embedding_layers=False)
        expected = peft_format.decode_tensors(st.io.describe(base), grads, "their gradients")
        own = {
            f"{t}.{n}": p.grad for t in targets for n, p in base.get_submodule(t).adapters["default"].named_parameters()
        }
        assert own.keys() == {k for k in expected if ".saved." not in k}
        for key, grad in own.items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-5, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


@KNOWN
def test_llama_both_ways(method, tmp_path):
    """A transformers model, its targets by "all-linear"."""
    base = tiny_llama()
    ids = torch.randint(0, 31, (2, 6))
    config = method.peft(peft, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    ours = copy.deepcopy(base)
    chosen = adapt(ours, method.recipe())
    assert sorted(chosen) == sorted(n.removeprefix("base_model.model.") for n in theirs.targeted_module_names)
    shake(ours, 0.1)
    st.export_peft(ours, tmp_path / "ours")
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


class Suffixes(nn.Module):
    """Layers whose names are suffixes of others'."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.a = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.b = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(8, 8)})})

    def forward(self, x):
        return self.b["a"]["fc"](self.a["fc"](self.fc(x)))


@pytest.mark.parametrize(
    ("blocks", "fits"),
    [
        ({"*fc": 4, "a.fc": 2}, True),  # the default must not be the commonest
        ({"a.fc": 4, "b.a.fc": 2}, False),
        ({"b.a.fc": 4}, True),
        ({"*fc": 8, "a.fc": 4, "b.a.fc": 2}, False),
    ],
    ids=str,
)
def test_block_sizes_of_names_that_are_suffixes(blocks, fits, tmp_path):
    torch.manual_seed(0)
    base = Suffixes()
    model = copy.deepcopy(base)
    recipe = replace(st.c3a(block=2), overrides={name: {"block": b} for name, b in blocks.items()})
    st.adapt(model, recipe, ".*fc")
    shake(model)
    reason = refusal_of(model, tmp_path)
    assert ("cannot tell these layers apart" in reason) if not fits else not reason
    x = torch.randn(3, 8)
    if fits:
        torch.testing.assert_close(strictly(copy.deepcopy(base), tmp_path)(x), model(x), rtol=1e-6, atol=2e-6)
    st.save(model, tmp_path / "own")
    st.load(base, tmp_path / "own")
    assert torch.equal(base(x), model(x))


def test_saving_never_changes_a_number(tmp_path):
    """`save` takes PEFT's format only for what it holds as it is; `export_peft` converts."""
    for normalization, kind in (("unit", "SLIMTUNE"), ("published", "C3A")):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 9))
        model = copy.deepcopy(base)
        st.adapt(model, st.c3a(block=3, normalization=normalization), ["0"])
        shake(model)
        st.save(model, tmp_path / normalization)
        assert written_as(tmp_path / normalization) == kind
        again = copy.deepcopy(base)
        st.load(again, tmp_path / normalization)
        kernel, loaded = (m[0].adapters["default"].structure.kernel for m in (model, again))
        assert torch.equal(kernel, loaded)
        st.export_peft(model, tmp_path / "peft")
        stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")["base_model.model.0.c3a_kernel"]
        assert torch.equal(stored, kernel * (6 if normalization == "unit" else 1))


@pytest.mark.parametrize(
    "recipe",
    [st.c3a(2, "published", 0.1), st.loha(2, dropout=0.1), st.lokr(2, dropout=0.1), st.bone(2, "bat", dropout=0.1)],
    ids=lambda r: r.name,
)
def test_dropout_that_peft_lacks(recipe, tmp_path):
    """`save` keeps it; `export_peft` writes the same function without it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6)).eval()
    model = copy.deepcopy(base)
    st.adapt(model, recipe, ["0"])
    shake(model)
    st.save(model, tmp_path / "own")
    assert written_as(tmp_path / "own") == "SLIMTUNE"
    st.export_peft(model, tmp_path / "peft")
    x = torch.randn(3, 4)
    torch.testing.assert_close(strictly(copy.deepcopy(base), tmp_path / "peft")(x), model.eval()(x))
    st.load(base, tmp_path / "peft")
    assert base[0].adapters["default"].recipe.dropout == 0


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (st.gralora(rank=4, k=None, rank_pattern={"1": 8}), "one rank for all layers, but 0 has 4 and 1 has 8"),
        (st.gralora(rank=4, k=2, alpha_pattern={"1": 1.0}), "one alpha for all layers"),
        (st.gralora(rank=6, k=None), "one number of blocks for all layers, but 0 has 2 and 1 has 3"),
        (st.Recipe(st.Sum, {"parts": [{"structure": "LowRank", "rank": 2}]}), "sums a BlockLowRank and a LowRank only"),
        (replace(st.bone(4), overrides={"1": {"rank": 2}}), "one rank for all layers"),
        (st.bone(11), "rank 11 exceeds the 8 inputs"),
        (st.bone(4, "mini", 5), "period 5 does not divide the 12 outputs"),
        (st.bone(4, "row"), "col form only"),
        (st.bone(4, "left"), "col form only"),
        (st.bone(3, "bat"), "blocks of 3 do not divide 12 x 8"),
        (st.c3a(3), "blocks of 3 do not divide 12 x 8"),
        (st.Recipe(st.Hadamard, {"rank": 2, "second_rank": 3}), "both products have one rank"),
        (st.Recipe(st.Kronecker, {"rank": 2, "left": [12, 1]}), "chooses the shapes"),
        (st.Recipe(st.Kronecker, {"left": [3, 2]}), "has no rank"),
        (st.singlora(rank=2), "no such adapter"),
        (replace(st.adalora(rank=2), composition=st.Magnitude), "no such adapter"),
        (replace(st.loha(2), composition=st.Magnitude), "no such adapter"),
    ],
    ids=lambda r: r.name if isinstance(r, st.Recipe) else "-".join(r.split()[:6]),
)
def test_what_peft_cannot_hold(recipe, reason, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(9, 12))
    if recipe.structure is not st.BlockLowRank or "k" not in reason:
        base[1] = nn.Linear(8, 12) if "number of blocks" not in reason else nn.Linear(9, 15)
    model = copy.deepcopy(base)
    st.adapt(model, recipe, ["0", "1"])
    shake(model)
    assert reason in refusal_of(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    st.save(model, tmp_path / "own")
    assert written_as(tmp_path / "own") == "SLIMTUNE"


def test_a_scale_is_folded_for_a_type_that_has_none(tmp_path):
    torch.manual_seed(0)
    for number, recipe in enumerate((st.c3a(block=2), st.bone(4), st.bone(2, "bat"))):
        base = nn.Sequential(nn.Linear(8, 12))
        model = copy.deepcopy(base)
        st.adapt(model, replace(recipe, alpha=3.0), ["0"])
        shake(model)
        st.save(model, tmp_path / "own")
        assert written_as(tmp_path / "own") == "SLIMTUNE"
        st.export_peft(model, tmp_path / str(number))
        x = torch.randn(3, 8)
        torch.testing.assert_close(strictly(copy.deepcopy(base), tmp_path / str(number))(x), model(x))


def test_kronecker_products_over_a_convolution(tmp_path):
    """PEFT's shapes are those of the channels. A whole w2 of a Conv1d it meets with w1 padded on the wrong side."""
    torch.manual_seed(0)
    for number, (layer, rank, x) in enumerate(
        (
            (nn.Conv2d(4, 6, 3, groups=2), 1, torch.randn(1, 4, 5, 5)),
            (nn.Conv2d(4, 6, 3, dilation=2), 8, torch.randn(1, 4, 7, 7)),
            (nn.Conv1d(4, 6, 3), 1, torch.randn(1, 4, 5)),
            (nn.Conv1d(4, 6, 3), 8, torch.randn(1, 4, 5)),
        )
    ):
        base = nn.Sequential(layer)
        theirs = wrap(base, peft.LoKrConfig(r=rank, alpha=2, target_modules=["0"]))
        theirs.save_pretrained(tmp_path / f"{number}")
        if number == 3:
            w1, w2 = (getattr(theirs.base_model.model[0], f"lokr_{w}")["default"] for w in ("w1", "w2"))
            delta = theirs.base_model.model[0].get_delta_weight("default").flatten(1)
            assert (delta - 2 / rank * torch.kron(w1, w2.flatten(1))).abs().max() > 0.01
            with pytest.raises(st.FileFormatError, match="no Kronecker product of this Conv1d's kernel"):
                st.load(base, tmp_path / "3")
            st.adapt(base, st.Recipe(st.Kronecker, {"rank": 8, "left": [2, 2], "split": "none"}), ["0"])
            assert "is another matrix" in refusal_of(base, tmp_path / "other")
            continue
        st.load(base, tmp_path / f"{number}")
        torch.testing.assert_close(base(x), theirs(x), rtol=1e-5, atol=1e-6)
        assert not refusal_of(base, tmp_path / f"again{number}")


@pytest.mark.parametrize("factor", [-1, 1, 4, 7, 12])
def test_lokr_chooses_the_shapes_that_peft_chooses(factor):
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 130):
        assert factor_pair(size, factor) == factorization(size, factor)


def test_c3a_gradient_in_the_input(tmp_path):
    """Parameters' gradients are PEFT's; in the input ours is the derivative of the output, and PEFT's is not."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 4))
    theirs = wrap(base, peft.C3AConfig(block_size=4, target_modules=["0"], init_weights=True))
    theirs.save_pretrained(tmp_path)
    st.load(base, tmp_path)
    x, step, probe = torch.randn(1, 8), torch.eye(8), torch.randn(4)
    true = ((base(x + step) - base(x - step)) @ probe / 2).detach()  # the layer is affine
    found = []
    for model in (base, theirs):
        own = x.clone().requires_grad_()
        (model(own) @ probe).sum().backward()
        found.append(own.grad[0])
    torch.testing.assert_close(found[0], true, rtol=1e-5, atol=1e-6)
    assert (found[1] - true).abs().max() > 0.01
    assert (base(x) - theirs(x)).abs().max() < 1e-6


@pytest.mark.parametrize("row", ["bone", "bone-bat"])
def test_bone_is_read_under_its_old_name(row, tmp_path):
    """PEFT's script from Bone to MiSS renames keys and type; the new version cannot read the old files itself."""
    base, theirs = peft_chain(ROWS[row])
    theirs.save_pretrained(tmp_path)
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    fields = json.loads(config.read_text()) | {"peft_type": "BONE"}
    config.write_text(json.dumps({k: v for k, v in fields.items() if k not in ("mini_r", "miss_dropout")}))
    save_file({k.replace(".miss_", ".bone_"): t for k, t in load_file(tensors).items()}, tensors)
    st.load(base, tmp_path)
    ids = Chain.ids()
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(ids), theirs(ids), rtol=1e-6, atol=1e-6)
    st.save(base, tmp_path)
    assert written_as(tmp_path) == "MISS"


def test_settings_that_act_in_training_only_are_told(tmp_path):
    base = nn.Sequential(nn.Linear(4, 6))
    theirs = wrap(base, peft.LoHaConfig(r=2, alpha=2, rank_dropout=0.1, target_modules=["0"]))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="rank_dropout = 0.1: slimtune trains on without it"):
        st.load(base, tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-6, atol=1e-6)


def allocated(model, target, steps=12):
    """PEFT's AdaLoRA trained by its own loop, pruned to `target` ranks on average."""
    config = peft.AdaLoraConfig(
        init_r=5, target_r=target, lora_alpha=7, tinit=2, tfinal=3, deltaT=2, total_step=steps, target_modules=[".*"]
    )
    config.target_modules = ".*(up|down|hf|conv)"
    theirs = quietly(peft.get_peft_model, model, config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for number in range(steps):
        theirs(Chain.ids()).square().sum().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(number + 1)
        optimizer.zero_grad()
    return theirs.eval()


@pytest.mark.parametrize("target", [1, 3])
def test_adalora_that_peft_has_allocated(target, tmp_path):
    """Ranks of their own, none at all in some layers; the scale is that of the start."""
    torch.manual_seed(0)
    base = Chain().eval()
    theirs = allocated(copy.deepcopy(base), target)
    theirs.save_pretrained(tmp_path / "theirs")
    pattern = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {key.removesuffix(".lora_E"): sum(kept) for key, kept in pattern.items()}
    assert sum(ranks.values()) == 4 * target and len(set(ranks.values())) > 1
    assert (target == 1) == (0 in ranks.values())
    again, ids = copy.deepcopy(base), Chain.ids()
    st.load(base, tmp_path / "theirs")
    assert {row.name: row.rank for row in st.summary(base).rows} == {n: max(r, 1) for n, r in ranks.items()}
    with torch.no_grad():
        torch.testing.assert_close(base(ids), theirs(ids), rtol=1e-6, atol=1e-6)
        st.save(base, tmp_path / "ours")
        assert written_as(tmp_path / "ours") == "ADALORA"
        torch.testing.assert_close(strictly(again, tmp_path / "ours")(ids), theirs(ids), rtol=1e-6, atol=1e-6)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["init_r"], config["lora_alpha"]) == (5, 7)


@pytest.mark.parametrize("alpha", [24, 0.1, 5.3])
def test_adalora_with_ranks_of_their_own_goes_to_peft(alpha, tmp_path):
    """Masked, compacted, or beyond the rank at the start: PEFT computes the same, its scale's 1e-5 included."""
    torch.manual_seed(0)
    base = Chain(torch.float64).eval()
    model = copy.deepcopy(base)
    st.adapt(model, st.adalora(rank=3, initial_rank=3, alpha=alpha), CHAIN["ADALORA"])
    shake(model)
    ids = Chain.ids()
    with torch.no_grad():
        model.up.adapters["default"].structure.core[1] = 0
        model.hf.adapters["default"].structure.core[:2] = 0
    folder = tmp_path / "0"

    def compare(expected):
        st.save(model, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        ranks = dict.fromkeys(CHAIN["ADALORA"], config["init_r"])
        ranks |= {n.removesuffix(".lora_E"): sum(kept) for n, kept in (config["rank_pattern"] or {}).items()}
        assert (config["peft_type"], config["init_r"], ranks) == ("ADALORA", *expected)
        with torch.no_grad():
            theirs = strictly(copy.deepcopy(base), folder)
            torch.testing.assert_close(theirs(ids), model(ids), rtol=1e-12, atol=1e-12)
            own = copy.deepcopy(base)
            st.load(own, folder)
            assert torch.equal(own(ids), model(ids))

    even = dict.fromkeys(CHAIN["ADALORA"], 3)
    compare((3, even))
    st.compact(model)
    compare((3, even | {"up": 2, "hf": 1}))
    st.resize(model, {"up": 4, "down": 7})
    shake(model)
    compare((7, even | {"up": 4, "hf": 1, "down": 7}))


def test_scales_that_differ_go_into_the_core(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    for number, changes in enumerate(
        ({"0": {"alpha": 3}}, {"0": {"rank": 5}}, {"0": {"alpha": -2}, "1": {"alpha": -2}})
    ):
        model = copy.deepcopy(base)
        st.adapt(model, replace(st.adalora(rank=2), overrides=changes), ["0", "1"])
        shake(model)
        st.save(model, tmp_path / "own")
        assert written_as(tmp_path / "own") == "SLIMTUNE"
        st.export_peft(model, tmp_path / str(number))
        x = torch.randn(3, 6)
        theirs = strictly(copy.deepcopy(base), tmp_path / str(number))
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_layer_called_default_keeps_our_format_once_ranks_differ(tmp_path):
    """PEFT takes the word in a key of rank_pattern for the adapter's name and cuts off too much."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"default_up": nn.Linear(6, 6), "down": nn.Linear(6, 6)})
    st.adapt(base, st.adalora(rank=2), ["default_up", "down"])
    assert not refusal_of(base, tmp_path / "even")
    st.resize(base, {"down": 1})
    assert "takes 'default' in 'default_up'" in refusal_of(base, tmp_path / "uneven")


UP = "base_model.model.up."


@pytest.mark.parametrize(
    ("row", "edit", "match"),
    [
        ("c3a", lambda c, t: t.update({f"{UP}c3a_kernel": torch.zeros(6, 8)}), "must have 3 dimensions"),
        ("c3a", lambda c, t: t.update({f"{UP}c3a_kernel": torch.zeros(2, 3, 4)}), r"has shape \(2, 3, 4\), expected"),
        ("c3a", lambda c, t: t.update({f"{UP}c3a_kernel": torch.zeros(1, 1, 99)}), "block must be"),
        ("c3a", lambda c, t: t.update({f"{UP}c3a_kernel": torch.zeros(1, 1, 0)}), "block must be"),
        ("c3a", lambda c, t: c.update(bias="c3a_only"), "bias = 'c3a_only'"),
        ("c3a", lambda c, t: c.update(alpha=3), "alpha = 3 changes the adapter"),
        ("adalora", lambda c, t: c.update(init_r=4), "up comes with 3 ranks, but init_r = 4"),
        ("adalora", lambda c, t: c.update(init_r=True), "init_r of up must be a whole number"),
        ("adalora", lambda c, t: c.update(lora_alpha="x"), "alpha of up must be a number"),
        ("adalora", lambda c, t: c.update(lora_dropout=2), "dropout must be"),
        ("adalora", lambda c, t: c.update(use_dora=True), "use_dora = True changes the adapter"),
        ("adalora", lambda c, t: c.update(layer_replication=[[0, 1]]), "layer_replication"),
        ("adalora", lambda c, t: c.update(rank_pattern=[1]), "rank_pattern must be a table"),
        ("adalora", lambda c, t: c.update(rank_pattern={"up.lora_E": [True, False, True]}), "leaves it 2"),
        ("adalora", lambda c, t: c.update(rank_pattern={"up.lora_E": [True] * 4}), "must be 3 times true or false"),
        ("adalora", lambda c, t: c.update(rank_pattern={"up.lora_E": 3}), "must be 3 times true or false"),
        ("adalora", lambda c, t: c.update(rank_pattern={"up.lora_E": [1, 1, 1]}), "must be 3 times true or false"),
        ("adalora", lambda c, t: t.pop(f"{UP}lora_A"), "up must come with a lora_A of 2 dimensions"),
        ("adalora", lambda c, t: t.pop(f"{UP}lora_E"), "up.structure.core"),
        ("adalora", lambda c, t: t.update({f"{UP}lora_E": torch.zeros(1, 3)}), r"core has shape \(1, 3\)"),
        ("adalora", lambda c, t: t.update({f"{UP}lora_E": torch.zeros(2, 1)}), r"core has shape \(2,\)"),
        ("adalora", lambda c, t: t.update({f"{UP}lora_B": torch.zeros(12, 2)}), r"B has shape \(12, 2\)"),
        ("gralora", lambda c, t: c.update(gralora_k=3), "blocks must divide"),
        ("gralora", lambda c, t: c.update(gralora_k=0), "gralora_k of .* must be at least 1"),
        ("gralora", lambda c, t: c.update(r=10**9), "shape"),
        ("gralora", lambda c, t: c.update(hybrid_r=2), "comes without gralora_A_general"),
        ("gralora", lambda c, t: c.update(alpha="x"), "alpha of .* must be a number"),
        ("gralora", lambda c, t: c.update(gralora_dropout=7), "dropout must be"),
        ("gralora", lambda c, t: t.pop(f"{UP}gralora_B"), "up.structure.B"),
        ("gralora-hybrid", lambda c, t: c.update(hybrid_r=0), "comes with gralora_A_general"),
        ("gralora-hybrid", lambda c, t: c.update(hybrid_r=-1), "must be at least 1"),
        ("gralora-hybrid", lambda c, t: t.pop(f"{UP}gralora_B_general.weight"), "up.structure.parts.1.B"),
        ("bone", lambda c, t: c.update(init_weights="new"), "init_weights = 'new'"),
        ("bone", lambda c, t: c.update(init_weights=[]), "init_weights"),
        ("bone", lambda c, t: c.update(init_weights="bat"), "structure.B has shape"),
        ("bone", lambda c, t: c.update(r=3), r"has shape \(4, 12\), expected \(3, 12\)"),
        ("bone-mini", lambda c, t: c.update(mini_r=99), "period must be"),
        ("bone-mini", lambda c, t: c.update(mini_r="2"), "mini_r of .* whole number"),
        ("bone-bat", lambda c, t: t.update({f"{UP}miss_block": torch.zeros(6, 4)}), "has shape"),
        ("loha", lambda c, t: c.update(rank_pattern={"up": 3}), "has shape"),
        ("loha", lambda c, t: c.update(alpha_pattern={"up": 0}), "alpha must not be 0"),
        ("loha", lambda c, t: c.update(alpha_pattern={"(a+)+": 1}), "not a name or a simple pattern"),
        ("loha", lambda c, t: t.pop(f"{UP}hada_w1_b"), "missing .first: up.structure.w1_b"),
        ("loha", lambda c, t: t.update({f"{UP}hada_t1": torch.zeros(2, 2, 3, 3)}), "product over a convolution"),
        ("loha", lambda c, t: t.update({f"{UP}hada_w3": torch.zeros(2)}), "unexpected tensor"),
        ("lokr", lambda c, t: t.pop(f"{UP}lokr_w1"), "lokr_w1 or its two halves must be matrices"),
        ("lokr", lambda c, t: t.update({f"{UP}lokr_w1": torch.zeros(2)}), "must be matrices"),
        ("lokr", lambda c, t: t.update({f"{UP}lokr_w1": torch.zeros(5, 2)}), "do not divide 12"),
        ("lokr", lambda c, t: t.update({f"{UP}lokr_w1": torch.zeros(0, 2)}), "left must be"),
        ("lokr", lambda c, t: t.update({f"{UP}lokr_w2": torch.zeros(2, 2, 2)}), "no Kronecker product of this Conv1d"),
        ("lokr", lambda c, t: t.update({f"{UP}lokr_w2_a": torch.zeros(4, 2)}), "tensors do not fit"),
        ("lokr", lambda c, t: c.update(r=-2), "rank of .* must be at least 1"),
    ],
)
def test_wrong_files_are_named(row, edit, match, tmp_path):
    """Without a manifest, so that nothing but the contents can tell."""
    base, theirs = peft_chain(ROWS[row], ("up", "down"))
    theirs.save_pretrained(tmp_path)
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    fields, stored = json.loads(config.read_text()), load_file(tensors)
    edit(fields, stored)
    config.write_text(json.dumps(fields))
    save_file(stored, tensors)
    before = {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(st.FileFormatError, match=match):
        st.load(base, tmp_path)
    assert before == {n: type(m) for n, m in base.named_modules()}
