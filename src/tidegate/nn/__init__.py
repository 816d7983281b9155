# SPDX-License-Identifier: Apache-2.0
"""The modules: layers over sequences, single-step cells, and `dynamic_rnn` over any cell."""

from tidegate.nn.cells import GRUCell, LSTMCell, RecurrentCell, RNNCell
from tidegate.nn.dynamic import dynamic_rnn
from tidegate.nn.layers import GRU, LSTM, RNN, RecurrentLayer

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "RecurrentCell", "RecurrentLayer", "dynamic_rnn"]
