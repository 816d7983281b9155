# SPDX-License-Identifier: Apache-2.0
"""What torch is doing around a call: plain eager mode, tracing, torch.func's levels, forward-mode differentiation.

Every use of torch's private interfaces is in this file, but for the tracer's in `fusion/trace.py`.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import _C, Tensor
from torch._C import _functorch as functorch  # type: ignore[attr-defined]  # pyright: ignore
from torch._functorch.utils import enable_single_level_autograd_function
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# torch's stubs leave this module out.
_autograd: Any = _C._autograd  # type: ignore[attr-defined]  # pyright: ignore

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


# What torch says of a graph whose saved tensors are freed.
USED_UP = (
    "Trying to backward through the graph a second time (or directly access saved tensors after they have already "
    "been freed). Saved intermediate values of the graph are freed when you call .backward() or autograd.grad(). "
    "Specify retain_graph=True if you need to backward through the graph a second time or if you need to access saved "
    "tensors after calling backward."
)

# The key of the older vmap, which autograd batches gradients with; torch.func's is another.
_VMAP_MODE: Any = _C._parse_dispatch_key("VmapMode")


# Bound once: to look each up in its module takes as long as to call it.
is_compiling: Callable[[], bool] = torch.compiler.is_compiling
is_autocast: Callable[[], bool] = _C._is_any_autocast_enabled
_is_tracing: Callable[[], bool] = _C._is_tracing
_dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack
_has_transforms: Callable[[], bool] = _C._are_functorch_transforms_active


def is_exporting() -> bool:
    """Inside torch.export. As `torch.compiler.is_exporting`, which the compiler of torch before 2.12 takes for true."""
    compiler: Any = torch.compiler
    return compiler._is_exporting_flag


def is_traced() -> bool:
    """A compiler, exporter, tracer or dispatch mode is looking: it must see one operator, not what is inside."""
    return is_compiling() or _is_tracing() or _dispatch_modes() > 0


def is_transformed() -> bool:
    """Inside torch.func's grad, vmap, jvp and what is made of them."""
    return _has_transforms()


def is_plain() -> bool:
    """Real tensors and no transform: what the backends can be handed."""
    return not (is_compiling() or _is_tracing() or _dispatch_modes() or _has_transforms())


def is_bare() -> bool:
    """Plain, and no level of forward-mode differentiation is entered, in whatever thread."""
    return not (
        is_compiling() or _is_tracing() or _dispatch_modes() or _has_transforms() or forward_ad._current_level >= 0
    )


def flop_registries() -> list[dict[Any, Any]]:
    """Where those look that count floating-point operations: those at work now, and those that will be made."""
    if is_compiling():
        return []
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return []
    modes: list[Any] = _get_current_dispatch_mode_stack()
    counters = [mode.counter for mode in modes if isinstance(mode, module._FlopCounterMode)]
    return [module.flop_registry, *(counter.flop_registry for counter in counters)]


def has_tangents(call: Any) -> bool:
    """Forward-mode differentiation: a tensor of a call or layer carries a tangent."""
    return forward_ad._current_level >= 0 and any_tangent(call.tensors)


def any_tangent(tensors: Iterable[Tensor | None]) -> bool:
    # A level that is entered belongs to the process: other threads' tensors have no tangents.
    level = forward_ad._current_level
    if level < 0:
        return False
    return any(
        tensor is not None and forward_ad.unpack_dual(tensor, level=level).tangent is not None for tensor in tensors
    )


def asked_once(function: F) -> F:
    """What torch's compiler calls while it traces, and whose result it takes for a constant.

    As `torch.compiler.assume_constant_result`, which would import the compiler here.
    """
    mark: Any = function
    mark._dynamo_marked_constant = True
    return function


# Whether what is asked once may be given a module. The compilers of torch 2.10 and 2.11 fail at it: there a cell is
# compiled step by step.
asked_of_modules: bool = torch.__version__ >= "2.12"  # as versions: it is no plain text


@functools.cache
def keep_stand_in_for_cuda() -> None:
    """In a build of torch for CUDA that finds no GPU: have what fake tensors put in CUDA's place outlive their thread.

    torch's mode of fake tensors registers a stand-in with the process as it is first entered, and the stand-in is freed
    with the thread that entered it (c10/core/impl/DeviceGuardImplInterface.cpp): the next backward would call what is
    no more. Here a thread registers it first that never ends.
    """
    register: Any = getattr(_C, "_ensureCUDADeviceGuardSet", None)
    if register is None or not torch.backends.cuda.is_built() or torch.cuda.is_available():
        return
    registered = threading.Event()

    def work() -> None:
        register()
        registered.set()
        threading.Event().wait()

    threading.Thread(target=work, name="tidegate: CUDA's stand-in", daemon=True).start()
    registered.wait()


def outside_of_tracing(function: Callable[[], T]) -> T:
    """Call a function where no tracer, transform or mode sees what it does, and none of its draws count.

    All of these belong to a thread, but for the generators.
    """
    keep_stand_in_for_cuda()
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with keeping_generators():
                results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="tidegate")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def keeping_generators() -> Generator[None]:
    """What is drawn inside from torch's, Python's or NumPy's generator is drawn again afterwards."""
    numpy: Any = sys.modules.get("numpy.random")
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    before = torch.get_rng_state(), random.getstate(), numpy.get_state() if numpy else None
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        if numpy:
            numpy.set_state(before[2])
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


def has_module_hooks() -> bool:
    """Hooks that see the calls of all modules."""
    return bool(_has_any_global_hook())


def is_batched() -> bool:
    """Inside a backward whose gradients come many at once (`is_grads_batched`): they are no tensors for a kernel."""
    return _C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


def keeps_graph() -> bool:
    """Inside a backward: the graph may be gone through again, so what it saved must stay as it is."""
    return _autograd._get_current_graph_task_keep_graph()


def current_node() -> Any:
    """Inside a backward: the node whose turn it is."""
    return _C._current_autograd_node()


def has_saved_tensor_hooks() -> bool:
    """Someone is handed what autograd saves, and may look at it at any time."""
    return _autograd._top_saved_tensors_default_hooks(False) is not None


def is_symbolic(input: object) -> bool:
    """torch.fx is tracing: it hands stand-ins for tensors to whatever is no leaf of its graph."""
    fx = sys.modules.get("torch.fx")  # who traces has imported it
    return fx is not None and not isinstance(input, Tensor) and isinstance(input, fx.Proxy)


def leaf(module: torch.nn.Module, input: Any, *arguments: object, **named: object) -> Any:
    """The module as one node of the graph that is traced, as torch.nn's are: fx knows a leaf by where it is defined.

    Raises:
        TypeError: hooks saw the stand-ins and see the tensors again when the graph runs: what they change is doubled.
    """
    if module._forward_hooks:
        raise TypeError(
            f"torch.fx: expected no forward hooks on a {type(module).__name__}, got {len(module._forward_hooks)}; "
            "tidegate.restore(model) before it is traced, or remove them"
        )
    tracer: Any = input.tracer
    named = {name: value for name, value in named.items() if value is not None}
    while arguments and arguments[-1] is None:
        arguments = arguments[:-1]
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *arguments), named)


def is_per_example(weights: Iterable[Tensor | None]) -> bool:
    """torch.func is asking for what plain operations batch and a kernel does not.

    That is: a gradient for each example, weights that differ between examples, or tangents.
    """
    interpreters: Any = functorch.get_interpreter_stack()  # pyright: ignore
    kinds = {str(interpreter.key()).rsplit(".", 1)[-1] for interpreter in interpreters or ()}
    if not kinds <= {"Grad", "Vmap", "Functionalize"}:
        return True
    batched: Any = functorch.is_batchedtensor  # pyright: ignore
    return "Vmap" in kinds and ("Grad" in kinds or any(weight is not None and batched(weight) for weight in weights))


def unwrapped(operator: Any) -> Callable[..., Any]:
    """An operator without the class around it in Python, whose call takes a quarter of a microsecond."""
    return operator._op


def register_fake(operator: Any, shapes: Callable[..., Any], library: torch.library.Library) -> None:
    """As `torch.library.register_fake`, without what that looks up for its messages, the line that calls it: to find
    the line it reads files and asks every module for its own, a sixth of the time that importing tidegate takes."""
    private: Any = torch._library
    registry = private.simple_registry.singleton
    handle = registry.find(operator._name).fake_impl.register(shapes, __name__, lib=library)
    handles: Any = library
    handles._registration_handles.append(handle)


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """The operator past this level's Autograd key. The levels of torch.func below this one differentiate on."""
    with _C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(torch.is_grad_enabled() or is_transformed()):
        return operator(*arguments)


@contextlib.contextmanager
def recording() -> Generator[None]:
    """Record autograd, even inside an operator that was called past the Autograd key."""
    key = _C.DispatchKey
    with (
        _C._SetExcludeDispatchKeyGuard(key.AutogradFunctionality, False),
        _C._SetExcludeDispatchKeyGuard(key.ADInplaceOrView, False),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


def same_data(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers of the same memory; a fake tensor's has no address to ask for."""
    if (a.shape, a.stride(), a.storage_offset()) != (b.shape, b.stride(), b.storage_offset()):
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def flatten_for_cudnn(weights: Sequence[Tensor], count: int, input_size: int, mode: str, *sizes: int) -> None:
    """Move weights on a GPU into one piece of its memory, unless two of them share theirs.

    Args:
        count: of a layer in one direction.
        mode: torch.nn's.
        sizes: hidden_size, proj_size, layers, batch_first, bidirectional.
    """
    private: Any = torch  # whose stubs leave these out
    is_apart = len({weight.data_ptr() for weight in weights}) == len(weights)
    if is_apart and torch.backends.cudnn.enabled and private._use_cudnn_rnn_flatten_weight():
        import torch.backends.cudnn.rnn as rnn

        get_mode: Any = rnn.get_cudnn_mode
        with torch.cuda.device_of(weights[0]), torch.no_grad():
            private._cudnn_rnn_flatten_weight(list(weights), count, input_size, get_mode(mode), *sizes)


def current_stream(device: int) -> int:
    """The address of a GPU's current stream."""
    return _C._cuda_getCurrentRawStream(device)


def assert_later(condition: Tensor) -> None:
    """Fail if a bool on a device is False, when it is known: nothing waits for it."""
    torch.ops.aten._assert_async(condition)


@functools.cache
def multiplies_matrices() -> bool:
    """Whether torch's operators use AMX, which multiplies bfloat16 matrices."""
    torch_cpu: Any = torch.cpu
    return torch_cpu._is_amx_tile_supported()


def apply_plain(function: type[torch.autograd.Function], *arguments: object) -> Any:
    """`function.apply` where `is_plain`: without the look at every argument that torch.func would need."""
    bound: Any = super(torch.autograd.Function, function)
    return bound.apply(*arguments)


def apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    """`function.apply` at the Autograd key, where torch.func runs one level at a time, as for torch's own operators."""
    bound: Any = super(torch.autograd.Function, function)
    with enable_single_level_autograd_function():
        return bound.apply(*arguments)
