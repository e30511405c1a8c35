"""Adapters on disk: round trip, damage, hostile files, interrupted saves."""

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import slimtune as st
from cases import DORA, LORA, Chain, adapt, adapted, layers, methods, shake


def saved_chain(method, folder, dtype=torch.float32):
    torch.manual_seed(0)
    base = Chain(dtype).eval()
    model = copy.deepcopy(base)
    adapt(model, method.recipe(), Chain.targets_of(method), modules_to_save=["classifier"])
    shake(model)
    st.save(model, folder)
    return model, base, Chain.ids()


@methods
@layers
def test_round_trip_on_every_layer(method, layer, tmp_path):
    model, x = adapted(method, layer, torch.float32)
    y = model(x)
    st.save(model, tmp_path / "a")
    st.remove(model, "default")
    assert st.load(model, tmp_path / "a", "other") == ["layer"]
    assert torch.equal(model(x), y)
    assert {n for n, _ in st.trainable_parameters(model)} == {n for n, _ in model.named_parameters() if ".other." in n}


@methods
def test_round_trip_of_a_model(method, tmp_path):
    model, base, ids = saved_chain(method, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "slimtune.json",
    ]
    st.load(base, tmp_path)
    assert torch.equal(base(ids), model(ids))
    again = tmp_path / "again"
    st.save(base, again)
    assert (again / "adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()


def test_patterns_survive(tmp_path):
    base = Chain()
    model = copy.deepcopy(base)
    recipe = st.lora(rank=2, rank_pattern={"up": 5, "hf": 3}, alpha_pattern={"conv": 7})
    st.adapt(model, recipe, Chain.targets)
    ranks = {r.name: r.rank for r in st.summary(model).rows}
    assert ranks == {"embed": 2, "up": 5, "down": 2, "hf": 3, "conv": 2}
    assert model.up.adapters["default"].scale.item() == 2 and model.conv.adapters["default"].scale.item() == 3.5
    shake(model)
    st.save(model, tmp_path)
    st.load(base, tmp_path)
    ids = Chain.ids()
    assert torch.equal(base(ids), model(ids))


def test_bf16_base_keeps_fp32_adapters(tmp_path):
    model, base, ids = saved_chain(DORA, tmp_path, torch.bfloat16)
    assert all(
        t.dtype == torch.float32 for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora" in k
    )
    st.load(base, tmp_path)
    assert torch.equal(base(ids), model(ids))


def test_saving_again_replaces_and_leaves_other_files(tmp_path):
    model, base, ids = saved_chain(LORA, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    shake(model)
    st.save(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    st.load(base, tmp_path)
    assert torch.equal(base(ids), model(ids))


def test_another_base_warns(tmp_path):
    _model, base, _ = saved_chain(LORA, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        st.load(copy.deepcopy(base), tmp_path)
        st.load(copy.deepcopy(base).bfloat16(), tmp_path)
    with torch.no_grad():
        base.up.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="other base weights"):
        st.load(base, tmp_path)


# ---------------------------------------------------------------- damage

FILES = ["adapter_model.safetensors", "adapter_config.json", "README.md", "slimtune.json"]


def refuse(base, folder, match):
    before = {n: t.clone() for n, t in base.state_dict().items()}
    kinds = {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(st.FileFormatError, match=match):
        st.load(base, folder)
    assert {n: type(m) for n, m in base.named_modules()} == kinds
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_damage_is_named(tmp_path, file, damage):
    _, base, _ = saved_chain(LORA, tmp_path)
    path = tmp_path / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    data = {"truncate": data[:-3], "empty": b""}.get(damage, data)
    path.unlink() if damage == "delete" else path.write_bytes(data)
    if file == "slimtune.json" and damage == "delete":
        st.load(base, tmp_path)  # a folder without manifest is PEFT's
        return
    refuse(base, tmp_path, "slimtune.json|" + file.replace(".", r"\."))


def rewrite(folder, edit_config=None, edit_tensors=None):
    """Damage that hashes do not see: a folder without manifest, as if PEFT had written it."""
    (folder / "slimtune.json").unlink(missing_ok=True)
    if edit_config:
        config = json.loads((folder / "adapter_config.json").read_text())
        edit_config(config)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if edit_tensors:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit_tensors(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")


UP_A = "base_model.model.up.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("base_model.model.up.lora_B.weight"), "1 missing .first: up.structure.B"),
        (lambda t: t.update({"base_model.model.up.lora_C.weight": torch.zeros(1)}), "unexpected tensor .*lora_C"),
        (lambda t: t.update({UP_A: torch.zeros(3, 9)}), r"up.structure.A has shape \(3, 9\), expected \(3, 8\)"),
        (lambda t: t.update({UP_A: torch.zeros(4, 8)}), r"up.structure.A has shape \(4, 8\), expected \(3, 8\)"),
        (lambda t: t.update({UP_A: t[UP_A] * float("nan")}), "24 values that are not finite"),
        (lambda t: [t.update({k.replace("model.up", "model.nope"): t.pop(k)}) for k in list(t)], "no layer 'nope'"),
        (lambda t: [t.update({k.removeprefix("base_model.model."): t.pop(k)}) for k in list(t)], "does not start with"),
        (lambda t: t.clear(), "holds no lora_A"),
        (lambda t: t.pop("base_model.model.classifier.bias"), "classifier.saved.bias"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, edit, match):
    _, base, _ = saved_chain(LORA, tmp_path)
    rewrite(tmp_path, edit_tensors=edit)
    refuse(base, tmp_path, match)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c.update(peft_type="SINGLORA"), "peft_type 'SINGLORA'"),
        (lambda c: c.update(r=10**9), "shape"),
        (lambda c: c.update(r="8"), "rank of .* whole number"),
        (lambda c: c.update(r=-1), "rank of .* must be at least 1, got -1"),
        (lambda c: c.update(lora_alpha="x"), "alpha of .* must be a number"),
        (lambda c: c.update(lora_dropout=7), "dropout must be a number in"),
        (lambda c: c.update(lora_bias=True), "lora_bias = True changes the adapter"),
        (lambda c: c.update(bias="all"), "bias = 'all'"),
        (lambda c: c.update(target_parameters=["x"]), "target_parameters"),
        (lambda c: c.update(init_lora_weights="pissa"), "edits the base weights"),
        (lambda c: c.update(rank_pattern={"(([a-z0-9_.])+)+!": 4}), "not a name or a simple pattern"),
        (lambda c: c.update(rank_pattern=[1]), "rank_pattern must be a table"),
        (lambda c: c.update(modules_to_save="classifier"), "modules_to_save must be a list"),
    ],
)
def test_wrong_configs_are_named(tmp_path, edit, match):
    _, base, _ = saved_chain(LORA, tmp_path)
    rewrite(tmp_path, edit_config=edit)
    refuse(base, tmp_path, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[]", "expected a JSON object, found list"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"r": 1, "r": 2}', "'r' comes twice"),
        (b'{"r": NaN}', "NaN is not JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{" + b" " * (17 * 2**20) + b"}", "at most|larger"),
    ],
)
def test_hostile_json(tmp_path, text, match):
    _, base, _ = saved_chain(LORA, tmp_path)
    (tmp_path / "slimtune.json").unlink()
    (tmp_path / "adapter_config.json").write_bytes(text)
    refuse(base, tmp_path, match)
    if match != "'r' comes twice" and b"r" not in text:
        saved_chain(LORA, tmp_path)
        (tmp_path / "slimtune.json").write_bytes(text)
        refuse(base, tmp_path, "slimtune.json")


def test_hostile_own_format(tmp_path):
    """A description may name only known classes and options, and sizes the tensors have."""

    class Half(st.Composition):
        """W + dW / 2: a composition PEFT does not have."""

        def weight(self, W, dW):
            return W + dW / 2

    torch.manual_seed(0)
    base = Chain()
    model = copy.deepcopy(base)
    st.adapt(
        model, st.Recipe(st.LowRank, {"rank": 3}, Half, dropout=0.1), Chain.targets, modules_to_save=["classifier"]
    )
    shake(model)
    st.save(model, tmp_path)
    st.load(base, tmp_path)
    ids = Chain.ids()
    assert torch.equal(base.eval()(ids), model.eval()(ids))
    st.remove(base, "default")
    with pytest.raises(st.StructureError, match="cannot be written for PEFT"):
        st.export_peft(model, tmp_path / "peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def attempt(match, **changes):
        own = copy.deepcopy(config)
        for dotted, value in changes.items():
            *path, last = dotted.split("__")
            at = own["slimtune"]
            for key in path:
                at = at[key]
            at[last] = value
        rewrite(tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(own))
        refuse(base, tmp_path, match)

    attempt("unknown structure 'os'", recipe__structure="os")
    attempt("unknown structure", recipe__structure=["x"])
    attempt("unknown structure 'Structure'", recipe__structure="Structure")
    attempt("unknown composition 'Linear'", recipe__composition="Linear")
    attempt("no option 'device'", layers__up__options={"device": "cuda"})
    attempt("shape", layers__up__options={"rank": 10**9})
    attempt("rank must be a whole number", layers__up__options={"rank": 1.5})
    attempt("scale must be a number", layers__up__scale="1")
    attempt("no layer '../up'", layers={"../up": config["slimtune"]["layers"]["up"]})
    attempt("lacks or misplaces", layers={"up": None})
    attempt("modules_to_save must be a list", modules_to_save="classifier")
    attempt("no module 'nope'", modules_to_save=["nope"])
    attempt("unknown field 'x'", recipe__x=1)


def test_not_files(tmp_path):
    _, base, _ = saved_chain(LORA, tmp_path)
    with pytest.raises(st.FileFormatError, match="no such folder"):
        st.load(base, tmp_path / "nope")
    with pytest.raises(st.FileFormatError, match="no such folder"):
        st.load(base, "a\0b")
    (tmp_path / "slimtune.json").unlink()
    target = tmp_path / "adapter_model.safetensors"
    data = target.read_bytes()
    target.unlink()
    os.mkfifo(target)
    refuse(base, tmp_path, "not a regular file")
    target.unlink()
    target.write_bytes((10**12).to_bytes(8, "little") + data)
    refuse(base, tmp_path, "not a valid safetensors file")


@pytest.mark.parametrize("name", ["a/b", "../a", "/tmp/a", "", "a.b", "keys", "a" * 65, None, "a\0"])
def test_adapter_names(name, tmp_path):
    model, base, _ = saved_chain(LORA, tmp_path)
    with pytest.raises(st.AdapterNameError, match="adapter name"):
        st.load(base, tmp_path, name)
    with pytest.raises(st.AdapterNameError, match="adapter name"):
        st.adapt(base, st.lora(), name=name)
    with pytest.raises(st.AdapterNameError, match="'default' is taken"):
        st.load(model, tmp_path)
    with pytest.raises(st.AdapterNameError, match="no adapter named 'x'; attached: default"):
        st.save(model, tmp_path / "x", "x")
    assert not (tmp_path / "x").exists()


def test_nan_is_not_saved(tmp_path):
    model, _, _ = saved_chain(LORA, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        model.up.adapters["default"].structure.A[0, 0] = float("inf")
    with pytest.raises(st.SlimtuneError, match=r"up\.structure\.A is not finite"):
        st.save(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


# ---------------------------------------------------------------- interrupted saves

KILLED_SAVE = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from cases import DORA, LORA, METHODS, Chain, shake
import slimtune as st

folder, deadline = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = Chain()
st.adapt(model, LORA.recipe(), Chain.targets)
shake(model)
calls = 0

def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == deadline:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)
st.save(model, folder)
print("finished", calls)
"""


def test_kill_during_save_leaves_the_old_or_the_new(tmp_path):
    """kill -9 at every file operation of a save: the folder loads as the old adapter or as the new one."""
    script = tmp_path / "save.py"
    script.write_text(textwrap.dedent(KILLED_SAVE.format(tests=os.path.dirname(__file__))))
    torch.manual_seed(0)
    base = Chain()
    new = copy.deepcopy(base)
    st.adapt(new, LORA.recipe(), Chain.targets)
    shake(new)
    old = copy.deepcopy(base)
    st.adapt(old, st.dora(rank=2), Chain.targets)
    shake(old)
    ids = Chain.ids()
    seen, finished = set(), False
    for deadline in (1, 3, 4, 5, 6, 7, 8, 9, 10, 99):
        folder = tmp_path / str(deadline)
        st.save(old, folder)
        run = subprocess.run([sys.executable, script, folder, str(deadline)], capture_output=True, text=True)
        finished = "finished" in run.stdout
        assert finished or run.returncode == -signal.SIGKILL, run.stderr
        for _ in range(2):
            model = copy.deepcopy(base)
            st.load(model, folder)
            y = model(ids)
            assert torch.equal(y, old(ids)) or torch.equal(y, new(ids))
            seen.add("new" if torch.equal(y, new(ids)) else "old")
            st.save(model, folder)  # what was interrupted does not stand in the way of the next save
            assert not list(folder.glob(".*"))
        if finished:
            break
    assert seen == {"old", "new"} and finished


def test_full_disk_and_read_only(tmp_path, monkeypatch):
    model, base, ids = saved_chain(LORA, tmp_path)
    y = model(ids)
    shake(model)
    real = os.fsync
    for fail_at in (1, 2, 3, 4):
        count = 0

        def full(fd, fail_at=fail_at):
            nonlocal count
            count += 1
            if count == fail_at:
                raise OSError(28, "No space left on device")
            real(fd)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(st.SlimtuneError, match="the disk is full; what was there before is intact"):
            st.save(model, tmp_path)
        monkeypatch.setattr(os, "fsync", real)
        again = copy.deepcopy(base)
        st.load(again, tmp_path)
        assert torch.equal(again(ids), y)
        assert not list(tmp_path.glob(".*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(st.SlimtuneError, match="cannot be written"):
        st.save(model, tmp_path / "file")
