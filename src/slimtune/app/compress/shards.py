"""Compression of transformers models that memory cannot hold, by methods that need nothing but the weights.

The modules are made without numbers; tensors are read one at a time, and written shard by shard.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.allocate import price
from slimtune.app import setup
from slimtune.app.calibration import meter
from slimtune.app.compress.command import CompressResult, Stopped, peak_memory, say
from slimtune.app.compress.config import CompressConfig
from slimtune.app.compress.end import DENSE, MODEL, close, make_record, size_of
from slimtune.app.compress.plan import Layer, Plan, decide, explicit, find_layers, make_factors, new_plan, shared_out
from slimtune.app.compress.state import FREE, State
from slimtune.app.compress.statistics import allocated, reproducible
from slimtune.app.signals import StopRequest
from slimtune.compressed.folders import is_compressed, read_compressed
from slimtune.compressed.writing import model_files, model_record, transformers_class
from slimtune.errors import ConfigError, FileFormatError, StructureError, VerificationError
from slimtune.factors import Part
from slimtune.hf import models as hf
from slimtune.layouts import layout_of
from slimtune.targets import own_modules

SHARD_BYTES = 500 * 10**6
WORK = 6  # copies of the largest weight, in fp32, that a decomposition holds at once


class Reader:
    """Tensors of a transformers folder, read one at a time.

    Raises:
        ConfigError: not such a folder. FileFormatError: a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bytes = 0
        for file in self._files():
            try:
                with safe_open(str(file), "pt") as stored:
                    for key in stored.keys():  # noqa: SIM118
                        self.places[key] = file
                        self.shapes[key] = tuple(stored.get_slice(key).get_shape())
            except (SafetensorError, OSError) as error:
                raise FileFormatError(f"{file}: not a readable safetensors file ({error})") from None
            self.bytes += file.stat().st_size

    def _files(self) -> list[Path]:
        if (self.folder / hf.WEIGHTS).is_file():
            return [self.folder / hf.WEIGHTS]
        index = json.loads((self.folder / hf.INDEX).read_text(encoding="utf-8"))
        return [self.folder / name for name in sorted(set(index["weight_map"].values()))]

    def read(self, key: str) -> Tensor:
        """One tensor, of its own."""
        from safetensors import safe_open

        with safe_open(str(self.places[key]), "pt") as stored:
            return stored.get_tensor(key)

    def mark(self) -> list[list[Any]]:
        """What tells these files from others without reading them."""
        files = dict.fromkeys(self.places.values())
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def compress_shards(cfg: CompressConfig, chosen: CompressConfig, stop: StopRequest) -> CompressResult:
    """`compress` from file to file.

    Raises:
        ConfigError: no folder to read, or one whose tensors are not those of the class that it names.
    """
    began, start = time.perf_counter(), peak_memory()
    out = Path(cfg.output_dir)
    folder = _folder(str(chosen.model_name_or_path))
    reader = Reader(folder)
    ghost, tied, notes = _ghost(folder, reader, chosen)
    setup.check_folder(out)
    state = State(cfg)
    if state.continued:
        say(f"continuing in {out}")
    stop.deferred = True
    job = _Shards(chosen, stop, reader, ghost, state)
    plan = job.plan()
    print(plan)
    need = job.need()
    print(f"memory: about {need / 2**20:,.0f} MiB, the weights are {reader.bytes / 2**20:,.0f} MiB in the files")
    _check_room(out, plan, reader)
    if cfg.plan_only:
        return CompressResult(out, {"plan": [asdict(layer) for layer in plan.layers]})
    relevant = {key: value for key, value in cfg.resolved().items() if key not in FREE}
    writer = st.CompressedWriter(out / MODEL, identity=[relevant, reader.mark()], shard_bytes=SHARD_BYTES)
    job.write(plan, writer)
    facts = {"method": cfg.method, "keep": cfg.keep, "ranks": {x.name: x.rank for x in plan.chosen}}
    writer.finish(model_record(ghost), tied=tied, facts=facts, files=model_files(ghost, folder))
    checked: dict[str, Any] = {MODEL: _check(out / MODEL, plan)}
    problem = None
    if cfg.dense:
        try:
            checked[DENSE] = _write_dense(out, folder)
        except StructureError as error:
            problem = f"no dense/: {error}"
            notes.append(problem)
    about = {
        "source": str(chosen.model_name_or_path),
        "dtype": str(job.dtype).removeprefix("torch."),
        "bytes_per_number": reader.bytes / max(1, plan.model),
    }
    record = make_record(cfg, plan, None, None, {}, notes, about, size_of(out / MODEL))
    record |= {"checked": checked, "seconds": round(time.perf_counter() - began, 1)}
    record |= {"memory": {"stated": need, "measured": max(0, peak_memory() - start)}}
    done = close(out, cfg, record, state.remove)
    if problem is not None:
        raise StructureError(f"model/ is complete, but {problem}")
    return done


def _folder(name: str) -> Path:
    folder = Path(hf.resolve_model(name)).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"model_name_or_path: without data the model is read from a folder, and there is none at {name}"
        )
    if is_compressed(folder):
        raise ConfigError(f"model_name_or_path: {name} is compressed already")
    hf.check_folder(folder)
    return folder


def _ghost(folder: Path, reader: Reader, cfg: CompressConfig) -> tuple[nn.Module, dict[str, str], list[str]]:
    """(the model without numbers, {key without a tensor of its own: the key it shares one with}, notes)."""
    import transformers

    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [None]
    cls = transformers_class(names[0])
    if cls is None:
        raise ConfigError(f"{folder / 'config.json'}: architectures {names!r}: no model class of transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        config._name_or_path = str(cfg.model_name_or_path)
        with hf.quiet(), torch.device("meta"):
            ghost = cls._from_config(config)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ConfigError(f"{folder}: no {names[0]} can be made of its config.json: {error}") from error
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    expected = ghost.state_dict(keep_vars=True)
    for key, tensor in sorted(expected.items(), key=lambda item: item[0] not in reader.places):
        kept = first.setdefault(id(tensor), key)
        if kept != key:
            tied[key] = kept
    missing = [key for key in expected if key not in reader.places and key not in tied]
    wrong = [key for key, t in expected.items() if key in reader.places and reader.shapes[key] != tuple(t.shape)]
    if missing or wrong:
        raise ConfigError(
            f"{folder}: its files do not hold the tensors of a {names[0]} under their names (such as "
            f"{(missing or wrong)[0]}): name dataset_name, so that the model is loaded"
        )
    extra = sorted(key for key in reader.places if key not in expected)
    notes = [f"left out, being no tensors of a {names[0]}: {', '.join(extra[:5])}"] if extra else []
    return ghost.requires_grad_(False), tied, notes


class _Shards:
    """One call of `compress_shards`."""

    def __init__(self, cfg: CompressConfig, stop: StopRequest, reader: Reader, ghost: nn.Module, state: State) -> None:
        self.cfg, self.stop, self.reader, self.ghost, self.state = cfg, stop, reader, ghost, state
        self.factors: Any = make_factors(cfg)
        self.modules = own_modules(ghost)
        stored = reader.read(next(key for key in reader.places if key.endswith("weight"))).dtype
        self.dtype = stored if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
        ghost.to(self.dtype)

    def need(self) -> int:
        """Bytes that are held at once, roughly: what waits for its shard, and the largest weight being decomposed."""
        largest = max(p.numel() for p in self.ghost.parameters())
        return min(SHARD_BYTES, self.reader.bytes) + WORK * 4 * largest

    def part(self, name: str) -> Part:
        """A layer's weight, read now."""
        module: Any = self.modules[name]
        W = self.reader.read(f"{name}.weight")
        layout: Any = layout_of(type(module))
        bias = None
        if module.bias is not None:
            bias = self.reader.read(f"{name}.bias").float()
        kernel, groups = tuple(getattr(module, "kernel_size", ())), getattr(module, "groups", 1)
        return Part(
            name,
            layout(module)._oriented(W).flatten(1).to(torch.promote_types(W.dtype, torch.float32)),
            bias,
            kernel,
            groups,
        )

    def plan(self) -> Plan:
        cfg = self.cfg
        reasons = find_layers(self.ghost, cfg)
        given = explicit(cfg, reasons)
        with meter("reading") as show:
            done = iter(range(1, len(reasons) + 1))

            def priced(name: str) -> Any:
                if self.stop.signal:
                    raise Stopped
                part = self.part(name)
                found = price(part, self.factors)
                show(next(done), len(reasons))
                return type(self.modules[name]).__name__, part, found

            plan = new_plan(reasons, priced, sum(p.numel() for p in self.ghost.parameters()))
        free, keep = shared_out(cfg, plan, given)
        decide(plan, allocated(cfg, free, keep), given)
        return plan

    def write(self, plan: Plan, writer: st.CompressedWriter) -> None:
        """Everything to shards; layers that wait for theirs are in the state meanwhile."""
        layers = {layer.name: layer for layer in plan.layers}
        written = writer.written
        count = len(written)
        with meter("factorising") as show:
            for number, (name, tensors) in enumerate(self._owned().items(), 1):
                layer = layers.get(name)
                if layer is not None and layer.rank is not None:
                    self._factorised(layer, writer, written)
                else:
                    for key in tensors:
                        if key not in written:
                            t = self.reader.read(key)
                            writer.add({key: t.to(self.dtype) if t.is_floating_point() else t})
                if len(writer.written) > count:
                    count = len(writer.written)
                    self.state.drop("layer/")
                show(number, len(layers))
                if self.stop.signal:
                    raise Stopped

    def _owned(self) -> dict[str, list[str]]:
        """{module: keys of its own tensors in the files}, in the model's order."""
        found: dict[str, list[str]] = {}
        for key in self.ghost.state_dict():
            if key in self.reader.places:
                found.setdefault(key.rpartition(".")[0], []).append(key)
        return found

    def _factorised(self, layer: Layer, writer: st.CompressedWriter, written: frozenset[str]) -> None:
        name = f"layer/{layer.name}"
        note = self.state.value(name)
        if note is not None and any(key.startswith(f"{layer.name}.structure.") for key in written):
            layer.weight, layer.after = note["error"], note["after"]
            return
        tensors = self.state.tensors(name) if note is not None else None
        if tensors is None:
            tensors, note = self._made(layer)
            self.state.keep(name, tensors, {})
            self.state.keep_value(name, note)
        assert note is not None
        layer.weight, layer.after = note["error"], note["after"]
        writer.add({f"{layer.name}.{key}": t for key, t in tensors.items()}, {layer.name: note["description"]})

    @torch.no_grad()
    def _made(self, layer: Layer) -> tuple[dict[str, Tensor], dict[str, Any]]:
        part = self.part(layer.name)
        assert layer.rank is not None
        with reproducible(self.cfg.seed, layer.name):
            structure, bias = self.factors(part, layer.rank)
        structure = structure.to(self.dtype)
        bias = part.bias if bias is None else bias
        tensors = {f"structure.{key}": t for key, t in structure.state_dict().items()}
        if bias is not None:
            tensors["bias"] = bias.to(self.dtype)
        if not all(t.isfinite().all() for t in tensors.values()):
            raise StructureError(f"what takes the place of {layer.name!r} is not finite in {self.dtype}")
        error = float((structure.dense().float() - part.W).norm() / part.W.norm().clamp_min(1e-30))
        after = sum(p.numel() for p in structure.parameters()) + (0 if bias is None else bias.numel())
        description = {
            "structure": type(structure).__name__,
            "options": structure.options(),
            "bias": bias is not None,
        }
        return tensors, {"error": error, "after": after, "description": description}


def _check_room(out: Path, plan: Plan, reader: Reader) -> None:
    need = round(reader.bytes * plan.model_after / max(1, plan.model)) + SHARD_BYTES
    free = shutil.disk_usage(out).free
    if free < need:
        raise st.SlimtuneError(
            f"output_dir: the model takes about {need / 2**20:,.0f} MiB, but {out} has {free / 2**20:,.0f} MiB free"
        )


def _check(folder: Path, plan: Plan) -> float:
    """0: every file has its hash, every number is finite and every layer is there. Otherwise it is removed.

    Raises:
        VerificationError: something else.
    """
    found = read_compressed(folder)
    problems = found.problems()
    problems += [f"{x.name}: no structure" for x in plan.chosen if x.name not in found.structures]
    if problems:
        shutil.rmtree(folder, ignore_errors=True)
        raise VerificationError(f"{folder}: {problems[0]}; it has been removed")
    return 0.0


def _write_dense(out: Path, source: Path) -> float | None:
    """The plain model; this needs it in memory."""
    shutil.rmtree(out / DENSE, ignore_errors=True)
    with hf.quiet():
        return st.save_expanded(st.load_compressed(out / MODEL), out / DENSE, processing=source).difference
