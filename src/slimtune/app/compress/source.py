"""Which model is compressed, and on what data: from a configuration, or from a run of `slimtune train`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.app.compress.config import CompressConfig
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from slimtune.app.tasks import Task


@dataclass
class Source:
    """A model with its task, both None without data; `forward(model, batch)` gives logits, and `processing` is the
    tokenizer or the image settings."""

    model: nn.Module
    device: torch.device
    task: Task | None
    forward: Callable[[nn.Module, dict[str, Any]], Any] | None
    processing: Any = None


def settled(cfg: CompressConfig) -> CompressConfig:
    """The configuration with a run folder of `slimtune train` replaced by the model in it, and its labels if none are
    given.

    Raises:
        ConfigError: the run holds an adapter, or no result yet.
    """
    name = cfg.model_name_or_path
    if name is None or not (Path(name).expanduser() / "config.yaml").is_file():
        return cfg
    from slimtune.app.loading import find
    from slimtune.app.record import read_record

    place = find(name)
    if place.kind == "adapter":
        raise ConfigError(f"model_name_or_path: {name} is a run with an adapter: slimtune merge makes a model of it")
    record = read_record(Path(name).expanduser())
    changes: dict[str, Any] = {"model_name_or_path": str(place.folder)}
    if factory := record.config.get("model_factory"):
        changes = {"model_name_or_path": None, "model_factory": factory}
        changes["model_options"] = record.config.get("model_options") or {}
        changes["model_weights"] = str(place.folder / "model.safetensors")
    if cfg.labels is None and cfg.task in ("classify", "image-classify") and record.labels:
        changes["labels"] = list(record.labels)
    return cfg.model_copy(update=changes)


def open_source(cfg: CompressConfig) -> Source:
    """Load model and data.

    Raises:
        ConfigError, DataError, FileFormatError: what loading them raises.
    """
    import torch

    from slimtune.app import setup
    from slimtune.app.tasks import build_task
    from slimtune.app.tasks.factory import build_factory_model, caller, logits_of

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    setup.seed(cfg.seed)
    if cfg.dataset_name is None:
        spec = str(cfg.model_factory)
        model, processing, _ = build_factory_model(spec, cfg.model_options, cfg.model_weights, cfg.dtype, cfg.seed)
        return Source(model.to(device).requires_grad_(False).eval(), device, None, None, processing)
    from slimtune.hf.models import quiet

    with quiet():
        task = build_task(cfg.training())

    def call(model: nn.Module, batch: dict[str, Any]) -> Any:
        return logits_of(model(**{key: value for key, value in batch.items() if key != "labels"}))

    model = task.model.to(device).requires_grad_(False).eval()
    return Source(model, device, task, caller(model) if cfg.model_factory else call, task.processing)
