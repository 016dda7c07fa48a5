"""What pytest does with ``ranks``, the marker and the fixture."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .rank_pool import RankFailed, RankPool
from .rank_runs import BACKENDS, Ranks, call_body, call_sent_body, missing_gpus

PLACE = "ranks_place"
MARKER = """ranks(*world_sizes, simulated=, gloo=, nccl=, num_shards=None, reduce_order="backend", timeout=): \
run the test on each number of ranks, on each backend of --ranks-backend. A backend's keyword (a number, or a tuple, \
which may be empty) replaces the numbers there. timeout in seconds. (isoshard)"""

Sizes = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Request:
    """The arguments of the marker ``ranks`` on one test."""

    sizes: dict[str, tuple[int, ...]]
    group_options: dict[str, Any]
    timeout: float | None


def read_marker(
    *world_sizes: int,
    simulated: Sizes = None,
    gloo: Sizes = None,
    nccl: Sizes = None,
    timeout: float | None = None,
    **group_options: Any,
) -> Request:
    """The marker's arguments, checked. Raises TypeError and ValueError."""
    given = zip(BACKENDS, (simulated, gloo, nccl), strict=True)
    sizes = {backend: world_sizes if own is None else own for backend, own in given}
    tuples = {backend: (own,) if isinstance(own, int) else tuple(own) for backend, own in sizes.items()}
    if not any(tuples.values()):
        raise ValueError("give numbers of ranks, such as @pytest.mark.ranks(2, 4)")
    for size in (size for own in tuples.values() for size in own):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"a number of ranks must be an integer of at least 1, not {size!r}")
    if unknown := group_options.keys() - {"num_shards", "reduce_order"}:
        raise TypeError(f"unknown keyword {min(unknown)!r}")
    return Request(tuples, group_options, timeout)


def place_of(item: pytest.Item) -> tuple[str, int] | None:
    """Backend and number of ranks of a marked test."""
    place: tuple[str, int] | None = getattr(getattr(item, "callspec", None), "params", {}).get(PLACE)
    return place


class GroupOfRank:
    """Stands for ``group`` until the body of the test runs on a rank, which has the real one."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("group is there in the body of the test alone: fixtures are set up once, before the ranks")


class RankTests:
    """The plugin, one object for each test run: it owns the worker processes."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        chosen = config.getoption("ranks_backend") or config.getini("ranks_backend")
        self.backends = [name.strip() for name in chosen.split(",") if name.strip()]
        if unknown := [name for name in self.backends if name not in BACKENDS]:
            raise pytest.UsageError(f"--ranks-backend: unknown {unknown[0]!r}; there are {', '.join(BACKENDS)}")
        try:
            self._timeout = float(config.getini("ranks_timeout"))
        except ValueError as error:
            raise pytest.UsageError(f"ranks_timeout: {error}") from None
        self._pools: dict[tuple[str, int], RankPool] = {}
        config.addinivalue_line("markers", MARKER)

    def pytest_unconfigure(self) -> None:
        for pool in self._pools.values():
            pool.close()

    @pytest.fixture
    def ranks(self, request: pytest.FixtureRequest) -> Ranks:
        """``ranks(program, *args, **group_options)``: ``program(group, *args)`` on every rank of this test."""
        return self._ranks_of(request.node)

    @pytest.fixture
    def group(self, request: pytest.FixtureRequest) -> GroupOfRank:
        """In the body of a test marked with ``ranks``: the Group of the rank that runs it."""
        if place_of(request.node) is None:
            pytest.fail("group is for tests that are marked with @pytest.mark.ranks(...)", pytrace=False)
        return GroupOfRank()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        request = _request(metafunc.definition)
        if request is None:
            return
        places = [(backend, size) for backend in self.backends for size in request.sizes[backend]]
        params = [pytest.param(place, id="{}-{}".format(*place), marks=_skip(missing_gpus(*place))) for place in places]
        nowhere = pytest.param(("", 0), id="nowhere", marks=_skip(f"has no ranks on {', '.join(self.backends)}"))
        metafunc.fixturenames.append(PLACE)
        metafunc.parametrize(PLACE, params or [nowhere])

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        function = getattr(item, "obj", None)
        if item.get_closest_marker("ranks") and (place_of(item) is None or inspect.iscoroutinefunction(function)):
            pytest.fail("ranks is for plain functions and methods: no unittest.TestCase, no async", pytrace=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Generator[None, object, object]:
        if place_of(pyfuncitem) is None:
            return (yield)
        body, ranks = pyfuncitem.obj, self._ranks_of(pyfuncitem)

        def run(**arguments: Any) -> None:
            __tracebackhide__ = True
            if any(isinstance(value, Ranks) for value in arguments.values()):
                body(**arguments)
            else:
                run_body(ranks, body, arguments)

        pyfuncitem.obj = run
        try:
            return (yield)
        finally:
            pyfuncitem.obj = body

    def _ranks_of(self, item: pytest.Item) -> Ranks:
        backend, world_size = place_of(item) or ("", 0)
        request = _request(item)
        return Ranks(
            backend,
            world_size,
            test=item.nodeid,
            timeout=self._timeout if request is None or request.timeout is None else request.timeout,
            style=self._config.getoption("tbstyle"),
            pool=self._pool,
            group_options={} if request is None else request.group_options,
        )

    def _pool(self, backend: str, world_size: int) -> RankPool:
        place = (backend, world_size)
        if place not in self._pools:
            folder = self._config.invocation_params.dir
            host = functools.partial(under_pytest, worker_arguments(self._config), folder)
            self._pools[place] = RankPool(backend, world_size, host=host)
        return self._pools[place]


def _request(item: pytest.Item) -> Request | None:
    marker = item.get_closest_marker("ranks")
    if marker is None:
        return None
    try:
        return read_marker(*marker.args, **marker.kwargs)
    except (TypeError, ValueError) as error:
        problem = str(error)
    pytest.fail(f"{item.nodeid}: @pytest.mark.ranks: {problem}", pytrace=False)


def _skip(reason: str) -> Sequence[pytest.MarkDecorator]:
    return [pytest.mark.skip(reason=reason)] if reason else []


def run_body(ranks: Ranks, body: Callable[..., None], arguments: dict[str, Any]) -> None:
    """The body of a test on every rank. Fails the test with what the rank says, without a traceback of this process."""
    from .distributed import SimulationError

    __tracebackhide__ = True
    groups = [name for name, value in arguments.items() if isinstance(value, GroupOfRank)]
    values = {name: value for name, value in arguments.items() if name not in groups}
    try:
        if ranks.backend == "simulated":
            ranks(call_body, body, values, groups)
        else:
            ranks(call_sent_body, pickled(body, values, ranks.backend), groups)
    except (RankFailed, TimeoutError) as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    except SimulationError as error:
        text = f"{ranks.world_size} ranks (simulated) failed:\n{error}"
        raise pytest.fail.Exception(text, pytrace=False) from None


def pickled(body: Callable[..., None], values: dict[str, Any], backend: str) -> bytes:
    """Body and fixture values for another process. Fails the test, naming what cannot get there."""
    named = {"the test": body} | {f"fixture {name!r}": value for name, value in values.items()}
    for name, value in named.items():
        if reason := unpicklable(value):
            pytest.fail(f"{name} cannot be sent to {backend} processes: {reason}", pytrace=False)
    return pickle.dumps((body, values))


def unpicklable(value: Any) -> str:
    """Why ``value`` cannot be used in another process; empty if it can."""
    if isinstance(value, pytest.MonkeyPatch):
        return "it changes this process alone; use pytest.MonkeyPatch.context() in the body"
    try:
        pickle.dumps(value)
    except Exception as error:  # objects raise what they like
        return f"{type(error).__name__}: {error}"
    return ""


class Server:
    """A plugin in a worker process: serves programs where pytest would run tests."""

    def __init__(self, serve: Callable[[], None]) -> None:
        self._serve = serve

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        # Test modules whose directory pytest did not put on sys.path (--import-mode=importlib) have names from here.
        sys.path.append(str(config.rootpath))
        plugins: Any = config.pluginmanager
        plugins.get_plugin("terminal").pytest_configure(config)  # the writer that formats differences
        around_test = plugins.get_plugin("assertion").pytest_runtest_protocol
        comparing = around_test(item=SimpleNamespace(config=config, ihook=config.hook))
        next(comparing)  # assert shows the difference of two values, as in a test that runs
        self._serve()
        return 0


def under_pytest(arguments: list[str], folder: Path, serve: Callable[[], None]) -> None:
    """Call ``serve`` in a pytest that has read the project's settings and conftest files, and rewrites assertions."""
    os.chdir(folder)
    sys.exit(pytest.main(arguments, plugins=[Server(serve)]))


def worker_arguments(config: pytest.Config) -> list[str]:
    """The command line for a worker: what decides how modules are imported and compared, and no reports."""
    options = config.option
    arguments = [
        f"--rootdir={config.rootpath}",
        f"--import-mode={options.importmode}",
        f"--assert={options.assertmode}",
    ]
    arguments += [f"--verbosity={options.verbose}", "--capture=no"]
    arguments += ["-c", str(config.inipath)] if config.inipath else []
    arguments += [part for name in options.plugins for part in ("-p", name)]
    arguments += [part for line in options.override_ini or [] for part in ("-o", line)]
    return [*arguments, "-o", "addopts=", *["--pyargs"] * options.pyargs, *config.args]
