"""isoshard run: the same script as processes and as simulated ranks, and what cannot work is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from src import launcher

ROOT = Path(__file__).parent.parent
LAUNCHED = ROOT / "tests" / "launched"

pytestmark = pytest.mark.usefixtures("left_as_found")

Simulate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Simulate:
    """``simulated(code, *args, ranks=3, options=())``: runs a script; its exit status, output and error output."""

    def run(code: str, *args: str, ranks: int = 3, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(code))
        path = list(sys.path)
        status = launcher.run(["--simulate", str(ranks), *options, str(script), *args])
        sys.path[:] = path
        out, err = capsys.readouterr()
        return status, out, err.replace(f"{tmp_path}/", "")

    return run


BEGIN = """
import os, sys, threading
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
"""


def lines_of(command: list[str]) -> dict[str, list[str]]:
    """What each rank printed."""
    done = subprocess.run(command, cwd=LAUNCHED, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for rank, line in re.findall(r"^\[(?:rank|default)(\d+)\]: ?(.*)$", done.stdout, re.MULTILINE):
        found.setdefault(rank, []).append(line)
    return found


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(["ddp.py", "--epochs", "2"], marks=pytest.mark.slow),
        pytest.param(["tensor_parallel.py"], marks=pytest.mark.slow),
        pytest.param(["megatron_style.py", "--width", "8"], marks=pytest.mark.slow),
    ],
    ids=lambda script: script[0],
)
def test_same_output_simulated_and_under_torchrun(script: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "isoshard", "run"]
    simulated = lines_of([*command, "--simulate", "--nproc-per-node", "4", *script])
    processes = lines_of([*command, "--nproc-per-node", "4", "--tee", "1", "--log-dir", str(tmp_path), *script])
    assert sorted(simulated) == ["0", "1", "2", "3"] and all(simulated.values())
    assert simulated == processes


def test_each_rank_has_its_own_world(simulated: Simulate, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("rank = None\ncalls = 0\n")
    code = """
        import argparse, logging, os, pickle, random, sys
        from dataclasses import dataclass
        import numpy, torch, torch.distributed as dist
        import helper

        @dataclass
        class Point:
            x: int

        rank = int(os.environ["RANK"])
        helper.rank = rank
        os.environ["MINE"] = str(rank)
        sys.argv.append(f"extra{rank}")
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, stream=sys.stdout, format="%(message)s")
        if rank == 1:
            torch.set_default_dtype(torch.float64)
        for module in (torch, numpy.random, random):
            (getattr(module, "manual_seed", None) or module.seed)(rank)
        dist.init_process_group()
        for _ in range(3):
            dist.barrier()
            helper.calls += rank
        logging.info("only rank 0")
        points = [None] * dist.get_world_size()
        dist.all_gather_object(points, Point(rank))
        torch.manual_seed(rank)
        draw = torch.rand(1, dtype=torch.float32).item()
        print(helper.rank, helper.calls, os.environ["MINE"], sys.argv[1:], torch.get_default_dtype(), draw)
        print(points[2], type(points[2]) is Point, sys.modules["__main__"].Point is Point, __name__, dist.get_backend())
        dist.destroy_process_group()
        print(dist.is_initialized())
        sys.exit(0)
    """
    status, out, err = simulated(code, "--steps")
    draws = [0.49625658988952637, 0.7576315999031067, 0.6146950721740723]
    for rank, dtype in enumerate(["float32", "float64", "float32"]):
        printed = [
            line.removeprefix(f"[rank{rank}]: ") for line in out.splitlines() if line.startswith(f"[rank{rank}]")
        ]
        assert printed == [
            *["only rank 0"] * (rank == 0),
            f"{rank} {3 * rank} {rank} ['--steps', 'extra{rank}'] torch.{dtype} {draws[rank]}",
            "Point(x=2) True True __main__ gloo",
            "False",
        ]
    assert (status, err) == (0, "")
    assert "helper" not in sys.modules


def test_the_environment_of_torchrun(simulated: Simulate) -> None:
    names = "RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS TORCHELASTIC_RESTART_COUNT"
    code = f"import os, torch\nprint(*(os.environ[name] for name in '{names}'.split()), torch.get_num_threads())"
    out = simulated(code, ranks=2, options=("--nnodes", "2"))[1].splitlines()
    assert out == [f"[rank{r}]: {r} {r % 2} {r // 2} 4 2 1 0 1" for r in range(4)]


def test_the_modules_of_a_package_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    package = tmp_path / "tool"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "state.py").write_text("value = []")
    (package / "__main__.py").write_text(
        "import os\nfrom .state import value\nvalue.append(os.environ['RANK'])\nprint(value, __package__)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert launcher.run(["--simulate", "2", "-m", "tool"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"[rank{r}]: ['{r}'] tool" for r in range(2)]


def test_the_store_of_the_job(simulated: Simulate) -> None:
    code = """
        import os
        from datetime import timedelta
        rank = int(os.environ["RANK"])
        import torch.distributed as dist
        dist.init_process_group("gloo", init_method="tcp://localhost:29500", rank=rank, world_size=3)
        store = dist.TCPStore("localhost", 29555, 3, rank == 0, timedelta(seconds=5))
        if rank == 2:
            store.set("key", "value")
        dist.monitored_barrier()
        while not store.check(["key"]):
            pass
        print(store.get("key"), store.add("count", rank))
    """
    status, out, _ = simulated(code)
    assert status == 0 and out.splitlines() == [
        "[rank2]: b'value' 2",
        "[rank0]: b'value' 2",
        "[rank1]: b'value' 3",
    ]


ENDS = {
    "raise ValueError('boom')": (
        '[rank1]:   File "script.py", line 6, in <module>',
        "[rank1]: ValueError: boom",
        "isoshard run: rank 1 raised ValueError: boom, at script.py:6\n  rank 0 waits in barrier()",
    ),
    "sys.exit(3)": ("isoshard run: rank 1 raised SystemExit: 3, at script.py:6",),
    "sys.exit('sorry')": ("[rank1]: sorry\n",),
    "sys.exit(0)": ("rank 1 has already returned", "ranks 0, 2: barrier() forward, at script.py:7"),
    "dist.distributed_c10d._get_default_store().wait(['none'])": ("rank 1: the store's keys", "none'], which nobody"),
    "import signal; signal.signal(signal.SIGTERM, print)": (
        "signal.signal() under --simulate: signal handlers belong",
    ),
    "import torch.multiprocessing as mp; mp.spawn(print)": ("cannot start further ranks as processes",),
    "dist.init_process_group(rank=0, world_size=7)": (
        "init_process_group(rank=0, world_size=7) in simulated rank 1 of 3",
    ),
    "threading.Thread(target=dist.barrier).start()": ("which is no rank of this simulation",),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("statement", ENDS)
def test_how_a_rank_ends(simulated: Simulate, statement: str) -> None:
    status, _, err = simulated(f"{BEGIN}if rank == 1: {statement}\ndist.barrier()\n")
    assert status == 1
    for text in ENDS[statement]:
        assert text in err, err


def test_a_collective_in_a_child_process_is_refused(simulated: Simulate) -> None:
    code = f"""{BEGIN}
if os.fork() == 0:
    try:
        dist.barrier()
    except RuntimeError as error:
        os._exit(0 if "in a child process of a simulated rank" in str(error) else 1)
    os._exit(2)
print(os.wait()[1])
"""
    assert simulated(code, ranks=2)[:2] == (0, "[rank0]: 0\n[rank1]: 0\n")


def test_collectives_at_import_are_refused(simulated: Simulate, tmp_path: Path) -> None:
    (tmp_path / "eager.py").write_text("import torch.distributed as dist\n\ndist.barrier()\n")
    status, _, err = simulated(f"{BEGIN}import eager\n")
    assert status == 1
    assert "rank 0: barrier() forward, at eager.py:3, while a module is being imported" in err


def test_a_random_schedule_is_repeated_by_its_seed(simulated: Simulate) -> None:
    code = f"{BEGIN}for i in range(3):\n    dist.barrier()\n    print(i)\n"
    outputs = [simulated(code, options=("--schedule", "random", "--seed", seed))[1] for seed in ("1", "1", "2", "3")]
    assert outputs[0] == outputs[1] and len(set(outputs)) > 1
    assert all(sorted(output) == sorted(outputs[0]) for output in outputs)


def test_the_number_of_ranks(simulated: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """To be simulated it must be given, in one way or the other; processes are one, as torchrun has it."""
    script = tmp_path / "script.py"
    script.write_text("import os\nprint(os.environ['WORLD_SIZE'])")
    for before in ([], ["--nnodes", "2"], ["--schedule", "random"]):
        with pytest.raises(SystemExit, match=r"^isoshard run --simulate: how many ranks\? pass --simulate N, or"):
            launcher.run([*before, "--simulate", str(script), "--nproc-per-node", "3"])
    for given in (["--simulate", "2"], ["--simulate", "--nproc-per-node", "2"], ["--nproc_per_node=2", "--simulate"]):
        assert launcher.run([*given, str(script)]) == 0
        assert capsys.readouterr().out == "[rank0]: 2\n[rank1]: 2\n"
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    assert launcher.run(["--simulate", str(script)]) == 0
    monkeypatch.delenv("PET_NPROC_PER_NODE")
    started = []
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    launcher.run([str(script)])
    assert started[0].nproc_per_node == "1"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_any_more(tmp_path: Path, unbuffered: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"{BEGIN}for i in range(4000):\n    print('line', i)\n    dist.barrier()\n")
    command = f"{sys.executable} -m src run --simulate 2 {script} | head -n 1"
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[rank0]: line 0\n", "")


def test_another_broken_pipe_is_named(simulated: Simulate) -> None:
    status, _, err = simulated(f"{BEGIN}if rank == 1: raise BrokenPipeError('a socket')\ndist.barrier()\n")
    assert status == 1 and "isoshard run: rank 1 raised BrokenPipeError: a socket" in err


def test_what_is_not_there(tmp_path: Path) -> None:
    for args in (["none.py"], ["-m", "no.such.module"]):
        with pytest.raises(SystemExit, match=r"isoshard run: .*(none\.py|no)"):
            launcher.run(["--simulate", "2", *args])
    with pytest.raises(SystemExit, match="'fly' is no command"):
        launcher.main(["fly"])


@pytest.mark.parametrize(
    "call, shown",
    [
        ("scripts.options:parse_options('A job.', ['--help'])", "--num-shards V"),
        ("scripts.train:main(['--help'])", "--num-shards V"),
        ("scripts.generate:main(['--help'])", "repeat the option for a batch"),
        ("scripts.generate:main(['--help'])", "of the draws (0)"),
        ("scripts.convert:main(['--help'])", "GiB per safetensors file (5)"),
        ("scripts.verify:parse_options(['--help'])", "--matrix"),
        ("scripts.plan:parse_options(['--help'])", "--node-ranks N"),
        ("scripts.layers:main(['--help'])", "--num-shards V"),
        ("scripts.figures:main(['--help'])", "--out OUT"),
        ("src.launcher:main(['--help'])", "isoshard run --simulate 4"),
        ("src.launcher:main(['run', '--help'])", "--max-restarts N"),
    ],
)
def test_help_comes_without_torch(call: str, shown: str) -> None:
    module, call = call.split(":")
    program = (
        f"import sys, {module}\ntry:\n    {module}.{call}\nexcept SystemExit as ended:\n    assert not ended.code\n"
    )
    program += "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and shown in done.stdout, done.stdout + done.stderr


def test_help_names_options_that_exist() -> None:
    known = {option for action in launcher._parser()._actions for option in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", launcher._OPTIONS))
    assert named <= known | {"--help"} and len(named) > 15
    ours = {"--simulate", "--schedule", "--seed", "--check", "--timeout"}
    assert ours <= named
