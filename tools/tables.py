"""Tables of the documentation that are made from the code: print them, or `--write` them between their markers."""

import inspect
import re
import sys
from pathlib import Path

from pydantic_core import PydanticUndefined

from slimtune.app.compress.config import CompressConfig
from slimtune.app.config import TaskConfig, TrainConfig
from slimtune.recipes import RECIPES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from bench import adaptive, costs, lorae, lord, lowrank, lowrank_costs, real  # noqa: E402


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def methods() -> str:
    """A row per recipe: the first paragraph of its docstring (the formula) and the first sentence of the second (the
    source)."""
    rows = []
    for name, recipe in sorted(RECIPES.items()):
        formula, source, *_ = (" ".join(p.split()) for p in re.split(r"\n\s*\n", inspect.getdoc(recipe) or ""))
        paper = re.split(r"(?<! al)(?<! eq)(?<! eqs)\. ", source)[0].rstrip(".")
        paper = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", paper)
        rows.append([f"`{name}`", formula.rstrip("."), paper])
    return markdown(["method", "effective weight", "source"], rows)


def options() -> str:
    """A row per recipe: its learning rate and its options with their defaults."""
    rows = []
    for name, recipe in sorted(RECIPES.items()):
        own = inspect.signature(recipe).parameters.values()
        shown = ", ".join(f"`{p.name}`" if p.default is None else f"`{p.name}={p.default}`" for p in own)
        rows.append([f"`{name}`", f"{recipe().learning_rate:g}", shown])
    return markdown(["method", "learning rate", "options"], rows)


def config(cls: type[TaskConfig] = TrainConfig) -> str:
    """A row per key of a training run's configuration."""
    rows = []
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else "" if default is None else f"`{default}`"
        rows.append([f"`{name}`", shown, field.description or ""])
    return markdown(["key", "default", "meaning"], rows)


def compress() -> str:
    """A row per key of a compression's configuration that training does not have, or has in another sense."""
    own = {name: field for name, field in CompressConfig.model_fields.items() if name not in TaskConfig.model_fields}
    table = config(CompressConfig).splitlines(keepends=True)
    return "".join(line for line in table if not line.startswith("| `") or line.split("`")[1] in own)


METHODS = ROOT / "docs" / "methods.md"
PLACES = {
    "methods": (ROOT / "README.md", methods),
    "options": (METHODS, options),
    "config": (ROOT / "docs" / "cli.md", config),
    "compress": (ROOT / "docs" / "cli.md", compress),
    "real": (METHODS, real.table),
    "costs": (METHODS, real.costs),
    "adaptive": (ROOT / "docs" / "adaptive.md", adaptive.table),
    "adaptive-costs": (ROOT / "docs" / "adaptive.md", costs.table),
    "lorae": (ROOT / "docs" / "lorae.md", lorae.table),
    "lorae-matrices": (ROOT / "docs" / "lorae.md", lorae.inner),
    "rates": (ROOT / "docs" / "adaptive.md", adaptive.rates),
    "lord": (ROOT / "docs" / "compression.md", lord.table),
    "lowrank": (ROOT / "docs" / "compression.md", lowrank.table),
    "lowrank-costs": (ROOT / "docs" / "compression.md", lowrank_costs.table),
}


def block(name: str) -> re.Pattern[str]:
    """What stands between the markers of a table."""
    return re.compile(rf"(?<=<!-- {name}:begin -->\n).*?(?=<!-- {name}:end -->)", re.DOTALL)


if __name__ == "__main__":
    for name, (page, table) in PLACES.items():
        if sys.argv[1:] == ["--write"]:
            text = page.read_text(encoding="utf-8")
            page.write_text(block(name).sub(lambda _, table=table: table(), text), encoding="utf-8")
        else:
            print(table())
