# SPDX-License-Identifier: Apache-2.0
"""A user's model and example input, by name: `--model module:attribute`, `--input module:attribute`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from torch.nn import Module


class ModelError(RuntimeError):
    """What the user named cannot be timed. Its cause, where it has one, was raised by the user's own code."""


@dataclass(frozen=True)
class Subject:
    """A model and the arguments of one call of it."""

    name: str
    model: Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.model(*self.args, **self.kwargs)


@contextmanager
def importing_from_here() -> Generator[None]:
    """Inside, modules of the current directory can be imported, as by `python`; installed ones as ever."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def load_subject(model_name: str, input_name: str | None, option: str = "--model") -> Subject:
    """Build what the names stand for.

    Args:
        model_name: of a torch.nn.Module, or of a function without arguments that returns one, or (model, example).
        input_name: of an example, or of a function without arguments that returns one; it replaces the model's own. A
            tuple is the model's positional arguments, a mapping its keyword arguments, anything else its one argument.
        option: what the user gave `model_name` as.

    Raises:
        ModelError: a name leads nowhere or to something else, or the user's code raises.
    """
    found = find_named(option, model_name)
    built = found if isinstance(found, Module) else _call(option, model_name, found)
    example: Any = None
    if isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], Module):
        built, example = built
    if not isinstance(built, Module):
        raise ModelError(
            f"{option}: {model_name} returned {type(built).__name__}: expected a torch.nn.Module, or (model, input)"
        )
    if input_name is not None:
        example = find_named("--input", input_name)
        if inspect.isroutine(example) or inspect.isclass(example):
            example = _call("--input", input_name, example)
    if example is None:
        raise ModelError(
            f"{option}: no example input: {model_name} returned a model alone. Return (model, example input), or name "
            "one with --input module:attribute"
        )
    if isinstance(example, tuple):
        return Subject(model_name, built, example, {})
    if isinstance(example, Mapping):
        return Subject(model_name, built, (), {str(key): value for key, value in example.items()})
    return Subject(model_name, built, (example,), {})


def find_named(option: str, name: str) -> Any:
    """What `name`, module:attribute, stands for, given as `option`.

    Raises:
        ModelError: it leads nowhere, or importing it raises.
    """
    home, colon, path = name.partition(":")
    if not (home and colon and path):
        raise ModelError(f"{option}: expected module:attribute, such as my_model:build, got {name!r}")
    if home.endswith(".py") or "/" in home:
        module = home.removesuffix(".py").replace("/", ".")
        raise ModelError(f"{option}: expected the name of a module, not of a file: {module}:{path}, got {name!r}")
    try:
        found: Any = import_module(home)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{home}.".startswith(f"{error.name}."):
            raise ModelError(
                f"{option}: there is no module {error.name!r}, neither in the current directory nor installed"
            ) from None
        raise ModelError(f"{option}: importing {home} raised {one_line(error)}") from error
    except Exception as error:
        raise ModelError(f"{option}: importing {home} raised {one_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            close = get_close_matches(part, dir(found), n=1)
            hint = f"; it has {close[0]!r}" if close else ""
            raise ModelError(f"{option}: {home} has no {path!r}{hint}")
        found = getattr(found, part)
    return found


def _call(option: str, name: str, factory: Any) -> Any:
    if not callable(factory):
        raise ModelError(f"{option}: {name} is of type {type(factory).__name__}: expected a function without arguments")
    _check_needs_nothing(option, name, factory)
    try:
        return factory()
    except Exception as error:
        raise ModelError(f"{option}: {name}() raised {one_line(error)}") from error


def _check_needs_nothing(option: str, name: str, factory: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some written in C have none
        return
    try:
        signature.bind()
    except TypeError as error:
        raise ModelError(f"{option}: {name} must be callable without arguments: {error}") from None


def one_line(error: Exception) -> str:
    """An error's type and its text's first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
