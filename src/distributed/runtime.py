"""From torchrun's environment to a Group and a device. The only file of the library that reads the environment."""

from __future__ import annotations

import logging
import os
import socket
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..sharding import check_rank
from . import checked
from .collectives import DOOR
from .failure import long_wait, postpone_sigterm, set_timeout
from .group import Group, ReduceOrder
from .lockstep import RankThread
from .shared_memory import decline

START = timedelta(minutes=5)
GLOO_TIMEOUT = "8"  # with the roll call a stalled rank is named within 10 s
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STARTERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}


def init(
    *,
    device: str | torch.device | None = None,
    backend: str | None = None,
    num_shards: int | None = None,
    reduce_order: ReduceOrder = "backend",
    timeout: timedelta | None = None,
    check: bool | None = None,
    shared_memory: bool | None = None,
) -> Group:
    """The Group of this process: over the default group where there is one, else over the one torchrun describes.

    Started by neither torchrun nor ``simulate`` it is a world of one. ``backend`` defaults to nccl on GPUs and
    gloo elsewhere. A collective fails after ``timeout``, naming the ranks that did not come (default:
    ISOSHARD_TIMEOUT seconds, else 8 s on gloo and torch's own on nccl, where the clock starts when a call is
    queued); where some ranks work for longer while others wait, use ``long_wait``. With ``check`` (default: whether
    ISOSHARD_CHECK is 1) ranks compare every call before they make it. Where all ranks of a group over gloo are on one
    host, they exchange tensors through shared memory, unless ``shared_memory`` is False (default: whether
    ISOSHARD_SHARED_MEMORY is 0) on any of them before its first collective. A collective of isoshard there does not
    meet one of ``torch.distributed`` that another rank is in.

    Raises ValueError when the environment describes several ranks, but not completely.
    """
    if not dist.is_initialized() and described():
        place = local_device(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        check = os.environ.get("ISOSHARD_CHECK") == "1" if check is None else check
        backend = backend or ("nccl" if place.type == "cuda" else "gloo")
        _join(backend, timeout, check)
        _log_place(backend, place, chosen=device is not None)
    if shared_memory is None:
        shared_memory = os.environ.get("ISOSHARD_SHARED_MEMORY") != "0"
    if dist.is_initialized() and not shared_memory:
        decline()
    return Group(num_shards=num_shards, reduce_order=reduce_order)


def described() -> bool:
    """Whether the environment describes this process as one of several ranks; False means a world of one.

    Raises ValueError for a description with holes or numbers that make no sense, and where srun or mpirun started
    several processes without one: each would take itself for a world of one.
    """
    if "RANK" in os.environ:
        missing = [name for name in NEEDED if not os.environ.get(name)]
        if missing:
            raise ValueError(
                f"RANK={os.environ['RANK']} is set, but not {', '.join(missing)}; start the program with torchrun, "
                f"or set all of {', '.join(NEEDED)}, or unset RANK to run one process"
            )
        check_rank(_integer("RANK"), _integer("WORLD_SIZE"), "RANK")
        return True
    if "WORLD_SIZE" in os.environ and _integer("WORLD_SIZE") > 1:
        raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} but RANK is not set; start the program with torchrun")
    for name, starter in STARTERS.items():
        if name in os.environ and _integer(name) > 1:
            raise ValueError(
                f"{starter} started {os.environ[name]} tasks, but RANK is not set and each would run on its own; "
                f"start torchrun in each task, or set {', '.join(NEEDED)} and LOCAL_RANK from its variables"
            )
    return False


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"{name}={os.environ[name]!r} in the environment is no integer") from None


def _log_place(backend: str, place: torch.device, *, chosen: bool) -> None:
    # Looked up at each call: under `isoshard run --simulate` every rank has loggers of its own.
    log, restarts = logging.getLogger("isoshard"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    attempt = f", restart {restarts}" if restarts != "0" else ""
    where = f"process {os.getpid()} of {socket.gethostname()}"
    log.info("%d ranks over %s; this one on %s, %s%s", dist.get_world_size(), backend, place, where, attempt)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and place.type == "cpu" and not chosen and os.environ.get("LOCAL_RANK", "0") == "0":
        ranks_here = os.environ.get("LOCAL_WORLD_SIZE", "1")
        log.warning("%s ranks on this machine, which shows %d GPU(s): they use the CPU", ranks_here, gpus)


def _join(backend: str, timeout: timedelta | None, check: bool) -> None:
    """Make the default group. Ranks may start as far apart as START allows; the timeout holds from then on."""
    store, rank, world_size = next(rendezvous("env://", timeout=START))
    # After a restart torchrun's store still holds what the failed attempt left there.
    store = PrefixStore(f"isoshard-attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if timeout is None and (backend == "gloo" or "ISOSHARD_TIMEOUT" in os.environ):
        timeout = timedelta(seconds=float(os.environ.get("ISOSHARD_TIMEOUT", GLOO_TIMEOUT)))
    checks = checked.Checks(backend, store, timeout or START) if check else None
    if check:
        checked.register_backend()
    name = checked.BACKEND if check else backend
    dist.init_process_group(
        name, store=store, rank=rank, world_size=world_size, timeout=START if backend == "gloo" else timeout,
        pg_options=checks,
    )  # fmt: skip
    if timeout is not None:
        set_timeout(dist.group.WORLD, timeout)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        postpone_sigterm(DOOR)


def local_device(device: str | torch.device | None = None) -> torch.device:
    """``device``, or this rank's GPU (``cuda:LOCAL_RANK``) where every rank of the machine has one, or the CPU.

    Raises ValueError for a device that is unknown, and for CUDA with fewer GPUs than ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank, ranks_here = (int(os.environ.get(n, d)) for n, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    if device is None:
        device = "cuda" if gpus >= ranks_here else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is none that torch knows ({str(error).splitlines()[0]})") from None
    if place.type != "cuda":
        return place
    if gpus < ranks_here:
        raise ValueError(f"device={device}: {ranks_here} ranks on this machine need as many GPUs, found {gpus}")
    return place if place.index is not None else torch.device("cuda", local_rank)


def close() -> None:
    """Wait for all ranks, then leave the default group, if there is one; ``simulate`` ends its own by itself."""
    if dist.is_initialized():
        with long_wait(Group(), START.total_seconds()):
            dist.barrier()
        if not isinstance(threading.current_thread(), RankThread):
            dist.destroy_process_group()


def cublas_workspace() -> str | None:
    """The setting on which cuBLAS's determinism rests."""
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def export_settings(*, check: bool, timeout: float | None) -> None:
    """Leave what a launcher was asked for to the processes that it starts."""
    # Without this a restarted attempt finds the keys of the failed one in torchrun's store, and hangs.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if check:
        os.environ["ISOSHARD_CHECK"] = "1"
    if timeout is not None:
        os.environ["ISOSHARD_TIMEOUT"] = str(timeout)
