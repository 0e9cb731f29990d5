"""Reward curves."""

from __future__ import annotations

from matplotlib.image import imread

from xrl.metrics.curve import curve_points, running_mean, save_curve, terminal_curve, whole_ticks

ROWS: list[dict[str, float | None]] = [{"step": step, "reward/mean": step / 20} for step in range(1, 21)]
ROWS += [{"step": 0, "eval/pass@1": 0.1}, {"step": 20, "eval/pass@1": 0.9}, {"step": 21, "reward/mean": None}]


def test_rows_without_the_metric_are_passed_over():
    assert curve_points(ROWS, "eval/pass@1") == ([0, 20], [0.1, 0.9])
    assert len(curve_points(ROWS, "reward/mean")[0]) == 20


def test_running_mean_starts_with_what_there_is():
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    assert running_mean([], 3) == []


def test_picture_is_a_png_that_is_not_blank(tmp_path):
    save_curve(ROWS, tmp_path / "curve.png", eval_key="eval/pass@1")
    pixels = imread(tmp_path / "curve.png")
    assert pixels.shape[0] > 200
    assert pixels.std() > 0


def test_a_run_of_one_step_still_gives_a_picture(tmp_path):
    save_curve(ROWS[:1], tmp_path / "one.png")
    save_curve([], tmp_path / "none.png")
    assert (tmp_path / "one.png").stat().st_size > 0


def test_terminal_curve_is_text_of_the_given_size_without_colour():
    text = terminal_curve(ROWS, width=60, height=12)
    lines = text.split("\n")
    assert len(lines) == 12
    assert max(map(len, lines)) <= 60
    assert "\x1b" not in text
    assert "reward/mean" in text
    assert terminal_curve(ROWS, width=60, height=12) == text  # nothing is left over from the first


def test_terminal_curve_of_one_point_is_empty():
    assert terminal_curve(ROWS[:1]) == ""


def test_ticks_are_whole_rollouts():
    assert whole_ticks(1, 160) == [1, 28, 54, 80, 107, 134, 160]
    assert whole_ticks(1, 3) == [1, 2, 3]
    assert whole_ticks(4, 4) == [4]
    axis = terminal_curve([{"step": step, "reward/mean": 0.1 * step} for step in range(1, 4)]).split("\n")[-2]
    assert axis.split() == ["1", "2", "3"]
