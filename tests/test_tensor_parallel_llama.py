"""An unmodified ``LlamaForCausalLM`` of transformers under ``parallelize``, against itself without it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from src import Group, Ledger, llama_plan, parallelize, simulate
from src.checkpoint import load, save
from src.modeling import vocab_parallel_cross_entropy
from src.modeling.parameters import placements
from src.testing import Ranks
from src.training import clip_grad_norm_
from src.verification import unsharded_gradients
from tests.test_overlap import Products, at_any_size, in_order

transformers = pytest.importorskip("transformers")

VOCAB, STEPS = 51, 3
IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
CASES: dict[str, dict[str, Any]] = {
    "one head to one": {"num_key_value_heads": 8},
    "four kv heads, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "two kv heads, biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "one kv head, eager": {"num_key_value_heads": 1, "attn_implementation": "eager"},
}


def config(case: str) -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 8, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0}
    return transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, **CASES[case])


@cache
def original(case: str) -> Any:
    """To be copied, not used."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config(case))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def parallel(group: Group, case: str) -> Any:
    return parallelize(copy.deepcopy(original(case)), group, llama_plan(config(case)))


def forward_backward(model: Any) -> dict[str, Tensor]:
    out = model(IDS, labels=IDS)
    out.loss.backward()
    return {"loss": out.loss.detach(), "logits": out.logits.detach()}


def generated(model: Any, **options: Any) -> Tensor:
    prompt = IDS[:, :4]
    mask = torch.ones_like(prompt)
    return model.eval().generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)


def whole(model: nn.Module, group: Group, grad: bool = False) -> dict[str, Tensor]:
    found = placements(model, group=group)
    return {p.name: p.whole(p.parameter.grad if grad else p.parameter.detach(), group) for p in found}


def train(model: Any, group: Group) -> dict[str, Tensor]:
    """Losses and gradient norms of some steps with AdamW, and the weights after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = (IDS + step) % VOCAB
        loss = model(ids, labels=ids).loss
        loss.backward()
        norms.append(clip_grad_norm_(model, 1.0, group=group))
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "norms": torch.stack(norms)} | whole(model, group)


def run(group: Group, case: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    model = parallel(group, case)
    tokens = generated(model)
    found = forward_backward(model.train()) | whole(model, group, grad=True)
    return found, train(model, group), tokens


@cache
def reference(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    model = copy.deepcopy(original(case))
    tokens = generated(model)
    found = forward_backward(model.train()) | {name: p.grad.clone() for name, p in model.named_parameters()}
    return found, train(model, Group.single()), tokens


def sums_and_products(group: Group, case: str) -> list[str]:
    """What happens in backward, a run of products named once."""
    out = parallel(group, case)(IDS, labels=IDS)
    with Ledger() as ledger, Products(ledger):
        out.loss.backward()
    names = ["products" if isinstance(event, tuple) else event for event in in_order(ledger)]
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


@pytest.mark.ranks(2, gloo=2)
@pytest.mark.parametrize("case", CASES)
def test_sums_run_while_gradients_of_weights_are_computed(ranks: Ranks, case: str) -> None:
    head = mlp = ["products", "started all_reduce", "products", "waited all_reduce"]
    attention = [*mlp, "called all_gather"] if CASES[case]["num_key_value_heads"] == 1 else mlp  # for the shared head
    want = head + 2 * (mlp + attention)
    for found in ranks(at_any_size, sums_and_products, case):
        assert found == want


def check_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name] - value).abs().max() / value.abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.ranks(4, 8, gloo=2)
@pytest.mark.parametrize("case", CASES)
def test_trains_and_generates_like_the_original(ranks: Ranks, case: str) -> None:
    one_pass, trained, tokens = reference(case)
    assert trained["losses"][-1] < trained["losses"][0] and (trained["norms"] > 1).all()
    for got in ranks(run, case):
        check_close(got[0], one_pass, 1e-5)
        check_close(got[1], trained, 1e-4)
        assert torch.equal(got[2], tokens)


@pytest.mark.parametrize("case", ["four kv heads, tied", "one kv head, eager"])
def test_same_bits_at_every_size(ranks: Ranks, case: str) -> None:
    one_pass, trained, tokens = ranks.on("simulated", 1)(run, case, num_shards=8)[0]
    check_close(one_pass, reference(case)[0], 1e-5)
    for place in [("gloo", 2), ("simulated", 4), ("simulated", 8)]:
        for got in ranks.on(*place)(run, case, num_shards=8):
            assert not [name for name in one_pass if not torch.equal(got[0][name], one_pass[name])], place
            assert not [name for name in trained if not torch.equal(got[1][name], trained[name])], place
            assert torch.equal(got[2], tokens), place


def counted(group: Group, case: str) -> dict[tuple[str, str], int]:
    model = parallel(group, case)
    with Ledger() as ledger:
        forward_backward(model)
    assert {r.payload_bytes for r in ledger.records if r.op == "all_reduce"} == {IDS.numel() * 32 * 4}
    for layer in ("model.layers.0", "model.layers.1"):
        for part in ("self_attn", "mlp"):
            for phase in ("forward", "backward"):
                assert ledger.count("all_reduce", phase, f"{layer}.{part}") == 1
    return {
        (op, phase): ledger.count(op, phase) for op in ("all_reduce", "all_gather") for phase in ("forward", "backward")
    }


def test_a_block_is_two_all_reduces_each_way() -> None:
    """And one more: forward for the embedding, whose logits' gather is the other one, backward for the head."""
    want = {("all_reduce", "forward"): 5, ("all_reduce", "backward"): 5, ("all_gather", "forward"): 1}
    assert simulate(counted, 4, "one head to one") == [want | {("all_gather", "backward"): 0}] * 4
    shared = want | {("all_gather", "backward"): 2 * 2 * 2}  # layers, keys and values, weights and biases
    assert simulate(counted, 4, "two kv heads, biases") == [shared] * 4


def checkpointed(group: Group, reentrant: bool | None) -> dict[str, Tensor]:
    model = parallel(group, "two kv heads, biases").train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return forward_backward(model) | whole(model, group, grad=True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(reentrant: bool) -> None:
    want = simulate(checkpointed, 4, None)[0]
    got = simulate(checkpointed, 4, reentrant)[0]
    assert not [name for name in want if not torch.equal(got[name], want[name])]


def in_bfloat16(group: Group) -> dict[str, Tensor]:
    model = parallel(group, "two kv heads, biases").bfloat16()
    return forward_backward(model) | whole(model, group, grad=True)


def test_bfloat16_is_as_good_as_the_original_in_bfloat16() -> None:
    """Both against float32: the error of all gradients together."""
    exact = reference("two kv heads, biases")[0]
    model = copy.deepcopy(original("two kv heads, biases")).bfloat16()
    plain = forward_backward(model) | {name: p.grad for name, p in model.named_parameters()}

    def error(found: dict[str, Tensor]) -> float:
        return (
            sum((found[name].float() - exact[name]).square().sum().item() for name in exact if name != "logits") ** 0.5
        )

    got = simulate(in_bfloat16, 4)[0]
    assert {value.dtype for name, value in got.items() if name != "loss"} == {torch.bfloat16}
    assert error(got) < 1.25 * error(plain)


def static(group: Group) -> Tensor:
    with torch.inference_mode():
        return generated(copy.deepcopy(parallel(group, "two kv heads, biases")), cache_implementation="static")


def test_generates_with_a_static_cache_and_from_a_copy() -> None:
    for tokens in simulate(static, 4):
        assert torch.equal(tokens, reference("two kv heads, biases")[2])


def test_logits_that_stay_sharded() -> None:
    def program(group: Group) -> tuple[Tensor, int]:
        plan = llama_plan(config("one head to one")) | {"lm_head": "lm_head"}
        model: Any = parallelize(copy.deepcopy(original("one head to one")), group, plan)
        logits = model(IDS).logits[:, :-1]
        loss = vocab_parallel_cross_entropy(logits, IDS[:, 1:], group=group, vocab_size=VOCAB)
        loss.backward()
        return loss.detach(), whole(model, group, grad=True)

    want = reference("one head to one")[0]
    for loss, grads in simulate(program, 4):
        check_close(grads | {"loss": loss, "logits": want["logits"]}, want, 1e-5)


def in_company(group: Group, case: str, wrapper: str) -> dict[str, Tensor]:
    """Each data-parallel rank has half the batch."""
    mesh = dist.init_device_mesh("cpu", (2, group.world_size // 2), mesh_dim_names=("dp", "tp"))
    tp, dp = Group(mesh["tp"]), Group(mesh["dp"])
    model = parallel(tp, case)
    if wrapper == "ddp":
        model = DistributedDataParallel(model, process_group=dp.pg)
    else:
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh["dp"])
    ids = IDS.chunk(2)[dp.rank]
    model(ids, labels=ids).loss.backward()
    gradients = {name: value.clone() for name, value in unsharded_gradients(model, group=tp).items()}
    return gradients | {"norm": clip_grad_norm_(model, 1.0, group=tp)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_with_data_parallelism(wrapper: str) -> None:
    case = "four kv heads, tied"
    one_pass, trained, _ = reference(case)
    want = {name: value for name, value in one_pass.items() if name not in ("loss", "logits")}
    for got in simulate(in_company, 4, case, wrapper):
        check_close(got, want | {"norm": trained["norms"][0]}, 1e-5)


def save_trained(group: Group, case: str, path: Path) -> dict[str, Tensor]:
    model = parallel(group, case)
    train(model, group)
    save(path, model, group=group)
    return forward_backward(model)


def load_trained(group: Group, case: str, path: Path) -> dict[str, Tensor]:
    """From the meta device: numbers come from the checkpoint alone."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config(case))
    parallelize(model, group, llama_plan(config(case)))
    model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config(case))  # its tables are not saved
    load(path, model, group=group)
    return forward_backward(model)


@pytest.mark.parametrize("case", ["four kv heads, tied", "two kv heads, biases"])
def test_checkpoints_are_those_of_the_original(ranks: Ranks, tmp_path: Path, case: str) -> None:
    want = simulate(save_trained, 4, case, tmp_path / "c")[0]
    for place in [("simulated", 1), ("simulated", 8), ("gloo", 2)]:
        check_close(ranks.on(*place)(load_trained, case, tmp_path / "c")[0], want, 1e-5)
    dcp_to_torch_save(tmp_path / "c", tmp_path / "whole.pt")
    state = {name.removeprefix("model."): value for name, value in torch.load(tmp_path / "whole.pt").items()}
    plain = copy.deepcopy(original(case))
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if "tied" in case else [], [])
    check_close(forward_backward(plain), want, 1e-5)


@pytest.mark.parametrize(
    "world_size, changes, message",
    [
        (3, {}, r"layers\.0\.self_attn\.q_proj: num_attention_heads=8 cannot be sharded over world_size=3 ranks"),
        (16, {}, r"layers\.0\.self_attn\.q_proj: num_attention_heads=8 cannot be sharded over world_size=16 ranks"),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4},
            r"layers\.0\.self_attn\.k_proj: num_key_value_heads=6 must divide num_shards=4 or be a multiple of it",
        ),
        (
            4,
            {"intermediate_size": 50},
            r"layers\.0\.mlp\.gate_proj: out_features=50 cannot be sharded over world_size=4",
        ),
    ],
)
def test_sizes_that_do_not_divide(world_size: int, changes: dict[str, int], message: str) -> None:
    sizes = config("one head to one").to_dict() | {"hidden_size": 48, "head_dim": 6} | changes

    def program(group: Group) -> bool:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        before = list(model.modules()), list(model.parameters())
        with pytest.raises(ValueError, match=message):
            parallelize(model, group, llama_plan(model.config))
        after = list(model.modules()), list(model.parameters())
        return all(x is y for old, new in zip(before, after, strict=True) for x, y in zip(old, new, strict=True))

    assert all(simulate(program, world_size))


@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_models_that_are_built_like_it(family: str) -> None:
    sizes = {key: getattr(config("one head to one"), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))

    def program(group: Group) -> dict[str, Tensor]:
        own: Any = parallelize(copy.deepcopy(model), group, llama_plan(model.config))
        return forward_backward(own) | whole(own, group, grad=True)

    got = simulate(program, 4)[0]
    want = forward_backward(model) | {name: parameter.grad for name, parameter in model.named_parameters()}
    check_close(got, want, 1e-5)


def test_a_norm_of_queries_is_refused() -> None:
    """Qwen 3's; on a rank's heads it would get a part of its gradient."""
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        )
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_norm\.weight is beside projections to heads"):
        parallelize(model, Group.single(2), llama_plan(model.config))
