# SPDX-License-Identifier: Apache-2.0
"""tidegate: fast, complete recurrent layers for PyTorch."""

from importlib.metadata import version as _version

from tidegate.backends import backend
from tidegate.errors import ConversionError, UnsupportedError
from tidegate.explain import explain
from tidegate.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, dynamic_rnn

__version__ = _version("tidegate")

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ConversionError",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "UnsupportedError",
    "backend",
    "dynamic_rnn",
    "explain",
]
