# SPDX-License-Identifier: Apache-2.0
"""The commands and their options. Each command's own module is imported when it is called: `--help` stays quick."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Fast, complete recurrent layers (RNN, LSTM, GRU) for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Kind(str, Enum):
    gru = "gru"
    lstm = "lstm"
    rnn = "rnn"


class Mode(str, Enum):
    infer = "infer"
    train = "train"
    cell = "cell"
    stream = "stream"


class DType(str, Enum):
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"


def _stop(message: str, code: int) -> typer.Exit:
    """Print one plain line, never wrapped, so that it can be searched for; the exit is the caller's to raise."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(code)


@app.command()
def demo(
    model: Annotated[Kind, typer.Option(help="The recurrent layer.")] = Kind.gru,
    hidden: Annotated[int, typer.Option(min=1, help="hidden_size of each direction.")] = 48,
    epochs: Annotated[int, typer.Option(min=1, help="Full-batch training steps.")] = 150,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights, and of the split of --data.")] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where the pictures go.")] = Path("out/demo"),
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="Your own labelled sequences: CSV with columns sequence, step, label, then one for each channel; "
            "one row a step. A seeded 30 % of each label's sequences is kept for testing.",
        ),
    ] = None,
) -> None:
    """Train a bidirectional classifier on Japanese Vowels, once with torch.nn and once with tidegate."""
    from tidegate.cli.demo import run_demo
    from tidegate.data import japanese_vowels
    from tidegate.data.csv_file import DataFileError, read_csv

    try:
        dataset = japanese_vowels() if data is None else read_csv(data, seed=seed)
    except DataFileError as error:
        raise _stop(f"--data: {error}", 2) from None
    run_demo(dataset, kind=model.value, hidden_size=hidden, epochs=epochs, seed=seed, out=out)


@app.command()
def bench(
    kind: Annotated[list[Kind] | None, typer.Option(help="Repeatable; every kind unless given.")] = None,
    mode: Annotated[list[Mode] | None, typer.Option(help="Repeatable; every mode unless given.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="B,T,I,H", help="Repeatable; a grid of shapes in use unless given.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="num_layers.")] = 1,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Run both directions.")] = False,
    dtype: Annotated[DType, typer.Option(help="Other runtimes take part in float32 alone.")] = DType.float32,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of a stream that are timed; 100,000 unless given.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice unless given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes, few rounds: under a minute.")] = False,
    peers: Annotated[bool, typer.Option(help="Also time onnxruntime, openvino and jax where installed.")] = True,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where bench.json and bench.png go.")] = Path("out/bench"),
) -> None:
    """Time this machine against torch.nn, and against other runtimes where they are installed."""
    from tidegate.cli.bench import BenchError, Plan, run_bench
    from tidegate.cli.bench.shapes import parse_shape

    try:
        shapes = tuple(parse_shape(text) for text in shape or ())
    except ValueError as error:
        raise _stop(str(error), 2) from None
    plan = Plan(
        kinds=tuple(item.value for item in kind or Kind),
        modes=tuple(item.value for item in mode or Mode),
        shapes=shapes,
        num_layers=layers,
        bidirectional=bidirectional,
        dtype=dtype.value,
        steps=steps,
        threads=threads,
        quick=quick,
        peers=peers,
    )
    try:
        run_bench(plan, out)
    except BenchError as error:
        raise _stop(str(error), 1) from None


@app.command()
def doctor() -> None:
    """Show what is installed, which backends can run here, and why another cannot."""
    from tidegate.cli.doctor import run_doctor

    run_doctor()


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A .keras, .onnx, .pt, .pth or .safetensors.")
    ],
    target: Annotated[Path, typer.Argument(dir_okay=False, help="A .safetensors, or an .onnx.")],
    layer: Annotated[str | None, typer.Option(help="The layer's name in the source; needed if it has several.")] = None,
    inference_only: Annotated[bool, typer.Option(help="Leave out what acts in training alone.")] = False,
    batch_first: Annotated[bool, typer.Option(help="Of a torch file: the layer takes (B, T, I).")] = False,
    reset_before: Annotated[bool, typer.Option(help="Of a torch file: a GRU's reset is before the matmul.")] = False,
    activation: Annotated[str | None, typer.Option(help="Of a torch file: an RNN's, tanh or relu.")] = None,
) -> None:
    """Convert a recurrent layer from Keras, ONNX or torch to safetensors or ONNX, and check the result."""
    from tidegate.cli.convert import run_convert
    from tidegate.errors import ConversionError

    try:
        run_convert(
            source,
            target,
            layer,
            inference_only=inference_only,
            batch_first=batch_first,
            reset_before=reset_before,
            activation=activation,
            say=typer.echo,
        )
    except (ConversionError, ImportError, OSError) as error:
        raise _stop(str(error), 1) from None
