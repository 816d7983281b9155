# SPDX-License-Identifier: Apache-2.0
"""What a user's editor sees. Checked by pyright and mypy (tests/test_typing.py), never run.

Lines that end in `# error` must be flagged, all others must not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import tidegate as tg
from tidegate.cells import LayerNormLSTMCell, Zoneout

x = torch.zeros(5, 2, 40)

gru = tg.GRU(40, 128, num_layers=2, bidirectional=True, batch_first=True, reset_after=False)
assert_type(gru(x), tuple[Tensor, Tensor])
assert_type(gru(x, None, lengths=torch.tensor([5, 3])), tuple[Tensor, Tensor])
assert_type(gru([x[0], x[1]]), tuple[list[Tensor], Tensor])
assert_type(gru(pack_sequence([x[0], x[1]])), tuple[PackedSequence, Tensor])

lstm = tg.LSTM(40, 128, proj_size=16, peepholes=True, cell_clip=3.0)
assert_type(lstm(x), tuple[Tensor, tuple[Tensor, Tensor]])
output, (h, c) = lstm(x, (x, x), resets=None)
assert_type(c, Tensor)

rnn = tg.RNN(40, 128, 1, "relu", dtype=torch.float64)
assert_type(rnn(x)[1], Tensor)

cell = tg.LSTMCell(40, 128, coupled=True)
assert_type(cell(x[0]), tuple[Tensor, Tensor])
assert_type(tg.GRUCell(40, 128)(x[0], None), Tensor)

stream = gru.stream(batch_size=2)
assert_type(stream.step(x[0]), Tensor)

layer = tg.Recurrent([tg.GRUCell(40, 128), (torch.nn.LSTMCell(128, 8), lambda x, h: h + x)], dropout=0.1)
y, h_n = layer(x, lengths=[5, 3], resets=None)
wrapped = tg.Recurrent(Zoneout(LayerNormLSTMCell(40, 128, blocks=4), (0.1, 0.2)), batch_first=True)
wrapped.stream(batch_size=2).step(x[0])

model: torch.nn.Sequential = tg.accelerate(torch.nn.Sequential(torch.nn.GRU(2, 3)))
assert_type(tg.explain(gru, x).backend, str)
with tg.backend("reference"), tg.trace() as ran:
    assert_type(ran[0].backend, str)

tg.GRU(40, 128, num_layer=2)  # error
tg.GRU("40", 128)  # error
tg.LSTM(40, 128, reset_after=False)  # error
tg.RNN(40, 128, peepholes=True)  # error
tg.LSTMCell(40, 128, True, 3.5)  # error
gru(x, lenghts=[1, 2])  # error
tg.Recurrent(3)  # error
LayerNormLSTMCell(40, "128")  # error
lstm(x, x)  # error
cell(x, x)  # error


def takes_any(value: Any) -> None: ...
