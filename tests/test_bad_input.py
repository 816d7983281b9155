# SPDX-License-Identifier: Apache-2.0
"""Bad input: a table of type and first line, and nothing changed by the refusal."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from comparing import BACKENDS, CELLS, LAYERS, randn, refusal, tensors_in, twins
from tolerances import assert_equal_f64
from torch.nn.utils.rnn import pack_sequence

import tidegate as tg

Z = torch.zeros


def _layer(kind: str, **options: Any) -> Any:
    return getattr(tg, kind)(3, 4, **options)


def _state(kind: str, *shape: int, **options: Any) -> Any:
    return (Z(*shape, **options), Z(*shape, **options)) if kind == "LSTM" else Z(*shape, **options)


def _packed() -> Any:
    return pack_sequence([Z(3, 3), Z(2, 3)])


# Raised by torch.nn too, in these very words: input, then state, as functions of the kind.
AS_TORCH = {
    "1-D": lambda kind: (Z(3),),
    "4-D": lambda kind: (Z(1, 1, 1, 3),),
    "features": lambda kind: (Z(5, 2, 4),),
    "features, unbatched": lambda kind: (Z(5, 4),),
    "features, packed": lambda kind: (pack_sequence([Z(3, 5)]),),
    "dtype": lambda kind: (Z(5, 2, 3, dtype=torch.float64),),
    "integers": lambda kind: (Z(5, 2, 3, dtype=torch.int64),),
    "dtype, packed": lambda kind: (pack_sequence([Z(3, 3, dtype=torch.float64)]),),
    "no steps": lambda kind: (Z(0, 2, 3),),
    "no steps, unbatched": lambda kind: (Z(0, 3),),
    "no steps, no rows": lambda kind: (Z(0, 0, 3),),
    "state rank": lambda kind: (Z(5, 2, 3), _state(kind, 2, 4)),
    "state rank, unbatched": lambda kind: (Z(5, 3), _state(kind, 1, 1, 4)),
    "state rank, packed": lambda kind: (_packed(), _state(kind, 2, 4)),
    "state batch": lambda kind: (Z(5, 2, 3), _state(kind, 1, 3, 4)),
    "state batch, packed": lambda kind: (_packed(), _state(kind, 1, 3, 4)),
    "state layers": lambda kind: (Z(5, 2, 3), _state(kind, 2, 2, 4)),
    "state size": lambda kind: (Z(5, 2, 3), _state(kind, 1, 2, 5)),
    "input elsewhere": lambda kind: (Z(5, 2, 3, device="meta"),),
    "state elsewhere": lambda kind: (Z(5, 2, 3), _state(kind, 1, 2, 4, device="meta")),
}


# Of dtypes torch 2.10 says what 2.11 and later say at more length.
DTYPES_BEFORE_2_11 = (
    "input must have the type (.*), got type (.*)",
    r"RNN input dtype (\2) does not match weight dtype (\1). "
    r"Convert input: input.to(\1), or convert model: model.to(\2)",
)


@pytest.mark.parametrize("case", AS_TORCH)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_refuses_as_torch_does(kind, case):
    arguments = AS_TORCH[case](kind)
    if kind == "LSTM" and case.endswith("packed"):
        # torch.nn.LSTM checks nothing that is packed: an inner operator fails, or none. Ours says what its GRU says.
        theirs = refusal(lambda: torch.nn.GRU(3, 4)(arguments[0], *(state[0] for state in arguments[1:])))
        theirs = theirs[0], theirs[1].replace("hidden size", "hidden[0] size")
    else:
        theirs = refusal(lambda: getattr(torch.nn, kind)(3, 4)(*arguments))
    if torch.__version__ < (2, 11):
        theirs = theirs[0], re.sub(*DTYPES_BEFORE_2_11, theirs[1])
    ours = refusal(lambda: _layer(kind)(*arguments))
    assert ours == theirs


def test_lstm_states_one_by_one():
    h, c = Z(1, 2, 4), Z(1, 2, 4)
    for hx in ((Z(2, 4), c), (h, Z(2, 4)), (Z(1, 2, 5), c), (h, Z(1, 2, 5)), (h, c, c)):
        ours, theirs = (refusal(lambda lib=lib, hx=hx: lib.LSTM(3, 4)(Z(5, 2, 3), hx)) for lib in (tg, torch.nn))
        assert ours == theirs


# In our own words, because torch.nn's are the words of an inner operator or of Python, or there are none.
IN_OUR_WORDS = [
    (
        "GRU",
        ((Z(5, 2, 3),),),
        {},
        TypeError,
        "input: expected a Tensor, a PackedSequence or a list of Tensors, got tuple",
    ),
    ("GRU", (None,), {}, TypeError, "input: expected a Tensor, a PackedSequence or a list of Tensors, got NoneType"),
    ("GRU", (Z(5, 2, 3), (Z(1, 2, 4),)), {}, TypeError, "hx: expected a Tensor, got tuple"),
    ("LSTM", (Z(5, 2, 3), Z(2, 2, 4)), {}, TypeError, "hx: expected a tuple (h_0, c_0) of Tensors, got Tensor"),
    ("LSTM", (Z(5, 2, 3), (Z(1, 2, 4),)), {}, RuntimeError, "lstm expects two hidden states"),
    (
        "RNN",
        (Z(5, 2, 3), Z(1, 2, 4, dtype=torch.float64)),
        {},
        RuntimeError,
        "Input and hidden tensors are not the same dtype, found input tensor with torch.float32 and hidden tensor with "
        "torch.float64",
    ),
    # lengths
    ("GRU", (Z(5, 2, 3),), {"lengths": [5, -1]}, ValueError, "lengths: expected values in 0..T = 0..5, got -1"),
    ("GRU", (Z(5, 2, 3),), {"lengths": [6, 1]}, ValueError, "lengths: expected values in 0..T = 0..5, got 6"),
    ("GRU", (Z(5, 2, 3),), {"lengths": [5]}, ValueError, "lengths: expected one per row, (B,) = (2,), got (1,)"),
    ("GRU", (Z(5, 2, 3),), {"lengths": [5] * 5}, ValueError, "lengths: expected one per row, (B,) = (2,), got (5,)"),
    ("GRU", (Z(5, 2, 3),), {"lengths": 5}, ValueError, "lengths: expected one per row, (B,) = (2,), got ()"),
    ("GRU", (Z(5, 2, 3),), {"lengths": [[5, 5]]}, ValueError, "lengths: expected one per row, (B,) = (2,), got (1, 2)"),
    (
        "GRU",
        (Z(5, 2, 3),),
        {"lengths": [5.0, 1.0]},
        ValueError,
        "lengths: expected an integer dtype, got torch.float32",
    ),
    (
        "GRU",
        (Z(5, 2, 3),),
        {"lengths": torch.tensor([True, False])},
        ValueError,
        "lengths: expected an integer dtype, got torch.bool",
    ),
    *(
        (
            "LSTM",
            (form,),
            {"lengths": [2, 1]},
            ValueError,
            "lengths: expected None but with a padded batch (3-D input); this input has its own lengths",
        )
        for form in (Z(5, 3), [Z(2, 3), Z(1, 3)], _packed())
    ),
    # resets
    (
        "GRU",
        (Z(5, 2, 3),),
        {"resets": Z(2, 5, dtype=torch.bool)},
        ValueError,
        "resets: expected (T, B) = (5, 2), got (2, 5)",
    ),
    (
        "GRU",
        (Z(5, 2, 3),),
        {"resets": Z(5, dtype=torch.bool)},
        ValueError,
        "resets: expected (T, B) = (5, 2), got (5,)",
    ),
    ("GRU", (Z(5, 2, 3),), {"resets": Z(5, 2)}, ValueError, "resets: expected a bool tensor, got torch.float32"),
    ("GRU", (Z(5, 2, 3),), {"resets": [[0]]}, ValueError, "resets: expected a bool tensor, got list"),
    ("GRU", (Z(5, 3),), {"resets": Z(5, 1, dtype=torch.bool)}, ValueError, "resets: expected (T,) = (5,), got (5, 1)"),
    (
        "GRU",
        (_packed(),),
        {"resets": Z(3, 2, dtype=torch.bool)},
        ValueError,
        "resets: not for a PackedSequence; give a padded batch with lengths=, or a list",
    ),
    (
        "GRU",
        ([Z(3, 3)],),
        {"resets": Z(3, 1, dtype=torch.bool)},
        ValueError,
        "resets: expected a list of 1 bool tensors (T,), like input",
    ),
    ("GRU", ([Z(3, 3)],), {"resets": [None]}, ValueError, "resets[0]: expected a bool tensor, got NoneType"),
    (
        "GRU",
        ([Z(3, 3), Z(2, 3)],),
        {"resets": [Z(3, dtype=torch.bool)] * 2},
        ValueError,
        "resets[1]: expected (T,) = (2,), got (3,)",
    ),
    # lists
    ("GRU", ([],), {}, ValueError, "input: expected a list of at least one tensor (T, input_size), got an empty list"),
    ("GRU", ([Z(3)],), {}, ValueError, "input[0]: expected a tensor (T, input_size), got 1 dimensions"),
    ("GRU", ([None, Z(2, 3)],), {}, ValueError, "input[0]: expected a tensor (T, input_size), got NoneType"),
    ("GRU", ([Z(()), Z(2, 3)],), {}, ValueError, "input[0]: expected a tensor (T, input_size), got 0 dimensions"),
    (
        "GRU",
        ([Z(2, 3), Z(2, 4)],),
        {},
        ValueError,
        "input[1]: expected 3 features, torch.float32, cpu like the rows before it, got 4, torch.float32, cpu",
    ),
    (
        "GRU",
        ([Z(2, 3), Z(2, 3).double()],),
        {},
        ValueError,
        "input[1]: expected 3 features, torch.float32, cpu like the rows before it, got 3, torch.float64, cpu",
    ),
    ("GRU", ([Z(2, 4)],), {}, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4"),
    ("GRU", ([Z(2, 3), Z(1, 3)], Z(1, 3, 4)), {}, RuntimeError, "Expected hidden size (1, 2, 4), got [1, 3, 4]"),
]


@pytest.mark.parametrize(("kind", "arguments", "options", "expected", "message"), IN_OUR_WORDS)
def test_layer_refuses_in_our_words(kind, arguments, options, expected, message):
    for backend in BACKENDS:
        with tg.backend(backend):
            assert refusal(lambda: _layer(kind)(*arguments, **options)) == (expected, message)


def test_batch_first_names_its_own_layout():
    layer = _layer("GRU", batch_first=True)
    resets = Z(5, 2, dtype=torch.bool)
    assert refusal(lambda: layer(Z(2, 5, 3), resets=resets)) == (
        ValueError,
        "resets: expected (B, T) = (2, 5), got (5, 2)",
    )


def test_all_faults_of_a_list_at_once():
    with pytest.raises(ValueError, match="input") as raised:
        _layer("GRU")([Z(2, 3), Z(2, 4), Z(1), None])
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == ["input[1]", "input[2]", "input[3]"]


def test_nested_without_the_jagged_layout():
    with pytest.warns(UserWarning, match="prototype"):
        strided = torch.nested.nested_tensor([Z(2, 3), Z(1, 3)], layout=torch.strided)
    raised, message = refusal(lambda: _layer("GRU")(strided))
    assert raised is ValueError
    assert message.startswith("input: expected a nested tensor (B, T, input_size) of layout torch.jagged without holes")


# Of the cells, what torch's operator checks and its own words say.
CELL_CASES = {
    "0-D": lambda kind: (Z(()),),
    "3-D": lambda kind: (Z(1, 2, 3),),
    "features": lambda kind: (Z(2, 4),),
    "features, unbatched": lambda kind: (Z(4),),
    "state rank": lambda kind: (Z(2, 3), _state(kind[:-4], 1, 2, 4)),
    "state batch": lambda kind: (Z(2, 3), _state(kind[:-4], 3, 4)),
    "state size": lambda kind: (Z(2, 3), _state(kind[:-4], 2, 5)),
    "state unbatched, input not": lambda kind: (Z(2, 3), _state(kind[:-4], 4)),
    "input unbatched, state not": lambda kind: (Z(3), _state(kind[:-4], 1, 4)),
    "input None": lambda kind: (None,),
}


@pytest.mark.parametrize("case", CELL_CASES.values(), ids=CELL_CASES.keys())
@pytest.mark.parametrize("kind", CELLS)
def test_cell_refuses_as_torch_does(kind, case):
    ours, theirs = (refusal(lambda lib=lib: getattr(lib, kind)(3, 4)(*case(kind))) for lib in (tg, torch.nn))
    assert ours == theirs


CELLS_IN_OUR_WORDS = [
    ("LSTMCell", (Z(2, 3), Z(2, 4)), TypeError, "hx: expected a tuple (h_0, c_0) of Tensors, got Tensor"),
    ("LSTMCell", (Z(2, 3), (Z(2, 4),)), RuntimeError, "lstm expects two hidden states"),
    ("GRUCell", (Z(2, 3), (Z(2, 4),)), TypeError, "hx: expected a Tensor, got tuple"),
    (
        "GRUCell",
        (Z(2, 3), Z(2, 4, dtype=torch.float64)),
        ValueError,
        "h_0: expected input's dtype torch.float32, got torch.float64",
    ),
    ("GRUCell", (Z(2, 3), Z(2, 4, device="meta")), ValueError, "h_0: expected input's device cpu, got meta"),
]


@pytest.mark.parametrize(("kind", "arguments", "expected", "message"), CELLS_IN_OUR_WORDS)
def test_cell_refuses_in_our_words(kind, arguments, expected, message):
    assert refusal(lambda: getattr(tg, kind)(3, 4)(*arguments)) == (expected, message)


def test_a_cells_nonlinearity_is_checked_when_it_runs():
    ours, theirs = (refusal(lambda lib=lib: lib.RNNCell(3, 4, nonlinearity="x")(Z(2, 3))) for lib in (tg, torch.nn))
    assert ours == theirs == (RuntimeError, "Unknown nonlinearity: x")


@pytest.mark.parametrize("kind", LAYERS)
def test_a_refusal_changes_nothing(kind):
    layer = _layer(kind, num_layers=2, dropout=0.5)
    weights = {name: p.clone() for name, p in layer.named_parameters()}
    x, lengths = Z(5, 2, 3), torch.tensor([6, 1])
    hx = _state(kind, 2, 2, 4)
    random_state = torch.get_rng_state()
    before = dict(vars(layer))
    refusal(lambda: layer(x, hx, lengths=lengths))
    refusal(lambda: layer(x, hx, resets=Z(5, 2)))
    refusal(lambda: layer(x.double(), hx))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert vars(layer) == before
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in layer.named_parameters())
    assert x.eq(0).all()
    assert all(part.eq(0).all() for part in tensors_in(hx))
    assert lengths.tolist() == [6, 1]
    layer(x, hx, lengths=torch.tensor([5, 1]))


def _assert_zero_gradients(layer: torch.nn.Module, result: Any, *inputs: Any) -> None:
    """Zero, and not absent: a gradient that is None is an unused parameter to whoever gathers them."""
    sum(tensor.sum() for tensor in tensors_in(result)).backward()
    for tensor in (*inputs, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.eq(0).all()


@pytest.mark.parametrize("lengths", [None, torch.zeros(0, dtype=torch.int64)], ids=["plain", "lengths"])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_rows_run_as_in_torch(kind, lengths):
    theirs, ours = twins(kind, 3, 4, num_layers=2, bidirectional=True)
    x = randn(5, 0, 3)
    results = [ours(x, lengths=lengths), theirs(x)]
    for a, b in zip(*map(tensors_in, results), strict=True):
        assert a.shape == b.shape
    _assert_zero_gradients(ours, results[0], x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_without_steps(kind, backend):
    _, ours = twins(kind, 3, 4, num_layers=2, bidirectional=True)
    x = randn(5, 2, 3)
    with tg.backend(backend):
        result = ours(x, lengths=[0, 0])
    assert all(tensor.eq(0).all() for tensor in tensors_in(result))
    _assert_zero_gradients(ours, result, x)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_steps_with_lengths_return_the_initial_state(kind):
    _, layer = twins(kind, 3, 4)
    hx = (randn(1, 2, 4), randn(1, 2, 4, seed=5)) if kind == "LSTM" else randn(1, 2, 4)
    x = randn(0, 2, 3)
    output, state = layer(x, hx, lengths=[0, 0])
    assert tuple(output.shape) == (0, 2, 4)
    for final, initial in zip(tensors_in(state), tensors_in(hx), strict=True):
        assert_equal_f64(final, initial)
    _assert_zero_gradients(layer, (output, state), x)
