# SPDX-License-Identifier: Apache-2.0
"""The cells whose matrices are stored in fewer bits: the same equations, other parameters.

int8: each matrix (rows, columns) is int8, and `scale_ih`, `scale_hh` and a projection's `scale_hr` (rows) are float32
beside it; `quantization.py` has the arithmetic. bfloat16: the numbers are widened before they are multiplied. Inputs,
states, biases and all sums are float32.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tidegate.cell import CELLS, Cell, Options, Parameter, States, Weights
from tidegate.quantization import Quantized

STORAGES = ("int8", "bfloat16")
DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16}


def read_storage(weights: object) -> str:
    """The argument `weights` of what makes such modules."""
    if weights not in STORAGES:
        raise ValueError(f"weights: expected {' or '.join(map(repr, STORAGES))}, got {weights!r}")
    return weights


def stored(name: str, storage: str) -> Cell:
    """The cell `name`, "gru" say, with its matrices as `storage` says: "gru_int8"."""
    return _STORED[name, storage]


def _made(cell: Cell, storage: str) -> Cell:
    matrices = [name for name, parameter in cell.parameters.items() if len(parameter.shape) == 2]
    parameters = dict(cell.parameters)
    for name in matrices:
        shape, when, _ = parameters[name]
        parameters[name] = Parameter(shape, when, DTYPES[storage])
        if storage == "int8":
            parameters[scale_of(name)] = Parameter(shape[:1], when, torch.float32)

    def read_weights(weights: Weights) -> Weights:
        if storage != "int8":
            return weights
        found = {n: Quantized(weights[n], weights[scale_of(n)]) for n in matrices if weights[n] is not None}
        return weights | found

    def step(gates_x: Tensor, states: States, weights: Weights, options: Options) -> States:
        return cell.step(gates_x, states, read_weights(weights), options)

    return dataclasses.replace(
        cell,
        name=f"{cell.name}_{storage}",
        parameters=parameters,
        step=step,
        storage=storage,
        read_weights=read_weights,
    )


def scale_of(matrix: str) -> str:
    """Of "weight_ih" or "weight_ih_l0" the name of its scales."""
    return matrix.replace("weight_", "scale_", 1)


_STORED = {(cell.name, storage): _made(cell, storage) for cell in CELLS for storage in STORAGES}
