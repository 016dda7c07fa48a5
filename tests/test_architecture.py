"""What the code promises about itself: who may import whom, no hidden state, and the signatures of the contract."""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from src import Group, simulate
from src.functional import apply_rotary_pos_emb
from src.modeling import (
    Attention,
    ColumnParallelLinear,
    FeedForward,
    GroupRMSNorm,
    ModelArgs,
    NTKAwareRoPE,
    ParallelVocabEmbedding,
    RMSNorm,
    RowParallelLinear,
    Transformer,
    TransformerBlock,
    VocabEmbedding,
    precompute_freqs_cis,
    vocab_parallel_cross_entropy,
)

ROOT = Path(__file__).parent.parent
FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.glob("src/**/*.py"))}
# Floors from the lowest up, by package; "" is src itself. A module imports only from floors below its own.
FLOORS = {
    "": [
        {"sharding", "rope_scaling"},
        {"memory"},
        {"kernels", "distributed"},
        {"functional"},
        {"modeling", "sampling"},
        {"checkpoint", "tensor_parallel", "training", "generation", "rank_pool", "script_state", "verification"},
        {"formats", "rank_runs"},
        {"pytest_ranks"},
        {"testing"},
        {"script"},
        {"launcher"},
        {"__main__"},
    ],
    "distributed": [
        {"reduction", "origin", "prediction", "random", "rank_state"},
        {"group", "ledger_table", "pieces", "signature"},
        {"checked_messages", "in_flight", "ledger", "meeting", "signed_group", "simulated_collectives"},
        {"failure", "faults"},
        {"shared_memory"},
        {"shared_collectives"},
        {"checked", "collectives", "lockstep"},
        {"lockstep_store", "simulation"},
        {"overlap", "regions", "runtime"},
    ],
    "formats": [
        {"directory", "llama_config", "slices"},
        {"safetensors_files"},
        {"hugging_face"},
        {"meta"},
    ],
    "kernels": [
        {"accumulation", "launch", "row_blocks"},
        {"cpu_embedding", "cpu_linear", "cpu_norm", "cpu_rope"},
        {"registry"},
        {"norm", "rope", "swiglu", "embedding", "cross_entropy"},
    ],
    "modeling": [
        {"columns", "config", "checks", "conversion", "loss_words", "parameters"},
        {"loss_terms"},
        {"norm", "pos_emb", "linear", "kv_linear", "dropout", "vocab_emb", "loss"},
        {"attention", "mlp", "linear_loss"},
        {"block", "lm_head"},
        {"transformer"},
    ],
}


def floor(package: str, module: str) -> int:
    found = [level for level, modules in enumerate(FLOORS[package]) if module in modules]
    assert found, f"give src/{package}: {module} a floor in tests/test_architecture.py"
    return found[0]


def imported(file: str) -> Iterator[tuple[int, str]]:
    """Line and dotted path below ``src`` of everything that ``file`` imports relatively."""
    package = file.split("/")[1:-1]
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


@pytest.mark.parametrize("file", [file for file in FILES if not file.endswith("__init__.py")])
def test_floors(file: str) -> None:
    me = file.removeprefix("src/").removesuffix(".py").split("/")
    floors = [floor(package, module) for package, module in zip(["", me[0]], me, strict=False)]
    for line, target in imported(file):
        other = target.split(".")
        if len(me) > 1 and other[0] == me[0]:
            assert floor(me[0], other[1]) < floors[1], f"{file}:{line} imports {target}"
        else:
            assert floor("", other[0]) < floors[0], f"{file}:{line} imports {target}"


def test_src_imports_itself_relatively_and_nothing_above_it() -> None:
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.split(".")[0] not in {"src", "isoshard", "scripts", "tests"}, f"{file}:{node.lineno} {name}"


def test_the_library_does_not_print() -> None:
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Name) and node.id == "print"), f"{file}:{node.lineno}"


def test_only_runtime_and_the_launcher_read_the_environment() -> None:
    readers = set()
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            names = {node.attr} if isinstance(node, ast.Attribute) else set()
            names |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            if names & {"environ", "environb", "getenv", "putenv"}:
                readers.add(file)
    assert readers == {"src/distributed/runtime.py", "src/launcher.py", "src/script_state.py"}


def test_no_mutable_containers_at_module_level() -> None:
    literals = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for file, tree in FILES.items():
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, literals):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in map(ast.unparse, targets):
                    assert name == "__all__" or name.isupper(), f"{file}:{node.lineno} {name}"


def test_every_package_is_shipped() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [Path(file).parent.as_posix() for file in FILES if file.endswith("__init__.py")]
    assert sorted(listed) == sorted(path.replace("src", "isoshard", 1).replace("/", ".") for path in found)


PLACED = "dtype=torch.float32, device='cpu'"
# What each must accept: the positional parameters exactly, the keyword-only ones among others.
SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (
        GroupRMSNorm,
        f"hidden_size, group_size=None, eps=1e-5, init_range=(-1.0, 1.0), init_seed=42, {PLACED}, *, group=None",
    ),
    (RMSNorm, "hidden_size, eps=1e-5, device=None, dtype=torch.float32"),
    (VocabEmbedding, f"vocab_size, emb_size, init_mean=0.0, init_std=1.0, init_seed=42, {PLACED}"),
    (
        ParallelVocabEmbedding,
        "vocab_size, emb_size, rank=None, world_size=None, process_group=None, init_mean=0.0, init_std=1.0, "
        f"init_base_seed=42, {PLACED}, *, num_shards=None",
    ),
    (NTKAwareRoPE, f"dim, max_seq_len, base=10000, ratio=1, dynamic=False, {PLACED}"),
    (NTKAwareRoPE.forward, "self, input, offset=0"),
    (apply_rotary_pos_emb, "input, cos, sin"),
    (precompute_freqs_cis, "head_dim, length, theta=500000.0"),
    (Attention, "args, *, group=None"),
    (Attention.forward, "self, x, start_pos, freqs_cis, mask=None"),
    (FeedForward, "dim, hidden_dim, multiple_of, ffn_dim_multiplier=None, *, group=None"),
    (TransformerBlock, "layer_id, args, *, group=None"),
    (TransformerBlock.forward, "self, x, start_pos, freqs_cis, mask=None"),
    (Transformer, "args, *, group=None"),
    (ColumnParallelLinear, "in_features, out_features, bias=True, *, group=None"),
    (RowParallelLinear, "in_features, out_features, bias=True, *, group=None"),
    (RowParallelLinear.from_linear, "linear, *, group=None, **options"),
    (vocab_parallel_cross_entropy, "logits, targets, *, group"),
    (Group, "pg=None, *, num_shards=None, reduce_order='backend'"),
    (Group.single, "num_shards=None"),
    (simulate, "program, world_size, *args, num_shards=None, reduce_order='backend'"),
]


@pytest.mark.parametrize("function, contract", SIGNATURES, ids=[f.__qualname__ for f, _ in SIGNATURES])
def test_public_signatures(function: Callable[..., Any], contract: str) -> None:
    def split(of: Callable[..., Any]) -> tuple[list[tuple[str, Any]], set[tuple[str, Any]]]:
        found = inspect.signature(of).parameters.values()
        keyword_only = {(p.name, p.default) for p in found if p.kind is p.KEYWORD_ONLY}
        return [(p.name, p.default) for p in found if p.kind is not p.KEYWORD_ONLY], keyword_only

    positional, keyword_only = split(function)
    want, want_keyword_only = split(eval(f"lambda {contract}: None", {"torch": torch}))
    assert positional == want and keyword_only >= want_keyword_only


def test_model_args_have_llama_3_fields_in_order() -> None:
    names = "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta"
    names += " max_batch_size max_seq_len"
    defaults = (4096, 32, 32, None, -1, 256, None, 1e-5, 500000, 32, 2048)
    assert list(vars(ModelArgs()).items())[:11] == list(zip(names.split(), defaults, strict=True))
