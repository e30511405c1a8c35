"""Any adapter as plain LoRA: read by PEFT, exact where algebra has it, otherwise as good as an SVD, or refused."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slimtune as st
import tinyrun
from cases import Chain, adapt, methods, shake
from slimtune import cli, files, io
from slimtune.app.verify import verify
from slimtune.targets import hosts

peft = pytest.importorskip("peft")

EVERYTHING = {"rank": 64, "tolerance": 1e-5}


def saved(folder, recipe, targets=("up", "down"), base=None, **options):
    """A base model, the same with an adapter that is not zero, and that adapter in a folder."""
    torch.manual_seed(0)
    base = Chain().eval() if base is None else base
    model = copy.deepcopy(base)
    adapt(model, recipe, targets, **options)
    shake(model)
    st.save(model, folder)
    return base, model.eval()


def changes(model):
    """W' - W in fp64 by layer, through the definition."""
    plain = {n: type(h).layout(copy.deepcopy(h)).weight(torch.float64) for n, h in hosts(model).items()}
    return {n: (h.map().weight(torch.float64) - plain[n]).detach() for n, h in hosts(model).items()}


def in_peft(base, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


# ---------------------------------------------------------------- every method


@methods
def test_converted_to_what_peft_computes(method, tmp_path):
    targets = Chain.targets_of(method)
    base, model = saved(tmp_path / "own", method.recipe(), targets, modules_to_save=["classifier"])
    recipe = model.get_submodule(targets[-1]).adapters["default"].recipe
    alone = recipe.composition is st.Additive and recipe.structure is not st.LDU
    if not alone:
        with pytest.raises(st.ConfigError, match=f"the base is needed because {recipe.name}"):
            st.convert(tmp_path / "own", tmp_path / "lora", **EVERYTHING)
    report = st.convert(tmp_path / "own", tmp_path / "lora", **EVERYTHING, model=None if alone else base)
    assert report.error <= report.worst.error <= 1e-6
    assert "classifier" in report.notes[0]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", report.rank, report.rank)
    assert not any(config[key] for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"))
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in stored.items() if "lora_A" in key or "embedding_A" in key} == {report.rank}
    assert sum(t.numel() for key, t in stored.items() if "lora_" in key) == report.numbers
    ids = Chain.ids()
    with torch.no_grad():
        want = model(ids)
        torch.testing.assert_close(in_peft(base, tmp_path / "lora")(ids), want, rtol=1e-5, atol=1e-5)
        st.load(base, tmp_path / "lora")
        torch.testing.assert_close(base(ids), want, rtol=1e-5, atol=1e-5)


@methods
def test_no_rank_does_better(method):
    """The measured error is that of the best approximation, by an SVD of the definition (Eckart and Young)."""
    torch.manual_seed(0)
    model = Chain(torch.float64).eval()
    adapt(model, method.recipe(), Chain.targets_of(method))
    shake(model)
    before = changes(model)
    report = st.to_lora(model, rank=2, tolerance=10.0)
    after = changes(model)
    for entry in report.layers:
        dW = before[entry.name]
        values = torch.linalg.svdvals(dW)
        best = float(values[2:].norm() / values.norm())
        assert entry.rank <= 2 and abs(entry.error - best) < 1e-7
        for rank, error in entry.errors.items():
            assert abs(error - float(values[rank:].norm() / values.norm())) < 1e-7
        assert abs(float((after[entry.name] - dW).norm() / dW.norm()) - best) < 1e-7
        assert entry.norm == pytest.approx(float(dW.norm()))


@pytest.mark.parametrize(
    ("recipe", "rank"),
    [
        (st.lora(rank=3), 3),
        (st.gralora(rank=4, k=2), 8),
        (st.bone(rank=4), 4),
        (st.loha(rank=2), 4),
        (st.singlora(rank=3), 3),
        (st.loldu(rank=3), 3),
        (st.loha(rank=3), 8),  # no more than the smaller side, though algebra says 9
    ],
    ids=lambda value: value.name if isinstance(value, st.Recipe) else str(value),
)
def test_exact_at_the_rank_of_the_algebra(recipe, rank):
    torch.manual_seed(0)
    model = Chain().eval()
    st.adapt(model, recipe, ["up"])
    shake(model)
    before = changes(model)["up"]
    (entry,) = st.to_lora(model).layers
    assert (entry.how, entry.rank, entry.method) == ("exact", rank, recipe.name)
    after = changes(model)["up"]
    assert (after - before).norm() / before.norm() < 1e-6
    adapter = model.up.adapters["default"]
    assert adapter.scale == 1 and adapter.recipe.name == "lora"
    assert [n for n, p in st.trainable_parameters(model)] == [f"up.adapters.default.structure.{k}" for k in "AB"]


# ---------------------------------------------------------------- tolerance and rank


def test_refused_above_the_tolerance_with_the_rank_that_does(tmp_path):
    saved(tmp_path / "own", st.c3a(block=2))
    with pytest.raises(
        st.VerificationError, match=r"2 of 2 layers exceed the tolerance 0.01 at rank 1.*Rank (\d+) does"
    ):
        st.convert(tmp_path / "own", tmp_path / "lora", rank=1, tolerance=0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]
    report = None
    for rank in range(1, 9):
        try:
            report = st.convert(tmp_path / "own", tmp_path / "lora", rank=rank, tolerance=0.5)
            break
        except st.VerificationError as error:
            said = int(str(error).split("Rank ")[1].split()[0])
    assert report is not None and report.rank == said == rank > 1


def test_default_is_the_smallest_rank_within_the_tolerance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40))
    st.adapt(model, st.dora(rank=2), ["0"])
    shake(model)
    with torch.no_grad():
        model[0].adapters["default"].composition.magnitude.mul_(1.01)
    values = torch.linalg.svdvals(changes(model)["0"])
    tail = [float(values[r:].norm() / values.norm()) for r in range(40)]
    tolerance = (tail[6] + tail[5]) / 2
    (entry,) = st.to_lora(copy.deepcopy(model), tolerance=tolerance).layers
    assert (entry.how, entry.rank, entry.needed) == ("fitted", 6, 6)
    before = changes(model)["0"]
    with pytest.raises(st.VerificationError, match=r"more numbers.*Largest error at rank 8: 0\.\d+, 16: 0"):
        st.to_lora(model, tolerance=1e-6)
    assert torch.equal(changes(model)["0"], before)
    st.to_lora(model, rank=40, tolerance=1e-6)  # whoever asks for it gets it


def test_one_rank_for_all_rounded_up(tmp_path):
    base, model = saved(tmp_path / "own", st.lora(rank=3, alpha=5, rank_pattern={"down": 5}), ["up", "down"])
    report = st.convert(tmp_path / "own", tmp_path / "lora", multiple=8)
    assert report.rank == 8 and [entry.rank for entry in report.layers] == [3, 5]
    ids = Chain.ids()
    with torch.no_grad():
        torch.testing.assert_close(in_peft(base, tmp_path / "lora")(ids), model(ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": 1.5}, {"multiple": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}], ids=str
)
def test_impossible_options(wrong, tmp_path):
    saved(tmp_path / "own", st.lora(rank=2))
    with pytest.raises(st.StructureError, match=next(iter(wrong))):
        st.convert(tmp_path / "own", tmp_path / "lora", **wrong)


def test_no_change_converts_to_no_change(tmp_path):
    torch.manual_seed(0)
    model = Chain()
    for number, recipe in enumerate((st.lora(rank=2), st.c3a(block=2), st.loha(rank=4))):
        st.adapt(model, recipe, ["up"])
        st.save(model, tmp_path / f"own{number}")
        st.remove(model, "default")
        report = st.convert(tmp_path / f"own{number}", tmp_path / f"lora{number}")
        assert report.error == 0 and report.layers[0].norm == 0
        assert "the adapter changes nothing" in str(report)


# ---------------------------------------------------------------- what is below and above


def test_scale_as_it_stands(tmp_path):
    base, model = saved(tmp_path / "own", st.singlora(rank=2))
    for host in hosts(model).values():
        host.adapters["default"].scale.fill_(0.37)
    st.save(model, tmp_path / "own")
    st.convert(tmp_path / "own", tmp_path / "lora")
    st.load(base, tmp_path / "lora")
    assert base.up.adapters["default"].scale == 1
    ids = Chain.ids()
    torch.testing.assert_close(base(ids), model(ids), rtol=1e-6, atol=1e-6)


def test_in_a_stack():
    """A magnitude reads the weights below it, other adapters included; one above it sees the same map as before."""
    torch.manual_seed(0)
    model = Chain(torch.float64).eval()
    for name, recipe in (("a", st.lora(rank=2)), ("b", st.dora(rank=2)), ("c", st.bora(rank=2))):
        st.adapt(model, recipe, ["up", "down"], name)
        shake(model)
    ids = Chain.ids()
    want = model(ids)
    st.to_lora(model, "b", rank=8)
    assert st.adapter_names(model) == ["a", "b", "c"] and model.up.active_adapters == ("a", "b", "c")
    torch.testing.assert_close(model(ids), want)


def test_the_given_model_is_left_as_it_was(tmp_path):
    base, model = saved(tmp_path / "own", st.dora(rank=2))
    st.adapt(base, st.lora(rank=1), ["up"], "other")
    shake(base)
    state = {k: t.clone() for k, t in base.state_dict().items()}
    trained = [n for n, _ in st.trainable_parameters(base)]
    st.convert(tmp_path / "own", tmp_path / "lora", **EVERYTHING, model=base)
    assert [n for n, _ in st.trainable_parameters(base)] == trained
    assert base.up.active_adapters == ("other",) and type(base.down) is nn.Linear
    assert all(torch.equal(t, state[k]) for k, t in base.state_dict().items()) and len(base.state_dict()) == len(state)
    st.remove(base, "other")
    ids = Chain.ids()
    with torch.no_grad():
        torch.testing.assert_close(in_peft(base, tmp_path / "lora")(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_names_that_are_suffixes_of_others(tmp_path):
    """Without the model, the targets are those that were written with it."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.block = nn.Sequential()
            self.block.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.block(torch.tanh(self.fc(x)))

    base, model = saved(tmp_path / "own", st.gralora(rank=2, k=2), r"^fc$", Two())
    assert st.convert(tmp_path / "own", tmp_path / "lora").base is None
    theirs = in_peft(base, tmp_path / "lora")
    assert theirs.targeted_module_names == ["fc"]
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- PEFT's folders


@pytest.mark.parametrize("targets", [["up", "down"], [*Chain.targets]], ids=["linear", "all"])
@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True, "rank_pattern": {"up": 5}, "alpha_pattern": {"down": 9}},
        {"use_dora": True},
        {"modules_to_save": ["classifier"]},
    ],
    ids=["rslora", "dora", "head"],
)
def test_folders_of_peft(fields, targets, tmp_path):
    torch.manual_seed(0)
    base = Chain().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=targets, **fields)).eval()
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
        theirs.save_pretrained(tmp_path / "theirs")
    alone = "use_rslora" in fields and targets == ["up", "down"]
    if not alone:
        with pytest.raises(st.ConfigError, match="the base is needed because"):
            st.convert(tmp_path / "theirs", tmp_path / "lora")
    report = st.convert(tmp_path / "theirs", tmp_path / "lora", **EVERYTHING, model=None if alone else base)
    assert report.worst.error < 1e-6
    ids = Chain.ids()
    with torch.no_grad():
        torch.testing.assert_close(in_peft(base, tmp_path / "lora")(ids), theirs(ids), rtol=1e-5, atol=1e-5)


OTHERS = {
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["up", "down"], init_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["up", "down"], init_weights=False),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=["up", "down"], init_weights=False),
    "miss": lambda: peft.MissConfig(r=4, target_modules=["up", "down"]),
    "bat": lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=["up", "down"]),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=["up", "down"], init_weights="gaussian"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_types_of_peft(kind, tmp_path):
    torch.manual_seed(0)
    base = Chain().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), OTHERS[kind]()).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    report = st.convert(tmp_path / "theirs", tmp_path / "lora", **EVERYTHING, model=base)
    assert {entry.how for entry in report.layers} == {"fitted" if kind in ("bat", "c3a") else "exact"}
    ids = Chain.ids()
    with torch.no_grad():
        torch.testing.assert_close(in_peft(base, tmp_path / "lora")(ids), theirs(ids), rtol=1e-5, atol=1e-5)


def test_folders_that_peft_wrote_for_slimtune(tmp_path):
    from slimtune.hf import SlimtuneConfig

    torch.manual_seed(0)
    base = Chain().eval()
    config = SlimtuneConfig(recipe=st.gralora(rank=4, k=2), target_modules=["up"], modules_to_save=["classifier"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    report = st.convert(tmp_path / "theirs", tmp_path / "lora")
    assert (report.base, report.layers[0].how) == (None, "exact")
    ids = Chain.ids()
    with torch.no_grad():
        torch.testing.assert_close(in_peft(base, tmp_path / "lora")(ids), theirs(ids), rtol=1e-6, atol=1e-6)


def test_half_precision_bases(tmp_path):
    """The fit is of the change in fp64, of whatever weights there are."""
    base, model = saved(tmp_path / "own", st.dora(rank=2), base=Chain(torch.bfloat16).eval())
    report = st.convert(tmp_path / "own", tmp_path / "lora", **EVERYTHING, model=base)
    assert report.worst.error < 1e-6
    want = changes(model)
    st.load(base, tmp_path / "lora")
    for name, dW in changes(base).items():
        assert (dW - want[name]).norm() < 1e-6 * want[name].norm()


# ---------------------------------------------------------------- refusals


def test_nothing_to_convert(tmp_path):
    with pytest.raises(st.ConfigError, match="no such folder"):
        st.convert(tmp_path / "nowhere", tmp_path / "out")
    saved(tmp_path / "own", st.lora(rank=2))
    with pytest.raises(st.ConfigError, match="'lora' is the one form"):
        st.convert(tmp_path / "own", tmp_path / "out", to="dora")
    with pytest.raises(st.ConfigError, match="not an empty folder"):
        st.convert(tmp_path / "own", tmp_path / "own")
    (tmp_path / "file").write_text("x")
    with pytest.raises(st.SlimtuneError, match="cannot be written"):
        st.convert(tmp_path / "own", tmp_path / "file" / "out")
    (tmp_path / "model").mkdir()
    save_file({"weight": torch.zeros(2)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(st.ConfigError, match="nothing to convert"):
        st.convert(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_grouped_convolutions_are_refused(tmp_path):
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    saved(tmp_path / "own", st.lora(rank=2), ["0"], base)
    with pytest.raises(st.StructureError, match="0 is a grouped convolution"):
        st.convert(tmp_path / "own", tmp_path / "out", model=base)
    assert not (tmp_path / "out").exists()


def edit(folder, change):
    """Rewrite a manifest."""
    file = folder / files.MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest["adapter"]["layers"])
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("field", "value", "kind", "said"),
    [
        ("shape", [12, 9], st.FileFormatError, "structure.A has shape"),
        ("shape", [2**30, 2**30], st.ConfigError, "gives up a shape of"),
        ("shape", [12, 8.0], st.FileFormatError, "shape must be a list of sizes"),
        ("shape", "8", st.FileFormatError, "shape must be a list of sizes"),
        ("shape", [12, -8], st.FileFormatError, "shape must be a list of sizes"),
        ("shape", None, None, ""),
        ("kind", "os.system", st.ConfigError, "unknown kind, 'os.system'"),
        ("kind", ["Linear"], st.ConfigError, "unknown kind"),
        ("kind", "Conv", st.ConfigError, "unknown kind"),
        ("options", {"rank": 10**9}, st.FileFormatError, "shape"),
    ],
    ids=str,
)
def test_hostile_sizes(field, value, kind, said, tmp_path):
    base, _ = saved(tmp_path / "own", st.lora(rank=2), ["up"])
    edit(tmp_path / "own", lambda layers: layers["up"].update({field: value}))
    if kind is None:  # a manifest of slimtune 0.1
        with pytest.raises(st.ConfigError, match="does not tell the sizes"):
            st.convert(tmp_path / "own", tmp_path / "out")
        st.convert(tmp_path / "own", tmp_path / "out", model=base)
        return
    with pytest.raises(kind, match=said):
        st.convert(tmp_path / "own", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a." * 5000 + "b", "forward", "up..x", "up.weight", "", ".", "train.x"])
def test_hostile_names(name, tmp_path):
    saved(tmp_path / "own", st.lora(rank=2), ["up"])
    file = tmp_path / "own" / files.TENSORS
    tensors = {key.replace(".up.", f".{name}."): t for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    edit(tmp_path / "own", lambda layers: layers.update({name: layers.pop("up")}))
    manifest = json.loads((tmp_path / "own" / files.MANIFEST).read_text())
    manifest["files"][files.TENSORS] = {"sha256": files.sha256(file.read_bytes()), "bytes": file.stat().st_size}
    (tmp_path / "own" / files.MANIFEST).write_text(json.dumps(manifest))
    try:
        st.convert(tmp_path / "own", tmp_path / "out")
    except st.SlimtuneError:
        assert not (tmp_path / "out").exists()
    else:
        assert list(io.read_description(tmp_path / "out")[0].layers) == [name]


def test_damage_is_found(tmp_path, monkeypatch):
    saved(tmp_path / "own", st.lora(rank=2))
    file = tmp_path / "own" / files.TENSORS
    good = file.read_bytes()
    file.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    with pytest.raises(st.FileFormatError, match="damaged"):
        st.convert(tmp_path / "own", tmp_path / "out")
    file.write_bytes(good)
    write = io.write_files

    def careless(folder, contents, manifest):
        data = contents[files.TENSORS]
        write(folder, {**contents, files.TENSORS: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]}, manifest)

    monkeypatch.setattr(io, "write_files", careless)
    with pytest.raises(st.VerificationError, match="reads back with other numbers"):
        st.convert(tmp_path / "own", tmp_path / "out")


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model folder, and folders with a DoRA and a GraLoRA adapter of it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("convert")
    base = AutoModelForCausalLM.from_pretrained(tinyrun.make_llama(folder / "model")).eval()
    for name, recipe in (("dora", st.dora(rank=2)), ("gralora", st.gralora(rank=4, k=2))):
        saved(folder / name, recipe, r"_proj$", base)
    return folder


def test_command(llama, tmp_path, capsys):
    assert cli.main(["convert", str(llama / "gralora"), "--output", str(tmp_path / "lora"), "--multiple", "16"]) == 0
    said = capsys.readouterr().out
    assert "14 layers to LoRA of rank 16" in said and "14 exact" in said and "read back" in said
    assert verify(tmp_path / "lora").ok
    manifest = json.loads((tmp_path / "lora" / "slimtune.json").read_text())
    assert manifest["base"] == json.loads((llama / "gralora" / "slimtune.json").read_text())["base"]
    assert manifest["converted"]["from"] == ["gralora"] and manifest["converted"]["layers"][0]["how"] == "exact"


def test_command_with_the_recorded_base(llama, tmp_path, capsys):
    words = ["convert", str(llama / "dora"), "--output", str(tmp_path / "lora"), "--rank", "2", "--tolerance"]
    assert cli.main([*words, "1e-3"]) == 3
    assert "14 of 14 layers exceed the tolerance 0.001 at rank 2" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert cli.main([*words, "1e-5", "--rank", "999", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["base"] == "dora (Magnitude) acts on its weights"
    assert report["effect"] > 0.01 and report["difference"] < 1e-5
    assert verify(tmp_path / "lora").ok
