"""The model of a configuration: from transformers or from a factory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slimtune.app.tasks.base import Base
from slimtune.app.tasks.factory import build_factory_model, caller, logits_of
from slimtune.errors import ConfigError
from slimtune.hf import models as hf

if TYPE_CHECKING:
    from slimtune.app.config import TrainConfig

KINDS = {
    "classify": "sequence-classification",
    "regress": "sequence-classification",
    "sft": "causal-lm",
    "image-classify": "image-classification",
}


def build_base(cfg: TrainConfig, labels: list[str] | None = None) -> Base:
    """Load the model with an output per label (one for regress), and its tokenizer or image settings."""
    return _from_factory(cfg) if cfg.model_factory else _from_transformers(cfg, labels)


def _from_transformers(cfg: TrainConfig, labels: list[str] | None) -> Base:
    name = str(cfg.model_name_or_path)
    hf.locate(name)
    config: dict[str, Any] = {}
    if labels is not None:
        config["num_labels"] = len(labels)
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    elif cfg.task == "regress":
        config.update(num_labels=1, problem_type="regression")
    tokenizer = hf.load_tokenizer(name) if cfg.task != "image-classify" else None
    loaded = hf.load_model(KINDS[cfg.task], name, cfg.dtype, cfg.seed, **config)
    model = loaded.model
    if tokenizer is None:
        processing: Any = hf.image_settings(name, model.config)
    else:
        processing = tokenizer
        check_vocabulary(model, tokenizer, name)
        settings: Any = model.config
        if getattr(settings, "pad_token_id", None) is None:
            settings.pad_token_id = tokenizer.pad_token_id
    head = [] if cfg.task == "sft" else loaded.fresh or hf.output_head(model)
    return Base(model, processing, loaded.fresh, head, _call_transformers)


def _call_transformers(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return logits_of(model(**{name: value for name, value in inputs.items() if name != "labels"}))


def _from_factory(cfg: TrainConfig) -> Base:
    spec = str(cfg.model_factory)
    model, tokenizer, fresh = build_factory_model(spec, cfg.model_options, cfg.model_weights, cfg.dtype, cfg.seed)
    if cfg.task == "image-classify":
        return Base(model, {"mean": None, "std": None, "size": None}, fresh, fresh, caller(model))
    if tokenizer is None:
        raise ConfigError(
            f"model_factory: for task {cfg.task} {spec} must return (module, tokenizer), the tokenizer a transformers "
            "tokenizer or the name of one"
        )
    tokenizer = hf.load_tokenizer(tokenizer) if isinstance(tokenizer, str) else hf.with_padding(tokenizer, spec)
    return Base(model, tokenizer, fresh, fresh, caller(model))


def check_vocabulary(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raise ConfigError when the tokenizer has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ConfigError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings")
