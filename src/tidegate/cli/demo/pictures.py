# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures: training curves of both runs, and where the classes are confused."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from tidegate.cli.demo.training import Run
from tidegate.cli.pictures import TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save

_MAX_CLASSES_WITH_NUMBERS = 20


def draw_curves(runs: tuple[Run, Run], title: str, path: Path) -> Path:
    """Loss and test accuracy over the epochs. torch.nn's broad line lies under tidegate's, so that both are seen."""
    with look():
        figure, (loss_axes, accuracy_axes) = new_figure(11, 4.4, columns=2)
        for run, colour, width, style in zip(
            runs, (TORCH_COLOUR, TIDEGATE_COLOUR), (6.0, 1.8), ("-", "--"), strict=True
        ):
            epochs = range(1, len(run.losses) + 1)
            alpha = 0.45 if width > 2 else 1.0
            loss_axes.plot(epochs, run.losses, style, color=colour, linewidth=width, alpha=alpha, label=run.name)
            accuracy_axes.plot(epochs, run.accuracies, style, color=colour, linewidth=width, alpha=alpha)
        loss_axes.set(title="Training loss", xlabel="epoch", ylabel="cross entropy", yscale="log")
        accuracy_axes.set(title="Test accuracy", xlabel="epoch", ylim=(0, 1.02))
        accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        accuracy_axes.annotate(
            f"{runs[1].accuracies[-1]:.1%}",
            (len(runs[1].accuracies), runs[1].accuracies[-1]),
            xytext=(0, -22),
            textcoords="offset points",
            ha="right",
            color=TIDEGATE_COLOUR,
            weight="bold",
        )
        loss_axes.legend(loc="upper right")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color="#495057")
        return save(figure, path)


def draw_confusion(labels: Tensor, predictions: Tensor, classes: tuple[str, ...], title: str, path: Path) -> Path:
    """Rows are the true classes, columns the predicted ones; shades are shares of a row, numbers are counts."""
    num_classes = len(classes)
    counts = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    names = [name if len(name) <= 16 else f"{name[:15]}…" for name in classes]
    with look(axes_grid=False, axes_spines_left=False, axes_spines_bottom=False):
        size = min(12.0, 4.2 + 0.42 * num_classes)
        figure, (axes,) = new_figure(size, size)
        axes.imshow(shares.numpy(), cmap="GnBu", vmin=0, vmax=1)
        if num_classes <= _MAX_CLASSES_WITH_NUMBERS:
            for row in range(num_classes):
                for column in range(num_classes):
                    count = int(counts[row, column])
                    wrong = count and row != column
                    colour = "#c92a2a" if wrong else "white" if shares[row, column] > 0.6 else "#868e96"
                    axes.text(column, row, str(count) if count else "·", ha="center", va="center", color=colour)
            axes.set_xticks(range(num_classes), names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(num_classes), names)
        axes.tick_params(length=0)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(title, fontsize=12)
        return save(figure, path)
