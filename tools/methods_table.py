"""The README's table of methods, made from the recipes: print it, or `--write` it between the markers.

One row per recipe: the first paragraph of its docstring (the formula), its options with their defaults, the
learning rate it starts from, and the first sentence of the second paragraph (the source).
"""

import inspect
import re
import sys
from pathlib import Path

from slimtune.recipes import RECIPES

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(?<=<!-- methods:begin -->\n).*?(?=<!-- methods:end -->)", re.DOTALL)


def table() -> str:
    """Markdown, ending in a newline."""
    rows = ["| method | effective weight | options | learning rate | source |", "|---|---|---|---|---|"]
    for name, recipe in sorted(RECIPES.items()):
        formula, source, *_ = re.split(r"\n\s*\n", inspect.getdoc(recipe) or "")
        arxiv = re.search(r"arXiv (\d{4}\.\d{4,5})", source)
        paper = re.split(r"(?<! al)(?<! eq)\. ", " ".join(source.split()))[0].rstrip(".")
        if arxiv:
            paper = paper.replace(arxiv[0], f"[{arxiv[0]}](https://arxiv.org/abs/{arxiv[1]})")
        options = ", ".join(
            f"`{p.name}`" if p.default is None else f"`{p.name}={p.default}`"
            for p in inspect.signature(recipe).parameters.values()
        )
        cells = [
            f"`{name}`",
            " ".join(formula.split()).rstrip("."),
            options,
            f"{recipe().learning_rate:g}",
            paper,
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(BLOCK.sub(lambda _: table(), README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")
