"""The command line: exit codes, one message, nothing heavy before it is needed."""

import json
import subprocess
import sys

import pytest

from slimtune import cli

VERBS = ["demo", "train", "compress", "merge", "convert", "verify", "inspect", "methods", "report"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["--version"], ["train", "bad.yaml"]])
def test_help_and_configuration_errors_import_nothing_heavy(tmp_path, arguments):
    (tmp_path / "bad.yaml").write_text("task: classify\nlearnig_rate: 1\nmethod: lorra\n")
    code = (
        "import sys\nfrom slimtune.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == (2 if "bad.yaml" in arguments else 0), done.stderr
    assert "Traceback" not in done.stderr
    if "--help" in arguments and len(arguments) == 1:
        assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["bogus"], 2, "No such command 'bogus'"),
        (["train"], 2, "give a configuration"),
        (["train", "nowhere.yaml"], 2, "nowhere.yaml: no such file"),
        (["train", "--config", "nowhere.yaml", "seed=1"], 2, "nowhere.yaml: no such file"),
        (["train", "task=classify", "sed=1"], 2, "command line: sed=1: unknown key 'sed'"),
        (["train", "--colour"], 2, "No such option"),
        (["methods", "lorra"], 2, "did you mean 'lora'"),
        (["inspect", "nowhere"], 2, "nowhere"),
        (["verify", "nowhere"], 2, "nowhere"),
        (["merge", "nowhere", "--output", "out"], 2, "nowhere"),
        (["merge", "nowhere"], 2, "--output"),
        (["convert", "nowhere", "--output", "out"], 2, "nowhere"),
        (["convert", "nowhere", "--output", "out", "--to", "dora"], 2, "'dora'"),
    ],
)
def test_wrong_usage(tmp_path, monkeypatch, capsys, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == code
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and said in errors and "Traceback" not in errors


def test_unexpected_errors_keep_their_traceback_for_debug(monkeypatch, capsys):
    from slimtune.app import config

    def broken(*arguments):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(config, "load_config", broken)
    assert cli.main(["train", "x.yaml"]) == 1
    assert capsys.readouterr().err == "error: RuntimeError: two lines (--debug shows where)\n"
    for arguments in (["--debug", "train", "x.yaml"], ["train", "x.yaml", "--debug"]):
        assert cli.main(arguments) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("Traceback") and errors.endswith("\nerror: RuntimeError: two lines\n")


def test_debug_keeps_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--debug", "train", "nowhere.yaml"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback") and "\nerror: nowhere.yaml: no such file" in errors


def test_methods(capsys):
    assert cli.main(["methods"]) == 0
    assert {"lora", "dora", "full", "head"} <= {
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line
    }
    assert cli.main(["methods", "dora"]) == 0
    assert "2402.09353" in capsys.readouterr().out
    for name, said in (
        ("full", "every weight"),
        ("head", "modules_to_save"),
        ("adalora", "controllers: Orthogonality, AdaLoRA"),
        ("gora", "starting values: gora (from calibration_batches of training data)"),
        ("eva", "ranks before training: eva"),
        ("pissa", "starting values: pissa\n"),
    ):
        assert cli.main(["methods", name]) == 0
        assert said in capsys.readouterr().out


def test_schema(capsys):
    assert cli.main(["train", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False and "learning_rate" in schema["properties"]
