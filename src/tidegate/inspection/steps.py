# SPDX-License-Identifier: Apache-2.0
"""A layer or a cell step by step, with what its step's variables hold and how each state reaches the last.

Letters: T steps, B rows, S a state's size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from tidegate.backends import backend
from tidegate.call import Layer
from tidegate.cell import CELLS
from tidegate.errors import UnsupportedError
from tidegate.fusion.reading import split_result
from tidegate.inspection.result import LayerInspection
from tidegate.nn import over_time
from tidegate.nn.over_time import CellRun, Nest

Named = dict[str, Tensor]
# (t, entering state) -> y_t, the new state, and what the step's variables held.
Step = Callable[[int, Nest], tuple[Nest, Nest, Named]]

# Of each cell that has one, the gate that multiplies the old state.
_CARRIES = {"lstm": "f", "gru": "z"}
_MOST_NUMBERS = 2**24  # of gradients at a time


def look_at_layer(layer: Layer, name: str, directions: int) -> tuple[tuple[Tensor, ...], LayerInspection]:
    """A built-in layer: its results, and what was seen."""
    cell = layer.cell
    if cell.storage:
        raise UnsupportedError(
            f"{name}: its weights are {cell.storage}, through which no gradient reaches; look into the float32 module"
        )
    valid = None if layer.lengths is None else over_time.valid_steps(layer.lengths, len(layer.input), _device(layer))
    with torch.enable_grad():
        input = layer.input if valid is None else layer.input.masked_fill(~valid.unsqueeze(-1), 0)
        gates_x = linear(input, layer.weights["weight_ih"], layer.weights["bias_ih"])

    def step(t: int, state: Nest) -> tuple[Nest, Nest, Named]:
        with _returning({cell.step.__code__: ""}) as frames:
            new = cell.step(gates_x[t], state, layer.weights, layer.options)
        held = {gate: frames[-1][1][gate] for gate in cell.gates if gate in frames[-1][1]}
        return new[0], new, {**held, **dict(zip(cell.states, new, strict=True))}

    walk = _Walk(step, layer.states, list(cell.states), layer.input.shape[:2], valid, layer.resets, layer.reverse)
    output, finals = walk.run()
    return (output, *finals), walk.seen(name, directions, _CARRIES.get(cell.name, ""))


def look_at_cell(run: CellRun, name: str, directions: int) -> tuple[tuple[Nest, Nest], LayerInspection]:
    """Any cell over a sequence: its results, and what was seen."""
    cell, inputs, state = run.cell, run.inputs, run.state
    first: Tensor = pytree.tree_leaves(inputs)[0]
    valid = None if run.lengths is None else over_time.valid_steps(run.lengths, len(first), first.device)
    noise = over_time.draw_noise(cell, inputs, state)
    codes = _codes(cell)
    names = _names_of_rows(cell, codes, inputs, state, noise)

    def step(t: int, entering: Nest) -> tuple[Nest, Nest, Named]:
        given = (over_time.at(t, inputs), entering, *([] if noise is None else [over_time.at(t, noise)]))
        with _returning(codes) as frames, backend("reference"):
            output, new = split_result(cell(*given), entering)
        held = {name: tensor for name, tensor in _held(frames).items() if name in names}
        known = {id(leaf) for leaf in pytree.tree_leaves(given)}
        return output, new, {name: tensor for name, tensor in held.items() if id(tensor) not in known}

    walk = _Walk(step, state, [], first.shape[:2], valid, run.resets, run.reverse)
    return walk.run(), walk.seen(name, directions, "")


class _Walk:
    """A recorded walk over all steps."""

    def __init__(
        self,
        step: Step,
        state: Nest,
        states: list[str],
        sizes: Sequence[int],
        valid: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> None:
        self.step, self.state, self.states, self.valid = step, state, states, valid
        (self.steps, self.rows), self.reverse = sizes, reverse
        if not (self.steps and self.rows):
            raise ValueError(f"input: expected steps and rows to look at, got T = {self.steps}, B = {self.rows}")
        self.fresh = over_time.fresh_steps(resets, valid, reverse)
        self.values: list[Named] = [{} for _ in range(self.steps)]
        self.left: list[list[Tensor]] = [[] for _ in range(self.steps)]  # the states that leave each step

    @torch.enable_grad()
    def run(self) -> tuple[Nest, Nest]:
        state = over_time.mapped(lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()), self.state)
        outputs: list[Nest] = [None] * self.steps
        for t in reversed(range(self.steps)) if self.reverse else range(self.steps):
            entering = state if self.fresh is None else over_time.mapped(partial(_zeroed, self.fresh[t]), state)
            output, new, values = self.step(t, entering)
            self.states = self.states or _names_of_states(new, values)
            self.values[t] = {**values, **dict(zip(self.states, pytree.tree_leaves(new), strict=True))}
            if self.valid is not None:
                new = pytree.tree_map(partial(_chosen, self.valid[t]), new, state)
                output = over_time.mapped(partial(_zeroed, ~self.valid[t]), output)
            # Each a tensor of its own: what h_t takes of c_t is not what the next step takes of c_t.
            state = over_time.mapped(lambda leaf: leaf.view_as(leaf), new)
            self.left[t], outputs[t] = pytree.tree_leaves(state), output
        detached = partial(over_time.mapped, Tensor.detach)
        return detached(pytree.tree_map(lambda *parts: torch.stack(parts), *outputs)), detached(state)

    def seen(self, name: str, directions: int, carries: str) -> LayerInspection:
        values = {
            key: self._over_time([step[key].detach() for step in self.values])
            for key in self.values[0]
            if all(key in step and step[key].shape == self.values[0][key].shape for step in self.values)
        }
        valid = torch.ones(self.steps, self.rows, dtype=torch.bool) if self.valid is None else self.valid
        return LayerInspection(
            name, values, self._reach(directions) if directions else {}, valid, carries, self.reverse
        )

    def _over_time(self, steps: list[Tensor]) -> Tensor:
        """(T, B, ...), NaN past each row's length."""
        stacked = torch.stack(steps)
        if self.valid is None or not stacked.is_floating_point():
            return stacked
        return stacked.masked_fill(~self.valid.view(*self.valid.shape, *(1,) * (stacked.dim() - 2)), torch.nan)

    def _reach(self, directions: int) -> dict[str, Tensor]:
        """Of each state s the norm of dh_T/ds_t over the root of h's size, (T, B)."""
        last: Tensor = self.left[0 if self.reverse else -1][0]
        size = last[0].numel()
        if size <= directions:
            seeds = torch.eye(size, dtype=last.dtype, device=last.device)
            scale = 1.0
        else:
            drawn = torch.randint(2, (directions, size), generator=torch.Generator().manual_seed(0))
            seeds, scale = (2 * drawn - 1).to(last), float(directions)
        places = [k for k, leaf in enumerate(self.left[0]) if leaf.is_floating_point()]
        # The square of what a float32 holds is often less than a float32 holds.
        sums = {k: torch.zeros(self.steps, self.rows, dtype=torch.float64, device=last.device) for k in places}
        sources = [leaves[k] for leaves in self.left for k in places]
        for some in seeds.split(max(1, _MOST_NUMBERS // max(1, sum(leaf.numel() for leaf in sources)))):
            rows = some.view(-1, 1, *last.shape[1:]).expand(-1, *last.shape)
            found: Any = torch.autograd.grad(
                last, sources, rows, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
            for place, gradient in enumerate(found):
                t, k = divmod(place, len(places))
                if gradient is not None:
                    sums[places[k]][t] += gradient.flatten(2).double().square().sum((0, 2))
        of_states = {self.states[k]: (total / (size * scale)).sqrt().to(last.dtype) for k, total in sums.items()}
        return {name: self._over_time(list(norms)) for name, norms in of_states.items()}


@contextmanager
def _returning(codes: dict[CodeType, Any]) -> Generator[list[tuple[Any, dict[str, Any]]]]:
    """Note, of each call of one of the functions inside the block, the local variables as they are when it returns."""
    frames: list[tuple[Any, dict[str, Any]]] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "return" and frame.f_code in codes:
            frames.append((codes[frame.f_code], dict(frame.f_locals)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield frames
    finally:
        sys.setprofile(before)


# Of the built-in cells' steps: whose variables are gates.
_BUILT_IN = {cell.step.__code__: cell for cell in CELLS}


def _codes(cell: Any) -> dict[CodeType, Any]:
    """The functions whose variables are of interest: the cell's forward, those of the modules in it that are not
    torch's, and the built-in cells' steps. With each the modules that it belongs to, by name."""
    codes: dict[CodeType, Any] = dict(_BUILT_IN)
    function = getattr(cell, "function", cell)
    if not isinstance(function, torch.nn.Module):
        code = getattr(function, "__code__", None) or getattr(function.__call__, "__code__", None)
        return codes if code is None else {**codes, code: {}}
    for name, module in cell.named_modules():
        code = getattr(getattr(type(module), "forward", None), "__code__", None)
        if code is not None and not type(module).__module__.startswith(("torch.", "tidegate.nn")):
            codes.setdefault(code, {})[id(module)] = f"{name}." if name else ""
    return codes


def _held(frames: list[tuple[Any, dict[str, Any]]]) -> Named:
    """The tensors by name; a name that comes again gets a number."""
    held: Named = {}
    for owner, variables in frames:
        built_in = not isinstance(owner, dict)
        prefix = "" if built_in else owner.get(id(variables.get("self")), "")
        for name, value in variables.items():
            if built_in and name not in owner.gates:
                continue
            if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter) or name.startswith("_"):
                continue
            key, count = prefix + name, 1
            while key in held:
                count += 1
                key = f"{prefix}{name} ({count})"
            held[key] = value
    return held


@torch.no_grad()
def _names_of_rows(cell: Any, codes: dict[CodeType, Any], inputs: Nest, state: Nest, noise: Nest | None) -> set[str]:
    """The variables that hold a row for each row of the batch: of a batch with every row twice, twice as many."""
    given = (over_time.at(0, inputs), state, *([] if noise is None else [over_time.at(0, noise)]))
    buffers = {buffer: buffer.clone() for buffer in cell.buffers()} if isinstance(cell, torch.nn.Module) else {}
    shapes: list[dict[str, tuple[int, ...]]] = []
    for twice in (False, True):
        rows = over_time.mapped(lambda leaf: torch.cat((leaf, leaf)), given) if twice else given
        with torch.random.fork_rng(devices=[]), _returning(codes) as frames, backend("reference"):
            cell(*rows)
        shapes.append({name: tuple(tensor.shape) for name, tensor in _held(frames).items() if tensor.dim()})
    for buffer, before in buffers.items():
        buffer.copy_(before)
    once, both = shapes
    return {name for name, shape in once.items() if both.get(name) == (2 * shape[0], *shape[1:])}


def _names_of_states(state: Nest, values: Named) -> list[str]:
    """Of each tensor of a state the variable that holds it, else its place."""
    names = {id(tensor): name for name, tensor in values.items()}
    paths = pytree.tree_flatten_with_path(state)[0]
    return [names.get(id(leaf), f"state{pytree.keystr(path)}") for path, leaf in paths]


def _device(layer: Layer) -> torch.device:
    return layer.input.device


def _zeroed(rows: Tensor, leaf: Tensor) -> Tensor:
    return leaf.masked_fill(rows.view(-1, *(1,) * (leaf.dim() - 1)), 0)


def _chosen(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *(1,) * (new.dim() - 1)), new, old)
