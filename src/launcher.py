"""``isoshard run``: torchrun's command line, for processes or, with ``--simulate``, for ranks in one process.

isoshard run --nproc-per-node 4 train.py --lr 0.1               as torchrun would
isoshard run --simulate --nproc-per-node 4 train.py --lr 0.1    four simulated ranks, in lockstep
isoshard run --simulate 4 -m package.train --lr 0.1             the same, shorter, for a module
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence

_USAGE = f"usage: isoshard run [torchrun options] [--simulate [N]] script.py args\n\n{__doc__}"
# Written out, because asking torchrun for its options takes the seconds of importing torch.
_OPTIONS = """
ranks in this process:
  --simulate [N]              N simulated ranks, in lockstep (N may be given by --nproc-per-node, too)
  --schedule {ranks,random}   who runs next: the next rank, or any (ranks)
  --seed SEED                 of the random schedule (0)

what isoshard.init() does in the script:
  --check                     ranks compare every call before they make it
  --timeout SECONDS           timeout of a collective (8 on gloo, torch's own on nccl)

torchrun's, of which these are used most (torchrun --help has all of them):
  --nproc-per-node N          ranks on this machine: a number, gpu, cpu or auto (1)
  -m, --module                the script is a module, as for python -m
  --nnodes N                  machines; MIN:MAX lets their number vary (1)
  --max-restarts N            how often all ranks are started again after a failure (0)
  --standalone                one machine, on a free port
  --rdzv-backend c10d --rdzv-endpoint HOST:PORT --rdzv-id NAME
                              several machines, which find each other at HOST; the same line on each
  --node-rank I --master-addr HOST --master-port PORT
                              several machines, numbered by hand
  --log-dir DIR --redirects 3 --tee 3
                              a file for what each rank prints
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``isoshard``; ends with the exit status of the job."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        sys.exit(0 if args else 2)
    if args[0] != "run":
        sys.exit(f"isoshard: {args[0]!r} is no command; there is: run")
    sys.exit(run(args[1:]))


def run(args: list[str]) -> int:
    """Launch what the arguments of ``isoshard run`` describe."""
    if args and args[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE + _OPTIONS)
        return 0
    from torch.distributed import run as torchrun

    from .distributed.runtime import export_settings

    options = _parser().parse_args(_expand(args))
    export_settings(check=options.check, timeout=options.timeout)
    if options.simulate:
        return _simulate(options)
    options.nproc_per_node = options.nproc_per_node or "1"
    torchrun.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = "isoshard run"
    parser.description = "Launch a script on several ranks, with the options of torchrun and those of isoshard."
    parser.set_defaults(shutdown_timeout=5, nproc_per_node=os.environ.get("PET_NPROC_PER_NODE"))
    ours = parser.add_argument_group("isoshard")
    ours.add_argument(
        "--simulate", action="store_true", help="run the ranks in this process, in lockstep; --simulate N for N ranks"
    )
    ours.add_argument("--schedule", choices=["ranks", "random"], default="ranks", help="who runs next (--simulate)")
    ours.add_argument("--seed", type=int, default=0, help="of the random schedule (--simulate)")
    ours.add_argument("--check", action="store_true", help="isoshard.init() lets ranks compare every call")
    ours.add_argument("--timeout", type=float, metavar="SECONDS", help="isoshard.init()'s timeout of a collective")
    return parser


def _expand(args: list[str]) -> list[str]:
    """``--simulate N`` is short for ``--simulate --nproc-per-node N``."""
    at = args.index("--simulate") + 1 if "--simulate" in args else len(args)
    return [*args[:at], "--nproc-per-node", *args[at:]] if at < len(args) and args[at].isdigit() else args


def _simulate(options: argparse.Namespace) -> int:
    from torch.distributed.run import determine_local_world_size

    from .script import load_module, load_script, rank_environ, run_script

    if options.nproc_per_node is None:
        raise SystemExit("isoshard run --simulate: how many ranks? pass --simulate N, or --nproc-per-node N")
    nodes, per_node = int(str(options.nnodes).split(":")[0]), determine_local_world_size(options.nproc_per_node)
    if options.no_python or options.run_path or nodes < 1 or per_node < 1:
        raise SystemExit("isoshard run --simulate: a script or a module (-m) on at least one rank is needed")
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if nodes * per_node > 1 else {}
    environs = [{**threads, **rank_environ(rank, nodes, per_node)} for rank in range(nodes * per_node)]
    name, load = options.training_script, load_module if options.module else load_script
    root = os.getcwd() if options.module else os.path.dirname(os.path.abspath(name))
    sys.path.insert(0, root)
    schedule = random.Random(options.seed) if options.schedule == "random" else None
    try:
        loaded = [load(name) for _ in environs]
    except (OSError, SyntaxError, ImportError) as error:
        raise SystemExit(f"isoshard run: {error}") from error
    return run_script(loaded, root, [name, *options.training_script_args], environs, schedule)
