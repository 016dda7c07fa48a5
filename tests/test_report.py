"""What a run shows and leaves: the log of metrics, the curve, the progress bar."""

import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import report
from scripts.report import MetricsLog, ProgressBar, draw_curve

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def records_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in records_in(path)]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """A run of ten steps with a validation after every fifth."""
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 11):
            log.write(step, "train", loss=8.0 / step, lr=1e-3)
            if step % 5 == 0:
                log.write(step, "validation", loss=9.0 / step, bits_per_byte=3.0 / step)
    return path


def test_each_record_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, "train", loss=2.5, tokens_per_second=1000)
        assert records_in(path) == [{"step": 1, "kind": "train", "loss": 2.5, "tokens_per_second": 1000}]
        log.write(1, "validation", loss=math.nan, bits_per_byte=math.inf)
        assert records_in(path)[1] == {"step": 1, "kind": "validation", "loss": None, "bits_per_byte": None}


def test_a_new_log_starts_empty(metrics: Path) -> None:
    MetricsLog(metrics).close()
    assert metrics.read_text() == ""


def test_resuming_keeps_one_history(metrics: Path) -> None:
    whole = metrics.read_text()
    with MetricsLog(metrics, resume_step=5) as log:
        assert steps_in(metrics) == [1, 2, 3, 4, 5, 5]
        for step in range(6, 11):
            log.write(step, "train", loss=8.0 / step, lr=1e-3)
        log.write(10, "validation", loss=0.9, bits_per_byte=0.3)
    assert metrics.read_text() == whole
    assert list(metrics.parent.iterdir()) == [metrics]


def test_resuming_drops_a_torn_line(metrics: Path) -> None:
    metrics.write_text(metrics.read_text() + '{"step": 11, "ki')
    MetricsLog(metrics, resume_step=20).close()
    assert steps_in(metrics) == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]


def test_resuming_without_a_log(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=3) as log:
        log.write(4, "train", loss=1.0)
    assert steps_in(tmp_path / "metrics.jsonl") == [4]


def test_a_failed_rewrite_keeps_the_old_log(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metrics.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        MetricsLog(metrics, resume_step=5)
    assert metrics.read_text() == whole


def drawn_axes(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws the curve and returns the axes drawn on, after checking that the image was written."""
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []
    save = figure_module.Figure.savefig

    def keep(figure: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(figure_module.Figure, "savefig", keep)
    image = metrics.with_name("loss.png")
    draw_curve(metrics, image)
    assert image.read_bytes().startswith(PNG_SIGNATURE)
    return figures[0].axes[0]


def test_the_curve_shows_both_losses(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn_axes(metrics, monkeypatch)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["train"].get_xdata()) == list(range(1, 11))
    assert list(lines["train"].get_ydata()) == pytest.approx([8.0 / step for step in range(1, 11)])
    assert list(lines["validation"].get_xdata()) == [5, 10]
    assert list(lines["validation"].get_ydata()) == [1.8, 0.9]
    assert axes.get_title() == "step 10: train 0.800, validation 0.900 nats per token (0.300 bits per byte)"


def test_the_right_axis_is_bits_per_byte(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn_axes(metrics, monkeypatch)
    (right,) = axes.child_axes
    assert right.get_ylabel() == "bits per byte"
    assert right.get_ylim() == pytest.approx([limit / 3 for limit in axes.get_ylim()])


def test_a_long_curve_is_smoothed_and_centred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(250):
            log.write(step, "train", loss=float(step))
    lines = {line.get_label(): line for line in drawn_axes(tmp_path / "metrics.jsonl", monkeypatch).get_lines()}
    assert list(lines["train"].get_xdata()) == list(range(2, 248))
    assert list(lines["train"].get_ydata()) == pytest.approx(list(range(2, 248)))


@pytest.mark.parametrize("loss", [1.5, math.nan])
@pytest.mark.parametrize("kind", ["train", "validation"])
def test_a_curve_of_one_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: report.Kind, loss: float) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(1, kind, loss=loss)
    axes = drawn_axes(tmp_path / "metrics.jsonl", monkeypatch)
    assert axes.get_title() == f"step 1: {kind} {loss:.3f} nats per token"
    assert axes.child_axes == []


def test_no_metrics_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name in ("empty.jsonl", "missing.jsonl"):
        with pytest.raises(ValueError, match=f"no metrics in .*{name}"):
            draw_curve(tmp_path / name, tmp_path / "loss.png")


class Stream(io.StringIO):
    """Standard error, on a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal))
    with ProgressBar(total_steps=1000, tokens_per_step=64, start_step=400) as bar:
        for step in range(401, 1001):
            bar.update(step, loss=1000 / step)
    states = stream.getvalue().replace("\r", "\n").split("\n")
    shown = [state for state in states if state.strip()]
    assert shown[0].startswith("step 400/1000")
    assert shown[-1].startswith("step 1000/1000") and "loss 1.000" in shown[-1] and "tokens/s" in shown[-1]
    assert "left" in shown[-1]
    if terminal:
        assert " 40%|" in shown[0]
    else:
        assert len(shown) == 2 and "\r" not in stream.getvalue()


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=True))
    with ProgressBar(total_steps=10, tokens_per_step=64, enabled=False) as bar:
        bar.update(1, loss=2.0)
    assert stream.getvalue() == ""


def test_missing_libraries_name_the_extra(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"tqdm is not installed; pip install -e '\.\[train\]'"):
        ProgressBar(total_steps=1, tokens_per_step=1)
    with pytest.raises(ImportError, match=r"matplotlib is not installed; pip install -e '\.\[train\]'"):
        draw_curve(metrics, metrics.with_name("loss.png"))
