"""What is measured: one row per method. Adding a method is adding a row to CASES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

__all__ = ["CASES", "GOALS_SET_AT", "STARTUP_GOALS", "TARGETS", "Case"]

TARGETS = "all-linear"


@dataclass(frozen=True)
class Case:
    """One method at one size.

    Args:
        ours: slimtune -> our recipe.
        peft: peft -> the configuration of the same method at the same size, or None where PEFT has none.
        goals: measure -> dtype -> the largest value that is good enough, for the default model on a CPU.
            Measures: `step` (ratio to the limit), `saved` (MiB kept for the backward pass), `compile` (step
            of the compiled model as a ratio to the limit run eagerly), `call` (one tiny call without gradient
            as a multiple of the bare layer's).
        note: shown under the table.
        peft_gradients: whether PEFT's gradients are right; where not, only outputs are compared.
    """

    ours: Callable[[ModuleType], Any]
    peft: Callable[[ModuleType], Any] | None
    goals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    note: str = ""
    peft_gradients: bool = True


def _peft_lora(**options: Any) -> Callable[[ModuleType], Any]:
    return lambda peft: peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, **options)


CASES: dict[str, Case] = {
    "lora": Case(
        lambda st: st.lora(rank=16, alpha=32),
        _peft_lora(),
        {
            "step": {"fp32": 1.06, "bf16": 1.07},
            "saved": {"fp32": 158, "bf16": 89},
            "compile": {"fp32": 1.02},
            "call": {"fp32": 2.5},
        },
    ),
    "lora_dropout": Case(
        lambda st: st.lora(rank=16, alpha=32, dropout=0.05),
        _peft_lora(lora_dropout=0.05),
        {"step": {"fp32": 1.20, "bf16": 1.30}, "saved": {"fp32": 158, "bf16": 89}},
        "Dropout 0.05 on the input of the adapter.",
    ),
    "lora_rank_dropout": Case(
        lambda st: st.lora(rank=16, alpha=32, rank_dropout=0.05),
        None,
        {"step": {"fp32": 1.08, "bf16": 1.09}},
        "Dropout 0.05 on the rank-16 product; PEFT has no such option.",
    ),
    "dora": Case(
        lambda st: st.dora(rank=16, alpha=32),
        _peft_lora(use_dora=True),
        {
            "step": {"fp32": 1.13, "bf16": 1.14},
            "saved": {"fp32": 190, "bf16": 105},
            "compile": {"fp32": 1.08},
        },
    ),
    "dora_dropout": Case(
        lambda st: st.dora(rank=16, alpha=32, dropout=0.05),
        _peft_lora(use_dora=True, lora_dropout=0.05),
        {"step": {"fp32": 1.22, "bf16": 1.30}, "saved": {"fp32": 190, "bf16": 105}},
        "Ours drops the input of the change only; PEFT rescales a second base product of the dropped input.",
    ),
    "bora": Case(
        lambda st: st.bora(rank=16, alpha=32),
        None,
        {"step": {"fp32": 1.30, "bf16": 1.30}, "saved": {"fp32": 191, "bf16": 106}},
        "Magnitudes of rows and columns; PEFT has no such method.",
    ),
    "rslora": Case(
        lambda st: st.rslora(rank=16, alpha=32),
        _peft_lora(use_rslora=True),
        {"step": {"fp32": 1.06, "bf16": 1.07}, "saved": {"fp32": 158, "bf16": 89}},
    ),
    "kronecker": Case(
        lambda st: st.kronecker(),
        None,
        {"step": {"fp32": 1.20, "bf16": 1.25}},
        "SURM's shapes, rank chosen layer by layer.",
    ),
    "lokr": Case(
        lambda st: st.lokr(rank=16),
        lambda peft: peft.LoKrConfig(r=16, alpha=16, target_modules=TARGETS),
        {"step": {"fp32": 1.20, "bf16": 1.25}},
    ),
    "loha": Case(
        lambda st: st.loha(rank=16),
        lambda peft: peft.LoHaConfig(r=16, alpha=16, target_modules=TARGETS),
        {"step": {"fp32": 1.50, "bf16": 1.55}},
    ),
    "lokh": Case(
        lambda st: st.lokh(),
        None,
        {"step": {"fp32": 1.60, "bf16": 1.65}},
        "A chain of two whole factors.",
    ),
    "gralora": Case(
        lambda st: st.gralora(rank=16, alpha=32, k=2),
        lambda peft: peft.GraloraConfig(r=16, alpha=32, gralora_k=2, target_modules=TARGETS),
        {"step": {"fp32": 1.08, "bf16": 1.10}},
        "Rank 16 in 2 x 2 blocks.",
    ),
    "gralora_hybrid": Case(
        lambda st: st.gralora(rank=8, alpha=32, k=2, hybrid_rank=8),
        lambda peft: peft.GraloraConfig(r=8, alpha=32, gralora_k=2, hybrid_r=8, target_modules=TARGETS),
        {},
        "Rank 8 in 2 x 2 blocks and rank 8 beside.",
    ),
    "bone": Case(
        lambda st: st.bone(rank=16),
        lambda peft: peft.MissConfig(r=16, target_modules=TARGETS),
        {"step": {"fp32": 1.03, "bf16": 1.04}},
        "MiSS of rank 16.",
    ),
    "bone_bat": Case(
        lambda st: st.bone(rank=64, form="bat"),
        lambda peft: peft.MissConfig(r=64, init_weights="bat", target_modules=TARGETS),
        {"step": {"fp32": 1.30, "bf16": 1.30}},
        "Blocks of 64, one for each 64 outputs; the gradient alone takes one more product of the weight's size.",
    ),
    "bone_row": Case(
        lambda st: st.bone(rank=64, form="row"),
        None,
        {"step": {"fp32": 1.12, "bf16": 1.12}},
        "Blocks of 64, one for each 64 inputs; PEFT has no such form.",
    ),
    "circulant": Case(lambda st: st.circulant(), None, {"step": {"fp32": 1.20, "bf16": 1.35}}),
    "toeplitz": Case(lambda st: st.toeplitz(), None, {"step": {"fp32": 1.50, "bf16": 1.8}}),
    "toeplitz_general": Case(lambda st: st.toeplitz(form="general"), None, {"step": {"fp32": 1.50, "bf16": 1.8}}),
    "ldr": Case(lambda st: st.ldr(), None, {"step": {"fp32": 1.60, "bf16": 1.9}}, "Two terms."),
    "c3a": Case(
        lambda st: st.c3a(block=64),
        lambda peft: peft.C3AConfig(block_size=64, target_modules=TARGETS),
        {"step": {"fp32": 1.30, "bf16": 1.40}},
        "Blocks of 64. PEFT reflects the gradient in a layer's input, so parity is that of the outputs.",
        peft_gradients=False,
    ),
    "loldu": Case(
        lambda st: st.loldu(rank=16),
        None,
        {"step": {"fp32": 1.08, "bf16": 1.09}, "saved": {"fp32": 158, "bf16": 89}},
        "16 directions of each weight; its factors are kept beside it.",
    ),
    "singlora": Case(
        lambda st: st.singlora(rank=16),
        None,
        {"step": {"fp32": 1.08, "bf16": 1.09}, "saved": {"fp32": 158, "bf16": 89}},
        "One factor of rank 16.",
    ),
    "adalora": Case(
        lambda st: st.adalora(rank=11, initial_rank=16, alpha=160),
        lambda peft: peft.AdaLoraConfig(
            init_r=16, target_r=11, lora_alpha=160, total_step=1000, target_modules=TARGETS
        ),
        {"step": {"fp32": 1.10, "bf16": 1.12}},
        "Rank 16, before the first pruning; the controllers' share is in ours. PEFT does not score or prune by itself.",
    ),
    "elalora": Case(
        lambda st: st.elalora(rank=16, alpha=160),
        None,
        {"step": {"fp32": 1.10, "bf16": 1.12}},
        "Rank 16; the controllers' share is in it.",
    ),
    "ardlora": Case(
        lambda st: st.ardlora(rank=4, alpha=8, warmup=0),
        None,
        {"step": {"fp32": 1.10, "bf16": 1.12}},
        "Head by head in attention, while the gates train: 4 ranks and 2 spare ones each, 8 % fewer numbers than "
        "LoRA's at rank 16; the controller's share is in it.",
    ),
    "ardlora_layers": Case(
        lambda st: st.ardlora(rank=14, alpha=28, heads=1, warmup=0),
        None,
        {"step": {"fp32": 1.10, "bf16": 1.12}},
        "One gate vector per layer, while it trains: 14 ranks and 2 spare ones; the controller's share is in it.",
    ),
    "lorapro": Case(
        lambda st: st.lorapro(rank=16, alpha=32),
        None,
        {"step": {"fp32": 1.15, "bf16": 1.17}, "saved": {"fp32": 158, "bf16": 89}},
        "Rank 16; the adjustment of the gradients is in it.",
    ),
    "lorapro_lean": Case(
        lambda st: st.lorapro(rank=16, alpha=32, form="lean"),
        None,
        {"step": {"fp32": 1.15, "bf16": 1.20}, "saved": {"fp32": 158, "bf16": 89}},
        "Our Adam over the weight with thin moments, which is in it.",
    ),
    "lorapro_full": Case(
        lambda st: st.lorapro(rank=16, alpha=32, form="full"),
        None,
        {"step": {"fp32": 1.20, "bf16": 1.30}, "saved": {"fp32": 158, "bf16": 89}},
        "The paper's Adam over the weight with two moments of its size, which is in it.",
    ),
    "pissa": Case(
        lambda st: st.pissa(rank=16, iterations=4),
        _peft_lora(),
        {"step": {"fp32": 1.06, "bf16": 1.07}, "saved": {"fp32": 158, "bf16": 89}},
        "A change of rank 32 of which 16 train. PEFT takes the start out of the weights; its step is then LoRA's.",
    ),
}

GOALS_SET_AT = {"fp32": (120, "0.74 to 0.80 s"), "bf16": (71, "0.46 to 0.48 s")}
"""What the limit kept (MiB) and took at the default size on the CPU where the goals were set."""

STARTUP_GOALS = {
    "import_seconds": ("`import slimtune` with its core, on top of `import torch`", 0.3),
    "help_seconds": ("`slimtune --help`", 0.5),
    "config_error_seconds": ("`slimtune train` with an unknown key, exit code 2", 2.0),
    "adapt_meta_seconds": ("`adapt` on a meta model of one billion parameters", 2.0),
}
