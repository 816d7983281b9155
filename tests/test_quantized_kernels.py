# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels with int8 and bfloat16 weights against the rule as `quantization.py` says it, with NaN in every
buffer before it is written.

One step is held against the reference's arithmetic: the integers are the same, so what is left is the rounding of the
pointwise part. Sequences are held against steps, to the bit: a difference in the last place may turn a rounding to an
integer in the next step, so that two right sequences can be a 127th apart.
"""

from __future__ import annotations

from typing import Any

import needs
import pytest
import torch
from calls import VARIANTS
from kernel_cases import make_call
from torch import Tensor

import tidegate as tg
from tidegate import reference
from tidegate.call import Layer
from tidegate.cell import Cell
from tidegate.kernels import cpu
from tidegate.quantization import quantize_rows
from tidegate.storage import STORAGES, scale_of, stored

pytestmark = [needs.compiled_operators, pytest.mark.usefixtures("poisoned_buffers")]

SHAPES = [
    (1, 1, 1, 1), (4, 3, 1, 3), (7, 2, 5, 17), (3, 1, 100, 100), (2, 33, 7, 129), (5, 9, 40, 40), (4, 20, 16, 64),
    (2, 300, 2, 17), (2, 5, 3, 257), (2, 2, 1030, 6),
]  # fmt: skip
# Beside the integers: float32 sums of four terms, sigmoid and tanh within 4 units in the last place, c up to 2.
ROUNDING = {"int8": 2e-6, "bfloat16": 6e-6}  # bfloat16: of up to 1030 float32 terms, seen 4e-6


def quantized(layer: Layer, storage: str) -> Layer:
    cell = stored(layer.cell.name, storage)
    weights: dict[str, Any] = dict.fromkeys(cell.parameters)
    for name, weight in layer.weights.items():
        if weight is None or weight.dim() == 1:
            weights[name] = weight
        elif storage == "int8":
            weights[name], weights[scale_of(name)] = quantize_rows(weight)
        else:
            weights[name] = weight.bfloat16()
    return layer._replace(cell=cell, weights=weights)


def case(variant: str, shape: tuple[int, int, int, int], storage: str, **marks: Any) -> Layer:
    return quantized(make_call(variant, shape, dtype=torch.float32, **marks), storage)


def run(layer: Layer) -> tuple[Tensor, ...]:
    call = layer.call()
    assert cpu.unsupported_reasons(call) == []
    output, *finals = cpu.forward(call)
    return (output, *(final.squeeze(0) for final in finals))


class SteppedCell(Cell):
    def gates_x(self, input: Tensor, weights: Any) -> Tensor:
        return input


def by_steps(layer: Layer) -> tuple[Tensor, ...]:
    """As the kernel runs single steps, in the reference's loop: lengths, resets and direction are the reference's."""

    def step(x: Tensor, states: Any, weights: Any, options: Any) -> tuple[Tensor, ...]:
        return run(Layer(layer.cell, x.unsqueeze(0), states, weights, None, None, False, options))[1:]

    fields = {name: getattr(layer.cell, name) for name in ("name", "gates", "states", "parameters", "options")}
    return reference.forward(layer._replace(cell=SteppedCell(**fields, step=step)))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("isa", needs.ISAS)
def test_a_step_is_the_rule(isa: str, variant: str, storage: str) -> None:
    cpu.operators().use_isa(isa)
    assert cpu.operators().isa() == isa
    for seed, (_, *sizes) in enumerate(SHAPES):
        for bias in (False, True):
            layer = case(variant, (1, *sizes), storage, bias=bias, seed=seed)
            for found, right in zip(run(layer), reference.forward(layer), strict=True):
                torch.testing.assert_close(found, right, rtol=ROUNDING[storage], atol=ROUNDING[storage])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("isa", needs.ISAS)
def test_a_sequence_is_its_steps(isa: str, variant: str, storage: str) -> None:
    cpu.operators().use_isa(isa)
    for seed, shape in enumerate([*SHAPES, (3, 0, 2, 5)]):
        marks = {"lengths": seed % 2 == 0, "resets": seed % 3 != 1, "reverse": seed % 4 > 1}
        layer = case(variant, shape, storage, **marks, batch_first=seed % 2 == 1, seed=seed)
        for found, right in zip(run(layer), by_steps(layer), strict=True):
            assert torch.equal(found, right), (shape, marks)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_at_any_number_of_threads(variant: str, storage: str) -> None:
    threads = torch.get_num_threads()
    layer = case(variant, (30, 3, 128, 256), storage, lengths=True, resets=True)
    results: list[tuple[Tensor, ...]] = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(run(layer))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", needs.ISAS)
def test_every_integer_is_multiplied_rightly(isa: str) -> None:
    """All pairs of a weight from -128 to 127, which torch's quantized modules have, and of what it multiplies."""
    cpu.operators().use_isa(isa)
    numbers = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    weights = numbers.reshape(-1, 1).expand(256, 9).contiguous()
    for k in range(-127, 128):
        x = torch.full((1, 1, 9), 127.0)
        x[..., 1:] = k
        layer = Layer(
            stored("rnn", "int8"), x, (torch.zeros(1, 256),),
            {
                "weight_ih": weights, "weight_hh": torch.zeros(256, 256, dtype=torch.int8), "bias_ih": None,
                "bias_hh": None, "scale_ih": torch.ones(256), "scale_hh": torch.ones(256),
            },
            None, None, False, {"nonlinearity": "relu", "clip": 0.0},
        )  # fmt: skip
        right = (numbers.float() * (127 + 8 * k)).relu()
        assert torch.equal(run(layer)[0].flatten(), right)


@pytest.mark.parametrize("isa", needs.ISAS)
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_in_its_row(isa: str, strange: float) -> None:
    cpu.operators().use_isa(isa)
    layer = case("gru", (1, 5, 33, 17), "int8")
    x = layer.input.clone()
    x[0, 3, 20] = strange
    found, right = run(layer._replace(input=x))[0], run(layer)[0]
    assert bool(found[0, 3].isnan().all())
    rest = [0, 1, 2, 4]
    assert torch.equal(found[0, rest], right[0, rest])


@pytest.mark.parametrize("isa", needs.ISAS)
def test_tiny_and_huge_numbers(isa: str) -> None:
    cpu.operators().use_isa(isa)
    for size in (0.0, 1e-38, 2.0**-101, 2.0**-99, 1e-6, 1e6, 1e30):
        layer = case("rnn-relu", (1, 2, 9, 5), "int8")
        layer = layer._replace(input=layer.input * size)
        for found, right in zip(run(layer), reference.forward(layer), strict=True):
            torch.testing.assert_close(found, right, rtol=ROUNDING["int8"], atol=ROUNDING["int8"])


def test_weights_are_laid_out_once_and_anew_after_a_change() -> None:
    layer = tg.quantize(tg.GRU(5, 7), "int8")
    x = torch.randn(3, 2, 5)
    before = len(cpu._packed_weights)
    first = layer(x)[0]
    assert torch.equal(layer(x)[0], first)
    assert len(cpu._packed_weights) == before + 1
    layer.scale_ih_l0.mul_(2)
    changed = layer(x)[0]
    assert not torch.equal(changed, first)
    layer.scale_ih_l0 = layer.scale_ih_l0 / 2
    assert torch.equal(layer(x)[0], first)
    for isa in needs.ISAS:
        cpu.operators().use_isa(isa)
        torch.testing.assert_close(layer(x)[0], first, rtol=0, atol=0.02)
    del layer
    assert len(cpu._packed_weights) == before
