# SPDX-License-Identifier: Apache-2.0
"""The modules: layers over sequences, single-step cells, and `dynamic_rnn` over any cell."""

from tidegate.nn.cells import GRUCell, LSTMCell, RNNCell
from tidegate.nn.dynamic import dynamic_rnn
from tidegate.nn.layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "dynamic_rnn"]
