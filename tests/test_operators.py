# SPDX-License-Identifier: Apache-2.0
"""The registered operators: torch's own opcheck, the batching rules, and the door's agreement with them."""

from __future__ import annotations

import pytest
import torch
from calls import VARIANTS, make_call, run_layer

from tidegate import backends, signature

FORMS = [
    (lengths, resets, reverse) for lengths in (False, True) for resets in (False, True) for reverse in (False, True)
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("lengths", "resets", "reverse"), FORMS)
def test_opcheck_of_the_forward(variant: str, lengths: bool, resets: bool, reverse: bool) -> None:
    call = make_call(variant, lengths=lengths, resets=resets, reverse=reverse, requires_grad=True)
    torch.library.opcheck(signature.forward_operator(call.cell), (*signature.arguments(call), "", False))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_the_backward(variant: str, bias: bool) -> None:
    call = make_call(variant, bias=bias, lengths=True)
    backend = backends.select(call.call(), "")
    output, *states, saved = backends.run_layer(backend, call, save=True)
    needs = [tensor is not None for tensor in call.tensors]
    cotangents = (torch.ones_like(output), *(torch.ones_like(state) for state in states))
    arguments = (*signature.arguments(call), backend.name, output, saved, *cotangents, needs)
    torch.library.opcheck(signature.backward_operator(call.cell), arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_that_is_not_needed_is_empty(variant: str) -> None:
    call = make_call(variant)
    output, *states, saved = backends.run_layer(backends.REFERENCE, call, save=True)
    needs = [k == 1 for k in range(len(call.tensors))]
    cotangents = (torch.ones_like(output), *(None for _ in states))
    arguments = (*signature.arguments(call), "reference", output, saved, *cotangents, needs)
    found = signature.backward_operator(call.cell)(*arguments)
    assert [gradient.numel() > 0 for gradient in found] == needs


@pytest.mark.parametrize("name", [backend.name for backend in backends.BACKENDS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operator_answers_as_the_door_does(name: str, variant: str) -> None:
    call = make_call(variant, lengths=True, reverse=True)
    if backends.BY_NAME[name].unsupported_reasons(call.call()):
        with pytest.raises(backends.UnsupportedError):
            backends.select(call.call(), name)
        return
    with backends.backend(name):
        expected = run_layer(call)
    found = signature.forward_operator(call.cell)(*signature.arguments(call), name, False)[:-1]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_share_no_memory(variant: str) -> None:
    for steps in (0, 1, 3):
        call = make_call(variant, steps=steps)
        results = signature.forward_operator(call.cell)(*signature.arguments(call), "", False)
        tensors = [t for t in (*results, *call.tensors) if t is not None and t.numel() > 0]
        storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        assert len(set(storages)) == len(storages)


def test_in_place_change_of_h_n_leaves_the_output_alone() -> None:
    for steps in (1, 4):
        output, h_n = run_layer(make_call("gru", steps=steps))
        before = output.clone()
        h_n.zero_()
        assert torch.equal(output, before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_inputs_folds_into_the_batch(variant: str, in_dim: int) -> None:
    calls = [make_call(variant, lengths=True, resets=True, seed=seed) for seed in range(3)]
    operator, common = signature.forward_operator(calls[0].cell), calls[0]

    def run(data: torch.Tensor, h_0: torch.Tensor, resets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = (h_0, *common.states[1:])
        return operator(*signature.arguments(common._replace(input=data, states=states, resets=resets)), "", False)[:-1]

    columns = [
        torch.stack(column, in_dim) for column in zip(*((c.input, c.states[0], c.resets) for c in calls), strict=True)
    ]
    found = torch.vmap(run, in_dim)(*columns)
    expected = [run(c.input, c.states[0], c.resets) for c in calls]
    for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vmap_over_weights_of_the_operator(variant: str) -> None:
    calls = [make_call(variant, seed=seed) for seed in range(3)]
    operator = signature.forward_operator(calls[0].cell)

    def run(weight_hh: torch.Tensor) -> torch.Tensor:
        call = calls[0]._replace(weights=calls[0].weights | {"weight_hh": weight_hh})
        return operator(*signature.arguments(call), "", False)[0]

    found = torch.vmap(run)(torch.stack([call.weights["weight_hh"] for call in calls]))
    expected = torch.stack([run(call.weights["weight_hh"]) for call in calls])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
