# SPDX-License-Identifier: Apache-2.0
"""What people do with recurrent layers every day, as they would write it: it must simply work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparing import LAYERS, randn, tensors_in
from tolerances import assert_equal_f64
from torch.nn.utils.rnn import pack_padded_sequence

import tidegate as tg


@pytest.fixture(autouse=True)
def _double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _built(kind: str, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return getattr(tg, kind)(*args, **kwargs)


def test_a_gru_cell_driven_by_hand():
    """Five steps of one sequence, one call a step; then the same in one call, with no state to think of."""
    cell, x = _built("GRUCell", 10, 20), torch.randn(5, 1, 10)
    h, seen = torch.zeros(1, 20), []
    for x_t in x:
        h = cell(x_t, h)
        seen.append(h)
    outputs, state = tg.dynamic_rnn(cell, x, time_major=True)
    assert outputs.shape == (5, 1, 20)
    assert_equal_f64(outputs, torch.stack(seen))
    assert_equal_f64(state, h)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_however_they_are_asked_for(kind):
    """loss.backward(), torch.autograd.grad and torch.func.grad: input, initial state, every weight."""
    layer, x = _built(kind, 4, 6), randn(7, 3, 4)
    hx = (randn(1, 3, 6, seed=2), randn(1, 3, 6, seed=3)) if kind == "LSTM" else randn(1, 3, 6, seed=2)
    leaves = [x, *tensors_in(hx), *layer.parameters()]

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, hx: Any) -> torch.Tensor:
        results = tensors_in(torch.func.functional_call(layer, parameters, (x, hx)))
        return sum(result.square().sum() for result in results)

    parameters = dict(layer.named_parameters())
    asked = torch.autograd.grad(loss(parameters, x, hx), leaves)
    loss(parameters, x, hx).backward()
    functional = torch.func.grad(loss, argnums=(0, 1, 2))(parameters, x, hx)
    in_order = [functional[1], *tensors_in(functional[2]), *(functional[0][name] for name in parameters)]
    for leaf, first, second in zip(leaves, asked, in_order, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.ne(0).any()
        assert_equal_f64(leaf.grad, first)
        assert_equal_f64(second, first)


def test_three_kinds_side_by_side():
    """Ten sequences of twenty steps, a hundred features, fifty hidden, batch first, states given."""
    x, h_0, c_0 = torch.randn(10, 20, 100), torch.randn(1, 10, 50), torch.randn(1, 10, 50)
    for kind in LAYERS:
        layer = _built(kind, 100, 50, batch_first=True)
        output, state = layer(x, (h_0, c_0) if kind == "LSTM" else h_0)
        assert output.shape == (10, 20, 50)
        assert [tuple(part.shape) for part in tensors_in(state)] == [(1, 10, 50)] * (2 if kind == "LSTM" else 1)
        assert_equal_f64(tensors_in(state)[0][0], output[:, -1])
        fresh, _ = layer(x)
        assert not torch.equal(fresh, output)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_h_n_holds(kind):
    """Layer by layer, in each the forward direction first; the last layer's are the two ends of the output."""
    layer = _built(kind, 10, 20, num_layers=2, bidirectional=True)
    x = torch.randn(5, 32, 10)
    output, state = layer(x)
    h_n = tensors_in(state)[0]
    assert output.shape == (5, 32, 40)
    assert h_n.shape == (4, 32, 20)
    assert_equal_f64(h_n[-2], output[-1, :, :20])
    assert_equal_f64(h_n[-1], output[0, :, 20:])
    first = _built(kind, 10, 20, bidirectional=True)
    first.load_state_dict({name: value for name, value in layer.state_dict().items() if "_l0" in name})
    assert_equal_f64(h_n[:2], tensors_in(first(x)[1])[0])
    two_layers = _built(kind, 10, 20, num_layers=2)(x)
    assert two_layers[0].shape == (5, 32, 20)
    assert tensors_in(two_layers[1])[0].shape == (2, 32, 20)


@pytest.mark.parametrize("kind", LAYERS)
def test_cells_stacked_by_hand(kind):
    """10 to 64 to 32 over (32, 50, 10): the second cell steps on what the first one made."""
    first, second = _built(f"{kind}Cell", 10, 64), _built(f"{kind}Cell", 64, 32)
    x = torch.randn(32, 50, 10)
    lower, upper, outputs = None, None, []
    for t in range(50):
        lower = first(x[:, t], lower)
        upper = second(tensors_in(lower)[0], upper)
        outputs.append(tensors_in(upper)[0])
    whole, state = tg.dynamic_rnn(second, tg.dynamic_rnn(first, x)[0])
    assert whole.shape == (32, 50, 32)
    assert_equal_f64(whole, torch.stack(outputs, 1))
    for a, b in zip(tensors_in(state), tensors_in(upper), strict=True):
        assert_equal_f64(a, b)


@pytest.mark.parametrize("kind", LAYERS)
def test_two_cells_make_a_bidirectional_layer(kind):
    layer = _built(kind, 3, 4, bidirectional=True)
    sides = []
    x = torch.randn(6, 2, 3)
    for suffix, steps in (("_l0", range(6)), ("_l0_reverse", reversed(range(6)))):
        cell, state, outputs = _built(f"{kind}Cell", 3, 4), None, {}
        cell.load_state_dict({name: layer.state_dict()[name + suffix] for name in cell.state_dict()})
        for t in steps:
            state = cell(x[t], state)
            outputs[t] = tensors_in(state)[0]
        sides.append(torch.stack([outputs[t] for t in range(6)]))
    assert_equal_f64(layer(x)[0], torch.cat(sides, -1))


def test_the_last_valid_output_of_each_row():
    """Not output[-1], which is padding for most rows; h_n has it already, and no gradient reaches padding."""
    layer, lengths = _built("GRU", 3, 4, batch_first=True), torch.tensor([2, 5, 1, 4])
    x = randn(4, 5, 3)
    output, h_n = layer(x, lengths=lengths)
    last = output[torch.arange(4), lengths - 1]
    assert_equal_f64(last, h_n[0])
    assert output[0, -1].eq(0).all()
    last.sum().backward()
    for row, length in enumerate(lengths.tolist()):
        assert x.grad[row, length:].eq(0).all()
        assert x.grad[row, :length].ne(0).any(-1).all()
        assert_equal_f64(output[row, :length], layer(x[row, :length])[0])
    junk = x.detach().masked_fill(torch.arange(5).unsqueeze(-1).expand(4, 5, 1) >= lengths.view(-1, 1, 1), 1e30)
    assert_equal_f64(layer(junk, lengths=lengths)[0], output)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_in_training_alone(kind):
    """Three layers, dropout 0.3: two runs differ in training, agree under one seed, and in eval nothing is dropped."""
    layer, x = _built(kind, 8, 16, num_layers=3, dropout=0.3), torch.randn(5, 4, 8)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    seeded = []
    for _ in range(2):
        torch.manual_seed(4)
        seeded.append(layer(x)[0])
    assert torch.equal(*seeded)
    layer.eval()
    without = _built(kind, 8, 16, num_layers=3)
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert_equal_f64(layer(x)[0], without(x)[0])


def test_parameter_counts_are_as_1_to_3_to_4():
    counts = {kind: sum(p.numel() for p in _built(kind, 100, 50, num_layers=3).parameters()) for kind in LAYERS}
    assert counts["GRU"] == 3 * counts["RNN"]
    assert counts["LSTM"] == 4 * counts["RNN"]


def test_every_cell_steps_like_its_layer():
    x = torch.randn(1, 16, 8)
    for kind in LAYERS:
        layer, cell = _built(kind, 8, 8), _built(f"{kind}Cell", 8, 8)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
        assert_equal_f64(tensors_in(cell(x[0]))[0], layer(x)[0][0])


@pytest.mark.parametrize("kind", LAYERS)
def test_a_classifier_of_tokens(kind):
    """Embedding, layer over the tokens, linear on the last state; it trains as torch.nn's over packed rows does."""
    torch.manual_seed(0)
    tokens, lengths, labels = torch.randint(9, (12, 7)), torch.randint(1, 8, (12,)), torch.randint(2, (12,))
    embedding, readout = torch.nn.Embedding(9, 4), torch.nn.Linear(5, 2)
    theirs = getattr(torch.nn, kind)(4, 5, batch_first=True)
    ours = _built(kind, 4, 5, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    losses = []
    for layer in (theirs, ours):
        model = copy.deepcopy(torch.nn.ModuleList([embedding, readout, layer]))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses.append([])
        for _ in range(20):
            x = model[0](tokens)
            if layer is ours:
                _, last = model[2](x, lengths=lengths)
            else:
                _, last = model[2](pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            loss = torch.nn.functional.cross_entropy(model[1](tensors_in(last)[0][-1]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    assert losses[1][-1] < 0.8 * losses[1][0]
    # 20 steps of Adam, which divides by small gradients, carry the last places on: 1e-13 seen.
    torch.testing.assert_close(torch.stack(losses[1]), torch.stack(losses[0]), rtol=0, atol=1e-11)


def test_a_decoder():
    """Teacher forcing in one call; step by step it says the same, and writes on by itself, greedily or by lot."""
    embedding, decoder, readout = torch.nn.Embedding(6, 4), _built("LSTM", 4, 5), torch.nn.Linear(5, 6)
    written, state = torch.randint(6, (9,)), (torch.randn(1, 5), torch.randn(1, 5))
    forced = readout(decoder(embedding(written), state)[0])
    with torch.no_grad():
        stream = decoder.stream(state=state)
        assert_equal_f64(torch.stack([readout(stream.step(embedding(word))) for word in written]), forced)

        found = {}
        for name in ("greedy", "sampled", "sampled again"):
            torch.manual_seed(1)
            stream, word = decoder.stream(state=state), written[0]
            found[name] = [int(word)]
            for _ in range(8):
                scores = readout(stream.step(embedding(word)))
                word = scores.argmax() if name == "greedy" else scores.softmax(-1).multinomial(1)[0]
                found[name].append(int(word))
        assert found["sampled"] == found["sampled again"] != found["greedy"]
        likeliest = readout(decoder(embedding(torch.tensor(found["greedy"])), state)[0]).argmax(-1)
        assert likeliest[:-1].tolist() == found["greedy"][1:]


@pytest.mark.parametrize("init", ["torch", "keras", "orthogonal", "kaiming"])
def test_initialisation_by_name(init):
    """As its name says; and a bias of 1 for the gate that keeps the state."""
    lstm, gru = _built("LSTM", 30, 40, init=init, forget_bias=1.0), _built("GRU", 30, 40, init=init, update_bias=1.0)
    for layer, gate in ((lstm, slice(40, 80)), (gru, slice(40, 80))):
        assert (layer.bias_ih_l0 + layer.bias_hh_l0)[gate].eq(1).all()
        recurrent = layer.weight_hh_l0
        if init in ("keras", "orthogonal"):
            parts = [recurrent] if init == "keras" else recurrent.split(40)
            for part in parts:
                assert_equal_f64(part.T @ part, torch.eye(40))
        elif init == "torch":
            assert recurrent.abs().max() <= 40**-0.5
        else:
            assert 0.8 < recurrent.std() * (40 / 2) ** 0.5 < 1.2
