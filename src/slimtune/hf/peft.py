"""Any recipe through Hugging Face code: importing this module makes PEFT know slimtune.

`get_peft_model`, `PeftModel.from_pretrained`, transformers' `add_adapter` and `load_adapter`, and TRL's
`SFTTrainer(peft_config=...)` then take a `SlimtuneConfig`. The layers are slimtune's own: a target keeps its place, its
hooks and the names of its weights, and its class is extended by what PEFT asks of a tuner layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any, ClassVar

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..compositions import LinearMap
from ..errors import SlimtuneError, StructureError, TargetError
from ..initialisers import Stats
from ..io import MARK, PREFIX, Description, LayerEntry, check_tensors, describe
from ..layers import Adapted, Extended, extend, own_class, restore
from ..layouts import layout_of
from ..merging import check_mergeable
from ..ranks import change_ranks
from ..recipe import Recipe
from ..structured import Structured
from ..structures import Structure
from ..targets import check_name, hosts
from ..verbs import build_adapter, check_stats

__all__ = ["SlimtuneConfig", "SlimtuneLayer", "SlimtuneModel"]


class _PeftType(str):
    """PEFT's own types are members of a closed Enum, read through these attributes."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


SLIMTUNE = _PeftType("SLIMTUNE")


@dataclass
class SlimtuneConfig(peft.PeftConfig):
    """A slimtune recipe as PEFT's configuration; every field is given by keyword.

    A process that reads a folder saved this way must have run `from slimtune.hf import SlimtuneConfig`, which makes
    PEFT know the type "SLIMTUNE"; without it PEFT raises `KeyError: 'SLIMTUNE'`. `slimtune.load` reads the folder
    without PEFT. To serve elsewhere, load it with slimtune and write what every loader knows (`slimtune.export_peft`
    where PEFT has the method), or merge.

    A checkpoint of a run whose controllers changed ranks loads into a model built from the same recipe: layers are
    given the ranks of the file. A model that is built from the folder itself has them already.

    Not supported: `get_peft_model(mixed=True)`, `adapter_names=` in a forward, `target_parameters`, hot-swapping,
    and PEFT's conversion to LoRA. Several active adapters are stacked in the order in which they are named:
    with W1 = adapter1(W), the layer computes adapter2(W1); for additive recipes this is PEFT's sum.

    Args:
        recipe: the method, such as `slimtune.dora(rank=16)`. Needed, unless the configuration comes from a file.
        target_modules: as everywhere in PEFT: names or suffixes, one regular expression for the full name, or
            "all-linear" (every Linear and Conv1D but the output head).
        exclude_modules: the same forms; what they match is left out.
        modules_to_save: suffixes of modules to train in full and save with the adapter.
        trainable_token_indices: rows of an embedding to train, as in `peft.LoraConfig`. `slimtune.load` does not
            read them.
        stats: {layer: statistics of the data} for a recipe that starts from them, as `slimtune.calibrate.fit` on the
            model before PEFT takes it returns. No file holds them.
        slimtune: what a file holds in place of `recipe`: recipe, sizes and scale of every layer.

    Raises:
        StructureError: `recipe` is missing or no Recipe.
        FileFormatError: `slimtune` does not describe an adapter. Nothing is imported or executed to find out.

    Example:
        >>> import slimtune as st
        >>> from peft import get_peft_model
        >>> from slimtune.hf import SlimtuneConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> model = get_peft_model(model, SlimtuneConfig(recipe=st.dora(rank=2), target_modules=["0"]))
        >>> model.get_nb_trainable_parameters()
        (40, 130)
    """

    recipe: Recipe = None  # type: ignore[assignment]
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    stats: Mapping[str, Stats] | None = field(default=None, repr=False, compare=False)
    slimtune: InitVar[Mapping[str, Any] | None] = None
    layers: dict[str, LayerEntry] = field(init=False, repr=False, default_factory=dict)
    """From a file: what each layer carries."""
    saved: Description | None = field(init=False, repr=False, default=None)
    """The adapter as it was when its tensors were last taken for saving."""

    def __post_init__(self, slimtune: Mapping[str, Any] | None) -> None:
        super().__post_init__()
        self.peft_type = SLIMTUNE
        if self.target_modules is None:
            self.target_modules = "all-linear"
        if self.recipe is None and slimtune is not None:
            description = Description.from_dict(slimtune, "adapter_config.json")
            self.recipe, self.layers = description.recipe, description.layers
        if not isinstance(self.recipe, Recipe):
            raise StructureError(f"SlimtuneConfig: recipe must be a Recipe such as st.lora(), got {self.recipe!r}")
        check_stats(self.recipe, self.stats)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; the recipe is part of `slimtune`."""
        names = [f.name for f in fields(self) if f.name not in ("recipe", "stats", "layers", "saved")]
        description = self.saved or Description(self.recipe, self.layers, list(self.modules_to_save or ()))
        return {n: getattr(self, n) for n in names} | {"slimtune": description.to_dict()}


class _Own:
    """A module's own parameter, which a property of that name in BaseTunerLayer would hide."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else nn.Module.__getattr__(module, self.name)


class SlimtuneLayer(nn.Module, BaseTunerLayer):
    """What PEFT asks of a tuner layer, mixed into a layer that slimtune has extended."""

    adapter_layer_names = (MARK,)
    weight: Any = _Own()
    bias: Any = _Own()

    # of Host, which comes after this class
    adapters: nn.ModuleDict
    layout: Any
    training: bool
    merged_adapters: list[str]
    unmerged: list[nn.Parameter]
    """The weight before adapters were merged into it, or nothing."""

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, those included that this layer does not carry."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    @active_adapters.setter
    def active_adapters(self, names: Any) -> None:
        self._active_adapter = list(names)

    def map(self, below: str | None = None) -> LinearMap:
        """The linear map of the adapters that act in this layer; with `below`, the layer's own."""
        map: LinearMap = self.layout(self)
        if below is None and not self._disable_adapters:
            for name in self.active_adapters:
                if name in self.adapters and name not in self.merged_adapters:
                    map = Adapted(self.adapters[name], map, self.training)  # type: ignore[arg-type]
        return map

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; switched off, the layer is the base, so merged adapters are taken out."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the effective weight in the weight's place; `unmerge` puts the old tensor back, bit for bit.

        Raises:
            TargetError: the weight is packed.
            SlimtuneError: with `safe_merge`, the merged weight is not finite; the layer is unchanged.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.adapters]
        if not names:
            return
        host: Any = self
        if isinstance(self, Structured):
            raise TargetError(
                f"{type(self).__name__} holds a structure, which PEFT cannot merge into: load the adapter with st.load "
                "and call st.merge, or st.expand the model first"
            )
        check_mergeable(type(self).__name__, host)
        map: LinearMap = self.layout(self)
        for name in names:
            map = Adapted(self.adapters[name], map, False)  # type: ignore[arg-type]
        stored = self.weight
        wide = torch.float32 if stored.dtype.itemsize < 4 else torch.float64
        new = self.layout.store(map.weight(wide).to(stored.dtype), stored).clone()
        if safe_merge and not new.isfinite().all():
            raise SlimtuneError(f"not merged: the weight merged with {', '.join(names)} is not finite")
        self.unmerged = self.unmerged or [stored]
        self.weight = nn.Parameter(new, requires_grad=False)
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Take every merged adapter out of the weight again."""
        for before in self.unmerged:
            before.data = before.data.to(self.weight.device)  # the model may have moved in the meantime
            self.weight = before
        self.unmerged, self.merged_adapters = [], []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer as it was before PEFT, with its adapters merged into its weight or not."""
        if merge:
            self.merge(safe_merge, adapter_names)
        else:
            self.unmerge()
        host: Any = self
        for key in ("_active_adapter", "_disable_adapters", "merged_adapters", "unmerged"):
            self.__dict__.pop(key, None)
        for hooks in (self._load_state_dict_post_hooks, self._forward_pre_hooks):
            _drop(hooks, _prepare)
        restore(host)
        return host

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would cast the adapter to the base's dtype
        if adapter_name in self.adapters:
            self.adapters[adapter_name].to(device or self.weight.device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, state = super().__reduce_ex__(protocol)
        return _rebuild, (make, arguments), state


@functools.cache
def _tuner_class(host: Any) -> Any:
    return type(host.__name__, (SlimtuneLayer, host), {"__module__": __name__, "__doc__": host.__doc__})


def _rebuild(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = make(*arguments)
    module.__class__ = _tuner_class(type(module))  # type: ignore[arg-type]
    return module


@torch.no_grad()
def _prepare(layer: Any, _: Any) -> None:
    """A hook: structures fill their own buffers once tensors have been loaded, at the first call at the latest."""
    below = layer.map(below="")
    for adapter in layer.adapters.values():
        if not any(t.is_meta for t in adapter.state_dict().values()):
            adapter.structure.prepare(below.weight)
    _drop(layer._forward_pre_hooks, _prepare)


def _drop(hooks: dict[int, Any], hook: Callable[..., Any]) -> None:
    for key in [k for k, h in hooks.items() if h is hook]:
        del hooks[key]


def _own_key(key: str, adapter: str) -> str | None:
    """A tensor's key in a file: its key in the model without the adapter's name. None if it is not the adapter's."""
    layer, mark, rest = key.rpartition(f".{MARK}.{adapter}.")
    return f"{layer}.{MARK}.{rest}" if mark else None


class SlimtuneModel(BaseTuner):
    """The tuner that PEFT makes of a `SlimtuneConfig`. Its layers are hosts like any other: `slimtune.summary`,
    `param_groups`, `attach`, `merged` and `export_peft` take the PeftModel as it is."""

    prefix = MARK
    tuner_layer_cls = SlimtuneLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter; where a layer refuses it, the model is left as it was."""
        self.awaited: set[str] = set()  # one for all layers: what is missing is told once
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except SlimtuneError:
            for layer in [m for m in model.modules() if isinstance(m, SlimtuneLayer)]:
                layer.adapters._modules.pop(adapter_name, None)
                if not layer.adapters:
                    layer.unload_and_optionally_merge_module(False, False, None)
            raise

    def _create_and_replace(
        self,
        peft_config: SlimtuneConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        check_name(adapter_name)
        if MARK in current_key:
            raise TargetError(f"{current_key!r}: PEFT would take a module whose path holds {MARK!r} for an adapter")
        saved = peft_config.layers.get(current_key)
        recipe = saved.recipe if saved else peft_config.recipe.for_layer(current_key, target, self.model)
        # what comes from a file needs no start, for which the data are not at hand
        adapter = build_adapter(target, current_key, replace(recipe, init={}) if saved else recipe)
        self.awaited |= set(recipe.controllers)
        adapter.awaited = self.awaited
        layer = target if isinstance(target, SlimtuneLayer) else _adopt(target, current_key)
        if layer.merged:
            layer.unmerge()
        if not any(p.is_meta for p in adapter.parameters()):
            stats = peft_config.stats or {}
            try:
                adapter.initialize(layer.map(below=adapter_name), stats.get(current_key))
            except StructureError as error:
                raise StructureError(f"{current_key}: {error}") from None
        adapter.recipe = recipe
        if saved:
            # transformers does not load by load_state_dict, whose hook `_adopt` sets
            layer.register_forward_pre_hook(_prepare)
        layer.adapters[adapter_name] = adapter

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for module in model.modules():
            if isinstance(module, SlimtuneLayer):
                for p in module.parameters(recurse=False):  # type: ignore[attr-defined]
                    p.requires_grad_(False)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise SlimtuneError("slimtune's layers do not take adapter_names=; activate one with set_adapter")
        return nullcontext()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SlimtuneConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # the configuration is written next: it describes the adapter as its tensors stand now
        base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        config.saved = replace(
            describe(base, adapter_name),
            recipe=config.recipe,
            saved=[
                name
                for name, module in base.named_modules()
                if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
            ],
        )
        return {k: t for k, t in state_dict.items() if _own_key(k, adapter_name)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return _own_key(key, adapter_name) or key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SlimtuneConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Keys of a file as keys of the model.

        Raises:
            FileFormatError: a tensor of the adapter is missing, unexpected or misshapen; the model is unchanged.
        """
        own = {k: t for k, t in model.state_dict().items() if _own_key(k, adapter_name)}
        names = {str(_own_key(k, adapter_name)).removeprefix(PREFIX): k for k in own}
        found = {k.removeprefix(PREFIX): t for k, t in state_dict.items() if f".{MARK}." in k}
        shapes = {n: tuple(own[k].shape) for n, k in names.items()}
        wanted: dict[str, tuple[Structure, int]] = {}
        if not config.layers:  # sizes that a file does not tell are those of the run's start
            base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
            wanted = _other_ranks(base, adapter_name, shapes, found)
        check_tensors(shapes, found, f"adapter {adapter_name!r}")
        for structure, rank in wanted.values():
            _set_rank(structure, rank)
        return {names.get(k.removeprefix(PREFIX), k): t for k, t in state_dict.items()}


def _other_ranks(
    model: nn.Module, name: str, shapes: dict[str, tuple[int, ...]], found: Mapping[str, Tensor]
) -> dict[str, tuple[Structure, int]]:
    """{layer: its structure and the rank it has in a file} where that is not its own; `shapes` becomes the file's."""
    wanted = {}
    for layer, host in hosts(model, name).items():
        structure: Structure = host.addition(name).structure
        keys = {f"{layer}.{MARK}.structure.{own}": dim for own, dim in structure.rank_dims.items()}
        keys = {key: dim for key, dim in keys.items() if key in shapes}
        sizes = {found[k].shape[dim] for k, dim in keys.items() if k in found and dim < found[k].dim()}
        if len(sizes) != 1 or all(shapes[k][dim] in sizes for k, dim in keys.items()):
            continue
        (rank,) = sizes
        if rank:
            wanted[layer] = structure, rank
            for key, dim in keys.items():
                shapes[key] = (*shapes[key][:dim], rank, *shapes[key][dim + 1 :])
    return wanted


def _set_rank(structure: Structure, rank: int) -> None:
    """Make room for so many ranks, whose values are about to come."""
    own = {name: getattr(structure, name) for name in structure.rank_dims}
    now = min(t.shape[structure.rank_dims[name]] for name, t in own.items())
    new = {}
    for name, dim in structure.rank_dims.items():
        shape = list(own[name].shape)
        shape[dim] = max(rank - now, 0)
        new[name] = own[name].new_zeros(shape)
    change_ranks(structure, range(min(rank, now)), new if rank > now else None)


def _adopt(target: nn.Module, name: str) -> SlimtuneLayer:
    """Make a layer of the model a tuner layer, in place and without adapters yet."""
    if isinstance(target, Extended):
        raise TargetError(f"{name!r} carries a slimtune adapter; merge or remove it before PEFT takes the model")
    host: Any = extend(target, layout_of(own_class(target)))
    host.__class__ = _tuner_class(type(host))  # type: ignore[arg-type]
    host.active_adapters, host.merged_adapters, host.unmerged = [], [], []
    host.register_load_state_dict_post_hook(_prepare)
    return host


if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise SlimtuneError(f"slimtune.hf needs PEFT 0.21 or later, found {peft.__version__}")
PEFT_TYPE_TO_CONFIG_MAPPING[SLIMTUNE] = SlimtuneConfig
PEFT_TYPE_TO_TUNER_MAPPING[SLIMTUNE] = SlimtuneModel
PEFT_TYPE_TO_PREFIX_MAPPING[SLIMTUNE] = SlimtuneModel.prefix
