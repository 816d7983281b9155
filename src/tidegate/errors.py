# SPDX-License-Identifier: Apache-2.0
"""The two errors that are tidegate's own; everything else is raised as torch.nn raises it."""


class UnsupportedError(RuntimeError):
    """No backend, or not the one that was named, can run this call. The message lists every backend's reasons."""


class ConversionError(ValueError):
    """Weights or a configuration from elsewhere cannot be represented here. The message lists every fault at once."""
