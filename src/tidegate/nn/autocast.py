# SPDX-License-Identifier: Apache-2.0
"""A recurrent call as torch.autocast asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tidegate import ops
from tidegate.call import Call


def run(
    call: Call,
    find_faults: Callable[[Call], None],
    widens_on_cpu: bool,
    run_call: Callable[..., Sequence[Tensor]] = ops.run,
) -> Sequence[Tensor]:
    """`run_call`, as `ops.run` is called, in the dtype of an autocast that is on.

    Args:
        widens_on_cpu: under autocast on a CPU, return the dtype that came in, not autocast's. torch.nn's GRU, GRUCell
            and LSTMCell do (their state is promoted to float32 there); its RNN, RNNCell and LSTM don't.
    """
    dtype = _autocast_dtype(call.input)
    if dtype is None:
        return run_call(call, find_faults)
    if call.cell.storage:  # they compute in float32 alone
        widened = [None if tensor is None else tensor.float() for tensor in (call.input, *call.states)]
        return run_call(call.with_tensors([*widened, *call.weights]), find_faults)
    find_faults(call)
    given = next((state for state in call.states if state is not None), call.input)
    results = run_call(call.to(dtype))
    if widens_on_cpu and call.input.device.type == "cpu":
        return tuple(result.to(given.dtype) for result in results)
    return results


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which to run on `tensor`'s device, or None where autocast is off or leaves `tensor` alone."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
