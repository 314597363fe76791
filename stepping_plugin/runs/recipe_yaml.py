"""YAML as recipes read it: scalars by version 1.2, every key once, aliases copied, nothing that grows out of bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

__all__ = ["read_yaml", "write_yaml"]

UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)  # bad syntax, endless numbers, endless nesting
_LETTERS, _NODES, _DEPTH = 2**18, 10_000, 40  # of a text; of what it says, aliases written out


def read_yaml(text: str) -> Any:
    """What a text says. An alias (`*name`) stands for a copy: changing one place changes no other.

    Raises:
        ValueError: it cannot be read, or is larger than a recipe can be; one line that says why.
    """
    if len(text) > _LETTERS:
        raise ValueError(f"{len(text):,} letters; a recipe has at most {_LETTERS:,}")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node)
            return loader.construct_document(_written_out(node))
        finally:
            loader.dispose()
    except UNREADABLE as error:
        raise ValueError(re.sub(r"\s+", " ", str(error)).strip()) from None


def write_yaml(value: Any) -> str:
    """A value as a text that `read_yaml`, and readers of YAML 1.1, read as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _measure(root: yaml.Node) -> None:
    """Count what a document would have with all aliases written out, without writing them out.

    Raises:
        ValueError: too many values, too deep, or an alias inside of what it stands for.
    """
    sizes: dict[int, tuple[int, int]] = {}  # of finished nodes: values, depth
    open_nodes: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, finished = stack.pop()
        if id(node) in sizes:
            continue
        inner = _children(node)
        if finished:
            open_nodes.discard(id(node))
            count = 1 + sum(sizes[id(child)][0] for child in inner)
            depth = 1 + max((sizes[id(child)][1] for child in inner), default=0)
            if count > _NODES or depth > _DEPTH:
                raise ValueError(f"more than {_NODES:,} values, or {_DEPTH} levels, with its aliases written out")
            sizes[id(node)] = count, depth
            continue
        open_nodes.add(id(node))
        stack.append((node, True))
        for child in inner:
            if id(child) in open_nodes and id(child) not in sizes and _is_above(child, stack):
                raise ValueError("circular reference: an alias stands inside of what it stands for")
            stack.append((child, False))


def _is_above(node: yaml.Node, stack: list[tuple[yaml.Node, bool]]) -> bool:
    return any(finished and other is node for other, finished in stack)


def _written_out(node: yaml.Node) -> yaml.Node:
    """A copy of a tree in which no two places share a node."""
    if isinstance(node, yaml.MappingNode):
        pairs = [(_written_out(k), _written_out(v)) for k, v in node.value]
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [_written_out(v) for v in node.value], node.start_mark, node.end_mark)
    return yaml.ScalarNode(node.tag, node.value, node.start_mark, node.end_mark)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (the library follows 1.1), and a key that is given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (drops the inherited ones)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(str(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Sections as blocks, lists on one line, quotes around words that YAML 1.1 or 1.2 reads otherwise, no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: Any = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: Any = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=False)


_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {  # kind: pattern of YAML 1.2's core schema, reader
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.([a-z])", r"\1", text.lower())),  # .inf -> inf
    ),
}


def _teach(kind: str, pattern: str, read: Callable[[str], Any]) -> None:
    tag = f"tag:yaml.org,2002:{kind}"
    for yaml_class in (_Loader, _Dumper):
        yaml_class.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), None)
    _Loader.add_constructor(tag, lambda _loader, node: read(node.value))


for _kind, (_pattern, _read_scalar) in _SCALARS.items():
    _teach(_kind, _pattern, _read_scalar)
