# SPDX-License-Identifier: Apache-2.0
"""The registered operator that runs a program over a sequence, and its gradients: the same operator on another program.

`torch.ops.tidegate.loop(program, inputs, states, vectors, matrices, lengths, resets, reverse) -> outputs, final states`
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tidegate import dispatch
from tidegate.fusion.program import Program
from tidegate.kernels import cpu

if TYPE_CHECKING:
    from tidegate.fusion.derive import Backward, MatrixGradient, Wanted

_LIBRARY = torch.library.Library("tidegate", "FRAGMENT")
_LIBRARY.define(
    "loop(str program, Tensor[] inputs, Tensor[] states, Tensor[] vectors, Tensor[] matrices, Tensor? lengths, "
    "Tensor? resets, SymInt steps, SymInt batch, bool reverse) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator: Any = torch.ops.tidegate.loop.default


class _Tensors:
    """The tensors of a call, one after another, and how many there are of each kind."""

    def __init__(self, program: Program) -> None:
        counts = (len(program.inputs), len(program.states), len(program.vectors), len(program.matrices))
        self.ends = [sum(counts[: k + 1]) for k in range(4)]

    def split(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        a, b, c, d = self.ends
        return list(tensors[:a]), list(tensors[a:b]), list(tensors[b:c]), list(tensors[c:d])


@cache
def _tensors_of(text: str) -> _Tensors:
    return _Tensors(Program.parse(text))


class Looped(NamedTuple):
    """A program as the operator takes it, and the same with what its backward needs among its outputs.

    Attributes:
        text, kept: readable forms.
        outputs, kept_outputs: how many outputs each has.
    """

    text: str
    kept: str
    outputs: int
    kept_outputs: int

    @staticmethod
    def of(program: Program) -> Looped:
        from tidegate.fusion.kept import keeping

        keeps = keeping(program)
        return Looped(str(program), str(keeps), len(program.outputs), len(keeps.outputs))


class Owned(NamedTuple):
    """What a call may write over, because nobody else reads it.

    Attributes:
        inputs: of each input, whether it is.
        outputs: how many outputs are returned to the caller; the others are.
    """

    inputs: tuple[bool, ...]
    outputs: int


def run(
    program: Looped,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    vectors: Sequence[Tensor],
    matrices: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    steps: int,
    batch: int,
    reverse: bool,
    fresh: tuple[bool, ...] = (),
) -> list[Tensor]:
    """The operator, recorded if need be with what its backward needs as further outputs, which are not returned.

    Args:
        fresh: of each input, whether nobody else reads it; none for nowhere.
        inputs: (T, B, n) each.
        states: (B, n).
        vectors, matrices: (n) and (blocks, rows, columns).
        lengths, resets: as in `Call`.

    Returns:
        outputs (T, B, n), 0 past each row's length; final states (B, n).
    """
    tensors = [*inputs, *states, *vectors, *matrices]
    records = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])  # noqa: C419  (the compiler knows no generators)
    text = program.kept if records else program.text
    kinds = (list(inputs), list(states), list(vectors), list(matrices))
    if not dispatch.is_plain():
        results = torch.ops.tidegate.loop.default(text, *kinds, lengths, resets, steps, batch, reverse)
    elif records:
        owned = Owned(fresh or (False,) * len(inputs), program.outputs)
        results = dispatch.apply_plain(_Loop, text, (lengths, resets, steps, batch, reverse), owned, *tensors)
    else:
        results = _run(text, *kinds, lengths, resets, steps, batch, reverse)
    if records:
        return [*results[: program.outputs], *results[program.kept_outputs :]]
    return results


def evaluate(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    vectors: Sequence[Tensor],
    matrices: Sequence[Tensor],
    reverse: bool = False,
) -> list[Tensor]:
    """The outputs (T, m) of a program over a sequence of one row, inputs (T, n) each, without gradients."""
    from tidegate.fusion.interpret import interpret

    sequences = [x.unsqueeze(1) for x in inputs]
    given = (sequences, list(states), list(vectors), list(matrices), None, None, inputs[0].shape[0], 1, reverse)
    # A program without a state says nothing of its dtype to the operator.
    found = interpret(program, *given) if cpu.availability() or not states else _run(str(program), *given)
    return [output.squeeze(1) for output in found[: len(program.outputs)]]


@cache
def _looped(text: str) -> Looped:
    return Looped.of(Program.parse(text))


def _run(
    program: str,
    inputs: list[Tensor],
    states: list[Tensor],
    vectors: list[Tensor],
    matrices: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    steps: int,
    batch: int,
    reverse: bool,
    is_free: tuple[bool, ...] = (),
) -> list[Tensor]:
    """As the operator, its outputs in the memory of inputs that are free, where they fit."""
    if steps == 0 or batch == 0:
        known = Program.parse(program)
        outputs = [states[0].new_zeros((steps, batch, output.size)) for output in known.outputs]
        return [*outputs, *(state.clone() for state in states)]
    from tidegate.fusion.encode import encode

    code, constants = encode(program, states[0].dtype)
    lengths = None if lengths is None else lengths.cpu()
    over: tuple[int, ...] = ()
    if any(is_free):
        from tidegate.fusion.kept import places_over

        over = places_over(program, tuple(map(_can_be_written, inputs, is_free)))
    run = cpu.operators().run_program.default
    results = run(code, constants, inputs, states, vectors, matrices, lengths, resets, steps, batch, reverse, over)
    # To autograd an output is no input, though it has its memory.
    return [result.detach() for result in results] if over else results


def _can_be_written(tensor: Tensor, is_free: bool) -> bool:
    return is_free and tensor.is_contiguous()


def _shapes(
    program: str, inputs: list[Tensor], states: list[Tensor], vectors: Any, matrices: Any, *rest: Any
) -> list[Tensor]:
    known = Program.parse(program)
    steps, batch = rest[2], rest[3]
    outputs = [states[0].new_empty((steps, batch, output.size)) for output in known.outputs]
    return [*outputs, *(states[0].new_empty((batch, size)) for size in known.states)]


def _autograd(program: str, inputs: Any, states: Any, vectors: Any, matrices: Any, *rest: Any) -> list[Tensor]:
    tensors = (*inputs, *states, *vectors, *matrices)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(dispatch.apply(_Loop, program, rest, None, *tensors))
    if dispatch.is_plain():
        return _run(program, inputs, states, vectors, matrices, *rest)
    return dispatch.below_autograd(_operator, program, inputs, states, vectors, matrices, *rest)


class _Loop(torch.autograd.Function):
    """`apply(program, (lengths, resets, steps, batch, reverse), owned, *tensors)`: a program that keeps what it needs.

    Its backward writes gradients over what was kept, and over inputs that are its own, unless somebody may look at
    these again: the graph is kept or differentiated, or hooks see what is saved.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, program: str, rest: tuple[Any, ...], owned: Owned | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        from tidegate.fusion.derive import derive

        known = Program.parse(program)
        kinds, ends = _tensors_of(program).split(tensors), _tensors_of(program).ends
        ctx.needs = ctx.needs_input_grad[3:]
        # Saved is only what the backward reads.
        back = derive(program, _wanted(program, ctx.needs, (True,) * len(known.outputs)))
        if dispatch.is_plain():
            free = () if owned is None else tuple([f and k not in back.inputs for k, f in enumerate(owned.inputs)])
            results = _run(program, *kinds, *rest, is_free=free)
        else:
            results = dispatch.below_autograd(_operator, program, *kinds, *rest)
        ctx.program, ctx.rest = program, rest[2:]
        ctx.owned = None if dispatch.has_saved_tensor_hooks() else owned
        ctx.is_used_up = False
        read = [tensor if k >= ends[1] or k in back.inputs else None for k, tensor in enumerate(tensors)]
        kept = [result if k in back.kept else None for k, result in enumerate(results[: len(known.outputs)])]
        ctx.save_for_backward(*read, *rest[:2], *kept)
        ctx.like = results[-1].new_empty(0)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.is_used_up:
            raise RuntimeError(dispatch.USED_UP)
        saved, count = ctx.saved_tensors, len(ctx.needs)
        tensors, lengths, resets, outputs = saved[:count], saved[count], saved[count + 1], saved[count + 2 :]
        found = _gradients(ctx, tensors, lengths, resets, outputs, gradients)
        return (None, None, None, *found)


def _wanted(program: str, needs: Sequence[bool], of_outputs: tuple[bool, ...]) -> Wanted:
    from tidegate.fusion.derive import Wanted

    inputs, _, vectors, matrices = _tensors_of(program).split(needs)
    return Wanted(tuple(inputs), tuple(vectors), tuple(matrices), of_outputs)


def _gradients(
    ctx: Any,
    tensors: Sequence[Any],
    lengths: Tensor | None,
    resets: Tensor | None,
    outputs: Sequence[Any],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of a call's tensors: a run of the program's backward, then the matrices' products."""
    # Imported where they are used: with them, importing tidegate would take a fifth longer.
    from tidegate.fusion.derive import derive
    from tidegate.fusion.interpret import interpret

    program, needs, like = Program.parse(ctx.program), ctx.needs, ctx.like
    steps, batch, reverse = ctx.rest
    split = _tensors_of(ctx.program).split
    inputs, _, vectors, matrices = split(tensors)
    need_inputs, need_states, need_vectors, need_matrices = split(needs)
    count = len(program.outputs)
    of_outputs = gradients[:count]
    back = derive(ctx.program, _wanted(ctx.program, needs, tuple([gradient is not None for gradient in of_outputs])))
    final = [
        like.new_zeros((batch, size)) if gradient is None else gradient
        for size, gradient in zip(program.states, gradients[count:], strict=True)
    ]
    sums = [like.new_zeros((batch, program.vectors[k])) for k in back.vector_gradients]
    read = [inputs[k] for k in back.inputs] + [outputs[k] for k in back.kept]
    read += [gradient for gradient in of_outputs if gradient is not None]
    # The state that enters a row's first step is not cut on the way back into it; what a reset there cuts is below.
    marks = resets
    if resets is not None and reverse:
        marks = torch.cat([torch.zeros_like(resets[:1]), resets[1:]])
    given = (read, [*final, *sums], vectors, matrices, lengths, marks, steps, batch, not reverse)
    if dispatch.is_batched():
        found = interpret(back.program, *given)
    elif ctx.owned is None or torch.is_grad_enabled() or dispatch.keeps_graph() or not dispatch.is_plain():
        found = run(_looped(back.text), *given)
    else:
        ctx.is_used_up = True
        found = _run(back.text, *given, _free(back, ctx.owned, len(read)))
    made, ended = found[: len(back.program.outputs)], found[len(back.program.outputs) :]
    of_states = ended[: len(program.states)]
    if resets is not None and not reverse:
        cut = resets[0].unsqueeze(-1)
        if lengths is not None:
            cut = cut & (lengths.to(cut.device) > 0).unsqueeze(-1)
        cuttable = len(program.states) - program.through_resets
        of_states = [g.masked_fill(cut, 0) if k < cuttable else g for k, g in enumerate(of_states)]
    result: list[Tensor | None] = []
    places = iter(back.input_gradients)
    for size, need in zip(program.inputs, need_inputs, strict=True):
        place = next(places) if need else -1
        result.append(None if not need else like.new_zeros((steps, batch, size)) if place < 0 else made[place])
    result += [gradient if need else None for gradient, need in zip(of_states, need_states, strict=True)]
    of_vectors = dict(zip(back.vector_gradients, (total.sum(0) for total in ended[len(program.states) :]), strict=True))
    for k, (vector, need) in enumerate(zip(vectors, need_vectors, strict=True)):
        result.append(of_vectors.get(k, torch.zeros_like(vector)) if need else None)
    for k, (matrix, need) in enumerate(zip(matrices, need_matrices, strict=True)):
        result.append(_matrix_gradient(back, k, matrix, made, outputs) if need else None)
    return result


def _free(back: Backward, owned: Owned, count: int) -> tuple[bool, ...]:
    """Of each input of the backward, whether what it gives may be written over it."""
    read_later = {part.multiplied for part in back.matrix_gradients if part.is_kept}
    free = [owned.inputs[k] for k in back.inputs]
    free += [k >= owned.outputs and k not in read_later for k in back.kept]
    return (*free, *(False,) * (count - len(free)))


def _matrix_gradient(back: Backward, k: int, matrix: Tensor, made: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
    parts = [_outer(part, matrix, made, kept) for part in back.matrix_gradients if part.matrix == k]
    total = parts[0] if parts else torch.zeros_like(matrix)
    for part in parts[1:]:
        total = total + part
    return total


def _outer(part: MatrixGradient, matrix: Tensor, made: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
    """The sum over all steps of gradient times multiplied: (blocks, rows, columns)."""
    blocks, rows, columns = matrix.shape
    gradient, multiplied = made[part.gradient], (kept if part.is_kept else made)[part.multiplied]
    left, right = (multiplied, gradient) if part.transposed else (gradient, multiplied)
    if blocks == 1:
        return (left.reshape(-1, rows).T @ right.reshape(-1, columns)).unsqueeze(0)
    return torch.einsum("nbr,nbc->brc", left.reshape(-1, blocks, rows), right.reshape(-1, blocks, columns))


_LIBRARY.impl(_operator, _run, "CompositeExplicitAutograd")
_LIBRARY.impl(_operator, _autograd, "Autograd")
dispatch.register_fake(_operator, _shapes, _LIBRARY)
