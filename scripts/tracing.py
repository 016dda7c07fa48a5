"""One short training run, remembered tensor by tensor, in any place that ranks can run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from src import Group, simulate
from src.checkpoint import load, save
from src.distributed import gather_from_region, local_device
from src.modeling import ModelArgs, Transformer, vocab_parallel_cross_entropy
from src.testing import RankPool
from src.training import clip_grad_norm_
from src.verification import check_promise, digest, first_difference, unsharded_gradients, unsharded_weights

from .corpus import Corpus
from .verify import Options

Place = tuple[str, int]


@dataclass(frozen=True)
class Trace:
    """Unsharded tensors in the order in which they came to be, by names like ``step 3 gradient of norm.weight``."""

    tensors: dict[str, Tensor]
    ms_per_step: float

    def digest(self, kind: str) -> str:
        """SHA-256 over the tensors of one kind: loss, logits, gradient or weight."""
        return digest((name, tensor) for name, tensor in self.tensors.items() if name.split()[2] == kind)

    def first_difference(self, reference: Trace) -> str | None:
        """The first tensor that differs from the reference, its first element, and by how much."""
        pairs = ((name, reference.tensors[name], tensor) for name, tensor in self.tensors.items())
        return next((found for found in (first_difference(*pair) for pair in pairs) if found), None)

    def drift(self, reference: Trace, kind: str) -> float:
        """The largest difference between tensors of one kind."""
        names = [name for name in self.tensors if name.split()[2] == kind]
        return max((self.tensors[name] - reference.tensors[name]).abs().max().item() for name in names)


class Runner:
    """Traces runs over the corpus in ``corpus``; in fast mode all begin with the weights of the first."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self._pools: dict[Place, RankPool] = {}

    def trace(self, place: Place, options: Options) -> Trace:
        """The run of ``options`` on the ranks of ``place``."""
        backend, world_size = place
        device = "cuda" if backend == "nccl" else "cpu"
        arguments = (self.corpus, self.folder, options, device)
        num_shards = options.num_shards if options.mode == "invariant" else None
        if backend == "simulated":
            run = simulate(trace, world_size, *arguments, num_shards=num_shards)
        else:
            pool = self._pools.setdefault(place, RankPool(backend, world_size, timeout=3600))
            run = pool.run(trace, *arguments, num_shards=num_shards)
        first: Trace = run[0]
        return first

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.close()


def trace(group: Group, corpus_path: Path, folder: Path, options: Options, device_name: str) -> Trace | None:
    """Train; rank 0 gets the trace."""
    torch.set_num_threads(options.threads)
    device = local_device(device_name)
    if options.mode == "invariant":
        torch.use_deterministic_algorithms(device.type == "cuda")
        check_promise(group, device)
    model = build(group, options, device)
    if options.mode == "fast":
        share_initial_weights(model, group, folder / f"{options.variant}-{options.dtype}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    corpus = Corpus.open(corpus_path)
    tensors: dict[str, Tensor] = {}
    seconds = []
    for step in range(options.steps):
        ids, targets = corpus.training_batch(step, options.batch_size, options.seq_len, seed=0)
        ids, targets = ids % model.args.vocab_size, targets % model.args.vocab_size
        began = time.perf_counter()
        optimizer.zero_grad()
        logits = model(ids.to(device))
        loss = vocab_parallel_cross_entropy(logits, targets, group=group, vocab_size=model.args.vocab_size)
        loss.backward()
        clip_grad_norm_(model, 1.0, group=group)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        whole = gather_from_region(logits.detach(), group=group)[..., : model.args.vocab_size]
        found = {"logits": whole, "loss": loss.detach()}
        found |= {f"gradient of {name}": grad for name, grad in unsharded_gradients(model, group=group).items()}
        tensors |= {f"step {step} {name}": tensor.clone().cpu() for name, tensor in found.items()}
    weights = unsharded_weights(model, group=group)
    tensors |= {f"step {options.steps} weight of {name}": tensor.clone().cpu() for name, tensor in weights.items()}
    return Trace(tensors, median(seconds) * 1e3) if group.rank == 0 else None


def build(group: Group, options: Options, device: torch.device) -> Transformer:
    """The model of one variant."""
    uneven = options.variant == "uneven"
    args = ModelArgs(
        dim=options.dim,
        n_layers=options.layers,
        n_heads=8,
        vocab_size=options.vocab_size - 7 * uneven,
        multiple_of=64,
        max_seq_len=options.seq_len,
        pad_vocab=uneven,
        n_kv_heads=2 if options.variant == "gqa" else None,
        tie_embeddings=options.variant == "tied",
        dropout=0.1 if options.variant == "dropout" else 0.0,
    )
    dtype = getattr(torch, options.dtype)
    return Transformer(args, group=group, sequence_parallel=options.variant == "sequence", dtype=dtype, device=device)


def share_initial_weights(model: Transformer, group: Group, path: Path) -> None:
    """The first run leaves its weights; the others begin with them, for without logical shards each has its own."""
    if path.exists():
        load(path, model, group=group)
    else:
        save(path, model, group=group)
