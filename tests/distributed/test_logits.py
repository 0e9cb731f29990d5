"""The actor's logits on four ranks are those of transformers, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launch import run_ranks
from tests.tiny_models import make_checkpoint

WORKER = Path(__file__).with_name("logits_worker.py")
LARGEST_DIFFERENCE = 1e-4
# Families, and what their models differ in. 99 rows do not divide over 2 tensor ranks, so one is padding; heads of 24
# have no kernel and take megatron-core's way, as on other devices; 5 layers do not divide over 2 stages.
DENSE: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"vocab_size": 98}),
    ("qwen2", {"tied": False, "vocab_size": 99}),
    ("qwen3", {"vocab_size": 99}),
    ("qwen3", {"tied": False, "vocab_size": 98, "num_hidden_layers": 5}),
    ("qwen3", {"vocab_size": 98, "head_dim": 24, "attention_bias": True}),
    ("llama", {"vocab_size": 99}),
    ("llama", {"tied": False, "attention_bias": False, "mlp_bias": False}),
    ("mistral", {}),
    ("mistral", {"tied": False, "num_hidden_layers": 5}),
    ("internlm3", {}),
    ("internlm3", {"tied": False, "attention_bias": True, "mlp_bias": True}),
]
MIXED: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {}),
    ("qwen3_moe", {"attention_bias": True}),
    ("qwen3_moe", {"tied": False, "vocab_size": 99, "norm_topk_prob": False}),
    ("deepseek_v3", {"num_hidden_layers": 5}),
    ("deepseek_v3", {"tied": False, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5}),
]
# Layouts of 4 ranks. Experts need sequence parallelism beside tensor parallelism.
LAYOUTS = {
    "plain": (("--tp=2", "--pp=2"), DENSE[2::3]),
    "sequence-parallel": (("--tp=2", "--pp=2", "--sp"), DENSE + MIXED),
    "expert-parallel": (("--pp=2", "--ep=2"), MIXED[1:4]),
    "expert-and-tensor-parallel": (("--tp=2", "--ep=2", "--sp"), MIXED[::2]),
}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_on_four_ranks_equal_transformers(layout: str, tmp_path: Path) -> None:
    flags, models = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 98, (length,), generator=generator).tolist() for length in (2, 7, 30, 12)]
    torch.save(sequences, tmp_path / "sequences.pt")
    folders = [
        make_checkpoint(tmp_path / f"{number}-{family}", family=family, with_tokenizer=False, **fields)
        for number, (family, fields) in enumerate(models)
    ]
    (tmp_path / "logits").mkdir()
    run_ranks(
        WORKER,
        4,
        *flags,
        f"--sequences={tmp_path / 'sequences.pt'}",
        f"--out={tmp_path / 'logits'}",
        "--models",
        *folders,
    )
    replicas = [torch.load(file) for file in (tmp_path / "logits").iterdir()]
    for folder in folders:
        found = {index: logits for replica in replicas for index, logits in replica[str(folder)].items()}
        assert sorted(found) == list(range(len(sequences)))
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for index, ids in enumerate(sequences):
            with torch.no_grad():
                expected = reference(input_ids=torch.tensor([ids])).logits[0]
            difference = (found[index] - expected).abs().max().item()
            assert difference <= LARGEST_DIFFERENCE, f"{folder.name}, sequence {index}: {difference}"
