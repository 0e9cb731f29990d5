"""The reward over a run, as a picture and in the terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xrl.files.whole import write_whole

# matplotlib and plotext are imported in the functions that draw: a run pays for them only once it is over.


def curve_points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; rows that lack it, or hold null, are passed over."""
    points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and of up to window - 1 before it."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def whole_ticks(first: int, last: int, *, most: int = 7) -> list[int]:
    """At most so many whole numbers from first to last, both among them, about evenly spread: there is no half step."""
    return sorted({round(first + (last - first) * index / (most - 1)) for index in range(most)})


def save_curve(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    key: str = "reward/mean",
    eval_key: str | None = None,
    window: int = 5,
    title: str = "",
) -> None:
    """Plot a metric, its running mean, and the evaluations where there are some, as a PNG.

    Args:
        rows: of `metrics.jsonl`.
        path: the PNG.
        key: metric to plot.
        eval_key: metric of the evaluations, on the same axis.
        window: steps in the running mean.
        title: above the plot, such as the run's name.

    Raises:
        NotWritten: the disk is full, for example.
    """
    # Figure, not pyplot: no global figure, and no window system is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, values = curve_points(rows, key)
    axes.plot(steps, values, color="C0", alpha=0.35, marker="." if len(values) < 2 else None, label=key)
    if len(values) > window:
        axes.plot(steps, running_mean(values, window), color="C0", label=f"{key}, mean of {window}")
    if eval_key is not None:
        eval_steps, eval_values = curve_points(rows, eval_key)
        axes.plot(eval_steps, eval_values, color="C1", marker="o", label=eval_key)
    axes.set_title(title)
    axes.set_xlabel("rollout")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(key)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


def terminal_curve(
    rows: Sequence[Mapping[str, Any]],
    *,
    key: str = "reward/mean",
    window: int = 5,
    width: int = 76,
    height: int = 16,
) -> str:
    """The running mean of a metric as lines of text without colour; "" where there are fewer than two points."""
    import plotext

    steps, values = curve_points(rows, key)
    if len(values) < 2:
        return ""
    figure = plotext.figure
    figure.clear()  # plotext has one figure for everybody
    figure.theme("colorless")
    figure.plot_size(width, height)
    figure.draw(figure.signal(steps, running_mean(values, window)).lines())
    figure.title(f"{key} (mean of {window})")
    figure.label("rollout", 0)
    ticks = whole_ticks(steps[0], steps[-1])
    figure.ruler(0).ticks(ticks, [str(tick) for tick in ticks])
    text = str(figure.build().string(colorless=True))
    figure.clear()
    return "\n".join(line.rstrip() for line in text.rstrip().split("\n"))
