# SPDX-License-Identifier: Apache-2.0
"""What torch.autocast asks of a recurrent call."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which to run on `tensor`'s device, or None where autocast is off or leaves `tensor` alone."""
    kind = tensor.device.type
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(kind):
        return None
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
