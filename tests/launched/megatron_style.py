"""Tensor and data parallelism written by hand: module globals, autograd functions, async calls, a pipeline hop."""

import argparse
import sys
from dataclasses import dataclass

import parallel_state
import torch
import torch.distributed as dist


@dataclass
class Config:
    width: int
    rank: int


class CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=parallel_state.tensor_group())
        return grad


class ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x, group=parallel_state.tensor_group())
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--width", type=int, default=8)
    args = parser.parse_args()
    dist.init_process_group(backend="gloo")
    parallel_state.initialize(args.tensor_parallel_size)
    group, data = parallel_state.tensor_group(), parallel_state.data_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    torch.manual_seed(1234 + rank)
    up = torch.randn(args.width, 4 * args.width // size, requires_grad=True)
    down = torch.randn(4 * args.width // size, args.width, requires_grad=True)
    torch.manual_seed(dist.get_rank(data))
    for step in range(3):
        x = torch.randn(2, args.width)
        y = ReduceFromRegion.apply(torch.tanh(CopyToRegion.apply(x) @ up) @ down)
        loss = y.square().mean()
        loss.backward()
        works = [dist.all_reduce(p.grad, group=data, async_op=True) for p in (up, down)]
        for work in works:
            work.wait()
        with torch.no_grad():
            for p in (up, down):
                p -= 0.01 * p.grad / dist.get_world_size(data)
                p.grad = None
        print(f"rank {dist.get_rank()} of {dist.get_world_size()} step {step} loss {loss.item()!r}")

    me, everyone = dist.get_rank(), dist.get_world_size()
    received = torch.zeros(2)
    ring = [
        dist.P2POp(dist.isend, torch.full((2,), float(me)), (me + 1) % everyone),
        dist.P2POp(dist.irecv, received, (me - 1) % everyone),
    ]
    for work in dist.batch_isend_irecv(ring):
        work.wait()
    configs = [None] * everyone
    dist.all_gather_object(configs, Config(args.width, me))
    print(f"received {received.tolist()}, {configs[-1]}, {parallel_state.CALLS} calls, {sys.argv[1:]}")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
