"""Everything a run tells the user: console lines, metrics, trajectories. Rank 0 only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from xrl.launch.terminal import one_line
from xrl.metrics.console import LOGGER_NAME
from xrl.metrics.curve import save_curve
from xrl.metrics.ending import Ending
from xrl.metrics.gaps import LogGaps
from xrl.metrics.report import (
    evaluation_line,
    evaluation_table,
    first_update_line,
    prepared_line,
    rollout_finished_line,
    update_line,
)
from xrl.metrics.run_folder import RunFolder
from xrl.metrics.sinks import MetricsLog, read_rows
from xrl.metrics.trajectory import write_trajectory
from xrl.types import Group

logger = logging.getLogger(LOGGER_NAME)


class Journal:
    """Keeps the run folder and the console up to date."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        tensorboard: bool,
        log_interval: int,
        num_rollouts: int,
        ending: Ending | None = None,
    ) -> None:
        """
        Args:
            ending: is told of each rollout that is learned from.
        """
        self.folder = folder
        self._ending = ending or Ending()
        self.log_interval = log_interval
        self.num_rollouts = num_rollouts
        self._gaps = LogGaps()
        self._metrics = MetricsLog(folder, tensorboard=tensorboard, gaps=self._gaps)
        self._first_evaluation: Mapping[str, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """How far metrics.jsonl is written, and the evaluation that later ones are compared with."""
        self._metrics.flush(to_disk=True)
        first = None if self._first_evaluation is None else dict(self._first_evaluation)
        return {"metrics_bytes": self._metrics.num_bytes, "first_evaluation": first, "num_rollouts": self.num_rollouts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the state: what an interrupted attempt wrote behind it is written anew.

        Raises:
            NotWritten: the file cannot be cut.
        """
        self._first_evaluation = state["first_evaluation"]
        found = self._metrics.num_bytes
        if 0 < found < state["metrics_bytes"]:
            self.warn(
                f"{self.folder.metrics} is shorter than when the state was saved: some of its last rows are missing"
            )
        self._metrics.cut(state["metrics_bytes"])

    def begin_anew(self) -> None:
        """An attempt that saved no state has written into the same folder: all of it is written anew.

        Raises:
            NotWritten: metrics.jsonl cannot be cut.
        """
        self._metrics.cut(0)

    def begin_behind(self, step: int) -> None:
        """Tell TensorBoard that steps behind this one come anew."""
        self._metrics.begin_behind(step)

    def record(self, log: str, path: Path, write: Callable[[], None]) -> None:
        """Write another file of the run's, or do without it where nothing can be written.

        Args:
            log: which of the run's logs it is part of.
        """
        self._gaps.try_to(write, log, path)

    def say(self, line: str) -> None:
        """Print one line on the console."""
        logger.info(one_line(line))

    def warn(self, line: str) -> None:
        """Print one warning on the console."""
        logger.warning(one_line(line))

    def rollout(
        self,
        index: int,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float | None]],
        num_samples: int,
        metrics: Mapping[str, float],
    ) -> None:
        """Write down every answer of a rollout that was sampled and judged."""
        path = self.folder.trajectory(index)
        write = partial(write_trajectory, path, groups, rollout_id=index, advantages=advantages, metrics=metrics)
        is_written = self._gaps.try_to(write, "answers", path, rollout=index)
        if self._speaks(index):
            self.say(rollout_finished_line(index, path if is_written else None))
            self.say(prepared_line(num_samples, metrics))

    def step(self, index: int, metrics: Mapping[str, float], updates: Sequence[Mapping[str, float]] = ()) -> None:
        """Write the metrics of a rollout that was learned from, once the new weights are out.

        Args:
            metrics: of the rollout and all its updates together.
            updates: of each update, where there were several: a line each.
        """
        self._ending.learned(index)
        self._metrics.write(index, metrics)
        if self._speaks(index):
            for number, update in enumerate(updates, start=1):
                which = (number, len(updates))
                self.say(update_line(index, update, num_rollouts=self.num_rollouts, update=which))
            self.say(update_line(index, metrics, num_rollouts=self.num_rollouts))

    def first_update(self, metrics: Mapping[str, float]) -> None:
        """Explain what surprises everybody who sees the run's first update."""
        line = first_update_line(metrics)
        if line:
            self.say(line)

    def evaluation(self, index: int, metrics: Mapping[str, float]) -> None:
        """Pass rates on held-out prompts."""
        self._metrics.write(index, metrics)
        self.say(evaluation_line(index, metrics))
        if self._first_evaluation is None:
            self._first_evaluation = metrics
        elif index == self.num_rollouts:
            logger.info("\n" + evaluation_table(self._first_evaluation, metrics))

    def finish(self) -> None:
        """Draw the reward curve, close the files and say where they are."""
        self._metrics.close()
        rows = self._rows()
        if any("reward/mean" in row for row in rows):
            path = self.folder.reward_curve
            self._gaps.try_to(partial(save_curve, rows, path, title=self.folder.path.name), "curve", path)
        self._gaps.end()
        self.say(f"run folder: {self.folder.path}")

    def close(self) -> None:
        self._metrics.close()

    def _rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl has; nothing where it was never written, or somebody has touched it."""
        try:
            return read_rows(self.folder.metrics)
        except OSError:  # it could not be written, which was said
            return []
        except ValueError as error:
            self.warn(f"no reward curve is drawn: {error}")
            return []

    def _speaks(self, index: int) -> bool:
        return index % self.log_interval == 0 or index == self.num_rollouts
