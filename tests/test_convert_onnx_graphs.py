# SPDX-License-Identifier: Apache-2.0
"""from_onnx of what stands around a node: Transposes, stacks, branches, constants that are moved, states that are held.

The numbers are onnxruntime's and torch.nn's. Letters: T steps, B rows, I input_size, H hidden_size.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import tidegate as tg

STEPS, ROWS, INPUTS, HIDDEN = 5, 2, 3, 4
quick = settings(max_examples=40, deadline=None)


def run(model: Any, **feed: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in feed.items()})


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found.detach()), np.asarray(expected), rtol=0, atol=2e-6)


def arrays(kind: str = "LSTM", seed: int = 0, inputs: int = INPUTS, directions: int = 1) -> dict[str, Any]:
    rows = {"RNN": 1, "GRU": 3, "LSTM": 4}[kind] * HIDDEN
    rng = np.random.default_rng(seed)
    shapes = {"W": (directions, rows, inputs), "R": (directions, rows, HIDDEN), "B": (directions, 2 * rows)}
    return {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()}


def ints(name: str, *values: int) -> Any:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    """`inputs` and `output` are names with blanks between; a dash stands for an input that is left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, output.split(), name=output.split()[0], **attributes)


def model(nodes: list[Any], held: dict[str, Any], *, functions: Any = (), opset: int = 17, **shapes: Any) -> Any:
    """A model with inputs `shapes` and the output y; `held` are its initializers, arrays or lists of int64."""
    constants = [
        ints(name, *value) if isinstance(value, list) else numpy_helper.from_array(value, name)
        for name, value in held.items()
    ]
    kinds = {"condition": TensorProto.BOOL, "count": TensorProto.INT64, "lens": TensorProto.INT32}
    inputs = [
        helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape) for name, shape in shapes.items()
    ]
    graph = helper.make_graph(
        nodes, "graph", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


def lstm(x: str = "x", y: str = "Y", weights: str = "W R B", **attributes: Any) -> Any:
    return node("LSTM", f"{x} {weights}", y, hidden_size=HIDDEN, **attributes)


def sequence(batch_first: bool = False, size: int = INPUTS) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*((ROWS, STEPS) if batch_first else (STEPS, ROWS)), size)


# What the two formats share: numbers that are exact in float32, as ONNX's attributes are.
@st.composite
def layers(draw: st.DrawFn) -> torch.nn.Module:
    kind = draw(st.sampled_from(["RNN", "LSTM", "GRU"]))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "clip": draw(st.sampled_from([None, 0.5])),
    }
    if not options["bidirectional"]:
        options["reverse"] = draw(st.booleans())
    one = st.sampled_from(["tanh", "relu", "sigmoid", "softsign", "affine(0.5,0.25)", "elu(0.5)", "hard_sigmoid"])
    roles = {"RNN": 1, "GRU": 2, "LSTM": 3}[kind]
    if draw(st.booleans()):
        options["activations"] = ",".join(draw(st.lists(one, min_size=roles, max_size=roles)))
    if kind == "GRU":
        options["reset_after"] = draw(st.booleans())
    if kind == "LSTM":
        options |= {"coupled": draw(st.booleans()), "peepholes": draw(st.booleans())}
    torch.manual_seed(0)
    return getattr(tg, kind)(draw(st.integers(1, 4)), draw(st.integers(1, 4)), **options)


@settings(quick, max_examples=150)
@given(layers(), st.booleans(), st.booleans(), st.booleans())
def test_a_layer_comes_back_as_it_was(layer, lengths, states, fixed):
    sizes = {"batch_size": ROWS, "steps": STEPS} if fixed else {}
    back = tg.from_onnx(tg.to_onnx(layer, lengths=lengths, states=states, **sizes))
    assert repr(back) == repr(layer)
    x = sequence(layer.batch_first, layer.input_size)
    given = {"lengths": [STEPS, 2]} if lengths else {}
    for found, expected in zip(flat(back(x, **given)), flat(layer(x, **given)), strict=True):
        assert torch.equal(found, expected)


def flat(results: Any) -> list[torch.Tensor]:
    output, final = results
    return [output, *(final if isinstance(final, tuple) else (final,))]


class Torchs(torch.nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(torch.nn, kind)(INPUTS, HIDDEN, **options)
        self.linear = torch.nn.Linear(HIDDEN * (2 if self.layer.bidirectional else 1), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.layer(x)[0])


# The exporter's own warnings are not ours to judge.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torchs_exporter_and_back(batch_first, bidirectional, dynamic):
    """A computed Reshape stands between its nodes where sizes are dynamic."""
    torch.manual_seed(0)
    theirs = Torchs("LSTM", num_layers=2, batch_first=batch_first, bidirectional=bidirectional).eval()
    x = sequence(batch_first)
    dims = {0: torch.export.Dim("first"), 1: torch.export.Dim("second")} if dynamic else None
    program = torch.onnx.export(theirs, (x,), dynamo=True, verbose=False, dynamic_shapes=(dims,))
    written = program.model_proto
    names = [n.name for n in written.graph.node if n.op_type == "LSTM"]
    assert len(names) == 2
    layer = tg.from_onnx(written)
    assert layer.batch_first == batch_first
    close(layer(x)[0], theirs.layer(x)[0].detach())
    # One by one, each takes the layout of the stack that it stands in.
    apart = [tg.from_onnx(written, name) for name in names]
    close(apart[1](apart[0](x)[0])[0], theirs.layer(x)[0].detach())


SWAP = [1, 0, 2]


@pytest.mark.parametrize("kept", [[], [node("Identity", "given", "kept")], [node("Relu", "given", "kept")]])
@pytest.mark.parametrize("reshape", [False, True])
def test_transposes_around_a_node_make_it_batch_first(kept, reshape):
    nodes = [*kept, node("Transpose", "kept" if kept else "given", "x", perm=SWAP), lstm()]
    nodes.append(node("Reshape", "Y shape", "z") if reshape else node("Squeeze", "Y one", "z"))
    nodes.append(node("Transpose", "z", "y", perm=SWAP))
    built = model(nodes, {**arrays(), "one": [1], "shape": [0, -1, HIDDEN]}, given=("b", "t", INPUTS))
    layer = tg.from_onnx(built)
    assert layer.batch_first
    x = sequence(True)
    if kept and kept[0].op_type == "Relu":
        x = x.relu()
    close(layer(x)[0], run(built, given=x)[0])


def test_a_channels_first_input_comes_rows_first():
    nodes = [
        node("Transpose", "given", "x", perm=[2, 0, 1]),
        lstm(),
        node("Squeeze", "Y one", "z"),
        node("Transpose", "z", "y", perm=SWAP),
    ]
    built = model(nodes, {**arrays(), "one": [1]}, given=("b", INPUTS, "t"))
    layer, x = tg.from_onnx(built), sequence(True)
    assert layer.batch_first
    close(layer(x)[0], run(built, given=x.transpose(1, 2))[0])


def test_a_node_whose_state_alone_is_used_goes_by_its_input():
    nodes = [node("Transpose", "given", "x", perm=SWAP), lstm(y="- h c"), node("Squeeze", "h zero", "y")]
    nodes[1].output[0] = ""
    built = model(nodes, {**arrays(), "zero": [0]}, given=("b", "t", INPUTS))
    layer, x = tg.from_onnx(built), sequence(True)
    assert layer.batch_first
    close(layer(x)[1][0][0], run(built, given=x)[0])


@pytest.mark.parametrize("swapped", ["input", "output"])
def test_a_node_that_is_turned_on_one_side_alone_needs_to_be_told(swapped):
    before = [node("Transpose", "given", "x", perm=SWAP)] if swapped == "input" else [node("Identity", "given", "x")]
    after = [node("Transpose", "z", "y", perm=SWAP)] if swapped == "output" else [node("Identity", "z", "y")]
    built = model(
        [*before, lstm(), node("Squeeze", "Y one", "z"), *after], {**arrays(), "one": [1]}, given=("a", "b", INPUTS)
    )
    with pytest.raises(tg.ConversionError, match=r"Y: its input comes as \(., ., \.\.\.\), its output goes on as"):
        tg.from_onnx(built)
    for batch_first in (False, True):
        layer, x = tg.from_onnx(built, batch_first=batch_first), sequence(batch_first)
        assert layer.batch_first == batch_first
        expected = run(built, given=x.transpose(0, 1) if batch_first == (swapped == "output") else x)[0]
        turned = torch.tensor(expected)
        close(layer(x)[0], turned.transpose(0, 1) if batch_first == (swapped == "input") else turned)


def test_an_output_that_is_reshaped_out_of_sight_needs_to_be_told():
    nodes = [lstm("given"), node("Reshape", "Y shape", "z"), node("Transpose", "z", "y", perm=SWAP)]
    built = model(nodes, arrays(), given=("t", "b", INPUTS), shape=(3,))
    built.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(tg.ConversionError, match="goes on in an order that cannot be read"):
        tg.from_onnx(built)
    assert not tg.from_onnx(built, batch_first=False).batch_first


def stack(between: list[Any], lens: tuple[str, str] = ("", "")) -> Any:
    weights = {
        f"{key}{k}": v for k, size in ((0, INPUTS), (1, HIDDEN)) for key, v in arrays(seed=k, inputs=size).items()
    }
    given = {"lens": ("b",)} if any(lens) else {}
    nodes = [
        lstm("given", "Y0", f"W0 R0 B0 {lens[0]}"),
        node("Squeeze", "Y0 one", "s"),
        *between,
        lstm("m", "Y1", f"W1 R1 B1 {lens[1]}"),
        node("Squeeze", "Y1 one", "y"),
    ]
    return model(nodes, {**weights, "one": [1]}, given=("t", "b", INPUTS), **given)


def test_a_stack_is_one_only_if_nothing_is_turned_in_between():
    twice = [node("Transpose", "s", "u", perm=SWAP), node("Transpose", "u", "m", perm=SWAP)]
    built = stack(twice)
    layer, x = tg.from_onnx(built), sequence()
    assert layer.num_layers == 2
    close(layer(x)[0], run(built, given=x)[0])
    # Rows taken for steps: the shapes are right and the numbers are not a stack's.
    with pytest.raises(tg.ConversionError, match="Y1 is not fed by Y0 as it is, rows and steps at their places"):
        tg.from_onnx(stack([node("Transpose", "s", "m", perm=SWAP)]))
    with pytest.raises(tg.ConversionError, match="Y1 is not fed by Y0"):
        tg.from_onnx(stack([node("Relu", "s", "m")]))


def test_a_stack_has_lengths_throughout_or_nowhere():
    same = [node("Identity", "s", "m")]
    assert tg.from_onnx(stack(same, ("lens", "lens"))).num_layers == 2
    with pytest.raises(tg.ConversionError, match="one has an input sequence_lens and one has none"):
        tg.from_onnx(stack(same, ("lens", "")))


def branches(names: tuple[str, str] = ("first", "second"), twins: bool = False) -> Any:
    """LSTMs in both branches of an If, weights outside; or in one alone, in an If inside the If."""
    held = {f"{key}{k}": value for k in (0, 1) for key, value in arrays(seed=k).items()}
    inner: list[Any] = []
    for k, name in enumerate(names):
        nodes = [lstm("x", f"Y_{k}", f"W{k} R{k} B{k}"), node("Squeeze", f"Y_{k} one", f"z_{k}")]
        nodes[0].name = name
        if not name:
            nodes = [node("Expand", "nothing size", f"z_{k}")]
        graph = helper.make_graph(
            nodes, "branch", [], [helper.make_tensor_value_info(f"z_{k}", TensorProto.FLOAT, None)]
        )
        inner.append(graph)
    choice = helper.make_node("If", ["condition"], ["z"], "choice", then_branch=inner[0], else_branch=inner[1])
    nodes = [node("Transpose", "given", "x", perm=SWAP), choice, node("Transpose", "z", "y", perm=SWAP)]
    held |= {"one": [1], "nothing": np.zeros((1, 1, 1), "f"), "size": [STEPS, ROWS, HIDDEN]}
    return model(nodes, held, given=("b", "t", INPUTS), condition=())


def test_nodes_in_branches_are_found_by_name():
    built, x = branches(), sequence(True)
    with pytest.raises(tg.ConversionError) as error:
        tg.from_onnx(built)
    for words in ("several nodes, not all of them in the main graph: choose one by node=", "choice.then_branch/first"):
        assert words in str(error.value)
    for name, taken in (("first", True), ("second", False), ("choice.else_branch/second", False), ("Y_0", True)):
        layer = tg.from_onnx(built, name)
        # The Transposes stand outside the branch.
        assert layer.batch_first
        close(layer(x)[0], run(built, given=x, condition=taken)[0])


def test_the_only_node_is_found_wherever_it_stands():
    built, x = branches(("alone", "")), sequence(True)
    close(tg.from_onnx(built)(x)[0], run(built, given=x, condition=True)[0])


def test_nodes_of_one_name_are_told_apart_by_their_place():
    built, x = branches(("same", "same")), sequence(True)
    with pytest.raises(tg.ConversionError, match=r"more than one; .* choice.else_branch/same \(LSTM\), choice.then_"):
        tg.from_onnx(built, "same")
    close(tg.from_onnx(built, "choice.else_branch/same")(x)[0], run(built, given=x, condition=False)[0])


def test_a_node_in_a_loop_is_found():
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [lstm("x", "Y"), node("Squeeze", "Y one", "z"), node("Identity", "go", "on")],
        "body",
        [info("k", TensorProto.INT64, ()), info("go", TensorProto.BOOL, ())],
        [info("on", TensorProto.BOOL, ()), info("z", TensorProto.FLOAT, None)],
    )
    loop = helper.make_node("Loop", ["count", ""], ["y"], "loop", body=body)
    built = model([loop], {**arrays(), "one": [1]}, x=("t", "b", INPUTS), count=())
    x = sequence()
    close(tg.from_onnx(built, "loop.body/Y")(x)[0], run(built, x=x, count=1)[0][0])


def function(nodes: list[Any], inputs: list[str], attributes: tuple[str, ...] = ()) -> Any:
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_function("own", "Block", inputs, ["out"], nodes, opsets, attributes)


def test_a_node_in_a_local_function_is_read_or_the_fault_says_to_inline_it():
    weights = arrays()
    held = [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(weights[name])) for name in "WRB"]
    ends = [helper.make_node("Constant", [], ["one"], value_ints=[1]), node("Squeeze", "Y one", "out")]
    call = helper.make_node("Block", ["x"], ["y"], "call", domain="own")
    built = model([call], {}, functions=[function([*held, lstm("a"), *ends], ["a"])], x=("t", "b", INPUTS))
    x = sequence()
    close(tg.from_onnx(built)(x)[0], run(built, x=x)[0])

    call = helper.make_node("Block", ["x", "W", "R"], ["y"], "call", domain="own", way="reverse")
    inner = node("LSTM", "a w r", "Y", hidden_size=HIDDEN)
    way = onnx.AttributeProto(name="direction", ref_attr_name="way", type=onnx.AttributeProto.STRING)
    inner.attribute.append(way)
    built = model([call], weights, functions=[function([inner, *ends], ["a", "w", "r"], ("way",))], x=("t", "b", 3))
    with pytest.raises(tg.ConversionError) as error:
        tg.from_onnx(built)
    for words in ("function own.Block/Y: W = 'w' is no constant", "direction is the function's attribute 'way'"):
        assert words in str(error.value)
    inlined = onnx.inliner.inline_local_functions(built)
    close(tg.from_onnx(inlined)(x)[0], run(built, x=x)[0])


def test_operators_that_look_like_one_are_named():
    quantized = helper.make_node("DynamicQuantizeLSTM", ["x"], ["y"], "quick", domain="com.microsoft")
    with pytest.raises(tg.ConversionError, match=r"not read: quick \(DynamicQuantizeLSTM\)"):
        tg.from_onnx(model([quantized], {}, x=("t", "b", INPUTS)))


MAX = np.iinfo(np.int64).max
MOVES = {
    "slice-no-axes": ([node("Slice", "big starts ends", "W")], {"starts": [0, 1], "ends": [1, 17]}),
    "slice-dash-axes": ([node("Slice", "big starts ends -", "W")], {"starts": [0, 1], "ends": [1, 17]}),
    "slice-dash-axes-steps": (
        [node("Slice", "big starts ends - steps", "W")],
        {"starts": [0, -2], "ends": [1, 0], "steps": [1, -1]},
    ),
    "slice-dash-steps": ([node("Slice", "big starts ends axes -", "W")], {"starts": [1], "ends": [-1], "axes": [-2]}),
    "slice-to-the-end": (
        [node("Slice", "big starts ends axes", "W")],
        {"starts": [-16], "ends": [MAX], "axes": [1]},
    ),
    "slice-backwards": (
        [node("Slice", "big starts ends axes steps", "W")],
        {"starts": [15], "ends": [-MAX], "axes": [1], "steps": [-1]},
    ),
    "squeeze-all": ([node("Squeeze", "many", "two"), node("Unsqueeze", "two zero", "W")], {"zero": [0]}),
    "reshape": ([node("Reshape", "many shape", "W")], {"shape": [0, -1, INPUTS]}),
    "reshape-allowzero": ([node("Reshape", "many shape", "W", allowzero=1)], {"shape": [1, -1, INPUTS]}),
    "gather": ([node("Gather", "big rows", "W", axis=1)], {"rows": [*range(15, -1, -1)]}),
    "transpose": ([node("Transpose", "turned", "W")], {}),
}


@pytest.mark.parametrize("name", MOVES)
def test_weights_that_are_moved_are_what_onnxruntime_makes_of_them(name):
    nodes, numbers = MOVES[name]
    weights = arrays()
    rng = np.random.default_rng(7)
    weights["big"] = rng.normal(size=(1, 18, INPUTS)).astype("f")
    weights["many"] = rng.normal(size=(1, 16, 1, INPUTS)).astype("f")
    weights["turned"] = rng.normal(size=(INPUTS, 16, 1)).astype("f")
    del weights["W"]
    built = model([*nodes, lstm(), node("Squeeze", "Y one", "y")], {**weights, **numbers, "one": [1]}, x=(5, 2, INPUTS))
    x = sequence()
    close(tg.from_onnx(built)(x)[0], run(built, x=x)[0])


def test_a_squeeze_with_axes_left_out_by_an_empty_name_is_one_without():
    """onnxruntime refuses that, the standard does not."""
    weights = arrays()
    many = weights.pop("W")[:, :, None]
    read = [
        tg.from_onnx(
            model(
                [node("Squeeze", f"many {axes}", "two"), node("Unsqueeze", "two zero", "W"), lstm(y="y")],
                {**weights, "many": many, "zero": [0]},
                x=(5, 2, INPUTS),
            )
        )
        for axes in ("", "-")
    ]
    assert torch.equal(read[0].weight_ih_l0, read[1].weight_ih_l0)


@pytest.mark.parametrize(
    ("nodes", "numbers", "words"),
    [
        ([node("Slice", "big starts -", "W")], {"starts": [0]}, "Slice: ends is left out"),
        ([node("Slice", "big starts ends", "W")], {"starts": [0, 0, 0, 0], "ends": [1, 1, 1, 1]}, "W: Slice: "),
        ([node("Slice", "big starts ends", "W")], {"starts": [0], "ends": [1, 2]}, "Slice: starts [0], ends [1, 2]"),
        ([node("Unsqueeze", "big", "W")], {}, "Unsqueeze: axes is left out"),
        ([node("Gather", "big -", "W")], {}, "Gather: indices are left out"),
        ([node("Reshape", "big", "W")], {}, "Reshape: shape is left out"),
        ([node("Transpose", "-", "W")], {}, "Transpose: its first input is left out"),
        ([node("Concat", "big -", "W", axis=0)], {}, "Concat: expected an axis, and no input left out"),
        ([node("Slice", "big big big", "W")], {}, "Slice: starts: expected integers, got float32"),
    ],
)
def test_moves_that_are_none_say_so(nodes, numbers, words):
    weights = arrays()
    weights["big"] = weights.pop("W")
    with pytest.raises(tg.ConversionError) as error:
        tg.from_onnx(model([*nodes, lstm(y="y")], {**weights, **numbers}, x=(5, 2, INPUTS)))
    assert words in str(error.value)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("how", ["Expand", "ConstantOfShape", "Concat"])
def test_an_initial_state_that_the_model_holds_is_not_lost(how, value):
    """A learned state is a constant that is spread over the rows."""
    filled = np.full((1, 1, HIDDEN), value, "f")
    nodes = {
        "Expand": [node("Expand", "filled size", "h")],
        "ConstantOfShape": [node("ConstantOfShape", "size", "h", value=helper.make_tensor("v", 1, [1], [value]))],
        "Concat": [node("Concat", "filled filled", "h", axis=1)],
    }[how]
    size = [1, ROWS, HIDDEN]
    nodes += [node("LSTM", "x W R B - h h", "Y", hidden_size=HIDDEN), node("Squeeze", "Y one", "y")]
    held = {**arrays(), "filled": filled, "size": size, "one": [1]}
    built = model(nodes, held, x=("t", ROWS, INPUTS))
    x = sequence()
    if value:
        with pytest.raises(tg.ConversionError, match="initial_h is a constant that is not 0"):
            tg.from_onnx(built)
    else:
        close(tg.from_onnx(built)(x)[0], run(built, x=x)[0])


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ({"hidden_size": "four"}, "hidden_size: expected an attribute of type INT, got STRING"),
        ({"hidden_size": -4}, "hidden_size=-4 is not supported"),
        ({"direction": 1}, "direction: expected an attribute of type STRING, got INT"),
        ({"direction": "sideways"}, "direction='sideways'"),
        ({"activations": [1, 2]}, "activations: expected an attribute of type STRINGS, got INTS"),
        ({"clip": [0.5]}, "clip: expected an attribute of type FLOAT, got FLOATS"),
        ({"clip": float("inf")}, "clip=inf"),
        ({"layout": 2}, "layout=2"),
        ({"input_forget": -1}, "input_forget=-1"),
    ],
)
def test_attributes_of_another_type_say_so(attribute, words):
    written = helper.make_node("LSTM", ["x", "W", "R", "B"], ["y"], **attribute)
    with pytest.raises(tg.ConversionError) as error:
        tg.from_onnx(model([written], arrays(), x=(5, 2, INPUTS)))
    assert words in str(error.value)


def test_more_inputs_than_an_operator_has_are_not_dropped():
    held = {**arrays("GRU"), "P": np.zeros((1, 3 * HIDDEN), "f")}
    with pytest.raises(tg.ConversionError, match="expected at most 6 inputs, got 8"):
        tg.from_onnx(model([node("GRU", "x W R B - - - P", "y", hidden_size=HIDDEN)], held, x=(5, 2, INPUTS)))


def test_a_node_without_outputs_or_weights_says_so():
    empty = helper.make_node("GRU", [], [])
    with pytest.raises(tg.ConversionError, match="GRU: W: missing"):
        tg.from_onnx(model([empty], {}, x=(5, 2, INPUTS)))


# A whole model with every kind of part, and what may happen to it.
def whole() -> Any:
    layer = tg.LSTM(
        3, 4, 2, bidirectional=True, batch_first=True, peepholes=True, clip=0.5, activations="elu,tanh,tanh"
    )
    built = tg.to_onnx(layer, lengths=True)
    built.graph.node.insert(0, node("Slice", "W_0 begin_0 end_0 axis_0", "W_part"))
    next(n for n in built.graph.node if n.op_type == "LSTM").input[1] = "W_part"
    return built


WHOLE = whole().SerializeToString()


@settings(quick, max_examples=300)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4), st.floats(0.5, 1))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, changes, share):
    content = bytearray(WHOLE[: int(len(WHOLE) * share) if not changes else len(WHOLE)])
    for place, value in changes:
        content[int(place * len(content))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(bytes(content))
    try:
        tg.from_onnx(path)
    except tg.ConversionError as error:
        assert str(error).startswith("from_onnx(")  # noqa: PT017 - either outcome is right, no other error is


@settings(quick, max_examples=300)
@given(st.data())
def test_a_changed_model_is_read_or_refused(data):
    built = onnx.load_model_from_string(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.sampled_from(["input", "output", "attribute", "tensor", "node", "graph", "op"]))
        chosen = data.draw(st.sampled_from(list(built.graph.node)))
        names = [name for n in built.graph.node for name in (*n.input, *n.output)]
        if what in ("input", "output"):
            field = getattr(chosen, what)
            if field and data.draw(st.booleans()):
                field[data.draw(st.integers(0, len(field) - 1))] = data.draw(st.sampled_from(["", "new", *names]))
            else:
                del field[data.draw(st.integers(0, 3)) :]
        elif what == "attribute" and chosen.attribute:
            attribute = data.draw(st.sampled_from(list(chosen.attribute)))
            value = data.draw(st.sampled_from([0, -1, 7, 0.5, "text", [1, 2], [0.5], ["tanh"], [0, 0, 0]]))
            attribute.CopyFrom(helper.make_attribute(attribute.name, value))
            if data.draw(st.booleans()):
                attribute.type = data.draw(st.integers(0, 14))
        elif what == "tensor":
            tensor = data.draw(st.sampled_from(list(built.graph.initializer)))
            change = data.draw(st.sampled_from(["type", "dims", "rank", "raw", "nan", "empty"]))
            if change == "type":
                tensor.data_type = data.draw(st.integers(0, 30))
            elif change == "dims" and tensor.dims:
                tensor.dims[0] = data.draw(st.sampled_from([-1, 0, 1, 1 << 62]))
            elif change == "rank":
                tensor.dims.append(1)
            elif change == "raw":
                tensor.raw_data = tensor.raw_data[:-1]
            elif change == "nan" and tensor.data_type == TensorProto.FLOAT:
                tensor.raw_data = b"\xff" * len(tensor.raw_data)
            else:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros((0, 3), "f"), tensor.name))
        elif what == "node":
            built.graph.node.remove(chosen)
        elif what == "op":
            chosen.op_type = data.draw(
                st.sampled_from(["LSTM", "GRU", "RNN", "Slice", "Squeeze", "Reshape", "Constant"])
            )
        if not built.graph.node:
            return
    try:
        tg.from_onnx(built)
    except tg.ConversionError as error:
        assert str(error).startswith("from_onnx")  # noqa: PT017 - either outcome is right, no other error is


def test_the_file_of_a_foreign_converter_reads_alike_from_a_path_and_from_a_stream(tmp_path):
    built = branches()
    onnx.save(built, tmp_path / "model.onnx")
    loaded = onnx.load(io.BytesIO(built.SerializeToString()))
    for source in (tmp_path / "model.onnx", loaded):
        assert tg.from_onnx(source, "first").hidden_size == HIDDEN
