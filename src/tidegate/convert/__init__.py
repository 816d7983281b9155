# SPDX-License-Identifier: Apache-2.0
"""Weights and meanings from TensorFlow v1, Keras 3, Flax and ONNX, and back to ONNX.

A converter reads arrays, names and options; it imports none of these frameworks. Files are read by h5py and onnx.
"""

from tidegate.convert.canonical import as_layer
from tidegate.convert.flax import from_flax
from tidegate.convert.keras import from_keras
from tidegate.convert.keras_call import keras_call
from tidegate.convert.onnx_export import onnx_translations
from tidegate.convert.onnx_read import from_onnx
from tidegate.convert.onnx_write import to_onnx
from tidegate.convert.store import load, save
from tidegate.convert.tf1 import from_tf1
from tidegate.convert.torch_file import from_torch_file

__all__ = [
    "as_layer",
    "from_flax",
    "from_keras",
    "from_onnx",
    "from_tf1",
    "from_torch_file",
    "keras_call",
    "load",
    "onnx_translations",
    "save",
    "to_onnx",
]
