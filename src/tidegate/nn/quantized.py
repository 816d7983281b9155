# SPDX-License-Identifier: Apache-2.0
"""Layers and cells for inference, their matrices stored as int8 with a scale for each row, or as bfloat16.

What they take and give is what the float32 modules that they are made from do; `quantization.py` has the arithmetic.
Letters as in layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidegate import cell as kinds
from tidegate import ops
from tidegate.cell import Cell
from tidegate.nn import known_cells
from tidegate.nn.cells import RecurrentCell
from tidegate.nn.layers import RecurrentLayer
from tidegate.nn.options import Device, Extended, Plan
from tidegate.quantization import Quantized, quantize_rows
from tidegate.storage import STORAGES, read_storage, scale_of, stored

for _cell in kinds.CELLS:
    for _storage in STORAGES:
        ops.register(stored(_cell.name, _storage))


class _Cell:
    """The attribute `cell` of the modules: by how the weights are stored, of the class itself the float one.

    mypy does not let a descriptor stand where the base class declares a plain attribute, hence `type: ignore` below.
    """

    def __init__(self, cell: Cell) -> None:
        self.plain = cell

    def __get__(self, module: Any, owner: type) -> Cell:
        return self.plain if module is None else stored(self.plain.name, module.weights)


class Note(NamedTuple):
    """What a module was made from.

    Attributes:
        bytes: of its weights.
        difference: between the outputs of the model before and after, on an example; None without one.
    """

    bytes: int
    difference: float | None = None


class Stored(Extended):
    """What a layer and a cell with stored weights have in common: buffers in place of parameters, and no gradients.

    Attributes:
        weights: "int8" or "bfloat16".
        made_from: None if it was made empty.
    """

    weights: str
    made_from: Note | None = None

    def train(self, mode: bool = True) -> Any:
        """Raise RuntimeError: it is for inference. `train(False)`, which is `eval()`, changes nothing."""
        if mode:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}: its weights are {self.weights}, for inference alone; train the model that it was made from, "
                "and quantize it again"
            )
        return super().train(False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights}"

    @property
    def bytes(self) -> int:
        """Of all its weights, scales and biases."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _declare_buffers(self, device: Device) -> None:
        """Buffers in place of the parameters that the cell's declaration made, on the meta device."""
        shapes = {name: None if parameter is None else parameter.shape for name, parameter in self._parameters.items()}
        self._parameters.clear()
        for name, shape in shapes.items():
            dtype = self.cell.parameters[name.split("_l")[0]].dtype or torch.float32
            made = None if shape is None else torch.zeros(shape, dtype=dtype, device=device)
            self.register_buffer(name, made)

    def _take(self, weights: dict[str, Tensor | Quantized]) -> None:
        """Store the weights of another module, by their names there: matrices in float or int8 rows, and biases."""
        with torch.inference_mode(False), torch.no_grad():
            for name, weight in weights.items():
                if isinstance(weight, Tensor) and (weight.dim() == 1 or self.weights != "int8"):
                    self.get_buffer(name).copy_(weight)
                    continue
                rows = quantize_rows(weight) if isinstance(weight, Tensor) else weight
                self.get_buffer(name).copy_(rows.numbers)
                self.get_buffer(scale_of(name)).copy_(rows.scales)

    def _read_tensors(self, plan: Plan) -> tuple[Tensor | None, ...]:
        found: Any = self._buffers
        present = plan.read(found)
        if plan.places is None:
            return present + plan.absent
        return tuple([None if place < 0 else present[place] for place in plan.places])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to another device. The dtypes are what the storage says, and stay."""

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: object,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As torch's; but what is of another dtype is refused, where torch would cut float weights to integers."""
        refused: list[str] = []
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if buffer is not None and isinstance(given, Tensor) and given.dtype != buffer.dtype:
                refused.append(
                    f"{prefix + name}: expected {buffer.dtype}, got {given.dtype}; load float weights into the float "
                    "model, then quantize it"
                )
        if refused:
            error_msgs += refused
            return
        keys = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *keys)


class QuantizedLayer(Stored, RecurrentLayer):
    """Layers of one cell over sequences, their matrices stored: for inference.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional, proj_size, device, reverse: as
            RecurrentLayer takes them.
        weights: "int8" or "bfloat16".
        options: the cell's options, by name.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        weights: str = "int8",
        device: Device = None,
        reverse: bool = False,
        **options: Any,
    ) -> None:
        vars(self)["weights"] = read_storage(weights)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, 0.0, bidirectional, proj_size, device,
            reverse=reverse, **options,
        )  # fmt: skip
        self.eval()

    def _declare(self, device: Device, dtype: torch.dtype | None) -> None:
        super()._declare("meta", dtype)
        self._declare_buffers(device)

    def reset_parameters(self) -> None:
        """There are none."""

    def _first_weight(self) -> Tensor:
        """What stands for the dtype in which it computes."""
        weight = self.get_buffer(self._flat_weights_names[0])
        return weight.new_empty(0, dtype=torch.float32)


class QuantizedCell(Stored, RecurrentCell):
    """One step of a cell, its matrices stored: for inference.

    Args:
        input_size, hidden_size, bias, device: as RecurrentCell takes them.
        weights: "int8" or "bfloat16".
        options: the cell's options, by name; `proj_size` and the flags of its optional parameters.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        weights: str = "int8",
        device: Device = None,
        **options: Any,
    ) -> None:
        vars(self)["weights"] = read_storage(weights)
        super().__init__(input_size, hidden_size, bias, device, **options)
        self.eval()

    def _declare(self, device: Device, dtype: torch.dtype | None) -> None:
        super()._declare("meta", dtype)
        self._declare_buffers(device)


class QuantizedRNN(QuantizedLayer):
    """RNN with stored weights; its option `nonlinearity` is a name in tidegate.activations."""

    cell = _Cell(kinds.RNN)  # type: ignore[assignment]
    _stands_for = torch.nn.RNN


class QuantizedLSTM(QuantizedLayer):
    """LSTM with stored weights."""

    cell = _Cell(kinds.LSTM)  # type: ignore[assignment]
    _stands_for = torch.nn.LSTM
    peepholes: bool = False
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    # Of two states, where the base class's are of one: to mypy another type, in torch.nn.LSTM as well.
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]


class QuantizedGRU(QuantizedLayer):
    """GRU with stored weights."""

    cell = _Cell(kinds.GRU)  # type: ignore[assignment]
    _stands_for = torch.nn.GRU


class QuantizedRNNCell(QuantizedCell, torch.nn.RNNCell):
    """RNNCell with stored weights; its option `nonlinearity` is a name in tidegate.activations."""

    cell = _Cell(kinds.RNN)  # type: ignore[assignment]


class QuantizedLSTMCell(QuantizedCell, torch.nn.LSTMCell):
    """LSTMCell with stored weights."""

    cell = _Cell(kinds.LSTM)  # type: ignore[assignment]
    peepholes: bool = False


class QuantizedGRUCell(QuantizedCell, torch.nn.GRUCell):
    """GRUCell with stored weights."""

    cell = _Cell(kinds.GRU)  # type: ignore[assignment]


for _class in (QuantizedRNNCell, QuantizedLSTMCell, QuantizedGRUCell):
    known_cells.add(_class)
