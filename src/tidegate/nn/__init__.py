# SPDX-License-Identifier: Apache-2.0
"""The modules: layers over sequences, single-step cells, `dynamic_rnn` and `Recurrent` over any cell."""

from tidegate.nn.cells import GRUCell, LSTMCell, RecurrentCell, RNNCell
from tidegate.nn.classic import GRU, LSTM, RNN
from tidegate.nn.dynamic import dynamic_rnn
from tidegate.nn.layers import RecurrentLayer
from tidegate.nn.recurrent import Recurrent
from tidegate.nn.truncated import tbptt

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
    "RecurrentLayer",
    "dynamic_rnn",
    "tbptt",
]
