# SPDX-License-Identifier: Apache-2.0
"""The demo as one page: a file with everything in it, that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from matplotlib.figure import Figure

import tidegate
from tidegate.cli.demo.training import Run
from tidegate.data import Dataset
from tidegate.inspection import Inspection

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #212529; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
img { max-width: 100%; height: auto }
img.narrow { max-width: min(100%, 620px) }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .3rem 1.2rem .3rem 0; text-align: left; white-space: pre-line }
tr + tr { border-top: 1px solid #dee2e6 }
pre { background: #f8f9fa; padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.35 }
"""

_NAMES = {
    "rnn": "h is the state.",
    "gru": "r lets the old state into the candidate n, z keeps the old state, h is the state.",
    "lstm": "i lets the candidate g into the memory c, f keeps the old memory, o lets it out into the state h.",
}


def write_report(
    path: Path, title: str, table: Sequence[Sequence[str]], pictures: Sequence[Path], run: Run, dataset: Dataset
) -> None:
    """Write the page: the table, whose first row are its heads, the pictures, and one test sequence from inside."""
    label, predicted, length, found = _look_inside(run, dataset)
    classes, meaning = dataset.classes, _NAMES[found.layers[0].name.partition(",")[0]]
    heads, *rows = (_row(row, "th" if k == 0 else "td") for k, row in enumerate(table))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<table>{heads}{''.join(rows)}</table>",
        "<h2>Training, both from the same weights</h2>",
        _image(pictures[0].read_bytes(), "loss and accuracy over the epochs"),
        "<h2>Which classes are taken for which</h2>",
        _image(pictures[1].read_bytes(), "confusion matrix", "narrow"),
        "<h2>Inside: one test sequence</h2>",
        f"<p>The first one, {length} steps of class {escape(classes[label])}, taken for {escape(classes[predicted])}. "
        "Every gate and state of the forward and the reverse direction over time, a line a unit, and how far the "
        f"gradient of the final state reaches back. {meaning} Below, low and high are the shares of "
        "the time that a value is close to its least and its greatest possible one.</p>",
        _image(_png(found.plot()), "gates and states over time"),
        f"<pre>{escape(str(found))}</pre>",
        f"<p>tidegate {tidegate.__version__}, torch {torch.__version__}</p>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _look_inside(run: Run, dataset: Dataset) -> tuple[int, int, int, Inspection]:
    """Of the first test sequence its class, the class that it is taken for, its length, and what happens inside."""
    test = dataset.test
    length = int(test.lengths[0])
    found = tidegate.inspect(run.model.layer, test.padded[:1, :length])
    return int(test.labels[0]), int(run.predict(test)[0]), length, found


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _png(figure: Figure) -> bytes:
    memory = io.BytesIO()
    figure.savefig(memory, dpi=110)
    return memory.getvalue()


def _image(png: bytes, what: str, style: str = "") -> str:
    return f'<img class="{style}" alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
