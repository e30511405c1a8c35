"""What a training run promises, on models of a few thousand parameters."""

import copy
import json
from pathlib import Path

import pytest
import torch

import slimtune as st
import tinyrun
from slimtune.app import checkpoint
from slimtune.app.train import train
from tinyrun import events, image_config, same, text_config, weights

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """The report has its own tests; here it would be most of the time."""
    monkeypatch.setattr("slimtune.app.report.write_report", lambda run: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tinyrun.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tinyrun.make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def straight(llama, text, tmp_path_factory):
    """Twelve steps of the Llama without a break, a checkpoint after every one."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(text_config(llama, text, run))
    return run


def cut(run: Path, to: Path, step: int) -> None:
    """Copy a run as it was when it was killed just after `step`."""
    import shutil

    to.mkdir()
    shutil.copy(run / "config.yaml", to)
    for path in checkpoint.checkpoints(run):
        if checkpoint.step_of(path) <= step:
            shutil.copytree(path, to / path.name)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step and json.loads(line)["kind"] != "end"]
    (to / "events.jsonl").write_text("".join(kept) + '{"time": 1, "ste')


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8, 11, 12])
def test_resume_is_bit_exact_at_any_step(straight, llama, text, tmp_path, step):
    """Inside an epoch, at its end, where an evaluation fell, after the last step; dropout is on throughout."""
    run = tmp_path / "run"
    cut(straight, run, step)
    result = train(text_config(llama, text, run))
    same(straight, run)
    assert [e["step"] for e in events_after_tear(run, "resume")] == [step]
    kinds = ("loss", "grad_norm", "learning_rate", "step")
    logged = {e["step"]: [e[k] for k in kinds] for e in events(straight, "log")}
    assert {e["step"]: [e[k] for k in kinds] for e in events_after_tear(run, "log")} == logged
    before = json.loads((straight / "metrics.json").read_text())
    assert result.metrics["validation"] == before["validation"] and result.metrics["base"] == before["base"]


def events_after_tear(run, kind):
    from slimtune.app.events import read

    return [event for event in read(run) if event["kind"] == kind]


def test_run_folder(straight, llama, text):
    """Everything is there, says the same, and the resolved configuration is the configuration."""
    import yaml

    from slimtune.app.config import load_config

    cfg = text_config(llama, text, straight)
    assert load_config(straight / "config.yaml") == cfg
    assert yaml.safe_load((straight / "config.yaml").read_text()) == cfg.resolved()
    metrics = json.loads((straight / "metrics.json").read_text())
    assert metrics["validation"]["loss"] < metrics["base"]["loss"]
    assert metrics["steps"] == 12 and metrics["task"] == "sft" and metrics["method"] == "lora"
    assert metrics["learning_rate"] == 1e-2
    ranks = json.loads((straight / "ranks.json").read_text())
    assert sum(row["parameters"] for row in ranks) == metrics["trainable_parameters"]
    assert {row["rank"] for row in ranks} == {2}
    assert metrics["adapter_bytes"] == (straight / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (straight / "report.html").stat().st_size > 1000
    assert [e["kind"] for e in events(straight, "start") + events(straight, "end")] == ["start", "end"]
    assert [e["step"] for e in events(straight, "eval")] == [4, 8, 12]
    assert [e["step"] for e in events(straight, "log")] == [5, 10]


def test_checkpoint_holds_a_usable_adapter(straight, llama):
    """A checkpoint's adapter loads on the base model by itself, and the last one is the result."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(llama) for _ in range(2)]
    for model, folder in zip(models, ("checkpoint-12/adapter", "adapter"), strict=True):
        st.load(model, straight / folder)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_finished_run_is_not_repeated(straight, llama, text, capsys):
    before = (straight / "events.jsonl").read_bytes()
    result = train(text_config(llama, text, straight))
    assert "is finished" in capsys.readouterr().err
    assert (straight / "events.jsonl").read_bytes() == before
    assert result.metrics["steps"] == 12 and not result.interrupted


def test_other_settings_do_not_continue(straight, llama, text, tmp_path):
    """A field that changes what is learned is named with both values; one that does not is let pass."""
    cut(straight, tmp_path / "run", 11)
    with pytest.raises(st.ConfigError, match=r"learning_rate was 0.01, is 0.02.*another output_dir"):
        train(text_config(llama, text, tmp_path / "run", learning_rate=2e-2))
    train(text_config(llama, text, tmp_path / "run", logging_steps=1, save_steps=6))
    same(straight, tmp_path / "run")
    with pytest.raises(st.ConfigError, match=r"finished run.*seed was 42, is 7"):
        train(text_config(llama, text, tmp_path / "run", seed=7))


def test_start_afresh(straight, llama, text, tmp_path):
    """`false` discards the old checkpoints and keeps the old events under another name."""
    run = tmp_path / "run"
    cut(straight, run, 12)
    train(text_config(llama, text, run, max_steps=2, resume_from_checkpoint=False))
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)] == [2, 1]
    assert (run / "events-1.jsonl").exists() and [e["step"] for e in events(run, "start")] == [0]


def test_from_a_named_checkpoint(straight, llama, text, tmp_path):
    where = straight / "checkpoint-7"
    train(text_config(llama, text, tmp_path / "run", resume_from_checkpoint=str(where)))
    same(straight, tmp_path / "run")


def test_changed_base_or_data_is_refused(straight, llama, text, tmp_path):
    """The checkpoint's adapter belongs to the weights and rows it was trained on."""
    import shutil

    from safetensors.torch import load_file, save_file

    cut(straight, tmp_path / "run", 6)
    rows = text.read_text().splitlines(keepends=True)
    try:
        text.write_text("".join(rows[:-8]))
        with pytest.raises(st.ConfigError, match=r"train_examples was 23, is 16"):
            train(text_config(llama, text, tmp_path / "run"))
    finally:
        text.write_text("".join(rows))
    kept = tmp_path / "kept.safetensors"
    shutil.copy(llama / "model.safetensors", kept)
    try:
        save_file({k: t + 0.1 for k, t in load_file(kept).items()}, llama / "model.safetensors", {"format": "pt"})
        with pytest.raises(st.FileFormatError, match="weights have changed"):
            train(text_config(llama, text, tmp_path / "run"))
    finally:
        shutil.copy(kept, llama / "model.safetensors")


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_convolutional_runs_resume_exactly(tmp_path, method):
    """Batch norm statistics: frozen under an adapter or a head, part of the state under full. Augmentation is on."""
    options = {} if method == "lora" else {"method": method, "method_options": {}, "target_modules": "all-linear"}
    if method == "full":
        options["modules_to_save"] = None
    base = tinyrun.convnet().state_dict()
    for name in ("straight", "cut"):
        (tmp_path / name).mkdir()
    cfg = image_config(tmp_path / "straight", save_total_limit=9, **options)
    train(cfg)
    run = Path(cfg.output_dir)
    cut(run, tmp_path / "cut" / "run", 6)
    train(cfg.model_copy(update={"output_dir": str(tmp_path / "cut" / "run")}))
    same(run, tmp_path / "cut" / "run")
    if method != "lora":
        moved = not torch.equal(weights(run)["1.running_mean"], base["1.running_mean"])
        assert moved == (method == "full")


def test_model_without_adapter_is_frozen_where_it_should_be(tmp_path):
    """head: everything but the named module has the bits it started with."""
    from slimtune.app.tasks import build_task

    options = {"method": "head", "method_options": {}, "target_modules": "all-linear"}
    cfg = image_config(tmp_path, max_steps=3, **options)
    before = {key: value.clone() for key, value in build_task(cfg).model.state_dict().items()}
    train(cfg)
    after = weights(Path(cfg.output_dir))
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"6.weight", "6.bias"}


@pytest.mark.parametrize(
    ("gradient", "named"),
    [(False, r"step 3: the loss is nan; first seen in the output of '4'"), (True, r"step 3: .*gradient of '0\.")],
)
def test_first_bad_number_stops_the_run(tmp_path, gradient, named, monkeypatch):
    """Step and place are named, no weight changes, the checkpoint before stays, good; a report is written."""
    monkeypatch.setattr("slimtune.app.report.write_report", lambda run: (run / "report.html").write_text("stopped"))
    cfg = image_config(
        tmp_path,
        model_factory="tinyrun:poisoned",
        model_options={"gradient": gradient},
        modules_to_save=["7"],
    )
    with pytest.raises(st.DivergenceError, match=named + ".*checkpoint-2"):
        train(cfg)
    run = Path(cfg.output_dir)
    path, skipped = checkpoint.newest_good(run)
    assert path.name == "checkpoint-2" and not skipped
    assert "not finite" in events(run, "stop")[0]["reason"]
    assert not (run / "metrics.json").exists() and not (run / "adapter").exists()
    assert (run / "report.html").exists()


def test_best_weights_and_early_stop(tmp_path):
    """A rate that ruins the model: the best evaluation's weights are kept, and training ends for want of a new best."""
    cfg = image_config(
        tmp_path,
        max_steps=60,
        learning_rate=0.5,
        eval_steps=1,
        save_steps=50,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        early_stopping_patience=3,
        lr_scheduler_type="constant_with_warmup",
        warmup_ratio=0.5,
    )
    result = train(cfg)
    losses = {e["step"]: e["loss"] for e in events(Path(cfg.output_dir), "eval")}
    best = min(losses, key=losses.get)
    assert result.metrics["best_step"] == best and result.metrics["steps"] == best + 3 < 60
    assert result.metrics["validation"]["loss"] == losses[best]
    stored = weights(Path(cfg.output_dir))
    kept = st.io.read_tensors(
        (Path(cfg.output_dir) / f"checkpoint-{best}/adapter/adapter_model.safetensors").read_bytes(), "best"
    )
    assert all(torch.equal(stored[key], kept[key]) for key in stored)


def test_budget_buys_the_largest_rank_that_fits(llama, text, tmp_path):
    """One parameter fewer buys one rank less; the head is not counted."""
    from slimtune.app.method import fit_rank, meta_copy
    from slimtune.app.tasks import build_task

    cfg = text_config(llama, text, tmp_path / "run", method="dora", method_options={}, budget=1)
    model = build_task(cfg).model

    def size(rank):
        ghost = meta_copy(model)
        st.adapt(ghost, st.dora(rank=rank))
        return sum(p.numel() for _, p in st.trainable_parameters(ghost))

    assert [fit_rank(cfg, model, size(5) + more) for more in (-1, 0, 1)] == [4, 5, 5]
    with pytest.raises(st.ConfigError, match=f"too few: dora of rank 1 has {size(1):,}"):
        fit_rank(cfg, model, size(1) - 1)
    assert not any(p.is_meta for p in model.parameters())


def test_budget_where_more_rank_buys_nothing(llama, text, tmp_path):
    """LoKr's factors are whole from some rank on; SURM's Kronecker adapter has O + I numbers at any rank."""
    from slimtune.app.method import fit_rank
    from slimtune.app.tasks import build_task

    cfg = text_config(llama, text, tmp_path / "run", method="lokr", method_options={}, budget=1)
    model = build_task(cfg).model

    def size(rank):
        ghost = copy.deepcopy(model)
        st.adapt(ghost, st.lokr(rank=rank))
        return sum(p.numel() for _, p in st.trainable_parameters(ghost))

    assert size(1) < size(2) < size(3) == size(64)
    assert fit_rank(cfg, model, 10**6) == 3
    cfg = cfg.model_copy(update={"method": "kronecker"})
    with pytest.raises(st.ConfigError, match="budget: kronecker has 496 parameters on these layers whatever its rank"):
        fit_rank(cfg, model, 10**6)


def test_b_ratio_that_nothing_reads_is_refused(tmp_path):
    from slimtune.app.method import apply_method, make_groups
    from slimtune.app.tasks import build_task

    cfg = image_config(tmp_path, method="singlora", method_options={"rank": 2}, b_ratio=4.0)
    task = build_task(cfg)
    method = apply_method(cfg, task.model, task.head)
    with pytest.raises(st.ConfigError, match="b_ratio: no factor of singlora starts at zero"):
        make_groups(cfg, task.model, method, task.head)


def test_learning_rates_reach_their_parameters(tmp_path):
    """b_ratio multiplies the second factor's rate, the head has its own, decay spares what is not a matrix."""
    from slimtune.app.method import apply_method, make_groups
    from slimtune.app.tasks import build_task

    cfg = image_config(tmp_path, b_ratio=4.0, head_learning_rate=1e-4, weight_decay=0.1)
    task = build_task(cfg)
    groups = make_groups(cfg, task.model, apply_method(cfg, task.model, task.head), task.head)
    names = {id(p): name for name, p in task.model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sorted(found.values()) == sorted([(1e-2, 0.1), (4e-2, 0.1), (1e-4, 0.1), (1e-4, 0.0)])
    assert all(rate == 1e-4 for name, (rate, _) in found.items() if name.startswith("6."))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "many"}, "method_options: lora"),
        ({"rank": 0}, "rank"),
    ],
)
def test_bad_method_options(tmp_path, options, message):
    with pytest.raises(st.SlimtuneError, match=message) as caught:
        train(image_config(tmp_path, method_options=options))
    assert caught.value.exit_code == 2


def test_smoke_of_the_rarer_options(tmp_path):
    """Every optimizer of torch, recomputation of activations refused where the model cannot."""
    for optim in ("adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"):
        result = train(image_config(tmp_path, output_dir=str(tmp_path / optim), optim=optim, max_steps=2))
        assert result.metrics["steps"] == 2
    with pytest.raises(st.ConfigError, match="gradient_checkpointing: Sequential"):
        train(image_config(tmp_path, output_dir=str(tmp_path / "g"), gradient_checkpointing=True))


def test_gradient_checkpointing_learns_the_same(straight, llama, text, tmp_path):
    """Recomputed activations draw the same dropout: the same bits, from a checkpoint made without."""
    cut(straight, tmp_path / "run", 10)
    train(text_config(llama, text, tmp_path / "run", gradient_checkpointing=True))
    same(straight, tmp_path / "run")


def test_a_refused_start_over_touches_nothing(tmp_path):
    """resume_from_checkpoint=false discards the old run only once the new one is known to be sound."""
    cfg = image_config(tmp_path, max_steps=2)
    train(cfg)
    run = Path(cfg.output_dir)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for wrong in ({"method_options": {"rnk": 3}}, {"target_modules": ["nope"]}):
        with pytest.raises(st.SlimtuneError):
            train(cfg.model_copy(update={"resume_from_checkpoint": False, **wrong}))
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    (run / "adapter" / "old").write_text("")
    train(cfg.model_copy(update={"resume_from_checkpoint": False}))
    assert not (run / "adapter" / "old").exists()
    assert "resume_from_checkpoint: auto" in (run / "config.yaml").read_text()


def test_a_last_step_that_overflows_is_not_a_success(tmp_path):
    """Loss and gradient of the step were finite; the weights or the evaluation after it are not."""
    cfg = image_config(tmp_path, max_steps=1, learning_rate=1e30, warmup_ratio=0.0, lr_scheduler_type="constant")
    with pytest.raises(st.DivergenceError, match="step 1: "):
        train(cfg)
    run = Path(cfg.output_dir)
    assert not (run / "adapter").exists() and not (run / "metrics.json").exists()
    assert not checkpoint.checkpoints(run)


def test_a_finished_run_is_measured_again_for_another_test_set(tmp_path):
    cfg = image_config(tmp_path, max_steps=2)
    first = train(cfg)
    again = train(cfg.model_copy(update={"test_dataset_name": cfg.dataset_name}))
    assert first.metrics.get("test") is None and again.metrics["test"]["samples"] > 0
    assert again.metrics["validation"]["loss"] == first.metrics["validation"]["loss"]
