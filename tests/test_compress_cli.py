"""`slimtune compress`: from a configuration to a smaller model that was read back, measured and explained."""

import errno
import inspect
import json
import os
import re
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch

import slimtune as st
import tinyrun
from slimtune import cli
from slimtune.app.compress import config as compress_config
from slimtune.app.compress.command import compress
from slimtune.app.compress.config import CompressConfig, load_compress_config, method_options
from slimtune.app.compress.end import _speed, told
from slimtune.app.compress.plan import Layer, Plan
from slimtune.app.compress.report import pictures
from slimtune.app.compress.state import State
from slimtune.app.config import TaskConfig, load_config
from slimtune.errors import ConfigError, SlimtuneError, TargetError, VerificationError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama and its data."""
    folder = tmp_path_factory.mktemp("compress")
    tinyrun.make_llama(folder / "llama")
    tinyrun.make_text(folder / "text.jsonl", 40)
    tinyrun.make_images(folder / "images.npz")
    return folder


def text(place, out, **changes):
    return CompressConfig(
        **{
            "task": "sft",
            "model_name_or_path": str(place / "llama"),
            "dataset_name": str(place / "text.jsonl"),
            "output_dir": str(out),
            "keep": 0.7,
            "multiple": 1,
            "calibration_samples": 20,
            "per_device_eval_batch_size": 8,
            "latency_runs": 0,
            **changes,
        }
    )


def shards(place, out, **changes):
    return CompressConfig(
        **{
            "model_name_or_path": str(place / "llama"),
            "method": "svd",
            "output_dir": str(out),
            "keep": 0.7,
            "multiple": 1,
            **changes,
        }
    )


def images(place, out, **changes):
    return text(
        place,
        out,
        **{
            "task": "image-classify",
            "model_name_or_path": None,
            "model_factory": "tinyrun:convnet",
            "model_options": {"features": 16},
            "dataset_name": str(place / "images.npz"),
            "target_modules": ["0"],
            **changes,
        },
    )


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Drawing would be most of the time."""
    if request.node.name != "test_the_report_and_the_command_line":
        monkeypatch.setattr("slimtune.app.plots.draw", lambda *_: "<svg></svg>")


@pytest.fixture(scope="module")
def whole(place):
    """A finished compression that nothing happened to."""
    result = compress(text(place, place / "whole"))
    return result.output_dir


def stored(run):
    return {f.name: f.read_bytes() for f in sorted((run / "model").glob("*.safetensors"))}


def record(run):
    return json.loads((run / "compress.json").read_text())


# ---------------------------------------------------------------- the configuration

GOOD = "task: sft\nmodel_name_or_path: ./llama\ndataset_name: text.jsonl\noutput_dir: out\n"
BAD = [
    ("kep: 0.5", r"c.yaml:5: unknown key 'kep'; did you mean 'keep'\?"),
    ("keep: 1.5", "c.yaml:5: keep: expected less than 1, found 1.5"),
    ("method: lrod", r"c.yaml:5: method: unknown method 'lrod'; did you mean 'lord'\? \(known: lord, .*svd"),
    ("method_options: {centered: false}", r"c.yaml:5: method_options: lord has no option 'centered'; did you mean"),
    ("method_options: {moments: {}}", "c.yaml:5: method_options: lord has no option 'moments'"),
    ("learning_rate: 0.1", "c.yaml:5: unknown key 'learning_rate'"),
    ("allocation: best", "c.yaml:5: allocation: expected 'uniform', 'tail', 'fisher' or 'sensitivity', found 'best'"),
    ("ranks: {q_proj: 0}", "c.yaml:5: ranks: the rank of 'q_proj' must be at least 1, found 0"),
    ("memory: much", "c.yaml:5: memory: expected a whole number, found 'much'"),
    ("label_column: x", "c.yaml:5: label_column: task sft does not read it"),
    ("method: svd\nsequential: true", "c.yaml:6: sequential: method svd takes no statistics"),
    ("method: svd\nform: spatial\nmethod_options: {form: channel}", "c.yaml:6: form: remove it or method_options.form"),
    ("dense: true\nmodel_name_or_path: null\nmodel_factory: a:b", "key 'model_name_or_path' is written twice"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_one_mistake(tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    Path("llama").mkdir()
    Path("text.jsonl").touch()
    Path("c.yaml").write_text(GOOD + line + "\n")
    with pytest.raises(ConfigError, match=message):
        load_compress_config("c.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "dataset_name: method lord takes statistics of data"),
        ({"method": "svd", "calibration_samples": 3}, "calibration_samples: only used with dataset_name"),
        ({"method": "svd", "allocation": "sensitivity"}, "sensitivity is measured on data"),
        ({"method": "svd", "allocation": "fisher"}, "fisher is measured on data"),
        ({"method": "svd", "task": "sft"}, "task: only used with dataset_name"),
    ],
    ids=["lord", "samples", "sensitivity", "fisher", "task"],
)
def test_without_data(tmp_path, settings, message):
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    with pytest.raises(ConfigError, match=message):
        load_compress_config(None, [f"model_name_or_path={tmp_path}", f"output_dir={tmp_path / 'out'}", *overrides])


def test_every_field_is_documented_and_read():
    folder = Path(inspect.getfile(CompressConfig)).parent
    code = "\n".join(p.read_text() for p in folder.glob("*.py"))
    for name, field in CompressConfig.model_fields.items():
        assert field.description, name
        if name not in TaskConfig.model_fields:  # those a task reads
            assert re.search(rf"\b(cfg|chosen|self)\.{name}\b", code.replace("self.cfg.", "cfg.")), name


def test_methods_read_from_the_source_are_the_factors():
    made = {name: inspect.signature(make).parameters for name, make in st.factors.FACTORS.items()}
    assert compress_config.factor_options() == {name: tuple(made[name]) for name in sorted(made)}
    assert method_options()["lord"] == ("centred", "add_bias")


def test_the_examples_fit_together(tmp_path, monkeypatch):
    """Both read what the demo leaves, and the second begins where the first ends."""
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.chdir(tmp_path)
    Path("runs/demo/data").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        Path(f"runs/demo/data/{split}.jsonl").touch()
    first = load_compress_config(examples / "compress.yaml")
    second = load_config(examples / "recover.yaml")
    assert second.model_name_or_path == f"{first.output_dir}/model"
    for name in ("task", "dataset_name", "eval_dataset_name", "test_dataset_name", "max_length"):
        assert getattr(first, name) == getattr(second, name)


def test_memory_has_a_unit():
    base = {"model_name_or_path": "x", "method": "svd", "output_dir": "out", "dataset_name": "x.jsonl", "task": "sft"}
    with pytest.raises(ValueError, match="takes no statistics"):
        CompressConfig(**base, memory="1.5M")
    assert CompressConfig(**{**base, "method": "lord", "dataset_name": "hub/x"}, memory="1.5M").memory == 1_500_000


# ---------------------------------------------------------------- LORD


def test_predicted_errors_are_the_measured_ones_and_sizes_those_planned(whole):
    found = record(whole)
    layers = [layer for layer in found["layers"] if layer["rank"]]
    assert len(layers) == 12 and {x["name"][-6:] for x in found["layers"] if not x["rank"]} == {"v_proj"}
    for layer in layers:
        assert layer["measured"] == pytest.approx(layer["predicted"], rel=1e-3)
        assert layer["rank"] < layer["break_even"]
    model = st.load_compressed(whole / "model")
    numbers = found["parameters"]
    assert sum(p.numel() for p in model.parameters()) == numbers["model_after"]
    assert numbers["layers_after"] <= 0.7 * numbers["layers_before"]
    assert found["checked"] == {"model": 0.0}
    assert not (whole / "state").exists() and found["notes"] == []


def test_it_is_what_the_library_computes(whole, place):
    """The same examples through calibrate, afm and factorize by hand."""
    from slimtune.app.tasks import build_task

    cfg = text(place, place / "other")
    task = build_task(cfg.training())
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(42)).tolist()[:20]
    batches = [dict(task.collator([task.train[i] for i in order[k : k + 8]])) for k in range(0, 20, 8)]
    ranks = {layer["name"]: layer["rank"] for layer in record(whole)["layers"] if layer["rank"]}
    make = st.factors.afm(st.calibrate.moments(task.model, batches, list(ranks)))
    st.factorize(task.model, ranks, make)
    saved = st.load_compressed(whole / "model")
    batch = {k: v for k, v in batches[0].items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(saved(**batch).logits, task.model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_training(whole, place, tmp_path):
    from slimtune.app.train import train

    run = train(
        tinyrun.text_config(
            place / "llama",
            place / "text.jsonl",
            tmp_path / "run",
            max_steps=1,
            seed=42,
            evaluate_base=True,
            per_device_eval_batch_size=8,
        )
    )
    before = record(whole)["scores"]["validation"]["before"]
    assert before == pytest.approx(run.metrics["base"], rel=1e-5)


@pytest.mark.parametrize("allocation", ["tail", "fisher", "sensitivity"])
def test_allocations_keep_to_the_budget(place, tmp_path, allocation, capsys):
    result = compress(text(place, tmp_path / "out", allocation=allocation, plan_only=True))
    layers = result.record["plan"]
    assert 0.6 < sum(x["after"] for x in layers) / sum(x["before"] for x in layers) <= 0.7
    assert len({x["rank"] for x in layers}) > 2
    assert "parameters (" in capsys.readouterr().out and not (tmp_path / "out" / "model").exists()


def test_fisher_keeps_what_the_loss_needs(place, tmp_path, monkeypatch):
    """A layer whose outputs are said to cost a million times as much stays dense."""
    from slimtune.app.compress import statistics

    dear, real = "model.layers.0.mlp.up_proj", statistics.fisher

    def fisher(*args, **options):
        found = real(*args, **options)
        assert all(value > 0 for value in found.values())
        return {name: 1e6 if name == dear else 1.0 for name in found}

    monkeypatch.setattr(statistics, "fisher", fisher)
    plan = compress(text(place, tmp_path / "out", allocation="fisher", plan_only=True)).record["plan"]
    assert {x["name"]: x["rank"] for x in plan}[dear] is None and any(x["rank"] for x in plan)


def test_ranks_and_skip(place, tmp_path):
    ranks = {"*.0.*.q_proj": 3, "o_proj": 99}
    layers = compress(text(place, tmp_path / "out", ranks=ranks, skip="up_proj", plan_only=True)).record["plan"]
    by_name = {layer["name"].removeprefix("model.layers."): layer for layer in layers}
    assert by_name["0.self_attn.q_proj"]["rank"] == 3 and by_name["0.self_attn.v_proj"]["rank"]
    assert by_name["1.self_attn.o_proj"]["rank"] is None and "99" in by_name["1.self_attn.o_proj"]["reason"]
    assert by_name["0.mlp.up_proj"]["reason"] == "skip"
    with pytest.raises(TargetError, match="ranks: 'p_proj' matches none of the 14"):
        compress(text(place, tmp_path / "other", ranks={"p_proj": 3}))
    with pytest.raises(ConfigError, match=r"keep: 0.1 of .* raise keep"):
        compress(text(place, tmp_path / "third", skip=["mlp.*"], keep=0.1))


def test_sequential_is_behind_the_compressed_blocks(whole, place, tmp_path):
    """The first block is the same; from then on statistics are those of a compressed prefix, and foretell as well."""
    done = compress(text(place, tmp_path / "out", sequential=True))
    one, other = ({x["name"]: x for x in r["layers"] if x["rank"]} for r in (record(whole), done.record))
    for name, layer in other.items():
        assert layer["measured"] == pytest.approx(layer["predicted"], rel=1e-3)
        assert (layer["predicted"] == pytest.approx(one[name]["predicted"], rel=1e-9)) == (".0." in name)


def test_layers_in_groups_are_the_same(whole, place, tmp_path):
    compress(text(place, tmp_path / "out", memory=2000))
    assert stored(tmp_path / "out") == stored(whole)


def test_a_plain_folder_for_transformers(place, tmp_path):
    from transformers import AutoModelForCausalLM

    done = compress(text(place, tmp_path / "out", dense=True))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dense").eval()
    small = st.load_compressed(tmp_path / "out" / "model")
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-5)
    assert done.record["checked"]["dense"] < 1e-5 and "attention_bias" in str(done.record["notes"])


# ---------------------------------------------------------------- forms of models and data


@pytest.mark.parametrize(("method", "form"), [("lord", "channel"), ("lord", "spatial"), ("svd", "spatial")])
def test_a_convolution_of_a_factory(place, tmp_path, method, form):
    done = compress(images(place, tmp_path / "out", method=method, form=form, latency_runs=2))
    [layer] = done.record["layers"]
    assert layer["rank"]
    if method == "lord":
        assert layer["measured"] < 1
        assert layer["measured"] == pytest.approx(layer["predicted"], rel=1e-3)
    entry = done.record["scores"]["validation"]
    assert entry["gained"] - entry["lost"] == round(
        (entry["after"]["accuracy"] - entry["before"]["accuracy"]) * entry["before"]["samples"]
    )
    assert [e["batch"] for e in done.record["latency"]["model"]] == [1, 4]
    kind = {"channel": "LowRank", "spatial": "SeparableKernel"}[form]
    model = st.load_compressed(tmp_path / "out" / "model", tinyrun.convnet(16))
    assert type(model[0].structure).__name__ == kind


def test_a_factory_without_data(place, tmp_path):
    cfg = CompressConfig(
        model_factory="tinyrun:convnet",
        model_options={"features": 16},
        method="svd",
        target_modules=["0"],
        multiple=1,
        output_dir=str(tmp_path / "out"),
    )
    done = compress(cfg)
    assert done.record["layers"][0]["weight"] == pytest.approx(done.record["layers"][0]["predicted"], rel=1e-4)


def test_plain_text_and_a_head_that_is_new(place, tmp_path):
    (tmp_path / "t.txt").write_text("abcd efgh\n" * 30)
    done = compress(text(place, tmp_path / "a", dataset_name=str(tmp_path / "t.txt"), packing=True, max_length=16))
    assert done.record["scores"]["validation"]["after"]["loss"] > 0
    rows = [{"text": "abcd"[i % 4 :], "label": i % 2} for i in range(24)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = compress(text(place, tmp_path / "b", task="classify", dataset_name=str(tmp_path / "c.jsonl")))
    assert done.record["scores"] == {} and "newly drawn" in done.record["notes"][0]
    assert all(layer["measured"] is not None for layer in done.record["layers"] if layer["rank"])
    done = compress(text(place, tmp_path / "d", task="regress", dataset_name=str(tmp_path / "c.jsonl"), method="svd"))
    assert done.record["metric"] == "pearson"


def test_a_run_of_training_then_an_adapter_on_the_compressed_model(place, tmp_path):
    """train in full -> compress its run -> train an adapter on what came out -> load that."""
    from slimtune.app.loading import load_run
    from slimtune.app.train import train

    data = (place / "llama", place / "text.jsonl")
    full = tinyrun.text_config(*data, tmp_path / "full", method="full", method_options={}, max_steps=2)
    scores = train(full).metrics["validation"]
    same = {"seed": 42, "validation_fraction": 0.1}
    small = compress(text(place, tmp_path / "small", model_name_or_path=str(tmp_path / "full"), **same))
    assert small.record["scores"]["validation"]["before"]["loss"] == pytest.approx(scores["loss"], rel=1e-4)
    with pytest.raises(ConfigError, match=r"compressed already|it is already"):
        compress(shards(place, tmp_path / "twice", model_name_or_path=str(tmp_path / "small" / "model")))
    lora = tinyrun.text_config(*data, tmp_path / "lora", max_steps=2)
    lora = lora.model_copy(update={"model_name_or_path": str(tmp_path / "small" / "model")})
    trained = train(lora)
    assert trained.metrics["trainable_parameters"] > 0
    loaded = load_run(tmp_path / "lora")
    assert len(loaded.layers) == 14
    with pytest.raises(ConfigError, match="a run with an adapter: slimtune merge"):
        compress(text(place, tmp_path / "again", model_name_or_path=str(tmp_path / "lora")))


# ---------------------------------------------------------------- stopped and continued


class Killed(BaseException):
    """Not to be caught on the way."""


@pytest.mark.parametrize("at", [9, 17, 26])
def test_killed_anywhere_it_goes_on_to_the_same_bits(whole, place, tmp_path, monkeypatch, at):
    """12 statistics, the scores before, 12 layers and the errors: the call number `at` of a write never happens."""
    cfg, calls, write = text(place, tmp_path / "out"), 0, State._write_table

    def dying(self):
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise Killed
        write(self)

    with monkeypatch.context() as patch:
        patch.setattr(State, "_write_table", dying)
        with pytest.raises(Killed):
            compress(cfg)
    assert not (tmp_path / "out" / "model").exists()
    compress(cfg)
    assert stored(tmp_path / "out") == stored(whole)


def test_a_signal_keeps_what_is_finished(whole, place, tmp_path, monkeypatch, capsys):
    cfg, keep, calls = text(place, tmp_path / "out"), State.keep, []

    def signalled(self, name, tensors, note):
        keep(self, name, tensors, note)
        calls.append(name)
        if len(calls) == 15:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = [f"{key}={json.dumps(value)}" for key, value in cfg.resolved().items()]
    with monkeypatch.context() as patch:
        patch.setattr(State, "keep", signalled)
        assert cli.main(["compress", *settings]) == 130
    assert "the same command continues" in capsys.readouterr().err and len(calls) == 15
    assert not (tmp_path / "out" / "model").exists()
    compress(cfg)
    assert stored(tmp_path / "out") == stored(whole)


def test_a_plan_is_enough_for_another_keep_and_damage_is_done_again(whole, place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    compress(text(place, out, plan_only=True, keep=0.5))
    broken = next((out / "state").glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    asked = []
    real = st.calibrate.moments
    monkeypatch.setattr(
        "slimtune.calibrate.moments", lambda m, b, names, **o: asked.extend(names) or real(m, b, names, **o)
    )
    compress(text(place, out))
    assert len(asked) == 1 and "damaged" in capsys.readouterr().err
    assert stored(out) == stored(whole)


def test_other_settings_or_weights_are_refused(whole, place, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot continue the finished .*keep was 0.7, is 0.6; .*resume=false"):
        compress(text(place, whole, keep=0.6))
    before = (whole / "compress.json").stat().st_mtime_ns
    assert compress(text(place, whole)).record["verdict"] == record(whole)["verdict"]
    assert (whole / "compress.json").stat().st_mtime_ns == before
    out = tmp_path / "out"
    compress(text(place, out, plan_only=True))
    with pytest.raises(ConfigError, match=r"cannot continue what was begun .*calibration_samples was 20, is 10"):
        compress(text(place, out, calibration_samples=10))
    copy = tmp_path / "llama"
    shutil.copytree(place / "llama", copy)
    cfg = text(place, tmp_path / "third", model_name_or_path=str(copy))
    compress(cfg.model_copy(update={"plan_only": True}))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(copy)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(copy)
    with pytest.raises(ConfigError, match="the weights of the model have changed"):
        compress(cfg)
    assert compress(cfg.model_copy(update={"resume": False})).report


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "failing"])
def test_a_disk_that_fails(whole, place, tmp_path, monkeypatch, code):
    from slimtune.app.compress import state as compress_state

    replace, calls = compress_state._replace, []

    def failing(path, data):
        calls.append(path)
        if len(calls) == 20:
            raise OSError(code, os.strerror(code))
        replace(path, data)

    cfg = text(place, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(compress_state, "_replace", failing)
        said = "the disk is full" if code == errno.ENOSPC else os.strerror(code)
        with pytest.raises(SlimtuneError, match=rf"cannot write to .*{said}; what was finished is kept"):
            compress(cfg)
    compress(cfg)
    assert stored(tmp_path / "out") == stored(whole)


def test_no_room_and_no_permission(place, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(SlimtuneError, match="has 0 MiB free"):
            compress(text(place, tmp_path / "out"))
        with pytest.raises(SlimtuneError, match="has 0 MiB free"):
            compress(shards(place, tmp_path / "other"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SlimtuneError, match="permission denied"):
        compress(text(place, tmp_path / "third"))


def test_what_reads_back_differently_is_removed(place, tmp_path, monkeypatch, capsys):
    real = st.load_compressed

    def wrong(*arguments, **options):
        model = real(*arguments, **options)
        model.model.norm.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(st._public, "load_compressed", wrong)
    with pytest.raises(VerificationError, match=r"read back, its outputs differ .*it has been removed") as caught:
        compress(text(place, tmp_path / "out"))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "compress.json").exists()


# ---------------------------------------------------------------- from file to file


def test_from_file_to_file_is_what_factorize_does(place, tmp_path):
    from transformers import AutoModelForCausalLM

    done = compress(shards(place, tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    report = st.factorize(model, {x["name"]: x["rank"] for x in done.record["layers"]})
    small = st.load_compressed(tmp_path / "out" / "model")
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], tensor, rtol=0, atol=0)
    for layer, other in zip(done.record["layers"], report.layers, strict=True):
        assert layer["weight"] == pytest.approx(other.error, rel=1e-5)
        assert layer["predicted"] == pytest.approx(other.error, rel=1e-4)
        assert layer["after"] == other.after


def test_one_tensor_at_a_time_of_a_model_in_shards_with_shared_embeddings(place, tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    from slimtune.app.compress.shards import Reader

    config = AutoConfig.from_pretrained(place / "llama")
    config.tie_word_embeddings, config.num_hidden_layers = True, 3
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "llama", max_shard_size="4KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    largest = max(p.numel() for p in model.parameters()) * 4
    read, alive, most = Reader.read, weakref.WeakValueDictionary(), []

    def watched(self, key):
        tensor = read(self, key)
        alive[len(most)] = tensor
        most.append(sum(t.numel() * t.element_size() for t in alive.values()))
        return tensor

    monkeypatch.setattr(Reader, "read", watched)
    monkeypatch.setattr("slimtune.app.compress.shards.SHARD_BYTES", 3000)
    done = compress(shards(tmp_path, tmp_path / "out"))
    assert len(most) > 20 and max(most) <= 3000 + 2 * largest < sum(p.numel() * 4 for p in model.parameters()) / 2
    small = st.load_compressed(tmp_path / "out" / "model")
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert len(list((tmp_path / "out" / "model").glob("*.safetensors"))) > 2
    assert done.record["memory"]["stated"] > 0


@pytest.mark.parametrize("at", [4, 11])
def test_files_go_on_to_the_same_bits(place, tmp_path, monkeypatch, at):
    monkeypatch.setattr("slimtune.app.compress.shards.SHARD_BYTES", 3000)
    compress(shards(place, tmp_path / "whole"))
    keep, made = State.keep, []

    def dying(self, name, tensors, note):
        keep(self, name, tensors, note)
        made.append(name)
        if len(made) == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(State, "keep", dying)
        with pytest.raises(Killed):
            compress(shards(place, tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(State, "keep", lambda self, name, *rest: made.append(name) or keep(self, name, *rest))
        compress(shards(place, tmp_path / "out"))
    assert len(set(made)) == 14 and len(made) == 15  # the one that was being noted is done again
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")
    assert record(tmp_path / "out")["layers"] == record(tmp_path / "whole")["layers"]


# ---------------------------------------------------------------- what is told


def test_slower_layers_and_wrong_predictions_are_said_in_words(place):
    cfg = text(place, "nowhere")
    layers = [
        Layer("a", "Linear", (4, 4), 2.0, 1, 16, 1, 8, "", 0.5, 0.51, 0.6, 1.0, 2.0, True),
        Layer("b", "Linear", (4, 4), 2.0, 1, 16, 1, 8, "", 0.5, 0.7, 0.6, 2.0, 1.0, False),
    ]
    times = {"runs": 5, "model": [{"batch": 8, "dense": 0.1, "compressed": 0.2, "speed": 0.5, "low": 0.4, "high": 0.6}]}
    slower, each, wrong = told(cfg, Plan(layers), times)
    assert "the whole model is slower than dense at batch 8: 200 ms, dense 100 ms" in slower
    assert "1 of 2 factorised layers are slower than dense at batch 8: a (0.50x)" in each
    assert "the measured error of 1 of 2 layers is not the predicted one within 5%: b (1.40x)" in wrong
    assert told(cfg.model_copy(update={"method": "svd"}), Plan(layers[1:]), {}) == []


def test_the_report_and_the_command_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [f"{k}={json.dumps(v)}" for k, v in text(place, "out", latency_runs=2).resolved().items()]
    assert cli.main(["compress", *settings, "--plan-only"]) == 0
    assert not Path("out/model").exists() and "break-even" in capsys.readouterr().out
    assert cli.main(["compress", *settings]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^verdict: lord: [\d,]+ -> [\d,]+ parameters \(.*%\); loss .* validation examples", out, re.M)
    page = Path("out/report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "prefers-color-scheme" in page and page.count("<svg") == 2 and "model.layers.0.self_attn.q_proj" in page
    assert {p.name for p in Path("out/plots").iterdir()} == {"ranks.png", "errors.png"}
    Path("out/report.html").unlink()
    assert cli.main(["report", "out"]) == 0 and Path("out/report.html").is_file()
    assert cli.main(["compress", *settings]) == 0 and "is finished" in capsys.readouterr().err
    assert cli.main(["compress", *settings, "keep=0.6"]) == 2
    assert cli.main(["compress"]) == 2 and "give a configuration" in capsys.readouterr().err
    assert cli.main(["compress", "--schema"]) == 0 and "allocation" in json.loads(capsys.readouterr().out)["properties"]


def test_a_speed_that_turns_do_not_tell_apart_is_not_called_equal():
    words = _speed({"speed": 0.53, "low": 0.4, "high": 1.6})
    assert "0.53x; 0.40x to 1.60x" in words and "as fast" not in words
    assert _speed({"speed": 1.3, "low": 1.2, "high": 1.5}) == "1.30 times as fast"
    assert _speed({"speed": 0.5, "low": 0.4, "high": 0.6}) == "slower than dense (0.50x)"


def test_the_legend_of_the_errors_lies_outside_the_axes():
    layers = [Layer(name, "Linear", (4, 4), 2.0, 1, 16, 1, 8, "", 0.5, 0.5, 0.6) for name in ("a", "b")]
    errors = {figure.name: figure for figure in pictures(layers)}["errors"]
    assert errors.below and errors.curves[-1].label == "predicted"  # drawn last: above what it foretells
