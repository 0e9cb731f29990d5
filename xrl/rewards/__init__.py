"""Judges: who gives an answer its reward. A judge is a file, a row of this table and a test."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from xrl.config import RewardConfig, SettingsError
from xrl.config.names import hint
from xrl.rewards.judge import ANSWERS, TRUTHS, InlineJudge, Judge, JudgePool
from xrl.rewards.limits import JudgeLimits
from xrl.rewards.load import check_reference, load_judge, load_truth_check
from xrl.rewards.process import JudgeSetup
from xrl.rewards.processes import ProcessJudges
from xrl.rewards.truths import InlineTruthChecker, ProcessTruthChecker, TruthChecker
from xrl.types import Verdict

__all__ = [
    "JUDGES",
    "InlineJudge",
    "Judge",
    "JudgePool",
    "TruthChecker",
    "Verdict",
    "check_judge",
    "create_judge",
    "create_truth_checker",
]


@dataclass(frozen=True, kw_only=True)
class JudgeEntry:
    """Where a judge is, and how it may be asked."""

    reference: str  # package.module:function
    inline: bool = False  # it always ends soon and cannot crash: no process needed
    package: str | None = None  # that it needs installed
    reads_numbers: bool = False  # a ground truth that is a plain number needs no asking


JUDGES = {
    "gsm8k": JudgeEntry(reference="xrl.rewards.gsm8k:judge", inline=True),
    "gsm8k-exact": JudgeEntry(reference="xrl.rewards.gsm8k_exact:judge", inline=True),
    "math-verify": JudgeEntry(reference="xrl.rewards.math_verify:judge", package="math_verify", reads_numbers=True),
}


def check_judge(name: str) -> None:
    """Find the judge before anything slow starts. A user's own is not run yet: `create_truth_checker` does that.

    Raises:
        SettingsError: no such judge or file, or a package that it needs is missing.
    """
    entry = JUDGES.get(name)
    if entry is None:
        if ":" not in name:
            raise SettingsError(
                f"--judge {name} is unknown{hint('judge', name)}: take one of {', '.join(JUDGES)}, or a function of "
                f"your own as package.module:function or path/file.py:function"
            )
        check_reference(name)
    elif entry.package and importlib.util.find_spec(entry.package) is None:
        raise SettingsError(f"--judge {name} needs the package {entry.package.replace('_', '-')}: pip install it")


def create_judge(config: RewardConfig, *, log_dir: Path | None = None) -> JudgePool:
    """The judge the settings name, behind its bounds. Close it in the end.

    Args:
        log_dir: where what it prints goes, as judge_<n>.log; left out: nowhere.

    Raises:
        SettingsError: as `check_judge` does.
    """
    check_judge(config.judge)
    entry = JUDGES.get(config.judge) or JudgeEntry(reference=config.judge)
    failed_reward = 0.0 if config.judge_failed == "zero" else None
    if entry.inline:
        return InlineJudge(load_judge(entry.reference), failed_reward=failed_reward)
    return ProcessJudges(
        _setup(config, entry, ANSWERS, log_dir),
        timeout_s=config.judge_timeout_s,
        num_workers=config.judge_num_workers,
        failed_reward=failed_reward,
    )


def create_truth_checker(config: RewardConfig) -> TruthChecker:
    """What asks the judge about the ground truths of a data file, before anything starts. A context manager.

    Raises:
        SettingsError: as `check_judge` does, or a judge of the user's own cannot be imported.
    """
    check_judge(config.judge)
    entry = JUDGES.get(config.judge) or JudgeEntry(reference=config.judge)
    if entry.inline:
        check = load_truth_check(entry.reference)
        return TruthChecker() if check is None else InlineTruthChecker(check)
    checker = ProcessTruthChecker(
        _setup(config, entry, TRUTHS, None),
        timeout_s=config.judge_timeout_s,
        num_workers=config.judge_num_workers,
        reads_numbers=entry.reads_numbers,
    )
    # Ours can be imported, and is only started for a row that it is asked about.
    if config.judge not in JUDGES:
        checker.start()
    return checker


def _setup(config: RewardConfig, entry: JudgeEntry, asked_about: str, log_dir: Path | None) -> JudgeSetup:
    return JudgeSetup(
        reference=entry.reference,
        asked_about=asked_about,
        limits=JudgeLimits.of(config),
        variables=config.judge_variables,
        log_dir=log_dir,
    )
