"""The YAML of a pipeline.

::

    name: r1                        # default: the file's name
    output_dir: runs/r1             # default: runs/<name>
    code: recorded                  # whether other code makes other artefacts: recorded, version, source (store.py)
    defaults: {...}                 # sections of a run's configuration, below those of every node
    nodes:
      base:
        file: base.yaml             # a run's configuration, relative to this file, or recipe:<name>
        config: {...}               # sections over it
      zero:
        like: base                  # what that node says, below what this one says; the defaults are not said twice
        config:
          stage: grpo
          checkpoint:
            load: ${base.checkpoint}
    compare:                        # rows of the report, from nodes of stage evaluate
      Base: ${evaluate_base.evaluation}
    claims: [...]                   # what the report should show of them (claims.py)

What is said later wins: ``defaults``, ``like``, ``file``, ``config``, the command line (``zero.train.steps=5``,
``zero.file=other.yaml``, ``output_dir=runs/other``). Section by section as in ``config/load.py``.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from r1_megatron.config.load import ConfigError, load_config
from r1_megatron.config.reading import RECIPE, parse, read_chain
from r1_megatron.config.schema import RunConfig
from r1_megatron.pipeline.artefacts import Reference, read_reference, texts
from r1_megatron.pipeline.claims import Claim, read_claims

CODE_POLICIES = ("recorded", "version", "source")
_KEYS = ("name", "output_dir", "code", "defaults", "nodes", "compare", "claims")
_NODE_KEYS = ("file", "like", "config")


@dataclass(frozen=True)
class Node:
    """``config`` with its references as text; ``references`` are those that could be read."""

    name: str
    config: RunConfig
    references: tuple[Reference, ...]

    @property
    def stage(self) -> str:
        return self.config.stage

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the nodes it takes something from."""
        return tuple(dict.fromkeys(reference.node for reference in self.references))


@dataclass(frozen=True)
class Pipeline:
    """``nodes`` in an order in which they can run. ``compare``: rows of the report and what each shows; ``claims``:
    what is put to the test between them."""

    path: Path
    name: str
    output_dir: Path
    code: str
    nodes: Mapping[str, Node]
    compare: Mapping[str, Reference]
    claims: tuple[Claim, ...] = ()


def read_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Pipeline, list[str]]:
    """A pipeline and what is wrong with its file; nodes that cannot be read are left out of it.

    Raises:
        ConfigError: there is no pipeline in the file at all.
    """
    path, problems = Path(path), []
    try:
        tree = parse(path.read_text(encoding="utf-8"), str(path), problems)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}."], str(path)) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("nodes"), dict) or not tree["nodes"]:
        problems.append(f"{path}: expected a pipeline, a mapping with nodes: in it. (A single run: r1-megatron train.)")
        raise ConfigError(problems, str(path))
    problems += _unknown_keys(tree, _KEYS, "")
    top, of_nodes = _split_overrides(overrides, tree["nodes"], problems)
    tree |= top
    name, code = str(tree.get("name") or path.stem), str(tree.get("code") or CODE_POLICIES[0])
    if code not in CODE_POLICIES:
        problems.append(f"code={code}: expected one of {', '.join(CODE_POLICIES)}.")
    reader = _Reader(path, tree, of_nodes, problems)
    nodes = {node.name: node for node in reader.nodes()}
    output_dir = Path(str(tree.get("output_dir") or f"runs/{name}"))
    compare = _compare(tree.get("compare"), problems)
    claims = read_claims(tree.get("claims"), list(tree.get("compare") or ()), problems)
    return Pipeline(path, name, output_dir, code, _in_order(nodes, problems), compare, claims), problems


class _Reader:
    """Layers of nodes to configurations."""

    def __init__(self, path: Path, tree: dict, overrides: Mapping[str, list[str]], problems: list[str]):
        self._path, self._tree, self._overrides, self._problems = path, tree, overrides, problems

    def nodes(self) -> Iterator[Node]:
        defaults = self._sections("defaults", self._tree.get("defaults"))
        for name, said in self._tree["nodes"].items():
            where = f"nodes.{name}"
            if not isinstance(name, str) or not name.isidentifier():
                self._problems.append(f"{where}: a node's name is made of letters, digits and _.")
                continue
            count = len(self._problems)
            layers = [defaults, *self._layers(name, said, ())]
            for field in ("name", "output_dir"):
                if isinstance(said, dict) and isinstance(said.get("config"), dict) and field in said["config"]:
                    self._problems.append(f"{where}: {field} is the pipeline's to choose. Leave it out.")
            if len(self._problems) > count:
                continue
            config = self._config(name, layers)
            if config is None:
                continue
            found = [read_reference(field, text) for field, text in texts(config)]
            self._problems += [f"{where}: {problem}" for problem in found if isinstance(problem, str)]
            yield Node(name, config, tuple(each for each in found if isinstance(each, Reference)))

    def _layers(self, name: str, said: Any, heirs: tuple[str, ...]) -> list[dict]:
        """Trees of a node, those of the node it is like first."""
        where = f"nodes.{name}"
        if not isinstance(said, dict):
            self._problems.append(f"{where}: expected {', '.join(_NODE_KEYS)}.")
            return []
        self._problems += [] if heirs else _unknown_keys(said, _NODE_KEYS, f"{where}.")
        layers: list[dict] = []
        like = said.get("like")
        if like is not None and (like == name or like in heirs):
            self._problems.append(
                f"{where}: nodes are like each other in a circle: {' -> '.join([*heirs, name, like])}."
            )
        elif like is not None and like not in self._tree["nodes"]:
            self._problems.append(f"{where}: like={like}: {_no_node(like, self._tree['nodes'])}")
        elif like is not None:
            layers += self._layers(like, self._tree["nodes"][like], (*heirs, name))
        chosen, file = self._chosen_file(name), said.get("file")
        if chosen is not None or file is not None:
            named = Path(str(file)) if str(file).startswith(RECIPE) else self._path.parent / str(file)
            file = named if chosen is None else Path(chosen)
            layers += [tree for _, tree in read_chain(file, self._problems)]
        return [*layers, self._sections(f"{where}.config", said.get("config"))]

    def _chosen_file(self, name: str) -> str | None:
        """Of the command line, relative to the working directory."""
        chosen = [text.partition("=")[2] for text in self._overrides.get(name, ()) if text.startswith("file=")]
        return chosen[-1] if chosen else None

    def _sections(self, where: str, tree: Any) -> dict:
        if tree is None:
            return {}
        if not isinstance(tree, dict):
            self._problems.append(f"{where}: expected sections (model:, train:, ...).")
            return {}
        return tree

    def _config(self, name: str, layers: Sequence[dict]) -> RunConfig | None:
        tree: dict[str, Any] = {}
        for layer in layers:
            for key, value in layer.items():
                both = isinstance(tree.get(key), dict) and (value is None or isinstance(value, dict))
                tree[key] = {**tree[key], **(value or {})} if both else value
        overrides = [text for text in self._overrides.get(name, ()) if not text.startswith("file=")]
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            yaml.safe_dump(tree, file, sort_keys=False, allow_unicode=True)
            file.flush()
            try:
                return replace(load_config(file.name, overrides), name=name, output_dir=name)
            except ConfigError as error:
                self._problems += [f"nodes.{name}: {problem}" for problem in error.problems]
        return None


def _split_overrides(
    overrides: Sequence[str], nodes: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What the command line says of the pipeline, and of its nodes."""
    top: dict[str, str] = {}
    of_nodes: dict[str, list[str]] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        node, dot, field = key.partition(".")
        if equals and dot and node in nodes:
            of_nodes.setdefault(node, []).append(f"{field}={value}")
        elif equals and key in ("name", "output_dir", "code"):
            top[key] = value
        else:
            known = _no_node(node, nodes) if dot else "Of the pipeline itself: name, output_dir, code."
            problems.append(f"override {text!r}: expected node.section.field=value, or output_dir=DIR. {known}")
    return top, of_nodes


def _compare(tree: Any, problems: list[str]) -> dict[str, Reference]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        problems.append("compare: expected rows, a name and ${node.evaluation} each.")
        return {}
    found = {label: read_reference(f"compare.{label}", str(text)) for label, text in tree.items()}
    problems += [
        each or f"compare.{label}={tree[label]}: expected ${{node.evaluation}}."
        for label, each in found.items()
        if not isinstance(each, Reference)
    ]
    return {str(label): each for label, each in found.items() if isinstance(each, Reference)}


def _in_order(nodes: Mapping[str, Node], problems: list[str]) -> dict[str, Node]:
    """Each behind those it needs, else as in the file; a circle becomes a problem."""
    ordered: dict[str, Node] = {}

    def visit(name: str, heirs: tuple[str, ...]) -> None:
        if name in heirs:
            circle = " -> ".join([*heirs[heirs.index(name) :], name])
            problems.append(f"nodes.{name}: the nodes need each other in a circle: {circle}.")
            return
        if name in ordered or name not in nodes:
            return
        for needed in nodes[name].needs:
            visit(needed, (*heirs, name))
        ordered.setdefault(name, nodes[name])

    for name in nodes:
        visit(name, ())
    return ordered


def _unknown_keys(tree: Mapping[Any, Any], known: Sequence[str], prefix: str) -> list[str]:
    found = []
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            said = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            found.append(f"{prefix}{key}: unknown key. {said}")
    return found


def _no_node(name: str, nodes: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), [str(node) for node in nodes], n=1)
    return f"There is no node {name}. " + (f"Did you mean {near[0]}?" if near else f"Nodes: {', '.join(nodes)}.")
