"""Write an adapter into its base model's weights, as a plain model that is shown to compute the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.app.loading import LoadedRun, load_run, probe_inputs
from slimtune.errors import ConfigError, FileFormatError, VerificationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from slimtune.merging import MergeReport

RECORD = "slimtune_merge.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")
NOISE = 1e-5  # of the outputs: rounding of two orders of summation in fp32


@dataclass
class MergeResult:
    """A finished merge.

    Attributes:
        out: the model folder.
        dtype: of the merged weights.
        share: |stored - W'| / |W' - W| over all layers: what rounding lost of the change.
        layers: the same per layer, with the two norms.
        effect: relative change of the outputs by the adapter, on probe inputs.
        difference: relative difference between the outputs of the adapted model and of the folder, likewise.
        untied: weights that were shared and are the layer's own now.
        densified: layers of a compressed model that are dense now.
    """

    out: Path
    dtype: str
    share: float
    layers: list[dict[str, Any]]
    effect: float
    difference: float
    untied: list[str] = field(default_factory=list)
    densified: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer["share"])
        lines = [
            f"{len(self.layers)} layers merged in {self.dtype}; rounding lost {self.share:.2e} of the change "
            f"(worst layer: {worst['name']}, {worst['share']:.2e})",
            f"outputs: the adapter changes them by {self.effect:.3g}, "
            f"the merged model differs from the adapted one by {self.difference:.2e}",
            *(f"untied: {name}" for name in self.untied),
            *(f"dense now, no longer compressed: {name}" for name in self.densified),
            f"written and reloaded: {self.out}",
        ]
        return "\n".join(lines)


def merge_run(
    path: str | Path,
    out: str | Path,
    dtype: str | None = None,
    max_loss: float = 0.05,
    model: str | None = None,
) -> MergeResult:
    """Merge the adapter in a run or adapter folder into its base and write a plain model folder.

    The arithmetic is fp32 or wider with one cast at the end. The folder is written beside `out`, loaded again, its
    outputs are compared with those of the adapted model, and only then it gets its name.

    Args:
        path: a run folder or an adapter folder.
        out: the folder to make; must not exist or be empty.
        dtype: of the merged weights; default: that of the base.
        max_loss: the largest share of the change, in weights or in outputs, that may be lost.
        model: the base model, if not the one that is recorded.

    Raises:
        ConfigError: nothing to merge, `out` is taken, an unknown dtype, a base that is not found.
        FileFormatError: damaged files.
        VerificationError: more than `max_loss` is lost, or a weight is not finite; nothing is left at `out`.
    """
    import torch

    import slimtune as st
    from slimtune.app import checkpoint

    final = Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(f"{final} exists and is not an empty folder")
    loaded = load_run(path, model)
    if not loaded.layers:
        raise ConfigError(f"{path} holds a whole model, not an adapter: there is nothing to merge")
    network = loaded.model
    stored = {name: t.dtype for name, t in own_tensors(network) if t.is_floating_point()}
    wide = torch.float64 if torch.float64 in stored.values() else torch.float32
    network.to(wide)
    inputs = probe_inputs(loaded)
    after = logits(loaded, inputs)
    with st.disabled(network):
        before = logits(loaded, inputs)
    report = st.merge(network)
    kinds = _kinds(network, stored, getattr(torch, dtype) if dtype else None)
    layers, share = _cast(network, report, kinds)
    if share > max_loss:
        raise VerificationError(
            f"{path}: rounding the merged weights to {_name(kinds)} loses {share:.1%} of the change (worst layer: "
            f"{max(layers, key=lambda e: e['share'])['name']}), more than {max_loss:.1%}; choose dtype float32, or a "
            "larger max_loss"
        )
    result = MergeResult(final, _name(kinds), share, layers, relative(after, before), 0.0)
    result.untied, result.densified = report.untied, report.densified
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = checkpoint.prepare(final)
    try:
        _write(loaded, staging)
        again = logits(_reload(loaded, staging, wide), inputs)
        result.difference = relative(again, after)
        lost, allowed = float((again - after).norm()), max_loss * float((after - before).norm())
        if not lost <= allowed + NOISE * float(after.norm()):
            raise VerificationError(
                f"{path}: the merged model's outputs differ from the adapted model's by {lost:.3g}, more than "
                f"{max_loss:.1%} of the adapter's effect ({allowed:.3g})"
            )
        record = {**asdict(result), "out": final.name, "source": str(path), "probe": sample(again)}
        (staging / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        with checkpoint.failing_clearly(final, final.parent):
            checkpoint.seal(staging, 0)
            if final.exists():
                final.rmdir()
            checkpoint.publish(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def logits(loaded: LoadedRun, inputs: dict[str, Any]) -> Tensor:
    """The model's outputs on a batch, in fp32 or wider."""
    import torch

    kind = next(p.dtype for p in loaded.model.parameters() if p.is_floating_point())
    batch = {name: t.to(kind) if t.is_floating_point() else t for name, t in inputs.items()}
    with torch.no_grad():
        found = loaded.call(loaded.model, batch)
    return found.to(torch.promote_types(found.dtype, torch.float32))


def sample(outputs: Tensor) -> list[float]:
    """At most 64 of the outputs, evenly spaced: enough to recognise the model by."""
    flat = outputs.flatten()
    return [float(value) for value in flat[:: max(1, flat.numel() // 64)][:64]]


def own_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers without those of adapters."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, t) for name, t in tensors if ".adapters." not in f".{name}"]


def _kinds(model: nn.Module, stored: dict[str, torch.dtype], given: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype of every tensor: as it was; of what took a structure's place, that of the structure."""
    held = {name.rpartition(".structure.")[0]: kind for name, kind in stored.items() if ".structure." in name}
    kinds = {}
    for name, tensor in own_tensors(model):
        layer = name.rpartition(".structure.")[0] or name.rpartition(".")[0]
        if (name in stored or layer in held) and tensor.is_floating_point():
            kinds[name] = given or stored.get(name, held.get(layer, tensor.dtype))
    return kinds


def _cast(model: nn.Module, report: MergeReport, kinds: dict[str, torch.dtype]) -> tuple[list[dict[str, Any]], float]:
    """Round every tensor to its dtype in place; what that lost of the change, per layer and in all."""

    def weight(name: str) -> Tensor:
        return model.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator, return-value]

    exact = {layer.name: weight(layer.name).clone() for layer in report.layers}
    for name, tensor in own_tensors(model):
        if name in kinds:
            tensor.data = tensor.data.to(kinds[name])
            if not tensor.isfinite().all():
                raise VerificationError(f"{name} is not finite in {str(kinds[name]).removeprefix('torch.')}")
    layers, lost, total = [], 0.0, 0.0
    for layer in report.layers:
        kept = weight(layer.name)
        error = float((kept.to(exact[layer.name].dtype) - exact[layer.name]).norm())
        error = (error**2 + layer.error_norm**2) ** 0.5
        share = error / layer.delta_norm if layer.delta_norm else 0.0
        entry = {"name": layer.name, "delta_norm": layer.delta_norm, "error_norm": error, "share": share}
        layers.append(entry)
        lost, total = lost + error**2, total + layer.delta_norm**2
    return layers, (lost / total) ** 0.5 if total else 0.0


def _write(loaded: LoadedRun, folder: Path) -> None:
    """The model in transformers' own form with its tokenizer, or one safetensors file for a factory's module; a model
    that is still compressed as such."""
    from slimtune.compress import structured_layers
    from slimtune.compressed import is_compressed, save_compressed

    network: Any = loaded.model
    if structured_layers(network):
        base = getattr(getattr(network, "config", None), "_name_or_path", "")
        tokenizer = loaded.processing if hasattr(loaded.processing, "save_pretrained") else None
        processing = tokenizer or (base if base and is_compressed(base) else None)
        save_compressed(network, folder, processing=processing, facts={"merged": str(loaded.place.folder)})
        return
    if hasattr(network, "save_pretrained"):
        from slimtune.hf.models import quiet

        with quiet():
            network.save_pretrained(folder)
            if hasattr(loaded.processing, "save_pretrained"):
                loaded.processing.save_pretrained(folder)
        return
    from safetensors.torch import save_file

    from slimtune.app.weights import MODEL, own_state

    tensors = {key: t.detach().cpu().contiguous() for key, t in own_state(network, [""]).items()}
    save_file(tensors, str(folder / MODEL), metadata={"format": "pt"})


def _reload(loaded: LoadedRun, folder: Path, wide: torch.dtype) -> LoadedRun:
    """The model in `folder` built anew, nothing missing and nothing left over, in a wide dtype."""
    from slimtune.compressed import is_compressed, load_compressed
    from slimtune.hf.models import quiet

    network: Any = loaded.model
    compressed = is_compressed(folder)
    if compressed and hasattr(network, "save_pretrained"):
        fresh = load_compressed(folder, dtype=wide)
    elif hasattr(network, "save_pretrained"):
        with quiet():
            fresh, found = type(network).from_pretrained(
                folder, dtype=wide, use_safetensors=True, output_loading_info=True
            )
        odd = [*found["missing_keys"], *found["unexpected_keys"], *(key[0] for key in found["mismatched_keys"])]
        if odd:
            raise FileFormatError(f"{folder}: the merged model does not load cleanly: {', '.join(sorted(odd)[:5])}")
    else:
        from slimtune.app.tasks.factory import build_factory_model
        from slimtune.app.weights import load_weights

        assert loaded.config is not None
        spec, options = str(loaded.config.model_factory), loaded.config.model_options
        fresh, _, _ = build_factory_model(spec, options, seed=loaded.config.seed)
        fresh.to(wide)
        if compressed:
            load_compressed(folder, fresh, dtype=wide)
        else:
            load_weights(fresh, folder, False, [""])
    fresh.requires_grad_(False).eval()
    return LoadedRun(fresh, loaded.processing, loaded.call, loaded.place, loaded.config)


def _name(kinds: dict[str, torch.dtype]) -> str:
    names = sorted({str(kind).removeprefix("torch.") for kind in kinds.values()})
    return "/".join(names)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| over the larger of |a| and |b|."""
    return float((a - b).norm()) / max(float(a.norm()), float(b.norm()), 1e-30)
