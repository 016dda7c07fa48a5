"""The kernels compiled for an H100 or H200 on any machine: no register spills, rows moved in 128-bit pieces."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs Triton: the extra kernels-test")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from src import functional as fn  # noqa: E402
from src.kernels import cross_entropy, embedding, norm, rope, swiglu  # noqa: E402
from src.modeling.loss_terms import Criterion  # noqa: E402

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[Launch]:
    """What ``call`` would have launched."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        assert all(size > 0 for size in grid)
        found.append((kernel, arguments, settings))

    for module in (cross_entropy, embedding, norm, rope, swiglu):
        monkeypatch.setattr(module, "launch", record)
    call()
    return found


def compile_for_sm90(kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """As a launch with these arguments would: integers that are 1 are constants, multiples of 16 are known as such."""
    warps = settings.pop("num_warps")
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | settings
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        plain = kernel.params[i].do_not_specialize
        if name in settings or value is None or (isinstance(value, int) and value == 1 and not plain):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(number, int) and number % 16 == 0 and not plain:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def machine_code(compiled: Any, folder: Path) -> tuple[str, str]:
    """What the kernel uses, and its instructions."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage, code = (
        subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    return usage, code


def there_and_back(function: Callable[..., Any], *tensors: Tensor) -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [torch.ones_like(y) for y in outs])


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def norm_of(width: int, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
    there_and_back(
        lambda x, w: norm.group_rms_norm(x, w, size, 1e-5), empty(64, width, dtype=dtype), empty(width, dtype=dtype)
    )


def add_norm_of(width: int, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x, residual, weight = empty(64, width, dtype=dtype), empty(64, width, dtype=dtype), empty(width, dtype=dtype)
    there_and_back(lambda *leaves: norm.add_group_rms_norm(*leaves, size, 1e-5), x, residual, weight)


def frozen_norm_of(width: int, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
    weight = empty(width, dtype=dtype)
    there_and_back(lambda x: norm.group_rms_norm(x, weight, size, 1e-5), empty(64, width, dtype=dtype))


def swiglu_of(width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    there_and_back(swiglu.swiglu, empty(16, width, dtype=dtype), empty(16, width, dtype=dtype))


def swiglu_of_halves_of(width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    there_and_back(swiglu.swiglu, *empty(16, width, dtype=dtype).chunk(2, -1))


def rotation_of(kind: str, nq: int, nk: int, dtype: torch.dtype = torch.bfloat16) -> None:
    tables = fn.rope_tables(64, 128, 1e4) if kind == "halves" else (fn.precompute_freqs_cis(128, 64),)
    q, k = empty(2, 64, nq, 128, dtype=dtype), empty(2, 64, nk, 128, dtype=dtype)
    there_and_back(lambda q, k: rope.rotate((q, k), tables), q, k)


def embedding_of(width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    ids = torch.zeros(64, dtype=torch.int64)
    there_and_back(lambda table: embedding.shard_embedding(ids, table, 16), empty(32, width, dtype=dtype))


def rows_of_embedding_of(width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Into a gradient that is there."""
    ids, table = torch.zeros(64, dtype=torch.int64), empty(96, width, dtype=dtype)
    table.grad = torch.zeros_like(table)
    there_and_back(lambda table: embedding.shard_embedding(ids, table, 16), table)


@dataclass
class Shard:
    start: int = 0
    stop: int = 16032
    first: int = 16032

    @property
    def valid(self) -> int:
        return self.stop - self.start


def cross_entropy_of(with_sum: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    rows, targets = empty(16, Shard().stop, dtype=dtype), torch.zeros(16, dtype=torch.int64)
    criterion, (top, log_sum, grad) = Criterion(8 * Shard().stop, label_smoothing=0.1), torch.zeros(3, 16)
    statistics = cross_entropy.cross_entropy_statistics(rows, targets, Shard(), with_sum)
    cross_entropy.cross_entropy_losses(statistics.expand(8, -1, -1), targets, Shard().stop, criterion)
    shared = (Shard(), (top, log_sum), grad, criterion)
    cross_entropy.cross_entropy_gradient(torch.empty_like(rows), rows, targets, *shared)


# The narrow loads and stores that each kernel may have for a thread: ids, targets, statistics of a row. One more tells
# which row it is.
NARROW = {"_gather": 1, "_sum": 2 + embedding.TOKENS, "_statistics": 2 + 3, "_gradient": 4}
OF_A_DTYPE: dict[str, Callable[..., None]] = {
    "swiglu": partial(swiglu_of, 3584),
    "swiglu of halves": partial(swiglu_of_halves_of, 7168),
    "halves": partial(rotation_of, "halves", 32, 8),
    "neighbours": partial(rotation_of, "neighbours", 8, 1),
    "embedding": partial(embedding_of, 4096),
    "rows of embedding": partial(rows_of_embedding_of, 4096),
}
CASES: dict[str, Callable[[], None]] = {
    "norm 4096": lambda: norm_of(4096, 4096),
    "norm 16384": lambda: norm_of(16384, 16384),
    "norm 16384 float32": lambda: norm_of(16384, 16384, torch.float32),
    "norm groups of 64": lambda: norm_of(8192, 64),
    "add and norm 4096": lambda: add_norm_of(4096, 4096),
    "add and norm 16384": lambda: add_norm_of(16384, 16384),
    **OF_A_DTYPE,
    "cross-entropy": lambda: cross_entropy_of(False),
    "cross-entropy smoothing": lambda: cross_entropy_of(True),
}
MORE: dict[str, Callable[[], None]] = {
    "norm 2048": lambda: norm_of(2048, 2048),
    "norm 8192": lambda: norm_of(8192, 8192),
    "norm 12288": lambda: norm_of(12288, 12288),
    "norm groups of 512": lambda: norm_of(8192, 512),
    "norm groups of 1024 float32": lambda: norm_of(4096, 1024, torch.float32),
    "add and norm 8192": lambda: add_norm_of(8192, 8192),
    "add and norm 16384 float32": lambda: add_norm_of(16384, 16384, torch.float32),
    "add and norm groups of 64": lambda: add_norm_of(8192, 64),
    "norm 4096 and a frozen weight": lambda: frozen_norm_of(4096, 4096),
    "cross-entropy float32": lambda: cross_entropy_of(True, torch.float32),
}
MORE |= {
    f"{case} {dtype}": partial(call, dtype=dtype)
    for case, call in OF_A_DTYPE.items()
    for dtype in (torch.float32, torch.float16)
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_no_spills_and_wide_loads(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = launches(monkeypatch, (CASES | MORE)[case])
    assert len(found) == (3 if "cross-entropy" in case else 2)
    for kernel, arguments, settings in found:
        name = kernel.__name__
        usage, code = machine_code(compile_for_sm90(kernel, arguments, settings), tmp_path)
        assert re.search(r"STACK:0 ", usage) and not re.search(r"\b(LDL|STL)", code), f"{name} spills: {usage}"
        moves = re.findall(r"\b(?:LDG|STG)\.\S*", code)
        wide = [move for move in moves if ".128" in move]
        narrow = NARROW.get(name, 0) + (name == "_sum" and case.startswith("rows"))
        assert wide and len(moves) - len(wide) <= narrow, f"{name}: {moves}"
        if name == "_statistics":
            # 16 logits a thread; one more in the loop and one after it for each lane, which is 128 bits.
            assert code.count("MUFU.EX2") <= 16 + 2 * arguments[0].element_size()
            assert "SHFL" not in code[: code.index("MUFU.EX2")]


def test_sums_do_not_depend_on_where_a_shard_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another alignment would be another kernel, with another order of summation."""
    targets = torch.zeros(4, dtype=torch.int64)
    places = [
        (empty(4, 1000), Shard(0, 1000, 0)),
        (empty(4, 2000), Shard(1000, 2000, 1000)),
        (empty(4 * 1000 + 1)[1:].view(4, 1000), Shard(0, 1000, 3000)),
    ]

    def statistics() -> None:
        for rows, shard in places:
            cross_entropy.cross_entropy_statistics(rows, targets, shard, True)

    def norms() -> None:
        for offset in (0, 1):
            x = empty(4 * 1000 + offset)[offset:].view(4, 1000)
            there_and_back(lambda x, w: norm.group_rms_norm(x, w, 100, 1e-5), x, empty(1000))

    for call, kinds in ((statistics, 1), (norms, 2)):
        assert len({compile_for_sm90(*launch).hash for launch in launches(monkeypatch, call)}) == kinds


@pytest.mark.parametrize("width", [4096, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_an_embedding_are_summed_as_whole_tables_are(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tile of numbers is dealt out to threads in the same way, and each adds its own in the same order."""
    layouts, sums = set(), set()
    for call in (embedding_of, rows_of_embedding_of):
        compiled = compile_for_sm90(*launches(monkeypatch, lambda: call(width, dtype))[-1])  # noqa: B023
        tile = re.escape(f"4x{min(embedding.COLUMNS, 1 << (width - 1).bit_length())}x")
        layouts.add(tuple(re.findall(r"^#\w+ = #ttg\..*", compiled.asm["ttgir"], re.MULTILINE)))
        sums.add(tuple(re.findall(rf"(arith\.addf|tt\.reduce).*({tile}f32, #\w+)", compiled.asm["ttgir"])))
    assert len(layouts) == len(sums) == 1 and all(layouts | sums)
