# SPDX-License-Identifier: Apache-2.0
"""A cell's step as a graph of torch's basic operations, and what the cell reads beside its arguments."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from tidegate.fusion.decompositions import decompositions
from tidegate.fusion.reading import captured, computed, read, split_result
from tidegate.scope import scope

# The numbers of rows that a step is traced with: a size that is a multiple of the first stands for rows, unless some
# feature has as many; where the second trace differs in anything else, the step depends on how many rows there are.
_ROWS = (10007, 1000003, 100000007)
_OTHER_ROWS = 2

_TORCH = Path(torch.__file__).parent
_OURS = Path(__file__).parents[1]


class NotTraceableError(Exception):
    """The step is no graph over rows; the text says why.

    Args:
        whatever_the_sizes: no other sizes or settings would change that.
    """

    def __init__(self, reason: str, whatever_the_sizes: bool = False) -> None:
        super().__init__(reason)
        self.whatever_the_sizes = whatever_the_sizes


@dataclass(frozen=True)
class Trace:
    """A step as operations.

    Attributes:
        graph: its placeholders are the tensors that the cell reads, then the leaves of x_t, then the state's; its
            outputs the leaves of y_t, then those of the new state. Each node's `meta["val"]` has a size, with `rows`
            rows.
        counts: of each of the three kinds of placeholders.
        output: the structure of y_t.
        outputs: its leaves.
        constants: tensors that the step reads and that are none of the placeholders, by their name in the graph.
    """

    graph: fx.Graph
    mode: Any
    rows: int
    counts: tuple[int, int, int]
    output: pytree.TreeSpec
    outputs: int


class _Holder(torch.nn.Module):
    """A function, or a module, together with every module that it calls: so that their tensors can be exchanged."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.step_of: Callable[..., Any] | None = None
        if isinstance(step, torch.nn.Module):
            self.cell = step
        else:
            self.step_of = _as_forward(step)
        for k, module in enumerate(read(step).others):
            self.add_module(f"other_{k}", module)

    def forward(self, *given: Any) -> Any:
        return (self.step_of or self.cell)(*given)


def _as_forward(step: Callable[..., Any]) -> Callable[..., Any]:
    """A function under the name of which the tracer notes lines."""
    if not isinstance(step, FunctionType):
        return step
    code = step.__code__.replace(co_name="forward")
    twin = FunctionType(code, step.__globals__, "forward", step.__defaults__, step.__closure__)
    twin.__kwdefaults__ = step.__kwdefaults__
    return twin


class Cell:
    """A cell as the tracer sees it: what it reads beside x_t and the state, at each call anew.

    Args:
        with_noise: x_t is a pair (x_t, noise_t), which the step takes as its first and its third argument.
    """

    def __init__(self, step: Callable[..., Any], with_noise: bool = False) -> None:
        self.step, self.with_noise = step, with_noise
        self.holder = _Holder(step)
        named = [*self.holder.named_parameters(), *self.holder.named_buffers()]
        names = {id(tensor): name for name, tensor in named}
        self.tensors = read(step).tensors
        self.names = [names[id(tensor)] for tensor in self.tensors]

    def call(self, tensors: Sequence[Tensor], x: Any, state: Any) -> Any:
        """A step with other tensors in place of its own."""
        named = dict(zip(self.names, tensors, strict=True))
        given = (x[0], state, x[1]) if self.with_noise else (x, state)
        return torch.func.functional_call(self.holder, named, given)


def trace(cell: Cell, inputs: Any, state: Any, with_lines: bool = True) -> Trace:
    """The step over x_t and a state like these.

    Args:
        inputs, state: nests of tensors (B, ...): their sizes and dtypes matter.
        with_lines: note of each operation the line that it comes from, which takes torch most of the time.

    Raises:
        NotTraceableError: says why there is no graph.
    """
    tensors = cell.tensors
    leaves = [*pytree.tree_leaves(inputs), *pytree.tree_leaves(state)]
    sizes = [size for tensor in tensors for size in tensor.shape] + [s for leaf in leaves for s in leaf.shape[1:]]
    rows = next((rows for rows in _ROWS if rows > max(sizes, default=0)), None)
    if rows is None:
        raise NotTraceableError(f"a size of {max(sizes)} is beyond what is traced")
    before, restore = read(cell.step).settings, _restorer(cell)
    try:
        first = _trace_with(cell, tensors, inputs, state, rows, with_lines)
        between = read(cell.step).settings
        second = _trace_with(cell, tensors, inputs, state, _OTHER_ROWS, with_lines=False)
        # One that is set once and for all, such as Keras' `_called`, does no harm if the step then does the same.
        if read(cell.step).settings != between:
            raise NotTraceableError("the step sets attributes of its own", whatever_the_sizes=True)
    finally:
        restore()
    try:
        _compare(first, second)
    except NotTraceableError:
        if between != before:
            raise NotTraceableError("the step sets attributes of its own, and then does something else") from None
        raise
    return first


def _restorer(cell: Cell) -> Callable[[], None]:
    """Puts back what a step may set while it is traced: attributes, and what lists and the like hold."""
    attributes = [(vars(module), dict(vars(module))) for module in cell.holder.modules()]
    held = [*captured(cell.step).values(), *(value for _, values in attributes for value in values.values())]
    contents = [(value, value.copy()) for value in held if isinstance(value, (list, dict, set))]  # pyright: ignore[reportUnknownVariableType]

    def restore() -> None:
        for values, before in (*attributes, *contents):
            if list(values) == list(before) and all(map(operator.is_, values, before)) and not isinstance(values, dict):
                continue
            values.clear()
            (values.extend if isinstance(values, list) else values.update)(before)

    return restore


def _trace_with(cell: Cell, tensors: Sequence[Tensor], inputs: Any, state: Any, rows: int, with_lines: bool) -> Trace:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    input_leaves, input_spec = pytree.tree_flatten(inputs)
    state_leaves, state_spec = pytree.tree_flatten(state)
    counts = (len(tensors), len(input_leaves), len(state_leaves))
    structure: list[Any] = []

    def step(*values: Tensor) -> list[Tensor]:
        own, x, entering = (
            values[: counts[0]],
            values[counts[0] : counts[0] + counts[1]],
            values[counts[0] + counts[1] :],
        )
        x, entering = pytree.tree_unflatten(x, input_spec), pytree.tree_unflatten(entering, state_spec)
        y, leaving = split_result(cell.call(own, x, entering), entering)
        outputs, spec = pytree.tree_flatten(y)
        structure[:] = [spec, len(outputs)]
        return [*outputs, *pytree.tree_leaves(leaving)]

    def fake(tensor: Tensor, shape: Sequence[int]) -> Tensor:
        dtype = computed(tensor.dtype)
        with mode:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")

    values = [fake(tensor, tensor.shape) for tensor in tensors]
    values += [fake(leaf, (rows, *leaf.shape[1:])) for leaf in (*input_leaves, *state_leaves)]
    decomposed, scope.decomposes = scope.decomposes, True
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            graph = _graph(step, values, with_lines)
            if any(is_in_place(node.target) for node in graph.nodes):
                # torch's own cells change their intermediate results in place, where `functionalize` does not look.
                again = fx.Interpreter(fx.GraphModule(graph.owning_module or {}, graph))
                with preserve_node_meta():  # the lines that operations come from
                    graph = _graph(again.run, values, with_lines)
    except NotTraceableError:
        raise
    except Exception as error:
        raise NotTraceableError(_in_words(error)) from error
    finally:
        scope.decomposes = decomposed
    graph.eliminate_dead_code()
    return Trace(graph, mode, rows, counts, *structure)


def _graph(step: Callable[..., Any], values: Sequence[Tensor], with_lines: bool) -> fx.Graph:
    # Imported where it is used: it takes longer than all the rest.
    from torch.fx.experimental.proxy_tensor import make_fx

    functional: Any = torch.func.functionalize(step, remove="mutations")
    tracer = make_fx(functional, decompositions(), _allow_non_fake_inputs=True, record_stack_traces=with_lines)
    return tracer(*values).graph


def is_in_place(target: Any) -> bool:
    """Whether an operation changes an argument."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def _in_words(error: Exception) -> str:
    line = _user_line(traceback.extract_tb(error.__traceback__))
    kind, text = type(error).__name__, str(error).splitlines()[0] if str(error) else ""
    if kind in ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"):
        text = f"it looks at values ({text}): control flow on values cannot be traced"
    else:
        text = f"{kind}: {text}"
    return f"{text}{line}"


def _user_line(frames: Sequence[traceback.FrameSummary]) -> str:
    for frame in reversed(frames):
        path = Path(frame.filename)
        if frame.line and _TORCH not in path.parents and not (_OURS in path.parents and "cells" not in path.parts):
            return f", at {path.name}:{frame.lineno}: {frame.line.strip()}"
    return ""


def where(node: fx.Node) -> str:
    """The line of the user's code that an operation comes from, for a message."""
    found = node.meta.get("stack_trace") or ""
    lines = found.splitlines()
    for k in range(len(lines) - 1, -1, -1):
        head = lines[k].strip()
        if not head.startswith('File "'):
            continue
        path, number = Path(head.split('"')[1]), head.split("line ")[1].split(",")[0]
        if _TORCH in path.parents or (_OURS in path.parents and "cells" not in path.parts):
            continue
        source = lines[k + 1].strip() if k + 1 < len(lines) else ""
        return f", at {path.name}:{number}: {source}"
    return ""


def _compare(first: Trace, second: Trace) -> None:
    """Refuse a step whose operations depend on how many rows there are."""
    pairs: dict[fx.Node, fx.Node] = {}

    def same(a: Any, b: Any, sizes: bool) -> bool:
        if isinstance(a, fx.Node):
            return pairs.get(a) is b
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(same(x, y, True) for x, y in zip(a, b, strict=True))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        if a == b and type(a) is type(b):
            return True
        if not sizes or not isinstance(a, int) or not isinstance(b, int):
            return False
        return a % first.rows == 0 and a // first.rows * second.rows == b

    for a, b in zip(first.graph.nodes, second.graph.nodes, strict=False):
        alike = a.op == b.op and (a.target == b.target or a.op in ("placeholder", "get_attr"))
        moves = torch.Tag.pointwise not in getattr(a.target, "tags", ())
        given, others = (*a.args, *a.kwargs.values()), (*b.args, *b.kwargs.values())
        if not alike or len(given) != len(others) or not all(map(same, given, others, [moves] * len(given))):
            raise NotTraceableError(f"it depends on how many rows there are{where(a)}")
        pairs[a] = b
    if len(first.graph.nodes) != len(second.graph.nodes):
        raise NotTraceableError("it depends on how many rows there are")
