"""Compression of models that memory cannot hold."""

from __future__ import annotations

from slimtune.app.compress import CompressResult
from slimtune.app.compress_config import CompressConfig
from slimtune.app.signals import StopRequest
from slimtune.errors import ConfigError


def compress_shards(cfg: CompressConfig, chosen: CompressConfig, stop: StopRequest) -> CompressResult:
    raise ConfigError("dataset_name: needed")
