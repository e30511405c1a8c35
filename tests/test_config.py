"""A configuration says what is wrong with it, where, and all of it, before anything heavy is imported."""

import contextlib
import inspect
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some

import slimtune as st
from slimtune.app import rules, yamlfile
from slimtune.app.config import TrainConfig, load_config
from slimtune.errors import ConfigError

GOOD = """\
task: classify
model_name_or_path: embedded:minilm
dataset_name: data.jsonl
output_dir: run
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"text": "a", "label": "b"}\n')
    Path("taken").write_text("")

    def write(text):
        Path("run.yaml").write_text(text) if isinstance(text, str) else Path("run.yaml").write_bytes(text)
        return "run.yaml"

    return write


BAD = [
    ("learnig_rate: 1", r"run.yaml:5: unknown key 'learnig_rate'; did you mean 'learning_rate'\?"),
    ("zzz: 1", "run.yaml:5: unknown key 'zzz'$"),
    ("seed: 1\nseed: 2", r"run.yaml:6: key 'seed' is written twice \(first on line 5\)"),
    ("method_options: {rank: 1, rank: 2}", "run.yaml:5: key 'rank' is written twice"),
    ("seed: three", "run.yaml:5: seed: expected a whole number, found 'three'"),
    ("seed: 1.5", "run.yaml:5: seed: expected a whole number, found 1.5"),
    ("seed: yes", "run.yaml:5: seed: expected a whole number, found true .*quote the word"),
    ("learning_rate: fast", "run.yaml:5: learning_rate: expected a number, found 'fast'"),
    ("learning_rate: -1", "run.yaml:5: learning_rate: expected greater than 0, found -1"),
    ("learning_rate: .nan", "run.yaml:5: learning_rate: expected a finite number"),
    ("learning_rate: .inf", "run.yaml:5: learning_rate: expected a finite number"),
    ("bf16: 1", "run.yaml:5: bf16: expected true or false, found 1"),
    ("labels: [yes, no]", "run.yaml:5: labels.0: expected text, found true"),
    ("labels:\n- a\n- 2", "run.yaml:7: labels.1: expected text, found 2"),
    ("labels: [a, a]", "run.yaml:5: labels: a label is written twice"),
    ("target_modules: 3", "run.yaml:5: target_modules: expected text or a list, found 3"),
    ("method: lorra", r"run.yaml:5: method: unknown method 'lorra'; did you mean 'lora'\? \(known: .*dora.*full"),
    ("method: full\nbudget: 5", "run.yaml:6: budget: method full has no adapter that would read it"),
    ("method_options: {rnak: 3}", r"run.yaml:5: method_options: lora has no option 'rnak'; did you mean 'rank'\?"),
    ("budget: 2k\nmethod_options: {rank: 3}", "run.yaml:5: budget: budget chooses the rank"),
    ("budget: lots", "run.yaml:5: budget: expected a whole number, found 'lots'"),
    ("packing: true", r"run.yaml:5: packing: task classify does not read it \(only sft\)"),
    ("augment: true", "run.yaml:5: augment: task classify does not read it"),
    ("model_options: {a: 1}", "run.yaml:5: model_options: only used with model_factory"),
    ("model_factory: a:b", "run.yaml:5: model_factory: give one of .*not both"),
    ("max_steps: 5\nnum_train_epochs: 2", "run.yaml:6: num_train_epochs: max_steps replaces it"),
    ("metric_for_best_model: f1", "run.yaml:5: metric_for_best_model: read only with"),
    ("lr_scheduler_type: cosin", "run.yaml:5: lr_scheduler_type: expected 'linear', 'cosine'"),
    ("eval_dataset_name: nope.csv", "run.yaml:5: eval_dataset_name: no such file or folder: 'nope.csv'"),
    ("resume_from_checkpoint: nowhere", "run.yaml:5: resume_from_checkpoint: no such folder: 'nowhere'"),
    ("1: 2", "run.yaml:5: expected a name as key, found 1"),
    ("a: [1", "run.yaml:6: not valid YAML"),
    ("a: !!python/object/apply:os.system [x]", "run.yaml:5: not valid YAML: could not determine a constructor"),
    ("a: " + "[" * 60 + "]" * 60, "run.yaml: not valid YAML: nested deeper than 20 levels"),
    ("a: &a [*a]", "run.yaml"),
    ("a: *b", "run.yaml:5: not valid YAML: found undefined alias"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_one_mistake(write, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(GOOD + text + "\n"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: missing key 'task'"),
        ("- a\n", "run.yaml:1: expected `key: value` lines, found a sequence"),
        (b"\xff\xfe\x00", "run.yaml: not UTF-8"),
        ("# " + "x" * 1_000_001, "run.yaml: 1,000,003 bytes is not a configuration"),
        (GOOD.replace("run\n", "taken\n"), "run.yaml:4: output_dir: 'taken' is a file"),
        (GOOD.replace("data.jsonl", "gone.jsonl"), "run.yaml:3: dataset_name: no such file or folder: 'gone.jsonl'"),
        (GOOD.replace("model_name_or_path: embedded:minilm\n", ""), "run.yaml: give one of .*not neither"),
    ],
)
def test_the_file_as_a_whole(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text))


def test_a_pattern_is_a_dataset_name(write):
    cfg = load_config(write(GOOD), ["dataset_name=da*.jsonl", "eval_dataset_name=./[a-d]*.jsonl"])
    assert (cfg.dataset_name, cfg.eval_dataset_name) == ("da*.jsonl", "./[a-d]*.jsonl")


def test_all_mistakes_at_once_in_the_order_of_the_file(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write(GOOD + "sed: 1\nbf16: maybe\nlearning_rate: x\n"))
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [f"run.yaml:{n}" for n in (5, 6, 7)]
    with pytest.raises(ConfigError) as caught:
        load_config(None)
    for key in ("task", "dataset_name", "output_dir"):
        assert f"command line: missing key '{key}'" in str(caught.value)


def test_overrides(write):
    """YAML values, a table's entry by a dot, the last one wins, and the place of an error."""
    path = write(GOOD + "method_options: {rank: 2, alpha: 3.0}\n")
    cfg = load_config(
        path, ["method_options.rank=4", "learning_rate=2e-4", "target_modules=[q, v]", "seed=1", "seed=2"]
    )
    assert cfg.method_options == {"rank": 4, "alpha": 3.0}
    assert (cfg.learning_rate, cfg.target_modules, cfg.seed) == (2e-4, ["q", "v"], 2)
    for override, message in [
        ("seed", "command line: expected key=value, found 'seed'"),
        ("seed=[", "command line: seed=.*not valid YAML"),
        ("sed=1", "command line: sed=1: unknown key 'sed'; did you mean 'seed'"),
        ("seed=x", "command line: seed=x: seed: expected a whole number, found 'x'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(path, [override])


@pytest.mark.parametrize(("text", "value"), [("200k", 200_000), ("1.5M", 1_500_000), (7, 7), ("2000", 2000)])
def test_budget_is_a_number_with_a_unit(write, text, value):
    assert load_config(write(GOOD + f"budget: {text}\n")).budget == value


def test_resolved_is_the_same_configuration(write):
    cfg = load_config(write(GOOD + "budget: 20k\nreport_to: none\nexclude_modules: pooler\n"))
    assert load_config(write(yaml.safe_dump(cfg.resolved(), sort_keys=False))) == cfg
    assert (cfg.report_to, cfg.exclude_modules) == ([], ["pooler"])


@settings(max_examples=200, deadline=None)
@given(some.text(max_size=200) | some.binary(max_size=200))
def test_any_file_is_read_or_refused(tmp_path_factory, text):
    """Nothing but ConfigError comes out, whatever goes in."""
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError):
        load_config(path)


@settings(max_examples=100, deadline=None)
@given(some.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_as_python_writes_them(number):
    assert yamlfile.parse(repr(number)) == number


def test_every_field_is_documented_and_read():
    """Each has a description, and some other module of the application reads it by name."""
    folder = Path(inspect.getfile(TrainConfig)).parent
    code = "\n".join(
        path.read_text() for path in folder.rglob("*.py") if path.name not in ("config.py", "rules.py", "demo.py")
    )
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        assert re.search(rf"\bcfg\.{name}\b", code), f"{name} is read by nothing"


def test_names_read_from_the_source_are_the_recipes():
    options = {name: tuple(inspect.signature(f).parameters) for name, f in st.recipes.RECIPES.items()}
    assert rules.recipe_options() == dict(sorted(options.items()))
