# SPDX-License-Identifier: Apache-2.0
"""Processes that fork after a call, and that end while a thread is inside one: no worse than with torch.nn."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork")

FORKED = """if True:
    import os, signal, torch, tidegate as tg
    torch.set_num_threads(2)
    layer = tg.{kind}(128, 128)
    x, grad = torch.randn(400, 16, 128), torch.ones(400, 16, 128)
    def run():
        for parameter in layer.parameters():
            parameter.grad = None
        output = layer(x)[0]
        output.backward(grad)
        with torch.no_grad():
            # So little that torch's own operators need no threads.
            return [t.flatten()[::97] for t in (output.detach(), layer(x)[0], layer.weight_hh_l0.grad)]
    right = [run() for _ in range(3)][-1]  # the pool's threads are there before the fork
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        ok = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(run(), right))
        os._exit(0 if ok else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    run()
"""

ENDING = """if True:
    import threading, time, torch, tidegate
    layer = {library}.GRU(64, 64, 2)
    x = torch.randn(500, 4, 64)
    def work():
        while True:
            layer(x)[0]{backward}
    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.3)
"""


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_child_forked_after_a_threaded_call_runs_alone(kind: str) -> None:
    """The child has the pool of OpenMP without its threads; torch's own operators wait for them for ever."""
    done = ended(FORKED.format(kind=kind))
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize("backward", ["", ".sum().backward()"], ids=["inference", "training"])
def test_a_process_that_ends_inside_a_call_ends(backward: str) -> None:
    """Python ends daemon threads by unwinding them, which no C++ frame of torch allows: SIGABRT with torch.nn, too."""
    codes = {ended(ENDING.format(library="tidegate", backward=backward)).returncode for _ in range(3)}
    theirs = {ended(ENDING.format(library="torch.nn", backward=backward)).returncode for _ in range(3)}
    assert codes <= {0, -signal.SIGABRT, -signal.SIGSEGV} | theirs


def test_a_process_with_idle_threads_ends_well() -> None:
    code = """if True:
        import threading, torch, tidegate
        layer, x, done = tidegate.GRU(64, 64), torch.randn(50, 4, 64), threading.Event()
        def work():
            layer(x)[0].sum().backward()
            done.set()
            threading.Event().wait()
        threading.Thread(target=work, daemon=True).start()
        done.wait()
    """
    assert ended(code).returncode == 0
