"""Layouts that do not divide the ranks or the model are refused with those that would."""

from __future__ import annotations

import pytest

from tests.small_runs import Refusal


def test_world_size_must_be_divisible_by_the_model_parallel_sizes(refusal: Refusal) -> None:
    flags = ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"]
    sentence = refusal(*flags, world_size=6)
    assert "= 4 does not divide the 6 ranks" in sentence and "start 4 or 8 ranks" in sentence
    assert "start 4 ranks" in refusal(*flags, world_size=1)


def test_tensor_parallel_must_divide_the_heads(refusal: Refusal) -> None:
    sentence = refusal("--tensor-model-parallel-size", "3", world_size=3)
    assert "--tensor-model-parallel-size 3" in sentence and "4 attention heads" in sentence
    assert sentence.endswith("1 or 2 would work")


def test_tensor_parallel_must_divide_the_key_value_heads(refusal: Refusal) -> None:
    sentence = refusal("--tensor-model-parallel-size", "4", world_size=4)
    assert "2 key/value heads" in sentence and sentence.endswith("1 or 2 would work")


def test_layers_must_be_divisible_by_the_pipeline_stages(refusal: Refusal) -> None:
    sentence = refusal("--pipeline-model-parallel-size", "3", world_size=3)
    assert "4 layers" in sentence and sentence.endswith("1, 2 or 4 would work")


def test_context_parallel_is_refused(refusal: Refusal) -> None:
    assert "--context-parallel-size must be 1" in refusal("--context-parallel-size", "2", world_size=2)


def test_several_hosts_are_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "2 of 4 ranks are on this one" in refusal(world_size=4)
