# SPDX-License-Identifier: Apache-2.0
"""A trained model out of Python: one step as self-contained C, its state explicit.

`step.py` makes one step of a model, with `sites.py` standing where it keeps a past; `compile.py` lowers it by `fusion`
to a program and holds it against the model; `faults.py` says which module is not what its steps are. The rest is a
backend of that program: `passes.py` splits it where states run from the end, `rewrite.py` takes it apart for C,
`stages.py` says what shares a loop and where values are, `products.py` how matrices lie, `constants.py` where numbers
are, `source.py` and `loops.py` write a step, `templates.py` the files around it, `folder.py` puts them in their place;
`runtime/` is C. `rtneural.py` writes RTNeural's JSON instead.
"""

from tidegate.export.files import export_c
from tidegate.export.rtneural import export_rtneural

__all__ = ["export_c", "export_rtneural"]
