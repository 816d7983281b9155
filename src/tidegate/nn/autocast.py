# SPDX-License-Identifier: Apache-2.0
"""A recurrent call as torch.autocast asks for it."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate import ops
from tidegate.cells import Call


def recurrence(call: Call, widens_on_cpu: bool) -> tuple[Tensor, ...]:
    """`ops.recurrence`, under autocast in its dtype.

    Args:
        widens_on_cpu: under autocast on a CPU, return the dtype that came in, not autocast's. torch.nn's GRU, GRUCell
            and LSTMCell do (their state is promoted to float32 there); its RNN, RNNCell and LSTM don't.
    """
    dtype = _autocast_dtype(call.input) if torch._C._is_any_autocast_enabled() else None
    if dtype is None:
        return ops.recurrence(call)
    results = ops.recurrence(call.to(dtype))
    if widens_on_cpu and call.input.device.type == "cpu":
        return tuple(result.to(call.states[0].dtype) for result in results)
    return results


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which to run on `tensor`'s device, or None where autocast is off or leaves `tensor` alone."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
