"""What a training run shows and leaves: a progress bar, a log of metrics, and the curve drawn from it."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TextIO

import numpy as np
from numpy.typing import NDArray

from .extras import import_extra

Kind = Literal["train", "validation"]
Record = dict[str, Any]
Floats = NDArray[np.float64]

TERMINAL_FORMAT = "{desc} {percentage:3.0f}%|{bar:30}| {rate_fmt}, {remaining} left{postfix}"
LOG_FORMAT = "{desc}, {rate_fmt}, {remaining} left{postfix}"
LOG_INTERVAL = 10.0  # seconds
TRAIN_COLOR, VALIDATION_COLOR = "#4477aa", "#cc3311"


def require_extras() -> None:
    """Raise ImportError, naming the extra, where a library is missing that is needed only at the end."""
    for name in ("tqdm", "matplotlib.figure"):
        import_extra(name, "train")


class MetricsLog:
    """The metrics of one run in the order of their steps, as JSON lines.

        {"step": 20, "kind": "validation", "loss": 3.61, "bits_per_byte": 1.49}

    Every record is on disk when `write` returns. Values that are not finite are written as null.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Starts ``path`` anew, or continues it after ``resume_step``: records of later steps are dropped, since
        the resumed run will write them again."""
        kept = [] if resume_step is None else [line for line in _read_lines(path) if _step(line) <= resume_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        rewritten = path.with_name(path.name + ".new")
        rewritten.write_text("".join(kept))
        os.replace(rewritten, path)
        self._file = path.open("a")

    def write(self, step: int, kind: Kind, **values: float) -> None:
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **record}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ProgressBar:
    """Steps done, tokens per second, time left and the last loss, on standard error.

    On a terminal it is a bar; elsewhere a line at most every ten seconds, so that it does not flood a log. With
    ``enabled=False``, as on every rank but 0, it shows nothing.
    """

    def __init__(self, total_steps: int, tokens_per_step: int, start_step: int = 0, enabled: bool = True) -> None:
        tqdm = import_extra("tqdm", "train").tqdm
        terminal = sys.stderr.isatty()
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._bar = tqdm(
            desc=f"step {start_step}/{total_steps}",
            total=total_steps * tokens_per_step,
            initial=start_step * tokens_per_step,
            unit=" tokens",
            unit_scale=True,
            disable=not enabled,
            bar_format=TERMINAL_FORMAT if terminal else LOG_FORMAT,
            mininterval=0.1 if terminal else LOG_INTERVAL,
            miniters=1,
            file=sys.stderr if terminal else _Lines(sys.stderr),
        )

    def update(self, step: int, loss: float) -> None:
        """Reports that ``step`` steps are done, the last of them with a ``loss`` in nats per token."""
        self._bar.set_description_str(f"step {step}/{self._total_steps}", refresh=False)
        self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self._bar.update(step * self._tokens_per_step - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


class _Lines:
    """A stream that shows each state of a progress bar on a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()


def draw_curve(metrics_path: Path, png_path: Path) -> None:
    """Draws training and validation loss against the step, in nats per token, into the image ``png_path``.

    A second axis shows bits per byte where the validation records hold ``bits_per_byte``.

    Raises:
        ValueError: ``metrics_path`` holds no record.
        ImportError: the matplotlib library is missing.
    """
    records = [json.loads(line) for line in _read_lines(metrics_path)]
    if not records:
        raise ValueError(f"found no metrics in {metrics_path}: draw the curve after the first record")
    figure = import_extra("matplotlib.figure", "train").Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    _plot_train(axes, train)
    if validation:
        axes.plot(*_curve(validation), color=VALIDATION_COLOR, marker="o", markersize=3.5, label="validation")
        _add_bits_axis(axes, validation[-1])
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(_summary(train, validation), fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(png_path)


def _plot_train(axes: Any, train: Sequence[Record]) -> None:
    """The training loss, noisy and faint, and its moving average over a fiftieth of the points."""
    if not train:
        return
    steps, losses = _curve(train)
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(steps, losses, color=TRAIN_COLOR, linewidth=0.8, alpha=0.35)
    axes.plot(steps[window // 2 :][: len(smooth)], smooth, color=TRAIN_COLOR, label="train")


def _add_bits_axis(axes: Any, last: Record) -> None:
    """A right axis in bits per byte; it is proportional to the left one."""
    if not (last["loss"] and last.get("bits_per_byte")):
        return
    ratio = last["bits_per_byte"] / last["loss"]
    right = axes.secondary_yaxis("right", functions=(lambda nats: nats * ratio, lambda bits: bits / ratio))
    right.set_ylabel("bits per byte")


def _summary(train: Sequence[Record], validation: Sequence[Record]) -> str:
    """The last numbers of both parts, as the title of the curve."""
    parts = [f"{records[-1]['kind']} {_curve(records)[1][-1]:.3f}" for records in (train, validation) if records]
    bits = validation[-1].get("bits_per_byte") if validation else None
    suffix = f" ({bits:.3f} bits per byte)" if bits else ""
    step = max(records[-1]["step"] for records in (train, validation) if records)
    return f"step {step}: " + ", ".join(parts) + f" nats per token{suffix}"


def _curve(records: Sequence[Record]) -> tuple[Floats, Floats]:
    """Steps and losses; a loss that was not finite is NaN."""
    return (
        np.array([record["step"] for record in records], dtype=np.float64),
        np.array([record["loss"] for record in records], dtype=np.float64),
    )


def _read_lines(path: Path) -> list[str]:
    """The complete lines of ``path``, none if it is missing; a killed run may leave a torn one at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _step(line: str) -> int:
    return int(json.loads(line)["step"])
