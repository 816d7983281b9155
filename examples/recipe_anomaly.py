# SPDX-License-Identifier: Apache-2.0
"""Recipe: an anomaly is where the prediction fails. A GRU learns a normal record and watches a longer one.

    pip install 'tidegate[cli]'
    pip install --no-deps aeon    # for its record, in two text files
    python examples/recipe_anomaly.py

A blood pressure with one abnormal beat: record 135 of the UCR anomaly archive (Wu and Keogh 2021, 2009.13807), inside
aeon (BSD-3-Clause). The first 1,200 steps are normal and train; the other 6,300 are watched. At each step the GRU
predicts the next H values at once; the score is the squared error of what was said of a step, averaged over a window.
The baseline does the same with a linear prediction from the last 50 values.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from recipe_parts import read_options
from torch import Tensor, nn

import tidegate as tg
from tidegate.cli.pictures import INK, TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save

FILE = Path(
    distribution("aeon").locate_file("aeon/datasets/data/KDD-TSAD_135/135_UCR_Anomaly_InternalBleeding16_TEST.csv")
)
NORMAL, HORIZON, WINDOW, PAST = 1200, 10, 50, 50


class Predictor(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.gru = tg.GRU(1, hidden_size, batch_first=True)
        self.readout = nn.Linear(hidden_size, HORIZON)

    def forward(self, series: Tensor) -> Tensor:
        """What comes after each step, (B, T, H), of series (B, T)."""
        return series[..., None] + self.readout(self.gru(series[..., None])[0])


def train(model: Predictor, series: Tensor, epochs: int) -> None:
    pieces = series.unfold(0, 200 + HORIZON, 20)  # (rows, 200 + H), overlapping
    targets = pieces[:, 1:].unfold(1, HORIZON, 1)  # (rows, 200, H)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(pieces)).split(16):
            optimizer.zero_grad()
            (model(pieces[rows, :200]) - targets[rows])[
                :, 20:
            ].square().mean().backward()  # the first steps know too little
            optimizer.step()
        schedule.step()


def score(predicted: Tensor, series: Tensor) -> Tensor:
    """Mean error of a window about each step, (T,), of predictions (T', H), the last of which ends with the series."""
    truth = series[1:].unfold(0, HORIZON, 1)[-len(predicted) :]
    errors = (predicted - truth).square().mean(-1)
    errors = nn.functional.avg_pool1d(errors[None], WINDOW, 1, WINDOW // 2, count_include_pad=False)[0]
    found = torch.zeros(len(series))
    first = len(series) - HORIZON - len(predicted) + HORIZON // 2
    found[first : first + len(predicted)] = errors[: len(predicted)]
    return found


def linear(series: Tensor) -> Tensor:
    """Predictions (T', H) by least squares over the normal part."""
    past = torch.cat([series.unfold(0, PAST, 1)[:-HORIZON], torch.ones(len(series) - PAST - HORIZON + 1, 1)], 1)
    truth = series[PAST:].unfold(0, HORIZON, 1)
    known = NORMAL - PAST - HORIZON
    return past @ torch.linalg.lstsq(past[:known], truth[:known]).solution


def main(arguments: list[str] | None = None) -> dict[str, tuple[bool, float]]:
    """Returns for each method whether its peak is the anomaly, and how high it is above the next highest elsewhere."""
    options = read_options(__doc__, arguments, "fewer epochs")

    _, values, labels = np.loadtxt(FILE, delimiter=",", skiprows=1, dtype=np.float32).T
    series = torch.from_numpy((values - values[:NORMAL].mean()) / values[:NORMAL].std())
    anomaly = np.flatnonzero(labels)
    model = Predictor()
    train(model, series[:NORMAL], epochs=5 if options.quick else 200)
    with torch.no_grad():
        predicted = model(series[None])[0][:-HORIZON]
    scores = {"GRU": score(predicted, series)[NORMAL:], "linear prediction": score(linear(series), series)[NORMAL:]}
    steps = torch.arange(NORMAL, len(series))
    near = (steps >= anomaly[0] - 100) & (steps <= anomaly[-1] + 100)  # as the archive counts
    results = {name: (bool(near[s.argmax()]), float(s[near].max() / s[~near].max())) for name, s in scores.items()}
    for name, (hit, height) in results.items():
        print(f"{name}: the peak is {'the anomaly' if hit else 'elsewhere'}; {height:.2f} times the highest elsewhere")

    with look():
        figure, (axis,) = new_figure(12, 3.8)
        axis.plot(steps, series[NORMAL:] / series.abs().max() / 2 + 2.6, color=INK, lw=0.6, label="the record")
        for name, colour, base in (("linear prediction", TORCH_COLOUR, 1.05), ("GRU", TIDEGATE_COLOUR, 0.0)):
            axis.plot(steps, base + scores[name] / scores[name].max(), color=colour, lw=1, label=f"{name}: error")
        axis.axvspan(anomaly[0] - 100, anomaly[-1] + 100, color=TORCH_COLOUR, alpha=0.15, lw=0, label="the anomaly")
        axis.set(title="Prediction errors over the record", xlabel="step", yticks=(), xlim=(NORMAL, len(series)))
        axis.legend(loc="upper left", ncols=4, bbox_to_anchor=(0, -0.16))
        print(save(figure, options.folder / "anomaly.png"))
    return results


if __name__ == "__main__":
    main()
