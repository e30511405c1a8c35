"""Models as compressed folders."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..compress import describe_structures
from ..errors import ConfigError, FileFormatError, SlimtuneError, StructureError, UninitializedError
from ..files import FORMAT, MANIFEST, hash_file, read_json, share, sync, write_synced
from ..structures import Structure
from ..targets import adapter_names, own_modules, unwrapped
from .folders import KIND, beside, check_path, check_target, publish, writing

__all__ = ["CompressedWriter", "save_compressed"]

JOURNAL = "journal.json"
SHARD_BYTES = 2 * 10**9
PROCESSING = (
    *("tokenizer*", "vocab*", "merges.txt", "spiece*", "sentencepiece*", "*.tiktoken", "*.model", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "preprocessor_config.json", "processor_config.json"),
)
"""What a model folder holds beside config and weights that its tokenizer or image processor reads."""


class CompressedWriter:
    """Writes a compressed model part by part, so that no more than a shard of it need be in memory.

    Shards go to a hidden folder beside `path` and are synced one by one with their hashes. A writer of the same
    `identity` finds those that an interrupted one has finished: their keys are in `written`.

    Args:
        path: the folder to make. A compressed model in it is replaced by `finish`; until then it stays as it is.
        identity: plain JSON data that tells this model from others, such as the settings it was made with. None:
            nothing is taken up again.
        shard_bytes: a shard is written once it has so many bytes.

    Raises:
        ConfigError: `path` holds something else than a compressed model.
        SlimtuneError: it cannot be written.

    Example:
        >>> import slimtune as st
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = st.CompressedWriter(f"{folder}/model", identity="run 1")
        ...     writer.add({"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2)})
        ...     writer.flush()
        ...     again = st.CompressedWriter(f"{folder}/model", identity="run 1")
        ...     sorted(again.written)
        ['0.bias', '0.weight']
    """

    def __init__(self, path: str | os.PathLike[str], *, identity: Any = None, shard_bytes: int = SHARD_BYTES) -> None:
        self.path = Path(path)
        self.staging = beside(self.path, "new")
        self.shard_bytes = shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.described: dict[str, Any] = {}
        check_target(self.path)
        self.journal: dict[str, Any] = {"format": FORMAT, "identity": identity, "shards": []}
        with writing(self.path):
            if identity is None or not self._take():
                shutil.rmtree(self.staging, ignore_errors=True)
                self.staging.mkdir(parents=True)
                self._write_journal()

    def _take(self) -> bool:
        """Whether an earlier writer's shards are taken up; damaged ones are not."""
        try:
            found = read_json(self.staging / JOURNAL)
            same = json.dumps(found["identity"], sort_keys=True) == json.dumps(self.journal["identity"], sort_keys=True)
            if found["format"] != FORMAT or not same:
                return False
            for shard in found["shards"]:
                file = self.staging / shard["file"]
                whole = file.is_file() and file.stat().st_size == shard["bytes"] and hash_file(file) == shard["sha256"]
                if whole and isinstance(shard["keys"], list) and isinstance(shard["structures"], dict):
                    self.journal["shards"].append(shard)
        except (FileFormatError, OSError, KeyError, TypeError):
            return False
        return True

    @property
    def written(self) -> frozenset[str]:
        """Keys of the tensors that lie in finished shards."""
        return frozenset(key for shard in self.journal["shards"] for key in shard["keys"])

    @property
    def structures(self) -> dict[str, Any]:
        """What was told of the layers in finished shards and of those to come."""
        return {n: e for shard in self.journal["shards"] for n, e in shard["structures"].items()} | self.described

    def add(self, tensors: Mapping[str, Tensor], structures: Mapping[str, Any] | None = None) -> None:
        """Take tensors under the names of the model's `state_dict`, and what `describe_structures` says of the layers
        among them that hold structures. They are on the disk after `flush` or `finish` at the latest.

        Raises:
            SlimtuneError: a tensor that comes twice, is no plain tensor or not finite, or cannot be written.
            UninitializedError: a tensor on the meta device.
        """
        written = self.written
        for key, t in tensors.items():
            if key in written or key in self.pending:
                raise SlimtuneError(f"{self.path}: {key} comes a second time")
            _check_tensor(key, t, f"{self.path}: not saved")
        self.pending |= tensors
        self.described |= structures or {}
        if sum(t.numel() * t.element_size() for t in self.pending.values()) >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard, hashed and synced."""
        if not self.pending:
            return
        taken = {shard["file"] for shard in self.journal["shards"]}
        name = next(n for i in range(1, 10**5) if (n := f"compressed-{i:05}.safetensors") not in taken)
        with writing(self.path):
            file = self.staging / name
            safetensors.torch.save_file(_apart(self.pending), str(file), metadata={"format": "pt"})
            share(file)
            sync(file)
            shard = {"file": name, "bytes": file.stat().st_size, "sha256": hash_file(file), "keys": list(self.pending)}
            self.journal["shards"].append(shard | {"structures": self.described})
            self._write_journal()
        self.pending, self.described = {}, {}

    def finish(
        self,
        model: Mapping[str, Any],
        *,
        tied: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the other files and the manifest, and give the folder its name.

        Args:
            model: the manifest's "model": {"class": a transformers class's name or None}.
            tied: {key: the key whose tensor it shares}.
            facts: plain JSON data about the compression, for people and reports.
            files: {relative path: contents}, such as config.json.

        Raises:
            SlimtuneError: it cannot be written, or `facts` are no JSON data; what was there before is intact.
        """
        self.flush()
        manifest = {"format": FORMAT, "kind": KIND, "model": dict(model), "structures": self.structures}
        try:
            head = json.dumps(manifest | {"tied": dict(tied or {}), "facts": dict(facts or {})}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SlimtuneError(f"{self.path}: not saved: structures or facts are no JSON data ({error})") from None
        with writing(self.path):
            record = {s["file"]: {"sha256": s["sha256"], "bytes": s["bytes"]} for s in self.journal["shards"]}
            for name, data in (files or {}).items():
                place = self.staging / check_path(name, self.path)
                place.parent.mkdir(parents=True, exist_ok=True)
                write_synced(place, data)
                record[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            write_synced(self.staging / MANIFEST, json.dumps(json.loads(head) | {"files": record}, indent=1).encode())
            (self.staging / JOURNAL).unlink()
            sync(self.staging)
            publish(self.staging, self.path)

    def discard(self) -> None:
        """Remove what was written and not finished."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _write_journal(self) -> None:
        new = self.staging / f".{JOURNAL}"
        write_synced(new, json.dumps(self.journal).encode())
        os.replace(new, self.staging / JOURNAL)
        sync(self.staging)


def save_compressed(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    processing: Any = None,
    facts: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a whole model, structures as they are, to a folder: all of it or, should anything interrupt, nothing.

    Every tensor keeps its dtype; tensors that several modules share are written once. A model of a class that
    transformers has gets its config.json, and `load_compressed(path)` makes it anew; for any other module give
    `load_compressed` the module. Trained adapters are no part of it: `save` them, or `merge` first.

    Args:
        path: the folder, made if need be; a compressed model in it is replaced.
        processing: what else belongs to the model: a tokenizer or processor (anything with `save_pretrained`), or a
            model folder whose tokenizer and processor files are copied.
        facts: plain JSON data about the compression, kept in the manifest.
        shard_bytes: files are split at about so many bytes.

    Raises:
        SlimtuneError: the model carries adapters, a tensor that is not finite, or a folder that cannot be written.
        StructureError: a structure whose numbers are not all in its `state_dict`.
        ConfigError: `path` holds something else than a compressed model.
        UninitializedError: a tensor on the meta device.

    Example:
        >>> import slimtune as st
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> _ = st.factorize(model, {"0": 4})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     st.save_compressed(model, f"{folder}/small", facts={"method": "svd"})
        ...     plain = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        ...     _ = st.load_compressed(f"{folder}/small", plain)
        >>> bool(torch.equal(plain[0].structure.A, model[0].structure.A))
        True
    """
    model = unwrapped(model)
    tensors, tied = state_of(model, Path(path))
    files = model_files(model, processing)
    writer = CompressedWriter(path, shard_bytes=shard_bytes)
    try:
        described = describe_structures(model)
        for key, t in tensors.items():
            layer = key.rpartition(".structure.")[0]
            writer.add({key: t}, {layer: described.pop(layer)} if layer in described else None)
        writer.described |= described
        writer.finish(model_record(model), tied=tied, facts=facts, files=files)
    finally:
        writer.discard()


def state_of(model: nn.Module, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(a model's tensors by their names in its `state_dict`, {further name of one: its first name}), all checked."""
    if names := adapter_names(model):
        raise SlimtuneError(f"{path}: not saved: the model carries the adapter {names[0]!r}; merge or remove it first")
    for name, structure in ((n, m) for n, m in own_modules(model).items() if isinstance(m, Structure)):
        kept = structure.state_dict()
        if lost := [key for key, _ in structure.named_buffers() if key not in kept]:
            raise StructureError(f"{path}: not saved: {name} ({type(structure).__name__}) does not store its {lost[0]}")
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for key, t in model.state_dict().items():
        if not isinstance(t, Tensor):
            raise SlimtuneError(f"{path}: not saved: {key} is a {type(t).__name__}, expected tensors only")
        _check_tensor(key, t, f"{path}: not saved")
        same = (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (key,)
        if same in first:
            tied[key] = first[same]
            continue
        first[same] = key
        tensors[key] = t
    return tensors, tied


def model_record(model: nn.Module) -> dict[str, Any]:
    """The manifest's "model"."""
    known = transformers_class(type(model).__name__)
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "class": type(model).__name__ if known is type(model) else None,
        "type": f"{type(model).__module__}.{type(model).__qualname__}",
        "base": base if isinstance(base, str) and base else None,
    }


def model_files(model: nn.Module, processing: Any) -> dict[str, bytes]:
    """{name: contents} of a model's config and of what its tokenizer or processor needs."""
    held: Any = model
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if model_record(model)["class"]:
            config = copy.deepcopy(held.config)
            config.architectures, config.dtype = [type(model).__name__], held.dtype
            config.save_pretrained(folder)
            if getattr(held, "can_generate", lambda: False)():
                held.generation_config.save_pretrained(folder)
        save_processing(processing, folder)
        return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def save_processing(processing: Any, folder: Path) -> None:
    """Write a tokenizer or processor to a folder, or copy what a model folder holds of them."""
    if hasattr(processing, "save_pretrained"):
        processing.save_pretrained(folder)
    elif processing is not None:
        source = Path(processing)
        if not source.is_dir():
            raise ConfigError(f"processing: no such folder: {source}")
        for file in sorted({f for pattern in PROCESSING for f in source.glob(pattern) if f.is_file()}):
            if file.suffix not in (".safetensors", ".bin", ".pt"):
                shutil.copyfile(file, folder / file.name)


def transformers_class(name: object) -> Any:
    """The model class of transformers called so, None if it has none."""
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        return None
    try:
        import transformers
    except ImportError:
        return None
    cls = getattr(transformers, name, None)
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def _check_tensor(key: str, t: Tensor, where: str) -> None:
    if t.is_meta:
        raise UninitializedError(f"{where}: {key} is on the meta device")
    if t.layout is not torch.strided or t.is_quantized or hasattr(t, "full_tensor"):
        raise SlimtuneError(f"{where}: {key} is a {type(t).__name__} ({t.layout}), expected a plain tensor")
    if t.is_floating_point() and t.dtype.itemsize > 1 and not t.isfinite().all():
        raise SlimtuneError(f"{where}: {key} is not finite")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU and contiguous, no two in one storage."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, t in tensors.items():
        t = t.detach().cpu().contiguous()
        whole = t.untyped_storage().nbytes() == t.numel() * t.element_size()
        if not whole or (t.numel() and t.data_ptr() in storages):
            t = t.clone()
        storages.add(t.data_ptr())
        found[key] = t
    return found
