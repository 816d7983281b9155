# SPDX-License-Identifier: Apache-2.0
"""The commands and their options. Each command's own module is imported when it is called: `--help` stays quick."""

from __future__ import annotations

import traceback
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
    float16 = "float16"


class Format(str, Enum):
    c = "c"
    rtneural = "rtneural"


class Weights(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


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
    report: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, metavar="FILE", help="Write one HTML page: the results, the pictures, one sequence's gates."
        ),
    ] = None,
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
    run_demo(dataset, kind=model.value, hidden_size=hidden, epochs=epochs, seed=seed, out=out, report=report)


@app.command()
def bench(
    kind: Annotated[list[Kind] | None, typer.Option(help="Repeatable; every kind unless given.")] = None,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Repeatable; every mode unless given, of a --model infer.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="B,T,I,H", help="Repeatable; a grid of shapes in use unless given.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="num_layers.")] = 1,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Run both directions.")] = False,
    dtype: Annotated[DType, typer.Option(help="Other runtimes take part in float32 alone.")] = DType.float32,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of a stream that are timed; 100,000 unless given.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:ATTRIBUTE",
            help="Time your own model instead: a torch.nn.Module, or a function without arguments that returns one, or "
            "(model, example input). A tuple holds the model's arguments, a dict its keyword arguments.",
        ),
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="MODULE:ATTRIBUTE", help="The --model's example input, or a function that returns it."
        ),
    ] = None,
    cell: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Repeatable. Time a cell over a sequence instead, fused and in a loop: your own, made by "
            "factory(input_size, hidden_size), or one of tidegate.cells by name, such as LayerNormLSTM.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice unless given.")] = None,
    scan_threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Repeatable: also time tidegate at so many threads, more than the cores included."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes, few rounds: about a minute.")] = False,
    peers: Annotated[
        bool, typer.Option(help="Also time onnxruntime, openvino and jax where installed; of a --cell torch.compile.")
    ] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if any line is more than 3 % slower than torch.nn.")
    ] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where JSON files and pictures go.")] = Path("out/bench"),
) -> None:
    """Time this machine against torch.nn and other runtimes, your model before and after `tidegate.accelerate`, or any
    cell over a sequence."""
    if cell:
        given = {"--kind": kind, "--layers": layers > 1, "--bidirectional": bidirectional, "--steps": steps}
        given |= {"--model": model, "--input": example, "--check": check, "--scan-threads": scan_threads}
        unused = [name for name, value in given.items() if value]
        cell_modes = tuple(item.value for item in mode or (Mode.infer, Mode.train))
        return _bench_cells(
            tuple(cell),
            cell_modes,
            unused,
            shape or [],
            dtype.value,
            threads=threads,
            quick=quick,
            peers=peers,
            out=out,
        )
    modes = tuple(item.value for item in mode or (Mode if model is None else (Mode.infer,)))
    if model is not None or example is not None:
        given = {"--kind": kind, "--shape": shape, "--layers": layers > 1, "--bidirectional": bidirectional}
        given |= {"--dtype": dtype is not DType.float32, "--steps": steps, "--no-peers": not peers, "--check": check}
        given |= {"--scan-threads": scan_threads}
        unused = [name for name, value in given.items() if value]
        return _bench_model(model, example, modes, unused, threads=threads, quick=quick, out=out)
    from tidegate.cli.bench import BenchError, Plan, run_bench
    from tidegate.cli.bench.shapes import parse_shape

    if mode and Mode.stream in mode and bidirectional:
        raise _stop("--mode stream: a stream has one direction; leave out --bidirectional", 2)
    try:
        shapes = tuple(parse_shape(text) for text in shape or ())
    except ValueError as error:
        raise _stop(str(error), 2) from None
    kinds = tuple(item.value for item in kind or Kind)
    scan = tuple(dict.fromkeys(scan_threads or ()))
    plan = Plan(kinds, modes, shapes, layers, bidirectional, dtype.value, steps, threads, scan, quick, peers)
    try:
        slower = run_bench(plan, out)
    except BenchError as error:
        raise _stop(str(error), 1) from None
    if check and slower:
        lines = "\n".join(f"  {result.case}: {result.ratio:.2f}x of torch.nn" for result in slower)
        raise _stop(f"slower than torch.nn by more than 3 %:\n{lines}", 1)
    return None


def _bench_model(
    model: str | None,
    example: str | None,
    modes: tuple[str, ...],
    unused: list[str],
    *,
    threads: int | None,
    quick: bool,
    out: Path,
) -> None:
    """`unused`: options that were given and do not go with --model."""
    from tidegate.cli.bench import BenchError
    from tidegate.cli.bench.model import ModelError, ModelPlan, run_model_bench

    if model is None:
        raise _stop("--input: belongs to --model, which is not given", 2)
    unused += [f"--mode {mode}" for mode in modes if mode not in ("infer", "train")]
    if unused:
        raise _stop(f"--model: the model says what runs; leave out {', '.join(unused)}", 2)
    try:
        run_model_bench(ModelPlan(model, example, modes, threads, quick), out)
    except ModelError as error:
        if error.__cause__ is not None:  # the user's own code: only its traceback says where
            typer.echo("".join(traceback.format_exception(error.__cause__)), err=True)
        raise _stop(str(error), 2) from None
    except BenchError as error:
        raise _stop(str(error), 1) from None


def _bench_cells(
    cells: tuple[str, ...],
    modes: tuple[str, ...],
    unused: list[str],
    shapes: list[str],
    dtype: str,
    *,
    threads: int | None,
    quick: bool,
    peers: bool,
    out: Path,
) -> None:
    """`unused`: options that were given and do not go with --cell."""
    from tidegate.cli.bench import BenchError
    from tidegate.cli.bench.cells import CellPlan, run_cell_bench
    from tidegate.cli.bench.model import ModelError
    from tidegate.cli.bench.shapes import parse_shape

    unused += [f"--mode {mode}" for mode in modes if mode not in ("infer", "train")]
    if unused:
        raise _stop(f"--cell: the cell says what runs; leave out {', '.join(unused)}", 2)
    try:
        parsed = tuple(parse_shape(text) for text in shapes)
    except ValueError as error:
        raise _stop(str(error), 2) from None
    try:
        run_cell_bench(CellPlan(cells, modes, parsed, dtype, threads, quick, peers), out)
    except ModelError as error:
        if error.__cause__ is not None:  # the user's own code: only its traceback says where
            typer.echo("".join(traceback.format_exception(error.__cause__)), err=True)
        raise _stop(str(error), 2) from None
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


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A torch.nn.Module, or a function without arguments that returns one, or (model, example input).",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for the C files; of rtneural the file.")],
    example: Annotated[
        str | None,
        typer.Option("--input", metavar="MODULE:ATTRIBUTE", help="The example input, or a function that returns it."),
    ] = None,
    format: Annotated[Format, typer.Option(help="C, or the JSON that RTNeural reads.")] = Format.c,
    name: Annotated[str, typer.Option(help="Of the files and functions.")] = "model",
    weights: Annotated[Weights, typer.Option(help="How the weights are stored.")] = Weights.float32,
    resets: Annotated[bool, typer.Option("--resets", help="NAME_process takes marks of new sequences.")] = False,
    block: Annotated[
        bool, typer.Option("--block", help="Over whole sequences: for layers that run in reverse.")
    ] = False,
    blob: Annotated[bool, typer.Option("--blob", help="The weights in a file that the program maps.")] = False,
    wasm: Annotated[bool, typer.Option("--wasm", help="Also for browsers and Node; needs clang and wasm-ld.")] = False,
) -> None:
    """Write one step of a recurrent model as self-contained C, its state explicit; or its layers for RTNeural."""
    from tidegate.cli.bench.model.load import ModelError
    from tidegate.cli.export import run_export
    from tidegate.errors import ConversionError

    try:
        options = {"name": name, "weights": weights.value, "resets": resets, "block": block, "blob": blob, "wasm": wasm}
        run_export(model, example, out, say=typer.echo, format=format.value, **options)
    except (ModelError, ConversionError, TypeError, ValueError, OSError) as error:
        raise _stop(str(error), 1) from None
