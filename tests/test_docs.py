"""What the documentation shows is what the code does."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import slimtune

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import tables  # noqa: E402

CORE = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(slimtune.__path__, "slimtune.")
    if name.split(".")[1] not in ("app", "cli", "hf", "__main__")
)


@pytest.mark.parametrize("name", CORE)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", tables.PLACES)
def test_tables_are_generated(name: str) -> None:
    page, table = tables.PLACES[name]
    assert tables.block(name).findall(page.read_text(encoding="utf-8")) == [table()], "run tools/tables.py --write"


def test_every_public_name_is_in_the_reference() -> None:
    listed = re.findall(r"^::: slimtune\.(\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    packages = [getattr(slimtune, name) for name in listed if isinstance(getattr(slimtune, name, None), ModuleType)]
    names = {name.rpartition(".")[2] for name in listed} | set(vars(slimtune.errors))
    names |= {name for package in packages for name in getattr(package, "__all__", ())}
    modules = {name for name in slimtune.__all__ if isinstance(getattr(slimtune, name), ModuleType)}
    assert set(slimtune.__all__) <= names | modules


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/quickstart.md",
        "docs/concepts.md",
        "docs/methods.md",
        "docs/adaptive.md",
        "docs/compression.md",
        "docs/lorae.md",
        "docs/decompositions.md",
        "docs/huggingface.md",
    ],
)
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    """The Python blocks of a page, in order, as one script in an empty folder."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S))
    assert code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_yaml_blocks_are_valid_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.app.compress.config import load_compress_config
    from slimtune.app.config import load_config

    monkeypatch.chdir(tmp_path)
    blocks = [
        block
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    ]
    assert blocks
    for block in blocks:
        for name in re.findall(r"dataset_name: (\S+)", block):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()
        Path("config.yaml").write_text(block, encoding="utf-8")
        load_compress_config("config.yaml") if block.startswith("# compress") else load_config("config.yaml")


def test_commands_parse() -> None:
    import typer.main

    from slimtune.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    pages = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    lines = [
        line
        for page in pages
        for line in re.findall(r"^\$ slimtune (.*?)\s*(?:#.*)?$", page.read_text(encoding="utf-8"), re.M)
    ]
    assert lines
    for line in lines:
        verb, *arguments = line.split()
        commands[verb].make_context(verb, arguments)


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert os.path.exists(page.parent / target), f"{page.name} links to {target}"
