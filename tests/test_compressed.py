"""Models of structures: adapters merged into them, and their files."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slimtune as st
from cases import LAYERS, METHODS, Chain, adapted, shake, tiny_llama
from slimtune.compressed import is_compressed, load_with_head, read_compressed
from slimtune.errors import ConfigError, FileFormatError, SlimtuneError, StructureError, UninitializedError
from slimtune.structured import Structured, check_holdable, hold
from slimtune.targets import own_modules

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


@pytest.mark.parametrize("recipe", [st.lora, st.dora, lambda **o: st.dora(axis="column", **o), st.bora])
def test_factors_are_joined_while_that_is_smaller_than_the_weight(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).double()
    st.factorize(model, {"0": 4, "2": 9})
    st.adapt(model, recipe(rank=3), ["0", "2"])
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


# ---------------------------------------------------------------- there and back


def tiny_bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(vocab_size=31, max_position_embeddings=16, **sizes)).eval()


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def tiny_resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5)
    return ResNetForImageClassification(config).eval()


MODELS = {
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tied=True),
    "bert": tiny_bert,
    "gpt2": tiny_gpt2,
    "resnet": tiny_resnet,
}
models = pytest.mark.parametrize("kind", MODELS)


def inputs_of(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16).to(model.dtype)}
    return {"input_ids": torch.randint(0, 31, (2, 6))}


def squeezed(model, **options):
    """The model, every layer that can be of rank 2 but its head."""
    ranks = {}
    for name, module in own_modules(model).items():
        try:
            check_holdable(module, name)
        except st.TargetError:
            continue
        if "lm_head" not in name:
            ranks[name] = 2
    st.factorize(model, ranks, st.factors.svd(**options), guard=False)
    return model


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key, t in a.items():
        assert t.dtype == b[key].dtype and torch.equal(t, b[key]), key


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip(kind, dtype, tmp_path):
    model = squeezed(MODELS[kind](), form="spatial").to(dtype)
    st.save_compressed(model, tmp_path / "small", facts={"method": "svd"}, shard_bytes=1000)
    assert len(list((tmp_path / "small").glob("compressed-*.safetensors"))) > 1
    again = st.load_compressed(tmp_path / "small")
    same_state(model, again)
    assert type(again) is type(model) and not again.training and again.dtype == dtype
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    one, other = dict(model.named_parameters(remove_duplicate=True)), dict(again.named_parameters())
    assert one.keys() == other.keys()  # what was tied is tied
    folder = read_compressed(tmp_path / "small")
    assert folder.facts == {"method": "svd"} and folder.problems() == []
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_files_have_the_modes_that_the_umask_gives(tmp_path):
    model = squeezed(MODELS["llama"]())
    before = os.umask(0o027)
    try:
        st.save_compressed(model, tmp_path / "small")
        st.save_expanded(model, tmp_path / "dense")
    finally:
        os.umask(before)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} >= {".safetensors", ".json"}
    assert {f.name: oct(f.stat().st_mode & 0o777) for f in files} == {f.name: "0o640" for f in files}


@models
def test_buffers_that_are_no_state_are_those_of_transformers(kind, tmp_path):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "plain")
    st.save_compressed(squeezed(model), tmp_path / "small")
    plain = type(model).from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    again = st.load_compressed(tmp_path / "small", dtype=torch.bfloat16)
    a, b = dict(plain.named_buffers()), dict(again.named_buffers())
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype, key
    assert again.config.dtype == torch.bfloat16 and again.dtype == torch.bfloat16


@models
def test_transformers_alone_refuses_loudly(kind, tmp_path):
    from transformers import AutoModel

    model = squeezed(MODELS[kind]())
    st.save_compressed(model, tmp_path / "small")
    for cls in (AutoModel, type(model)):
        with pytest.raises(OSError, match="no file named"):
            cls.from_pretrained(tmp_path / "small")


def test_a_module_of_ones_own(tmp_path):
    model, ids = Chain().eval(), Chain.ids()
    st.factorize(model, {"up": 2, "down": 2, "hf": 2, "conv": 1}, guard=False)
    st.save_compressed(model, tmp_path / "small")
    other = Chain().train()
    other.embed.requires_grad_(False)
    assert st.load_compressed(tmp_path / "small", other) is other
    same_state(model, other)
    assert torch.equal(other(ids), model(ids)) and not other.training
    assert not other.embed.weight.requires_grad and other.up.structure.A.requires_grad
    st.load_compressed(tmp_path / "small", other := Chain(), dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in other.parameters())
    with pytest.raises(FileFormatError, match="is no class of transformers; give the module: model="):
        st.load_compressed(tmp_path / "small")


def test_shared_tensors_are_written_once(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(torch.cat([model[0].weight, model[0].weight])[:6].detach())  # a view of more
    st.save_compressed(model, tmp_path / "m")
    folder = read_compressed(tmp_path / "m")
    assert folder.tied == {"1.weight": "0.weight"} and "1.weight" not in folder.tensors
    other = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    st.load_compressed(tmp_path / "m", other)
    same_state(model, other)
    assert other[1].weight is other[0].weight and other[2].weight is not other[0].weight


def test_a_tokenizer_comes_along(tmp_path):
    from transformers import AutoTokenizer

    from tinyrun import make_llama

    source = make_llama(tmp_path / "llama")
    model = squeezed(tiny_llama())
    st.save_compressed(model, tmp_path / "one", processing=AutoTokenizer.from_pretrained(source))
    st.save_compressed(model, tmp_path / "two", processing=source)
    for name in ("one", "two"):
        tokens = AutoTokenizer.from_pretrained(tmp_path / name)("abc").input_ids
        assert tokens == AutoTokenizer.from_pretrained(source)("abc").input_ids
        assert not list((tmp_path / name).glob("model*"))
    with pytest.raises(ConfigError, match="no such folder"):
        st.save_compressed(model, tmp_path / "three", processing=tmp_path / "nowhere")
    assert not (tmp_path / "three").exists()


# ---------------------------------------------------------------- torn and hostile folders


@pytest.fixture
def small(tmp_path):
    model = Chain()
    st.factorize(model, {"up": 2, "conv": 1}, guard=False)
    st.save_compressed(model, tmp_path / "small")
    return tmp_path / "small"


SHARD = "compressed-00001.safetensors"


def _manifest(folder, **changes):
    file = folder / "slimtune.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | changes))


def _structures(folder, change):
    entries = json.loads((folder / "slimtune.json").read_text())["structures"]
    change(entries)
    _manifest(folder, structures=entries)


def _tensors(folder, change):
    """Another shard under a right hash."""
    import hashlib

    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    data = (folder / SHARD).read_bytes()
    _manifest(folder, files={SHARD: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}})


DAMAGE = {
    "gone": (shutil.rmtree, "no such folder"),
    "no-manifest": (lambda f: (f / "slimtune.json").unlink(), r"no slimtune\.json; it holds compressed-00001"),
    "not-json": (lambda f: (f / "slimtune.json").write_text("{"), "not valid JSON"),
    "newer": (lambda f: _manifest(f, format=2), "format '2', expected 1"),
    "other-kind": (lambda f: _manifest(f, kind="index"), "kind 'index', expected 'compressed'"),
    "no-table": (lambda f: _manifest(f, structures=[]), "'structures' is not a table"),
    "no-tables": (lambda f: _manifest(f, structures={"up": 3}), "not a table of tables"),
    "no-files": (lambda f: _manifest(f, files={}), "lists no compressed-00001"),
    "no-hash": (lambda f: _manifest(f, files={SHARD: {"bytes": 3}}), "no hash and size for compressed-00001"),
    "outside": (lambda f: _manifest(f, files={"../x": {"sha256": "", "bytes": 0}}), "no path inside the folder"),
    "absolute": (lambda f: _manifest(f, files={"/etc/passwd": {"sha256": "", "bytes": 0}}), "no path inside"),
    "shard-gone": (lambda f: (f / SHARD).unlink(), "missing, though slimtune.json lists it"),
    "link": (
        lambda f: ((f / SHARD).rename(f.parent / "elsewhere"), (f / SHARD).symlink_to(f.parent / "elsewhere")),
        "missing, though",
    ),
    "cut": (lambda f: os.truncate(f / SHARD, 900), "not a valid safetensors file"),
    "flipped": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1] + b"\x01"),
        "damaged: SHA-256 .* expected",
    ),
    "unknown-structure": (
        lambda f: _structures(f, lambda e: e["up"].update(structure="Linear")),
        "layer 'up': no structure is called 'Linear'; known: .*LowRank",
    ),
    "hostile-name": (
        lambda f: _structures(f, lambda e: e["up"].update(structure=["os.system"])),
        "no structure is called",
    ),
    "huge": (
        lambda f: _structures(f, lambda e: e["up"]["options"].update(rank=10**9)),
        "structure.A has shape .*, expected \\(1000000000, 8\\)",
    ),
    "strange-option": (lambda f: _structures(f, lambda e: e["up"]["options"].update(run=1)), "'up'.*run"),
    "no-layer": (lambda f: _structures(f, lambda e: e.update(gone=e.pop("up"))), "the model has no layer 'gone'"),
    "embedding": (
        lambda f: _structures(f, lambda e: e.update(embed=e.pop("up"))),
        "tensors do not fit the model: .* missing",
    ),
    "tied-to-nothing": (lambda f: _manifest(f, tied={"down.weight": "gone"}), "'down.weight' cannot share 'gone'"),
    "tensor-missing": (lambda f: _tensors(f, lambda t: t.pop("down.weight")), "1 missing .first: down.weight."),
    "tensor-extra": (
        lambda f: _tensors(f, lambda t: t.update(more=torch.ones(1))),
        "1 unexpected .first: more.",
    ),
    "misshapen": (
        lambda f: _tensors(f, lambda t: t.update({"down.weight": torch.ones(3)})),
        r"down.weight has shape \(3,\), expected \(8, 12\)",
    ),
    "not-finite": (
        lambda f: _tensors(f, lambda t: t["down.weight"].view(-1)[5].fill_(float("nan"))),
        "down.weight is not finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_nothing_is_loaded(damage, small):
    spoil, words = DAMAGE[damage]
    spoil(small)
    model = Chain()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(FileFormatError, match=words):
        st.load_compressed(small, model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"class": "OSError"}, "'OSError' is no model class of transformers"),
        ({"class": "Trainer"}, "no model class of transformers"),
        ({"class": "os.system"}, "no model class"),
        ({"class": ["LlamaForCausalLM"]}, "no model class"),
        ({"class": "BertModel"}, "model_type 'llama', expected 'bert'"),
        ({}, "give the module"),
    ],
)
def test_only_classes_of_transformers_are_made(record, words, tmp_path):
    st.save_compressed(squeezed(tiny_llama()), tmp_path / "m")
    _manifest(tmp_path / "m", model=record)
    with pytest.raises(FileFormatError, match=words):
        st.load_compressed(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map is not read"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not read"),
        ({"hidden_size": 10**12}, "has shape .*, expected|no LlamaForCausalLM can be made"),
        ({"hidden_size": "x"}, "not a configuration|no LlamaForCausalLM can be made"),
        ({"num_hidden_layers": 3}, "missing .first: model.layers.2"),
    ],
)
def test_a_hostile_configuration_is_refused(change, words, tmp_path):
    import hashlib

    folder = tmp_path / "m"
    st.save_compressed(squeezed(tiny_llama()), folder)
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(FileFormatError, match=r"config\.json: damaged"):
        st.load_compressed(folder)
    data = json.dumps(json.loads((folder / "config.json").read_text()) | change).encode()
    (folder / "config.json").write_bytes(data)
    files = json.loads((folder / "slimtune.json").read_text())["files"]
    files["config.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    _manifest(folder, files=files)
    with pytest.raises(FileFormatError, match=words):
        st.load_compressed(folder)


def test_an_adapter_folder_and_a_compressed_one_are_told_apart(small, tmp_path):
    model = Chain()
    with pytest.raises(FileFormatError, match=r"a compressed model, not an adapter: st\.load_compressed"):
        st.load(model, small)
    st.adapt(model, st.lora(rank=1), ["up"])
    st.save(model, tmp_path / "adapter")
    with pytest.raises(FileFormatError, match=r"kind 'None', expected 'compressed'; st\.load attaches it"):
        st.load_compressed(tmp_path / "adapter", Chain())
    with pytest.raises(SlimtuneError, match="carries the adapter 'default'"):
        st.load_compressed(small, model)


def test_what_cannot_be_saved_is_said_and_leaves_nothing(tmp_path):
    model = Chain()
    st.factorize(model, {"up": 2})
    st.adapt(model, st.lora(rank=1), ["up"])
    with pytest.raises(SlimtuneError, match="carries the adapter 'default'; merge or remove it"):
        st.save_compressed(model, tmp_path / "m")
    st.remove(model, "default")
    with torch.no_grad():
        model.down.weight[0, 0] = float("inf")
    with pytest.raises(SlimtuneError, match=r"down\.weight is not finite"):
        st.save_compressed(model, tmp_path / "m")
    with pytest.raises(UninitializedError, match=r"embed\.weight is on the meta device"):
        st.save_compressed(model.to("meta"), tmp_path / "m")
    model = Chain()
    hold(model.up, st.LDU(12, 8, rank=2))
    with pytest.raises(StructureError, match=r"up.structure \(LDU\) does not store its"):
        st.save_compressed(model, tmp_path / "m")
    with pytest.raises(SlimtuneError, match="no JSON data"):
        st.save_compressed(Chain(), tmp_path / "m", facts={"x": float("nan")})
    assert not list(tmp_path.iterdir())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds something else"):
        st.save_compressed(Chain(), tmp_path / "other")


# ---------------------------------------------------------------- interruptions


class Killed(BaseException):
    """As good as SIGKILL, but for what runs at once on the way out."""


def test_whatever_kills_a_save_the_old_model_or_the_new_is_there(tmp_path, monkeypatch):
    old, new = Chain(), Chain()
    st.factorize(old, {"up": 1})
    st.factorize(new, {"up": 2})
    kept = {name: getattr(os, name) for name in ("replace", "fsync")}
    outcomes = []
    for at in range(1, 60):
        path = tmp_path / str(at) / "model"
        st.save_compressed(old, path)
        calls = 0

        def counted(name, at=at):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if calls == at:
                    raise Killed
                return kept[name](*arguments)

            return call

        for name in kept:
            monkeypatch.setattr(os, name, counted(name))
        try:
            st.save_compressed(new, path)
            done = True
        except Killed:
            done = False
        for name, function in kept.items():
            monkeypatch.setattr(os, name, function)
        assert is_compressed(path)
        found = st.load_compressed(path, Chain())
        outcomes.append(found.up.structure.rank)
        same_state(found, new if outcomes[-1] == 2 else old)
        st.save_compressed(new, path)  # what was left does not stand in the way
        same_state(st.load_compressed(path, Chain()), new)
        assert [p.name for p in path.parent.iterdir()] == ["model"]
        if done:
            break
    assert done and outcomes[0] == 1 and outcomes == sorted(outcomes)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    import errno

    st.save_compressed(Chain(), tmp_path / "m")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SlimtuneError, match="the disk is full; what was there before is intact"):
        st.save_compressed(Chain(), tmp_path / "m")
    monkeypatch.undo()
    st.load_compressed(tmp_path / "m", Chain())


def test_a_writer_goes_on_where_another_of_its_kind_was_stopped(tmp_path):
    model = Chain()
    st.factorize(model, {"up": 2, "down": 2, "conv": 1}, guard=False)
    described, state = st.compress.describe_structures(model), model.state_dict()
    blocks = ["embed", "up", "down", "hf", "conv", "classifier"]

    def part(name):
        tensors = {k: t for k, t in state.items() if k.startswith(f"{name}.")}
        return tensors, {n: e for n, e in described.items() if n == name}

    first = st.CompressedWriter(tmp_path / "m", identity={"seed": 1})
    for name in blocks[:3]:
        first.add(*part(name))
        first.flush()
    first.add(*part("hf"))  # pending, lost
    damaged = sorted(first.staging.glob("compressed-*"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    again = st.CompressedWriter(tmp_path / "m", identity={"seed": 1})
    assert {key.split(".")[0] for key in again.written} == {"embed", "down"} and set(again.structures) == {"down"}
    with pytest.raises(SlimtuneError, match=r"embed\.weight comes a second time"):
        again.add({"embed.weight": state["embed.weight"]})
    for name in blocks:
        if not any(key.startswith(f"{name}.") for key in again.written):
            again.add(*part(name))
    again.finish({"class": None})
    same_state(st.load_compressed(tmp_path / "m", Chain()), model)
    third = st.CompressedWriter(tmp_path / "m", identity={"seed": 2})
    third.add({"x": torch.ones(1)})
    third.flush()
    assert not st.CompressedWriter(tmp_path / "m", identity={"seed": 3}).written


# ---------------------------------------------------------------- plain folders


@models
def test_a_plain_folder_loads_cleanly_and_computes_the_same(kind, tmp_path):
    model = squeezed(MODELS[kind]())
    before = {k: t.clone() for k, t in model.state_dict().items()}
    report = st.save_expanded(model, tmp_path / "plain")
    assert report.layers and not report.flags and report.difference < 1e-5
    again, found = type(model).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = inputs_of(model)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        st.save_expanded(model, tmp_path / "plain")


def _with_bias(model, name):
    layer = model.get_submodule(name)
    structure = st.LowRank(layer.out_features, layer.in_features, rank=2)
    for p in structure.parameters():
        nn.init.normal_(p)
    hold(layer, structure, torch.randn(layer.out_features))


def test_biases_that_factorising_added_get_their_flag(tmp_path):
    model = tiny_llama()
    _with_bias(model, "model.layers.0.self_attn.o_proj")
    report = st.save_expanded(model, tmp_path / "one")
    assert report.flags == ["attention_bias"] and "model.layers.1.self_attn.q_proj.bias" in report.zeros
    _with_bias(model, "model.layers.1.mlp.up_proj")
    report = st.save_expanded(model, tmp_path / "two")
    assert report.flags == ["attention_bias", "mlp_bias"]
    again, ids = type(model).from_pretrained(tmp_path / "two").eval(), torch.randint(0, 31, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not model.config.attention_bias  # the model's own configuration is left alone


def test_a_bias_without_a_place_is_refused(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=31, num_key_value_heads=1, **sizes))
    _with_bias(model, "model.layers.0.mlp.up_proj")
    with pytest.raises(StructureError, match=r"'model.layers.0.mlp.up_proj': .* no place .*add_bias=False"):
        st.save_expanded(model, tmp_path / "plain")
    with pytest.raises(ConfigError, match="Chain is no class of transformers"):
        st.save_expanded(Chain(), tmp_path / "plain")
    assert not list(tmp_path.iterdir())
    st.save_compressed(model, tmp_path / "small")  # which has a place for every bias
    same_state(st.load_compressed(tmp_path / "small"), model)


# ---------------------------------------------------------------- under the application


def test_heads_are_drawn_where_a_body_is_loaded(tmp_path):
    from transformers import BertForSequenceClassification, BertModel

    body = squeezed(tiny_bert())
    st.save_compressed(body, tmp_path / "body")
    model, fresh = load_with_head(tmp_path / "body", BertForSequenceClassification, seed=3, num_labels=4)
    assert fresh == {"classifier.weight", "classifier.bias"} and model.classifier.weight.shape == (4, 16)
    assert model.classifier.weight.std() > 0 and not model.classifier.bias.any()
    assert torch.equal(
        model.classifier.weight,
        load_with_head(tmp_path / "body", BertForSequenceClassification, seed=3, num_labels=4)[0].classifier.weight,
    )
    same_state(model.bert, body)
    squeezed_head = {"classifier": 2}
    st.factorize(model, squeezed_head, guard=False)
    st.save_compressed(model, tmp_path / "headed")
    same_state(st.load_compressed(tmp_path / "headed"), model)
    other, fresh = load_with_head(tmp_path / "headed", BertForSequenceClassification, num_labels=2)
    assert fresh == {"classifier.weight", "classifier.bias"} and type(other.classifier) is nn.Linear
    same_state(other.bert, body)
    kept, fresh = load_with_head(tmp_path / "headed", BertForSequenceClassification, num_labels=4)
    assert not fresh and isinstance(kept.classifier, Structured)
    back, fresh = load_with_head(tmp_path / "headed", BertModel)
    assert not fresh
    same_state(back, body)


def test_compress_train_merge_verify_in_one_flow(tmp_path):
    from transformers import LlamaForCausalLM

    from slimtune.app.loading import load_run
    from slimtune.app.merge import merge_run
    from slimtune.app.train import train
    from slimtune.app.verify import verify
    from tinyrun import make_llama, make_text, text_config

    source, text = make_llama(tmp_path / "llama"), make_text(tmp_path / "data.jsonl")
    model = LlamaForCausalLM.from_pretrained(source)
    names = [n for n, m in own_modules(model).items() if isinstance(m, nn.Linear) and "lm_head" not in n]
    st.factorize(model, dict.fromkeys(names, 4))
    st.save_compressed(model, tmp_path / "small", processing=source)
    assert verify(tmp_path / "small").ok
    run = tmp_path / "run"
    train(text_config(tmp_path / "small", text, run, max_steps=3, save_steps=3, eval_steps=3))
    loaded = load_run(run)
    assert len(loaded.layers) == len(names) and not loaded.warnings
    assert verify(run).ok
    assert Path(json.loads((run / "adapter" / "slimtune.json").read_text())["base"]["name_or_path"]).name == "small"
    result = merge_run(run, tmp_path / "merged")
    assert result.difference < 1e-4 and is_compressed(tmp_path / "merged") and not result.densified
    report = verify(tmp_path / "merged")
    assert report.ok, str(report)
    again = load_run(tmp_path / "merged").model
    assert again.model.layers[0].self_attn.q_proj.structure.rank == 6  # 4 + 2
    alone = load_run(run / "adapter").model  # by the base that its manifest names
    ids = torch.randint(3, 11, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.structure.A.mul_(1.5)
    st.save_compressed(model, tmp_path / "small", processing=source)
    assert "other base weights" in load_run(run).warnings[0] and not verify(run).ok
    shard = tmp_path / "merged" / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert not verify(tmp_path / "merged").ok
