# SPDX-License-Identifier: Apache-2.0
"""One step of a model as a module: `(x_t, state) -> (y_t, state)`, what the tracer takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tidegate.accelerate import accelerate, report
from tidegate.export.sites import Kept, RefusedError, Sites
from tidegate.nn import Recurrent

_ROWS = 5  # of the run that looks for states: none of a model's sizes matters


class Names:
    """Which module of a model is running."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.running: list[str] = []
        self.failed = ""  # the innermost module that was left by an exception
        self.names = {module: name for name, module in model.named_modules()}
        self.listeners: list[Callable[[str, Any], None]] = []
        for module in self.names:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)

    def current(self) -> str:
        return self.running[-1] if self.running else "model"

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        name = self.names.get(module, "")
        self.running.append(f"{name or 'model'} ({type(module).__name__})")

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        name = self.running.pop()
        if output is None:  # of a forward that raised
            self.failed = self.failed or name
            return
        for listen in self.listeners:
            listen(name, output)

    @contextmanager
    def told(self, listen: Callable[[str, Any], None]) -> Generator[None]:
        self.listeners.append(listen)
        try:
            yield
        finally:
            self.listeners.remove(listen)


class Step(torch.nn.Module):
    """A model's step: (B, I) or, of indices, (B,), and a state of (B, ...) each, to (B, O) and the new state.

    Attributes:
        kept: what the state's tensors are, in order.
    """

    def __init__(self, model: torch.nn.Module, time: int, names: Callable[[], str], block: bool) -> None:
        super().__init__()
        self.model, self.time = model, time
        self.names, self.block = names, block

    def find_states(self, x: Tensor) -> list[Kept]:
        """What is kept from step to step, found in a step on x (B, ...).

        Raises:
            RefusedError: there is a place whose past cannot be kept.
        """
        sites = Sites(None, self.names, self.block)
        self._run(x, sites)
        return sites.kept

    def forward(self, x: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        sites = Sites(state, self.names, self.block)
        y = self._run(x, sites)
        return y, tuple(sites.leaving)

    def _run(self, x: Tensor, sites: Sites) -> Tensor:
        with sites.open():
            y = first_of(self.model(x.unsqueeze(self.time)))
        if y.dim() > 1 and y.shape[0 if self.time else 1] == x.shape[0] and y.dim() == 3:
            if y.shape[self.time] != 1:
                raise RefusedError(f"model: for one step of its input its output has {y.shape[self.time]}")
            return y.squeeze(self.time)
        if y.dim() == 2 and y.shape[0] == x.shape[0]:
            return y
        raise RefusedError(
            f"model: expected an output (1, T, O), (T, 1, O) or (1, O), got {tuple(y.shape)} for one step"
        )


def first_of(output: Any) -> Tensor:
    """A model's output y: of a tuple the first, as a recurrent layer's; what follows are its states."""
    found: Any = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, Tensor):
        raise RefusedError(f"model: expected a tensor or a tuple that begins with one, got {type(found).__name__}")
    if not found.is_floating_point():
        raise RefusedError(f"model: expected an output of floating-point numbers, got {found.dtype}")
    return found


class Model:
    """A model made ready to be exported: a copy, in eval, in float32, torch.nn's recurrent modules tidegate's.

    Attributes:
        module: the copy.
        example: (1, T, ...), or (T, 1, ...), as the model takes it.
        time: which of its dimensions is the steps'.
        step: one step of it.
        kept: the states.
        in_blocks: whether some of them run from the end.
    """

    def __init__(self, model: Any, example: Any, block: bool = False) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("model: expected the Python model, got TorchScript, whose modules cannot be looked into")
        try:
            module: Any = copy.deepcopy(getattr(model, "_orig_mod", model))
        except Exception as error:
            raise RefusedError(f"model: copying it raised {type(error).__name__}: {error}") from error
        if isinstance(module, torch.nn.RNNCellBase):
            module = Recurrent(module, batch_first=isinstance(example, Tensor) and example.shape[:1] == (1,))
        self.module: torch.nn.Module = accelerate(module).eval().float().cpu()
        for name, why in _left_alone(self.module):
            raise RefusedError(f"{name}: {why}")
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self.names = Names(self.module)
        self.example, self.time = _read_example(example, self.module)
        self.step = Step(self.module, self.time, self.names.current, block)
        with torch.no_grad():
            self.kept = self.guarded(lambda: self.step.find_states(self._rows()))
        self.in_blocks = any(kept.reverse for kept in self.kept)

    def _rows(self) -> Tensor:
        """Steps that differ, one a row: what depends on the input is then not the same in all of them."""
        steps = self.example.select(1 - self.time, 0)
        if steps.is_floating_point():
            shifts = torch.arange(_ROWS).reshape(-1, *(1,) * (steps.dim() - 1)) / 8
            return steps[:1] + shifts
        return torch.cat((steps[torch.arange(_ROWS - 1) % self.steps], torch.zeros_like(steps[:1])))

    def guarded(self, run: Callable[[], Any]) -> Any:
        """What `run` gives; an error in it names the module that was running."""
        try:
            return run()
        except RefusedError:
            raise
        except Exception as error:
            place = self.names.failed or self.names.current()
            raise RefusedError(f"{place}: it raised {type(error).__name__}: {error}") from error

    def initial(self, rows: int) -> list[Tensor]:
        return [torch.tensor(kept.initial).reshape(1, *kept.sizes).expand(rows, *kept.sizes) for kept in self.kept]

    @property
    def steps(self) -> int:
        return self.example.shape[self.time]


def _left_alone(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Recurrent modules that are neither tidegate's nor could become so, and why."""
    entries = [entry for entry in report(model).entries if entry.why.startswith("left alone")]
    found = [(entry.names[0] or "model", entry) for entry in entries]
    return [(f"{name} ({entry.module})", f"{entry.why.removeprefix('left alone: ')}") for name, entry in found]


def _read_example(example: Any, module: torch.nn.Module) -> tuple[Tensor, int]:
    if not isinstance(example, Tensor):
        raise TypeError(f"example: expected a tensor (T, I), (1, T, I) or (T, 1, I), got {type(example).__name__}")
    is_index = not example.is_floating_point()
    if example.dtype is torch.bool or example.is_complex():
        raise ValueError(f"example: expected floating-point numbers or integer indices, got {example.dtype}")
    example = example.detach().cpu() if is_index else example.detach().cpu().float()
    features = 0 if is_index else 1
    if example.dim() not in (1 + features, 2 + features) or example.numel() == 0:
        expected = "(T,), (1, T) or (T, 1) of indices" if is_index else "(T, I), (1, T, I) or (T, 1, I)"
        raise ValueError(f"example: expected {expected}, got {tuple(example.shape)}")
    first = {getattr(part, "batch_first", None) for part in module.modules()} & {True, False}
    if example.dim() == 1 + features:
        if len(first) == 2:
            raise ValueError("example: expected (1, T, I) or (T, 1, I): some of the model's layers are batch_first")
        time = 1 if first != {False} else 0
        return example.unsqueeze(1 - time), time
    if 1 not in example.shape[:2]:
        raise ValueError(f"example: expected one sequence, (1, T, ...) or (T, 1, ...), got {tuple(example.shape)}")
    if example.shape[0] == example.shape[1]:
        return example, 0 if first == {False} else 1
    return example, 1 if example.shape[0] == 1 else 0
