"""Models from `module:callable`, any importable function or class that gives an nn.Module."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtune.app.tasks.base import brief
from slimtune.errors import ConfigError, FileFormatError


def load_factory(spec: str) -> Callable[..., Any]:
    """Import `module:callable`; the working directory is searched too.

    Raises:
        ConfigError: no such module, it fails to import, no such attribute (with the nearest), or not callable.
    """
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise ConfigError(f"model_factory: expected module:callable, found '{spec}'")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise ConfigError(f"model_factory: no module '{error.name}' (looked from {here})") from error
        raise ConfigError(f"model_factory: '{module_name}' needs the module '{error.name}'") from error
    except Exception as error:
        raise ConfigError(f"model_factory: importing '{module_name}' fails: {brief(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            public = [key for key in vars(found) if not key.startswith("_")]
            near = difflib.get_close_matches(name, public, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"model_factory: '{module_name}' has no '{name}'{hint}")
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(f"model_factory: '{spec}' is {type(found).__name__}, not callable")
    return found


def build_factory_model(
    spec: str, options: dict[str, Any], weights: str | None = None, dtype: str = "auto", seed: int = 0
) -> tuple[nn.Module, Any, list[str]]:
    """(model, tokenizer or None, fresh modules) from a factory.

    The factory returns an nn.Module, or for text tasks a pair (nn.Module, tokenizer), the tokenizer a transformers
    tokenizer or the name of one. Weights that the factory draws depend on `seed` alone.

    Args:
        weights: a safetensors file for the module; see `load_weights`.

    Raises:
        ConfigError: the factory cannot be imported or called with `options`, or returns something else.
        FileFormatError: `weights` do not fit.
    """
    factory = load_factory(spec)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(f"model_options: {spec}{inspect.signature(factory)}: {error}") from error
    except ValueError:
        pass
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = factory(**options)
    except Exception as error:
        raise ConfigError(f"model_factory: {spec} raises {brief(error)}") from error
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model_factory: {spec} returns {type(made).__name__}; expected a torch.nn.Module")
    fresh = load_weights(model, Path(weights).expanduser()) if weights else []
    if dtype != "auto":
        model.to(getattr(torch, dtype))
    return model, tokenizer, fresh


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load a safetensors file strictly; return the module it leaves out, if that is the last one.

    Names and shapes must be those of the module. The only exceptions are the batch counters of batch norms, which
    many files lack, and the output layer (the last module with tensors): where none of its tensors are in the file
    it keeps its drawn weights and its name is returned.

    Raises:
        FileFormatError: damaged, or with missing, unknown or misshapen tensors; nothing is loaded then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConfigError(f"model_weights: no such file: {path}")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise FileFormatError(f"{path}: not a readable safetensors file ({error})") from error
    own = model.state_dict()
    last = next(reversed([name for name, module in model.named_modules() if _tensors(module)]), "")
    head = {f"{last}.{key}" for key in _tensors(model.get_submodule(last))} if last else set()
    missing = [key for key in own if key not in stored and not key.endswith("num_batches_tracked")]
    fresh = [last] if head and head <= set(missing) and len(head) < len(own) else []
    missing = [key for key in missing if not (fresh and key in head)]
    problems = [f"missing {key} {tuple(own[key].shape)}" for key in missing]
    for key, tensor in stored.items():
        if key not in own:
            near = difflib.get_close_matches(key, missing or list(own), 1)
            problems.append(f"unknown {key}" + (f" (nearest of the model: {near[0]})" if near else ""))
        elif tensor.shape != own[key].shape:
            problems.append(f"{key} is {tuple(tensor.shape)}, the model has {tuple(own[key].shape)}")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            problems.append(f"{key} has values that are not finite")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise FileFormatError(f"{path}: does not fit the model: {'; '.join(problems[:4])}{more}")
    model.load_state_dict(stored, strict=False)
    return fresh


def _tensors(module: nn.Module) -> list[str]:
    """Names of the saved tensors that a module itself holds."""
    return [key for key in module.state_dict() if "." not in key]


def caller(model: nn.Module) -> Callable[[nn.Module, dict[str, Any]], Any]:
    """How to ask a factory's model for logits: the main input goes first, other inputs by name where `forward`
    takes them; the answer may be a tensor, have `.logits`, or be a dict or tuple with them."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    by_name = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    def call(model: nn.Module, inputs: dict[str, Any]) -> Any:
        main = next(name for name in ("input_ids", "pixel_values") if name in inputs)
        others = {
            name: value
            for name, value in inputs.items()
            if name in by_name - {main, "labels"} or (anything and name == "attention_mask")
        }
        output = model(**{main: inputs[main]}, **others) if main in by_name else model(inputs[main], **others)
        return logits_of(output)

    return call


def logits_of(output: Any) -> Any:
    """The logits in whatever a model returned."""
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple | list) else output
