# SPDX-License-Identifier: Apache-2.0
"""Train on several processes with DistributedDataParallel or FSDP2: a file to start from.

    torchrun --nproc-per-node 2 examples/train_distributed.py                    # DDP, this machine
    torchrun --nproc-per-node 2 examples/train_distributed.py --wrap fsdp --layer accelerated
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/train_distributed.py

Where there are GPUs each process takes the one of its LOCAL_RANK and they speak NCCL, else CPUs and gloo. The model and
the data are those of `tidegate demo`: a classifier of utterances, one full batch a step, spread over the processes.
Needs tidegate[cli], for NumPy.

Letters: N sequences, T steps, C channels, K classes.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tidegate as tg
from tidegate.cli.demo.training import LEARNING_RATE, Classifier, TidegateClassifier, TorchClassifier, standardised
from tidegate.data import Dataset, LabelledSequences, japanese_vowels

HIDDEN_SIZE = 64


def join() -> torch.device:
    """Join the processes that torchrun started. Returns this process's device."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def new_model(layer: str, dataset: Dataset, hidden_size: int = HIDDEN_SIZE) -> Classifier:
    """The demo's classifier around tidegate's own GRU and `lengths=`, or around torch.nn's and PackedSequence."""
    sizes: Any = {"bidirectional": True, "batch_first": True}
    classes = len(dataset.classes)
    if layer == "tidegate":
        return TidegateClassifier(tg.GRU(dataset.num_channels, hidden_size, **sizes), hidden_size, classes)
    return TorchClassifier(nn.GRU(dataset.num_channels, hidden_size, **sizes), hidden_size, classes)


def wrap(model: Classifier, how: str, device: torch.device) -> nn.Module:
    """`model` on `device`, for all processes: a whole copy each ("ddp"), or each parameter cut among them ("fsdp")."""
    model = model.to(device)
    if how == "ddp":
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    return fully_shard(model)  # a deep model: fully_shard each of its blocks first


def share(sequences: LabelledSequences, device: torch.device) -> LabelledSequences:
    """This process's part of the batch: every world-size-th sequence."""
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    parts = (sequences.padded, sequences.lengths, sequences.labels)
    return LabelledSequences(*(part[mine].to(device) for part in parts))


def backward(model: nn.Module, mine: LabelledSequences, total: int) -> Tensor:
    """Leave in the parameters the gradients of the mean loss over the whole batch of `total`; returns that loss.

    Both wrappers average the processes' gradients, so each process's sum is scaled to make that average the mean over
    all sequences, whatever share of them a process has.
    """
    loss = nn.functional.cross_entropy(model(mine.padded, mine.lengths), mine.labels, reduction="sum") / total
    (loss * dist.get_world_size()).backward()
    return summed(loss.detach())


@torch.no_grad()
def accuracy(model: nn.Module, mine: LabelledSequences, total: int) -> float:
    right = (model(mine.padded, mine.lengths).argmax(-1) == mine.labels).sum()
    return summed(right).item() / total


def summed(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """Each process writes its part. The names are the bare model's, so any number of processes can load it."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    optimizer.zero_grad()  # where there are gradients get_state_dict makes no room for the moments, and none are loaded
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def train(options: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(options.seed)
    dataset = standardised(japanese_vowels())
    model = new_model(options.layer, dataset)
    if options.layer == "accelerated":
        tg.accelerate(model)  # may as well come after wrap()
    model = wrap(model, options.wrap, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)  # after wrapping: FSDP replaces the parameters
    if options.load:
        load(model, optimizer, options.load)
    mine, test = share(dataset.train, device), share(dataset.test, device)
    for epoch in range(1, options.epochs + 1):
        optimizer.zero_grad()
        loss = backward(model, mine, len(dataset.train))
        optimizer.step()
        right = accuracy(model, test, len(dataset.test))
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {loss.item():.6f}, test accuracy {right:.1%}", flush=True)
    if options.save:
        save(model, optimizer, options.save)
    dist.barrier()  # nobody hangs up on one who is not done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrap", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--layer", choices=("tidegate", "accelerated"), default="tidegate")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="FOLDER", help="write a checkpoint at the end")
    parser.add_argument("--load", metavar="FOLDER", help="go on from a checkpoint, written by any number of processes")
    options = parser.parse_args()
    device = join()
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
