"""The contract of engines: its table, what importing it costs, which requests none can run, and answers of no kind."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rollout.engines import request
from tests.samples import answer
from xrl.config import SettingsError
from xrl.rollout import ENGINES, check_engine, create_engine
from xrl.rollout.engine import MAX_STOP_TOKENS, EngineError, check_completion, check_request


def test_unknown_engine_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown: take one of embedded"):
        create_engine(
            "warp", model_dir=tmp_path, dtype="float32", device="cpu", max_batch_size=1, num_threads=1, max_model_len=8
        )


@pytest.mark.parametrize("name", ["no.such.package:make", "nosuchmodule:make", ":make", "json:"])
def test_engine_of_ones_own_must_be_importable(name: str) -> None:
    with pytest.raises(SettingsError, match=f"--engine '{name}'"):
        check_engine(name)


def test_engine_of_ones_own_is_taken() -> None:
    check_engine("tests.rollout.scripted_engine:make")


def test_the_table_lists_the_embedded_engine() -> None:
    assert "embedded" in ENGINES


def test_names_and_contract_are_importable_without_torch() -> None:
    code = "import sys, xrl.rollout, xrl.rollout.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 2**63 - 1, "seed": -(2**63)},
        {"max_new_tokens": 14},
        {"first_sample": 2**31 - 1},
        {"num_drawn": 1},
        {"stop_token_ids": tuple(range(MAX_STOP_TOKENS))},
        {"stop_token_ids": (10**6,)},  # no token of the model: it never comes
    ],
)
def test_a_request_at_its_bounds_can_run(options: dict[str, Any]) -> None:
    check_request(request([0, 97], **({"max_new_tokens": 4} | options)), vocab_size=98, max_model_len=16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token_ids": []}, "the prompt must hold at least one token, got none"),
        ({"token_ids": [0, 98]}, r"token ids must be in \[0, 98\)"),
        ({"token_ids": [-1, 5]}, r"token ids must be in \[0, 98\)"),
        ({"num_samples": 0}, "num_samples and max_new_tokens must be >= 1, got 0 and 4"),
        ({"max_new_tokens": 0}, "num_samples and max_new_tokens must be >= 1, got 1 and 0"),
        ({"max_new_tokens": 15}, r"prompt \(2\) \+ max_new_tokens \(15\) = 17 tokens exceed max_model_len 16"),
        ({"first_sample": -1}, r"ordinals in \[0, 2147483647\], got first_sample -1 and num_samples 1"),
        ({"first_sample": 2**31 - 1, "num_samples": 2}, "got first_sample 2147483647 and num_samples 2"),
        ({"num_drawn": 2}, r"num_drawn must be in \[0, 1\], as the prompt holds at least one of the 2 tokens, got 2"),
        ({"num_drawn": -1}, r"num_drawn must be in \[0, 1\]"),
        (
            {"temperature": 1e-9},
            r"temperature must be 0 or in \[1e-06, 1e\+06\] and top_p in \(0, 1\], got 1e-09 and 1",
        ),
        ({"temperature": float("nan")}, "got nan and 1"),
        ({"top_p": 0.0}, "got 1 and 0"),
        ({"top_p": float("nan")}, "got 1 and nan"),
        ({"top_k": -1}, "top_k must be >= 0, and top_k and seed must be integers of 64 bits"),
        ({"seed": 2**63}, "top_k must be >= 0, and top_k and seed must be integers of 64 bits"),
        ({"stop_token_ids": (1,) * (MAX_STOP_TOKENS + 1)}, "at most 1024 stop tokens, got 1025"),
    ],
)
def test_a_request_that_no_engine_can_run_is_named_with_what_is_needed(options: dict[str, Any], words: str) -> None:
    asked = request(**({"token_ids": [0, 97], "id": "7-3", "max_new_tokens": 4} | options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"request '7-3': .*{words}"):
        check_request(asked, vocab_size=98, max_model_len=16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": [5, 2]}, "the engine's token_ids are list, not a numpy array of int32"),
        ({"token_ids": np.array([5, 2])}, "the engine's token_ids are int64, not a numpy array of int32"),
        ({"logprobs": np.zeros(2)}, "the engine's logprobs are float64, not a numpy array of float32"),
        ({"logprobs": np.zeros(3, np.float32)}, r"are \[2\] and \[3\], not one of each for every token"),
        (
            {"token_ids": np.zeros((1, 2), np.int32), "logprobs": np.zeros((1, 2), np.float32)},
            r"are \[1, 2\] and \[1, 2\], not one of each for every token",
        ),
    ],
)
def test_a_completion_that_cannot_be_sent_is_the_engine_s_error(changes: dict[str, Any], words: str) -> None:
    check_completion(answer())
    check_completion(answer(5, 2))
    with pytest.raises(EngineError, match=words):
        check_completion(dataclasses.replace(answer(5, 2), **changes))
