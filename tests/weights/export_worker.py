"""One rank of the export test: for each checkpoint, load it, compare the plan with the model, export it."""

from __future__ import annotations

import argparse
from pathlib import Path

import psutil
import torch

from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from safetensors.torch import load_file  # noqa: E402

from xrl.config import ModelConfig, ParallelConfig  # noqa: E402
from xrl.models.build import build_model, transformer_config  # noqa: E402
from xrl.models.shape import read_model_shape  # noqa: E402
from xrl.parallel.groups import ParallelGroups  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402
from xrl.weights.checksum import bucket_checksum  # noqa: E402
from xrl.weights.export import WeightExporter  # noqa: E402
from xrl.weights.load import load_weights  # noqa: E402
from xrl.weights.megatron_files import rank_file  # noqa: E402
from xrl.weights.plan import part_names, plan, tensor_shapes  # noqa: E402
from xrl.weights.shared_export import SharedExporter  # noqa: E402
from xrl.weights.slices import named_weights  # noqa: E402
from xrl.weights.transport.shared_memory import Sender  # noqa: E402

UPDATES = 100


def check_plan(model: torch.nn.Module, folder: Path, groups: ParallelGroups) -> None:
    """Names and shapes of the plan are those of the real model's parameters, every one."""
    planned = plan(read_model_shape(folder), groups.layout)
    found = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    }
    expected = {
        parameter.names[0]: parameter.shape for parameter in planned.parameters(groups.layout.place(groups.rank))
    }
    assert found == expected, f"{folder.name}: {found.items() ^ expected.items()}"


def check_export(model: torch.nn.Module, folder: Path, groups: ParallelGroups) -> None:
    """What arrives on rank 0 is the checkpoint; a bucket holds while the next one is asked for."""
    shape = read_model_shape(folder)
    source = load_file(folder / "model.safetensors")
    for dtype in (None, torch.bfloat16):
        exporter = WeightExporter(shape, groups, dtype=dtype)
        for version in (1, 2):
            buckets, found = exporter.stream(named_weights(model), version=version), {}
            for bucket in buckets:
                following = next(buckets, None)
                for each in (bucket, following):
                    if each is not None:
                        assert each.version == version
                        found |= {name: tensor.clone() for name, tensor in each.tensors.items()}
            if groups.rank:
                assert not found
                continue
            assert set(found) == {name for part in part_names(shape) for name in tensor_shapes(shape, part)}
            for name, tensor in found.items():
                # A router's bias is fp32, whatever the rest is.
                keeps = dtype is None or name.endswith("e_score_correction_bias")
                expected = source[name] if keeps else source[name].to(dtype)
                assert torch.equal(tensor, expected), f"{folder.name}, {dtype}: {name}"


def check_shared_export(model: torch.nn.Module, folder: Path, groups: ParallelGroups) -> None:
    """What lies in rank 0's memory is the checkpoint, its checksum is right, and new weights replace old ones."""
    shape = read_model_shape(folder)
    source = load_file(folder / "model.safetensors")
    exporter = SharedExporter(shape, groups)
    sender = Sender() if groups.rank == 0 else None
    for version, factor in ((0, 1.0), (1, 1.0), (2, 2.0), (3, 0.5)):
        with torch.no_grad():
            for tensor in named_weights(model).values():
                tensor.mul_(factor)
        parts = []
        for bucket in exporter.stream([named_weights(model)], sender, version=version):
            assert bucket.version == version
            parts.append(bucket.part)
            assert bucket.checksum == bucket_checksum(bucket.tensors), f"{folder.name}: {bucket.part}"
            for name, tensor in bucket.tensors.items():
                expected = source[name] * (2.0 if version == 2 else 1.0)
                assert torch.equal(tensor, expected), f"{folder.name}, version {version}: {name}"
        assert parts == (part_names(shape) if groups.rank == 0 else [])
    if sender is not None:
        sender.close()


def check_memory(model: torch.nn.Module, folder: Path, groups: ParallelGroups) -> None:
    """Beside the model no more than two layers and the embeddings (or a third layer, where that is larger), and the
    same after every update."""
    shape = read_model_shape(folder)
    exporter, weights = WeightExporter(shape, groups), named_weights(model)
    held, resident = [], []
    for version in range(UPDATES):
        for _ in exporter.stream(weights, version=version):
            pass
        held.append(exporter.num_buffer_bytes)
        resident.append(psutil.Process().memory_info().rss)
    assert len(set(held)) == 1
    growth = resident[-1] - resident[9]
    assert growth < 2**20, f"{growth:,} bytes more after {UPDATES} updates"
    # Cache-line borders between tensors included.
    sizes = {part: sum(map(padded_bytes, tensor_shapes(shape, part).values())) for part in part_names(shape)}
    layer = max(size for part, size in sizes.items() if part.startswith("layers."))
    assert held[0] <= 2 * layer + max(layer, sizes["embeddings"]), f"{held[0]:,} bytes, a layer has {layer:,}"


def padded_bytes(shape: tuple[int, ...]) -> int:
    return -(-torch.Size(shape).numel() * 4 // 64) * 64


def check_checkpoint(model: torch.nn.Module, converted: Path, groups: ParallelGroups) -> None:
    """megatron-core's own model takes a converted checkpoint, strictly, and is then what loading made it."""
    expected = {name: tensor.clone() for name, tensor in named_weights(model).items()}
    file = converted / rank_file(groups.layout, groups.layout.place(groups.rank))
    content = torch.load(file, weights_only=False)
    with torch.no_grad():
        for tensor in named_weights(model).values():
            tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()
    model.load_state_dict(content["model"], strict=True)
    loaded = named_weights(model)
    for parameter in content["model"]:
        assert torch.equal(loaded[parameter], expected[parameter]), parameter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--models", type=Path, nargs="+")
    parser.add_argument("--converted", type=Path, help="the first model as a Megatron checkpoint of this layout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        expert_model_parallel_size=arguments.ep,
    )
    groups = initialize(parallel, seed=1)
    for number, folder in enumerate(arguments.models):
        shape = read_model_shape(folder)
        config = transformer_config(
            shape, ModelConfig(model=folder, bf16=False), parallel, groups.layout, transformer_engine=False
        )
        model = build_model(shape, config, groups, transformer_engine=False)
        check_plan(model, folder, groups)
        load_weights(model, shape, groups, folder)
        check_export(model, folder, groups)
        check_shared_export(model, folder, groups)
        if number == 0:
            check_memory(model, folder, groups)
            if arguments.converted:
                check_checkpoint(model, arguments.converted, groups)
    shutdown()


if __name__ == "__main__":
    main()
