"""The training job itself: what every rank runs, in whatever way ranks are run."""

from __future__ import annotations

import json
import math
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src import Group
from src.checkpoint import save
from src.distributed import barrier, local_device, long_wait
from src.generation import generate
from src.modeling import ModelArgs, Transformer
from src.modeling.parameters import local_part
from src.training import Batch, evaluate, train_step, warmup_cosine
from src.verification import check_agreement, check_promise, digest, each_unsharded_weight

from .corpus import END_OF_TEXT, Corpus, GivenTokenizer, prepare
from .history import History, restore, run_settings, saved_steps
from .logs import logger
from .mesh import Mesh
from .models import GENERATION, args_of, companion, copy_companions, end_tokens, fill_model
from .options import Options
from .report import MetricsLog, ProgressBar, draw_curve, require_extras

KEPT_CHECKPOINTS = 2
ALONE = 3600.0
"""Seconds that rank 0 may work while the others wait: on the text, on the curve."""


@dataclass(frozen=True)
class Outcome:
    """Validation loss in nats per token before and after, and the speed between."""

    first_loss: float
    last_loss: float
    bytes_per_token: float
    tokens_per_second: float

    def __str__(self) -> str:
        first, last = (loss / math.log(2) / self.bytes_per_token for loss in (self.first_loss, self.last_loss))
        return (
            f"validation loss {self.first_loss:.3f} -> {self.last_loss:.3f} nats per token "
            f"({first:.3f} -> {last:.3f} bits per byte), {self.tokens_per_second:.0f} tokens/s"
        )


def fix_bits(group: Group, options: Options, device: torch.device) -> None:
    """Bits depend on the number of intra-op threads: with logical shards fixed it is 1 unless asked otherwise.

    Raises ValueError where with logical shards fixed the ranks' settings differ or are not deterministic.
    """
    threads = options.threads or (1 if options.num_shards is not None else None)
    if threads is not None:
        torch.set_num_threads(threads)
    if options.num_shards is not None:
        if device.type == "cuda":
            torch.use_deterministic_algorithms(True)
        check_promise(group, device)


def train(world: Group, options: Options) -> Outcome:
    """Train, validate, save, draw and sample; rank 0 speaks for all."""
    require_extras()
    device = local_device(options.device)
    fix_bits(world, options, device)
    mesh = Mesh.arrange(world, options.dp, options.batch_size, device)
    corpus = open_corpus(world, options)
    args = model_args(corpus, options)
    model = Transformer(
        args, group=mesh.tp, sequence_parallel=options.sequence_parallel, seed=options.seed, device=device
    )
    if options.model is not None:
        fill_model(options.model, model, mesh.tp)
    wrapped = mesh.wrap(model, options.dp_mode)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=(0.9, 0.95),
        weight_decay=options.weight_decay,
        # Fused, the last elements of a tensor are rounded in another way: bits would depend on cuts.
        fused=options.num_shards is None,
    )
    checkpoints = options.out / "checkpoints"
    history = restore(checkpoints, model, optimizer, corpus, mesh, options)
    start = history.step
    run = _Run(mesh, options, corpus, model, wrapped, optimizer, device, history)
    with ExitStack() as stack:
        log = None
        if world.rank == 0:
            describe(mesh, options, args, corpus, start, model)
            log = stack.enter_context(MetricsLog(options.out / "metrics.jsonl", start if options.resume else None))
        bar = stack.enter_context(
            ProgressBar(options.steps, run.tokens_per_step, start_step=start, enabled=world.rank == 0)
        )
        outcome = run.loop(log, bar)
    with long_wait(world, ALONE):
        if world.rank == 0:
            draw_curve(options.out / "metrics.jsonl", options.out / "loss.png")
            print(f"{outcome}\ncurve {options.out / 'loss.png'}, checkpoints in {checkpoints}")
        barrier(world)
    run.sample()
    if options.num_shards is not None:
        result = digest(chain([("losses", run.history.losses_tensor())], each_unsharded_weight(model, group=world)))
        if world.rank == 0:
            print(f"digest {result} threads {torch.get_num_threads()}", flush=True)
    return outcome


class _Run:
    """One run: its parts, and the loop over them."""

    def __init__(
        self,
        mesh: Mesh,
        options: Options,
        corpus: Corpus,
        model: Transformer,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        history: History,
    ) -> None:
        self.mesh, self.options, self.corpus, self.history = mesh, options, corpus, history
        self.model, self.wrapped, self.optimizer, self.device = model, wrapped, optimizer, device
        self.of_loss: dict[str, Any] = {"group": mesh.tp, "dtype": getattr(torch, options.dtype)}
        self.of_loss |= {"block_tokens": options.loss_block_tokens}
        self.tokens_per_step = options.batch_size * options.accumulate * options.seq_len
        batches = corpus.validation_batches(options.batch_size, options.seq_len, options.eval_batches)
        self.validation = [self._place(batch) for batch in batches]

    def loop(self, log: MetricsLog | None, bar: ProgressBar) -> Outcome:
        """From where the history ends to the last step."""
        options, history, seconds, start = self.options, self.history, 0.0, self.history.step
        loss = math.nan
        if history.first_loss is None:
            history.first_loss = loss = self._validate(start, log)
        for step in range(start, options.steps):
            began = time.perf_counter()
            history.losses.append(self._step(step, log))
            seconds += time.perf_counter() - began
            history.step = step + 1
            bar.update(history.step, history.losses[-1])
            if history.step % options.eval_every == 0 or history.step == options.steps:
                loss = self._validate(history.step, log)
            if history.step % options.save_every == 0 or history.step == options.steps:
                self._save()
        if math.isnan(loss):
            loss = self._validate(options.steps, None)
        speed = (options.steps - start) * self.tokens_per_step / max(seconds, 1e-9)
        return Outcome(history.first_loss, loss, self.corpus.bytes_per_token, speed)

    def sample(self) -> None:
        """Print what the model makes of the prompt."""
        options, tokenizer = self.options, self.corpus.tokenizer
        count = min(options.new_tokens, options.seq_len - 1)
        ids = torch.tensor([tokenizer.encode(options.prompt).ids[count - options.seq_len :]], device=self.device)
        tokens = generate(self.model, ids, count, temperature=options.temperature, seed=options.seed)
        text = tokenizer.decode([*ids[0].tolist(), *(int(token) for token in tokens)])
        if self.mesh.world.rank == 0:
            print(f"\n--- sample, {count} tokens after the prompt ---\n{text}\n---")

    def _step(self, step: int, log: MetricsLog | None) -> float:
        options = self.options
        rate = warmup_cosine(step, steps=options.steps, warmup=options.warmup, peak=options.lr)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        sizes = (options.batch_size, options.seq_len, options.seed)
        numbers = range(step * options.accumulate, (step + 1) * options.accumulate)
        whole = (self.corpus.training_batch(number, *sizes) for number in numbers)
        batches = [self._place(self.mesh.share(batch)) for batch in whole]
        result = train_step(self.wrapped, self.optimizer, batches, max_norm=options.clip, **self.of_loss)
        loss = self.mesh.mean(result.loss).item()
        if log is not None and not math.isfinite(loss):
            logger().warning("step %d: the loss is %s", step + 1, loss)
        if log is not None:
            log.write(step + 1, "train", loss=loss, grad_norm=result.grad_norm.item(), lr=rate)
        return loss

    def _validate(self, step: int, log: MetricsLog | None) -> float:
        loss = evaluate(self.model, self.validation, **self.of_loss)
        if log is not None:
            log.write(step, "validation", loss=loss, bits_per_byte=loss / math.log(2) / self.corpus.bytes_per_token)
        return loss

    def _save(self) -> None:
        folder = self.options.out / "checkpoints"
        info = {"history": asdict(self.history), "run": run_settings(self.model.args, self.corpus, self.options)}
        path, mesh, began = folder / f"step-{self.history.step:06d}", self.mesh, time.perf_counter()
        save(path, self.model, self.optimizer, info, group=mesh.tp, world=mesh.world)
        logger().info("saved %s in %.1f s", path, time.perf_counter() - began)
        if mesh.world.rank == 0:
            for old in saved_steps(folder)[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)

    def _place(self, batch: Batch) -> Batch:
        return batch[0].to(self.device), batch[1].to(self.device)


def open_corpus(group: Group, options: Options) -> Corpus:
    """Rank 0 prepares the text, which may take a while the first time; the others then find it prepared.

    What is wrong with the text is found by every rank, so that none is left waiting.
    """
    with long_wait(group, ALONE):
        if group.rank > 0:
            barrier(group)
        logger().info("reading or preparing the text in %s", options.cache)
        try:
            corpus = prepare(options.cache, options.vocab_size, options.data, given_tokenizer(options.model))
        finally:
            if group.rank == 0:
                barrier(group)
    check_agreement({"text, by its digest": corpus.path.name}, group)
    return corpus


def given_tokenizer(model: Path | None) -> GivenTokenizer | None:
    """That of the model to start from, None where there is none.

    Raises ValueError for a model without a tokenizer, or without an end of text.
    """
    if model is None:
        return None
    args_of(model)  # refuses what is no model of ours before its tokenizer is missed
    file, ends = companion(model, "tokenizer.json"), end_tokens(model)
    if file is None or not ends:
        raise ValueError(f"{model} has no {'end of text in its config.json' if file else 'tokenizer.json'}")
    return GivenTokenizer(file, ends[0])


def model_args(corpus: Corpus, options: Options) -> ModelArgs:
    """The shape of the model that the options ask for."""
    limits: dict[str, Any] = {"max_seq_len": options.seq_len, "max_batch_size": options.batch_size}
    if options.model is not None:
        args = replace(args_of(options.model), dropout=options.dropout, pad_vocab=True, **limits)
        if corpus.vocab_size > args.vocab_size:
            raise ValueError(
                f"{options.model}: its tokenizer has {corpus.vocab_size} tokens, its model vocab_size={args.vocab_size}"
            )
        return args
    return ModelArgs(
        dim=options.dim,
        n_layers=options.layers,
        n_heads=options.heads,
        n_kv_heads=options.kv_heads,
        vocab_size=corpus.vocab_size,
        multiple_of=options.multiple_of,
        **limits,
        pad_vocab=True,
        tie_embeddings=options.tie_embeddings,
        dropout=options.dropout,
    )


def describe(mesh: Mesh, options: Options, args: ModelArgs, corpus: Corpus, start: int, model: Transformer) -> None:
    """Say what is about to happen, and leave the settings beside the run."""
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(corpus.path / "tokenizer.json", options.out / "tokenizer.json")
    if options.model is not None:
        copy_companions(options.model, options.out)
    else:
        end = {"eos_token_id": corpus.tokenizer.token_to_id(END_OF_TEXT)}
        (options.out / GENERATION).write_text(json.dumps(end) + "\n")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    (options.out / "config.json").write_text(json.dumps({"options": settings, "model": asdict(args)}, indent=1) + "\n")
    local = sum(local_part(parameter).tensor.numel() for parameter in model.parameters())
    copies = f", {options.dp_mode} over {options.dp}" if options.dp > 1 else ""
    begin = f", continuing from step {start}" if start else ""
    print(
        f"{len(corpus.train):,} training tokens, vocabulary {corpus.vocab_size}, "
        f"{corpus.bytes_per_token:.2f} bytes per token\n"
        f"{args.n_layers} layers, width {args.dim}, tensor parallel over {mesh.tp.world_size} rank(s){copies}: "
        f"{local:,} parameters on each{begin}",
        flush=True,
    )
