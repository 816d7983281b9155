# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does: distributed_worker.py's checks, and the example as users run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_distributed as example
from distributed_worker import MAKERS, double_dataset, one_process, optimizer_of

from tidegate.cli.demo.training import new_runs, standardised
from tidegate.data import japanese_vowels

WORKER = Path(__file__).parent / "distributed_worker.py"
EXAMPLES = Path(example.__file__).parent
SECONDS = 150  # some ten on an idle machine


def torchrun(script: Path, *arguments: object) -> str:
    """What the two processes print. A launch that fails, or hangs, fails the test and leaves no process behind."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    path = os.pathsep.join(filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        [*launcher, str(script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        print(process.communicate()[0])
        raise
    assert process.returncode == 0, output
    return output


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # it is: one process loads
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_gradients_training_and_checkpoints_are_one_processs(how: str, tmp_path: Path) -> None:
    assert "all checks passed" in torchrun(WORKER, how, tmp_path)
    _one_process_loads(tmp_path / MAKERS[how][-1])


def _one_process_loads(folder: Path) -> None:
    """What two processes saved after one step is one process's after one step, moments and all."""
    dataset = double_dataset()
    torch.manual_seed(0)
    twin = example.new_model("accelerated", dataset, hidden_size=7).double()
    loaded = example.new_model("accelerated", dataset, hidden_size=7).double()
    twins, optimizer = optimizer_of(twin), optimizer_of(loaded)
    one_process(twin, dataset.train)
    twins.step()
    example.load(loaded, optimizer, str(folder))
    expected, found = twins.state_dict(), optimizer.state_dict()
    for p, q in zip(loaded.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-10, atol=1e-12)


def test_the_example_trains_as_the_demo_does(tmp_path: Path) -> None:
    """Two epochs one way, a third from the checkpoint another way: the losses of the demo's runs, in one process."""
    folder = tmp_path / "checkpoint"
    printed = torchrun(WORKER, "example", "--epochs", 2, "--save", folder)
    printed += torchrun(
        WORKER, "example", "--epochs", 1, "--load", folder, "--wrap", "fsdp", "--layer", "accelerated", "--seed", 1
    )
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+), test accuracy [\d.]+%", printed)]

    dataset = standardised(japanese_vowels())
    for run in new_runs(dataset, "gru", example.HIDDEN_SIZE, seed=0):
        for _ in range(3):
            run.train_epoch(dataset.train)
        assert losses == pytest.approx(run.losses, abs=2e-5)  # float32, and six printed decimals
