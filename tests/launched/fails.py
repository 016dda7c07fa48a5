"""Rank 1 dies, raises or stalls in the middle of a run of all-reduces."""

import os
import signal
import sys
import time

import isoshard
import torch
from isoshard.distributed import all_reduce

group = isoshard.init()
for step in range(6):
    if step == 5 and group.rank == 1:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "raises":
            raise ValueError("rank 1 has had enough")
        if sys.argv[1] == "stalls":
            time.sleep(600)
    begin = time.monotonic()
    try:
        all_reduce(torch.ones(4), group=group)
    except RuntimeError:
        print(f"rank {group.rank} ended after {time.monotonic() - begin:.1f} s", flush=True)
        raise
isoshard.close()
