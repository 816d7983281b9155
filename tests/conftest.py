# SPDX-License-Identifier: Apache-2.0
"""The tests run in one process per core, so each keeps to one thread unless it is about threads."""

import os

# Triton reads this when it is first imported, by whatever test comes first: its interpreter runs the GPU kernels here.
os.environ["TRITON_INTERPRET"] = "1"

import torch

torch.set_num_threads(1)
