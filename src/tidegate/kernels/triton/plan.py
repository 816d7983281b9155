# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs a call, with which block sizes, and why not another. Knows no triton: it is asked before any runs.

Every block size is here, so that a benchmark can try others: `using(block_n=32)`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidegate.call import Call, Layer
from tidegate.cell import Cell, Options

KERNELS = {
    "step": "torch's products and one pointwise kernel, for one step",
    "resident": "K1: the recurrent weights stay in registers and shared memory",
    "streamed": "K2: they are read from the L2 cache at each step",
    "persistent": "K3: as K2, by several programs at once that tell each other of each step",
    "per_step": "K3's programs, launched anew for each step",
    "held": "K4: the weights stay in the registers of several programs at once that read each other's results",
}

# The largest hidden_size whose weights stay resident, by bytes an element.
_RESIDENT = {2: 128, 4: 64, 8: 64}
# Above this one program takes too long over the weights. To be measured.
_STREAMED = 256
# Programs that wait for each other must all be running: one a multiprocessor at most. The interpreter has none.
_INTERPRETED_PROCESSORS = 1 << 30
SPINS = 1 << 24  # looks at the flags, half a microsecond each: then something is wrong


class Config(NamedTuple):
    """How a kernel cuts up its work. block_k is of the product's inner dimension, programs those that share a tile."""

    block_b: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 1


_HELD_REGISTERS = 192  # a thread, for weights and the exchange
_HELD_ROWS = 64  # a program; with more of them it is behind the persistent kernel
_PERSISTENT_COLUMNS = 3072  # of all gates, up to which that one is ahead of cuDNN
_WORTH_STEPS = 24
_CUDNN_HOLDS = {True: 256, False: 128}  # the largest hidden_size of its kernel of this kind, of an RNN and else
_HELD_SMALL = 128  # hidden_size; above it a program has twice the units


STEP = Config(4, 256, 1, 4, 1)  # of one step's pointwise kernel, for any number of rows


class Device(NamedTuple):
    """What a plan has to know of where it runs."""

    interpreted: bool
    present: bool = False  # not only asked about
    processors: int = _INTERPRETED_PROCESSORS
    capability: tuple[int, int] = (0, 0)


class Size(NamedTuple):
    """What a plan has to know of a call."""

    kind: str
    gates: int
    steps: int
    batch: int
    hidden_size: int
    dtype: torch.dtype
    precision: str  # of its products: "tf32", or "ieee" for that of the dtype
    plain: bool  # neither lengths nor resets


class Plan(NamedTuple):
    """The kernel that runs a call of a size, and the others' reasons."""

    size: Size
    kernel: str
    config: Config
    reasons: dict[str, list[str]]


class Settings(NamedTuple):
    """What a benchmark or a test decides in place of `plan`.

    Attributes:
        kernel: one of KERNELS, or "" for the plan's choice.
        recompute: the backward computes the gates again, in large products, in place of the forward storing them.
        precision: of float32 products: "ieee", "tf32" or "tf32x3"; "" asks torch's flags.
        config: fields of Config to replace.
    """

    kernel: str = ""
    recompute: bool = False
    precision: str = ""
    config: tuple[tuple[str, int], ...] = ()


settings = Settings()


@functools.cache
def _properties(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(False, True, properties.multi_processor_count, (properties.major, properties.minor))


def device_on(device: torch.device) -> Device:
    """A GPU as a plan sees it."""
    index: Any = device.index
    return _properties(torch.cuda.current_device() if index is None else index)


@contextlib.contextmanager
def using(kernel: str = "", recompute: bool = False, precision: str = "", **config: int) -> Generator[None]:
    """Decide what `Settings` lists for every call inside the block. A call's backward belongs inside it, too.

    Raises:
        ValueError: no kernel has this name.
    """
    global settings
    if kernel and kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    before, settings = settings, Settings(kernel, recompute, precision, tuple(config.items()))
    try:
        yield
    finally:
        settings = before


class Buffers(NamedTuple):
    """What every kernel over a sequence reads besides its own: x or dout first, each contiguous."""

    weight: Tensor
    bias: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None


def kind_of(call: Layer) -> str:
    return _kind(call.cell, call.options)


def _kind(cell: Cell, options: Options) -> str:
    if cell.name == "rnn":
        return f"rnn_{options['nonlinearity']}"
    if cell.name == "gru" and not options["reset_after"]:
        return "gru_reset_before"
    return cell.name


def size_of(call: Layer | Call) -> Size:
    if isinstance(call, Call):
        options, steps, batch = call.named_options(), call.steps, call.batch()
    else:
        options, (steps, batch) = call.options, call.input.shape[:2]
    plain = call.lengths is None and call.resets is None
    dtype = call.input.dtype
    gates = len(call.cell.gates)
    return Size(_kind(call.cell, options), gates, steps, batch, call.hidden_size, dtype, precision(dtype), plain)


def precision(dtype: torch.dtype) -> str:
    """Of the recurrent products: tf32 where torch's own recurrent operators of float32 may use it, as by default."""
    if dtype is not torch.float32:
        return "ieee"
    if settings.precision:
        return settings.precision
    cudnn: Any = torch.backends.cudnn
    return "tf32" if cudnn.rnn.fp32_precision == "tf32" else "ieee"


def reasons(kernel: str, size: Size, device: Device) -> list[str]:
    """Why `kernel` cannot run a call of this size; empty if it can."""
    found: list[str] = []
    if kernel == "step" and (size.steps != 1 or not size.plain):
        found.append("it runs one step without lengths or resets")
    if kernel == "resident":
        largest = _RESIDENT[size.dtype.itemsize]
        if size.hidden_size > largest:
            found.append(f"the weights of hidden_size {size.hidden_size} do not stay resident, those of {largest} do")
    if kernel == "held":
        found += _held_reasons(size, device)
    if kernel == "persistent":
        if not device.interpreted and device.capability < (7, 0):
            found.append("it needs compute capability 7.0")
        if _shared_out(size, device) is None:
            found.append(
                f"the device has {device.processors} multiprocessors: its programs could not all run at once, "
                "and they wait for each other"
            )
    return found


def choose(size: Size, device: Device, backward: bool = False) -> Plan:
    """The kernel that `using` names, or the first that fits.

    Raises:
        ValueError: the named one cannot run a call of this size; the message says why.
    """
    return _chosen(size, device, backward, settings)


@functools.lru_cache(maxsize=1024)
def _chosen(size: Size, device: Device, backward: bool, settings: Settings) -> Plan:
    why = {kernel: reasons(kernel, size, device) for kernel in KERNELS}
    kernel = settings.kernel
    if backward:
        why["step"] = ["it has no backward: another kernel runs that"]
        kernel = "" if kernel == "step" else kernel
    if not kernel:
        large = size.hidden_size > _STREAMED
        first = ("persistent",) if not why["held"] and _is_crowded(size, device) and _is_persistents(size) else ()
        order = ("step", *first, "held", "resident", *(("persistent", "streamed") if large else ("streamed",)))
        kernel = next(name for name in order if not why[name])
    elif why[kernel]:
        raise ValueError(f"kernel {kernel!r} cannot run {size}: {'; '.join(why[kernel])}")
    return Plan(size, kernel, config(kernel, size, device)._replace(**dict(settings.config)), why)


def config(kernel: str, size: Size, device: Device) -> Config:
    """The block sizes of a kernel that has no reasons against the call."""
    if device.interpreted:
        # As small as a product may be, so that small tests have several chunks and edges; persistent as one program.
        whole = _power(size.hidden_size) if kernel in ("resident", "persistent") else 16
        return Config(16, whole, 16, 4, 1, 2 if kernel == "per_step" else 1)
    if kernel == "step":
        return STEP
    if kernel == "held":
        fitting = _held(size, device)
        assert fitting is not None
        return fitting
    # These keep ptxas, on sm_90, from spilling more than a few registers; what is fastest is to be measured. Rows that
    # do not begin at a multiple of 16 entries are loaded one entry at a time, which takes registers.
    wide = size.dtype.itemsize > 2
    exact = size.dtype is torch.float32 and size.precision == "ieee"
    aligned = size.hidden_size % 16 == 0
    if kernel == "resident":
        block = _power(size.hidden_size)
        return Config(16, block, block, 8 if block > 64 or wide else 4, 1)
    block_k = 16 if exact or (wide and not aligned) else 32 if wide or not aligned else 64
    if kernel == "streamed":
        return Config(16, 32 if wide or not aligned else 64, block_k, 4, 3)
    shared = _shared_out(size, device) or (16, 16)
    warps = 8 if shared[0] * shared[1] >= 1024 and size.gates > 1 else 4
    return Config(*shared, block_k, warps, 3, -(-size.hidden_size // shared[1]))


@functools.cache
def _has_bindings() -> bool:
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


def _held_reasons(size: Size, device: Device) -> list[str]:
    found: list[str] = []
    if device.interpreted:
        return ["CUDA C++ does not run under Triton's interpreter"]
    if device.capability < (8, 0):
        found.append("it needs compute capability 8.0")
    if device.present and not _has_bindings():
        found.append("cuda-bindings is not installed: torch's builds for CUDA bring it")
    if size.kind == "gru_reset_before":
        found.append("a GRU with the reset before the product is not among its cells")
    if size.dtype is torch.float32 and size.precision == "ieee":
        found.append("float32 products in full precision are not for the matrix unit: it takes tf32")
    if size.hidden_size % 8:
        found.append(f"hidden_size is {size.hidden_size}, no multiple of 8")
    if not found and _held(size, device) is None:
        found.append("the weights do not fit into the registers of the device's multiprocessors")
    return found


def _held(size: Size, device: Device) -> Config | None:
    """Block sizes with which all programs run at once: the fewest rows a program and, for large weights, more units.

    None if there are none. Measured on an H200: benchmarks/results.
    """
    chunk = 32 if size.dtype.itemsize == 2 else 16
    chunks = -(-size.hidden_size // chunk)
    small = size.hidden_size <= _HELD_SMALL
    for tiles in (1, 2, 4, 8):
        for units in (8, 16) if small else (16, 8):
            programs = -(-size.hidden_size // units)
            if -(-size.batch // (16 * tiles)) * programs > device.processors:
                continue
            for warps in (2, 4, 8) if small else (4, 8):
                share = -(-size.gates * chunks // warps)  # of the backward's product, which is the larger
                if share * units // 2 + 8 * min(share, 8) <= _HELD_REGISTERS:
                    return Config(16 * tiles, units, chunk, warps, 1, programs)
    return None


@functools.lru_cache(maxsize=1024)
def slower_reasons(size: Size, cells: int, device: Device) -> tuple[str, ...]:
    """Why cuDNN runs a call of so many layers times directions faster than the held kernel: benchmarks/results."""
    found = [*slower_in_graph(size, device)]
    if reasons("held", size, device):
        return tuple(found)
    if size.steps < _WORTH_STEPS:
        found.append(f"fewer than {_WORTH_STEPS} steps do not pay for the start")
    is_rnn = size.kind.startswith("rnn")
    least = _CUDNN_HOLDS[is_rnn]
    if size.dtype is not torch.bfloat16 and size.plain and size.hidden_size <= least:
        found.append(f"cuDNN holds the weights, too, in {size.dtype} up to hidden_size {least}")
    few = size.batch % 8 == 0 and size.batch <= 32
    whole = size.hidden_size % 128 == 0 and cells == 1 and size.plain
    if size.dtype is torch.float16 and (size.kind == "lstm" or is_rnn) and few and whole:
        found.append("cuDNN holds the weights, too, in one float16 LSTM or RNN with a batch of 8 to 32")
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def slower_in_graph(size: Size, device: Device) -> tuple[str, ...]:
    """The same of a layer as one operator of a graph, where cuDNN copies a stack's weights and runs its forward again
    in the backward: on an H100 0.13 to 0.53 of the speed of torch.nn's eager call, the held kernel 0.23 to 0.92."""
    found = [f"the kernel that beats cuDNN cannot run it: {reason}" for reason in reasons("held", size, device)]
    if not found and _is_crowded(size, device) and not _is_persistents(size):
        found.append(f"more than {_HELD_ROWS} rows share a program")
    return tuple(found)


def _is_crowded(size: Size, device: Device) -> bool:
    config = _held(size, device)
    return config is not None and config.block_b > _HELD_ROWS


def _is_persistents(size: Size) -> bool:
    """Whether the persistent kernel is ahead of cuDNN, and of the held one, where that one's programs are crowded."""
    is_narrow = size.dtype is torch.bfloat16 or (size.gates == 1 and size.dtype is torch.float16)
    return is_narrow and size.gates * size.hidden_size <= _PERSISTENT_COLUMNS


def _shared_out(size: Size, device: Device) -> tuple[int, int] | None:
    """block_b and block_n of the persistent kernel: the least work a program with all of them running; None if none."""
    fitting = [
        (rows * units, rows + size.gates * units, rows, units)
        for rows in (16, 32, 64, 128)
        for units in (16, 32, 64)
        if -(-size.batch // rows) * -(-size.hidden_size // units) <= device.processors
    ]
    return min(fitting)[2:] if fitting else None


def _power(number: int) -> int:
    """The least power of two that is `number` or more, and what a product needs, 16, or more."""
    return max(16, 1 << (number - 1).bit_length()) if number > 0 else 16
