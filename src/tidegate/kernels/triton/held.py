# SPDX-License-Identifier: Apache-2.0
"""Compiles held.cu at run time and launches it: NVIDIA's compiler and driver, by their own bindings for Python.

Both come with torch's builds for CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidegate import dispatch
from tidegate.call import Layer
from tidegate.kernels.triton import plan

Definitions = tuple[tuple[str, "str | int"], ...]

_CELLS = {"rnn_tanh": "RNN_TANH", "rnn_relu": "RNN_RELU", "lstm": "LSTM", "gru": "GRU"}
_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "TF32"}


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings returns after its status.

    Raises:
        RuntimeError: the status is an error.
    """
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status!r}")
    return values[0] if len(values) == 1 else tuple(values)


class Flags(NamedTuple):
    """What a kernel is compiled for, beside its sizes; held.cu has each in capitals."""

    kept: int
    skip: int
    has_bias: bool
    has_lengths: bool
    has_resets: bool
    reverse: bool


def definitions(size: plan.Size, config: plan.Config, flags: Flags) -> Definitions:
    """What held.cu is compiled with."""
    return (
        ("CELL", _CELLS[size.kind]), ("DTYPE", _DTYPES[size.dtype]), ("H", size.hidden_size), ("UNITS", config.block_n),
        ("TILES", config.block_b // 16), ("WARPS", config.num_warps), ("SPINS", plan.SPINS),
        *((name.upper(), int(value)) for name, value in flags._asdict().items()),
    )  # fmt: skip


@functools.cache
def compiled(definitions: Definitions, capability: tuple[int, int]) -> bytes:
    from cuda.bindings import nvrtc  # pyright: ignore

    source = (Path(__file__).parent / "held.cu").read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, b"held.cu", 0, [], []))
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode()]
    options += [f"-D{name}={value}".encode() for name, value in definitions]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status[0]) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"held.cu was not compiled: {log.decode(errors='replace')}")
    binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary


@functools.cache
def _loaded(name: str, definitions: Definitions, shared: int, device: int) -> Any:
    """A kernel in the context of a device, the current one, that may take so many bytes of shared memory."""
    from cuda.bindings import driver  # pyright: ignore

    module = _checked(driver.cuModuleLoadData(compiled(definitions, torch.cuda.get_device_capability(device))))
    function = _checked(driver.cuModuleGetFunction(module, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, attribute, shared))
    return function


@functools.lru_cache(maxsize=1024)
def _kernel(name: str, size: plan.Size, config: plan.Config, flags: Flags, device: int) -> tuple[Any, ...]:
    """The function, of name "forward" or "backward", and what it is launched with: grid, block, shared memory."""
    # The shares of the sums, two buffers in turns; rows as held.cu's STRIDE has them.
    sums = size.gates if name == "forward" else 1
    shared = 2 * config.num_warps * sums * 16 * (config.block_n + 8) * 4
    function = _loaded(name, definitions(size, config, flags), shared, device)
    grid = (-(-size.batch // config.block_b), config.programs, 1)
    return (function, *grid, 32 * config.num_warps, 1, 1, shared)


@functools.cache
def _types(tensors: int) -> tuple[type, ...]:
    """Of a kernel's arguments."""
    return (*(ctypes.c_void_p,) * tensors, ctypes.c_int, ctypes.c_int)


def run_forward(
    call: Layer, chosen: plan.Plan, x: Tensor, buffers: plan.Buffers, kept: Tensor | None, skip: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As launch.run_forward."""
    steps, batch, hidden_size = chosen.size.steps, chosen.size.batch, chosen.size.hidden_size
    initial = tuple([state.contiguous() for state in call.states])
    finals = tuple([torch.empty_like(state) for state in initial])
    out = _unset((steps, batch, hidden_size), x)
    keeps = 0 if kept is None else kept.shape[1] // hidden_size
    states = (initial[0], _second(initial), finals[0], _second(finals))
    flags = _flags(call, keeps, skip, buffers.bias is not None)
    _launch("forward", chosen, (x, *buffers, *states, out, kept), flags, x.device)
    return out, finals


def run_backward(
    call: Layer, chosen: plan.Plan, columns: int, buffers: plan.Buffers, kept: Tensor, before: tuple[Tensor, ...],
    dout: Tensor, dfinals: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """As launch.run_backward."""
    size = chosen.size
    dgates = _unset((size.steps * size.batch, columns * size.hidden_size), dout)
    initial = tuple([torch.empty_like(gradient) for gradient in dfinals])
    read = (buffers.weight, kept, before[0], _second(before), dout, buffers.lengths, buffers.resets)
    states = (dfinals[0], _second(dfinals), dgates, initial[0], _second(initial))
    _launch("backward", chosen, (*read, *states), _flags(call), dout.device)
    return dgates, initial


def _flags(call: Layer, kept: int = 0, skip: int = 0, has_bias: bool = False) -> Flags:
    return Flags(kept, skip, has_bias, call.lengths is not None, call.resets is not None, call.reverse)


def _second(states: tuple[Tensor, ...]) -> Tensor | None:
    return states[1] if len(states) == 2 else None


def _unset(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory that programs wait on, filled with what held.cu calls unset: all ones."""
    bits = torch.full(shape, -1, dtype=torch.int32 if like.dtype.itemsize == 4 else torch.int16, device=like.device)
    return bits.view(like.dtype)


def _launch(
    name: str, chosen: plan.Plan, tensors: tuple[Tensor | None, ...], flags: Flags, device: torch.device
) -> None:
    """Launch "forward" or "backward" on the current stream.

    tensors: in the kernel's order, contiguous, None where its flags say that there is none.
    """
    from cuda.bindings import driver  # pyright: ignore

    size, index = chosen.size, device.index
    with contextlib.nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
        kernel = _kernel(name, size, chosen.config, flags, index)
        values = (*[0 if tensor is None else tensor.data_ptr() for tensor in tensors], size.steps, size.batch)
        stream = dispatch.current_stream(index)
        _checked(driver.cuLaunchCooperativeKernel(*kernel, stream, (values, _types(len(tensors)))))
