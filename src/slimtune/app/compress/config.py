"""The configuration of a compression: strict, read and checked without torch, as that of a training run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from slimtune.app.config import Modules, TaskConfig, TrainConfig, read_config
from slimtune.app.rules import data_conflicts, folder_conflicts, given, suggest

LORD = "lord"
CALIBRATED = (LORD,)
MEASURED = ("fisher", "sensitivity")  # allocations
SKIPPED = {LORD: ["v_proj"]}  # what a method leaves dense unless told otherwise

_WITH_DATA = ("calibration_samples", "eval_dataset_name", "test_dataset_name", "sequential", "max_eval_samples")
_WITH_MOMENTS = ("sequential", "memory")


class CompressConfig(TaskConfig):
    """Everything `slimtune compress` can be told. Unknown keys and fields nothing would read are errors."""

    # the method
    method: str = Field(
        LORD,
        description="lord (activation PCA, from data) or what `slimtune.factors` offers from the weights alone, such "
        "as svd.",
    )
    method_options: dict[str, Any] = Field(default_factory=dict, description="The method's options.")
    form: Literal["channel", "spatial"] = Field(
        "channel",
        description="Of convolutions: a thinner one and a pointwise one, or a vertical and a horizontal one.",
    )

    # the ranks
    keep: float = Field(
        0.8, gt=0, lt=1, description="Share of the weights of the targeted layers that is left, those in skip included."
    )
    allocation: Literal["uniform", "tail", "fisher", "sensitivity"] = Field(
        "uniform",
        description="How the ranks share it: the same share in every layer; where they lose least of the outputs "
        "(of the weights, for methods without data); the same, weighed by the squared gradients of the loss (lord "
        "only); or by what each kind of layer costs the loss.",
    )
    multiple: int = Field(8, ge=1, description="Ranks are rounded down to a multiple of this where that leaves any.")
    ranks: dict[str, int] = Field(
        default_factory=dict,
        description="Ranks of layers by name or glob pattern; the last that fits counts. The others follow keep.",
    )
    target_modules: Modules = Field(
        "all-linear",
        description="Layers to compress: all-linear (every linear layer but the output head), a list of names "
        "or glob patterns, or a regular expression.",
    )
    exclude_modules: list[str] = Field(
        default_factory=list, description="Layers that do not take part: names or glob patterns."
    )
    skip: list[str] | None = Field(
        None,
        description="Targeted layers that stay dense, so that the others give more: names or glob patterns; what "
        "matches nothing is passed over. Default: v_proj for lord, none otherwise.",
    )

    # the calibration
    calibration_samples: int = Field(256, ge=1, description="Training examples that the statistics are taken from.")
    sequential: bool = Field(
        False, description="Take each block's statistics behind the blocks that are already compressed."
    )
    memory: int = Field(
        2_000_000_000,
        ge=1,
        description="Bytes of statistics held at once, e.g. 4G; layers are calibrated in groups that fit, each in a "
        "pass of its own.",
    )
    per_device_eval_batch_size: int = Field(
        32, ge=1, description="Examples per forward pass: in calibration, evaluation and the measured latency."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of new weights and, by default, of the data order.")
    data_seed: int | None = Field(
        None, ge=0, lt=2**32, description="Seed of the data order and the held-out split. Default: seed."
    )

    # the run
    output_dir: str = Field(description="The folder for model/, compress.json and report.html.")
    plan_only: bool = Field(False, description="Print the plan and stop.")
    dense: bool = Field(False, description="Also write dense/: the same function as a plain model without structures.")
    latency_runs: int = Field(20, ge=0, description="Timed forward passes of each model and size; 0: not measured.")
    tolerance: float = Field(
        0.05,
        gt=0,
        description="Relative difference between a layer's predicted and measured error from which on it is told.",
    )
    resume: bool = Field(True, description="Continue what lies in output_dir; false: discard it.")

    @field_validator("exclude_modules", "skip", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("memory", mode="before")
    @classmethod
    def _read_memory(cls, value: Any) -> Any:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?", value) if isinstance(value, str) else None
        return value if match is None else round(float(match[1]) * 1000 ** " kmg".index(match[2].lower() or " "))

    def _conflicts(self) -> Iterable[tuple[str, str]]:
        return conflicts(self)

    @property
    def skipped(self) -> list[str]:
        """`skip`, or the method's own."""
        return SKIPPED.get(self.method, []) if self.skip is None else self.skip

    def training(self) -> TrainConfig:
        """The same model, task and data as a training run reads them."""
        shared = {name: getattr(self, name) for name in TaskConfig.model_fields}
        own = {name: getattr(self, name) for name in ("seed", "data_seed", "output_dir", "per_device_eval_batch_size")}
        size = self.per_device_eval_batch_size
        return TrainConfig.model_validate({**shared, **own, "method": "full", "per_device_train_batch_size": size})


def load_compress_config(path: str | Path | None, overrides: Sequence[str] = ()) -> CompressConfig:
    """`read_config` of a compression."""
    return read_config(CompressConfig, path, overrides)


@cache
def factor_options() -> dict[str, tuple[str, ...]]:
    """What `slimtune.factors` offers and its options, read from the source: importing it would import torch."""
    found: dict[str, tuple[str, ...]] = {}
    for source in sorted((Path(__file__).parents[2] / "factors").glob("*.py")):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                continue
            if not any(isinstance(d, ast.Name) and d.id == "factors" for d in node.decorator_list):
                continue
            found[node.name] = _options(node)
    return dict(sorted(found.items()))


def _options(node: ast.ClassDef | ast.FunctionDef) -> tuple[str, ...]:
    if isinstance(node, ast.FunctionDef):
        return tuple(a.arg for a in (*node.args.args, *node.args.kwonlyargs))
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return tuple(a.arg for a in (*item.args.args[1:], *item.args.kwonlyargs))
    return tuple(
        n.target.id
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.target.id[0] != "_"
    )


def method_options() -> dict[str, tuple[str, ...]]:
    """The methods there are, each with its options."""
    found = dict(factor_options())
    lord = tuple(name for name in found.pop("afm", ()) if name not in ("moments", "form"))
    return {LORD: lord, **found}


def conflicts(cfg: CompressConfig) -> Iterable[tuple[str, str]]:
    """(field, what is wrong with it) for every rule that `cfg` breaks."""
    yield from data_conflicts(cfg)
    yield from folder_conflicts(cfg.output_dir)
    known = method_options()
    if cfg.method not in known:
        yield "method", f"unknown method '{cfg.method}'{suggest(cfg.method, known)} (known: {', '.join(known)})"
        return
    options = known[cfg.method]
    for option in cfg.method_options:
        if option not in options:
            has = f"it has {', '.join(options)}" if options else "it has none"
            yield "method_options", f"{cfg.method} has no option '{option}'{suggest(str(option), options)} ({has})"
    if cfg.method not in CALIBRATED and given(cfg, "form"):
        if "form" not in options:
            yield "form", f"method {cfg.method} does not read it"
        elif "form" in cfg.method_options:
            yield "form", "remove it or method_options.form"
    if cfg.dataset_name is None:
        if cfg.method in CALIBRATED:
            yield "dataset_name", f"method {cfg.method} takes statistics of data; name some, or take method svd"
        if cfg.allocation in MEASURED:
            yield "allocation", f"{cfg.allocation} is measured on data: name dataset_name"
        for name in _WITH_DATA:
            if given(cfg, name):
                yield name, "only used with dataset_name"
        if cfg.task is not None:
            yield "task", "only used with dataset_name"
    elif cfg.task is None:
        yield "", "missing key 'task'"
    if cfg.method not in CALIBRATED:
        if cfg.allocation == "fisher" and cfg.dataset_name is not None:
            yield "allocation", f"fisher weighs errors of outputs, which method {cfg.method} does not foretell"
        for name in _WITH_MOMENTS:
            if given(cfg, name) and not (cfg.dataset_name is None and name in _WITH_DATA):
                yield name, f"method {cfg.method} takes no statistics that would need it"
    if cfg.dense and cfg.model_factory is not None:
        yield "dense", "a plain folder is one of transformers; st.expand(model) makes a factory's module plain again"
    for pattern, rank in cfg.ranks.items():
        if rank < 1:
            yield "ranks", f"the rank of '{pattern}' must be at least 1, found {rank}"
