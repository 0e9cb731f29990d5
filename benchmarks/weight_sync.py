"""New weights from two tensor ranks into a rollout worker: `python benchmarks/weight_sync.py`.

A model of Qwen2.5-0.5B's shape (random weights, bf16 unless told otherwise) is spread over two gloo ranks, TP2 x PP1,
and published through shared memory to one worker process, each layer proven by its checksum. Measured: seconds of an
update; its bytes per second as a share of what memcpy copies on this machine, measured by turns with the updates;
memory beyond the ranks' model and the worker's, at its peak in the first updates (to watch it takes time, so those are
not timed); and growth from then to the last.

The worker's engine copies each tensor into memory of its own, which is the least that any engine does. The embedded
engine also packs the matrices for oneDNN: a few updates of it are timed too. Beside both: the same weights through
transformers, `save_pretrained` and `from_pretrained`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xrl.rollout.engine import EngineError
from xrl.types import Completion, GenerateRequest, WeightBucket

ROOT = Path(__file__).resolve().parents[1]
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
WARM_UP = 3
EMBEDDED_UPDATES = WARM_UP + 5


class HoldingEngine:
    """Keeps its own copy of the weights, and can do nothing with them. Hosted by a real worker process.

    From the second update on the worker copies into its memory, as it checks the bytes.
    """

    def __init__(self, **_: Any) -> None:
        self.weights_version = -1
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        raise EngineError("this engine holds weights and cannot generate")

    def destinations(self, layer: str) -> dict[str, Tensor]:
        return self.tensors.get(layer, {})

    def load_part(self, bucket: WeightBucket) -> None:
        own = self.tensors.setdefault(bucket.part, {})
        for name, tensor in bucket.tensors.items():
            if name not in own:
                own[name] = tensor.clone()

    def finish_update(self, version: int) -> None:
        self.weights_version = version

    def abort(self, request_id: str | None = None) -> None:
        pass

    def close(self) -> None:
        pass


def rank(options: argparse.Namespace) -> None:
    """One of the two ranks; rank 0 prints what it found."""
    from xrl.parallel.cpu import prepare_megatron_for_cpu

    prepare_megatron_for_cpu()
    from xrl.config import ParallelConfig
    from xrl.models.shape import read_model_shape
    from xrl.parallel.megatron import initialize, shutdown
    from xrl.weights.plan import plan
    from xrl.weights.shared_export import SharedExporter

    torch.set_num_threads(1)
    groups = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    shape = read_model_shape(options.model)
    planned = plan(shape, groups.layout)
    dtype = getattr(torch, options.dtype)
    weights = {
        parameter.names[0]: torch.empty(parameter.shape, dtype=dtype).normal_(0, 0.02)
        for parameter in planned.parameters(groups.layout.place(groups.rank))
    }
    exporter = SharedExporter(shape, groups)
    engines = [("benchmarks.weight_sync:HoldingEngine", options.updates), ("embedded", EMBEDDED_UPDATES)]
    for engine, updates in engines:
        if groups.rank == 0:
            found = lead(exporter, weights, options, engine=engine, updates=updates)
            print(json.dumps({"engine": engine, **found}), flush=True)
        else:
            for version in range(updates):
                for _ in exporter.stream([weights], None, version=version):
                    pass
    shutdown()


def lead(
    exporter: Any, weights: dict[str, Tensor], options: argparse.Namespace, *, engine: str, updates: int
) -> dict[str, Any]:
    """Rank 0: a worker, and update after update into it."""
    from xrl.config import RolloutConfig
    from xrl.metrics.memory import PeakMemory, pss_bytes
    from xrl.rollout.fleet import Fleet
    from xrl.rollout.publish import WeightStream

    other = other_rank()

    def memory(_: int | None) -> int:
        return pss_bytes(os.getpid()) + pss_bytes(other)

    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(
            RolloutConfig(engine=engine),
            model_dir=options.model,
            dtype=options.dtype,
            devices=["cpu"],
            num_threads=os.cpu_count() or 1,
            max_model_len=64,
            log_dir=Path(folder),
        )
        with fleet:
            fleet.wait_until_ready()
            publisher = WeightStream(fleet)
            memcpy = Memcpy()
            before = memory(None)
            seconds: list[float] = []
            settled = 0
            watch = contextlib.ExitStack()
            peak = watch.enter_context(PeakMemory(memory, interval_s=0.1))
            for version in range(updates):
                buckets = exporter.stream([weights], publisher.memory, version=version)
                report = publisher.publish(buckets, version=version)
                seconds.append(report.seconds)
                memcpy.measure()
                if version == WARM_UP - 1:
                    watch.close()
                    settled = memory(None)
            after = memory(None)
            publisher.close()
    steady = seconds[WARM_UP:]
    print(f"{engine}: " + " ".join(f"{each:.3f}" for each in seconds), file=sys.stderr, flush=True)
    return {
        "num_bytes": report.num_bytes,
        "num_layers": report.num_parts,
        "seconds": median(steady),
        "fastest": min(steady),
        "memcpy": median(memcpy.rates[WARM_UP:]),
        "extra_bytes": peak.bytes - before - report.num_bytes,
        "growth_bytes": after - settled,
        "updates": updates,
    }


def other_rank() -> int:
    """The process of rank 1: a child of our parent with the same command line."""
    import psutil

    for process in psutil.Process(os.getppid()).children():
        if process.pid != os.getpid() and process.environ().get("RANK") == "1":
            return process.pid
    raise RuntimeError("there is no rank 1 beside this process")


class Memcpy:
    """The C library's memcpy between two buffers too large for any cache, by one thread."""

    def __init__(self) -> None:
        self.source = torch.ones(2**28, dtype=torch.uint8)
        self.target = torch.zeros_like(self.source)
        self.rates: list[float] = []

    def measure(self) -> None:
        """Copy once."""
        start = time.perf_counter()
        ctypes.memmove(self.target.data_ptr(), self.source.data_ptr(), len(self.source))
        self.rates.append(len(self.source) / (time.perf_counter() - start))


def through_transformers(dtype: str) -> dict[str, float]:
    """Seconds to save the model to a folder and to load it from there."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    names = ("architectures", "model_type")
    model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in CONFIG.items() if k not in names})).to(
        getattr(torch, dtype)
    )
    times: dict[str, list[float]] = {"save": [], "load": []}
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            model.save_pretrained(folder)
            middle = time.perf_counter()
            AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
            times["save"].append(middle - start)
            times["load"].append(time.perf_counter() - middle)
    return {name: median(values) for name, values in times.items()}


@contextlib.contextmanager
def ranks(options: argparse.Namespace, model: Path) -> Iterator[list[dict[str, Any]]]:
    """What two ranks found, engine by engine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--model", str(model), "--dtype", options.dtype]
    command += ["--updates", str(options.updates)]
    processes = []
    for number in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        out = subprocess.PIPE if number == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
    try:
        output, _ = processes[0].communicate()
        if processes[0].returncode:
            sys.exit("rank 0 failed")
        yield [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Both engines, then transformers, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=WARM_UP + 100)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.updates <= WARM_UP:
        parser.error(f"--updates must be more than the {WARM_UP} that warm up, got {options.updates}")
    if options.model:
        rank(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": options.dtype}))
        with ranks(options, Path(folder)) as (plain, embedded):
            pass
    files = through_transformers(options.dtype)
    figures = summary(plain, embedded, files, options.dtype)
    table = Table(title=f"an update of {plain['num_bytes'] / 1e9:.2f} GB, {options.dtype}, TP2 x PP1 to one worker")
    for column in ("", "seconds", "GB/s", "of memcpy"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        ("copied by the worker", plain["seconds"]),
        ("copied by the worker, the fastest", plain["fastest"]),
        ("packed by the embedded engine", embedded["seconds"]),
        ("save_pretrained + from_pretrained", files["save"] + files["load"]),
    )
    for words, seconds in rows:
        rate = plain["num_bytes"] / seconds
        table.add_row(words, f"{seconds:.3f}", f"{rate / 1e9:.2f}", f"{rate / plain['memcpy']:.0%}")
    Console(width=100).print(table)
    print(json.dumps(figures))


def summary(plain: dict[str, Any], embedded: dict[str, Any], files: dict[str, float], dtype: str) -> dict[str, Any]:
    """The figures of the last line."""
    itemsize = getattr(torch, dtype).itemsize
    embeddings = CONFIG["vocab_size"] * CONFIG["hidden_size"] * itemsize
    layer = (plain["num_bytes"] - embeddings) / CONFIG["num_hidden_layers"]
    return {
        "share_of_memcpy": plain["num_bytes"] / plain["seconds"] / plain["memcpy"],
        "share_of_memcpy_fastest": plain["num_bytes"] / plain["fastest"] / plain["memcpy"],
        "share_of_memcpy_embedded": plain["num_bytes"] / embedded["seconds"] / plain["memcpy"],
        "extra_memory_layers": (plain["extra_bytes"] - embeddings) / layer,
        "growth_mb_over_100": plain["growth_bytes"] / 1e6 * 100 / max(1, plain["updates"] - WARM_UP),
        "seconds": plain["seconds"],
        "seconds_embedded": embedded["seconds"],
        "seconds_save_pretrained": files["save"],
        "seconds_from_pretrained": files["load"],
        "gigabytes": plain["num_bytes"] / 1e9,
        "memcpy_gigabytes_per_s": plain["memcpy"] / 1e9,
        "extra_memory_mb": plain["extra_bytes"] / 1e6,
        "embeddings_mb": embeddings / 1e6,
        "layer_mb": layer / 1e6,
        "dtype": dtype,
    }


if __name__ == "__main__":
    main()
