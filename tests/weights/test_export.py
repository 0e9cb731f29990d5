"""Export and plan against real megatron-core models on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.tiny_models import FAMILIES, make_checkpoint
from xrl.parallel.layout import Layout
from xrl.weights.convert import open_source, to_megatron
from xrl.weights.plan import plan

WORKER = Path(__file__).with_name("export_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
def test_every_family_leaves_its_ranks_as_it_came(tmp_path: Path) -> None:
    """TP2 x PP2, five layers on two stages, and a vocabulary that two ranks do not divide; every second one is tied."""
    folders = [
        make_checkpoint(
            tmp_path / family,
            family=family,
            tied=number % 2 == 0,
            vocab_size=99,
            num_hidden_layers=5,
            with_tokenizer=False,
        )
        for number, family in enumerate(FAMILIES)
    ]
    converted = tmp_path / "converted"
    source = open_source(folders[0])
    to_megatron(source, converted, plan(source.shape, Layout(tensor_size=2, pipeline_size=2)), lambda _: None)
    run_ranks(WORKER, 4, "--tp=2", "--pp=2", f"--converted={converted}", "--models", *folders)


@pytest.mark.distributed
@pytest.mark.slow
def test_experts_come_from_all_their_ranks(tmp_path: Path) -> None:
    """TP2 x EP2: half of the experts lie on data-parallel ranks that hold copies of everything else."""
    folders = [
        make_checkpoint(tmp_path / family, family=family, tied=False, with_tokenizer=False)
        for family in ("qwen3_moe", "deepseek_v3")
    ]
    run_ranks(WORKER, 4, "--tp=2", "--ep=2", "--models", *folders)
