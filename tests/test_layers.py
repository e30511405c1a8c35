"""Imports point down (the layer table, checked on the source), and `import slimtune` stays light."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "slimtune"
LAYERS = [
    {"errors", "ops"},  # tensors in, tensors out
    {"structures", "compositions", "recipe"},  # the two families, and their pairing
    {"layouts", "structured", "factors", "initialisers", "layers"},  # where they live
    {"targets", "verbs", "ranks", "taps", "merging", "compress", "conversion", "speedup", "substitutes"},  # verbs
    {"recipes", "allocate", "calibrate", "groups", "controllers", "models", "contrib", "oneshot"},  # the field
    {"files", "folders", "io", "compressed", "peft_format", "hf"},  # files and the ecosystem
    {"_public", "app", "cli", "__main__"},  # the application
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
THIRD_PARTY = [{"torch"}] * 5 + [{"torch", "safetensors", "transformers", "peft", "accelerate"}]
OPTIONAL = {"models/latents.py": {"sklearn"}}  # imported when called, with an error that names the package
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def imported(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything a file imports, wherever in the file it does."""
    package = ["slimtune", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}" for alias in node.names) if module == "slimtune" else (module,))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_down(path: Path) -> None:
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert part in LEVEL, f"{part} is in no layer: give it one in tests/test_layers.py"
    level = LEVEL[part]
    for name in imported(path):
        top, *rest = name.split(".")
        if top != "slimtune":
            known = sys.stdlib_module_names | OPTIONAL.get(path.relative_to(SOURCE).as_posix(), set())
            allowed = level >= len(THIRD_PARTY) or top in THIRD_PARTY[level] | known
            assert allowed, f"layer {level} may not import {top}"
        elif not rest or rest[0] not in LEVEL:
            assert level == len(LAYERS) - 1, f"only the application may import the public names ({name})"
        else:
            assert LEVEL[rest[0]] <= level, f"layer {level} imports {name} of layer {LEVEL[rest[0]]}"


def test_import_is_light() -> None:
    heavy = [
        "transformers",
        "peft",
        "datasets",
        "accelerate",
        "pydantic",
        "typer",
        "rich",
        "yaml",
        "matplotlib",
        "pandas",
        "sklearn",
    ]
    code = f"import json, sys, slimtune; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []
