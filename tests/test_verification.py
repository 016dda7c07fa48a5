"""Digests, differences and guards; and the script that proves the claim, which must also be able to fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scripts import corpus
from scripts.verify import main
from src import Group, SimulationError, simulate
from src.modeling import ModelArgs, Transformer, vocab_parallel_cross_entropy
from src.testing import Ranks
from src.verification import (
    audit_gradients,
    check_promise,
    digest,
    first_difference,
    unsharded_gradients,
    unsharded_weights,
)

ARGS = ModelArgs(
    dim=32, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=51, multiple_of=32, max_seq_len=16, pad_vocab=True
)


def gathered(group: Group) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = Transformer(ARGS, group=group)
    model(torch.arange(32).view(2, 16)).square().sum().backward()
    return unsharded_weights(model, group=group), unsharded_gradients(model, group=group)


@pytest.mark.ranks(2, 4, 8, gloo=4)
def test_unsharded_tensors_are_those_of_one_rank(ranks: Ranks) -> None:
    weights, gradients = ranks.on("simulated", 1)(gathered, num_shards=8)[0]
    assert weights["output.weight"].shape == (51, 32) and weights["layers.0.attention.wk.weight"].shape == (8, 32)
    assert weights.keys() == gradients.keys()
    for got_weights, got_gradients in ranks(gathered, num_shards=8):
        assert digest(got_weights) == digest(weights)
        for name, gradient in gradients.items():
            assert torch.equal(got_gradients[name], gradient), name


def test_digest_tells_apart_what_equal_tells_apart() -> None:
    x = torch.tensor([0.0, 1.0])
    assert digest({"x": x}) == digest([("x", x.clone())]) == digest({"x": torch.tensor([-0.0, 1.0])})
    others = [{"y": x}, {"x": x.double()}, {"x": x.view(1, 2)}, {"x": torch.nextafter(x, x + 1)}, {"x": x, "y": x}]
    assert len({digest(other) for other in [{"x": x}, *others]}) == 6
    assert digest({"x": torch.ones(2, 3).t()}) == digest({"x": torch.ones(3, 2)})


def test_first_difference_names_element_and_size() -> None:
    want = torch.zeros(2, 3)
    got = want.clone()
    assert first_difference("t", want, got) is None
    got[1, 0], got[1, 2] = 0.5, 1.0
    assert first_difference("t", want, got) == "t[1, 0] is 0.5 instead of 0.0, off by 0.5 (2 of 6 differ)"
    assert first_difference("t", want, want.double()) == "t: torch.float64 [2, 3] instead of torch.float32 [2, 3]"
    nan = torch.tensor([float("nan")])
    assert first_difference("t", nan, nan.clone()) is None


def audited(group: Group, sequence_parallel: bool) -> list[str]:
    model = Transformer(ARGS, group=group, sequence_parallel=sequence_parallel)
    logits = model(torch.arange(32).view(2, 16))
    vocab_parallel_cross_entropy(logits, torch.arange(32).view(2, 16), group=group, vocab_size=51).backward()
    return audit_gradients(model, group=group)


@pytest.mark.ranks(1, 4, 8, gloo=2)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_audit_of_a_sound_model(ranks: Ranks, sequence_parallel: bool) -> None:
    assert ranks(audited, sequence_parallel) == [[]] * ranks.world_size


def test_audit_names_norms_whose_gradients_nobody_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.modeling.norm.copy_to_shards", lambda x, group: [x] * len(group.shards))
    findings = simulate(audited, 2, True)
    norms = ["layers.0.attention_norm", "layers.0.ffn_norm", "norm"]
    want = {f"gradient of {norm}.weight differs between ranks [0] and [1]" for norm in norms}
    assert [set(found) for found in findings] == [want] * 2


def test_audit_names_a_forgotten_copy_to_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.modeling.columns.copy_to_shards", lambda x, group: [x] * len(group.shards))
    assert (
        "gradient of layers.0.ffn_norm.weight differs between ranks [0] and [1] and [2] and [3]"
        in simulate(audited, 4, False)[0]
    )


def untied_replicas(group: Group) -> list[str]:
    model = Transformer(ARGS, group=group)
    with torch.no_grad():
        model.layers[0].attention.wk.weight[0, 0] += group.rank == 3
    return audit_gradients(model, group=group)


def test_audit_compares_shared_heads_among_those_that_share_them() -> None:
    (finding,) = simulate(untied_replicas, 8)[0]
    assert finding == "value of layers.0.attention.wk.weight differs between ranks [0, 1, 2] and [3]"


def uneven_threads(group: Group) -> None:
    torch.set_num_threads(1 + (group.rank == 2))
    try:
        check_promise(group, torch.device("cpu"))
    finally:
        torch.set_num_threads(1)


def test_thread_counts_that_differ_are_named(ranks: Ranks) -> None:
    message = r"same number of intra-op threads \(OMP_NUM_THREADS\), but it is 1 on rank 0 and 2 on rank 2"
    with pytest.raises(RuntimeError, match=message):
        ranks.on("gloo", 4)(uneven_threads)
    ranks.on("gloo", 4)(check_on_cpu)


def check_on_cpu(group: Group) -> None:
    check_promise(group, torch.device("cpu"))


def test_sizes_that_the_shards_do_not_fit() -> None:
    with pytest.raises(ValueError, match="num_shards=8 must equal world_size=3"):
        simulate(check_on_cpu, 3, num_shards=8)


def test_nondeterministic_settings_on_cuda_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ValueError, match="use_deterministic_algorithms"):
        check_promise(Group.single(), cuda)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        check_promise(Group.single(), cuda)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    check_promise(Group.single(), cuda)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with pytest.raises(ValueError, match=r"cudnn\.benchmark"):
        check_promise(Group.single(), cuda)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)))
    prepare = corpus.prepare
    monkeypatch.setattr(corpus, "prepare", lambda root, vocab_size: prepare(root, vocab_size, text))
    small = ["--vocab-size", "296", "--dim", "32", "--layers", "1", "--batch-size", "2", "--seq-len", "16"]
    return [*small, "--cache", str(tmp_path / "cache"), "--steps", "2", "--simulated", "1,2,8"]


def test_verify_proves(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*arguments, "--gloo", "2", "--variant", "gqa"])
    shown = capsys.readouterr().out
    rows = re.findall(r"^invariant +(\w+) +(\d) +(\w+) (\w+) (\w+) (\w+) +\d+\.\d$", shown, re.MULTILINE)
    assert [(place, size) for place, size, *_ in rows] == [
        ("simulated", "1"), ("simulated", "2"), ("simulated", "8"), ("gloo", "2")
    ]  # fmt: skip
    assert len({tuple(digests) for _, _, *digests in rows}) == 1
    assert shown.endswith("same bits, 1 thread(s) per rank\n")


def test_verify_names_the_first_difference(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_left(terms: list[Tensor]) -> Tensor:
        return sum(terms[1:], terms[0])

    monkeypatch.setattr("src.distributed.collectives.tree_sum", from_left)
    with pytest.raises(SystemExit, match=r"NOT the same bits: 1 run\(s\) differ"):
        main([*arguments, "--gloo", ""])
    shown = capsys.readouterr().out
    message = r"first difference from the first row of its kind: step 0 logits\[\d, \d+, \d+\] is \S+ instead of \S+,"
    assert re.search(message, shown)


def test_fast_mode_shows_the_drift(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*arguments, "--gloo", "2", "--mode", "fast"])
    shown = capsys.readouterr().out
    assert re.search(r"largest difference: \S+ in losses, \S+ in weights", shown)
    row = r"^fast +{} +2 +(\w+ \w+ \w+ \w+) +\S+$"
    simulated, real = (re.search(row.format(place), shown, re.MULTILINE) for place in ("simulated", "gloo"))
    assert simulated and real and simulated[1] == real[1]


def wrong_shape(group: Group) -> None:
    Transformer(ARGS, group=group)


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(SimulationError, match=r"n_heads=8 cannot be sharded over world_size=16 ranks"):
        simulate(wrong_shape, 16)
