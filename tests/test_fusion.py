# SPDX-License-Identifier: Apache-2.0
"""Fused cells: what is seen of their changes, forms of a state, and programs."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import pairwise
from typing import Any

import needs
import pytest
import torch
import torch._dynamo.testing
from comparing import assert_equal_f64
from fusing import FEATURES, B, D, Gate, H, T, assert_fused_is_eager, randn, run
from torch import Tensor, nn

import tidegate as tg
from tidegate import dispatch
from tidegate.cells import LayerNormLSTMCell, SLSTMCell
from tidegate.fusion.builder import Builder
from tidegate.fusion.program import Instruction, Program
from tidegate.kernels import cpu
from tidegate.nn import over_time

pytestmark = needs.compiled_operators


def test_what_a_trace_registers_with_the_process_outlives_its_thread(monkeypatch):
    """A build of torch for CUDA without a GPU crashed in the first backward after a trace."""
    registering: list[threading.Thread] = []
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: registering.append(threading.current_thread()))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dispatch.keep_stand_in_for_cuda.cache_clear()
    linear = nn.Linear(H, H, dtype=D)
    assert_fused_is_eager(lambda x, h: torch.tanh(linear(x + h)))
    assert registering[0].daemon
    assert registering[0].is_alive()
    dispatch.keep_stand_in_for_cuda.cache_clear()  # nothing was registered


# Changes of a cell are seen


def test_every_change_of_a_cell_is_seen():
    cell = Gate()
    x, h = randn(T, B, H), randn(B, H)
    changes: list[Any] = [
        lambda: None,
        lambda: setattr(cell, "offset", -1.0),
        lambda: setattr(cell, "scale", 2.0),
        lambda: cell.norm.weight.data.mul_(2),
        lambda: setattr(cell, "mask", torch.ones(H, dtype=D)),
        lambda: setattr(cell.joint, "weight", nn.Parameter(randn(2 * H, 2 * H))),
        lambda: setattr(cell.norm, "eps", 0.5),
        lambda: setattr(cell, "norm", nn.Identity()),
        lambda: setattr(cell, "forward", lambda x, h: torch.tanh(x + h)),
    ]
    seen: list[Tensor] = []
    for change in changes:
        change()
        assert_fused_is_eager(cell, h, x)
        seen.append(run(cell, h, x)[0])
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_what_a_function_reads_is_read_anew():
    weight, factor, layer = nn.Parameter(randn(H, H)), torch.tensor(2.0, dtype=D), nn.Linear(H, H, dtype=D)
    number = 0.5

    def cell(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ weight + layer(h) * factor.item() + number)

    x, h = randn(T, B, H), randn(B, H)
    for change in range(4):
        if change == 1:
            weight.data.mul_(3)
        elif change == 2:
            factor.fill_(-1)
        elif change == 3:
            number = -0.5
        assert_fused_is_eager(cell, h, x)
        gradients = [
            torch.autograd.grad(run(cell, h, x, fuse=fuse)[0].sum(), [weight, *layer.parameters()])
            for fuse in (True, False)
        ]
        for a, b in zip(*gradients, strict=True):
            assert_equal_f64(a, b)


def test_hooks_see_every_step():
    cell, calls = Gate(), []
    cell.norm.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(tg.UnsupportedError, match="has hooks"):
        run(cell)
    run(cell, fuse=None)
    assert len(calls) == T


def test_a_step_that_treats_one_row_in_a_way_of_its_own():
    def cell(x: Tensor, h: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else torch.tanh(x + h)

    assert_fused_is_eager(cell)
    x, h = randn(T, 1, H), randn(1, H)
    found, expected = run(cell, h, x, fuse=None), run(cell, h, x, fuse=False)
    assert torch.equal(found[0], expected[0])


def test_plans_do_not_keep_their_cells():
    cell = Gate()
    run(cell)
    gone = weakref.ref(cell)
    del cell
    gc.collect()
    assert gone() is None


def test_parametrized_and_tied_weights():
    cell = Gate()
    nn.utils.parametrizations.weight_norm(cell.joint)
    assert_fused_is_eager(cell)
    tied = nn.Sequential(nn.Linear(H, H, dtype=D), nn.Linear(H, H, dtype=D))
    tied[1].weight = tied[0].weight

    def step(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(tied[0](x) + tied[1](h))

    assert_fused_is_eager(step)
    a, b = (torch.autograd.grad(run(step, h, x, fuse=f)[0].sum(), tied[0].weight)[0]
            for x, h in [(randn(T, B, H), randn(B, H))] for f in (True, False))  # fmt: skip
    assert_equal_f64(a, b)


def test_functional_call():
    cell, other = Gate(), Gate()
    layer, x = tg.Recurrent(cell), randn(T, B, H)
    h = randn(B, H)
    found = torch.func.functional_call(layer, dict(tg.Recurrent(other).named_parameters()), (x, h))
    other.mask = cell.mask
    assert_equal_f64(found[0], tg.Recurrent(other)(x, h)[0])


# Forms of a state


@pytest.mark.parametrize("shape", [(H,), (2, 4), (2, 2, 2), ()], ids=str)
def test_states_of_any_shape(shape):
    def cell(x: Tensor, state: dict[str, Any]) -> tuple[Any, Any]:
        m, (s,) = state["m"], state["s"]
        m = torch.tanh(0.5 * m + x.mean(-1).view(-1, *(1,) * len(shape)))
        s = s * 0.5 + x
        return {"y": s, "positive": s > 0}, {"m": m, "s": (s,)}

    state = {"m": randn(B, *shape), "s": (randn(B, H),)}
    x = randn(T, B, H)
    lengths = torch.tensor([T, 0, 2])
    found, expected = (over_time.run(cell, x, state, lengths, fuse=fuse) for fuse in (True, False))
    leaves = [torch.utils._pytree.tree_leaves(result) for result in (found, expected)]
    for a, b in zip(*leaves, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_products_after_the_loop_see_rows_past_the_end_as_zero():
    head = nn.Linear(H, 5, dtype=D)

    def cell(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x + h)
        return head(h).softmax(-1), h

    x = randn(T, B, H)
    lengths = torch.tensor([0, T, 3])
    x[lengths[2] :, 2] = float("nan")
    assert_fused_is_eager(cell, x=x, lengths=lengths)


# Programs


@pytest.mark.parametrize("isa", needs.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 7, 33, 130])
def test_every_instruction_set_with_poisoned_buffers(isa, dtype, size):
    cell, threads = SLSTMCell(5, size).to(dtype), torch.get_num_threads()
    x, operators = torch.randn(4, 9, 5, dtype=dtype), cpu.operators()
    state = tuple(torch.zeros(9, size, dtype=dtype) for _ in range(4))
    lengths = torch.tensor([4, 0, 1, 3, 4, 2, 4, 1, 4])
    expected = over_time.run(cell, x, state, lengths, fuse=False)
    operators.use_isa(isa)
    operators.poison_buffers(True)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = over_time.run(cell, x, state, lengths, fuse=True)
            torch.testing.assert_close(found, expected)
    finally:
        operators.use_isa("")
        operators.poison_buffers(False)
        torch.set_num_threads(threads)


def test_a_program_reads_as_it_is_written():
    explained = tg.explain(tg.Recurrent(LayerNormLSTMCell(FEATURES, H)), torch.randn(T, B, FEATURES))
    text = str(Program.parse(PROGRAM))
    assert text == PROGRAM
    assert "product m0 s0" in str(explained)


PROGRAM = """\
state s0 2, s1 2
input i0 8
vector p0 2
matrix m0 1x8x2
v0 8 = product m0 s0
v1 8 = add i0 v0
v2 2 = sigmoid v1[0:2]
v3 4 = gather v1 at 7*2,0:2
v4 2 = muladd v2 s1 p0
v5 2 = clamp v4 -0.5 0.5
v6 4 = concat v5 v2
v7 2 = mean v3 groups 2
next v7, v5
output v6
through resets 1"""


@pytest.mark.parametrize("line", ["v0 8 = nonsense s0", "v0 8 = add s0 i7", "state", "v0 x = add s0 s0"])
def test_an_unreadable_program(line):
    with pytest.raises(ValueError, match=f"program: cannot read the line '{line}'"):
        Program.parse(f"state s0 8\n{line}\nnext s0\noutput s0")


def test_numbers_that_are_no_program_are_refused():
    """Whatever is put in their place, nothing is read beyond its memory."""
    from tidegate.fusion.encode import encode

    code, constants = encode(PROGRAM, torch.float32)
    given = ([torch.zeros(2, 1, 8)], [torch.zeros(1, 2)] * 2, [torch.zeros(2)], [torch.zeros(1, 8, 2)])
    run_program = cpu.operators().run_program
    run_program(code, constants, *given, None, None, 2, 1, False)
    refused = 0
    for k in range(len(code)):
        for value in (-1, 1, 7, 1 << 20, 1 << 62):
            changed = code.clone()
            changed[k] = value
            try:
                run_program(changed, constants, *given, None, None, 2, 1, False)
            except (RuntimeError, ValueError):
                refused += 1
    assert refused > len(code)


def test_what_is_written_in_fewer_instructions():
    b = Builder()
    x = b.declare("i", 6)
    means = b.reduce("mean", x, 2)
    copies = b.emit("copy", means, size=6, groups=2)
    assert b.emit("add", x, copies) == b.emit("add", x, means, size=6, groups=2)  # read where they are
    assert b.reduce("sum", b.emit("neg", x), 2) == b.emit("neg", b.reduce("sum", x, 2))
    assert b.reduce("sum", b.emit("mul", x, x), 1) == b.add(Instruction("dot", 1, (x, x)))
    # A number for each of three pairs and one for each of two triples cannot be read at once.
    pairs = b.emit("copy", b.reduce("max", x, 3), size=6, groups=3)
    mixed = b.instructions[b.emit("mul", means, pairs, size=6, groups=2).number]
    assert mixed.operands == (means, pairs)
