"""The data files: every row is read, and the judge is asked about its ground truth."""

from __future__ import annotations

from xrl.config import Settings
from xrl.data.rows import PromptRow, check_dataset
from xrl.rewards import create_truth_checker
from xrl.types import Prompt


def check_data(settings: Settings) -> int:
    """Refuse a row that cannot be trained on or evaluated; returns the number of training rows.

    Raises:
        SettingsError: naming the file and the line.
    """
    with create_truth_checker(settings.rewards) as checker:

        def see(where: str, row: PromptRow) -> None:
            checker.see(where, _untokenised(row))

        num_rows = check_dataset(settings.data.data, min_rows=settings.prompts_in_flight, see=see)
        if settings.evaluation.eval_data is not None:
            check_dataset(settings.evaluation.eval_data, min_rows=1, what="--eval-data", see=see)
    return num_rows


def _untokenised(row: PromptRow) -> Prompt:
    return Prompt(
        id=row.id,
        token_ids=[],
        text=row.prompt if isinstance(row.prompt, str) else "",
        ground_truth=row.ground_truth,
        data_source=row.data_source,
        extra=row.extra,
    )
