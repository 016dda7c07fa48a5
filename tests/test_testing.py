"""The pytest plugin: where marked tests run, what they get, and what is said when a rank fails or hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo  # simulate() does; pytester forgets what is imported while it runs, and torch comes only once

ROOT = Path(__file__).resolve().parents[1]
HEAD = "import os, time, pytest, torch, torch.distributed as dist\n"

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(source, *options)``: the outcome of a test file in another project, on a developer's machine."""
    for shows_whole_diffs in ("CI", "BUILD_NUMBER"):
        monkeypatch.delenv(shows_whole_diffs, raising=False)

    def run(source: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=HEAD + source)
        arguments = ("-p", "src.testing", "-p", "no:isoshard", "-p", "no:cacheprovider", "-rsx", *options)
        return pytester.runpytest_inprocess(*arguments)

    return run


MARKED = """
@pytest.mark.ranks(1, 4, gloo=2)
def test_a(group): pass

@pytest.mark.parametrize("x", "pq")
@pytest.mark.ranks(2, gloo=(), simulated=(8,))
def test_b(x): pass

def test_c(): pass
"""
SIMULATED = ["test_a[simulated-1]", "test_a[simulated-4]", "test_b[simulated-8-p]", "test_b[simulated-8-q]", "test_c"]
GLOO = ["test_a[gloo-2]", "test_b[nowhere-p]", "test_b[nowhere-q]", "test_c"]
BOTH = ["test_a[gloo-2]", *SIMULATED[:2], *SIMULATED[2:]]


@pytest.mark.parametrize(
    "options, names",
    [
        ((), SIMULATED),
        (("--ranks-backend", "gloo"), GLOO),
        (("-o", "ranks_backend=gloo"), GLOO),
        (("-o", "ranks_backend=gloo", "--ranks-backend", "simulated"), SIMULATED),
        (("--ranks-backend", "gloo, simulated"), BOTH),
    ],
)
def test_where_marked_tests_run(run: Run, options: tuple[str, ...], names: list[str]) -> None:
    shown = run(MARKED, "--collect-only", "-q", *options).stdout.str()
    assert re.findall("::(.*)", shown) == names


def test_a_test_without_ranks_on_the_chosen_backends_is_skipped(run: Run) -> None:
    result = run(MARKED, "--ranks-backend=gloo", "-k", "nowhere or test_c")
    result.assert_outcomes(passed=1, skipped=2, deselected=1)
    result.stdout.fnmatch_lines("*SKIPPED*has no ranks on gloo")


def test_nccl_without_enough_gpus_is_skipped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(MARKED, "--ranks-backend=nccl", "-k", "test_a")
    result.assert_outcomes(skipped=2, deselected=3)
    result.stdout.fnmatch_lines("*SKIPPED*needs 4 GPUs, found 0")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--ranks-backend=gluo",), "--ranks-backend: unknown 'gluo'; there are simulated, gloo, nccl"),
        (("-o", "ranks_timeout=soon"), "ranks_timeout: could not convert string to float: 'soon'"),
    ],
)
def test_wrong_options(run: Run, options: tuple[str, ...], message: str) -> None:
    result = run(MARKED, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR and message in result.stderr.str()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "give numbers of ranks"),
        ("0", "a number of ranks must be an integer of at least 1, not 0"),
        ("'2'", "a number of ranks must be an integer of at least 1, not '2'"),
        ("2, gluo=2", "unknown keyword 'gluo'"),
    ],
)
def test_wrong_markers(run: Run, arguments: str, message: str) -> None:
    result = run(f"@pytest.mark.ranks({arguments})\ndef test_x(): pass\n")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(f"test_it.py::test_x: @pytest.mark.ranks: {message}*")


def test_what_ranks_do_not_fit(run: Run) -> None:
    result = run(
        """
import unittest

@pytest.mark.ranks(2)
async def test_x(): pass

class TestX(unittest.TestCase):
    @pytest.mark.ranks(2)
    def test_y(self): pass

@pytest.fixture
def model(group): return group.rank

@pytest.mark.ranks(2)
def test_z(model): pass

def test_unmarked(group): pass
"""
    )
    result.assert_outcomes(errors=4)
    result.stdout.fnmatch_lines("ranks is for plain functions and methods: no unittest.TestCase, no async")
    result.stdout.fnmatch_lines("*group is there in the body of the test alone*")
    result.stdout.fnmatch_lines("group is for tests that are marked with*")


BODIES = """
@pytest.fixture
def seen(request):
    seen = []
    yield seen
    backend, size = request.node.name[11:-1].split("-")
    assert sorted(seen) == (list(range(int(size))) if backend == "simulated" else [])  # processes get copies

@pytest.mark.ranks(2, 4, gloo=2)
def test_group(group, seen):
    total = torch.tensor(group.rank + 1)
    dist.all_reduce(total, group=group.pg)
    assert total == sum(range(group.world_size + 1))
    seen.append(group.rank)

class TestClass:
    @pytest.mark.ranks(2, num_shards=8)
    def test_method(self, group):
        assert group.num_shards == 8 and self

@pytest.mark.ranks(2, reduce_order="tree")
def test_default_group(tmp_path):
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == dist.get_world_size() == 2
"""


def test_bodies_on_simulated_ranks(run: Run) -> None:
    run(BODIES).assert_outcomes(passed=4)


FAILING = """
def compare(a, b):
    assert a == b

def helper(group, numbers):
    if group.rank == 1:
        compare(numbers, [1, 3])
    dist.barrier()

@pytest.mark.ranks(4, gloo=2)
def test_diff(group):
    print("rank", group.rank, "was here")
    helper(group, [1, 2])

@pytest.mark.ranks(2)
def test_skipping():
    pytest.importorskip("no_such_module")

@pytest.mark.ranks(2)
def test_xfailing():
    pytest.xfail("not yet")

@pytest.mark.ranks(2)
def test_failing():
    pytest.fail("enough", pytrace=False)

@pytest.mark.ranks(2)
def test_failing_program(ranks):
    ranks(helper, [1, 2])

@pytest.mark.ranks(2)
def test_mismatch(group):
    dist.barrier() if group.rank else dist.all_reduce(torch.ones(1))
"""
OWN_TRACEBACK = r"""
rank 1 of {} \({}\) failed:
test_it.py:\d+: in test_diff
    helper\(group, \[1, 2\]\)
test_it.py:\d+: in helper
    compare\(numbers, \[1, 3\]\)
test_it.py:\d+: in compare
    assert a == b
E   assert \[1, 2\] == \[1, 3\]
E  *
E     At index 1 diff: 2 != 3
E     Use -v to get more diff
(?=-----|$)"""


def test_failures_on_simulated_ranks(run: Run) -> None:
    result = run(FAILING)
    result.assert_outcomes(failed=4, skipped=1, xfailed=1)
    shown = result.stdout.str()
    assert re.search(OWN_TRACEBACK.format(4, "simulated"), shown, re.MULTILINE)
    result.stdout.fnmatch_lines(
        [">       ranks(helper, *", "E *RankFailed: rank 1 of 2 (simulated) failed:"], consecutive=True
    )
    assert (
        "lockstep" not in shown
        and "rank_runs" not in shown
        and "During handling" not in shown
        and "Captured log" not in shown
    )
    result.stdout.fnmatch_lines("SKIPPED ?1? test_it.py:*could not import 'no_such_module'*")
    result.stdout.fnmatch_lines("XFAIL test_it.py::test_xfailing?simulated-2? - *not yet")
    result.stdout.fnmatch_lines(["rank 0 of 2 (simulated) failed:", "enough"], consecutive=True)
    result.stdout.fnmatch_lines(["2 ranks (simulated) failed:", "mismatched collectives*"], consecutive=True)


@pytest.mark.parametrize("style, has", [("long", "b = [1, 3]"), ("native", "Traceback (most recent call last)")])
def test_the_style_of_tracebacks_is_that_of_pytest(run: Run, style: str, has: str) -> None:
    assert has in run(FAILING, f"--tb={style}", "-k", "test_diff").stdout.str()


PROCESSES = """
import threading

def folder(group):
    return os.getcwd()

def test_folder(ranks, monkeypatch, tmp_path):
    started_in = os.getcwd()
    monkeypatch.chdir(tmp_path)
    assert ranks.on("gloo", 2)(folder) == [started_in] * 2

@pytest.fixture
def lock():
    return threading.Lock()

@pytest.mark.ranks(2)
def test_lock(lock): pass

@pytest.mark.ranks(2)
def test_patch(monkeypatch): pass
"""
HANGING = """
@pytest.mark.ranks({})
def test_hang(group):
    while group.rank:
        time.sleep(0.01)
    dist.barrier()
"""


@pytest.mark.slow
def test_bodies_on_processes(run: Run) -> None:
    """One pool serves the first five; each failure ends it, and the hung test gets the third."""
    options = ("--ranks-backend=gloo", "-k", "not failing and not mismatch")
    result = run(PROCESSES + BODIES + FAILING + HANGING.format("2, timeout=1"), *options)
    result.assert_outcomes(passed=4, failed=4, skipped=1, deselected=4)
    shown = result.stdout.str()
    assert re.search(OWN_TRACEBACK.format(2, "gloo"), shown, re.MULTILINE)
    assert "was here" in shown and "rank_pool" not in shown
    result.stdout.fnmatch_lines("fixture 'lock' cannot be sent to gloo processes: TypeError: cannot pickle*")
    result.stdout.fnmatch_lines(
        "fixture 'monkeypatch' cannot be sent to gloo processes: it changes this process alone*"
    )
    result.stdout.fnmatch_lines(
        [
            "test_it.py::test_hang?gloo-2?: ranks ?0, 1? of 2 (gloo) did not answer within 1 s",
            "rank 0:",
            '  File "*", line * in barrier',
            '  File "*test_it.py", line * in test_hang',
            "rank 1:",
            '  File "*test_it.py", line * in test_hang',
        ]
    )


def test_a_hung_test_on_simulated_ranks_is_ended_and_named(run: Run) -> None:
    result = run(HANGING.format("2"), "-o", "ranks_timeout=0.3")
    result.assert_outcomes(failed=1)
    lines = [
        "test_it.py::test_hang?simulated-2?: 2 ranks (simulated) did not end within 0.3 s",
        "rank 1:",
        '  File "*test_it.py", line [56] in test_hang',
    ]
    result.stdout.fnmatch_lines(lines, consecutive=True)


def test_the_examples_of_the_page(run: Run) -> None:
    page = (ROOT / "docs/testing.md").read_text()
    examples = "\n\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    result = run(examples, "-k", "not same_bits_in_both_places")
    result.assert_outcomes(passed=7, failed=2, deselected=1)
    report = re.search(r"\n__.*?\n(rank 1 of 2.*?)\ntest_sum.py:22", page, re.DOTALL)
    assert report is not None and report[1].replace("gloo", "simulated") in result.stdout.str()


def test_pytest_starts_without_torch_and_the_plugin_may_come_twice(tmp_path: Path) -> None:
    (tmp_path / "isoshard").symlink_to(ROOT / "src", target_is_directory=True)
    (tmp_path / "test_it.py").write_text(
        "import sys, pytest\n"
        "def test_light():\n    assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        "@pytest.mark.ranks(2)\ndef test_ranks(group):\n    assert group.world_size == 2\n"
    )
    options = ("-q", "-p", "no:isoshard", "-p", "no:cacheprovider", "-p", "src.testing", "-p", "isoshard.testing")
    shown = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--ranks-backend=simulated", "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    ).stdout
    assert "2 passed" in shown, shown
