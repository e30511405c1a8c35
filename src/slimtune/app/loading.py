"""From a folder to a working model: a run, an adapter on its recorded base, or a plain model folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slimtune.app.record import Record, read_record
from slimtune.errors import ConfigError, FileFormatError, SlimtuneError

if TYPE_CHECKING:
    from torch import nn

    from slimtune.app.config import TrainConfig
    from slimtune.app.tasks import Base

TENSORS = "adapter_model.safetensors"
COMPRESSION = "compress.json"  # the record of `slimtune compress`, beside model/


@dataclass(frozen=True)
class Place:
    """What lies in a folder.

    Attributes:
        kind: ``adapter`` (with or without its run) or ``model`` (every weight; with or without its run).
        folder: the one that holds the tensors.
        run: the run folder it belongs to, if any.
    """

    kind: str
    folder: Path
    run: Path | None = None


@dataclass
class LoadedRun:
    """A model ready to use, in eval mode.

    Attributes:
        processing: the tokenizer, or the image settings; None for the tokenizer of a text model whose folder has none.
        call: (model, inputs) -> logits.
        layers: names of the adapted layers; empty for a whole model.
        warnings: what loading found odd, such as other base weights.
    """

    model: nn.Module
    processing: Any
    call: Callable[[nn.Module, dict[str, Any]], Any]
    place: Place
    config: TrainConfig | None = None
    layers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find(path: str | Path) -> Place:
    """Tell what a folder holds. A run folder stands for the adapter or model in it.

    Raises:
        ConfigError: no such folder, or none of the three.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}")
    if (folder / "config.yaml").is_file():
        for kind, tensors in (("adapter", TENSORS), ("model", "*.safetensors")):
            if any((folder / kind).glob(tensors)):
                return Place(kind, folder / kind, folder)
        raise ConfigError(f"{folder}: a run without a result: no adapter/ and no model/ in it yet")
    run = next((p for p in folder.resolve().parents[:2] if _is_run(p)), None)
    if (folder / TENSORS).is_file():
        return Place("adapter", folder, run)
    if any(folder.glob("*.safetensors")):
        return Place("model", folder, run)
    if (folder / COMPRESSION).is_file() and any((folder / "model").glob("*.safetensors")):
        return Place("model", folder / "model")
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(f"{folder}: not a run, an adapter or a model folder; it holds {found}")


def load_run(path: str | Path, model: str | None = None, *, adapted: bool = True) -> LoadedRun:
    """Load what a run, adapter or model folder holds, strictly: hashes, names, shapes and finiteness are checked.

    Args:
        path: a run folder, an adapter folder, a checkpoint's ``adapter``, or a transformers model folder.
        model: the base model, a folder or name; default: the one the run or the adapter names.
        adapted: False: the base model only.

    Raises:
        ConfigError: nothing to load, or a base that is not recorded or not found.
        FileFormatError: damaged files, or files that do not fit the base.
    """
    place = find(path)
    record = read_record(place.run) if place.run else None
    config = _config(place.run, model) if place.run else None
    if record and config:
        base = _run_base(record, config, place.folder if adapted and place.kind == "model" else None)
    else:
        base = _recorded_base(place, model)
    loaded = LoadedRun(base.model, base.processing, base.call, place, config)
    if record and (shape := record.info.get("image_shape")):
        loaded.processing = {**base.processing, "shape": shape}
    if adapted and place.kind == "adapter":
        import slimtune as st

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded.layers = st.load(base.model, place.folder)
        loaded.warnings = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    loaded.model.requires_grad_(False).eval()
    return loaded


def probe_inputs(loaded: LoadedRun, count: int = 4) -> dict[str, Any]:
    """A fixed small batch for comparing two versions of a model: token ids, or images, drawn from seed 0."""
    import torch

    generator = torch.Generator().manual_seed(0)
    settings = loaded.processing
    if isinstance(settings, dict):
        size = int(settings.get("size") or 32)
        height, width, channels = settings.get("shape") or (size, size, len(settings.get("mean") or (0, 0, 0)))
        return {"pixel_values": torch.randn(count, channels, height, width, generator=generator)}
    embeddings = getattr(loaded.model, "get_input_embeddings", lambda: None)()
    limits = [] if embeddings is None else [embeddings.weight.shape[0]]
    limits += [] if settings is None else [len(settings)]
    ids = torch.randint(0, min(limits), (count, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "events.jsonl").is_file()


def _config(run: Path, model: str | None) -> TrainConfig:
    """The configuration of a run; the data it names need not exist any more."""
    import yaml

    from slimtune.app.config import TrainConfig

    file = run / "config.yaml"
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        values |= {"eval_dataset_name": None, "test_dataset_name": None, "dataset_name": "none"}
        values |= {"resume_from_checkpoint": "auto", **({"model_name_or_path": model} if model else {})}
        return TrainConfig.model_validate(values)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not the configuration of a run: {error}") from None


def _run_base(record: Record, config: TrainConfig, trained: Path | None) -> Base:
    """The model a run started from, or with `trained` the whole model that it ended with."""
    from slimtune.app import checkpoint
    from slimtune.app.tasks import build_base
    from slimtune.app.weights import load_weights
    from slimtune.compressed import is_compressed, load_compressed

    labels = record.labels if config.task in ("classify", "image-classify") else None
    if config.task in ("classify", "image-classify") and labels is None:
        raise ConfigError(f"{record.path}: neither config.yaml nor metrics.json nor events.jsonl holds its class names")
    if trained is None:
        return build_base(config, labels)
    if problems := checkpoint.verify(trained):
        raise FileFormatError(f"{trained}: {'; '.join(problems)}")
    if config.model_factory:
        base = build_base(config, labels)
        if is_compressed(trained):
            load_compressed(trained, base.model)
        else:
            load_weights(base.model, trained, False, [""])
        return base
    base = build_base(config.model_copy(update={"model_name_or_path": str(trained)}), labels)
    if base.fresh:
        raise FileFormatError(f"{trained}: the weights of {', '.join(base.fresh)} are missing or misshapen")
    return base


def _recorded_base(place: Place, model: str | None) -> Base:
    """The base that an adapter's manifest or config names, or a plain model folder, through transformers."""
    import torch
    import transformers

    from slimtune.app.tasks import Base
    from slimtune.app.tasks.factory import logits_of
    from slimtune.compressed import is_compressed, load_compressed, load_with_head
    from slimtune.hf import models as hf

    if place.kind == "model":
        name, kind, extra = str(model or place.folder), None, dict[str, Any]()
    else:
        name, kind, extra = _named_in(place.folder, model)
    folder = hf.resolve_model(name)
    compressed = is_compressed(folder)
    if compressed:
        hf.check_folder(Path(folder))
    kind = kind or _architecture(folder)
    cls = getattr(transformers, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ConfigError(f"{place.folder}: its base is a {kind}, which is not a class of transformers")
    try:
        with hf.quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if compressed:
                strict = place.kind == "model" and not extra
                built = cast(Any, load_compressed(folder) if strict else load_with_head(folder, cls, **extra)[0])
            else:
                built = cast(Any, cls).from_pretrained(folder, use_safetensors=True, dtype="auto", **extra)
    except SlimtuneError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{place.folder}: its base {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    try:
        processing: Any = hf.load_tokenizer(name if place.kind == "adapter" else str(place.folder))
    except SlimtuneError:
        reads_text = built.main_input_name == "input_ids"
        processing = None if reads_text else hf.image_settings(name, built.config)

    def call(model: nn.Module, inputs: dict[str, Any]) -> Any:
        found = logits_of(model(**inputs))
        return found if isinstance(found, torch.Tensor) else found[0]  # of a model without a head

    return Base(built, processing, [], [], call)


def _architecture(name: str) -> str:
    """The class that a model folder or hub name was saved from."""
    import transformers

    try:
        names = transformers.AutoConfig.from_pretrained(name).architectures
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: no usable config.json: {str(error).splitlines()[0]}") from error
    return names[0] if names else "model of unknown class"


def _named_in(folder: Path, model: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """(base name, its class, configuration fields) of an adapter folder."""
    from slimtune import io

    manifest, config = io.read_manifest(folder), io.read_json(folder / "adapter_config.json")
    base = (manifest or {}).get("base") or {}
    name = model or base.get("name_or_path") or config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{folder}: does not name its base model; give it with --model")
    extra: dict[str, Any] = {}
    saved = ((manifest or {}).get("adapter") or {}).get("modules_to_save") or []
    if saved:
        description, tensors, _ = io.read_description(folder)
        heads = tuple(f"{name}." for name in description.saved)
        outputs = [t.shape[0] for key, t in tensors.items() if t.dim() == 2 and key.startswith(heads)]
        if outputs:
            extra["num_labels"] = outputs[-1]
    return name, base.get("class"), extra
