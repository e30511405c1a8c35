"""Runs whose model becomes smaller while it trains, or at the end: exact resume, what is kept, what is told."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import slimtune as st
import tinyrun
from slimtune.app import checkpoint, plots, whole
from slimtune.app.loading import load_run
from slimtune.app.record import read_record
from slimtune.app.train import train
from slimtune.app.verify import verify
from slimtune.compress import describe_structures
from slimtune.compressed import is_compressed
from tinyrun import events, image_config, text_config

pytest.importorskip("transformers")

SWITCH = 5


class HalveRate(st.Controller):
    """After step 5 every layer it is given is factorised at half its break-even rank."""

    replaces = True

    def __init__(self, share=0.5, targets=None, total_steps=None):
        self.share, self.targets, self.total_steps, self.done, self.ranks = share, targets, total_steps, 0, {}

    def begin(self, model, optimizer):
        self._optimizer = optimizer
        held = {name: entry["options"]["rank"] for name, entry in describe_structures(model).items()}
        assert held == self.ranks  # shaped before it is put back

    def after_step(self, model):
        self.done += 1
        if self.done == SWITCH:
            names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
            names = [n for n in names if self.targets is None or n in self.targets]
            largest = {layer.name: layer.largest for layer in st.factorize(model, dict.fromkeys(names, 10**6)).layers}
            wanted = {name: max(1, int(self.share * most)) for name, most in largest.items()}
            report = st.factorize(model, wanted, optimizer=self._optimizer)
            self.ranks = {layer.name: layer.rank for layer in report.layers if not layer.kept}

    def note(self):
        return {"ranks": dict(self.ranks)} if self.done == SWITCH else None


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("slimtune.app.report.write_report", lambda run: None)


@pytest.fixture
def halve(monkeypatch):
    monkeypatch.setitem(whole.WHOLE, "halve", whole.Whole("every weight", "HalveRate"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tinyrun.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tinyrun.make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def images(folder, **changes):
    options = {"method": "halve", "method_options": {}, "target_modules": None, "modules_to_save": None}
    return image_config(folder, **{**options, "save_steps": 1, "save_total_limit": 20, **changes})


def cut(run: Path, to: Path, step: int) -> None:
    """Copy a run as it was when it was killed just after `step`."""
    to.mkdir()
    shutil.copy(run / "config.yaml", to)
    for path in checkpoint.checkpoints(run):
        if checkpoint.step_of(path) <= step:
            shutil.copytree(path, to / path.name)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (to / "events.jsonl").write_text("".join(e for e in lines if json.loads(e)["step"] <= step and '"end"' not in e))


def weights(run: Path):
    """Every tensor that a run kept."""
    found = {}
    for file in (*run.glob("model/*.safetensors"), *run.glob("adapter/*.safetensors")):
        found |= load_file(file)
    return found


def same(a: Path, b: Path) -> None:
    """Assert that two finished runs have the same bits."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and left
    for key in left:
        assert torch.equal(left[key], right[key]), key


def resumes(cfg, folder, steps):
    """Assert that a run continued after each of `steps` ends in the bits, ranks and scores of one without a break."""
    straight = Path(cfg.output_dir)
    result = train(cfg)
    ranks = json.loads((straight / "ranks.json").read_text())
    for step in steps:
        run = folder / f"from-{step}"
        cut(straight, run, step)
        again = train(cfg.model_copy(update={"output_dir": str(run)}))
        same(straight, run)
        assert json.loads((run / "ranks.json").read_text()) == ranks
        assert again.metrics["validation"] == result.metrics["validation"]
        for key in ("trainable_parameters", "trainable_parameters_at_start", "total_parameters"):
            assert again.metrics[key] == result.metrics[key]
    return result, ranks


def test_resume_is_exact_around_the_switch(halve, tmp_path):
    cfg = images(tmp_path)
    result, ranks = resumes(cfg, tmp_path, [SWITCH - 1, SWITCH, SWITCH + 1, 10])
    assert result.metrics["trainable_parameters"] == sum(row["parameters"] for row in ranks)
    assert result.metrics["trainable_parameters"] < result.metrics["trainable_parameters_at_start"]
    assert {row["name"]: row["rank"] for row in ranks if row["rank"]} == events(tmp_path / "run", "ranks")[-1]["ranks"]


@pytest.mark.parametrize("best", [SWITCH - 1, SWITCH, SWITCH + 2])
def test_the_best_weights_are_kept_in_their_shape(halve, tmp_path, monkeypatch, best):
    """From before the switch the model is dense again, from after it factorised at the same ranks."""
    from slimtune.app.callbacks import Run

    original = Run.on_evaluate

    def scored(self, args, state, control, metrics=None, **rest):
        found = {**metrics, "eval_accuracy": 1.0 if state.global_step == best else 0.5}
        original(self, args, state, control, found, **rest)

    monkeypatch.setattr(Run, "on_evaluate", scored)
    cfg = images(tmp_path, max_steps=8, eval_steps=1, save_total_limit=2, load_best_model_at_end=True)
    result = train(cfg)
    run = Path(cfg.output_dir)
    losses = {e["step"]: e["loss"] for e in events(run, "eval")}
    assert result.metrics["best_step"] == best
    assert result.metrics["validation"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    ranks = {row["name"]: row["rank"] for row in json.loads((run / "ranks.json").read_text())}
    assert any(ranks.values()) == (best >= SWITCH)
    dense = result.metrics["trainable_parameters"] == result.metrics["trainable_parameters_at_start"]
    assert dense == (best < SWITCH)
    loaded = load_run(run)
    assert bool(describe_structures(loaded.model)) == (best >= SWITCH)
    report = verify(run)
    assert report.ok, report


def test_groups_of_a_factorised_model_are_those_that_training_had(tmp_path):
    """The optimizer's state is put back by place: a model shaped anew has its parameters in the same ones."""
    torch.manual_seed(0)
    made = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 2)]
    model = nn.Sequential(*made)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=1e-3, weight_decay=0.1))
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    st.factorize(model, {"2": 2, "4": 3}, optimizer=optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    before = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    after = [[names[id(p)] for p in group["params"]] for group in st.param_groups(model, lr=1e-3, weight_decay=0.1)]
    assert before == after and sum(map(len, after)) == len(names)


CLASHES = {
    "budget": ({"budget": 100}, "budget: method halve has no adapter that would read it"),
    "b_ratio": ({"b_ratio": 2.0}, "b_ratio: method halve has no adapter"),
    "saved": ({"modules_to_save": ["6"]}, "modules_to_save: method halve saves every module"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_settings_that_nothing_reads_are_refused(halve, tmp_path, case):
    changes, said = CLASHES[case]
    with pytest.raises(ValueError, match=said):
        images(tmp_path, **changes)


def test_what_the_method_cannot_take_is_refused_before_anything_is_written(halve, tmp_path):
    for changes, said in (
        ({"method_options": {"shares": 1}}, "HalveRate has no option 'shares'"),
        ({"exclude_modules": ["6"]}, "exclude_modules: method halve acts on every layer that it can"),
        ({"target_modules": ["9"]}, "'9' matches nothing"),
        ({"torch_compile": True}, "torch_compile: method halve puts new parameters"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            train(images(tmp_path, **changes))
        assert caught.value.exit_code == 2
        assert not list(tmp_path.glob("run/*"))


def test_targets_are_the_layers_named(halve, tmp_path):
    cfg = images(tmp_path, target_modules=["6"], max_steps=6)
    train(cfg)
    ranks = {row["name"]: row["rank"] for row in json.loads((tmp_path / "run" / "ranks.json").read_text())}
    assert [name for name, rank in ranks.items() if rank] == ["6"]
    assert cfg.resolved()["target_modules"] == ["6"] and images(tmp_path).resolved()["target_modules"] is None
    again = type(cfg)(**images(tmp_path).resolved())
    assert again == images(tmp_path)
    with pytest.raises(ValueError, match="target_modules: expected text or a list"):
        image_config(tmp_path, target_modules=None)


METHODS = {  # options, steps before, at and after what happens, {layers in the end}
    "trp": ({"period": 4, "tail": 0.2}, [3, 4, 12]),
    "trp-prox": ({"period": 3, "tail": 0.1, "penalty": "prox", "weight": 0.1, "momentum": True}, [7]),
    "cuttlefish": (
        {"rule": "energy", "keep": 0.5, "prefix": 0, "latest": 0.4, "multiple": 2, "period": 2},
        [3, 4, 12],
    ),
}


@pytest.mark.parametrize("case", METHODS)
def test_methods_resume_exactly(case, llama, text, tmp_path):
    options, steps = METHODS[case]
    method, run = case.partition("-")[0], tmp_path / "run"
    cfg = text_config(llama, text, run, method=method, method_options=options, target_modules="all-linear")
    result, ranks = resumes(cfg, tmp_path, steps)
    kept = {row["name"]: row["rank"] for row in ranks if row["rank"] is not None}
    assert kept and all(row["start_rank"] == 16 and row["rank"] < 8 for row in ranks if row["rank"] is not None)
    told = events(run, "ranks")
    assert kept.items() <= told[-1]["ranks"].items()
    assert told[0]["step"] == {"trp": 0, "cuttlefish": 4}[method]
    assert result.metrics["total_parameters"] == sum(row["parameters"] for row in ranks)
    assert is_compressed(run / "model")
    loaded = load_run(run)
    assert {name: entry["options"]["rank"] for name, entry in describe_structures(loaded.model).items()} == kept
    report = verify(run)
    assert report.ok, report


@pytest.fixture(scope="module")
def small(llama, tmp_path_factory):
    """The Llama with two of its layers factorised, as a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    ranks = {"model.layers.0.mlp.up_proj": 4, "model.layers.1.self_attn.q_proj": 3}
    st.factorize(model, ranks)
    folder = tmp_path_factory.mktemp("small") / "llama"
    st.save_compressed(model, folder, processing=llama)
    return folder, ranks


@pytest.mark.parametrize("method", ["lora", "full", "cuttlefish"])
def test_training_goes_on_from_a_compressed_model(method, small, text, tmp_path):
    """Adapters on structures; every weight, factors among them; further layers factorised beside them."""
    folder, ranks = small
    options = {"lora": {"rank": 2}, "full": {}, "cuttlefish": METHODS["cuttlefish"][0]}[method]
    extra = {"target_modules": "all-linear" if method == "lora" else None} if method != "full" else {}
    if method == "cuttlefish":
        extra["target_modules"] = ["down_proj"]
    cfg = text_config(folder, text, tmp_path / "run", method=method, method_options=options, max_steps=6, **extra)
    _, rows = resumes(cfg, tmp_path, [3])
    run = tmp_path / "run"
    loaded = load_run(run)
    held = {name: entry["options"]["rank"] for name, entry in describe_structures(loaded.model).items()}
    assert ranks.items() <= held.items()
    assert (set(held) == set(ranks)) == (method != "cuttlefish")
    if method == "lora":
        assert set(ranks) <= set(loaded.layers)
    else:
        assert {row["name"]: row["rank"] for row in rows if row["rank"]} == held
        starts = {row["name"]: row["start_rank"] for row in rows if row["name"] in ranks}
        assert starts == ranks
    report = verify(run)
    assert report.ok, report


def test_a_classifier_is_found_again(llama, text, tmp_path):
    """A new head is part of the compressed folder, with its classes."""
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    data = tmp_path / "classes.jsonl"
    data.write_text("".join(json.dumps({"text": row["prompt"], "label": row["prompt"][0]}) + "\n" for row in rows))
    run = tmp_path / "run"
    cfg = text_config(
        llama,
        data,
        run,
        task="classify",
        validation_fraction=0.3,
        method="cuttlefish",
        method_options=METHODS["cuttlefish"][0],
        target_modules=None,
        max_steps=6,
    )
    train(cfg)
    loaded = load_run(run)
    assert loaded.model.num_labels == 4 and loaded.model.score.out_features == 4
    assert describe_structures(loaded.model) and not hasattr(loaded.model.score, "structure")
    report = verify(run)
    assert report.ok, report


def test_stable_ranks_are_drawn_up_to_the_step_of_the_switch(tmp_path):
    """What a resumed run did again is told once; a torn value is left out."""
    layers = [f"layer{i}" for i in range(6)]
    told = [
        {"step": step, "kind": "note", "stable_ranks": {name: 9.0 - i - step / 10 for i, name in enumerate(layers)}}
        for step in (2, 4, 6)
    ]
    told[1]["stable_ranks"]["layer5"] = None
    again = [{"step": 4, "kind": "resume"}, {**told[2], "kind": "ranks", "ranks": dict.fromkeys(layers, 3)}]
    last = {"step": 20, "kind": "end"}
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (*told, *again, last)))
    record = read_record(tmp_path)
    history, switch = record.stable_ranks()
    assert switch == 6 and history["layer0"] == ([2, 4, 6], [8.8, 8.6, 8.4])
    assert history["layer5"][0] == [2, 6]
    figure = plots.stable_ranks(record)
    assert figure.moments == [(6.0, "factorised")] and figure.reach == (0, 20)
    assert [curve.label for curve in figure.curves] == ["layer0 (first)", "", "", "", "", "layer5 (last)"]
    assert plots.stable_ranks(read_record(tmp_path / "nothing")) is None
