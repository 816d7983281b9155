# SPDX-License-Identifier: Apache-2.0
"""torch's own samples and error inputs for its six recurrent modules, run against ours."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from comparing import BACKENDS, assert_same, in_float64, outcome, refusal, tensors_in
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import tidegate as tg

RECURRENT = {
    info.module_cls.__name__: info for info in module_db if info.module_cls.__module__ == "torch.nn.modules.rnn"
}
PACKED = ("RNN", "GRU")


def _samples() -> list[Any]:
    found = []
    for name, info in RECURRENT.items():
        # Packed sequences are left out of torch's list unless asked for; its LSTM and cells have none to ask for.
        extra = {"with_packed_sequence": True} if name in PACKED else {}
        for dtype in info.dtypes:
            for training in (True, False):
                torch.manual_seed(0)
                inputs = info.module_inputs_func(info, "cpu", dtype, True, training, **extra)
                for k, sample in enumerate(inputs):
                    label = f"{name}-{str(dtype)[6:]}-{'train' if training else 'eval'}-{k}"
                    found.append(pytest.param(name, dtype, training, sample, id=label))
    return found


def _error_inputs() -> list[Any]:
    found = []
    for name, info in RECURRENT.items():
        inputs = info.module_error_inputs_func(info, "cpu", torch.float64, False, True)
        found += [pytest.param(name, sample, id=f"{name}-{k}") for k, sample in enumerate(inputs)]
    return found


SAMPLES, ERROR_INPUTS = _samples(), _error_inputs()


def _leaves(arguments: Any) -> dict[str, torch.Tensor]:
    return {f"input {k}": tensor for k, tensor in enumerate(tensors_in(arguments)) if tensor.requires_grad}


def test_nothing_is_left_out():
    assert sorted(RECURRENT) == ["GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell"]
    assert len(SAMPLES) == 540
    assert len(ERROR_INPUTS) == 58


@pytest.mark.parametrize(("name", "dtype", "training", "sample"), SAMPLES)
def test_sample(name, dtype, training, sample):
    construct, call = sample.constructor_input, sample.forward_input
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(*construct.args, **construct.kwargs, dtype=dtype).train(training)
    ours = getattr(tg, name)(*construct.args, **construct.kwargs, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    assert not call.kwargs
    expected = outcome(theirs, lambda: theirs(*call.args), _leaves(call.args))
    oracle = None
    if dtype != torch.float64:
        exact, arguments = in_float64(theirs), in_float64(call.args)
        oracle = outcome(exact, lambda: exact(*arguments), _leaves(arguments))
    for backend in BACKENDS:
        with tg.backend(backend):
            found = outcome(ours, lambda: ours(*call.args), _leaves(call.args))
        assert_same(found, expected, oracle)


@pytest.mark.parametrize(("name", "sample"), ERROR_INPUTS)
def test_error_input(name, sample):
    construct = sample.module_error_input.constructor_input
    call = sample.module_error_input.forward_input

    def run(library: Any) -> Any:
        module = getattr(library, name)(*construct.args, **construct.kwargs)
        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            return module
        module = module.double()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        try:
            return module(*call.args, **call.kwargs)
        finally:
            assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())

    raised, message = refusal(lambda: run(tg))
    assert raised is sample.error_type
    assert re.search(sample.error_regex, message)
    assert (raised, message) == refusal(lambda: run(torch.nn))
