"""A state that one layout has written is read at any other: each number is there once, and comes back as it was."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.weights.shapes import SHAPES, load, random_tensors, reader, with_layers
from xrl.checkpoint.manifest import Cut, FileRecord, Manifest, Unusable, rank_file
from xrl.checkpoint.pieces import MAIN, HeldParameter, pieces_to_write, writers
from xrl.checkpoint.reader import StateReader
from xrl.parallel.layout import Layout, Place
from xrl.weights.plan import Plan, plan

DENSE = [
    Layout(tensor_size=1, pipeline_size=1),
    Layout(tensor_size=2, pipeline_size=2, data_size=2),
    Layout(tensor_size=1, pipeline_size=4),
    Layout(tensor_size=4, pipeline_size=1, data_size=3),
]
WITH_EXPERTS = [
    Layout(tensor_size=2, pipeline_size=2, expert_size=4, data_size=4),
    Layout(tensor_size=1, pipeline_size=1, expert_size=2, data_size=4),
    Layout(tensor_size=1, pipeline_size=2, expert_size=2, data_size=1, context_size=2),
]


def all_places(planned: Plan) -> list[Place]:
    return [planned.layout.place(rank) for rank in range(planned.layout.world_size)]


def held(weights: dict[str, Tensor], planned: Plan, place: Place, *, is_sharded: bool) -> list[HeldParameter]:
    """What a rank trains: all of each parameter, or its share of them among the replicas."""
    layout = planned.layout
    found = []
    for name, tensor in weights.items():
        flat = tensor.reshape(-1)
        # Experts are sharded over the replicas that have the same ones.
        replicas = [
            other
            for other in all_places(planned)
            if (other.tensor, other.pipeline) == (place.tensor, place.pipeline)
            and (other.expert == place.expert or "experts.local" not in name)
        ]
        number = replicas.index(place)
        cuts = [flat.numel() * index // len(replicas) for index in range(len(replicas) + 1)]
        start, stop = (cuts[number], cuts[number + 1]) if is_sharded else (0, flat.numel())
        if start < stop:
            share = flat[start:stop].clone()
            tensors = {MAIN: share, "exp_avg": share + 1000}
            found.append(HeldParameter(name=name, start=start, stop=stop, tensors=tensors, is_shard=is_sharded))
    assert layout.virtual_pipeline_size == 1
    return found


def write_state(folder: Path, planned: Plan, source: dict[str, Tensor], *, is_sharded: bool) -> Manifest:
    files = {}
    for rank, place in enumerate(all_places(planned)):
        [weights] = load(planned, place, reader(source))
        pieces = pieces_to_write(held(weights, planned, place, is_sharded=is_sharded), writers(planned, place))
        save_file(pieces, folder / rank_file(place))
        files[rank_file(place)] = FileRecord(num_bytes=0, checksum="", rank=rank)
    cut = Cut(layout=planned.layout, use_distributed_optimizer=is_sharded, te_layers=planned.transformer_engine)
    return Manifest(
        step=1,
        num_updates=1,
        cut=cut,
        files=files,
        identity={},
        circumstances={},
        settings={},
        schedule={},
        parts={},
    )


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    "family",
    ["qwen2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2_moe", "deepseek_v3"))],
)
def test_what_one_layout_wrote_another_reads(family: str, is_sharded: bool, tmp_path: Path) -> None:
    shape = with_layers(SHAPES[family], 4, tied=family == "qwen2")
    source = random_tensors(shape)
    layouts = DENSE + (WITH_EXPERTS if shape.experts else [])
    # transformer-engine's layers hold some of DeepSeek's matrices whole, ours cut them: every second one is theirs.
    plans = [plan(shape, layout, transformer_engine=bool(number % 2)) for number, layout in enumerate(layouts)]
    for number, old in enumerate(plans):
        folder = tmp_path / str(number)
        folder.mkdir()
        manifest = write_state(folder, old, source, is_sharded=is_sharded)
        with StateReader(folder, manifest, old) as state:
            for new in plans:
                ranks = all_places(new)
                for place in {ranks[0], ranks[len(ranks) // 2], ranks[-1]}:
                    [expected] = load(new, place, reader(source))
                    for parameter in new.parameters(place):
                        wanted = expected[parameter.names[0]].reshape(-1)
                        found = state.parameter(parameter, MAIN, new, place)
                        assert torch.equal(found, wanted), f"{old.layout} -> {new.layout}: {parameter.names[0]}"
                        middle = (wanted.numel() // 3, wanted.numel() // 2 + 1)
                        share = state.share(parameter, "exp_avg", new, place, start=middle[0], stop=middle[1])
                        padding = found[slice(*middle)] == 0
                        expected_share = wanted[slice(*middle)] + 1000
                        assert torch.equal(share[~padding], expected_share[~padding])


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])
def test_each_number_is_written_once(is_sharded: bool) -> None:
    shape = with_layers(SHAPES["qwen3_moe"], 5, tied=False)
    for layout in (*DENSE, *WITH_EXPERTS):
        planned = plan(shape, layout)
        source = random_tensors(shape)
        written: Counter[float] = Counter()
        for place in all_places(planned):
            [weights] = load(planned, place, reader(source))
            for name, piece in pieces_to_write(
                held(weights, planned, place, is_sharded=is_sharded), writers(planned, place)
            ).items():
                if f"/{MAIN}/" in name:
                    written.update(piece.tolist())
        everything = Counter(itertools.chain(*(tensor.reshape(-1).tolist() for tensor in source.values())))
        assert {value: count for value, count in written.items() if value} == {
            value: count for value, count in everything.items() if value
        }, str(layout)


def test_ranks_that_hold_the_same_share_the_writing() -> None:
    planned = plan(with_layers(SHAPES["qwen3"], 8, tied=False), Layout(tensor_size=1, pipeline_size=1, data_size=4))
    sizes = []
    for place in all_places(planned):
        [weights] = load(planned, place, reader(random_tensors(planned.shape)))
        pieces = pieces_to_write(held(weights, planned, place, is_sharded=False), writers(planned, place))
        sizes.append(sum(piece.numel() for piece in pieces.values()))
    assert max(sizes) <= 1.5 * min(sizes)


def test_a_number_that_no_file_has_is_named(tmp_path: Path) -> None:
    shape = with_layers(SHAPES["qwen3"], 4, tied=False)
    planned = plan(shape, Layout(tensor_size=1, pipeline_size=2))
    manifest = write_state(tmp_path, planned, random_tensors(shape), is_sharded=False)
    (tmp_path / "t0-p1-d0.safetensors").unlink()
    save_file({}, tmp_path / "t0-p1-d0.safetensors")
    place = Place(pipeline=1)
    parameter = next(iter(planned.parameters(place)))
    with StateReader(tmp_path, manifest, planned) as state, pytest.raises(Unusable, match="has 0 of the .* main of"):
        state.parameter(parameter, MAIN, planned, place)
