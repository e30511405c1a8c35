"""YAML that keeps its line numbers, refuses duplicate keys, and reads 2e-4 as a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import ConfigError

LIMIT = 1_000_000  # bytes; a configuration is a page, and aliases can make a larger file explode

Lines = dict[tuple[str | int, ...], int]  # path inside the document -> line, counted from 1


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),  # YAML 1.1 wants 2.0e-4
    list("-+.0123456789"),
)


def parse(text: str) -> Any:
    """One YAML value, for `key=value` on the command line.

    >>> parse("2e-4"), parse("[q, v]"), parse("x.jsonl")
    (0.0002, ['q', 'v'], 'x.jsonl')
    """
    return yaml.load(text, Loader=_Loader)


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in `path` and the line of every key.

    Raises:
        ConfigError: no such file, larger than 1 MB, not UTF-8, not YAML, not a mapping, a key written twice.
    """
    try:
        raw = path.read_bytes()
        if len(raw) > LIMIT:
            raise ConfigError(f"{path}: {len(raw):,} bytes is not a configuration (at most {LIMIT:,})")
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    lines: Lines = {}
    problems: list[str] = []
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, lines
        if not isinstance(node, yaml.MappingNode):
            kind = type(node).__name__.removesuffix("Node").lower()
            raise ConfigError(f"{path}:1: expected `key: value` lines, found a {kind}")
        _walk(node, (), lines, problems, 0)
        if problems:
            raise ConfigError("\n".join(f"{path}:{problem}" for problem in problems))
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: not valid YAML: {said}") from None
    finally:
        if loader:
            loader.dispose()


def _walk(node: yaml.Node, at: tuple[str | int, ...], lines: Lines, problems: list[str], depth: int) -> None:
    if depth > 20:
        raise ValueError("nested deeper than 20 levels")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path: tuple[str | int, ...] = (*at, str(key.value))
            line = key.start_mark.line + 1
            if path in lines:
                problems.append(f"{line}: key '{key.value}' is written twice (first on line {lines[path]})")
            lines.setdefault(path, line)
            _walk(value, path, lines, problems, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            path = (*at, index)
            lines[path] = item.start_mark.line + 1
            _walk(item, path, lines, problems, depth + 1)
