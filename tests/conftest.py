# SPDX-License-Identifier: Apache-2.0
"""The tests run in one process per core, so each keeps to one thread unless it is about threads."""

import torch

torch.set_num_threads(1)
