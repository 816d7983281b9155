# SPDX-License-Identifier: Apache-2.0
"""tidegate: fast, complete recurrent layers for PyTorch."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

from tidegate.accelerate import accelerate, report, restore
from tidegate.backends import backend, trace
from tidegate.errors import ConversionError, UnsupportedError
from tidegate.explain import explain
from tidegate.kernels.cpu import release_memory
from tidegate.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, Recurrent, RNNCell, dynamic_rnn, tbptt
from tidegate.streaming import Stream

if TYPE_CHECKING:
    from tidegate import convert
    from tidegate.convert import from_flax, from_keras, from_onnx, from_tf1, to_onnx
    from tidegate.export import export_c, export_rtneural
    from tidegate.inspection import inspect
    from tidegate.quantizing import quantize

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ConversionError",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "Stream",
    "UnsupportedError",
    "accelerate",
    "backend",
    "convert",
    "dynamic_rnn",
    "explain",
    "export_c",
    "export_rtneural",
    "from_flax",
    "from_keras",
    "from_onnx",
    "from_tf1",
    "inspect",
    "quantize",
    "release_memory",
    "report",
    "restore",
    "tbptt",
    "to_onnx",
    "trace",
]


def __getattr__(name: str) -> _Any:
    """What is not needed to run, loaded at first use: the ways in and out, and a look inside."""
    if name == "convert":
        return _import_module("tidegate.convert")
    if name in ("from_flax", "from_keras", "from_onnx", "from_tf1", "to_onnx"):
        return getattr(_import_module("tidegate.convert"), name)
    if name in ("export_c", "export_rtneural"):
        return getattr(_import_module("tidegate.export"), name)
    if name == "inspect":
        return _import_module("tidegate.inspection").inspect
    if name == "quantize":
        return _import_module("tidegate.quantizing").quantize
    raise AttributeError(f"module 'tidegate' has no attribute {name!r}")
