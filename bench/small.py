"""The costs beside the step: attaching, merging, files, one tiny call, start-up."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import CASES
from bench.model import DTYPES, Size, attach, llama

__all__ = ["lifecycle", "startup", "tiny_call"]


def lifecycle(column: str, method: str, size: Size, dtype: str, device: str, repeats: int = 3) -> dict[str, Any]:
    """Median seconds to attach and to merge, and the bytes of the adapter's safetensors file."""
    attach_seconds, merge_seconds, file_bytes = [], [], 0
    for _ in range(repeats + 1):  # the first also pays for imports
        model = llama(size, DTYPES[dtype], device)
        seconds, wrapped = _timed(lambda m=model: attach(column, method, m), device)
        attach_seconds.append(seconds)
        with tempfile.TemporaryDirectory() as folder:
            _save(column, wrapped, folder)
            file_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
        merge_seconds.append(_timed(lambda w=wrapped: _merge(column, w), device)[0])
    return {
        "attach_seconds": statistics.median(attach_seconds[1:]),
        "merge_seconds": statistics.median(merge_seconds[1:]),
        "file_bytes": file_bytes,
    }


def _save(column: str, model: Any, folder: str) -> None:
    if column == "peft":
        model.save_pretrained(folder)
    else:
        import slimtune as st

        st.save(model, folder)


def _merge(column: str, model: Any) -> Any:
    if column == "peft":
        return model.merge_and_unload()
    import slimtune as st

    return st.merge(model)


def _timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def tiny_call(
    method: str, device: str, columns: Sequence[str], blocks: int = 21, calls: int = 1000
) -> dict[str, float]:
    """Median time of one call without gradient on an 8 x 8 layer and one row, in calls of the bare layer.

    `limit_seconds` is the bare layer's own time. Columns whose blocks do not fit such a layer are left out.
    """
    layers = {"limit": _layer(device)}
    for name in columns:
        if name != "limit":
            with contextlib.suppress(ValueError):
                layers[name] = _adapted_layer(name, method, device)
    x = torch.randn(1, 8, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    with torch.no_grad():
        for _ in range(blocks):
            for name, layer in layers.items():
                start = time.perf_counter()
                for _ in range(calls):
                    layer(x)
                seconds[name].append((time.perf_counter() - start) / calls)
    result = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["limit"], strict=True))
        for name in layers
        if name != "limit"
    }
    return {**result, "limit_seconds": statistics.median(seconds["limit"])}


def _layer(device: str) -> nn.Linear:
    return nn.Linear(8, 8, bias=False, device=device).requires_grad_(False).eval()


def _adapted_layer(column: str, method: str, device: str) -> nn.Module:
    model = nn.Sequential(_layer(device), nn.Identity())
    if column == "peft":
        import peft

        config = CASES[method].peft(peft)
        config.target_modules = ["0"]
        return peft.get_peft_model(model, config).eval().base_model.model[0]
    import slimtune as st

    st.adapt(model, CASES[method].ours(st), targets=["0"])
    return model.eval()[0]


def startup(repeats: int = 5) -> dict[str, float]:
    """Seconds to import, to print the help, to refuse a wrong configuration, to adapt a large meta model."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "wrong.yaml"
        config.write_text("task: classify\nmodel_name_or_path: .\nlerning_rate: 0.1\n")
        command = [str(Path(sys.executable).parent / "slimtune")]
        return {
            "import_seconds": _median(_import_seconds, repeats),
            "help_seconds": _median(lambda: _process_seconds([*command, "--help"], 0), repeats),
            "config_error_seconds": _median(
                lambda: _process_seconds([*command, "train", "--config", str(config)], 2), repeats
            ),
            "adapt_meta_seconds": _median(_adapt_meta_seconds, repeats),
        }


def _median(measure: Callable[[], float], repeats: int) -> float:
    return statistics.median(measure() for _ in range(repeats))


def _import_seconds() -> float:
    code = """
import time, torch
start = time.perf_counter()
import slimtune
slimtune.adapt, slimtune.lora  # names load lazily
print(time.perf_counter() - start)
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _process_seconds(command: list[str], expected: int) -> float:
    start = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if run.returncode != expected:
        raise RuntimeError(f"{' '.join(command)}: exit code {run.returncode}, expected {expected}\n{run.stderr}")
    return seconds


def _adapt_meta_seconds() -> float:
    model = llama(Size(hidden=2048, layers=16, heads=32, mlp=8192, vocab=32000), device="meta")
    return _timed(lambda: attach("ours", "lora", model), "cpu")[0]
