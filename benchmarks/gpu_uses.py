# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu.py tries as a user would: modules on a GPU with nothing named, against torch.nn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tidegate as tg

CLOSE = {torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float32: 3e-3}  # of float32 in tf32


def run(device: torch.device) -> dict[str, str]:
    """Each use, and what is wrong with it, or nothing."""
    return {name: _fault(use) for name, use in _uses(device)}


def _fault(use: Callable[[], str | None]) -> str:
    torch.manual_seed(0)
    try:
        return use() or ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _uses(device: torch.device) -> Iterator[tuple[str, Callable[[], str | None]]]:
    for cell in ("GRU", "LSTM", "RNN"):
        for dtype in (torch.bfloat16, torch.float32):
            yield (
                f"{cell} {dtype}, two layers, both directions, trained",
                lambda c=cell, d=dtype: _trained(c, d, device),
            )
    yield "PackedSequence", lambda: _packed(device)
    yield "lengths and resets, on the device", lambda: _marked(device)
    yield "autocast", lambda: _autocast(device)
    for cell in ("GRU", "LSTM", "RNN"):
        yield f"{cell}, a gradient of a gradient", lambda c=cell: _twice(device, c)
        yield f"{cell}, a gradient of a gradient of packed rows", lambda c=cell: _twice(device, c, packed=True)
    yield "torch.compile, training", lambda: _compiled(device)
    yield "two streams at once", lambda: _streams(device)
    yield "a stream, step by step", lambda: _stepped(device)
    yield "NaN in one row", lambda: _nan(device)
    yield "which backend runs", lambda: _chosen(device)


def _pair(cell: str, *sizes: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    theirs = getattr(torch.nn, cell)(*sizes, **options).to(device, dtype)
    ours = getattr(tg, cell)(*sizes, **options).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _apart(ours: Any, theirs: Any, dtype: torch.dtype) -> str | None:
    """Where two lists of tensors differ by more than their dtype explains."""
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = b.float().abs().max().clamp(min=1)
        worst = float((a.detach().float() - b.detach().float()).abs().max() / scale)
        if not worst < CLOSE[dtype]:
            return f"result {k} differs by {worst:.1e}"
    return None


def _step(module: Any, x: torch.Tensor, **form: Any) -> list[torch.Tensor]:
    """Outputs, final states and all gradients of one training step."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    output, finals = module(x, **form)
    finals = finals if isinstance(finals, tuple) else (finals,)
    sum(t.float().square().mean() for t in (output, *finals)).backward()
    return [output, *finals, x.grad, *(p.grad for p in module.parameters())]


def _trained(cell: str, dtype: torch.dtype, device: torch.device) -> str | None:
    theirs, ours = _pair(cell, 40, 200, 2, device=device, dtype=dtype, bidirectional=True)
    x = torch.randn(50, 20, 40, device=device, dtype=dtype)
    return _apart(_step(ours, x), _step(theirs, x), dtype)


def _packed(device: torch.device) -> str | None:
    theirs, ours = _pair("LSTM", 40, 256, device=device)
    x, lengths = torch.randn(50, 8, 40, device=device, dtype=torch.bfloat16), torch.tensor([50, 3, 20, 1, 7, 50, 9, 33])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    a, b = (pad_packed_sequence(module(packed)[0])[0] for module in (ours, theirs))
    return _apart([a], [b], torch.bfloat16)


def _marked(device: torch.device) -> str | None:
    """Against each row by itself, cut where it is reset."""
    _, ours = _pair("GRU", 40, 256, device=device)
    x = torch.randn(50, 3, 40, device=device, dtype=torch.bfloat16)
    resets = torch.zeros(50, 3, dtype=torch.bool, device=device)
    resets[20] = True
    lengths = torch.tensor([50, 30, 25], device=device)
    found = ours(x, lengths=lengths, resets=resets)[0]
    rows = []
    for row, length in enumerate(lengths.tolist()):
        parts = [ours(x[a:b, row : row + 1])[0] for a, b in ((0, 20), (20, length))]
        rows.append(torch.nn.functional.pad(torch.cat(parts), (0, 0, 0, 0, 0, 50 - length)))
    return _apart([found], [torch.cat(rows, 1)], torch.bfloat16)


def _autocast(device: torch.device) -> str | None:
    theirs, ours = _pair("LSTM", 40, 256, device=device, dtype=torch.float32)
    x = torch.randn(50, 16, 40, device=device)
    with torch.autocast("cuda", torch.bfloat16):
        a, b = ours(x)[0], theirs(x)[0]
    if a.dtype is not torch.bfloat16:
        return f"asked for bfloat16, got {a.dtype}"
    return _apart([a], [b], torch.bfloat16)  # torch's comes in float16, whatever autocast asks for


def _twice(device: torch.device, cell: str, packed: bool = False) -> str | None:
    """A gradient of a gradient, which cuDNN has not, and gradients that come batched."""
    _, ours = _pair(cell, 8, 64, 2, device=device, dtype=torch.float32, bidirectional=True)
    lengths = torch.tensor([20, 3, 20, 7]) if packed else None
    x = torch.randn(20, 4, 8, device=device, requires_grad=True)
    wanted = [x, *ours.parameters()]
    found: list[list[torch.Tensor]] = []
    for name in (None, "reference"):
        with tg.backend(name):
            grads = torch.autograd.grad(ours(x, lengths=lengths)[0].square().sum(), wanted, create_graph=True)
            second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted)
            output = ours(x, lengths=lengths)[0]
            seeds = torch.stack([torch.zeros_like(output), torch.ones_like(output)])
            batched = torch.autograd.grad(output, wanted, seeds, is_grads_batched=True)
            found.append([grad.detach() for grad in (*grads, *second, *batched)])
    return _apart(*found, torch.float32)


def _compiled(device: torch.device) -> str | None:
    _, ours = _pair("GRU", 40, 256, 2, device=device)
    x = torch.randn(50, 16, 40, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(ours, fullgraph=True)
    return _apart(_step(compiled, x), _step(ours, x), torch.bfloat16)


def _streams(device: torch.device) -> str | None:
    """Each launch's programs wait for each other: two launches at once must not wait for ever."""
    modules = [_pair("GRU", 64, 512, device=device)[1] for _ in range(2)]
    x = torch.randn(200, 64, 64, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = [module(x)[0] for module in modules]
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in modules], []
        for _ in range(10):
            found = []
            for module, stream in zip(modules, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(module(x)[0])
        torch.cuda.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return None if same else "the results differ"


def _stepped(device: torch.device) -> str | None:
    _, ours = _pair("LSTM", 40, 256, device=device)
    x = torch.randn(20, 4, 40, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        stream = ours.stream(batch_size=4)
        steps = torch.stack([stream.step(frame) for frame in x])
        return _apart([steps], [ours(x)[0]], torch.bfloat16)


def _nan(device: torch.device) -> str | None:
    _, ours = _pair("GRU", 40, 256, device=device)
    x = torch.randn(30, 20, 40, device=device, dtype=torch.bfloat16)
    clean = ours(x)[0]
    x[10, 7] = float("nan")
    spoilt = ours(x)[0]
    others = [row for row in range(20) if row != 7]
    if not torch.equal(spoilt[:, others], clean[:, others]):
        return "it reaches other rows"
    return None if spoilt[10:, 7].isnan().all() and not spoilt[:10, 7].isnan().any() else "it is lost"


def _chosen(device: torch.device) -> str | None:
    for cell, size, dtype, expected in (
        ("GRU", 256, torch.bfloat16, "triton"), ("LSTM", 512, torch.bfloat16, "triton"),
        ("GRU", 256, torch.float32, "triton"), ("GRU", 100, torch.bfloat16, "aten"),
        ("GRU", 64, torch.float32, "aten"), ("LSTM", 256, torch.float16, "aten"),
    ):  # fmt: skip
        module = getattr(tg, cell)(size, size, device=device, dtype=dtype)
        with tg.trace() as ran, torch.no_grad():
            module(torch.randn(64, 16, size, device=device, dtype=dtype))
        if ran[0].backend != expected:
            return f"{cell} {size} {dtype} ran on {ran[0].backend}, not {expected}"
    return None
