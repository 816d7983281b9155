# SPDX-License-Identifier: Apache-2.0
"""Recipe: forecast the next 26 weeks of CO2 over Mauna Loa, with intervals, from every week of the record at once.

    pip install 'tidegate[cli]' statsmodels
    python examples/recipe_forecast.py

One GRU reads the weekly record; at every week a linear layer turns its state into quantiles of all H coming weeks
(MQ-RNN, Wen et al. 2017, 1711.11053), so one call trains on, or tests, every forecast origin. What is learnt is the
correction to the seasonal-naive forecast: last year's weeks, raised by what the year has added. The years to 1983
train; 1984 to 1990 choose the epoch and widen the intervals until 80 % lie inside (conformal, Romano et al. 2019,
1905.03222); 1991 to 2001 test.

Letters: T weeks, H horizon, Q quantiles.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from recipe_parts import read_options
from statsmodels.datasets import co2
from torch import Tensor, nn

import tidegate as tg
from tidegate.cli.pictures import INK, TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save

YEAR, HORIZON = 52, 26
QUANTILES = torch.tensor([0.1, 0.5, 0.9])


class Forecaster(nn.Module):
    def __init__(self, features: int, hidden_size: int) -> None:
        super().__init__()
        self.gru = tg.GRU(features, hidden_size, batch_first=True)
        self.readout = nn.Linear(hidden_size, HORIZON * len(QUANTILES))

    def forward(self, x: Tensor) -> Tensor:
        """Corrections to the naive forecast, (T, H, Q), from features (T, features)."""
        output, _ = self.gru(x[None])
        return self.readout(output[0]).unflatten(-1, (HORIZON, len(QUANTILES)))


def pinball(forecast: Tensor, truth: Tensor) -> Tensor:
    """Its minimum over `forecast` (..., Q) is at the quantiles of `truth` (...)."""
    error = truth[..., None] - forecast
    return torch.maximum(QUANTILES * error, (QUANTILES - 1) * error).mean()


def draw(weeks: np.ndarray, level: Tensor, ahead: Tensor, bands: Tensor, errors: dict[str, Tensor], path: Path) -> None:
    figure, (left, right) = new_figure(12, 4.2, columns=2)
    left.plot(weeks[-260:], level[-260:], color=INK, lw=1, label="measured")
    for k in range(-208, 0, 52):
        low, middle, high = bands[k].T
        label = "median and 80 % interval" if k == -52 else None
        left.plot(weeks[ahead[k]], middle, color=TIDEGATE_COLOUR, lw=2, label=label)
        left.fill_between(weeks[ahead[k]], low, high, color=TIDEGATE_COLOUR, alpha=0.25, lw=0)
    left.set(title="CO2 over Mauna Loa, ppm", ylim=(None, float(level.max()) + 2))
    left.legend(loc="upper left")
    colours = {"seasonal naive": TORCH_COLOUR, "smoothed growth": "#7048e8", "GRU": TIDEGATE_COLOUR}
    for name, values in errors.items():
        right.plot(range(1, HORIZON + 1), values, color=colours[name], lw=2, label=name)
    right.set(title="Mean absolute error, ppm", xlabel="weeks ahead", ylim=(0, None))
    right.legend(loc="lower right")
    print(save(figure, path))


def main(arguments: list[str] | None = None) -> tuple[dict[str, Tensor], float]:
    """Returns the mean absolute errors in ppm by weeks ahead, (H,), and the part of the truth inside the intervals."""
    options = read_options(__doc__, arguments, "a few epochs")

    series = co2.load_pandas().data["co2"].interpolate()  # 59 of 2,284 weeks are missing, none after 1985
    level, years = torch.tensor(series.to_numpy(), dtype=torch.float32), torch.tensor([*series.index.year])
    origins = torch.arange(YEAR, len(level) - HORIZON)  # (T,)
    ahead = origins[:, None] + torch.arange(1, HORIZON + 1)  # (T, H)
    truth, year_ago, growth = level[ahead], level[ahead - YEAR], level[origins] - level[origins - YEAR]
    naive = year_ago + growth[:, None]
    phase = 2 * torch.pi * origins / 52.18
    x = torch.stack([growth - 1.3, level[origins] - level[origins - 1], phase.sin(), phase.cos()], -1)
    first, last = years[origins], years[ahead[:, -1]]  # no week is a target of two parts
    train, validation, test = last < 1984, (first >= 1984) & (last < 1991), first >= 1991

    model, best, bands = Forecaster(x.shape[-1], hidden_size=32), torch.inf, torch.empty(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20 if options.quick else 120):
        forecast = naive[..., None] + model(x)  # (T, H, Q)
        loss = pinball(forecast[validation], truth[validation]).item()
        if loss < best:
            best, bands = loss, forecast.detach()
        optimizer.zero_grad()
        pinball(forecast[train], truth[train]).backward()
        optimizer.step()

    outside = torch.maximum(bands[..., 0] - truth, truth - bands[..., 2])
    bands += outside[validation].quantile(0.8) * torch.tensor([-1.0, 0.0, 1.0])
    inside = (bands[..., 0] <= truth) & (truth <= bands[..., 2])
    smooth = year_ago + torch.stack([growth[max(0, k - 7) : k + 1].mean() for k in range(len(growth))])[:, None]
    forecasts = {"seasonal naive": naive, "smoothed growth": smooth, "GRU": bands[..., 1]}
    errors = {name: (found - truth).abs()[test].mean(0) for name, found in forecasts.items()}
    coverage = inside[test].float().mean().item()
    print("mean absolute error, ppm:", ", ".join(f"{name} {e.mean():.3f}" for name, e in errors.items()))
    print(f"{coverage:.1%} inside the 80 % interval")
    with look():
        draw(series.index.to_numpy(), level, ahead, bands, errors, options.folder / "forecast.png")
    return errors, coverage


if __name__ == "__main__":
    main()
