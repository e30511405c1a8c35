"""Any adapter as plain LoRA in PEFT's format, for loaders that know nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.errors import ConfigError, SlimtuneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from slimtune.app.loading import LoadedRun
    from slimtune.conversion import ConversionReport


def convert(
    path: str | Path,
    out: str | Path,
    to: str = "lora",
    tolerance: float = 1e-3,
    *,
    rank: int | None = None,
    multiple: int = 1,
    model: nn.Module | str | Path | None = None,
) -> ConversionReport:
    """Write the adapter in a folder to another folder as plain LoRA in PEFT's format.

    Exact where algebra gives factors of dW (LoRA, rsLoRA, SingLoRA, LoLDU, MiSS, GraLoRA, LoHa, Kronecker, ...);
    otherwise the best rank-r fit of W' - W per layer, magnitudes included, with its measured error. The folder holds
    peft_type LORA, lora_alpha = r, the scale in the tensors, one rank for all layers (smaller ones padded with zeros)
    and nothing else but modules_to_save, so that loaders that read only `r` and `lora_alpha` (vLLM, llama.cpp) are
    right. It is read back and compared before it is in place; the manifest keeps the report.

    Args:
        path: an adapter folder (slimtune's or PEFT's) or a run folder.
        out: the folder to make; must not exist or be empty.
        to: "lora", the one form there is.
        tolerance: the largest |dW - B A| / |dW| of a layer, Frobenius norms; what is below 1e-6 counts as 1e-6.
        rank: the largest rank to use; default: exact factors whole, fitted ones at the smallest rank within the
            tolerance.
        multiple: round the rank up to a multiple of this, with zeros.
        model: the base model, a module or its folder or name. By default the recorded one, and it is loaded only if the
            folder alone is not enough: for compositions other than `Additive`, structures that read the weight
            (LoLDU), folders by PEFT of other methods than LoRA, and what was saved before 0.2. A module is left as it
            was.

    Raises:
        VerificationError: a layer above the tolerance (the message gives the rank that would do), or without `rank` a
            LoRA larger than the weights would be needed. Nothing is written.
        ConfigError: no adapter there, `out` is taken, or a base that is needed and not found.
        FileFormatError: damaged files, or files that do not fit the base.
        StructureError: a grouped convolution, an impossible rank, multiple or tolerance.

    Example:
        >>> import tempfile, torch, slimtune as st
        >>> linear = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> _ = st.adapt(linear, st.gralora(rank=4, k=2), ["0"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     st.save(linear, f"{folder}/gralora")
        ...     st.convert(f"{folder}/gralora", f"{folder}/lora").layers[0].how
        'exact'
    """
    import torch

    from slimtune.app.loading import find, load_run
    from slimtune.folders import lora_folder

    if to != "lora":
        raise ConfigError(f"to: 'lora' is the one form there is, got {to!r}")
    place, final = find(path), Path(out)
    if place.kind != "adapter":
        raise ConfigError(f"{path} holds a whole model, not an adapter: there is nothing to convert")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(f"{final} exists and is not an empty folder")
    loaded: list[LoadedRun] = []

    def base(reason: str | None) -> nn.Module | None:
        if isinstance(model, torch.nn.Module):
            return model
        if model is None and reason is None:
            return None
        try:
            loaded.append(load_run(path, None if model is None else str(model), adapted=False))
        except SlimtuneError as error:
            why = f"; the base is needed because {reason}" if reason else ""
            raise type(error)(f"{error}{why}") from error
        return loaded[0].model

    with _bar() as progress:
        report = lora_folder(
            place.folder, final, base, rank=rank, tolerance=tolerance, multiple=multiple, progress=progress
        )
    if loaded:
        _compare_outputs(report, loaded[0], place.folder, final)
    return report


@contextmanager
def _bar() -> Iterator[Callable[[list[str]], Iterable[str]]]:
    """What wraps the layers while they are computed: a bar on a terminal."""
    if not sys.stderr.isatty():
        yield lambda layers: layers
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield lambda layers: bar.track(layers, description="converting")


def _compare_outputs(report: ConversionReport, loaded: LoadedRun, source: Path, out: Path) -> None:
    """Outputs with the adapter and with its LoRA, on the same small batch."""
    import slimtune as st
    from slimtune.app.loading import probe_inputs
    from slimtune.app.merge import logits, relative

    network = loaded.model.float().eval()

    def outputs(folder: Path) -> Any:
        st.load(network, folder)
        try:
            return logits(loaded, inputs)
        finally:
            st.remove(network, "default")

    try:
        inputs = probe_inputs(loaded)
        before, after, again = logits(loaded, inputs), outputs(source), outputs(out)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        report.notes.append(f"outputs were not compared: {str(error).splitlines()[0]}")
        return
    report.effect, report.difference = relative(after, before), relative(again, after)
