"""The table that drives the shared tests: one row per method, one per kind of layer.

A new method is one row in METHODS. A row says how to make its recipe at a small size and what it does not go with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import slimtune as st
from slimtune.initialisers import INITIALISERS, GradientStats, InputStats, Request, Stats
from slimtune.layers import Host, own_class
from slimtune.layouts import layout_of
from slimtune.ranks import seeded
from slimtune.structured import hold
from slimtune.targets import hosts, own_modules, select
from slimtune.verbs import build_adapter


@dataclass(frozen=True)
class Method:
    """recipe(**options) at a small size; `options` a recipe of this row understands in tests."""

    id: str
    recipe: Callable[..., st.Recipe]
    peft: Callable[..., Any] | None = None
    """peft(module, **fields): PEFT's config of the same adapter, if PEFT is right."""
    parameters: Callable[[int, int], int] | None = None
    """The paper's count for (O, I)."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Layers of LAYERS that cannot carry it, with words of the refusal; also single layers of `Chain`."""
    rank_dropout: bool = False
    """The recipe takes `rank_dropout`."""
    exact: bool = True
    """False where the gradient is by design not that of the forward (a detached norm)."""
    kept: Callable[[int, int, int], int] = lambda t, o, i: 2 * t * 3 + 4 * (o + i) * 3 + 8 * o
    """Numbers an adapter may keep for backward beyond x, for T rows: thin products, casts, vectors."""
    outputs: int = 0
    """(T, O) outputs it may keep besides."""
    starts_as_base: bool = True
    """False where the first step is already part of the start."""


def thin_or_dense(t: int, o: int, i: int) -> int:
    """What a product of rank 4 keeps, or a dW and its two parts."""
    return max(t * 4 + 4 * (o + i), 3 * o * i) + 8 * (o + i)


METHODS = [
    Method(
        "lora",
        lambda **o: st.lora(rank=3, alpha=4, **o),
        lambda peft, **o: peft.LoraConfig(r=3, lora_alpha=4, **o),
        lambda o, i: 3 * (o + i),
        rank_dropout=True,
    ),
    Method(
        "lorapro",
        lambda **o: st.lorapro(rank=3, alpha=4, **o),
        lambda peft, **o: peft.LoraConfig(r=3, lora_alpha=4, **o),
        lambda o, i: 3 * (o + i),
    ),
    Method(
        "rslora",
        lambda **o: st.rslora(rank=3, alpha=4, **o),
        lambda peft, **o: peft.LoraConfig(r=3, lora_alpha=4, use_rslora=True, **o),
        lambda o, i: 3 * (o + i),
        rank_dropout=True,
    ),
    Method(
        "dora",
        lambda **o: st.dora(rank=3, alpha=4, **o),
        lambda peft, **o: peft.LoraConfig(r=3, lora_alpha=4, use_dora=True, **o),
        lambda o, i: 3 * (o + i) + o,
        rank_dropout=True,
        exact=False,
        outputs=1,
    ),
    Method("dora-exact", lambda **o: st.dora(rank=3, alpha=4, detach=False, **o), rank_dropout=True, outputs=1),
    Method(
        "dora-column",
        lambda **o: st.dora(rank=3, alpha=4, axis="column", detach=False, **o),
        None,
        lambda o, i: 3 * (o + i) + i,
        rank_dropout=True,
        kept=lambda t, o, i: 2 * t * 3 + 4 * (o + i) * 3 + 8 * (o + i),
    ),
    Method(
        "bora",
        lambda **o: st.bora(rank=3, alpha=4, **o),
        None,
        lambda o, i: 3 * (o + i) + o + i,
        rank_dropout=True,
        exact=False,
        kept=lambda t, o, i: 2 * t * 3 + 4 * (o + i) * 3 + 8 * (o + i),
        outputs=1,
    ),
    Method(
        "bora-exact",
        lambda **o: st.bora(rank=3, alpha=4, detach=False, **o),
        rank_dropout=True,
        kept=lambda t, o, i: 2 * t * 3 + 8 * (o + i) * 3 + 16 * (o + i),
        outputs=1,
    ),
    Method(  # not of low rank
        "bora-kronecker",
        lambda **o: replace(st.kronecker(**o), composition=st.BiMagnitude),
        parameters=lambda o, i: 2 * (o + i),
        exact=False,
        kept=lambda t, o, i: t * i + thin_or_dense(t, o, i),
        outputs=1,
    ),
    Method(
        "gora",
        lambda **o: st.gora(rank=3, alpha=4, floor=1, ceiling=6, **o),
        lambda peft, **o: peft.LoraConfig(r=3, lora_alpha=4, use_rslora=True, **o),
        lambda o, i: 3 * (o + i),
        rank_dropout=True,
        starts_as_base=False,
    ),
    Method("loldu", lambda **o: st.loldu(rank=3, **o), parameters=lambda o, i: 3 + 1),
    Method(
        "loldu-published",
        lambda **o: st.loldu(rank=9, alpha=4, unit=False, train_scale=False, **o),
        kept=lambda t, o, i: 2 * t * 9 + 4 * (o + i) * 9 + 8 * o,
    ),
    Method("singlora", lambda **o: st.singlora(rank=3, alpha=4, **o), parameters=lambda o, i: 3 * max(o, i)),
    Method("singlora-signed", lambda **o: st.singlora(rank=2, form="signed", **o)),
    Method("singlora-centred", lambda **o: st.singlora(rank=2, form="centred", **o)),
    Method("singlora-core", lambda **o: st.singlora(rank=2, alpha=8, form="core", **o)),
    Method(
        "ardlora",
        lambda **o: st.ardlora(rank=3, alpha=4, heads=1, **o),
        parameters=lambda o, i: 3 * (o + i) + 1,
        kept=lambda t, o, i: 2 * t * 3 + 6 * (o + i) * 3 + 8 * o,
    ),
    Method(  # halves of the outputs, or of the inputs where only they divide
        "ardlora-heads",
        lambda **o: st.ardlora(rank=2, alpha=4, heads=2, **o),
        refuses=dict.fromkeys(("embedding", "embedding-padded"), "heads do not divide .* 1, 5 for 5 outputs or 1, 7")
        | {"conv": "3 outputs and 9 inputs"},
        kept=lambda t, o, i: 2 * t * 4 + 8 * (o + i) * 4 + 8 * o,
    ),
    Method(
        "gralora",
        lambda **o: st.gralora(rank=4, alpha=4, **o),
        lambda peft, **o: peft.GraloraConfig(r=4, alpha=4, gralora_k=2, **o),
        parameters=lambda o, i: 4 * (o + i),
        kept=lambda t, o, i: 8 * t + 8,
    ),
    Method(
        "gralora-hybrid",
        lambda **o: st.gralora(rank=2, alpha=4, hybrid_rank=2, **o),
        lambda peft, **o: peft.GraloraConfig(r=2, alpha=4, gralora_k=2, hybrid_r=2, **o),
        parameters=lambda o, i: 4 * (o + i),
        kept=lambda t, o, i: 8 * t + 8 * (o + i),
    ),
    Method(
        "bone",
        lambda **o: st.bone(rank=4, **o),
        lambda peft, **o: peft.MissConfig(r=4, **o),
        parameters=lambda o, i: 4 * o,
        kept=lambda t, o, i: 4 * t + 8,
    ),
    Method(
        "bone-mini",
        lambda **o: st.bone(rank=4, form="mini", mini_rank=2, **o),
        lambda peft, **o: peft.MissConfig(r=4, mini_r=2, init_weights="mini", **o),
        parameters=lambda o, i: 8,
        kept=lambda t, o, i: 4 * t + 4 * o + 8,
    ),
    Method(
        "bone-bat",
        lambda **o: st.bone(rank=2, form="bat", **o),
        lambda peft, **o: peft.MissConfig(r=2, init_weights="bat", **o),
        kept=lambda t, o, i: 8,
    ),
    Method("bone-row", lambda **o: st.bone(rank=2, form="row", **o), kept=lambda t, o, i: 8),
    Method("bone-left", lambda **o: st.bone(rank=2, form="left", **o), kept=lambda t, o, i: 8 * o, outputs=1),
    Method("kronecker", lambda **o: st.kronecker(**o), parameters=lambda o, i: o + i),
    Method(
        "kronecker-sum",
        lambda **o: replace(st.kronecker(**o), structure=st.KroneckerSum, options={"rank": 2}),
        kept=lambda t, o, i: t * max(o, i) * 4 + thin_or_dense(t, o, i),
        outputs=2,
    ),
    Method(
        "interpolative",
        lambda **o: replace(st.kronecker(**o), structure=st.Interpolative, options={"rank": 2}),
        parameters=lambda o, i: 2 * (o + i - 2),
        outputs=2,
    ),
    Method(
        "interpolative-columns",
        lambda **o: replace(st.kronecker(**o), structure=st.Interpolative, options={"rank": 2, "side": "columns"}),
        parameters=lambda o, i: 2 * (o + i - 2),
        kept=lambda t, o, i: t * i + 2 * t * 3 + 4 * (o + i) * 3 + 8 * o,
    ),
    Method(
        "lokr",
        lambda **o: st.lokr(rank=2, decompose_both=True, **o),
        lambda peft, **o: peft.LoKrConfig(r=2, alpha=2, decompose_both=True, **o),
    ),
    Method(
        "loha",
        lambda **o: st.loha(rank=2, alpha=4, **o),
        lambda peft, **o: peft.LoHaConfig(r=2, alpha=4, **o),
        parameters=lambda o, i: 4 * (o + i),
        kept=thin_or_dense,
    ),
    Method("lokh", lambda **o: st.lokh(alpha=2, **o), kept=thin_or_dense),
    Method("lokh-rows", lambda **o: st.lokh(rank=2, alpha=8, orientation="rows", **o), kept=thin_or_dense),
    Method("circulant", lambda **o: st.circulant(**o), parameters=lambda o, i: 2 * max(o, i), kept=lambda t, o, i: 8),
    Method("circulant-one", lambda **o: st.circulant(hadamard=False, **o), parameters=lambda o, i: max(o, i)),
    Method("toeplitz", lambda **o: st.toeplitz(alpha=2, **o), parameters=lambda o, i: 2 * max(o, i)),
    Method("toeplitz-general", lambda **o: st.toeplitz(form="general", **o), parameters=lambda o, i: o + i - 1),
    Method("ldr", lambda **o: st.ldr(**o), parameters=lambda o, i: 4 * max(o, i), kept=lambda t, o, i: 8),
    Method(
        "c3a",
        lambda **o: st.c3a(block=2, **o),
        lambda peft, **o: peft.C3AConfig(block_size=2, **o),
        parameters=lambda o, i: 2 * -(-o // 2) * -(-i // 2),
        kept=lambda t, o, i: 8,
    ),
    Method(
        "adalora",
        lambda **o: st.adalora(rank=2, initial_rank=3, alpha=24, **o),
        lambda peft, **o: peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=24, total_step=10, **o),
        parameters=lambda o, i: 3 * (o + i + 1),
    ),
    Method("elalora", lambda **o: st.elalora(rank=3, alpha=24, **o), parameters=lambda o, i: 3 * (o + i + 1)),
    Method(
        "c3a-published",
        lambda **o: replace(st.c3a(block=3, normalization="published", **o), alpha=8.0),
        parameters=lambda o, i: 3 * -(-o // 3) * -(-i // 3),
    ),
    Method(
        "pissa",
        lambda **o: st.pissa(rank=3, **o),
        parameters=lambda o, i: 3 * (o + i),
        rank_dropout=True,
        kept=lambda t, o, i: 4 * t * 3 + 8 * (o + i) * 3 + 8 * o,
    ),
    Method(
        "pissa-dora",
        lambda **o: replace(st.pissa(rank=3, alpha=4, iterations=2, **o), composition=st.Magnitude),
        parameters=lambda o, i: 3 * (o + i) + o,
        rank_dropout=True,
        exact=False,
        kept=lambda t, o, i: 4 * t * 3 + 8 * (o + i) * 3 + 8 * o,
        outputs=1,
    ),
    Method(
        "olora",
        lambda **o: st.olora(rank=3, alpha=4, **o),
        parameters=lambda o, i: 3 * (o + i),
        rank_dropout=True,
        kept=lambda t, o, i: 4 * t * 3 + 8 * (o + i) * 3 + 8 * o,
    ),
    Method(
        "loraga",
        lambda **o: st.loraga(rank=3, alpha=4, **o),
        parameters=lambda o, i: 3 * (o + i),
        rank_dropout=True,
        kept=lambda t, o, i: 4 * t * 3 + 8 * (o + i) * 3 + 8 * o,
    ),
    Method(
        "eva",
        lambda **o: st.eva(rank=3, alpha=4, **o),
        lambda peft, **o: peft.LoraConfig(r=3, lora_alpha=4, **o),
        lambda o, i: 3 * (o + i),
        rank_dropout=True,
    ),
]


class Diagonal(st.Structure):
    """dW = diag(v), padded with zeros."""

    def __init__(self, out_features, in_features, *, device=None, dtype=None):
        super().__init__(out_features, in_features)
        self.v = nn.Parameter(torch.empty(min(out_features, in_features), device=device, dtype=dtype))

    def dense(self):
        return torch.zeros(self.out_features, self.in_features, dtype=self.v.dtype).diagonal_scatter(self.v)

    def reset_parameters(self):
        with torch.no_grad():
            self.v.zero_()

    def options(self):
        return {}


@dataclass(frozen=True)
class Layer:
    """make() builds a layer, inputs() something to feed it."""

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], Tensor]
    grouped: bool = False


def _image(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=dtype)


def held(layer: nn.Module, structure: type[st.Structure], **options: Any) -> nn.Module:
    """A layer with a structure in its weight's place."""
    made = structure(*layout_of(type(layer)).sizes(layer), **options)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return hold(layer, made)


LAYERS = [
    Layer("linear", lambda: nn.Linear(6, 5), lambda t: torch.randn(2, 7, 6, dtype=t)),
    Layer("linear-flat", lambda: nn.Linear(5, 6, bias=False), lambda t: torch.randn(4, 5, dtype=t)),
    Layer("linear-vector", lambda: nn.Linear(5, 6, bias=False), lambda t: torch.randn(5, dtype=t)),
    Layer("conv1d-hf", lambda: Conv1D(5, 6), lambda t: torch.randn(2, 7, 6, dtype=t)),
    Layer("conv2d", lambda: nn.Conv2d(4, 6, 3), _image),
    Layer("conv2d-strided", lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, bias=False), _image),
    Layer("conv2d-dilated", lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), _image),
    Layer("conv2d-circular", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), _image),
    Layer("conv2d-grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), _image, grouped=True),
    Layer("conv2d-depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), _image, grouped=True),
    Layer("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), lambda t: torch.randn(2, 4, 9, dtype=t)),
    Layer(
        "structured-linear", lambda: held(nn.Linear(6, 5), st.LowRank, rank=2), lambda t: torch.randn(2, 7, 6, dtype=t)
    ),
    Layer("structured-conv2d", lambda: held(nn.Conv2d(4, 6, 3, stride=2), st.LowRank, rank=3), _image),
    Layer("embedding", lambda: nn.Embedding(7, 5), lambda t: torch.randint(0, 7, (2, 4))),
    Layer("embedding-padded", lambda: nn.Embedding(7, 5, padding_idx=0), lambda t: torch.randint(0, 7, (2, 4))),
]

LORA, DORA, DORA_EXACT = (next(m for m in METHODS if m.id == name) for name in ("lora", "dora", "dora-exact"))
methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.id)


def methods_with(trait: Callable[[Method], object]) -> pytest.MarkDecorator:
    """The rows that have something a test needs."""
    return pytest.mark.parametrize("method", [m for m in METHODS if trait(m)], ids=lambda m: m.id)


kinds = pytest.mark.parametrize(
    "layer", [x for x in LAYERS if x.id in ("linear", "conv1d-hf", "conv2d", "embedding")], ids=lambda m: m.id
)
"""One layer of each kind, where a test is dear."""
layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda m: m.id)


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Chain(nn.Module):
    """Token ids to scores through an embedding, Linears with and without bias, a transformers Conv1D and a Conv2d."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.hf = Conv1D(8, 8)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.classifier = nn.Linear(8, 4)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(x)))
        x = self.hf(x)
        x = x + torch.tanh(self.conv(x[:, None])).mean(1)
        return self.classifier(x)

    targets = ("embed", "up", "down", "hf", "conv")
    sources: ClassVar = {"embed": "embedding", "conv": "conv2d"}

    @classmethod
    def targets_of(cls, method: Method) -> list[str]:
        """The layers of this model that a method takes."""
        return [t for t in cls.targets if not {t, cls.sources.get(t, "linear")} & set(method.refuses)]

    @staticmethod
    def ids() -> Tensor:
        return torch.randint(0, 13, (2, 5))


def made_up(model: nn.Module, recipe: st.Recipe, targets: Any = "all-linear") -> dict[str, Stats]:
    """Statistics of data that never was, drawn by the layers' names, for a recipe that starts from them."""
    stats: dict[str, Stats] = {}
    for layer in select(model, targets):
        module = own_modules(model)[layer]
        rank = build_adapter(module, layer, recipe.for_layer(layer, module, model), "meta").structure.rank
        for name, options in recipe.init.items():
            wanted = INITIALISERS[name]
            if wanted.needs:
                asked = wanted.asks(rank, **options) if wanted.asks else Request()
                stats[layer] = _made_up(wanted.needs, asked, module, seeded("made up", layer))
    return stats


def _made_up(kind: type[Stats], asked: Request, module: nn.Module, generator: torch.Generator) -> Stats:
    O, I = layout_of(own_class(module)).sizes(module)
    if kind is InputStats:
        X = torch.randn(asked.components + 4, I, generator=generator, dtype=torch.float64)
        _, values, rows = torch.linalg.svd(X, full_matrices=False)
        k = min(asked.components, I)
        return InputStats(rows[:k], values[:k], float(X.square().sum()), len(X))
    G = torch.randn(O, I, generator=generator, dtype=torch.float64)
    projection = (2 * torch.rand(asked.sketch, I, generator=generator, dtype=torch.float64) - 1) / I**0.5
    left = torch.linalg.svd(G, full_matrices=False)[0][:, : asked.directions]
    return GradientStats(
        G @ projection.T,
        projection,
        left if asked.directions else None,
        left.T @ G if asked.directions else None,
        dict.fromkeys(asked.importance, 1.0),
        1,
    )


def adapt(
    model: nn.Module, recipe: st.Recipe, targets: Any = "all-linear", name: str = "default", **options: Any
) -> list[str]:
    """`st.adapt`, with made-up statistics where the recipe starts from the data."""
    return st.adapt(model, recipe, targets, name, stats=made_up(model, recipe, targets), **options)


def controlled(model: nn.Module, method: Method, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Attach what a method's recipe names, for a run of so many steps."""
    for controller in st.controllers_of(method.recipe(), steps):
        st.attach(controller, model, optimizer)


def shake(model: nn.Module, amount: float = 0.3) -> None:
    """Move every trainable parameter away from its start, and give a scale that waits at 0 its full value."""
    with torch.no_grad():
        for host in hosts(model).values():
            for adapter in host.adapters.values():
                adapter.awaited.clear()
                if adapter.recipe.start_scale != 1:
                    adapter.scale.fill_(adapter.recipe.scale(adapter.structure.rank))
        for _, p in st.trainable_parameters(model):
            p.add_(amount * torch.randn_like(p))


def adapted(method: Method, layer: Layer, dtype: torch.dtype = torch.float64, **options: float) -> tuple[One, Tensor]:
    """A shaken one-layer model in eval mode, and an input that wants a gradient where it can.

    Where the method refuses the layer, the refusal is checked and the test is skipped.
    """
    torch.manual_seed(0)
    model = One(layer.make().to(dtype)).eval()
    if layer.id in method.refuses:
        with pytest.raises(st.SlimtuneError, match=method.refuses[layer.id]):
            adapt(model, method.recipe(**options), ["layer"])
        pytest.skip(f"{method.id} refuses {layer.id}: {method.refuses[layer.id]}")
    adapt(model, method.recipe(**options), ["layer"])
    shake(model)
    x = layer.inputs(dtype)
    if x.is_floating_point():
        x.requires_grad_(True)
    return model, x


def dense_weight(host: Host) -> Tensor:
    """W' by the definitions of structures and compositions."""
    W = host.layout(host).weight()
    for name in host.active_adapters:
        adapter = host.adapters[name]
        W = adapter.composition.weight(W, adapter.dense())
    return W


def dense_forward(host: Host, x: Tensor) -> Tensor:
    """The definition: build W' and apply it."""
    base = host.layout(host)
    return base.with_weight(x, dense_weight(host), base.bias)


def gradients(output: Tensor, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of a fixed random projection of the output: trainable parameters, then x."""
    wanted = [p for _, p in st.trainable_parameters(model)] + ([x] if x.requires_grad else [])
    g = torch.Generator().manual_seed(1)
    probe = torch.randn(output.shape, generator=g, dtype=torch.float64).to(output.dtype)
    return list(torch.autograd.grad((output * probe).sum(), wanted))


def tiny_llama(tied: bool = False):
    """A random two-layer Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    ).eval()
