"""Threads that share a kernel's work: the same numbers whoever comes, from any thread, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from xrl.kernels.decode.rms_norm import rms_norm
from xrl.kernels.layers.layer_ops import rms_norm as train_rms_norm
from xrl.kernels.matmul import matmul
from xrl.kernels.native import native_module
from xrl.kernels.threads import SMALL_MODEL, num_threads, use_threads

pytestmark = pytest.mark.skipif(native_module() is None, reason="the compiled kernels are not built")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    native_module().set_num_threads(0)  # type: ignore[union-attr]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(301, 416, generator=generator),
        torch.randn(416, 530, generator=generator),
        torch.randn(416, generator=generator),
    )


def results() -> list[Tensor]:
    """Of a kernel in blocks with sums that go on, and of one that takes its rows as they come."""
    a, b, weight = inputs()
    return [matmul(a, b), rms_norm(a, weight, 1e-6)]


def with_threads(count: int, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    use_threads(count, num_parameters=0)
    return compute()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_any_number_of_threads_computes_the_same_bits(count: int) -> None:
    alone = with_threads(1, results)
    for _ in range(20):
        shared = with_threads(count, results)
        assert all(torch.equal(left, right) for left, right in zip(alone, shared, strict=True))


def test_sums_over_parts_do_not_depend_on_who_computes_them() -> None:
    def gradients() -> list[Tensor]:
        x, _, weight = (tensor.requires_grad_() for tensor in inputs())
        train_rms_norm(x, weight, 1e-6).square().sum().backward()
        return [x.grad, weight.grad]  # type: ignore[list-item]

    first = with_threads(3, gradients)
    for _ in range(20):
        again = with_threads(3, gradients)
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


def test_kernels_called_from_several_threads_at_once_do_not_disturb_each_other() -> None:
    expected = with_threads(2, results)
    wrong: list[str] = []

    def compute(name: str) -> None:
        for _ in range(20):
            if not all(torch.equal(left, right) for left, right in zip(expected, results(), strict=True)):
                wrong.append(name)

    callers = [threading.Thread(target=compute, args=(f"caller {index}",)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_process_has_threads_of_its_own() -> None:
    program = """
import os, torch
from xrl.kernels.matmul import matmul
from xrl.kernels.threads import use_threads
use_threads(3, num_parameters=0)
a = torch.randn(300, 300)
expected = matmul(a, a)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(matmul(a, a), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(matmul(a, a), expected)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_kernels_use_as_many_threads_as_pytorch_until_somebody_says_how_many() -> None:
    torch.set_num_threads(3)
    assert num_threads() == 3
    use_threads(2, num_parameters=SMALL_MODEL)
    assert (num_threads(), torch.get_num_threads()) == (2, 2)


def test_pytorch_stays_on_one_thread_beside_a_small_model() -> None:
    use_threads(2, num_parameters=SMALL_MODEL - 1)
    assert (num_threads(), torch.get_num_threads()) == (2, 1)


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer needs all addresses there are")
def test_memory_that_runs_out_on_any_thread_of_a_kernel_is_a_memory_error() -> None:
    """Each thread makes 48 MB of room for itself, and the limit leaves enough for one."""
    program = """
import resource, torch
from xrl.kernels.layers.gated_mlp import gated_mlp
from xrl.kernels.matmul import matmul
from xrl.kernels.threads import use_threads

use_threads(2, num_parameters=0)
a = torch.randn(300, 300)
expected = matmul(a, a)  # the threads have started
ffn = 1_000_000
x, gate_up, down = torch.ones(1, 1), torch.ones(2 * ffn, 1), torch.ones(1, ffn)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
of_the_caller = 4 * ffn * (2 + 2 + 32 + 12)  # both products' factor, packed weights, a tile of rows between them
resource.setrlimit(resource.RLIMIT_AS, (used + of_the_caller + (24 << 20), resource.RLIM_INFINITY))
for _ in range(1000):  # until the other thread comes in time
    try:
        gated_mlp(x, gate_up, down)
    except MemoryError:
        break
else:
    raise SystemExit("there was enough memory, or one thread only")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(matmul(a, a), expected)
assert gated_mlp(x, gate_up, down).isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("count", [0, -1, 1025, 2**40])
def test_numbers_of_threads_that_no_machine_has_are_refused(count: int) -> None:
    before = num_threads(), torch.get_num_threads()
    with pytest.raises((ValueError, TypeError)):
        use_threads(count, num_parameters=0)
    assert (num_threads(), torch.get_num_threads()) == before
