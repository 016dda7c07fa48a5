"""Rank 1 dies while the others sum the gradient of an input beside a matrix product."""

import os
import signal
import time

import isoshard
import torch
from isoshard.modeling import ColumnParallelLinear
from isoshard.modeling.columns import MIN_BYTES

group = isoshard.init(shared_memory=False)
layer, x = ColumnParallelLinear(512, 6, group=group), torch.ones(1024, 512, requires_grad=True)
assert x.nbytes >= MIN_BYTES
for step in range(3):
    y = layer(x).sum()
    if step == 2 and group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        y.backward()
    except RuntimeError:
        print(f"rank {group.rank} ended after {time.monotonic() - begin:.1f} s", flush=True)
        raise
isoshard.close()
