"""What the types of a configuration cannot say: fields that clash, fields read by nothing, missing files."""

from __future__ import annotations

import ast
import difflib
import glob
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from slimtune.app.whole import WHOLE, whole_options

if TYPE_CHECKING:
    from slimtune.app.config import TaskConfig, TrainConfig

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".npz")

_TEXT = ("classify", "regress", "sft")
_TASKS: dict[str, tuple[str, ...]] = {  # a field that only these tasks read
    "text_column": _TEXT,
    "text_pair_column": ("classify", "regress"),
    "label_column": ("classify", "regress", "image-classify"),
    "labels": ("classify", "image-classify"),
    "max_length": _TEXT,
    "packing": ("sft",),
    "image_column": ("image-classify",),
    "image_mean": ("image-classify",),
    "image_std": ("image-classify",),
    "augment": ("image-classify",),
}


@cache
def recipe_options() -> dict[str, tuple[str, ...]]:
    """The recipes and their options, read from the source of `slimtune.recipes`: importing it would import torch."""
    found = {}
    for source in sorted((Path(__file__).parent.parent / "recipes").glob("*.py")):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if isinstance(node.returns, ast.Name) and node.returns.id == "Recipe":
                found[node.name] = tuple(a.arg for a in (*node.args.args, *node.args.kwonlyargs))
    return dict(sorted(found.items()))


def recipe_names() -> tuple[str, ...]:
    """The names of the recipes."""
    return tuple(recipe_options())


def suggest(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the nearest known name, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def given(cfg: TaskConfig, name: str) -> bool:
    """Whether a field has another value than its default."""
    return bool(getattr(cfg, name) != type(cfg).model_fields[name].get_default(call_default_factory=True))


def data_conflicts(cfg: TaskConfig) -> Iterable[tuple[str, str]]:
    """(field, what is wrong with it) for the rules about a task, its model and its data that `cfg` breaks."""
    for name, tasks in _TASKS.items():
        if name in type(cfg).model_fields and given(cfg, name) and cfg.task not in tasks:
            yield name, f"task {cfg.task} does not read it (only {', '.join(tasks)})"
    if (cfg.model_name_or_path is None) == (cfg.model_factory is None):
        yield (
            "model_factory" if cfg.model_factory else "",
            "give one of model_name_or_path and model_factory, not " + ("both" if cfg.model_factory else "neither"),
        )
    if cfg.model_factory is not None and not re.fullmatch(r"[\w.]+:[\w.]+", cfg.model_factory):
        yield "model_factory", f"expected module:callable, found '{cfg.model_factory}'"
    if cfg.model_factory is None:
        for name in ("model_options", "model_weights"):
            if given(cfg, name):
                yield name, "only used with model_factory"
    for name in (
        "dataset_name",
        "eval_dataset_name",
        "test_dataset_name",
        "model_weights",
        "model_name_or_path",
    ):
        path = getattr(cfg, name)
        if path is None or not _is_local(path) or (name.endswith("dataset_name") and glob.has_magic(path)):
            continue
        if not Path(path).expanduser().exists():
            yield name, f"no such file or folder: '{path}' (looked from {Path.cwd()})"
    for name in ("image_mean", "image_std"):
        values = getattr(cfg, name)
        if values is not None and len(values) not in (1, 3, 4):
            yield name, f"expected one value per channel (1, 3 or 4), found {len(values)}"
    if cfg.image_std is not None and min(cfg.image_std, default=1) <= 0:
        yield "image_std", f"expected values above 0, found {cfg.image_std}"
    if cfg.labels is not None and len(set(cfg.labels)) != len(cfg.labels):
        yield "labels", "a label is written twice"


def folder_conflicts(output_dir: str) -> Iterable[tuple[str, str]]:
    """The same for the folder that results go to."""
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        yield "output_dir", f"'{output_dir}' is a file"


def conflicts(cfg: TrainConfig) -> Iterable[tuple[str, str]]:
    """The same for every rule of a training run."""
    yield from data_conflicts(cfg)
    yield from folder_conflicts(cfg.output_dir)
    whole = WHOLE.get(cfg.method)
    if whole is None and cfg.method not in recipe_names():
        names = (*recipe_names(), *WHOLE)
        yield "method", f"unknown method '{cfg.method}'{suggest(cfg.method, names)} (known: {', '.join(names)})"
    if whole is not None:
        unread = ["budget", "calibration_batches", "b_ratio"]
        if whole.controller is None:
            unread += ["method_options", "target_modules", "exclude_modules"]
        for name in unread:
            if given(cfg, name):
                yield name, f"method {cfg.method} has no adapter that would read it"
    elif cfg.target_modules is None:
        yield "target_modules", "expected text or a list, found nothing"
    known = whole_options(cfg.method) if whole and whole.controller else recipe_options().get(cfg.method)
    for option in cfg.method_options if known else ():
        if known and option not in known:
            near = suggest(str(option), known)
            yield "method_options", f"{cfg.method} has no option '{option}'{near} (it has {', '.join(known)})"
    if known and not whole and cfg.budget is not None and "rank" not in known:
        yield "budget", f"method {cfg.method} has no rank to choose; set its size in method_options"
    if whole and whole.everything and given(cfg, "modules_to_save"):
        yield "modules_to_save", f"method {cfg.method} saves every module"
    if cfg.budget is not None and "rank" in cfg.method_options:
        yield "budget", "budget chooses the rank; remove method_options.rank or budget"
    if cfg.max_steps is not None and given(cfg, "num_train_epochs"):
        yield "num_train_epochs", "max_steps replaces it; remove one of them"
    if given(cfg, "metric_for_best_model") and not (cfg.load_best_model_at_end or cfg.early_stopping_patience):
        yield (
            "metric_for_best_model",
            "read only with load_best_model_at_end: true or early_stopping_patience",
        )
    every = cfg.eval_steps
    if cfg.load_best_model_at_end and every and cfg.save_steps and cfg.save_steps % every:
        yield (
            "save_steps",
            f"load_best_model_at_end needs a multiple of eval_steps ({every}), found {cfg.save_steps}",
        )
    if cfg.lr_scheduler_type == "constant" and given(cfg, "warmup_ratio") and cfg.warmup_ratio > 0:
        yield "warmup_ratio", "lr_scheduler_type constant does not read it; use constant_with_warmup"
    where = cfg.resume_from_checkpoint
    if where not in (True, False, "auto") and not Path(str(where)).is_dir():
        yield "resume_from_checkpoint", f"no such folder: '{where}'"


def _is_local(path: str) -> bool:
    """A path, not the name of something on a hub."""
    plain = path.removesuffix(".gz")
    return path.startswith(("/", "./", "../", "~")) or plain.endswith((*DATA_SUFFIXES, ".safetensors"))
