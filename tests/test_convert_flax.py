# SPDX-License-Identifier: Apache-2.0
"""from_flax against Flax's own numbers: outputs, states, gradients, float64 to 1e-10.

nn.RNN differs from us in two ways, which `run` spells out: it goes on past `seq_lengths` on whatever the input holds,
and its reverse rolls each row's valid steps to the front.
"""

import numpy as np
import pytest
import torch
import vectors

import tidegate as tg

CASES = [name for name in vectors.names("flax") if not name.startswith("MGUCell")]


def flipped(x, lens):
    """Flax's flip_sequences, its own inverse: step t is the row's step (length - 1 - t) mod T."""
    steps = x.shape[1]
    lens = torch.full((len(x),), steps) if lens is None else torch.tensor(lens).long()
    index = (lens[:, None] - 1 - torch.arange(steps)) % steps
    return x.gather(1, index.unsqueeze(-1).expand(x.shape))


def run(cell, case, x, state):
    lens, meta = case.get("lens"), case["meta"]
    x = flipped(x, lens) if meta.get("reverse") else x
    outputs, _ = tg.dynamic_rnn(cell, x, None, state)
    _, final = tg.dynamic_rnn(cell, x, lens, state)
    return flipped(outputs, lens) if meta.get("keep_order") else outputs, final


def close(found, expected, name):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-10, err_msg=name)


def gradients(cell, residual, names):
    """Flax's parameters' gradients from ours: a Dense for each gate and side."""
    letters = {"RNNCell": ("",), "LSTMCell": ("i", "f", "g", "o"), "GRUCell": ("r", "z", "n")}[type(cell).__name__]
    grads = {name: parameter.grad.chunk(len(letters)) for name, parameter in cell.named_parameters()}
    for side in "ih":
        for letter, weight, bias in zip(letters, grads[f"weight_{side}h"], grads[f"bias_{side}h"], strict=True):
            yield f"{side}{letter}/kernel", weight.T
            yield f"{side}{letter}/bias", bias


@pytest.mark.parametrize("tag", ["g1", "g2"])
@pytest.mark.parametrize("name", CASES)
def test_a_cell_gives_flaxs_numbers(name, tag):
    case = vectors.load("flax")[name]
    kind, _, residual = case["meta"]["cell"].partition("_")
    options = {"residual": True} if residual else {}
    weights = vectors.part(case, "w/")
    cell = tg.from_flax(kind, {"params": weights}, **options)
    x = torch.tensor(case["x"], requires_grad=True)
    init = {key: torch.tensor(value, requires_grad=True) for key, value in vectors.part(case, "init/").items()}
    outputs, final = run(cell, case, x, (init["h"], init["c"]) if "c" in init else init["h"])
    finals = dict(zip("hc", final if isinstance(final, tuple) else (final,), strict=False))
    close(outputs, case["outputs"], "outputs")
    for key, value in vectors.part(case, "state/").items():
        close(finals[key], value, key)
    loss = (outputs * torch.tensor(case["R"])).sum()
    if tag == "g2":
        loss = loss + sum((finals[key] * torch.tensor(value)).sum() for key, value in vectors.part(case, "S/").items())
    loss.backward()
    close(x.grad, case[f"{tag}/x"], "x")
    for key, leaf in init.items():
        close(leaf.grad, case[f"{tag}/init/{key}"], key)
    found = dict(gradients(cell, residual, weights))
    expected = {"/".join(key.split("/")[-2:]): value for key, value in vectors.part(case, f"{tag}/w/").items()}
    assert len(expected) == len(weights)
    for key, value in expected.items():
        close(found[key], value, key)


def gru_params():
    rng = np.random.default_rng(0)
    dense = {f"{side}{g}": {"kernel": rng.normal(size=(3 if side == "i" else 4, 4))} for side in "ih" for g in "rzn"}
    for name in ("ir", "iz", "in", "hn"):
        dense[name]["bias"] = rng.normal(size=4)
    return dense


def test_nested_flat_and_wrapped_parameters_are_the_same():
    dense = gru_params()
    flat = {f"cell/{name}/{leaf}": value for name, inner in dense.items() for leaf, value in inner.items()}
    cells = [tg.from_flax("GRUCell", params) for params in (dense, flat, {"params": {"rnn": {"cell": dense}}})]
    for cell in cells[1:]:
        assert all(torch.equal(a, b) for a, b in zip(cells[0].parameters(), cell.parameters(), strict=True))


def test_a_converted_cell_runs_on_torch_nns_equations():
    cell = tg.from_flax("GRUCell", gru_params())
    assert "aten" in tg.explain(cell, torch.randn(2, 3, dtype=torch.float64)).calls[0].reasons
    assert not tg.explain(cell, torch.randn(2, 3, dtype=torch.float64)).calls[0].reasons["aten"]


@pytest.mark.parametrize(
    ("kind", "change", "options", "words"),
    [
        ("MGUCell", {}, {}, ("one of GRUCell",)),
        ("GRUCell", {"hq": {"kernel": np.zeros((4, 4))}}, {}, ("hq/kernel: unknown",)),
        ("GRUCell", {"hn": {"kernel": np.zeros((5, 4))}}, {}, ("hn/kernel: expected (H, H) = (4, 4), got (5, 4)",)),
        ("GRUCell", {}, {"carry_init": 1, "gate_fn": "step"}, ("carry_init=1", "gate_fn='step'")),
        ("GRUCell", {"hn": {"kernel": np.zeros((4, 4), "f")}}, {}, ("different dtypes",)),
    ],
)
def test_what_cannot_be_represented(kind, change, options, words):
    with pytest.raises(tg.ConversionError) as error:
        tg.from_flax(kind, {**gru_params(), **change}, **options)
    for word in words:
        assert word in str(error.value)


def test_a_missing_parameter_is_named():
    params = gru_params()
    del params["hz"], params["ir"]
    with pytest.raises(tg.ConversionError, match=r"(?s)ir/kernel: missing.*hz/kernel: missing"):
        tg.from_flax("GRUCell", params)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (None, "params: expected arrays by name, got NoneType"),
        ([1], "params: expected arrays by name, got list"),
        ({1: gru_params()}, "params: expected names, got the key 1"),
        (
            {"lower": gru_params(), "upper": gru_params()},
            "params: expected those of one cell, got parameters below 'lower', 'upper'; give one",
        ),
        ({**gru_params(), "more": {"ir": {"kernel": np.zeros((3, 4))}}}, "got parameters below '', 'more'"),
        (
            {**gru_params(), "ir": {"kernel": np.zeros((0, 4))}},
            "ir/kernel: expected (I, H), none of them 0, got (0, 4)",
        ),
    ],
)
def test_params_of_another_kind_say_so(params, words):
    """Of two cells the one found last would win."""
    with pytest.raises(tg.ConversionError) as error:
        tg.from_flax("GRUCell", params)
    assert words in str(error.value)
    assert "(1, " not in str(error.value)
