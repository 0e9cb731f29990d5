"""The same batch and weights give the same loss, gradients and updates at every layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.parity_worker import MICROBATCHES, PACKINGS, WAYS
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
# What other families add: biases under sequence parallelism, experts, latent attention.
KINDS = ("llama", "qwen3_moe", "deepseek_v3")
KIND_LAYOUTS = {
    "tp2pp2-sp": (KINDS, "--tp=2", "--pp=2", "--sp", "--recompute=selective"),
    "pp2ep2": (KINDS[1:], "--pp=2", "--ep=2"),
    "tp2ep2-sp": (KINDS[1:2], "--tp=2", "--ep=2", "--sp", "--distributed-optimizer"),
}
# Where log-probs and loss are computed from hidden states too.
LINEAR_WAYS = {"tp2": ("linear",), "tp2-sp": ("linear", "linear fused"), "tp2pp2dp2": ("linear fused",)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, family="qwen3", tied=True, vocab_size=VOCAB_SIZE, num_hidden_layers=4)
    return folder


def run_worker(num_ranks: int, checkpoints: Sequence[Path], out: Path, *flags: str) -> dict[str, dict]:
    """What rank 0 saw of each checkpoint, by its folder's name."""
    models = ("--models", *checkpoints)
    run_ranks(WORKER, num_ranks, f"--vocab-size={VOCAB_SIZE}", f"--out={out}", *models, *flags)
    return torch.load(out)


@pytest.fixture(scope="module")
def one_rank(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("one") / "result.pt"
    return run_worker(1, [checkpoint], out, "--ways", *WAYS)[checkpoint.name]


def assert_same(expected: dict, found: dict, case: str) -> None:
    for key in ("loss", "grad_norm", "kl"):
        for update, (left, right) in enumerate(zip(expected[key], found[key], strict=True)):
            # The KL of the first update, of a model to itself, is nothing but rounding.
            allowed = TOLERANCE * abs(left) + 1e-12
            assert abs(left - right) <= allowed, f"{case}: {key} of update {update}: {left} and {right}"
    for key in ("gradients", "weights"):
        assert expected[key].keys() == found[key].keys()
        for name, left in expected[key].items():
            error = ((left - found[key][name]).norm() / left.norm().clamp(min=1e-12)).item()
            assert error <= TOLERANCE, f"{case}: {key} of {name} differ by {error:.1e} (relative)"


@pytest.mark.distributed
@pytest.mark.slow
def test_ways_packing_and_microbatches_change_nothing_on_one_rank(one_rank: dict) -> None:
    reference = one_rank[("plain", "padded", 1)]
    assert len(one_rank) == len(WAYS) * len(PACKINGS) * len(MICROBATCHES)
    for case, found in one_rank.items():
        assert_same(reference, found, str(case))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_losses_gradients_and_weights_of_one_rank(
    layout: str, one_rank: dict, checkpoint: Path, tmp_path: Path
) -> None:
    num_ranks, *flags = LAYOUTS[layout]
    ways = ("fused", *LINEAR_WAYS.get(layout, ()))
    out = tmp_path / "result.pt"
    results = run_worker(num_ranks, [checkpoint], out, *flags, "--ways", *ways)[checkpoint.name]
    assert len(results) == len(ways) * len(PACKINGS) * len(MICROBATCHES)
    for (way, packing, count), found in results.items():
        assert_same(one_rank[("plain", packing, count)], found, f"{layout}, {way}, {packing}, {count} micro-batches")


@pytest.mark.distributed
@pytest.mark.slow
def test_layouts_give_the_updates_of_one_rank_for_every_kind_of_layer(tmp_path: Path) -> None:
    checkpoints = {
        family: make_checkpoint(tmp_path / family, family=family, vocab_size=VOCAB_SIZE, with_tokenizer=False)
        for family in KINDS
    }
    case = ("--packing=shared", "--microbatches=4", "--updates=2", "--ways=fused")
    expected = run_worker(1, list(checkpoints.values()), tmp_path / "one.pt", *case)
    for layout, (families, *flags) in KIND_LAYOUTS.items():
        found = run_worker(4, [checkpoints[family] for family in families], tmp_path / f"{layout}.pt", *flags, *case)
        for family in families:
            for key, result in found[family].items():
                assert_same(expected[family][key], result, f"{family}, {layout}")


@pytest.mark.distributed
@pytest.mark.slow
def test_twenty_updates_with_fused_kernels_give_the_losses_of_plain_pytorch(checkpoint: Path, tmp_path: Path) -> None:
    losses: dict[str, torch.Tensor] = {}
    for backend, ways in (("reference", ("plain",)), ("auto", ("fused", "linear fused"))):
        out = tmp_path / f"{backend}.pt"
        case = ("--updates=20", "--packing=shared", "--microbatches=4", f"--backend={backend}")
        results = run_worker(1, [checkpoint], out, *case, "--ways", *ways)[checkpoint.name]
        for (way, *_), found in results.items():
            losses[way] = torch.tensor(found["loss"], dtype=torch.float64)
    plain = losses.pop("plain")
    assert len(plain) == 20 and plain[-1] < plain[0] - 0.1 and len(losses) == 2
    for way, found in losses.items():
        torch.testing.assert_close(found, plain, rtol=TOLERANCE, atol=TOLERANCE, msg=way)
