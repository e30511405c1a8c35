"""The benchmark harness on a tiny model. No timing is asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import memory, parity, report, run, small, timing
from bench.cases import CASES
from bench.model import COLUMNS, SIZES, build, llama

TINY = SIZES["tiny"]


class Square(nn.Module):
    """A column whose forward keeps exactly x."""

    def __init__(self):
        super().__init__()
        self.name, self.model, self.trained, self.optimizer = "square", self, [], None
        self.x = torch.ones(1000, requires_grad=True)

    def forward(self):
        return ((self.x * 1.0) ** 2).sum()

    def before_update(self):
        pass

    update = after_update = before_update

    def clear(self):
        self.x.grad = None


def test_steps_are_interleaved_and_compared_with_their_neighbours():
    seconds = iter([1.0, 4.0, 3.0, 10.0, 1.0, 2.0, 1.0, 3.0, 3.0])
    samples = timing.interleave(lambda _: {"step": next(seconds)}, "limit", ["peft", "ours"], rounds=2)
    assert [who for who, _ in samples] == ["limit", "peft", "limit", "ours"] * 2 + ["limit"]
    assert timing.ratios(samples, "peft", "step") == [2.0, 2.0]
    assert timing.ratios(samples, "ours", "step") == [5.0, 1.5]


def test_spread_is_median_and_quartiles():
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert timing.spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_saved_bytes_counts_each_storage_once_and_no_weights():
    assert memory.saved_bytes(Square()) == 4000
    column = build("limit", "lora", TINY)
    kept = memory.saved_bytes(column)
    assert 0 < kept == memory.saved_bytes(column)
    assert memory.saved_bytes(build("peft", "lora", TINY)) > kept


def test_peak_covers_what_is_saved():
    column = build("limit", "lora", TINY)
    assert memory.peak_bytes(column, "cpu")["peak"] >= memory.saved_bytes(column)


def test_columns_share_weights_and_train_the_same_number_of_parameters():
    limit, theirs, ours = (build(name, "dora", TINY) for name in COLUMNS)
    assert not limit.trained
    assert sum(p.numel() for p in theirs.trained) == sum(p.numel() for p in ours.trained) > 0
    torch.testing.assert_close(theirs.forward(), limit.forward())
    torch.testing.assert_close(ours.forward(), limit.forward())


@pytest.mark.parametrize("method", CASES)
def test_ours_equals_peft(method):
    difference = parity.difference(method)
    assert (difference is None) == (CASES[method].peft is None)


def test_parity_notices_a_wrong_scale(monkeypatch):
    import slimtune as st

    load = st.import_peft

    def wrong(model, path):
        names = load(model, path)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("B"):
                    p *= 1.01
        return names

    monkeypatch.setattr(st, "import_peft", wrong)
    with pytest.raises(RuntimeError, match="lora: ours and PEFT differ by"):
        parity.difference("lora")


def test_meta_model_has_no_storage():
    assert all(p.is_meta for p in llama(TINY, device="meta").parameters())


def test_tiny_call_and_lifecycle_report_every_column():
    call = small.tiny_call("dora", "cpu", COLUMNS, blocks=1, calls=2)
    assert set(call) == {"peft", "ours", "limit_seconds"}
    for column in ("peft", "ours"):
        assert small.lifecycle(column, "lora", TINY, "fp32", "cpu", repeats=1)["file_bytes"] > 0


def test_a_run_writes_results_and_a_page(tmp_path):
    arguments = [
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--results",
        str(tmp_path),
        "--out",
        str(tmp_path / "page.md"),
    ]
    assert run.main([*arguments, "--methods", "lora,lora_rank_dropout", "--dtype", "fp32", "--measure", "step"]) == 0
    content = json.loads((tmp_path / "cpu-fp32-lora.json").read_text())
    assert {"step", "parity", "method", "dtype", "device", "model"} == set(content)
    page = (tmp_path / "page.md").read_text()
    assert "| lora | - |" in page  # goals are for the default model
    assert "Goals not reached" in page

    assert run.main([*arguments, "--methods", "lora", "--dtype", "fp32", "--measure", "call"]) == 0
    assert "step" in json.loads((tmp_path / "cpu-fp32-lora.json").read_text())
    assert "hidden 32" not in page
    other = [*arguments, "--hidden", "32", "--methods", "lora", "--dtype", "fp32", "--measure", "call"]
    assert run.main(other) == 0
    assert "step" not in json.loads((tmp_path / "cpu-fp32-lora.json").read_text())


def test_missed_goals_are_named(tmp_path):
    from dataclasses import asdict

    row = {
        "method": "lora",
        "dtype": "fp32",
        "device": "cpu",
        "model": asdict(SIZES["cpu"]),
        "step": {"ours": {"ratio": {"median": 1.5, "low": 1.4, "high": 1.6}}},
        "memory": {"ours": {"saved": 158.2 * 2**20}},
    }
    (tmp_path / "cpu-fp32-lora.json").write_text(json.dumps(row))
    page = report.page(tmp_path)
    assert "- lora fp32, step time: 1.50, goal 1.06" in page
    assert "kept for backward:" not in page


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "lora,lorra"], "unknown lorra"),
        (["--dtype", "fp8"], "unknown fp8"),
        (["--columns", "ours"], "limit must be among them"),
    ],
)
def test_wrong_arguments_are_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as refused:
        run.main(arguments)
    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err
