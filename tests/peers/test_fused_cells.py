# SPDX-License-Identifier: Apache-2.0
"""Cells that nobody here wrote, as their packages have them, run fused: outputs, states and all gradients are the
loop's, in float64. Each prints how many times as fast it is. `make test-peers`."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import time
import warnings
from statistics import median

import pytest
import torch
from torch.utils import _pytree as pytree

import tidegate as tg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    import torchrecurrent.cells
    import torchrl.modules
    from minGRU_pytorch.minGRU import minGRU
    from minGRU_pytorch.minLSTM import minLSTM
    from ncps.torch import LTC, CfC, LTCCell
    from ncps.torch.cfc_cell import CfCCell
    from ncps.torch.lstm import LSTMCell as NcpsLSTMCell
    from ncps.torch.wired_cfc_cell import WiredCfCCell
    from ncps.wirings import AutoNCP
    from xlstm.blocks.slstm.cell import sLSTMCell_vanilla, sLSTMCellConfig
    from xlstm.blocks.slstm.src.vanilla import slstm_forward_step

pytestmark = pytest.mark.filterwarnings("ignore")
T, B, I, H = 7, 3, 8, 8  # noqa: E741


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def results(cell, x, state, fuse):
    """Outputs and final states, then the gradients of everything that can be trained."""
    x, state = (pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), nest) for nest in (x, state))
    y, final = tg.dynamic_rnn(cell, x, initial_state=state, time_major=True, fuse=fuse)
    found = [*pytree.tree_leaves(y), *pytree.tree_leaves(final)]
    generator = torch.Generator().manual_seed(1)
    loss = sum((value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum() for value in found)
    parameters = [parameter for parameter in cell.parameters() if parameter.requires_grad]
    wanted = [*pytree.tree_leaves(x), *pytree.tree_leaves(state), *parameters]
    return [*found, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


def seconds(cell, x, state, fuse):
    def once():
        start = time.perf_counter()
        tg.dynamic_rnn(cell, x, initial_state=state, time_major=True, fuse=fuse)
        return time.perf_counter() - start

    with torch.no_grad():
        once()
        return median(once() for _ in range(5))


def check(name, cell, x, state, capsys, tolerance=1e-9):
    """And print the speed-up over 100 steps, in inference. 1e-9 is what is promised of any cell, whatever its sums."""
    for found, expected in zip(results(cell, x, state, True), results(cell, x, state, False), strict=True):
        scale = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
    x = pytree.tree_map(lambda leaf: leaf.detach().repeat(15, *(1,) * (leaf.dim() - 1))[:100], x)
    gain = seconds(cell, x, state, False) / seconds(cell, x, state, True)
    with capsys.disabled():
        print(f"\n{name}: {gain:.1f} times as fast as the loop over 100 steps, B {B}", end="")


def random(*shape):
    return torch.randn(*shape) * 0.5


class WithTime(torch.nn.Module):
    """ncps' cells take the time since the step before after the state."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, state):
        return self.cell(x[0], state, x[1])


@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
def test_ncps_cfc(mode, double, capsys):
    cell = WithTime(CfCCell(I, H, mode, backbone_units=6))
    check(f"ncps CfC {mode}", cell, (random(T, B, I), torch.rand(T, B, 1)), random(B, H), capsys)


def test_ncps_wired_cfc(double, capsys):
    wiring = AutoNCP(12, 3)
    wiring.build(I)
    cell = WithTime(WiredCfCCell(I, wiring))
    check("ncps wired CfC", cell, (random(T, B, I), torch.rand(T, B, 1)), random(B, 12), capsys)


def test_ncps_lstm(double, capsys):
    check("ncps LSTM", NcpsLSTMCell(I, H), random(T, B, I), (random(B, H), random(B, H)), capsys)


def test_ncps_ltc(double, capsys):
    check("ncps LTC", LTCCell(AutoNCP(12, 3), I), random(T, B, I), random(B, 12), capsys)


@pytest.mark.parametrize("make", [
    lambda: CfC(I, H), lambda: CfC(I, AutoNCP(12, 3)), lambda: LTC(I, AutoNCP(12, 3)),
], ids=["CfC", "wired CfC", "LTC"])  # fmt: skip
def test_ncps_cells_unchanged(make, double):
    """With their own names for the time since the step before, and no state given; ncps' layers around them."""
    layer = make()
    name = {"CfCCell": "ts", "WiredCfCCell": "timespans", "LTCCell": "elapsed_time"}[type(layer.rnn_cell).__name__]
    x, spans = random(B, T, I), torch.rand(B, T, 1) + 0.1
    # Their layers' loop hands a step's spans on as (B,), which is right for one row.
    expected = torch.cat([layer(x[b : b + 1], timespans=spans[b : b + 1])[0] for b in range(B)])
    # float64, values below 1: 4.4e-16 seen.
    for fuse in (True, False):
        output, _ = tg.dynamic_rnn(layer.rnn_cell, x, fuse=fuse, **{name: spans})
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
    output, _ = tg.Recurrent(layer.rnn_cell, batch_first=True)(x, **{name: spans})
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)


def test_torchrl_gru_and_lstm(double, capsys):
    check("torchrl GRU", torchrl.modules.GRUCell(I, H), random(T, B, I), random(B, H), capsys)
    cell = torchrl.modules.LSTMCell(I, H)
    check("torchrl LSTM", cell, random(T, B, I), (random(B, H), random(B, H)), capsys)


def test_torchrl_dreamer(capsys):
    """Its norms compute in float32 whatever the weights are, so in float64 it runs step by step."""
    cell = torchrl.modules.DreamerV3BlockGRUCell(I, H, projection_size=6, num_blocks=4)
    check("torchrl Dreamer V3", cell, random(T, B, I), random(B, H), capsys, 3e-6)
    found = tg.explain(tg.dynamic_rnn, cell.double(), random(B, T, I).double(), initial_state=random(B, H).double())
    assert "the step changes torch.float64 to torch.float32" in found.calls[0].reasons["fused"][0]


class OneStep(torch.nn.Module):
    """minGRU-pytorch's modules on a sequence of one step, which they compute without their scan."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, h):
        y, h = self.module(x.unsqueeze(1), h.unsqueeze(1), return_next_prev_hidden=True)
        return y.squeeze(1), h.squeeze(1)


@pytest.mark.parametrize("module", [minGRU, minLSTM])
def test_min_rnns(module, double, capsys):
    check(f"minGRU-pytorch {module.__name__}", OneStep(module(I)), random(T, B, I), random(B, I).abs(), capsys)


class XlstmStep(torch.nn.Module):
    """A step of xlstm's vanilla cell, whose states are one tensor (states, B, H)."""

    def __init__(self, function):
        super().__init__()
        config = sLSTMCellConfig(
            hidden_size=H,
            num_heads=2,
            backend="vanilla",
            function=function,
            dtype="float32",
            enable_automatic_mixed_precision=False,
        )
        self.cell = sLSTMCell_vanilla(config).double()
        self.state_size = (H,) * config.num_states
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(random(*parameter.shape))

    def forward(self, x, state):
        cell = self.cell
        weights = cell._recurrent_kernel, cell._bias, cell.pointwise
        state = slstm_forward_step(x[None], torch.stack(state), *weights, constants=cell.config.constants)[0][:, 0]
        return state[0], tuple(state)


def test_xlstms_slstm_looks_at_values(double):
    """It begins anew where n is 0 in all rows at once: `cells.SLSTMCell`, whose meaning it is, asks row by row."""
    found = tg.explain(XlstmStep("slstm"), random(B, T, 4 * H))
    (reason,) = found.calls[0].reasons["fused"]
    assert "control flow on values cannot be traced, at slstm.py:" in reason
    assert reason.endswith("if torch.all(n == 0.0):")


def test_xlstms_lstm(double, capsys):
    check("xlstm LSTM", XlstmStep("lstm"), random(T, B, 4 * H), (random(B, H), random(B, H)), capsys)


@pytest.mark.parametrize(("name", "states"), [("SimpleRNNCell", 1), ("GRUCell", 1), ("LSTMCell", 2)])
def test_keras(name, states, capsys):
    """In float32, hence the tolerance: traced in float64, Keras' layers cast to float32 on the way, and are looped."""
    cell = getattr(keras.layers, name)(H)
    cell.build((B, I))
    check(f"keras {name}", cell, random(T, B, I), [random(B, H) for _ in range(states)], capsys, 1e-5)


TORCHRECURRENT = [name for name in dir(torchrecurrent.cells) if name.endswith("Cell")]
PAIRS = {"MCLSTMCell", "TLSTMCell"}  # of two states, and an output that is none of them
# torch's own gradient of hardsigmoid has 1/6 in float32, also in float64.
OFF_BY_TORCH = {"SGUCell", "DSGUCell"}


@pytest.mark.parametrize("name", TORCHRECURRENT)
def test_torchrecurrent(name, double, capsys):
    cell = getattr(torchrecurrent.cells, name)(I, H)
    made = (random(B, H), random(B, H)) if name in PAIRS else cell(random(B, I))
    made = made[1] if name == "IntersectionRNNCell" else made
    state = pytree.tree_map(lambda leaf: random(*leaf.shape), made)
    check(f"torchrecurrent {name}", cell, random(T, B, I), state, capsys, 1e-7 if name in OFF_BY_TORCH else 1e-9)


def test_torchrecurrent_has_its_cells():
    assert len(TORCHRECURRENT) >= 41
