"""Models of structures as plain folders of transformers."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compress import structured_layers
from ..errors import ConfigError, StructureError, TargetError, VerificationError
from ..files import share, sync
from ..structured import Structured
from ..targets import unwrapped
from .folders import beside, publish, writing
from .writing import save_processing, state_of, transformers_class

__all__ = ["Expanded", "save_expanded"]

NOISE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest relative difference of outputs that rounding dW to a dtype explains."""


@dataclass(frozen=True)
class Expanded:
    """What `save_expanded` wrote and measured."""

    layers: list[str]
    """Those that held structures."""
    flags: list[str] = field(default_factory=list)
    """Fields of the configuration that were set because layers have biases now."""
    zeros: list[str] = field(default_factory=list)
    """Biases of other layers that these flags ask for, written as zeros."""
    difference: float | None = None
    """|y' - y| / |y| of the outputs of the folder, loaded again; None for a model that probe inputs do not fit."""


@torch.no_grad()
def save_expanded(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    processing: Any = None,
    inputs: dict[str, Tensor] | None = None,
) -> Expanded:
    """Write a compressed model of transformers as a plain model folder, W' = dW in every layer that holds a structure.

    `from_pretrained` loads it with nothing missing and nothing left over, which is tried before the folder gets its
    name: every tensor must come back bit for bit, and the outputs on `inputs` as the model gives them, up to the
    rounding of W' to its dtype. The weights are as large as before compression, and two such models are in memory
    meanwhile. `model` is as before afterwards.

    A bias that factorising has given to a layer without one (the mean that AFM keeps) needs a model whose class can
    have it: fields of the configuration such as `attention_bias` are set where that makes room for it.

    Args:
        path: the folder to make; must not exist or be empty.
        processing: as in `save_compressed`.
        inputs: what to call the model with for the comparison; by default a few tokens or a random image.

    Returns:
        What was done and the measured difference.

    Raises:
        ConfigError: `path` is taken, or the model is of no class that transformers has.
        StructureError: a layer has a bias that the architecture has no place for; factors without centring
            (`st.factors.svd`, or `afm` with `add_bias=False`) add none.
        VerificationError: the folder does not load cleanly or computes something else; nothing is left at `path`.
        SlimtuneError: it carries adapters, or cannot be written.
    """
    network: Any = unwrapped(model)
    final = Path(path)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(f"{final} exists and is not an empty folder")
    cls: Any = type(network)
    if transformers_class(cls.__name__) is not cls:
        raise ConfigError(f"{path}: {cls.__name__} is no class of transformers; st.expand(model) and save its state")
    held = structured_layers(network)
    tensors, tied = _dense_state(network, held, final)
    config, flags, zeros = _with_biases(network, cls, tensors, tied, held)
    plain = _assembled(cls, config, tensors, tied, zeros, network)
    staging = beside(final, "new")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with writing(final):
            staging.mkdir(parents=True)
            plain.save_pretrained(staging)
            save_processing(processing, staging)
        difference = _compared(network, plain, cls, staging, inputs)
        with writing(final):
            for file in sorted(f for f in staging.rglob("*") if f.is_file()):
                share(file)
                sync(file)
            sync(staging)
            if final.exists():
                final.rmdir()
            publish(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Expanded(list(held), flags, zeros, difference)


def _dense_state(
    network: nn.Module, held: dict[str, Structured], path: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`state_of`, with weights in the place of structures."""
    tensors, tied = state_of(network, path)
    for name, layer in held.items():
        for key in [k for k in tensors if k.startswith(f"{name}.structure.")]:
            del tensors[key]
        tensors[f"{name}.weight"] = layer.weight.detach().contiguous()
    return tensors, tied


def _keys(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        ghost = cls._from_config(copy.deepcopy(config))
    return {key: tuple(t.shape) for key, t in ghost.state_dict().items()}


def _with_biases(
    network: Any, cls: Any, tensors: dict[str, Tensor], tied: dict[str, str], held: dict[str, Structured]
) -> tuple[Any, list[str], list[str]]:
    """(the configuration that has a place for every tensor, fields that were set, biases it asks for besides)."""
    config = copy.deepcopy(network.config)
    config.architectures, config.dtype = [cls.__name__], network.dtype
    flags: list[str] = []
    there = _keys(cls, config)
    own = {*tensors, *tied}
    for name in sorted(n for n, value in config.to_dict().items() if "bias" in n and value is False):
        if not own - set(there):
            break
        tried = copy.deepcopy(config)
        setattr(tried, name, True)
        added = set(found := _keys(cls, tried)) - set(there)
        if added & own and set(there) <= set(found) and all(key.endswith(".bias") for key in added):
            config, there = tried, found
            flags.append(name)
    if lacking := sorted(own - set(there)):
        layer, more = lacking[0].rpartition(".")[0], f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise StructureError(
            f"{layer!r}: a {cls.__name__} has no place for {lacking[0]}{more} in a plain folder; compress with afm's "
            "add_bias=False (uncentred factors), or keep the model compressed"
        )
    zeros = sorted(set(there) - own)
    if wrong := [key for key in zeros if not key.endswith(".bias")]:
        raise TargetError(f"{cls.__name__}: the model lacks {wrong[0]}, which its class has")
    return config, flags, zeros


def _assembled(
    cls: Any, config: Any, tensors: dict[str, Tensor], tied: dict[str, str], zeros: list[str], network: Any
) -> Any:
    """A model of the class that holds these tensors themselves."""
    with torch.device("meta"):
        plain = cls._from_config(config)
    state = dict(tensors)
    like = next(iter(tensors.values()))
    for key in zeros:
        state[key] = torch.zeros(plain.state_dict()[key].shape, dtype=network.dtype, device=like.device)
    shared = {key: nn.Parameter(t, False) if t.is_floating_point() else t for key, t in state.items()}
    for key, t in (*shared.items(), *((alias, shared[kept]) for alias, kept in tied.items())):
        place, _, leaf = key.rpartition(".")
        module = plain.get_submodule(place)
        if leaf in module._parameters:
            module._parameters[leaf] = t
        else:
            module._buffers[leaf] = t.detach()
    if hasattr(network, "generation_config"):
        plain.generation_config = network.generation_config
    return plain


def _compared(network: Any, plain: Any, cls: Any, folder: Path, inputs: dict[str, Tensor] | None) -> float | None:
    """The relative difference of the outputs of what lies in a folder; its tensors are those of `plain`."""
    again, found = cls.from_pretrained(
        str(folder), dtype=network.dtype, use_safetensors=True, output_loading_info=True, local_files_only=True
    )
    odd = [*found["missing_keys"], *found["unexpected_keys"], *(key[0] for key in found["mismatched_keys"])]
    if odd:
        raise VerificationError(f"{folder}: does not load cleanly: {', '.join(sorted(map(str, odd))[:5])}")
    stored = again.state_dict()
    for key, t in plain.state_dict().items():
        if not t.is_meta and not (t.dtype == stored[key].dtype and torch.equal(t.cpu(), stored[key].cpu())):
            raise VerificationError(f"{folder}: {key} comes back with other numbers than were written")
    batch = inputs if inputs is not None else probe(network)
    if batch is None:
        return None
    device = next(network.parameters()).device
    again.to(device)
    training = network.training
    try:
        y, z = (_outputs(m.eval(), batch) for m in (network, again))
    finally:
        network.train(training)
    if y is None or z is None:
        if inputs is not None:
            raise VerificationError(f"{folder}: the model does not take the given inputs")
        return None
    difference = float((z - y).norm() / y.norm().clamp_min(1e-30))
    if not difference <= NOISE.get(network.dtype, 1e-1):
        raise VerificationError(f"{folder}: its outputs differ from the model's by {difference:.2e} of their norm")
    return difference


def probe(network: Any) -> dict[str, Tensor] | None:
    """A small batch for a model of transformers, drawn from seed 0; None where what it takes cannot be told."""
    generator = torch.Generator().manual_seed(0)
    device, config = next(network.parameters()).device, network.config
    if network.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=generator).to(device, network.dtype)}
    count = getattr(config.get_text_config(), "vocab_size", None)
    if network.main_input_name != "input_ids" or not count:
        return None
    ids = torch.randint(0, count, (2, 8), generator=generator).to(device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _outputs(network: Any, batch: dict[str, Tensor]) -> Tensor | None:
    try:
        found = network(**batch)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    y = next((t for t in (found.values() if hasattr(found, "values") else found) if isinstance(t, Tensor)), None)
    return None if y is None else y.to(torch.promote_types(y.dtype, torch.float32))
