"""What is in an adapter, a run or a model folder: sizes, ranks and norms per layer."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.app import spectra
from slimtune.app.calibration import meter
from slimtune.app.loading import find, load_run
from slimtune.app.spectra import Spectrum
from slimtune.errors import ConfigError, FileFormatError, SlimtuneError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimtune.io import LayerEntry


@dataclass(frozen=True)
class Row:
    """One layer, or one module trained in full.

    Attributes:
        norm: Frobenius norm of dW = W' - W.
        relative: norm over that of W.
        stable_rank: |dW|_F^2 / |dW|_2^2, at most the rank.
        options: of the structure, as chosen for this layer.
        spectrum: of the weight, or dW, where it was asked for.
    """

    name: str
    method: str
    rank: int | None
    parameters: int
    bytes: int
    norm: float | None = None
    relative: float | None = None
    stable_rank: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    spectrum: Spectrum | None = None


@dataclass
class Inspection:
    """A folder's contents; `str()` is a table. Norms are None where the base is not at hand (`notes` says why)."""

    path: str
    kind: str
    base: str | None
    rows: list[Row]
    parameters: int
    bytes: int
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The same as JSON text."""
        plain = asdict(replace(self, rows=[replace(row, spectrum=None) for row in self.rows]))
        for row, found in zip(plain["rows"], self.rows, strict=True):
            del row["spectrum"]
            if found.spectrum is not None:
                row["spectrum"] = found.spectrum.facts()
        if known := self._spectra():
            plain["spectra"] = [vars(spectra.together(known, energy)) for energy in spectra.ENERGIES]
        return json.dumps(plain, indent=1)

    def _spectra(self) -> list[Spectrum]:
        return [row.spectrum for row in self.rows if row.spectrum is not None]

    def picture(self, path: Path) -> None:
        """Draw the spectra and what ranks would save and cost, as PNG or SVG.

        Raises:
            ConfigError: another suffix, no such folder, nothing to draw, or matplotlib is missing.
        """
        from slimtune.app.spectra_picture import check_picture, draw

        check_picture(path)
        found = {row.name: row.spectrum for row in self.rows if row.spectrum is not None}
        if not found:
            raise ConfigError(f"--picture: {self.path} holds no matrix whose singular values could be drawn")
        draw(found, path, self.kind == "adapter")

    def print(self) -> None:
        """The table, on a terminal fitted to its width: names lose their beginning, then columns go."""
        import sys

        if not sys.stdout.isatty():
            print(self)
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console(highlight=False)
        for heads, lines in self._tables():
            cells, shown = [heads, *lines], list(range(len(heads)))
            widths = [max(len(line[i]) for line in cells) for i in shown]
            for dropped in (4, 5) if heads is HEADS else ():
                if widths[0] + sum(widths[i] + 2 for i in shown[1:]) > console.width:
                    shown.remove(dropped)
            room = max(24, console.width - sum(widths[i] + 2 for i in shown[1:]))
            table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
            for i in shown:
                table.add_column(heads[i], justify="left" if i < 2 else "right", no_wrap=True)
            for name, *rest in lines:
                line = [name if len(name) <= room else "…" + name[1 - room :], *rest]
                table.add_row(*(escape(line[i]) for i in shown))
            console.print(table)
            for text in self._summary() if heads is HEADS else spectra.summary(self._spectra()):
                console.print(text, markup=False)

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """(heads, lines): what there is, and its spectra if they were asked for."""
        known = [row for row in self.rows if row.spectrum is not None]
        found: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [(HEADS, [_cells(row) for row in self.rows])]
        return [*found, (spectra.HEADS, [spectra.cells(row) for row in known])] if known else found

    def __str__(self) -> str:
        blocks = []
        for heads, rows in self._tables():
            table = [heads, *rows]
            widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
            lines = [
                "  ".join(
                    c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
                )
                for line in table
            ]
            texts = self._summary() if heads is HEADS else spectra.summary(self._spectra())
            blocks.append("\n".join([*(line.rstrip() for line in lines), *texts]))
        return "\n\n".join(blocks)

    def _summary(self) -> list[str]:
        base = f" on {self.base}" if self.base else ""
        total = f"{self.kind}{base}: {self.parameters:,} parameters, {self.bytes:,} bytes"
        counts: Counter[str] = Counter()
        for row in self.rows:
            options = [f"{k} {v}" for k, v in row.options.items() if v is False or (k != "rank" and v not in (None, 0))]
            if options:
                counts[f"{row.method} with {', '.join(options)}"] += 1
        return [total, *(f"{text}: {number} of {len(self.rows)}" for text, number in counts.items()), *self.notes]


HEADS = ("layer", "method", "rank", "parameters", "bytes", "|dW|", "|dW|/|W|", "stable rank")


def inspect(path: str | Path, model: str | None = None, *, spectrum: bool = False) -> Inspection:
    """Describe a run, adapter, model or compressed folder.

    Args:
        model: the base model, if not the one the folder names.
        spectrum: compute the singular values of every weight, embeddings and a language model's head apart, or of an
            adapter's every dW; for large models that takes a while.

    Raises:
        ConfigError: not such a folder.
        FileFormatError: damaged files.
    """
    place = find(path)
    if place.kind == "model":
        from slimtune.compressed import is_compressed

        if is_compressed(place.folder):
            return _inspect_compressed(place.folder, str(path), model, spectrum)
        return _inspect_model(place.folder, str(path), spectrum)
    return _inspect_adapter(place.folder, str(path), model, spectrum)


def _inspect_adapter(folder: Path, path: str, model: str | None, spectrum: bool) -> Inspection:
    from slimtune import io

    description, tensors, manifest = io.read_description(folder)
    notes: list[str] = []
    measured: dict[str, tuple[float, float, float]] = {}
    found: dict[str, Spectrum] = {}
    try:
        loaded = load_run(path, model)
        measured = changes(loaded.model)
        notes += loaded.warnings
        if spectrum:
            found = spectra_of_changes(loaded.model)
    except SlimtuneError as error:
        notes.append(f"no norms: the base model is not at hand ({error})")
    rows = []
    for name, entry in description.layers.items():
        parts = (f"{name}.structure.", f"{name}.composition.")
        held = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(parts)}
        norm, share, stable = measured.get(name, (None, None, None))
        options = dict(entry.recipe.options)
        rank, trained = _built(entry, held)
        size = _size(list(held.values()))[1]
        values = replace(found[name], parameters=trained) if name in found else None
        rows.append(Row(name, entry.recipe.name, rank, trained, size, norm, share, stable, options, values))
    for name in description.saved:
        own = [t for key, t in tensors.items() if key.startswith(f"{name}.saved.")]
        rows.append(Row(name, "full", None, *_size(own), *measured.get(name, (None, None, None))))
    base = (manifest or {}).get("base") or {}
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    total = sum(row.parameters for row in rows)
    return Inspection(path, "adapter", model or base.get("name_or_path"), rows, total, size, notes)


def _built(entry: LayerEntry, tensors: Mapping[str, Tensor]) -> tuple[int | None, int]:
    """The rank of a layer's adapter and how many of the numbers in the file are parameters; what the file alone says
    where it does not tell the layer's sizes."""
    from slimtune.layers import Adapter

    try:
        if entry.shape is None:
            raise FileFormatError("no shape")
        adapter = Adapter(entry.recipe, entry.shape[0], math.prod(entry.shape[1:]), device="meta")
    except (SlimtuneError, RuntimeError, OverflowError, TypeError):  # sizes that cannot be, for loading to tell
        return entry.recipe.options.get("rank"), _size(list(tensors.values()))[0]
    return adapter.structure.rank, sum(tensors[key].numel() for key, _ in adapter.named_parameters() if key in tensors)


def _inspect_model(folder: Path, path: str, spectrum: bool) -> Inspection:
    rows = []
    with meter("singular values") as progress:
        for i, (key, tensor) in enumerate(_tensors(folder)):
            rows.append(_tensor_row(key, tensor, spectrum))
            if spectrum:
                progress(i + 1, 0)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    notes = ["|dW| and the stable rank are of the weight itself"]
    return Inspection(path, "model", None, rows, sum(row.parameters for row in rows), size, notes)


def _tensor_row(key: str, tensor: Tensor, spectrum: bool) -> Row:
    kind, (count, size) = str(tensor.dtype).removeprefix("torch."), _size([tensor])
    rank = _stable_rank(tensor.float().flatten(1)) if tensor.dim() > 1 else None
    values = None
    if spectrum and tensor.is_floating_point() and tensor.dim() > 1 and not _is_table(key):
        matrix = tensor.flatten(1)
        values = spectra.spectrum_of(matrix) if min(matrix.shape) > 1 and matrix.isfinite().all() else None
    return Row(key, kind, None, count, size, float(tensor.float().norm()), None, rank, spectrum=values)


def _is_table(key: str) -> bool:
    """Whether a tensor is a table of embeddings, or a language model's head, by its name."""
    parts = key.split(".")
    return any("emb" in part or part in ("wte", "wpe", "lm_head") for part in parts)


def _inspect_compressed(folder: Path, path: str, model: str | None, spectrum: bool) -> Inspection:
    from slimtune.compress import structured_layers
    from slimtune.compressed import read_compressed

    stored = read_compressed(folder)
    loaded = load_run(path, model)
    rows = []
    layers = structured_layers(loaded.model)
    with meter("singular values") as progress:
        for name, layer in layers.items():
            structure = layer.structure
            held: list[Tensor] = [*structure.parameters()]
            count, size = _size(held)
            W = structure.dense().detach().float()
            values = spectra.spectrum_of(W, count) if spectrum and min(W.shape) > 1 else None
            rank = getattr(structure, "rank", None)
            options = {key: value for key, value in structure.options().items() if key != "rank"}
            norms = (float(W.norm()), None, _stable_rank(W))
            rows.append(Row(name, type(structure).__name__, rank, count, size, *norms, options, values))
            if spectrum:
                progress(len(rows), len(layers))
        for key, tensor in stored.each():
            if not key.startswith(tuple(f"{name}.structure." for name in layers)):
                rows.append(_tensor_row(key, tensor, spectrum))
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    notes = ["|dW| and the stable rank are of the weight itself", *loaded.warnings]
    return Inspection(path, "compressed model", None, rows, sum(row.parameters for row in rows), size, notes)


def finite_tensors(folder: Path) -> tuple[int, list[str]]:
    """How many numbers a model folder holds, and the names of tensors with some that are not finite."""
    count, bad = 0, []
    for key, tensor in _tensors(folder):
        count += tensor.numel()
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad.append(key)
    return count, bad


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the safetensors files of a folder, one at a time."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield key, tensors.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{file}: not a readable safetensors file ({error})") from None


def _size(tensors: list[Tensor]) -> tuple[int, int]:
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def changes(model: nn.Module, ranks: bool = True) -> dict[str, tuple[float, float, float]]:
    """(|dW|, |dW| / |W|, stable rank of dW) of every adapted layer; without `ranks` the last is 0, which is faster."""
    import torch

    from slimtune.targets import hosts

    found = {}
    with torch.no_grad():
        for name, host in hosts(model).items():
            before = host.layout(host).weight().float()
            change = host.map().weight().float() - before
            norm = float(change.norm())
            found[name] = (norm, norm / max(float(before.norm()), 1e-30), _stable_rank(change) if ranks else 0.0)
    return found


def spectra_of_changes(model: nn.Module) -> dict[str, Spectrum]:
    """The singular values of dW of every adapted layer. Where adapters are added to the weight dW is their sum, and
    elsewhere a difference, whose values below some 1e-7 of the weight's are rounding."""
    import torch

    from slimtune.compositions import Additive
    from slimtune.targets import hosts

    found = {}
    with torch.no_grad(), meter("singular values") as progress:
        layers = hosts(model)
        for i, (name, host) in enumerate(layers.items()):
            own: list[Any] = [host.adapters[key] for key in host.active_adapters]
            if own and all(isinstance(getattr(a, "composition", None), Additive) for a in own):
                change = torch.stack([a.dense().double() for a in own]).sum(0)
            else:
                before = host.layout(host).weight().float()
                change = host.map().weight().float() - before
            if min(change.shape) > 1:
                found[name] = spectra.spectrum_of(change)
            progress(i + 1, len(layers))
    return found


def _stable_rank(matrix: Tensor) -> float:
    """|M|_F^2 / |M|_2^2, the spectral norm by a randomised SVD from a fixed seed; 0 for M = 0."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        top = float(torch.svd_lowrank(matrix, q=min(6, *matrix.shape), niter=4)[1].max())
    return float(matrix.square().sum()) / top**2 if top > 0 and math.isfinite(top) else 0.0


def _cells(row: Row) -> tuple[str, ...]:
    def text(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        row.name,
        row.method,
        text(row.rank, "d"),
        f"{row.parameters:,}",
        f"{row.bytes:,}",
        text(row.norm, ".4g"),
        text(row.relative, ".2%"),
        text(row.stable_rank, ".2f"),
    )
