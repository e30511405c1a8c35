"""The command line: thin verbs over `slimtune.app`; errors become one message and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

Clicks = cast("type[Exception]", typer.BadParameter.__mro__[2])  # ClickException, wherever this typer keeps it

app = typer.Typer(
    name="slimtune",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 verification failed, 130 interrupted.",
)

Run = Annotated[Path, typer.Argument(help="A run, adapter or model folder.")]
Base = Annotated[str | None, typer.Option("--model", help="The base model, if not the recorded one.")]


@app.callback(invoke_without_command=True)
def slimtune(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Make a PyTorch model fit a task with few numbers."""
    if version:
        from importlib.metadata import version as installed

        print(installed("slimtune"))
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="The run folder.")] = Path("runs/demo"),
) -> None:
    """Fine-tune the embedded encoder on this Python's standard library; a few minutes, nothing downloaded."""
    from slimtune.app.demo import demo as run

    run(output)


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(help="The YAML file, or a first key=value.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as method_options.rank=4."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--config", help="The YAML file.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the file.")] = False,
) -> None:
    """Train an adapter, or a whole model, from one YAML file; continues an interrupted run."""
    from slimtune.app.config import TrainConfig, load_config

    if schema:
        _print_schema(TrainConfig)
        return
    checked = load_config(*_given("train", config, list(overrides or []), file))

    from slimtune.app.train import train as run

    result = run(checked)
    first = os.environ.get("RANK", "0") == "0"
    if result.interrupted:
        if first:
            again = result.output_dir / "config.yaml"
            print(f"stopped and saved; slimtune train --config {again} continues", file=sys.stderr)
        raise typer.Exit(130)
    from slimtune.app.summary import closing_lines

    for line in closing_lines(result) if first else ():
        print(line)


@app.command()
def compress(
    config: Annotated[str | None, typer.Argument(help="The YAML file, or a first key=value.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as keep=0.7.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--config", help="The YAML file.")] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Print the plan and stop.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the file.")] = False,
) -> None:
    """Make a model's weights smaller, and measure what that costs; continues an interrupted call."""
    from slimtune.app.compress.config import CompressConfig, load_compress_config

    if schema:
        _print_schema(CompressConfig)
        return
    checked = load_compress_config(
        *_given("compress", config, list(overrides or []) + (["plan_only=true"] if plan_only else []), file)
    )

    from slimtune.app.compress.command import closing_lines
    from slimtune.app.compress.command import compress as run

    result = run(checked)
    if result.interrupted:
        print("stopped; what was finished is kept, the same command continues", file=sys.stderr)
        raise typer.Exit(130)
    for line in closing_lines(result):
        print(line)


@app.command()
def merge(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the merged model.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: the base's.")] = None,
    max_loss: Annotated[float, typer.Option(help="The share of the change that may be lost.")] = 0.05,
    model: Base = None,
) -> None:
    """Write an adapter into its base model's weights; exit code 3 if they cannot hold it."""
    from slimtune.app.merge import merge_run

    print(merge_run(run, output, dtype, max_loss, model))


@app.command()
def convert(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the converted adapter.")],
    to: Annotated[str, typer.Option(help="The form: lora, in PEFT's format.")] = "lora",
    rank: Annotated[
        int | None, typer.Option(help="The largest rank; default: the exact one, or the one within the tolerance.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="The error of a layer's change that is allowed.")] = 1e-3,
    multiple: Annotated[int, typer.Option(help="Round the rank up to a multiple of this, with zeros.")] = 1,
    model: Base = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write an adapter as plain LoRA, exactly where that exists; exit code 3 if it is not near enough."""
    from slimtune.app.convert import convert as run_convert

    done = run_convert(run, output, to, tolerance, rank=rank, multiple=multiple, model=model)
    print(done.to_json() if json else f"{done}\nwritten and read back: {output}")


@app.command()
def verify(run: Run, model: Base = None) -> None:
    """Check that the files are intact and that the adapter changes what the model says; exit code 3 if not."""
    from slimtune.app.verify import verify as check

    found = check(run, model)
    print(found)
    if not found.ok:
        raise typer.Exit(3)


@app.command()
def inspect(
    run: Run,
    model: Base = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Singular values: what each rank would save and cost.")
    ] = False,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw them: a .png or .svg file.")] = None,
) -> None:
    """Show what an adapter or a model holds: method, ranks, sizes and norms by layer."""
    if picture is not None:
        from slimtune.app.spectra_picture import check_picture

        check_picture(picture)
    from slimtune.app.inspect import inspect as look

    found = look(run, model, spectrum=spectra or picture is not None)
    print(found.to_json()) if json else found.print()
    if picture is not None:
        found.picture(picture)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None) -> None:
    """List the methods, or print one with its formula, source, options and defaults."""
    from slimtune.app.methods import text

    print(text(name))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run, finished or not, or of a compression, from what its folder holds."""
    from slimtune.app.compress.state import RECORD

    if (run / RECORD).is_file():
        from slimtune.app.compress.report import write_report as write_compress_report

        print(write_compress_report(run))
        return
    from slimtune.app.report import write_report

    print(write_report(run))


def _given(verb: str, config: str | None, overrides: list[str], file: Path | None) -> tuple[Path | None, list[str]]:
    """(file, overrides) of a verb that takes one YAML file and key=value."""
    if config is not None and (file is not None or "=" in config):
        overrides = [config, *overrides]
    elif config is not None:
        file = Path(config)
    if file is None and not overrides:
        raise typer.BadParameter(f"give a configuration: slimtune {verb} FILE.yaml [key=value ...]")
    return file, overrides


def _print_schema(config: Any) -> None:
    import json

    print(json.dumps(config.model_json_schema(), indent=2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = typer.main.get_command(app).main(
            [word for word in words if word != "--debug"], prog_name="slimtune", standalone_mode=False
        )
        if code == 130:
            print("interrupted", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except Clicks as error:
        print(f"error: {error.format_message()} (slimtune --help)", file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing to flush to
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from slimtune.errors import SlimtuneError

        if debug:
            traceback.print_exc()
        if isinstance(error, SlimtuneError):
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        what = " ".join(str(error).split())
        hint = "" if debug else " (--debug shows where)"
        print(f"error: {type(error).__name__}: {what}{hint}", file=sys.stderr)
        return 1
