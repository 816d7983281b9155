# SPDX-License-Identifier: Apache-2.0
"""One case run three ways: by tidegate, by torch.nn, by the equations."""

from __future__ import annotations

import random
from typing import Any

import equations
import torch
from drawing import Case, laid_out
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import tidegate as tg


class Problem:
    """The tensors of a case, in float64, so that every dtype begins from the same numbers."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        torch.manual_seed(case.seed)
        self.layer: Any = getattr(tg, case.kind)(**case.options, dtype=case.dtype)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.mul_(case.scale)
        for name, parameter in self.layer.named_parameters():
            parameter.requires_grad_(("biases" if name.startswith("bias") else "weights") in case.needs)
        o, batch = case.options, len(case.lengths)
        self.cells = o["num_layers"] * (1 + o["bidirectional"])
        self.sizes = [o.get("proj_size") or o["hidden_size"], *([o["hidden_size"]] if case.kind == "LSTM" else [])]

        def drawn(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
            return laid_out(values, case.strides)

        self.x = drawn(case.steps, batch, o["input_size"])
        self.states = [drawn(self.cells, batch, size) for size in self.sizes] if case.has_state else []
        width = self.sizes[0] * (1 + o["bidirectional"])
        self.arriving = {"output": drawn(case.steps, batch, width)}
        self.arriving |= {name: drawn(self.cells, batch, size) for name, size in zip("hc", self.sizes, strict=False)}
        self.resets = torch.rand(case.steps, batch, generator=generator) < (0.3 if case.has_resets else 0)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int64)

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        x = self.x.detach().to(dtype).requires_grad_("x" in self.case.needs)
        return x, [s.detach().to(dtype).requires_grad_("states" in self.case.needs) for s in self.states]

    def formed(self, x: Tensor) -> tuple[Any, dict[str, Any]]:
        """x (T, B, I) in the case's form, and what goes beside it."""
        case, batch_first = self.case, self.case.options["batch_first"]
        rows = [x[:n, k] for k, n in enumerate(case.lengths)]
        marks = [self.resets[:n, k] for k, n in enumerate(case.lengths)]
        if case.form.startswith("packed"):
            return pack_padded_sequence(x, self.lengths, enforce_sorted=case.form == "packed sorted"), {}
        if case.form == "nested":
            return torch.nested.as_nested_tensor(rows, layout=torch.jagged), {}
        if case.form == "list":
            return rows, {"resets": marks} if case.has_resets else {}
        if case.form == "unbatched":
            return x.squeeze(1), {"resets": self.resets.squeeze(1)} if case.has_resets else {}
        if case.poisoned and case.has_lengths:
            past = torch.arange(case.steps).unsqueeze(-1) >= self.lengths
            x = x.masked_fill(past.unsqueeze(-1), torch.nan)
        extras: dict[str, Any] = {"lengths": self.lengths} if case.has_lengths else {}
        if case.has_resets:
            extras["resets"] = self.resets.T if batch_first else self.resets
        return x.transpose(0, 1) if batch_first else x, extras

    def cell(self) -> tuple[Any, dict[str, Tensor]]:
        """A cell of the layer's parameters, and these by the layer's names."""
        names = ("input_size", "hidden_size", "bias", "nonlinearity", "reset_after", "proj_size")
        options = {name: value for name, value in self.case.options.items() if name in names}
        cell = getattr(tg, self.case.kind + "Cell")(**options, dtype=self.case.dtype)
        for name, parameter in self.layer.named_parameters():
            setattr(cell, name.removesuffix("_l0"), parameter)
        return cell, dict(self.layer.named_parameters())


def judged(
    problem: Problem, x: Tensor, states: list[Tensor], named: Any, output: Tensor, finals: Any
) -> dict[str, Tensor]:
    """All that is compared of one run; output (T, B, P), finals (L*D, B, size)."""
    case = problem.case
    results = dict(zip(("output", "h", "c"), (output, *finals), strict=False))
    found = {name: result.detach().clone() for name, result in results.items()}
    wanted = {"x": x} | {f"state {k}": s for k, s in enumerate(states)} | dict(named)
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    # With `again` the gradients of the first run are thrown away.
    heads = [(results[name], problem.arriving[name].to(output.dtype)) for name in sorted(case.arrives)]
    heads = [(result, grad) for result, grad in heads if result.requires_grad]
    if heads and wanted:
        for last in (False, True) if case.again else (True,):
            grads = torch.autograd.grad(
                [head for head, _ in heads], list(wanted.values()), [grad for _, grad in heads],
                allow_unused=True, retain_graph=not last,
            )  # fmt: skip
            for (name, tensor), grad in zip(wanted.items(), grads, strict=True):
                found[f"d {name}"] = torch.zeros_like(tensor) if grad is None else grad
    return found


def by_tidegate(problem: Problem) -> dict[str, Tensor]:
    case, layer = problem.case, problem.layer
    x, states = problem.leaves(case.dtype)
    named: Any = layer.named_parameters()
    if case.form == "cell":
        cell, named = problem.cell()
        output, finals = _stepped(case, cell, x, states)
    elif case.form == "stream":
        output, finals = _streamed(problem, x, states)
    else:
        hx = [s.squeeze(1) if case.form == "unbatched" else s for s in states]
        given, extras = problem.formed(x)
        output, finals = layer(given, None if not hx else tuple(hx) if case.kind == "LSTM" else hx[0], **extras)
        finals = finals if isinstance(finals, tuple) else (finals,)
        output, finals = _padded(case, output, finals)
    return judged(problem, x, states, named, output, finals)


def _stepped(case: Case, cell: Any, x: Tensor, states: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A cell's steps, one after another."""
    state: Any = None
    if states:
        state = tuple(s[0] for s in states) if case.kind == "LSTM" else states[0][0]
    outputs: list[Tensor] = []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if case.kind == "LSTM" else state)
    finals = state if case.kind == "LSTM" else (state,)
    return torch.stack(outputs), tuple(final.unsqueeze(0) for final in finals)


def _streamed(problem: Problem, x: Tensor, states: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A stream's steps and chunks, cut at random."""
    case, cuts = problem.case, random.Random(problem.case.seed)
    state = None if not states else tuple(states) if case.kind == "LSTM" else states[0]
    stream = problem.layer.stream(len(case.lengths), state)
    outputs: list[Tensor] = []
    first = 0
    while first < case.steps:
        last = cuts.randint(first + 1, case.steps)
        chunk = x[first:last]
        if case.options["batch_first"] and last > first + 1:
            outputs.append(stream.steps(chunk.transpose(0, 1)).transpose(0, 1))
        else:
            outputs += [stream.step(row).unsqueeze(0) for row in chunk] if cuts.random() < 0.5 else []
            if sum(len(output) for output in outputs) < last:
                chunk = chunk.transpose(0, 1) if case.options["batch_first"] else chunk
                output = stream.steps(chunk)
                outputs.append(output.transpose(0, 1) if case.options["batch_first"] else output)
        first = last
    finals = stream.state if isinstance(stream.state, tuple) else (stream.state,)
    return torch.cat(outputs), finals


def _padded(case: Case, output: Any, finals: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A layer's results as (T, B, P) and (L*D, B, size)."""
    if case.form == "padded":
        return output.transpose(0, 1) if case.options["batch_first"] else output, finals
    if case.form == "unbatched":
        return output.unsqueeze(1), tuple(final.unsqueeze(1) for final in finals)
    if case.form.startswith("packed"):
        return pad_packed_sequence(output, total_length=case.steps)[0], finals
    if case.form == "list":
        return pad_sequence(output), finals
    return torch.nested.to_padded_tensor(output, 0.0).transpose(0, 1), finals


def by_torch(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    case = problem.case
    options = {name: value for name, value in case.options.items() if name not in ("reverse", "reset_after")}
    layer = getattr(torch.nn, case.kind)(**options | {"batch_first": False}, dtype=dtype)
    layer.load_state_dict(problem.layer.state_dict())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(("biases" if name.startswith("bias") else "weights") in case.needs)
    x, states = problem.leaves(dtype)
    hx = None if not states else tuple(states) if case.kind == "LSTM" else states[0]
    data: Any = pack_padded_sequence(x, problem.lengths, enforce_sorted=False) if case.has_lengths else x
    output, finals = layer(data, hx)
    if case.has_lengths:
        output = pad_packed_sequence(output, total_length=case.steps)[0]
    finals = finals if isinstance(finals, tuple) else (finals,)
    return judged(problem, x, states, layer.named_parameters(), output, finals)


def by_equations(problem: Problem, dtype: torch.dtype, rounding: float = 0.0) -> dict[str, Tensor]:
    """With `rounding`, everything that is given is changed by so much of itself, at random."""
    case, options = problem.case, problem.case.options

    def changed(tensor: Tensor) -> Tensor:
        values = tensor.detach().to(dtype)
        if rounding:
            values = values * (1 + rounding * (2 * torch.rand(values.shape, dtype=dtype) - 1))
        return values.requires_grad_(tensor.requires_grad)

    named = {name: changed(parameter) for name, parameter in problem.layer.named_parameters()}
    x, states = problem.leaves(dtype)
    x, states = changed(x), [changed(state) for state in states]
    given = states or [x.new_zeros((problem.cells, x.shape[1], size)) for size in problem.sizes]
    cells: list[equations.Cell] = []
    for layer in range(options["num_layers"]):
        for suffix in ("", "_reverse")[: 1 + options["bidirectional"]]:
            weights = [
                named.get(f"{name}_l{layer}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            relu, reset_after = options.get("nonlinearity") == "relu", options.get("reset_after", True)
            projection = named.get(f"weight_hr_l{layer}{suffix}")
            cells.append(equations.Cell(case.kind, *weights, projection, relu, reset_after))
    output, finals = equations.run(
        cells, x, tuple(given), problem.lengths, problem.resets, options["bidirectional"], options.get("reverse", False)
    )
    return judged(problem, x, states, named, output, finals)
