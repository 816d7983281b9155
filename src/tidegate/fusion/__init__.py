# SPDX-License-Identifier: Apache-2.0
"""Any cell as one fused loop: its step traced, sorted, lowered to a program, and run with its gradients.

`trace.py` makes a graph of the step; `rows.py` says where rows are in it; `lower.py` sorts it and lowers the loop to a
`program.py`; `derive.py` gives the program of the gradients; `loop.py` is the operator that runs programs; `plan.py`
puts them together, and `planning.py` does so once for each cell, structure and size.
"""

from tidegate.fusion.planning import explain, run

__all__ = ["explain", "run"]
