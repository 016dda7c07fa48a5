"""A training step of a small Llama on two gloo processes, beside other libraries' layers: side by side in one run.

    torchrun --standalone --nproc-per-node 2 -m scripts.bench.steps [--only medium small] [--gloo] [--rounds 9]

All contenders begin with the same weights, see the same batch and use the same AdamW; their first losses must agree.
With ``--gloo`` our ranks, too, send by gloo, and not through the memory that they share.
A step is timed on the wall, the slowest rank counting; contenders take turns, the order changing every round.
``scripts/bench/peers.sh`` installs the peers.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from src import init
from src.distributed import Group
from src.formats import load_hugging_face, save_hugging_face
from src.modeling import ModelArgs, Transformer
from src.training import batch_loss

from . import step_peers
from .peers import Missing
from .table import header, rounds, row

Step = Callable[[], float]

SIZES = {
    "medium": (ModelArgs(dim=512, n_layers=4, n_heads=8, vocab_size=16384, ffn_dim=1536, max_seq_len=256), 2, 256),
    "small": (ModelArgs(dim=256, n_layers=4, n_heads=8, vocab_size=4096, ffn_dim=768, max_seq_len=32), 1, 32),
}
BARS = {
    "medium": {"megatron": 0.95, "dtensor": 0.80, "transformers": 0.70},
    "small": {"megatron": 0.60, "dtensor": 0.30},
    "medium, gloo": {"megatron": 0.95, "dtensor": 0.80, "transformers": 0.70},
    "small, gloo": {"megatron": 0.90, "dtensor": 0.45},
}


def training_step(model: nn.Module, loss: step_peers.Loss, batch: tuple[Tensor, Tensor]) -> Step:
    """One step with AdamW, fused, which takes DTensors and plain tensors by turns; gives the loss."""
    kinds: dict[type, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        kinds.setdefault(type(parameter.data), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": same} for same in kinds.values()], lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(*batch)
        if value.requires_grad:
            value.backward()
        optimizer.step()
        return value.item()

    return step


def contenders(directory: Path, batch: tuple[Tensor, Tensor], group: Group) -> dict[str, Step]:
    """Ours first, then every peer that is installed."""
    ours = load_hugging_face(directory, group=group)
    steps = {"isoshard": training_step(ours, lambda ids, targets: batch_loss(ours, ids, targets, group=group), batch)}
    weights = load_file(directory / "model.safetensors")
    for build in (step_peers.megatron, step_peers.dtensor, step_peers.transformers):
        try:
            model, loss = build(directory, weights)
        except Missing as missing:
            print_once(f"{build.__name__}: no peer: {missing}")
            continue
        steps[build.__name__] = training_step(model, loss, batch)
    return steps


def timed(step: Step, group: Group) -> float:
    """Milliseconds of one step on the slowest rank."""
    dist.barrier(group.pg)
    began = time.perf_counter()
    step()
    seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group.pg)
    return seconds.item() * 1e3


def check_agreement(losses: dict[str, float]) -> None:
    """Raise if a contender computes something else."""
    for name, loss in losses.items():
        if abs(loss - losses["isoshard"]) > 1e-4:
            raise SystemExit(f"the losses differ: {losses}; {name} is no peer")


def race(name: str, count: int, group: Group, by_gloo: bool) -> None:
    """Print one row for each peer."""
    label = f"{name}, gloo" if by_gloo else name
    args, batch_size, length = SIZES[name]
    args.rope_pairing = "halves"
    torch.manual_seed(0)
    ids = torch.randint(args.vocab_size, (batch_size, length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    found = [""]
    with TemporaryDirectory() as directory:
        found[0] = directory
        dist.broadcast_object_list(found, group=group.pg)
        save_hugging_face(Path(found[0]) / "model", Transformer(args, group=group), group=group)
        steps = contenders(Path(found[0]) / "model", batch, group)
        dist.barrier(group.pg)
    check_agreement({who: step() for who, step in steps.items()})
    times = list(rounds([partial(timed, step, group) for step in steps.values()], count))
    for place, who in enumerate(steps):
        if who != "isoshard":
            pairs = [(found[0], found[place]) for found in times]
            print_once(row(f"step {label} / {who}", pairs, BARS[label].get(who)))


def print_once(line: object) -> None:
    """Rank 0 alone prints."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SIZES), default=list(SIZES), help="sizes (%(default)s)")
    parser.add_argument("--gloo", action="store_true", help="no shared memory")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each race (%(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    group = init(device="cpu", shared_memory=not options.gloo)
    print_once(header())
    for name in options.only:
        race(name, options.rounds, group, options.gloo)
    dist.barrier(group.pg)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
