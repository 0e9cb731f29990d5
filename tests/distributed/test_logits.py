"""The actor's logits at TP2 x PP2 are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launch import run_ranks
from tests.tiny_models import make_checkpoint

WORKER = Path(__file__).with_name("logits_worker.py")
LARGEST_DIFFERENCE = 1e-4
# (family, tied head, vocabulary, head size): 99 rows do not divide over 2 tensor ranks, so one is padding; heads of 24
# have no kernel and take megatron-core's way, as on other devices.
MODELS = [
    ("qwen2", True, 98, 16),
    ("qwen2", False, 99, 16),
    ("qwen3", True, 99, 16),
    ("qwen3", False, 98, 16),
    ("qwen3", True, 98, 24),
]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--sp",), ()], ids=["sequence-parallel", "plain"])
def test_logits_at_tp2_pp2_equal_transformers(flags: tuple[str, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 98, (length,), generator=generator).tolist() for length in (2, 7, 30)]
    torch.save(sequences, tmp_path / "sequences.pt")
    models = [
        make_checkpoint(
            tmp_path / f"{family}-{tied}-{head_dim}", family=family, tied=tied, vocab_size=vocab_size, head_dim=head_dim
        )
        for family, tied, vocab_size, head_dim in MODELS
    ]
    out = tmp_path / "logits.pt"
    run_ranks(
        WORKER,
        4,
        "--tp=2",
        "--pp=2",
        *flags,
        f"--sequences={tmp_path / 'sequences.pt'}",
        f"--out={out}",
        "--models",
        *models,
    )
    found = torch.load(out)
    for folder in models:
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for index, ids in enumerate(sequences):
            with torch.no_grad():
                expected = reference(input_ids=torch.tensor([ids])).logits[0]
            difference = (found[str(folder)][index] - expected).abs().max().item()
            assert difference <= LARGEST_DIFFERENCE, f"{folder.name}, sequence {index}: {difference}"
