"""Layouts that do not divide the ranks or the model are refused with those that would."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

import pytest

from tests.small_runs import Refusal, check
from tests.tiny_models import make_checkpoint


class CheckPasses(Protocol):
    """The checks before a run with these flags, which must pass."""

    def __call__(self, *flags: str, world_size: int = 1) -> None: ...


@pytest.fixture
def check_passes(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckPasses:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return partial(check, model, data, tmp_path)


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"), family="qwen3_moe")


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


def test_every_pipeline_stage_needs_a_layer(refusal: Refusal) -> None:
    sentence = refusal("--pipeline-model-parallel-size", "5", world_size=5)
    assert "--pipeline-model-parallel-size 5" in sentence and "4 layers are too few" in sentence


def test_stages_of_given_sizes_must_leave_the_others_equal(refusal: Refusal, check_passes: CheckPasses) -> None:
    flags = ["--pipeline-model-parallel-size=3", "--decoder-first-pipeline-num-layers=1"]
    sentence = refusal(*flags, world_size=3)
    assert "4 layers with 1 in the first pipeline stage leave 3" in sentence
    check_passes(*flags, "--decoder-last-pipeline-num-layers=2", world_size=3)


def test_size_of_a_stage_needs_stages(refusal: Refusal) -> None:
    assert "--pipeline-model-parallel-size > 1" in refusal("--decoder-last-pipeline-num-layers", "2")


def test_uneven_stages_pass(check_passes: CheckPasses) -> None:
    check_passes("--pipeline-model-parallel-size", "3", world_size=3)


def test_expert_parallel_needs_experts(refusal: Refusal) -> None:
    assert "Qwen3ForCausalLM has none" in refusal("--expert-model-parallel-size", "2", world_size=2)


def test_expert_parallel_must_divide_experts_and_replicas(refusal: Refusal, moe_model: Path) -> None:
    model = ["--model", str(moe_model)]
    sentence = refusal(*model, "--expert-model-parallel-size", "3", world_size=3)
    assert "8 experts" in sentence and "3 data-parallel ranks" in sentence and sentence.endswith("1 would work")
    assert "2 data-parallel ranks" in refusal(*model, "--expert-model-parallel-size", "4", world_size=2)


def test_tensor_parallel_experts_need_sequence_parallel(
    refusal: Refusal, check_passes: CheckPasses, moe_model: Path
) -> None:
    flags = ["--model", str(moe_model), "--tensor-model-parallel-size=2", "--expert-model-parallel-size=2"]
    assert "needs --sequence-parallel" in refusal(*flags, world_size=4)
    check_passes(*flags, "--sequence-parallel", world_size=4)


def test_tensor_parallel_must_divide_the_latents(refusal: Refusal, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "latent", family="deepseek_v3", with_tokenizer=False, q_lora_rank=25)
    sentence = refusal("--model", str(model), "--tensor-model-parallel-size", "2", "--sequence-parallel", world_size=2)
    assert "25 latent dimensions of queries" in sentence


def test_transformer_engine_has_no_latent_attention_of_ours(refusal: Refusal, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "latent", family="deepseek_v3", with_tokenizer=False)
    flags = ["--engine", "string:Template", "--transformer-impl", "transformer_engine"]
    sentence = refusal("--model", str(model), *flags)
    assert "DeepseekV3ForCausalLM" in sentence and "--transformer-impl local" in sentence


def test_context_parallel_is_refused(refusal: Refusal) -> None:
    assert "--context-parallel-size must be 1" in refusal("--context-parallel-size", "2", world_size=2)


def test_several_hosts_are_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "2 of 4 ranks are on this one" in refusal(world_size=4)
