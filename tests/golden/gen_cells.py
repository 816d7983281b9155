# SPDX-License-Identifier: Apache-2.0
"""Makes cells.npz: what packages too large for `make test-peers` compute of the ready cells, in float64.

    python gen_cells.py tensorflow_addons   # with tensorflow-cpu 2.14, tensorflow-addons 0.23
    python gen_cells.py sheeprl             # with torch and sheeprl 0.8
    python gen_cells.py speechbrain         # with torch and speechbrain 1.1

Each adds its cases to the file, or replaces them. Of sheeprl and speechbrain a cell alone is loaded, not all that their
packages import.
"""

import importlib.metadata
import json
import sys
import types
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "cells.npz"
T, B, I, H = 6, 3, 4, 5  # noqa: E741


def tensorflow_addons(draw):
    import tensorflow as tf
    import tensorflow_addons as tfa

    tf.keras.backend.set_floatx("float64")
    cell = tfa.rnn.LayerNormLSTMCell(H)
    layer = tf.keras.layers.RNN(cell, return_sequences=True, return_state=True)
    x, init = tf.constant(draw(B, T, I)), [tf.constant(draw(B, H)) for _ in range(2)]
    layer(x)
    for weight in layer.weights:
        weight.assign(draw(*weight.shape))
    with tf.GradientTape() as tape:
        tape.watch([x, *init])
        output, *final = layer(x, initial_state=init)
        cotangents = [draw(*part.shape) for part in (output, *final)]
        loss = sum(tf.reduce_sum(part * w) for part, w in zip((output, *final), cotangents, strict=True))
    names = ["/".join(weight.name.removesuffix(":0").split("/")[-2:]) for weight in layer.weights]
    leaves = {"x": x, "init/h": init[0], "init/c": init[1]} | {
        f"w/{name}": weight for name, weight in zip(names, layer.weights, strict=True)
    }
    gradients = tape.gradient(loss, list(leaves.values()))
    case = {name: np.asarray(value) for name, value in leaves.items()}
    case |= {f"g/{name}": np.asarray(value) for name, value in zip(leaves, gradients, strict=True)}
    for name, value, w in zip(("out", "state/h", "state/c"), (output, *final), cotangents, strict=True):
        case[name], case[f"R/{name}"] = np.asarray(value), w
    return {"tensorflow_addons.lstm": case}


def sheeprl(draw):
    import torch

    package = types.ModuleType("sheeprl")
    package.__path__ = [str(importlib.metadata.distribution("sheeprl").locate_file("sheeprl"))]
    sys.modules["sheeprl"] = package
    from sheeprl.models.models import LayerNormGRUCell

    cases = {}
    for bias in (False, True):
        norm = {"layer_norm_cls": torch.nn.LayerNorm, "layer_norm_kw": {"eps": 1e-3}}
        cell = LayerNormGRUCell(I, H, bias=bias, **norm).double()

        def run(x, h, cell=cell):
            outputs = []
            for x_t in x:
                h = cell(x_t, h)
                outputs.append(h)
            return torch.stack(outputs), h

        cases[f"sheeprl.gru{'.bias' * bias}"] = with_torch(draw, cell, run)
    return cases


def speechbrain(draw):
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    from speechbrain.nnet.RNN import LiGRU_Layer

    cell = LiGRU_Layer(I, H, 1, B, normalization="layernorm").double().eval()

    def run(x, h):
        output = cell(x.transpose(0, 1), h).transpose(0, 1)
        return output, output[-1]

    return {"speechbrain.ligru": with_torch(draw, cell, run)}


def with_torch(draw, cell, run):
    """A case of a cell with one state."""
    import torch

    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.copy_(torch.from_numpy(draw(*parameter.shape)))
    x, h = (torch.from_numpy(draw(*shape)).requires_grad_() for shape in ((T, B, I), (B, H)))
    output, final = run(x, h)
    cotangents = [torch.from_numpy(draw(*part.shape)) for part in (output, final)]
    leaves = {"x": x, "init/h": h} | {f"w/{name}": value for name, value in cell.named_parameters()}
    loss = (output * cotangents[0]).sum() + (final * cotangents[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    case = {name: value.detach().numpy() for name, value in leaves.items()}
    case |= {f"g/{name}": value.numpy() for name, value in zip(leaves, gradients, strict=True)}
    for name, value, w in zip(("out", "state/h"), (output, final), cotangents, strict=True):
        case[name], case[f"R/{name}"] = value.detach().numpy(), w.numpy()
    return case


def main(framework):
    generator = np.random.default_rng(sum(map(ord, framework)))
    made = globals()[framework](lambda *shape: generator.standard_normal(shape))
    arrays = {}
    if FILE.exists():
        with np.load(FILE) as file:
            data = file["data_float64"]
            for key, _, shape, place in json.loads(file["index"].tobytes()):
                if key.split("/")[0] not in made:
                    arrays[key] = data[place : place + int(np.prod(shape))].reshape(shape)
    arrays |= {f"{case}/{name}": value for case, named in made.items() for name, value in named.items()}
    index, place = [], 0
    for key, value in arrays.items():
        index.append([key, "float64", list(value.shape), place])
        place += value.size
    text = np.frombuffer(json.dumps(index, separators=(",", ":")).encode(), np.uint8)
    np.savez_compressed(FILE, index=text, data_float64=np.concatenate([value.ravel() for value in arrays.values()]))
    print(f"{len(made)} cases of {framework}, {len(arrays)} arrays in all")


if __name__ == "__main__":
    main(sys.argv[1])
