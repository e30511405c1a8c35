"""Layer 5: whole models, some of whose layers hold structures, as folders; strict and atomic.

A folder holds `compressed-00001.safetensors` and so on, for a model of transformers its `config.json` and what its
tokenizer or image processor needs, and `slimtune.json`, the manifest: what the layers hold, the model's class, and
SHA-256 and size of every file. transformers alone finds no weights there and says so.

It is built beside its place as `.NAME.new`, synced, and renamed; a folder that is replaced waits as `.NAME.old`.
"""

from .expanding import Expanded, save_expanded
from .folders import CompressedFolder, is_compressed, read_compressed
from .loading import load_compressed, load_with_head
from .writing import CompressedWriter, save_compressed

__all__ = [
    "CompressedFolder",
    "CompressedWriter",
    "Expanded",
    "is_compressed",
    "load_compressed",
    "load_with_head",
    "read_compressed",
    "save_compressed",
    "save_expanded",
]
