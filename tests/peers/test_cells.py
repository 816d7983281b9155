# SPDX-License-Identifier: Apache-2.0
"""The ready cells live against the packages whose meaning they have; others' cells run unchanged. `make test-peers`.

The packages compute in float32 where they know no other dtype.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

import warnings

import pytest
import torch

import tidegate as tg
from tidegate import cells

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    from minGRU_pytorch.minGRU import minGRU
    from minGRU_pytorch.minLSTM import minLSTM
    from ncps.torch import CfC, LTCCell
    from ncps.torch.cfc_cell import CfCCell
    from ncps.wirings import AutoNCP
    from torchrl.modules import DreamerV3BlockGRU, DreamerV3BlockGRUCell
    from xlstm.blocks.slstm.cell import sLSTMCell_vanilla, sLSTMCellConfig

pytestmark = pytest.mark.filterwarnings("ignore")
T, B, I, H = 7, 3, 5, 8  # noqa: E741


def close(ours, theirs, floor=1e-6):
    """float32, sums in another order: at most 4e-7 was seen of outputs, 2e-6 of gradients, which add up all steps."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=floor)


def same(ours, theirs, x, ours_parameters=(), theirs_parameters=(), floor=1e-6):
    """Outputs, and the gradients of the input and of parameters in pairs."""
    close(ours, theirs, floor)
    weights = torch.randn_like(ours)
    found = torch.autograd.grad((ours * weights).sum(), [x, *ours_parameters])
    expected = torch.autograd.grad((theirs * weights).sum(), [x, *theirs_parameters])
    for a, b in zip(found, expected, strict=True):
        close(a, b.view_as(a), 5 * floor)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomize(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


def test_slstm_is_xlstms():
    config = sLSTMCellConfig(
        hidden_size=H, num_heads=2, backend="vanilla", dtype="float32", enable_automatic_mixed_precision=False
    )
    theirs, ours = randomize(sLSTMCell_vanilla(config)), cells.SLSTMCell(I, H, 2)
    with torch.no_grad():
        ours.recurrent_kernel.copy_(theirs._recurrent_kernel_int2ext(theirs._recurrent_kernel))
        ours.bias.copy_(theirs._bias_int2ext(theirs._bias))
    x = torch.randn(T, B, I, requires_grad=True)
    products = (x @ ours.weight_ih.T).transpose(0, 1)  # W is applied outside of their cell
    expected, final = theirs(products)  # (B, heads, T, H/heads), (4, B, H)
    expected = expected.permute(2, 0, 1, 3).flatten(2)
    output, state = tg.Recurrent(ours)(x)
    for a, b in zip(state, final, strict=True):
        close(a, b)
    same(output, expected, x, [ours.weight_ih], [ours.weight_ih], 2e-6)


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
def test_cfc_is_ncps(mode, layers):
    theirs = CfCCell(I, H, mode, backbone_units=6, backbone_layers=layers)
    ours = cells.CfCCell(I, H, mode, backbone_units=6, backbone_layers=layers)
    ours.load_state_dict(randomize(theirs).state_dict())
    x, t, h = torch.randn(B, I, requires_grad=True), torch.rand(B, 1), torch.randn(B, H)
    same(ours((x, t), h), theirs(x, h, t)[0], x, ours.parameters(), theirs.parameters())
    close(ours(x, h), theirs(x, h, 1.0)[0])


def test_a_cfc_over_time_is_ncps_layer():
    theirs, ours = CfC(I, H, backbone_units=6, batch_first=False), cells.CfCCell(I, H, backbone_units=6)
    ours.load_state_dict(theirs.rnn_cell.state_dict())
    x = torch.randn(T, B, I, requires_grad=True)
    output, state = tg.Recurrent(ours)(x)
    expected, final = theirs(x)
    close(state, final)
    same(output, expected, x, ours.parameters(), theirs.parameters())


@pytest.mark.parametrize("layers", [1, 2])
def test_dreamer_v3_is_torchrls(layers):
    options = {"projection_size": 6, "num_blocks": 4, "num_layers": layers}
    theirs, ours = DreamerV3BlockGRU(I, H, **options), cells.DreamerV3GRUCell(I, H, **options)
    ours.load_state_dict(randomize(theirs).cell.state_dict())
    x = torch.randn(B, T, I, requires_grad=True)
    resets = torch.rand(B, T) < 0.3
    output, state = tg.Recurrent(ours, batch_first=True)(x, resets=resets)
    expected, final = theirs(x, is_init=resets)
    close(state, final)
    same(output, expected, x, ours.parameters(), theirs.cell.parameters(), 3e-6)
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        name: p.shape for name, p in theirs.cell.named_parameters()
    }


@pytest.mark.parametrize(("theirs", "ours"), [(minGRU, cells.MinGRUCell), (minLSTM, cells.MinLSTMCell)])
def test_min_rnns_are_the_parallel_form(theirs, ours):
    """Over a whole sequence they scan in logarithms, from h_0 > 0."""
    theirs, ours = theirs(I), ours(I, I, bias=False)
    joint = next(theirs.parameters())
    parts = [ours.linear_h, *([ours.linear_z] if isinstance(theirs, minGRU) else [ours.linear_f, ours.linear_i])]
    with torch.no_grad():
        for part, rows in zip(parts, joint.split(I), strict=True):
            part.weight.copy_(rows)
    x, h = torch.randn(B, T, I, requires_grad=True), torch.rand(B, I) + 0.5
    output, _ = tg.dynamic_rnn(ours, x, initial_state=h)
    given = h if isinstance(theirs, minGRU) else h - 0.5  # their minLSTM puts it through g
    same(output, theirs(x, given.unsqueeze(1)), x)


def gates_of(kernel, order):
    """Keras' (., G*H) as rows in our order."""
    parts = torch.as_tensor(kernel).chunk(len(order), -1)
    return torch.cat([parts[k] for k in order], -1).T


@pytest.mark.parametrize("kind", ["SimpleRNN", "GRU", "GRU, reset before", "LSTM"])
def test_recurrent_dropout_is_keras(kind):
    """With given masks: one for each gate in its LSTM and GRU, one in its SimpleRNN."""
    order = {"SimpleRNN": (0,), "LSTM": (0, 1, 2, 3)}.get(kind, (1, 0, 2))
    after = kind == "GRU"
    options = {"reset_after": after} if kind.startswith("GRU") else {}
    name = kind.split(",")[0]
    theirs = getattr(keras.layers, f"{name}Cell")(H, recurrent_dropout=0.4, bias_initializer="ones", **options)
    theirs.build((B, I))
    inner = getattr(tg, f"{name.removeprefix('Simple')}Cell")(I, H, **options)
    kernel, recurrent, bias = (weight.value.detach() for weight in theirs.weights)
    bias = bias if after else torch.stack([bias, torch.zeros_like(bias)])
    with torch.no_grad():
        inner.weight_ih.copy_(gates_of(kernel, order))
        inner.weight_hh.copy_(gates_of(recurrent, order))
        inner.bias_ih.copy_(gates_of(bias[:1], order).flatten())
        inner.bias_hh.copy_(gates_of(bias[1:], order).flatten())
    masks = torch.nn.functional.dropout(torch.ones(len(order), B, H), 0.4)
    theirs._recurrent_dropout_mask = list(masks) if len(order) > 1 else masks[0]
    ours = cells.RecurrentDropout(inner, 0.4, per_gate=len(order) > 1)
    noise = masks[list(order)].transpose(0, 1) if len(order) > 1 else masks[0]
    x = torch.randn(T, B, I)
    state = (torch.zeros(B, H),) * (2 if name == "LSTM" else 1)
    expected = list(state)
    for x_t in x:
        found = ours(x_t, state if name == "LSTM" else state[0], {"own": noise})
        state = found if isinstance(found, tuple) else (found,)
        _, expected = theirs(x_t, expected, training=True)
        for a, b in zip(state, expected if isinstance(expected, list) else [expected], strict=True):
            close(a, b)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LTCCell(AutoNCP(H, 3), I),
        lambda: DreamerV3BlockGRUCell(I, H, projection_size=6, num_blocks=4),
    ],
    ids=["ncps' LTC", "torchrl's block GRU"],
)
def test_others_cells_run_unchanged(make):
    """Their sizes are found, lengths and streams work."""
    cell = make()
    x = torch.randn(T, B, I)
    layer = tg.Recurrent(cell)
    output, final = layer(x, lengths=[T, 0, 3])
    state = torch.zeros(1, H)
    for t in range(3):
        result = cell(x[t, 2:], state)
        y, state = result if isinstance(result, tuple) else (result, result)
        close(output[t, 2:], y)
    close(final[2:], state)
    assert output[3:, 2].eq(0).all()
    close(layer.stream(B).steps(x[:3])[:, 2], output[:3, 2])
