"""Runs of a second or less: a random Llama on a made-up language, a small convolutional net on coloured noise."""

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from slimtune.app.config import TrainConfig


def make_llama(folder: Path) -> Path:
    """A folder that transformers reads: two layers, one token per letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]
    words = models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_text(path: Path, rows: int = 26) -> Path:
    """The completion is the prompt in another alphabet."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            prompt = "".join(draw.choice("abcd") for _ in range(draw.randint(2, 8)))
            answer = prompt.translate(str.maketrans("abcd", "efgh"))
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    return path


def make_images(path: Path, rows: int = 40) -> Path:
    """Two classes told apart by their colour."""
    draw = np.random.default_rng(0)
    labels = np.arange(rows) % 2
    images = draw.integers(0, 100, (rows, 8, 8, 3), dtype=np.uint8)
    images[..., 0] += (labels * 100).astype(np.uint8)[:, None, None]
    np.savez(path, images=images, labels=labels)
    return path


def convnet(features: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, features, 3, padding=1),
        nn.BatchNorm2d(features),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * features, 2),
    )


class Poison(nn.Module):
    """Passes its input on, and NaN from the n-th training forward pass; or NaN only in the gradient."""

    def __init__(self, at: int, gradient: bool = False):
        super().__init__()
        self.at, self.gradient, self.seen = at, gradient, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        self.seen += 1
        if self.seen < self.at:
            return x
        if self.gradient:
            x = x * 1
            x.register_hook(lambda g: g * float("nan"))
            return x
        return x * float("nan")


def poisoned(at: int = 5, gradient: bool = False) -> nn.Module:
    model = convnet()
    return nn.Sequential(*model[:4], Poison(at, gradient), *model[4:])


def image_config(folder: Path, **changes: Any) -> TrainConfig:
    """Ten steps of the convolutional net: four per epoch, two batches per step."""
    data = folder / "images.npz"
    if not data.exists():
        make_images(data)
    return TrainConfig(
        **{
            "task": "image-classify",
            "model_factory": "tinyrun:convnet",
            "dataset_name": str(data),
            "validation_fraction": 0.2,
            "output_dir": str(folder / "run"),
            "method": "lora",
            "method_options": {"rank": 2, "dropout": 0.2},
            "target_modules": ["0"],
            "modules_to_save": ["6"],
            "learning_rate": 1e-2,
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "logging_steps": 3,
            "eval_steps": 4,
            "save_steps": 2,
            "augment": True,
            **changes,
        }
    )


def text_config(llama: Path, text: Path, run: Path, **changes: Any) -> TrainConfig:
    """Twelve steps of the Llama: three per epoch, the last of each with fewer batches than the others."""
    return TrainConfig(
        **{
            "task": "sft",
            "model_name_or_path": str(llama),
            "dataset_name": str(text),
            "validation_fraction": 0.1,
            "output_dir": str(run),
            "method": "lora",
            "method_options": {"rank": 2, "dropout": 0.1},
            "learning_rate": 1e-2,
            "max_steps": 12,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 3,
            "logging_steps": 5,
            "eval_steps": 4,
            "save_steps": 1,
            "save_total_limit": 20,
            **changes,
        }
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The final tensors of a finished run."""
    file = run / "adapter" / "adapter_model.safetensors"
    return load_file(file if file.exists() else run / "model" / "model.safetensors")


def same(a: Path, b: Path) -> None:
    """Assert that two finished runs have the same bits."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


# ---------------------------------------------------------------- in a process of its own


def run_in_child(config: dict[str, Any], plan: dict[str, Any]) -> None:
    """Train through the command line, with `plan` as the misfortune on the way; exits with the command's code."""
    torch.set_num_threads(1)
    os.environ.update(plan.get("environment", {}))
    calls = 0

    def counted(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == plan["kill_at_call"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    if "kill_at_call" in plan:
        for name in ("fsync", "replace"):
            setattr(os, name, counted(getattr(os, name)))
    if "signal_at_step" in plan and plan.get("only_rank") in (None, os.environ.get("RANK")):
        from slimtune.app.callbacks import Run

        original = Run.on_step_begin

        def begin(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == plan["signal_at_step"]:
                for _ in range(plan.get("times", 1)):
                    os.kill(os.getpid(), plan["signal"])
            original(self, args, state, control, **rest)

        Run.on_step_begin = begin  # type: ignore[method-assign]
    sys.stdout = sys.stderr = Path(plan["log"]).open("w")  # noqa: SIM115
    from slimtune import cli
    from slimtune.app import report

    report.write_report = lambda run: None  # type: ignore[assignment]
    file = Path(plan["log"]).with_suffix(".yaml")
    file.write_text(json.dumps(config))
    code = cli.main(["train", str(file)])
    sys.stdout.flush()
    if "calls" in plan:
        Path(plan["calls"]).write_text(str(calls))
    sys.exit(code)
