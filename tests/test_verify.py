"""What verify, merge, inspect and load_run say about good results and about spoiled ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import slimtune as st
from slimtune.app.inspect import inspect
from slimtune.app.loading import find, load_run, probe_inputs
from slimtune.app.merge import logits, merge_run
from slimtune.app.methods import methods
from slimtune.app.methods import text as methods_text
from slimtune.app.verify import verify
from slimtune.errors import ConfigError, FileFormatError, VerificationError
from slimtune.targets import hosts

pytest.importorskip("transformers")

import tinyrun
from slimtune.app.train import train

STEPS = {"max_steps": 4, "eval_steps": 4, "save_steps": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model and finished runs: llama, full, image, image-full."""
    folder = tmp_path_factory.mktemp("runs")
    llama = tinyrun.make_llama(folder / "model")
    text = tinyrun.make_text(folder / "text.jsonl")
    train(tinyrun.text_config(llama, text, folder / "llama", **STEPS))
    plain = {"method_options": {}, "learning_rate": 1e-2}
    train(tinyrun.text_config(llama, text, folder / "full", method="full", **STEPS, **plain))
    train(tinyrun.image_config(folder, output_dir=str(folder / "image"), **STEPS))
    whole = {"method": "full", "method_options": {}, "target_modules": "all-linear", "modules_to_save": None}
    train(tinyrun.image_config(folder, output_dir=str(folder / "image-full"), **whole, **STEPS))
    return folder


@pytest.fixture
def run(place, tmp_path):
    shutil.copytree(place / "llama", tmp_path / "run")
    return tmp_path / "run"


def failures(report):
    return {check.name for check in report.checks if check.ok is False}


def rewrite(adapter: Path, change) -> None:
    """Edit an adapter's tensors behind its back, with a manifest that fits them again."""
    from slimtune import files

    file = adapter / files.TENSORS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((adapter / files.MANIFEST).read_text())
    data = file.read_bytes()
    manifest["files"][files.TENSORS] = {"sha256": files.sha256(data), "bytes": len(data)}
    (adapter / files.MANIFEST).write_text(json.dumps(manifest))


# ---------------------------------------------------------------- verify


@pytest.mark.parametrize("name", ["llama", "full", "image", "image-full", "llama/adapter", "model"])
def test_good_results_pass(place, name):
    report = verify(place / name)
    assert report.ok, str(report)
    assert "checks passed" in str(report)


def test_flipped_byte(run):
    file = run / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    report = verify(run)
    assert failures(report) == {"files"}
    assert "adapter_model.safetensors: damaged" in str(report)
    assert "FAIL" in str(report)


@pytest.mark.parametrize("name", ["full/model/model.safetensors", "llama/checkpoint-4/optimizer.pt"])
def test_flipped_byte_elsewhere(place, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(place / name.split("/")[0], run)
    file = run / name.split("/", 1)[1]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert len(failures(verify(run))) == 1


def test_zero_effect(run):
    rewrite(run / "adapter", lambda tensors: [t.zero_() for k, t in tensors.items() if "lora_B" in k])
    report = verify(run)
    assert failures(report) == {"weights", "effect"}
    assert "no effect" in str(report)


def test_layers_without_effect_are_a_note(run):
    rewrite(run / "adapter", lambda tensors: next(t for k, t in tensors.items() if "lora_B" in k).zero_())
    report = verify(run)
    assert report.ok
    assert "1 of 14 layers change nothing" in str(report)


def test_nan(run):
    rewrite(run / "adapter", lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(float("nan")))
    report = verify(run)
    assert not report.ok
    assert "not finite" in str(report)


def test_nan_in_a_whole_model(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    report = verify(tmp_path / "model")
    assert failures(report) == {"numbers"}
    assert "model.norm.weight" in str(report)


def test_other_base_weights(run, place, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    shutil.copytree(place / "model", tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    report = verify(run, str(tmp_path / "other"))
    assert failures(report) == {"base"}
    assert "other base weights" in str(report)


def test_base_of_other_shape(run, place, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(place / "model", tmp_path / "other")
    config = LlamaConfig.from_pretrained(place / "model", intermediate_size=32)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    report = verify(run, str(tmp_path / "other"))
    assert failures(report) == {"loads"}
    assert "shape" in str(report)


def test_missing_base(run):
    assert failures(verify(run, "/nowhere/model")) == {"loads"}


def test_a_folder_that_is_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        verify(tmp_path / "none")
    with pytest.raises(ConfigError, match="not a run"):
        verify(tmp_path)
    (tmp_path / "config.yaml").write_text("task: sft")
    with pytest.raises(ConfigError, match="without a result"):
        load_run(tmp_path)


def test_a_run_without_a_result(run):
    shutil.rmtree(run / "adapter")
    report = verify(run)
    assert failures(report) == {"result"}
    assert "checkpoint-4: every file matches" in str(report)


def test_an_adapter_that_peft_wrote(place, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    made.save_pretrained(tmp_path / "peft")
    report = verify(tmp_path / "peft", str(place / "model"))
    assert report.ok, str(report)
    assert "no hashes" in str(report)


def test_a_text_model_without_a_tokenizer(place, tmp_path):
    """Nothing that is compared needs one: PEFT adapters are often kept beside the weights alone."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    model.save_pretrained(tmp_path / "bare")
    made = peft.get_peft_model(model, peft.MissConfig(r=4, target_modules=["q_proj"], init_weights=False))
    made.save_pretrained(tmp_path / "peft")
    report = verify(tmp_path / "peft", str(tmp_path / "bare"))
    assert report.ok, str(report)
    assert "the adapter changes the outputs" in str(report)
    assert merge_run(tmp_path / "peft", tmp_path / "merged", model=str(tmp_path / "bare")).difference < 1e-5


# ---------------------------------------------------------------- loading


def test_load_run_is_the_trained_model(place):
    loaded = load_run(place / "llama")
    assert len(loaded.layers) == 14
    assert not loaded.model.training
    inputs = probe_inputs(loaded)
    again = load_run(place / "llama" / "adapter")
    assert torch.equal(logits(loaded, inputs), logits(again, inputs))
    base = load_run(place / "llama", adapted=False)
    assert not torch.equal(logits(loaded, inputs), logits(base, inputs))
    ids = loaded.processing("abc", return_tensors="pt")["input_ids"]
    assert loaded.model.generate(input_ids=ids, max_new_tokens=2)[:, : ids.shape[1]].tolist() == ids.tolist()


def test_a_moved_run_and_lost_data(place, tmp_path):
    shutil.copytree(place / "image", tmp_path / "moved")
    config = (tmp_path / "moved" / "config.yaml").read_text()
    (tmp_path / "moved" / "config.yaml").write_text(config.replace("images.npz", "gone.npz"))
    assert verify(tmp_path / "moved").ok


def test_an_adapter_alone_names_its_base(place, tmp_path):
    shutil.copytree(place / "llama" / "adapter", tmp_path / "adapter")
    assert find(tmp_path / "adapter").run is None
    assert verify(tmp_path / "adapter").ok
    manifest = json.loads((tmp_path / "adapter" / "slimtune.json").read_text())
    manifest["base"]["class"] = "os.system"
    (tmp_path / "adapter" / "slimtune.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="not a class of transformers"):
        load_run(tmp_path / "adapter")


def test_an_adapter_with_a_head_alone(place, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shutil.copytree(place / "model", tmp_path / "model")
    config = LlamaConfig.from_pretrained(place / "model", num_labels=5)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    st.adapt(model, st.lora(rank=2), modules_to_save=["score"])
    for host in hosts(model).values():
        torch.nn.init.normal_(host.adapters["default"].structure.B)
    st.save(model, tmp_path / "adapter", base=str(tmp_path / "model"))
    loaded = load_run(tmp_path / "adapter")
    assert logits(loaded, probe_inputs(loaded)).shape == (4, 5)
    assert verify(tmp_path / "adapter").ok


# ---------------------------------------------------------------- merge


@pytest.mark.parametrize("name", ["llama", "image", "llama/adapter"])
def test_merge(place, tmp_path, name):
    result = merge_run(place / name, tmp_path / "merged")
    assert result.share < 1e-5
    assert result.difference < 1e-5
    assert result.effect > 1e-4
    assert str(tmp_path / "merged") in str(result)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    report = verify(tmp_path / "merged")
    assert report.ok, str(report)


def test_merged_llama_is_a_plain_model(place, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge_run(place / "llama", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    loaded = load_run(place / "llama")
    inputs = probe_inputs(loaded)
    assert torch.allclose(model(**inputs).logits, logits(loaded, inputs), atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("abc")["input_ids"] == [3, 4, 5]


def test_merged_factory_model_loads_by_its_weights(place, tmp_path):
    merge_run(place / "image", tmp_path / "merged")
    model = tinyrun.convnet().eval()
    model.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    loaded = load_run(place / "image")
    inputs = probe_inputs(loaded)
    assert inputs["pixel_values"].shape == (4, 3, 8, 8)
    assert torch.allclose(model(inputs["pixel_values"]), logits(loaded, inputs), atol=1e-5)


def test_too_much_lost_leaves_nothing(run, tmp_path):
    rewrite(run / "adapter", lambda tensors: [t.mul_(1e-3) for k, t in tensors.items() if "lora_B" in k])
    with pytest.raises(VerificationError, match=r"bfloat16 loses \d+\.\d% of the change \(worst layer: model"):
        merge_run(run, tmp_path / "merged", dtype="bfloat16")
    assert VerificationError.exit_code == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    result = merge_run(run, tmp_path / "merged", dtype="float32")
    assert result.dtype == "float32"


def test_bfloat16_within_bounds(run, tmp_path):
    rewrite(run / "adapter", lambda tensors: [t.mul_(30) for k, t in tensors.items() if "lora_B" in k])
    result = merge_run(run, tmp_path / "merged", dtype="bfloat16", max_loss=0.2)
    assert 1e-4 < result.share < 0.2
    assert load_file(tmp_path / "merged" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert verify(tmp_path / "merged").ok


def test_overflow(run, tmp_path):
    rewrite(run / "adapter", lambda tensors: [t.mul_(1e12) for k, t in tensors.items() if "lora_B" in k])
    with pytest.raises(VerificationError, match="not finite in float16"):
        merge_run(run, tmp_path / "merged", dtype="float16")


def test_tied_embeddings(tmp_path, place):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    shutil.copytree(place / "model", tmp_path / "model")
    config = LlamaConfig.from_pretrained(place / "model", tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    st.adapt(model, st.lora(rank=2), ["embed_tokens"])
    for host in hosts(model).values():
        torch.nn.init.normal_(host.adapters["default"].structure.B)
    st.save(model, tmp_path / "adapter", base=str(tmp_path / "model"))
    result = merge_run(tmp_path / "adapter", tmp_path / "merged")
    assert result.untied
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings
    assert verify(tmp_path / "merged").ok


def test_a_spoiled_merge_is_caught(place, tmp_path):
    merge_run(place / "llama", tmp_path / "merged")
    from slimtune.app import checkpoint

    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    assert failures(verify(tmp_path / "merged")) == {"files"}
    checkpoint.seal(tmp_path / "merged", 0)
    assert failures(verify(tmp_path / "merged")) == {"merged"}


def test_what_cannot_be_merged(place, tmp_path):
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_run(place / "full", tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        merge_run(place / "llama", tmp_path / "out", dtype="int8")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        merge_run(place / "llama", tmp_path / "taken")
    (tmp_path / "empty").mkdir()
    merge_run(place / "llama", tmp_path / "empty")


# ---------------------------------------------------------------- inspect, methods


def test_inspect_a_run(place):
    found = inspect(place / "llama")
    assert found.kind == "adapter"
    assert len(found.rows) == 14
    loaded = load_run(place / "llama")
    name, host = next(iter(hosts(loaded.model).items()))
    row = next(row for row in found.rows if row.name == name)
    change = host.adapters["default"].dense()
    assert row.norm == pytest.approx(float(change.norm()), rel=1e-3)
    singular = torch.linalg.svdvals(change)
    assert row.stable_rank == pytest.approx(float((singular**2).sum() / singular[0] ** 2), rel=1e-2)
    assert (row.method, row.rank, row.parameters) == ("lora", 2, 2 * sum(change.shape))
    assert found.parameters == sum(p.numel() for p in host_parameters(loaded.model))
    assert json.loads(found.to_json())["rows"][0]["name"] == found.rows[0].name
    assert name in str(found)


def host_parameters(model):
    return [p for host in hosts(model).values() for p in host.adapters.parameters()]


def test_inspect_tells_what_was_chosen_for_a_layer(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(24, 12), torch.nn.Linear(12, 12))
    st.adapt(model, st.c3a(), targets=["0", "1"])
    st.save(model, tmp_path)
    blocks = [part.structure.block for layer in hosts(model).values() for part in layer.adapters.values()]
    found = inspect(tmp_path)
    assert [row.options["block"] for row in found.rows] == blocks
    for block in set(blocks):
        assert f"c3a with block {block}, normalization unit: {blocks.count(block)} of 2" in str(found)


def test_inspect_without_the_base(run):
    manifest = json.loads((run / "adapter" / "slimtune.json").read_text())
    manifest["base"]["name_or_path"] = "/nowhere"
    (run / "adapter" / "slimtune.json").write_text(json.dumps(manifest))
    shutil.move(run / "adapter", run.parent / "alone")
    found = inspect(run.parent / "alone")
    assert all(row.norm is None and row.parameters for row in found.rows)
    assert "no norms" in str(found)


def test_inspect_a_model_and_a_saved_head(place):
    assert {row.method for row in inspect(place / "model").rows} == {"float32"}
    rows = {row.name: row for row in inspect(place / "image").rows}
    assert (rows["0"].rank, rows["6"].method) == (2, "full")
    with pytest.raises(FileFormatError):
        inspect_damaged(place)


def inspect_damaged(place):
    folder = place / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    return inspect(folder)


def test_methods():
    found = {info.name: info for info in methods()}
    assert set(found) == set(st.recipes.RECIPES)
    for info in found.values():
        assert info.formula and "arXiv" in info.source
        assert all(meaning for _, _, meaning in info.options), info.name
        assert info.name in methods_text() and info.formula in methods_text(info.name)
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        methods_text("lorra")
