"""What a run remembers of itself, and how it is taken up again from its newest checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from src.checkpoint import load, read_info
from src.modeling import ModelArgs, Transformer

from .corpus import Corpus
from .logs import logger
from .mesh import Mesh
from .options import Options


@dataclass
class History:
    """What a run remembers of its steps: how many, the validation loss at the start, and every training loss."""

    step: int
    first_loss: float | None
    losses: list[float]

    def losses_tensor(self) -> torch.Tensor:
        """All training losses, which are exact in float64."""
        return torch.tensor(self.losses, dtype=torch.float64)


def run_settings(args: ModelArgs, corpus: Corpus, options: Options) -> dict[str, Any]:
    """What a resumed run must have in common with the run it continues."""
    names = ["seq_len", "batch_size", "accumulate", "seed", "lr", "warmup", "weight_decay", "clip", "dtype"]
    names.append("loss_block_tokens")
    return {**asdict(args), "text": corpus.path.name, **{name: getattr(options, name) for name in names}}


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def restore(
    checkpoints: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    mesh: Mesh,
    options: Options,
) -> History:
    """What the run has done so far, with model and optimizer as they were then.

    Raises ValueError when there is an older run and --resume was not given, or one with other settings.
    """
    found = saved_steps(checkpoints)
    if not found:
        return History(0, None, [])
    if not options.resume:
        raise ValueError(f"{options.out} holds a run already; pass --resume to continue it, or another --out")
    info = read_info(found[-1])
    if info["history"]["step"] > options.steps:
        step = info["history"]["step"]
        raise ValueError(f"{found[-1]} is at step {step}, beyond --steps {options.steps}; ask for more steps")
    for name, value in run_settings(model.args, corpus, options).items():
        if info["run"].get(name) != value:
            raise ValueError(
                f"{found[-1]} is of another run: its {name} is {info['run'].get(name)!r}, here it is {value!r}; "
                "resume with the same settings, or choose another --out"
            )
    history = History(**load(found[-1], model, optimizer, group=mesh.tp, world=mesh.world)["history"])
    logger().info("loaded %s, step %d of %d", found[-1], history.step, options.steps)
    return history
