"""The same batch and weights give the same loss, gradients and updates at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.parity_worker import MICROBATCHES, PACKINGS
from tests.tiny_models import make_checkpoint

WORKER = Path(__file__).with_name("parity_worker.py")
VOCAB_SIZE = 98  # 4 tensor ranks would need padding, 2 divide it
TOLERANCE = 1e-5

LAYOUTS = {
    "tp2": (2, "--tp=2"),
    "pp2": (2, "--pp=2"),
    "dp2": (2,),
    "dp2-distributed-optimizer": (2, "--distributed-optimizer"),
    "tp2-sp": (2, "--tp=2", "--sp"),
    "tp2pp2": (4, "--tp=2", "--pp=2"),
    "tp2pp2-sp-recompute": (4, "--tp=2", "--pp=2", "--sp", "--recompute=full"),
    "tp2pp2dp2": (8, "--tp=2", "--pp=2", "--distributed-optimizer"),
}

# From hidden states: with log-probs and autograd, and with the loss that forms its gradient in the forward pass.
LINEAR_LAYOUTS = {
    "one rank": (1,),
    "one rank, fused": (1, "--fused"),
    "tp2pp2": (4, "--tp=2", "--pp=2"),
    "tp2-sp, fused": (2, "--tp=2", "--sp", "--fused"),
    "tp2pp2dp2, fused": (8, "--tp=2", "--pp=2", "--distributed-optimizer", "--fused"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, family="qwen3", tied=True, vocab_size=VOCAB_SIZE, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="module")
def one_rank(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("one") / "result.pt"
    run_ranks(WORKER, 1, f"--model={checkpoint}", f"--vocab-size={VOCAB_SIZE}", f"--out={out}")
    return torch.load(out)


def assert_same(expected: dict, found: dict, case: str) -> None:
    for key in ("loss", "grad_norm", "kl"):
        for update, (left, right) in enumerate(zip(expected[key], found[key], strict=True)):
            assert abs(left - right) <= TOLERANCE * abs(left), f"{case}: {key} of update {update}: {left} and {right}"
    for key in ("gradients", "weights"):
        assert expected[key].keys() == found[key].keys()
        for name, left in expected[key].items():
            error = ((left - found[key][name]).norm() / left.norm()).item()
            assert error <= TOLERANCE, f"{case}: {key} of {name} differ by {error:.1e} (relative)"


@pytest.mark.distributed
def test_packing_and_microbatches_change_nothing_on_one_rank(one_rank: dict) -> None:
    reference = one_rank[("padded", 1)]
    for packing in PACKINGS:
        for count in MICROBATCHES:
            assert_same(reference, one_rank[(packing, count)], f"{packing}, {count} micro-batches")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_losses_gradients_and_weights_of_one_rank(
    layout: str, one_rank: dict, checkpoint: Path, tmp_path: Path
) -> None:
    num_ranks, *flags = LAYOUTS[layout]
    out = tmp_path / "result.pt"
    # The one rank above went through log-probs and autograd: the fused loss must give the same.
    run_ranks(
        WORKER, num_ranks, *flags, "--fused", f"--model={checkpoint}", f"--vocab-size={VOCAB_SIZE}", f"--out={out}"
    )
    results = torch.load(out)
    for case, found in results.items():
        assert_same(one_rank[case], found, f"{layout}, {case[0]}, {case[1]} micro-batches")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", LINEAR_LAYOUTS)
def test_without_whole_logits_everything_stays_the_same(
    layout: str, one_rank: dict, checkpoint: Path, tmp_path: Path
) -> None:
    num_ranks, *flags = LINEAR_LAYOUTS[layout]
    out = tmp_path / "result.pt"
    run_ranks(
        WORKER, num_ranks, *flags, "--linear", f"--model={checkpoint}", f"--vocab-size={VOCAB_SIZE}", f"--out={out}"
    )
    for case, found in torch.load(out).items():
        assert_same(one_rank[case], found, f"{layout}, {case[0]}, {case[1]} micro-batches")
