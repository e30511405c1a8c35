"""From a configuration to a model that trains: the recipe, its options, the rank that a budget buys; controllers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import slimtune as st
from slimtune.app.calibration import Fitted, meter
from slimtune.app.config import TrainConfig
from slimtune.app.methods import needs_data
from slimtune.app.weights import inside
from slimtune.app.whole import WHOLE, Whole
from slimtune.compress import structured_layers
from slimtune.controllers import Controller
from slimtune.controllers.base import make_controllers
from slimtune.errors import ConfigError
from slimtune.groups import HEAD_RATE
from slimtune.recipe import matches, subclasses
from slimtune.targets import own_modules, saved_modules, select

MAX_RANK = 1 << 16


@dataclass(frozen=True)
class Method:
    """What trains.

    Attributes:
        recipe: None for methods without an adapter.
        whole: names of the modules of which everything trains, running statistics included; "" is the model.
        learning_rate: the peak rate of everything that has no rate of its own.
        calibration: what it took to look at the data first (seconds, batches, examples), if it was done.
        controllers: what acts around the optimizer's step, as {class name: its options}.
    """

    recipe: st.Recipe | None
    whole: list[str]
    learning_rate: float
    calibration: dict[str, Any] = field(default_factory=dict)
    controllers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def make_recipe(name: str, options: dict[str, Any]) -> st.Recipe:
    """The recipe `name`; the names of its options have been checked with the configuration.

    Raises:
        ConfigError: a value it does not take.
    """
    function = st.recipes.RECIPES[name]
    try:
        return function(**options)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{name}: ")
        raise ConfigError(f"method_options: {name}: {reason}") from error


def apply_method(
    cfg: TrainConfig,
    model: nn.Module,
    new_head: Sequence[str],
    *,
    calibrate: Callable[[st.Recipe], Fitted] = Fitted,
    fresh: bool = True,
) -> Method:
    """Make the right parameters of `model` trainable, and no others, in place; an adapter is called "default".

    Args:
        calibrate: called for a recipe that starts from the data.
        fresh: False where a checkpoint's adapter will take this one's place: ranks and values are then plain.

    Raises:
        ConfigError: bad options, a budget below the smallest size, nothing to train, calibration_batches for a method
            that starts without the data.
        TargetError: targets or modules_to_save that match nothing.
    """
    head = list(new_head if cfg.modules_to_save is None else cfg.modules_to_save)
    if (kind := WHOLE.get(cfg.method)) is not None:
        rate = cfg.learning_rate or kind.learning_rate
        if not kind.everything:
            return Method(None, _train_only(model, head), rate)
        controllers = _controllers(cfg, kind, model)
        model.requires_grad_(True)
        return Method(None, [""], rate, controllers=controllers)
    options = dict(cfg.method_options)
    if cfg.budget is not None:
        options["rank"] = fit_rank(cfg, model, cfg.budget)
    recipe = make_recipe(cfg.method, options)
    if not needs_data(recipe) and cfg.calibration_batches != TrainConfig.model_fields["calibration_batches"].default:
        raise ConfigError(f"calibration_batches: {cfg.method} starts without looking at the data; remove it")
    if not fresh:
        fitted = Fitted(replace(recipe, init={}, allocation={}))
    else:
        fitted = calibrate(recipe) if needs_data(recipe) else Fitted(recipe)
    with meter("initialising") as progress:
        st.adapt(
            model,
            fitted.recipe,
            cfg.targets,
            exclude=cfg.exclude_modules,
            modules_to_save=head,
            stats=fitted.stats,
            progress=progress if recipe.init else None,
        )
    whole = [f"{name}.adapters.default" for name in saved_modules(model, "default")]
    return Method(recipe, whole, cfg.learning_rate or recipe.learning_rate, fitted.facts, recipe.controllers)


def check_alone(cfg: TrainConfig, processes: int) -> None:
    """Raise ConfigError where a method makes the model anew while it trains and something holds on to the old one."""
    kind = WHOLE.get(cfg.method)
    if kind is None or kind.controller is None:
        return
    controller: type[Controller] = subclasses(Controller)[kind.controller]
    if not controller.replaces:
        return
    why = f"method {cfg.method} puts new parameters in the place of the model's own while it trains"
    if cfg.torch_compile:
        raise ConfigError(f"torch_compile: {why}, which a compiled graph cannot follow; set it to false")
    if processes > 1:
        raise ConfigError(f"{why}, which {processes} processes cannot follow; start it as one process")


def _controllers(cfg: TrainConfig, kind: Whole, model: nn.Module) -> dict[str, dict[str, Any]]:
    """{class name: options} of a whole-model method's controller, the layers it is to act on among them."""
    if kind.controller is None:
        return {}
    known, options = (
        inspect.signature(subclasses(Controller)[kind.controller]).parameters,
        {**kind.defaults, **cfg.method_options},
    )
    layers = {"targets": ("target_modules", cfg.target_modules), "exclude": ("exclude_modules", cfg.exclude_modules)}
    for option, (key, value) in layers.items():
        if not value:
            continue
        if option not in known:
            raise ConfigError(f"{key}: method {cfg.method} acts on every layer that it can; remove it")
        options[option] = value
    if isinstance(cfg.target_modules, list):
        select(model, cfg.target_modules, cfg.exclude_modules)  # raises now, not at the first step
    return {kind.controller: options}


def controllers_for(cfg: TrainConfig, method: Method, steps: int) -> list[Controller]:
    """The method's controllers, for a run of so many optimizer steps.

    Raises:
        ConfigError: an option's value that one does not take.
    """
    try:
        return make_controllers(method.controllers, steps, cfg.method)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method_options: {error}") from error


def _train_only(model: nn.Module, head: list[str]) -> list[str]:
    if not head:
        raise ConfigError("method head trains modules_to_save, but none are named and the task has no head")
    names = [n for n, _ in model.named_modules() if n and any(matches(n, pattern) for pattern in head)]
    if not names:
        raise ConfigError(f"modules_to_save: {head} match nothing in the model")
    names = [n for n in names if not any(n.startswith(other + ".") for other in names)]
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return names


def fit_rank(cfg: TrainConfig, model: nn.Module, budget: int) -> int:
    """The rank of the largest adapter, without modules_to_save, of at most `budget` parameters; counted on meta.

    Where more rank adds no parameters (LoKr's whole factors) it is the smallest of those. A method that moves ranks is
    counted at the rank that its option `rank` names, in every layer: what AdaLoRA, which begins with more, is left with
    on average, and what ElaLoRA and GoRA share out. Where layers differ in size and the method's own budget is in
    ranks, it may end with more or less.

    Raises:
        ConfigError: rank 1 is already larger than the budget, or every rank has the same size.
    """

    def size(rank: int) -> int:
        ghost = meta_copy(model)
        recipe = make_recipe(cfg.method, {**cfg.method_options, "rank": rank})
        if recipe.controllers and recipe.structure.rank_dims:
            recipe = replace(recipe, options={**recipe.options, "rank": rank})
        st.adapt(ghost, recipe, cfg.targets, exclude=cfg.exclude_modules)
        return sum(p.numel() for _, p in st.trainable_parameters(ghost))

    smallest = size(1)
    if smallest > budget:
        raise ConfigError(
            f"budget: {budget:,} parameters are too few: {cfg.method} of rank 1 has {smallest:,} on these layers"
        )
    low, high = 1, 2
    while high <= MAX_RANK and _fits(size, high, budget):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(size, middle, budget) else (low, middle)
    most = size(low)
    if low > 1 and most == smallest:
        raise ConfigError(f"budget: {cfg.method} has {most:,} parameters on these layers whatever its rank; remove it")
    below, rank = 0, low
    while rank - below > 1:
        middle = (below + rank) // 2
        below, rank = (middle, rank) if _fits(size, middle, most - 1) else (below, middle)
    return rank


def _fits(size: Any, rank: int, budget: int) -> bool:
    try:
        return bool(size(rank) <= budget)
    except (st.StructureError, ConfigError):  # a rank that a layer or the method's other options cannot take
        return False


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules with every tensor on the meta device: no memory, right shapes, ties kept."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def start_of(model: nn.Module, method: Method) -> dict[str, Any]:
    """What a run starts with, before controllers change ranks: trainable parameters, and the rank of every layer."""
    if method.recipe:
        ranks = {row.name: row.rank for row in st.summary(model).rows if row.rank is not None}
    else:
        ranks = {name: rank for name, layer in structured_layers(model).items() if (rank := rank_of(layer)) is not None}
    return {"trainable_parameters": sum(p.numel() for _, p in st.trainable_parameters(model)), "ranks": ranks}


def trained_rows(model: nn.Module, method: Method, start: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per adapted layer or module trained in full: name, rank (now and at the start), parameters. The table of
    ranks.json. A layer that was factorised had full rank."""
    found: dict[str, tuple[int | None, int]]
    full = {} if method.recipe else {name: full_rank(layer) for name, layer in structured_layers(model).items()}
    if method.recipe:
        found = {row.name: (row.rank, row.parameters) for row in st.summary(model).rows}
    elif method.whole == [""] and structured_layers(model):
        found = _leaves(model)
    else:
        parts = {name: model.get_submodule(name) for name in method.whole if name} or dict(model.named_children())
        found = {name: (None, sum(p.numel() for p in part.parameters())) for name, part in parts.items()}
    return [
        {"name": name, "rank": rank, "start_rank": start["ranks"].get(name, full.get(name)), "parameters": count}
        for name, (rank, count) in found.items()
    ]


def rank_of(layer: nn.Module) -> int | None:
    """The rank of the structure in a layer's weight's place, if it has one."""
    rank = getattr(getattr(layer, "structure", None), "rank", None)
    return rank if isinstance(rank, int) else None


def full_rank(layer: nn.Module) -> int | None:
    """The largest rank that a layer factorised into two can have: the smaller side of its matrices."""
    structure: Any = layer.structure
    dims = {
        name: p.shape[dim] for name, dim in structure.rank_dims.items() if (p := getattr(structure, name)) is not None
    }
    if len(dims) != 2:
        return None
    groups = structure.options().get("groups", 1)
    return min(int(getattr(structure, name).numel()) // (rank * groups) for name, rank in dims.items())


def _leaves(model: nn.Module) -> dict[str, tuple[int | None, int]]:
    """(rank, parameters) of every module with parameters of its own; a shared parameter counts where it is first."""
    structured, found, seen = structured_layers(model), dict[str, tuple[int | None, int]](), set[int]()
    for name, module in own_modules(model).items():
        if any(name.startswith(f"{other}.") for other in structured):
            continue
        own = {id(p): p for p in module.parameters(recurse=name in structured) if id(p) not in seen}
        seen |= own.keys()
        if own:
            found[name] = (rank_of(module), sum(p.numel() for p in own.values()))
    return found


def make_groups(cfg: TrainConfig, model: nn.Module, method: Method, head: Sequence[str]) -> list[dict[str, Any]]:
    """Optimizer groups: those of `st.param_groups`, with the head's parameters split off at their own rate."""
    made = st.param_groups(model, lr=method.learning_rate, b_ratio=cfg.b_ratio, weight_decay=cfg.weight_decay)
    if cfg.b_ratio != 1 and all(group["name"] != "fast" for group in made):
        raise ConfigError(f"b_ratio: no factor of {cfg.method} starts at zero, so nothing would use it")
    rate = cfg.head_learning_rate
    if rate is None and cfg.learning_rate is None and method.recipe is not None and method.whole:
        rate = HEAD_RATE
    if rate is None:
        return made
    names = head if method.whole == [""] else method.whole
    own = {id(p) for name, p in model.named_parameters() if p.requires_grad and inside(name, names)}
    if not own:
        raise ConfigError("head_learning_rate: no module is trained in full, so nothing would use it")
    split = []
    for group in made:
        for is_head, lr in ((False, group["lr"]), (True, rate)):
            params = [p for p in group["params"] if (id(p) in own) == is_head]
            if params:
                split.append({**group, "params": params, "lr": lr})
    return split
