"""From GSM8K's own files to a checkpoint that transformers loads, at TP2 x PP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.launch import run_ranks

WORKER = Path(__file__).with_name("gsm8k_worker.py")
STUDENT = Path(__file__).parents[2] / "examples" / "student"
LARGEST_DIFFERENCE = 1e-4


@pytest.mark.distributed
@pytest.mark.slow
def test_two_rollouts_end_in_a_checkpoint_with_the_actors_logits(tmp_path: Path) -> None:
    # XRL_GSM8K_DIR names a folder with the real train.jsonl; without it, rows of the same schema are made here.
    source = os.environ.get("XRL_GSM8K_DIR")
    if source is None:
        source = str(tmp_path / "source")
        write_questions(Path(source))
    subprocess.run(
        [sys.executable, "-m", "xrl.cli", "gsm8k", "--input-dir", source, "--out-dir", str(tmp_path / "rows")],
        check=True,
    )
    sequences = [[5, 6, 7, 8, 9, 10], list(range(20, 60))]
    torch.save(sequences, tmp_path / "sequences.pt")
    run_ranks(
        WORKER,
        4,
        f"--out={tmp_path / 'logits.pt'}",
        f"--sequences={tmp_path / 'sequences.pt'}",
        f"--model={STUDENT}",
        f"--data={tmp_path / 'rows' / 'train.jsonl'}",
        f"--work-dir={tmp_path / 'work'}",
        "--tensor-model-parallel-size=2",
        "--pipeline-model-parallel-size=2",
        "--num-rollouts=2",
        "--rollout-batch-size=8",
        "--samples-per-prompt=4",
        "--max-prompt-length=512",
        "--max-response-length=32",
        "--max-tokens-per-microbatch=2048",
        # The student gets no real question right: a judge that tells its answers apart gives it something to learn.
        f"--judge={WORKER.with_name('digits_judge.py')}:reward",
        "--kl-coef=0.01",
        "--lr=1e-3",
    )
    (run,) = (tmp_path / "work").iterdir()
    final = run / "hf-final"
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    AutoTokenizer.from_pretrained(final)
    expected = torch.load(tmp_path / "logits.pt")
    for index, ids in enumerate(sequences):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids])).logits[0]
        assert (found - expected[index]).abs().max().item() <= LARGEST_DIFFERENCE
    start = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    changed = [name for name, weight in start.named_parameters() if not torch.equal(weight, model.get_parameter(name))]
    assert len(changed) == len(list(start.parameters()))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward/mean" in row] == [1, 2]
    summary, *samples = (run / "rollout_idx_2_trajectory.jsonl").read_text().splitlines()
    assert len(samples) == 8 * 4
    assert json.loads(summary)["rollout_id"] == 2


def write_questions(folder: Path) -> None:
    """Rows in the layout of GSM8K's train.jsonl."""
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for number in range(2, 26):
            question = f"Mia has {number} boxes with 3 pens in each. How many pens does Mia have?"
            answer = f"Mia has {number}*3=<<{number}*3={3 * number}>>{3 * number} pens.\n#### {3 * number}"
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
