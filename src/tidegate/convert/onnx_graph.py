# SPDX-License-Identifier: Apache-2.0
"""Where a model's recurrent nodes stand, in branches and bodies too, and how the axes lie around them.

Letters of axes: T steps, B rows, D directions, H hidden_size, I input_size, F features (D and H in one), 1 a size of 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.convert.canonical import Faults
from tidegate.convert.onnx_file import Constants, axes_of
from tidegate.convert.onnx_names import CELLS

Axes = tuple[str, ...]
Graphs = tuple[Any, ...]

_MAX_LINKS = 64
# What leaves every axis where it is.
_KEEPS = ("Identity", "Dropout", "Cast", "Relu", "Tanh", "Sigmoid", "Gelu", "LeakyRelu", "Elu", "Selu", "Softplus")
_MOVES = ("Transpose", "Squeeze", "Unsqueeze", "Reshape")
# Between two nodes of a stack nothing may be computed.
_IDLE = ("Identity", "Dropout", *_MOVES)
# Past these the axes are followed to where a layer's input comes from and its output goes; a Concat is of features.
_FOLLOWED = (*_KEEPS, *_MOVES, "Concat")
_SIZES = ("Shape", "Size")


@dataclass(frozen=True)
class Place:
    """A node, the graphs that enclose it, from the outermost in, and the nodes that own all but the first of these."""

    node: Any
    graphs: Graphs
    owners: Graphs = ()
    path: str = ""

    @property
    def name(self) -> str:
        return self.node.name or next(filter(None, self.node.output), self.node.op_type)

    @property
    def full_name(self) -> str:
        """Its name, behind those of the branches and bodies around it."""
        return f"{self.path}/{self.name}" if self.path else self.name

    def is_named(self, name: str | None) -> bool:
        return name is None or (name != "" and name in (self.node.name, *self.node.output[:1], self.full_name))

    def __str__(self) -> str:
        return f"{self.full_name} ({self.node.op_type})"


def places(model: Any) -> Iterator[Place]:
    """Every node of a model: the main graph's, those in branches and bodies, those of its local functions."""
    yield from _walk(model.graph, (), (), "")
    for function in model.functions:
        yield from _walk(function, (), (), f"function {function.domain}.{function.name}")


def _walk(graph: Any, graphs: Graphs, owners: Graphs, path: str) -> Iterator[Place]:
    graphs = (*graphs, graph)
    for node in graph.node:
        place = Place(node, graphs, owners, path)
        yield place
        for name, inner in _subgraphs(node):
            yield from _walk(inner, graphs, (*owners, node), f"{place.full_name}.{name}")


def _subgraphs(node: Any) -> Iterator[tuple[str, Any]]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for k, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}[{k}]", graph


def is_recurrent(node: Any) -> bool:
    return node.op_type in CELLS and node.domain in ("", "ai.onnx")


@dataclass(frozen=True)
class End:
    """Where a followed tensor is used; axes None where a Reshape could not be read and a Transpose came after it."""

    node: Any
    axes: Axes | None


class Wiring:
    """How the axes lie from a recurrent node outward, as far as nothing but moves stands between."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._constants: dict[int, Constants] = {}
        self._uses: dict[int, dict[str, list[Any]]] = {}
        self._producers: dict[int, dict[str, tuple[Any, int]]] = {}
        self._kept: list[Graphs] = []  # ids above belong to graphs that must stay alive

    def constants(self, graphs: Graphs) -> Constants:
        key = id(graphs[-1])
        if key not in self._constants:
            self._kept.append(graphs)
            self._constants[key] = Constants(graphs, self.folder)
        return self._constants[key]

    def producers(self, graphs: Graphs) -> dict[str, tuple[Any, int]]:
        """The node that makes each name, and the place in `graphs` of the one that holds it."""
        key = id(graphs[-1])
        if key not in self._producers:
            self._kept.append(graphs)
            made = ((name, node, k) for k, graph in enumerate(graphs) for node in graph.node for name in node.output)
            self._producers[key] = {name: (node, k) for name, node, k in made if name}
        return self._producers[key]

    def is_fed_by(self, after: Place, before: Place) -> bool:
        """Whether `after` takes `before`'s output as a stack does: nothing computed, rows and steps where they were."""
        return self._reaches(before, after, _IDLE)

    def _reaches(self, before: Place, after: Place, links: tuple[str, ...]) -> bool:
        ends = self._forward(before, through=False, links=links)
        return any(end.node is after.node and end.axes is not None and _fits(end.axes, after.node) for end in ends)

    def batch_first(self, faults: Faults, label: str, first: Place, last: Place) -> bool:
        """Whether rows come before steps in what feeds a stack and in what its output becomes; a fault if not alike."""
        given = self._input_axes(first)
        ends = self._forward(last, through=True, links=_FOLLOWED)
        orders = {None if end.axes is None else _rows_first(end.axes) for end in ends if _says(end.axes)}
        comes = _rows_first(given)
        if orders - {comes}:
            goes = " and ".join("in an order that cannot be read" if o is None else _ORDERS[o] for o in orders)
            faults.add(
                f"{label}its input comes {_ORDERS[comes]}, its output goes on {goes}: "
                "say by batch_first=True or False which the layer is to take and to return"
            )
        return comes

    def _input_axes(self, place: Place) -> Axes:
        """The axes of what feeds the node, before the Transposes that stand there; of a stack, its first node's."""
        axes = _input_axes(place.node)
        for _ in range(_MAX_LINKS):
            if (before := self._before(place)) is None:
                break
            place, axes = before, _input_axes(before.node)
        name = place.node.input[0] if place.node.input else ""
        for _ in range(_MAX_LINKS):
            node, _depth = self.producers(place.graphs).get(name, (None, 0))
            if node is None or not node.input or node.op_type not in (*_KEEPS, "Transpose"):
                break
            if node.op_type == "Transpose":
                perm = _perm(node, len(axes))
                if perm is None:
                    break
                outer = dict(zip(perm, axes, strict=True))
                axes = tuple(outer[k] for k in range(len(axes)))
            name = node.input[0]
        return axes

    def _before(self, place: Place) -> Place | None:
        """The recurrent node, of the same graphs, that feeds this one as a stack does."""
        name = place.node.input[0] if place.node.input else ""
        for _ in range(_MAX_LINKS):
            node, depth = self.producers(place.graphs).get(name, (None, 0))
            if node is None or not node.input:
                return None
            if is_recurrent(node):
                before = Place(node, place.graphs[: depth + 1], place.owners[:depth])
                return before if name == node.output[0] and self._reaches(before, place, _FOLLOWED) else None
            if node.op_type not in _FOLLOWED:
                return None
            name = node.input[0]
        return None

    def _forward(self, place: Place, through: bool, links: tuple[str, ...]) -> list[End]:
        """Where Y is used, past `links`; `through`: past further nodes of a stack too."""
        ends: list[End] = []
        seen: set[tuple[int, str]] = set()
        known: dict[str, Axes] = {}
        work: list[tuple[str, Axes | None, Graphs, Graphs, int]] = []

        def enter(node: Any, graphs: Graphs, owners: Graphs, depth: int) -> None:
            if node.output and node.output[0]:
                work.append((node.output[0], _output_axes(node), graphs, owners, depth))

        enter(place.node, place.graphs, place.owners, 0)
        count, hidden = self._sizes(place)
        while work:
            name, axes, graphs, owners, depth = work.pop()
            if (id(graphs[-1]), name) in seen:
                continue
            seen.add((id(graphs[-1]), name))
            if axes is not None:
                known[name] = axes
            if depth > _MAX_LINKS:
                ends.append(End(None, None))
                continue
            for k, output in enumerate(graphs[-1].output):
                if (output if isinstance(output, str) else output.name) != name:
                    continue
                if owners and owners[-1].op_type == "If" and k < len(owners[-1].output):
                    work.append((owners[-1].output[k], axes, graphs[:-1], owners[:-1], depth + 1))
                else:
                    ends.append(End(None, axes or ()))
            for node, inner, inner_owners in self._users(name, graphs, owners):
                if node.op_type in _SIZES:
                    continue
                if is_recurrent(node) and node.input[0] == name:
                    ends.append(End(node, axes or ()))
                    if through and axes is not None and _fits(axes, node):
                        ends.pop()
                        enter(node, inner, inner_owners, depth + 1)
                elif node.op_type in links and (node.input[0] == name or node.op_type == "Concat") and node.output:
                    if node.op_type == "Transpose" and axes is None:
                        ends.append(End(node, None))
                        continue
                    moved = self._moved(node, axes, inner, known, count, hidden)
                    work.append((node.output[0], moved, inner, inner_owners, depth + 1))
                else:
                    ends.append(End(node, axes or ()))
        return ends

    def _sizes(self, place: Place) -> tuple[int, int]:
        """Directions and hidden size, as the node says, or its weights; 0 where neither does."""
        found = {attribute.name: attribute for attribute in place.node.attribute}
        count = 2 if "direction" in found and found["direction"].s == b"bidirectional" else 1
        if "hidden_size" in found:
            return count, found["hidden_size"].i
        constants = self.constants(place.graphs)
        name = place.node.input[2] if len(place.node.input) > 2 else ""
        weight = constants.read(Faults(""), name) if name in constants else None
        return count, 0 if weight is None or weight.ndim != 3 else weight.shape[2]

    def _users(self, name: str, graphs: Graphs, owners: Graphs) -> Iterator[tuple[Any, Graphs, Graphs]]:
        """The nodes that read a name, in its own graph and in those inside it."""
        key = id(graphs[-1])
        if key not in self._uses:
            self._kept.append(graphs)
            self._uses[key] = {}
            for node in graphs[-1].node:
                for given in {*node.input}:
                    self._uses[key].setdefault(given, []).append(node)
                if any(True for _ in _subgraphs(node)):
                    self._uses[key].setdefault("", []).append(node)
        yield from ((node, graphs, owners) for node in self._uses[key].get(name, ()))
        for node in self._uses[key].get("", ()):
            for _, inner in _subgraphs(node):
                yield from self._users(name, (*graphs, inner), (*owners, node))

    def _moved(
        self, node: Any, axes: Axes | None, graphs: Graphs, known: dict[str, Axes], count: int, hidden: int
    ) -> Axes | None:
        """The axes after a link; None where they cannot be told."""
        if axes is None or node.op_type in _KEEPS:
            return axes
        if node.op_type == "Transpose":
            perm = _perm(node, len(axes))
            return None if perm is None else tuple(axes[k] for k in perm)
        if node.op_type == "Concat":
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
            return (*axes[:-1], "F") if axes and axis in (-1, len(axes) - 1) else None
        if node.op_type == "Reshape":
            return self._reshaped(node, axes, graphs, known, count, hidden)
        given = axes_of(node, self.constants(graphs))
        if node.op_type == "Unsqueeze":
            rank = len(axes) + len(given or ())
            if given is None or len({k % rank for k in given}) != len(given):
                return None
            rest = iter(axes)
            return tuple("1" if k in {g % rank for g in given} else next(rest) for k in range(rank))
        if given is None or not axes:
            # Without axes, whichever have size 1: of one direction D, and who knows which others.
            return None
        return tuple(axis for k, axis in enumerate(axes) if k not in {g % len(axes) for g in given})

    def _reshaped(
        self, node: object, axes: Axes, graphs: Graphs, known: dict[str, Axes], count: int, hidden: int
    ) -> Axes | None:
        """D dropped where it is 1, or D and H made one; all other axes as they were."""
        found = self._target(node, axes, graphs, known)
        if found is None or found.count(None) > 1:
            return None
        plain = tuple(axis for axis in axes if axis != "1" and (axis != "D" or count != 1))
        for wanted in (axes, plain, (*plain[:-2], "F") if plain[-2:] == ("D", "H") else plain):
            sizes = {"H": hidden, "D": count, "F": count * hidden}
            fits = [have == axis or have == sizes.get(axis, 0) for have, axis in zip(found, wanted, strict=False)]
            # The number of entries stays, so the last axis is what the others leave.
            if len(found) == len(wanted) and fits.count(False) <= found.count(None):
                return wanted
        return None

    def _target(self, node: Any, axes: Axes, graphs: Graphs, known: dict[str, Axes]) -> list[str | int | None] | None:
        """A Reshape's shape: an axis, a number, or None for a size that is unknown or left to be told."""
        if len(node.input) < 2:
            return None
        constants, producers = self.constants(graphs), self.producers(graphs)
        found: list[str | int | None] = []
        shape = node.input[1]
        parts = [shape]
        if shape not in constants and shape in producers and producers[shape][0].op_type == "Concat":
            parts = list(producers[shape][0].input)
        dims = _known_shape(graphs, node.input[0])
        zero_is_zero = any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute)
        for part in parts:
            numbers = constants.integers(part)
            for number in numbers if numbers is not None else [None]:
                place = len(found)
                if number is None:
                    found.append(_size_of(part, producers, constants, known))
                elif number == 0:
                    if zero_is_zero or place >= len(axes):
                        return None
                    found.append(axes[place])
                elif number > 0 and place < len(axes) and dims is not None and dims[place : place + 1] == [number]:
                    found.append(axes[place])
                else:
                    found.append(None if number < 0 else number)
        return found


_ORDERS = {True: "as (B, T, ...)", False: "as (T, B, ...)"}


def _says(axes: Axes | None) -> bool:
    return axes is None or ("T" in axes and "B" in axes)


def _rows_first(axes: Axes) -> bool:
    return axes.index("B") < axes.index("T")


def _layout(node: Any) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "layout"), 0)


def _input_axes(node: object) -> Axes:
    return ("B", "T", "I") if _layout(node) else ("T", "B", "I")


def _output_axes(node: object) -> Axes:
    return ("B", "T", "D", "H") if _layout(node) else ("T", "D", "B", "H")


def _fits(axes: Axes, node: object) -> bool:
    """Whether an output with these axes is the node's input, its rows and steps at their places."""
    return len(axes) == 3 and axes[:2] == _input_axes(node)[:2] and axes[2] in ("F", "H")


def _perm(node: Any, rank: int) -> list[int] | None:
    """A Transpose's permutation, or None where it is none of `rank` axes."""
    given = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
    perm = list(range(rank))[::-1] if given is None else given
    return perm if sorted(perm) == list(range(rank)) else None


def _size_of(
    name: str, producers: dict[str, tuple[Any, int]], constants: Constants, known: dict[str, Axes]
) -> str | None:
    """The axis whose size a computed number is: Gather or Slice of a Shape of a tensor whose axes are known."""
    for _ in range(4):
        node, _ = producers.get(name, (None, 0))
        if node is None or not node.input:
            return None
        if node.op_type in ("Gather", "Slice"):
            shape, _ = producers.get(node.input[0], (None, 0))
            places = constants.integers(node.input[1]) if len(node.input) > 1 else None
            if shape is None or shape.op_type != "Shape" or places is None or len(places) != 1:
                return None
            if any(attribute.name != "start" or attribute.i for attribute in shape.attribute):
                return None
            if node.op_type == "Slice":
                ends = constants.integers(node.input[2]) if len(node.input) > 2 else None
                if ends != [places[0] + 1]:
                    return None
            axes = known.get(shape.input[0], ())
            return axes[places[0]] if -len(axes) <= places[0] < len(axes) else None
        if node.op_type not in ("Unsqueeze", "Reshape", "Identity", "Cast"):
            return None
        name = node.input[0]
    return None


def _known_shape(graphs: Graphs, name: str) -> list[int] | None:
    """A tensor's sizes as the model states them, 0 for one that it leaves open; None where it states none."""
    for graph in graphs:
        # A function states its inputs and outputs by name alone, and before onnx 1.16 nothing of what is between.
        stated = [*getattr(graph, "value_info", ()), *(graph.input if hasattr(graph, "initializer") else ())]
        for info in stated:
            if info.name == name and info.type.tensor_type.HasField("shape"):
                return [dim.dim_value for dim in info.type.tensor_type.shape.dim]
    return None
