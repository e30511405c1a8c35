"""Runs whose ranks change: exact resume around every round, tidying up, the record of ranks."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import slimtune as st
import tinyrun
from slimtune.app import checkpoint
from slimtune.app.inspect import inspect
from slimtune.app.train import train
from slimtune.app.verify import verify
from slimtune.ranks import compact, resize
from slimtune.targets import hosts
from tinyrun import events, image_config, same, text_config, weights

pytest.importorskip("transformers")


class Shift(st.Controller):
    """After every third step the layers trade ranks by statistics kept beside Adam's moments; the last rank is masked.

    `masked` is None like that of a controller that chooses by itself; it does not matter here.
    """

    def __init__(self, every=3, masked=None):
        self.every, self.masked, self.done, self.ranks = every, masked, 0, {}

    def begin(self, model, optimizer):
        self._optimizer = optimizer
        self._layers = {name: host.adapters["default"].structure for name, host in hosts(model).items()}
        if not self.done:
            self.ranks = {name: structure.rank for name, structure in self._layers.items()}
        assert self.ranks == {name: structure.rank for name, structure in self._layers.items()}
        for structure in self._layers.values():  # what counts was put back before
            assert bool(optimizer.state.get(structure.B)) == bool(self.done)

    @torch.no_grad()
    def after_step(self, model):
        self.done += 1
        scores = {}
        for name, structure in self._layers.items():
            state = self._optimizer.state[structure.B]
            new = (structure.B * structure.B.grad).abs()
            state["shift_mean"] = state.get("shift_mean", torch.zeros_like(new)).mul(0.8).add(new, alpha=0.2)
            scores[name] = float(state["shift_mean"].mean())
            structure.B[:, -1] = 0
        if self.done % self.every == 2:
            order = sorted(scores, key=scores.get)
            ranks = {name: 2 + (place + self.done) % 4 for place, name in enumerate(order)}
            resize(model, ranks, self._optimizer, seed=self.done)
            self.ranks = {name: structure.rank for name, structure in self._layers.items()}

    def note(self):
        return {"ranks": dict(self.ranks), "round": self.done // 3} if self.done % self.every == 2 else None

    def end(self, model):
        compact(model, self._optimizer)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("slimtune.app.report.write_report", lambda run: None)


@pytest.fixture
def shifting(monkeypatch):
    """LoRA with `Shift`."""
    from slimtune.app import method

    plain = method.make_recipe
    monkeypatch.setattr(
        method, "make_recipe", lambda *a: dataclasses.replace(plain(*a), controllers={"Shift": {"every": 3}})
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tinyrun.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tinyrun.make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def cut(run: Path, to: Path, step: int) -> None:
    """Copy a run as it was when it was killed just after `step`."""
    to.mkdir()
    shutil.copy(run / "config.yaml", to)
    for path in checkpoint.checkpoints(run):
        if checkpoint.step_of(path) <= step:
            shutil.copytree(path, to / path.name)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (to / "events.jsonl").write_text("".join(e for e in lines if json.loads(e)["step"] <= step and '"end"' not in e))


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


def test_resume_is_exact_around_rank_changes(shifting, llama, text, tmp_path):
    """Before, at and after a round, and after the last step; the adapter that is kept has no masked rank."""
    cfg = text_config(llama, text, tmp_path / "run")
    result, ranks = resumes(cfg, tmp_path, [1, 2, 3, 10, 12])
    rounds = events(tmp_path / "run", "ranks")
    assert [e["step"] for e in rounds] == [0, 2, 5, 8, 11]
    assert set(rounds[0]["ranks"].values()) == {2} and len({tuple(e["ranks"].values()) for e in rounds}) == 5
    assert {row["name"]: row["rank"] + 1 for row in ranks} == rounds[-1]["ranks"]
    assert all("round" in e for e in rounds[1:])
    assert {row["start_rank"] for row in ranks} == {2}
    assert result.metrics["trainable_parameters"] == sum(row["parameters"] for row in ranks)
    stored = weights(tmp_path / "run")
    assert sum(t.numel() for key, t in stored.items() if ".lora_" in key) == sum(row["parameters"] for row in ranks)
    start = events(tmp_path / "run", "start")[0]
    assert start["trainable_parameters"] == result.metrics["trainable_parameters_at_start"]


@pytest.mark.parametrize("best", [1, 3, 6])
def test_the_best_weights_are_kept_at_their_ranks(shifting, tmp_path, monkeypatch, best):
    """A checkpoint with other ranks than the last is taken over, tidied up, and scored again."""
    from slimtune.app.callbacks import Run

    original = Run.on_evaluate

    def scored(self, args, state, control, metrics=None, **rest):
        found = {**metrics, "eval_accuracy": 1.0 if state.global_step == best else 0.5}
        original(self, args, state, control, found, **rest)

    monkeypatch.setattr(Run, "on_evaluate", scored)
    cfg = image_config(
        tmp_path,
        max_steps=6,
        eval_steps=1,
        save_steps=1,
        target_modules=["0", "6"],
        modules_to_save=[],
        load_best_model_at_end=True,
    )
    result = train(cfg)
    run = Path(cfg.output_dir)
    kept = json.loads((run / f"checkpoint-{best}" / "adapter" / "slimtune.json").read_text())["adapter"]["layers"]
    ranks = {row["name"]: row["rank"] for row in json.loads((run / "ranks.json").read_text())}
    assert result.metrics["best_step"] == best
    assert ranks == {name: entry["options"]["rank"] - 1 for name, entry in kept.items()}
    assert result.metrics["trainable_parameters"] == sum(t.numel() for t in weights(run).values())
    losses = {e["step"]: e["loss"] for e in events(run, "eval")}
    assert result.metrics["validation"]["loss"] == pytest.approx(losses[best], rel=1e-6)


def test_shapes_stay_where_they_must(tmp_path, monkeypatch):
    """Under torch.compile a controller that was not told how is told to mask; one that was is left alone."""
    from slimtune.hf.trainer import fix_shapes

    told, asked, other = Shift(masked=False), Shift(), st.Ramp(steps=3)
    fix_shapes([told, asked, other])
    assert (told.masked, asked.masked) == (False, True) and not hasattr(other, "masked")


METHODS = {  # steps before, at and after one of the rounds
    "adalora": ({"rank": 2, "t_init": 2, "t_final": 3, "delta_t": 2}, [3, 4, 5]),
    "elalora": ({"rank": 2, "warmup": 2, "final": 3, "interval": 2}, [3, 4, 12]),
    "ardlora": ({"rank": 3, "penalty": 1.0, "warmup": 1, "interval": 2, "final": 2}, [1, 6, 7]),
    "lorapro": ({"rank": 2, "form": "full"}, [1, 8]),
    "gora": ({"rank": 3, "floor": 1, "ceiling": 6}, [1, 8]),
}
MOVING = ("adalora", "elalora", "ardlora")


@pytest.mark.parametrize("method", METHODS)
def test_methods_resume_exactly(method, llama, text, tmp_path):
    options, steps = METHODS[method]
    cfg = text_config(llama, text, tmp_path / "run", method=method, method_options=options)
    _, ranks = resumes(cfg, tmp_path, steps)
    moved = [row["name"] for row in ranks if row["rank"] != row["start_rank"]]
    assert bool(moved) == bool(events(tmp_path / "run", "ranks")) == (method in MOVING)
    found = inspect(tmp_path / "run")
    assert [(row.name, row.rank, row.parameters) for row in found.rows] == [
        (row["name"], row["rank"], row["parameters"]) for row in ranks
    ]
    report = verify(tmp_path / "run")
    assert report.ok, report


def test_ranks_and_values_from_the_data(llama, text, tmp_path, monkeypatch):
    """The data are looked at once, in an order that the seed fixes, and not again by a run that goes on."""
    from slimtune import calibrate

    options = {"method": "gora", "method_options": {"rank": 3, "floor": 1, "ceiling": 6}, "calibration_batches": 4}
    straight, seen, fit = tmp_path / "run", [], calibrate.fit

    def watched(recipe, model, batches, *rest, **named):
        seen.append(batches)
        return fit(recipe, model, batches, *rest, **named)

    monkeypatch.setattr(calibrate, "fit", watched)
    result = train(text_config(llama, text, straight, **options))
    (told,) = events(straight, "calibration")
    assert told["batches"] == result.metrics["calibration"]["batches"] == len(seen[0]) == 4 and told["examples"] == 12
    ranks = {row["name"]: row["rank"] for row in json.loads((straight / "ranks.json").read_text())}
    assert len(set(ranks.values())) > 1 and set(ranks.values()) <= set(range(1, 7))
    train(text_config(llama, text, tmp_path / "again", **options))
    same(straight, tmp_path / "again")
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*seen, strict=True) for key in a)
    cut(straight, tmp_path / "cut", 5)
    again = train(text_config(llama, text, tmp_path / "cut", **options))
    assert len(seen) == 2 and again.metrics["calibration"] == result.metrics["calibration"]
    same(straight, tmp_path / "cut")


def test_batches_that_nothing_reads_are_refused(tmp_path):
    with pytest.raises(st.ConfigError, match="calibration_batches: lora starts without looking at the data"):
        train(image_config(tmp_path, calibration_batches=3))
    with pytest.raises(ValueError, match="method head has no adapter that would read it"):
        image_config(tmp_path, method="head", method_options={}, target_modules="all-linear", calibration_batches=3)


def test_a_budget_counts_what_is_left(llama, text, tmp_path):
    """AdaLoRA begins with 1.5 times the ranks that the budget pays for, GoRA shares them out."""
    from slimtune.app.method import fit_rank, meta_copy
    from slimtune.app.tasks import build_task

    cfg = text_config(llama, text, tmp_path / "run", method="adalora", method_options={}, budget=1)
    model = build_task(cfg).model

    def size(recipe):
        ghost = meta_copy(model)
        st.adapt(ghost, recipe)
        return sum(p.numel() for _, p in st.trainable_parameters(ghost))

    four = size(st.adalora(rank=4, initial_rank=4))
    assert size(st.adalora(rank=4)) == four * 3 // 2
    assert [fit_rank(cfg, model, four + more) for more in (-1, 0)] == [3, 4]
    bounded = cfg.model_copy(update={"method_options": {"initial_rank": 6}})
    assert fit_rank(bounded, model, 100 * four) == 6
    elalora = cfg.model_copy(update={"method": "elalora", "method_options": {"ceiling": 9}})
    assert fit_rank(elalora, model, four) == 4
    gora = cfg.model_copy(update={"method": "gora", "method_options": {"floor": 1}})
    assert [fit_rank(gora, model, size(st.lora(rank=4)) + more) for more in (-1, 0)] == [3, 4]


def test_starts_that_take_long_tell_how_far_they_are(llama, text, tmp_path, monkeypatch):
    """PiSSA decomposes every weight: each is counted, by a run that goes on none."""
    from contextlib import contextmanager

    from slimtune.app import method

    counted = []

    @contextmanager
    def meter(what):
        yield lambda done, total: counted.append((what, done, total))

    monkeypatch.setattr(method, "meter", meter)
    options = {"method": "pissa", "method_options": {"rank": 2}, "max_steps": 2}
    cfg = text_config(llama, text, tmp_path / "run", **options)
    result = train(cfg)
    layers = len(json.loads((tmp_path / "run" / "ranks.json").read_text()))
    assert counted == [("initialising", i, layers) for i in range(1, layers + 1)]
    cut(tmp_path / "run", tmp_path / "cut", 1)
    train(cfg.model_copy(update={"output_dir": str(tmp_path / "cut")}))
    same(tmp_path / "run", tmp_path / "cut")
    assert inspect(tmp_path / "run").parameters == result.metrics["trainable_parameters"]  # not the frozen start


def test_slots_that_hold_no_rank_are_told_from_the_first_step(llama, text, tmp_path):
    options = {"rank": 2, "ceiling": 5, "warmup": 2, "final": 1, "interval": 2}
    train(text_config(llama, text, tmp_path / "run", method="elalora", method_options=options, max_steps=4))
    told = events(tmp_path / "run", "ranks")
    assert [(e["step"], sum(e["ranks"].values()) / len(e["ranks"])) for e in told[:2]] == [(0, 5), (1, 2)]


def test_a_run_that_stops_before_its_ranks_are_pruned_says_so(tmp_path, capsys):
    llama, text = tinyrun.make_llama(tmp_path / "llama"), tinyrun.make_text(tmp_path / "text.jsonl")
    options = {"method": "adalora", "learning_rate": 10.0, "early_stopping_patience": 1}
    train(text_config(llama, text, tmp_path / "run", max_steps=40, eval_steps=2, **options))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1 and "AdaLoRA: the run ended after " in told[0] and " of its 40 steps" in told[0]
