"""What a judge may take, and what it sees of the environment."""

from __future__ import annotations

import pytest

from xrl.config import RewardConfig, SettingsError
from xrl.rewards.limits import JudgeLimits, judge_environment


def test_judge_sees_what_programs_need_and_no_secret() -> None:
    harmless = {
        "PATH": "/bin",
        "HOME": "/h",
        "LC_ALL": "C",
        "PYTHONPATH": "/p",
        "OMP_NUM_THREADS": "3",
        "HF_HOME": "/f",
    }
    secret = dict.fromkeys(
        (
            "HF_TOKEN",
            "WANDB_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "HTTPS_PROXY",
            "XRL_WORKER_KEY",
            "PYTHON_PASSWORD",
            "MINE",
        ),
        "s",
    )
    assert judge_environment(environ={**harmless, **secret}) == harmless


def test_judge_sees_what_the_user_names() -> None:
    assert judge_environment(["API_KEY"], {"API_KEY": "k", "OTHER_KEY": "o", "OMP_NUM_THREADS": "1"}) == {
        "API_KEY": "k",
        "OMP_NUM_THREADS": "1",
    }


def test_maths_libraries_get_few_threads_where_nobody_says_how_many() -> None:
    assert 1 <= int(judge_environment(environ={})["OMP_NUM_THREADS"]) <= 8


def test_limits_are_those_of_the_settings() -> None:
    assert JudgeLimits.of(
        RewardConfig(judge_memory_gb=0.5, judge_max_processes=3, judge_max_file_gb=None)
    ) == JudgeLimits(memory_bytes=500_000_000, max_processes=3, max_file_bytes=None)


@pytest.mark.parametrize("name", ["judge_memory_gb", "judge_max_processes", "judge_max_file_gb"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), 1e300])
def test_limit_that_allows_nothing_is_refused(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} must be > 0 and at most 1,000,000, or null"):
        RewardConfig(**{name: value})  # type: ignore[arg-type]


def test_more_processes_than_any_judge_needs_are_refused() -> None:
    with pytest.raises(SettingsError, match="--judge-num-workers must be at most .* on this machine, got 99999"):
        RewardConfig(judge_num_workers=99_999)


def test_variable_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    assert RewardConfig(judge_env=" MY_KEY, PATH,").judge_variables == ["MY_KEY", "PATH"]
    with pytest.raises(SettingsError, match="--judge-env NO_SUCH_KEY: the environment has no such variable"):
        RewardConfig(judge_env="MY_KEY,NO_SUCH_KEY")
    with pytest.raises(SettingsError, match="takes names of variables") as caught:
        RewardConfig(judge_env="MY_KEY=secret")
    assert "secret" not in str(caught.value)
