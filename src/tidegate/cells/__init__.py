# SPDX-License-Identifier: Apache-2.0
"""Ready cells and wrappers, each a step in plain torch operations, for `tg.Recurrent` and `tg.dynamic_rnn`.

Each docstring has the equations, their source, and whose meaning it is where frameworks differ.
"""

from tidegate.cells.cfc import CfCCell
from tidegate.cells.dreamer import DreamerV3GRUCell
from tidegate.cells.dropout import InputDropout, RecurrentDropout
from tidegate.cells.gru_d import GRUDCell
from tidegate.cells.ind_rnn import IndRNNCell
from tidegate.cells.layer_norm_gru import LayerNormGRUCell
from tidegate.cells.layer_norm_lstm import LayerNormLSTMCell
from tidegate.cells.li_gru import LiGRUCell
from tidegate.cells.mgu import MGUCell
from tidegate.cells.min_rnn import MinGRUCell, MinLSTMCell
from tidegate.cells.peephole_lstm import PeepholeLSTMCell
from tidegate.cells.residual import Residual
from tidegate.cells.slstm import SLSTMCell
from tidegate.cells.zoneout import Zoneout

__all__ = [
    "CfCCell",
    "DreamerV3GRUCell",
    "GRUDCell",
    "IndRNNCell",
    "InputDropout",
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "LiGRUCell",
    "MGUCell",
    "MinGRUCell",
    "MinLSTMCell",
    "PeepholeLSTMCell",
    "RecurrentDropout",
    "Residual",
    "SLSTMCell",
    "Zoneout",
]
