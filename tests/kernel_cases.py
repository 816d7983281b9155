# SPDX-License-Identifier: Apache-2.0
"""Calls for a backend with kernels of its own, and what they should give: the reference in float64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import calls
import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate import reference
from tidegate.backends import CPU, Backend, run_layer, run_layer_backward, saved_shape
from tidegate.call import Layer
from tidegate.cell import Options, States, Weights

# An error may exceed twice that of the reference in the same dtype by this much of the largest value. bfloat16: the
# gates that the backward reads are stored in it, where the reference keeps float32. float16 is three bits finer.
FLOORS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def make_call(
    variant: str,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float64,
    lengths: bool = False,
    resets: bool = False,
    reverse: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    seed: int = 0,
) -> Layer:
    """A call of (T, B, I, H), its weights as large as trained ones; what no valid step reads of the input is NaN."""
    steps, batch, input_size, hidden_size = shape
    call = calls.make_call(
        variant, steps, batch, input_size, hidden_size,
        bias=bias, lengths=lengths, resets=resets, reverse=reverse, seed=seed,
    )  # fmt: skip
    scale = 2 * hidden_size**-0.5
    input = call.input * 2
    if batch_first:
        input = input.transpose(0, 1).contiguous().transpose(0, 1)
    if call.lengths is not None:
        input[torch.arange(steps).unsqueeze(1) >= call.lengths] = torch.nan
    weights = {name: None if weight is None else weight * scale for name, weight in call.weights.items()}
    return call._replace(input=input, states=tuple(state * 2 for state in call.states), weights=weights).to(dtype)


def cases(shape: tuple[int, int, int, int], variant: str, dtype: torch.dtype) -> Iterator[Layer]:
    """Every combination of lengths, resets and direction; biases and strides vary along."""
    for i, (lengths, resets, reverse) in enumerate(itertools.product((False, True), repeat=3)):
        yield make_call(
            variant, shape, dtype=dtype, lengths=lengths, resets=resets, reverse=reverse,
            bias=i % 3 != 1, batch_first=i % 2 == 1, seed=i,
        )  # fmt: skip


def grads_for(call: Layer) -> tuple[Tensor, ...]:
    """Gradients that arrive at the output and the final states."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((call.input.shape[0], *call.states[0].shape), *(state.shape for state in call.states))
    drawn = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    return tuple(grad.to(call.input.device, call.input.dtype) for grad in drawn)


def expected(call: Layer, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Output, final states and the gradients of `Call.tensors` by the reference, in the call's own dtype."""
    call = call._replace(
        input=call.input.detach().requires_grad_(),
        states=tuple(state.detach().requires_grad_() for state in call.states),
        weights={k: None if w is None else w.detach().requires_grad_() for k, w in call.weights.items()},
    )
    outputs = reference.forward(call)
    wanted = [tensor for tensor in call.tensors if tensor is not None]
    recorded = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    heads, arriving = zip(*recorded, strict=True)
    got = iter(torch.autograd.grad(heads, wanted, arriving, allow_unused=True, materialize_grads=True))
    return (*(o.detach() for o in outputs), *(None if t is None else next(got) for t in call.tensors))


def on_the_kink_side_of(output: Tensor, call: Layer) -> Layer:
    """`call`, an RNN's with relu, with relu's slope 1 where `output` is positive and 0 elsewhere.

    The slope jumps at 0. A product of bfloat16 h leaves some pre-activations on its other side than one of float32 h;
    both gradients are right to the precision of the output, and differ by all that flows through the unit.
    """
    assert call.options["nonlinearity"] == "relu"
    slopes = iter((output.flip(0) if call.reverse else output) > 0)

    def step(gates_x: Tensor, states: States, weights: Weights, options: Options) -> States:
        (h,) = states
        return ((gates_x + linear(h, weights["weight_hh"], weights["bias_hh"])) * next(slopes),)

    return call._replace(cell=dataclasses.replace(call.cell, step=step))


def forward(call: Layer, save: bool, backend: Backend = CPU) -> tuple[Tensor, ...]:
    return run_layer(backend, call, save)


def backward(
    call: Layer, output: Tensor, saved: Tensor, grads: tuple[Tensor | None, ...], needs: tuple[bool, ...],
    backend: Backend = CPU,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return run_layer_backward(backend, call, output, saved, grads, needs)


def computed(call: Layer, grads: tuple[Tensor, ...], backend: Backend = CPU) -> tuple[Tensor | None, ...]:
    """The same by a backend."""
    *outputs, saved = forward(call, True, backend)
    assert saved.shape == saved_shape(backend, call)
    needs = tuple(tensor is not None for tensor in call.tensors)
    return (*outputs, *backward(call, outputs[0], saved, grads, needs, backend))


def names(call: Layer) -> list[str]:
    finals = [f"{state}_n" for state in call.cell.states]
    return ["output", *finals, "dinput", *(f"d{s}_0" for s in call.cell.states), *(f"d{w}" for w in call.weights)]


def assert_right(call: Layer, values: tuple[Tensor | None, ...] | None = None, backend: Backend = CPU) -> None:
    """Every output and gradient of `call` is as good as the reference in its dtype, measured against float64."""
    grads = grads_for(call)
    values = computed(call, grads, backend) if values is None else values
    exact = expected(call.to(torch.float64), tuple(grad.double() for grad in grads))
    same_dtype = exact if call.input.dtype == torch.float64 else expected(call, grads)
    if call.input.dtype == torch.bfloat16 and call.options.get("nonlinearity") == "relu":
        assert values[0] is not None
        sided, outputs = on_the_kink_side_of(values[0], call), len(grads)
        exact = exact[:outputs] + expected(sided.to(torch.float64), tuple(grad.double() for grad in grads))[outputs:]
        sided = on_the_kink_side_of(values[0], call)
        same_dtype = same_dtype[:outputs] + expected(sided, grads)[outputs:]
    for name, value, good, right in zip(names(call), values, same_dtype, exact, strict=True):
        if right is None:
            assert value is None, name
            continue
        assert value is not None, name
        assert value.dtype == call.input.dtype, name
        assert value.shape == right.shape, name
        if right.numel() == 0:
            continue
        error, allowed = (value.double() - right).abs().max(), 2 * (good.double() - right).abs().max()
        floor = FLOORS[call.input.dtype] * max(1.0, right.abs().max().item())
        assert error <= allowed + floor, f"{name}: error {error:.2e}, allowed {allowed + floor:.2e}"
