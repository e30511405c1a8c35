"""Ways of using a model that once went wrong: each is a defect that was found, named by what must hold."""

import copy
import json

import pytest
import torch
from torch import nn

import slimtune as st
from cases import DORA_EXACT, LAYERS, LORA, Chain, adapt, adapted, kinds, made_up, methods, shake


def mlp(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias)).to(dtype)


def test_accelerate_hooks_do_not_bypass_the_adapter():
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = mlp(), torch.randn(3, 6, dtype=torch.float64)
    for layer in (model[0], model[2]):
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu"))
    before = model(x)
    st.adapt(model, st.lora(rank=2))
    assert torch.equal(model(x), before)
    shake(model)
    assert not torch.equal(model(x), before) and model(x).requires_grad
    st.remove(model, "default")
    assert torch.equal(model(x), before)
    hooks.remove_hook_from_module(model[0])
    model[0].forward = lambda x: x
    with pytest.raises(st.TargetError, match=r"'0' .* replaced on the object itself"):
        st.adapt(model, st.lora(rank=2))


@methods
def test_an_adapter_left_on_meta_does_not_compute(method, tmp_path):
    weights = mlp().state_dict()
    model = mlp().to("meta")
    adapt(model, method.recipe())
    model.load_state_dict(weights, strict=False, assign=True)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(st.UninitializedError, match="call initialize"):
            model(torch.randn(2, 6, dtype=torch.float64))
    st.initialize(model, stats=made_up(model, method.recipe()))
    st.save(model, tmp_path)
    with pytest.raises(st.UninitializedError, match="load its weights before"):
        st.load(mlp().to("meta"), tmp_path)


@pytest.mark.parametrize("method", [LORA, DORA_EXACT], ids=lambda m: m.id)
@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives(method, bias):
    model = mlp(bias)
    adapt(model, method.recipe(), ["0"])
    shake(model)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    parameters = [p for _, p in st.trainable_parameters(model)]
    assert torch.autograd.gradgradcheck(lambda x, *_: model[0](x), (x, *parameters))


def test_input_changed_in_place_is_an_error_not_a_wrong_gradient():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    st.adapt(model, st.lora(rank=2, dropout=0.3), ["0"])
    x = torch.randn(1, 3, 6, 6)
    y = model(x)
    x.add_(5)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


@methods
def test_in_place_activation_after_a_layer_with_bias(method):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True))
    adapt(model, method.recipe(), ["0"])
    shake(model)
    model(torch.randn(2, 3, 6)).sum().backward()


def test_layers_that_are_not_affine_are_not_merged():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)

    model = nn.Sequential(Standardised(3, 4, 3))
    st.adapt(model, st.lora(rank=2), ["0"])
    with pytest.raises(st.TargetError, match=r"'0' cannot be merged: Standardised.forward is not W x \+ b"):
        st.merge(model)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    st.adapt(model, st.lora(rank=2), ["0"])
    with pytest.raises(st.TargetError, match="computed from other parameters"):
        st.merge(model)


@methods
def test_merged_shows_saved_modules_too(method):
    model = Chain(torch.float64)
    adapt(model, method.recipe(), Chain.targets_of(method), modules_to_save=["classifier"])
    shake(model)
    plain, ids = Chain(torch.float64), Chain.ids()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    y = model(ids)
    with st.merged(model):
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." not in k})
    torch.testing.assert_close(plain(ids), y)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model(ids), y)


def test_rank_dropout_below_does_not_shake_the_norm_above():
    model = mlp().train()
    st.adapt(model, st.lora(rank=4, rank_dropout=0.5), ["0"], name="below")
    shake(model)
    st.adapt(model, st.dora(rank=2), ["0"])
    host = model[0]
    V = torch.randn(6, 3, dtype=torch.float64)
    assert torch.equal(host.map("default").matmul(V), host.map("default").matmul(V))
    torch.testing.assert_close(host.map("default").matmul(V), host.map("default").weight() @ V)
    parts = [{"structure": "LowRank", "rank": 4, "rank_dropout": 0.5}, {"structure": "Toeplitz"}]
    both = st.Sum(5, 6, parts=parts, dtype=torch.float64)
    with torch.no_grad():
        for p in both.parameters():
            p.normal_()
    torch.testing.assert_close(both.matmul(V), both.dense() @ V)


def test_every_member_of_a_broken_tie_gets_its_own_weight(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    ids = torch.randint(0, 17, (1, 4))
    for options in ({"targets": ["shared"]}, {"targets": ["q"], "modules_to_save": ["shared"]}):
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
        st.adapt(model, st.lora(rank=2), options["targets"], modules_to_save=options.get("modules_to_save", ()))
        shake(model)
        y = model(input_ids=ids, decoder_input_ids=ids).logits
        report = st.merge(model)
        assert "shared.weight" in report.untied and len(report.untied) >= 2
        model.save_pretrained(tmp_path / options["targets"][0])
        again = T5ForConditionalGeneration.from_pretrained(tmp_path / options["targets"][0]).eval()
        torch.testing.assert_close(again(input_ids=ids, decoder_input_ids=ids).logits, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        (lambda: st.lora(rank=10**9), "would hold 14,000,000,000 numbers for a weight of 8 x 6, expected at most"),
        (lambda: st.bone(rank=10**9), "would hold"),
        (lambda: st.bone(rank=10**9, form="bat"), "would hold"),
        (lambda: st.gralora(hybrid_rank=10**12), "would hold"),
        (lambda: st.ldr(terms=2**63), "cannot be built for 8 x 6"),
        (lambda: st.singlora(rank=10**30, alpha=1), "cannot be built for 8 x 6"),
        (lambda: st.lora(rank=10**400), "alpha must be a finite number"),
        (lambda: st.lora(alpha=1e308), "is more than fp32 holds"),
        (lambda: st.lokh(factors=10**9), "factors must be a whole number from 2 to 64"),
        (lambda: st.Recipe(st.KhatriRao, {"sizes": [1] * 65}), "sizes must be 2 to 64 numbers"),
        (lambda: st.Recipe(st.LowRank, {}, rank_power=10**12), "rank_power must be a number of at most 8"),
        (lambda: st.lora(rank_dropout="0.5"), "rank_dropout must be a finite number, got '0.5'"),
        (lambda: st.circulant(hadamard="no"), "hadamard must be true or false, got 'no'"),
        (lambda: st.dora(detach="no"), "detach must be true or false, got 'no'"),
        (lambda: st.loldu(unit=0), "unit must be true or false, got 0"),
        (lambda: st.loldu(rank=0, alpha=1), "rank must be a whole number of at least 1, got 0"),
        (lambda: st.loldu(alpha="x"), "alpha must be a number, got 'x'"),
        (lambda: st.singlora(ramp_share="x"), r"share must be in \(0, 1\], got 'x'"),
        (lambda: st.bone(mini_rank=0, form="mini"), "mini_rank must be a whole number of at least 1, got 0"),
        (lambda: st.Recipe(st.LowRank, {}, st.Magnitude, {"eps": 0.0}), r"eps must be in \(0, 1\], got 0.0"),
    ],
)
def test_hostile_options_are_refused_before_anything_is_allocated(recipe, match):
    model = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(st.StructureError, match=match):
        st.adapt(model, recipe(), ["0"])
    assert type(model[0]) is nn.Linear


def test_blocks_far_beyond_the_layer_cost_nothing():
    W, dW = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(st.BlockAffine(block=10**9).weight(W, dW), st.BlockAffine(block=5).weight(W, dW))


@methods
def test_stack_of_magnitudes_on_bf16(method):
    model = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    st.adapt(model, st.dora(rank=2), ["0"], name="below")
    adapt(model, method.recipe(), ["0"])
    shake(model)
    model(torch.randn(3, 6, dtype=torch.bfloat16)).sum().backward()


@methods
@kinds
def test_empty_batches(method, layer):
    model, x = adapted(method, layer)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            y = model(x[:0])
        assert y.shape == (0, *model(x).shape[1:])
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for _, p in st.trainable_parameters(model))


@methods
def test_ids_of_32_bits(method):
    model, ids = adapted(method, next(x for x in LAYERS if x.id == "embedding"))
    assert torch.equal(model(ids.int()), model(ids))


@methods
def test_functional_transforms_with_dropout(method):
    model = mlp().train()
    adapt(model, method.recipe(dropout=0.3))
    shake(model)
    parameters = dict(model.named_parameters())
    x = torch.randn(5, 6, dtype=torch.float64)

    def loss(p, x):
        return torch.func.functional_call(model, p, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, x)
    assert all(each[n].isfinite().all() for n, _ in st.trainable_parameters(model))


@methods
def test_functional_transforms(method):
    model = mlp(bias=False)
    adapt(model, method.recipe())
    shake(model)
    parameters = dict(model.named_parameters())
    x = torch.randn(5, 6, dtype=torch.float64)

    def loss(p, x):
        return torch.func.functional_call(model, p, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    for n, p in st.trainable_parameters(model):
        torch.testing.assert_close(each[n].sum(0), p.grad)


def test_saved_containers():
    model = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.ModuleList([nn.Linear(4, 4)]))
    model.forward = lambda x: model[1](model[0](x))
    x = torch.randn(2, 6)
    before = model(x)
    st.adapt(model, st.lora(rank=2), ["0"], modules_to_save=["1"])
    shake(model)
    assert not torch.equal(model(x), before)
    with st.disabled(model):
        assert torch.equal(model(x), before)
    st.remove(model, "default")
    with pytest.raises(st.TargetError, match="container without a forward"):
        st.adapt(model, st.lora(rank=2), ["0"], modules_to_save=["2"])


def test_failed_start_leaves_the_model_as_it_was(monkeypatch):
    model = mlp()
    kinds = [type(m) for m in model.modules()]

    def fail(self, base):
        raise MemoryError

    monkeypatch.setattr(st.Magnitude, "init_from", fail)
    with pytest.raises(MemoryError):
        st.adapt(model, st.dora(rank=2))
    assert [type(m) for m in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["training", "_modules", "_parameters"])
def test_names_of_module_attributes(name):
    with pytest.raises(st.AdapterNameError, match="adapter name"):
        st.adapt(mlp(), st.lora(), name=name)


def test_changes_inside_a_context():
    model, x = mlp(), torch.randn(2, 6, dtype=torch.float64)
    before = model(x)
    st.adapt(model, st.lora(rank=2), name="a")
    shake(model)
    with st.disabled(model):
        st.remove(model, "a")
        st.adapt(model, st.lora(rank=2), name="b")
    assert model[0].active_adapters == ("b",)
    assert torch.equal(model(x), before)


def test_keyword_input_and_fp64_under_autocast():
    model, x = adapted(LORA, LAYERS[0])
    torch.testing.assert_close(model.layer(input=x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.float64


def test_wrappers_do_not_change_names(tmp_path):
    model = Chain()
    st.adapt(torch.compile(model), st.lora(rank=2))
    shake(model)
    st.save(torch.compile(model), tmp_path)
    plain = copy.deepcopy(model)
    st.remove(plain, "default")
    assert st.load(torch.compile(plain), tmp_path) == ["up", "down", "hf"]
    st.remove(plain, "default")
    assert st.load(plain, tmp_path) == ["up", "down", "hf"]
    assert torch.equal(plain(ids := Chain.ids()), model(ids))


def test_files_that_contradict_themselves(tmp_path):
    model = Chain()
    base = copy.deepcopy(model)
    st.adapt(model, st.lora(rank=2), ["up"], modules_to_save=["classifier"])
    st.save(model, tmp_path)
    manifest = json.loads((tmp_path / "slimtune.json").read_text())

    def attempt(match, **changes):
        (tmp_path / "slimtune.json").write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(st.FileFormatError, match=match):
            st.load(base, tmp_path)
        assert type(base.up) is nn.Linear

    attempt(
        "both adapted and inside modules_to_save",
        adapter={**manifest["adapter"], "modules_to_save": ["up", "classifier"]},
    )
    attempt("does not list adapter_config.json", files={})
    attempt("'base' is not a table", base="x")
    layer = manifest["adapter"]["layers"]["up"]
    attempt("scale must be a number", adapter={**manifest["adapter"], "layers": {"up": {**layer, "scale": 1e308}}})
    (tmp_path / "inner").mkdir()
    st.save(model, tmp_path / "outer" / "inner")
    with pytest.raises(st.FileFormatError, match="subfolders that hold an adapter: inner"):
        st.load(base, tmp_path / "outer")


def test_arguments_that_are_not_what_they_should_be():
    model = Chain()
    with pytest.raises(st.StructureError, match="expected a Recipe such as"):
        st.adapt(model, st.lora)
    with pytest.raises(st.TargetError, match="matches none of the 3 layers"):
        st.adapt(model, st.lora(rank_pattern={"typo": 4}))
    with pytest.raises(st.TargetError, match="none given"):
        st.adapt(model, st.lora(), [])
    with pytest.raises(st.TargetError, match="the model itself is the layer"):
        st.adapt(nn.Linear(3, 3), st.lora())
    with pytest.raises(st.StructureError, match="alpha must be a finite number"):
        st.lora(alpha=float("nan"))
    with pytest.raises(st.StructureError, match="dropout must be a number"):
        st.lora(dropout="0.1")
    with pytest.raises(st.StructureError, match="rank must be a whole number"):
        st.adapt(model, st.lora(rank="8", alpha=1))
    st.adapt(model, st.lora(rank=2), ["classifier"], modules_to_save=["up"])
    with pytest.raises(st.TargetError, match="trained in full"):
        st.adapt(model, st.lora(rank=2), ["up"], name="second")
