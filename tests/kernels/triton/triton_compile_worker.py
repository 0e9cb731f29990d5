"""Compiles the Triton kernels for devices that are not here; run by `test_triton_compiles.py`.

`compile <capability>` prints a line a variant: its name, resources, spills and the instructions that touch memory.
`variants` calls the launchers with many lengths and temperatures and prints how often each kernel was compiled.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.head.token_inputs import TokenInputs
from xrl.kernels.shards import ShardColumns, Softmax
from xrl.kernels.triton import grpo_rows, logprob

# What a kernel's arguments are that the launchers hand over as they come.
TYPES = {"inverse_temperature": "fp32", "token_ids": "*i64"}
INTEGERS = ("num_rows", "num_columns", "width", "stride", "out_stride", "phase", "out_phase", "vocab_start")
ROWS = ("maximum", "log_sum", "entropy", "grad_logprob", "grad_entropy")
GRPO_POINTERS = ("logprob", "entropy", "old", "rollout", "reference", "advantages", "shares", "out")


def kernels() -> Iterator[tuple[str, object, dict[str, str], dict[str, object], int]]:
    """(name, kernel, types of its arguments, constants, warps) of every variant that matters."""
    for dtype, columns in (("fp32", 4), ("bf16", 8)):
        common = {**TYPES, "logits": f"*{dtype}", **dict.fromkeys(INTEGERS, "i32"), **dict.fromkeys(ROWS, "*fp32")}
        constants: dict[str, object] = {"T": logprob.STATISTICS_STEP, "W": columns}
        yield f"statistics-{dtype}", logprob.statistics_kernel, {**common, "out": "*fp32"}, constants, logprob.NUM_WARPS
        for same_phase, with_entropy in itertools.product((True, False), (True, False)):
            constants = {"T": logprob.GRADIENT_STEP, "W": columns, "SAME_PHASE": same_phase}
            if not with_entropy:
                constants["grad_entropy"] = None
            name = f"gradient-{dtype}-{'wide' if same_phase else 'narrow'}-{'entropy' if with_entropy else 'plain'}"
            yield name, logprob.gradient_kernel, {**common, "out": f"*{dtype}"}, constants, logprob.NUM_WARPS
    types = {**dict.fromkeys(GRPO_POINTERS, "*fp32"), "num_rows": "i32"}
    floats = [
        "least_ratio",
        "most_ratio",
        "dual_clip",
        "kl_coef",
        "entropy_coef",
        "least_importance",
        "most_importance",
    ]
    types |= dict.fromkeys(floats, "fp32")
    for kl_type, importance in itertools.product(range(4), (0, 2)):
        constants = {"KL_TYPE": kl_type, "IMPORTANCE": importance, "FROM_CURRENT": False}
        constants["BLOCK"] = grpo_rows.ROWS_PER_PROGRAM
        yield f"grpo_rows-{kl_type}-{importance}", grpo_rows.grpo_rows_kernel, types, constants, 4


def compile_all(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    for name, kernel, types, constants, num_warps in kernels():
        signature = {each: "constexpr" if each in constants else types[each] for each in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
        accesses = sorted(set(re.findall(r"(?:ld|st)\.global[.\w]*", compiled.asm["ptx"])))
        print(name, resources(compiled), *accesses)


def resources(compiled: CompiledKernel) -> str:
    """Registers, stack and local memory of a compiled kernel, and its instructions that spill."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = run(tools / "cuobjdump", "--dump-resource-usage", cubin.name).strip().splitlines()[-1].strip()
        instructions = run(tools / "nvdisasm", "-c", cubin.name)
    return f"{usage} spills {len(re.findall(r'(?:LDL|STL)', instructions))}"


def run(*command: object) -> str:
    return subprocess.run([str(each) for each in command], capture_output=True, text=True, check=True).stdout


def count_variants() -> None:
    """Calls the launchers as a training run would, compiling for a device but running nothing."""
    launched = (logprob.statistics_kernel, logprob.gradient_kernel, grpo_rows.grpo_rows_kernel)
    # Triton asks its driver which device to compile for; there is none here.
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(driver)
    for kernel in launched:
        kernel.run = warm_up(kernel.run)
    widths = (1, 2, 16, 17, 1000, 1024, 4097)
    for num_rows, width, temperature in itertools.product((1, 2, 16, 77), widths, (0.1, 0.7, 1.0, 2.0)):
        for offset, gap in ((0, 0), (1, 0), (0, 3), (8, 16)):
            storage = torch.zeros(offset + num_rows * (width + gap), dtype=torch.bfloat16)
            logits = storage[offset:].as_strided((num_rows, width), (width + gap, 1))
            ids = torch.zeros(num_rows + 1, dtype=torch.int64)[offset % 2 :][:num_rows]
            columns = ShardColumns(
                group=None, vocab_start=gap, num_columns=width - offset % 2, inverse_temperature=1 / temperature
            )
            logprob.statistics(logits, ids, columns)
            rows = {name: torch.zeros(num_rows + 1)[offset % 2 :][:num_rows] for name in ROWS}
            softmax = Softmax(**{name: rows.pop(name) for name in ROWS[:3]})
            logprob.gradient(logits, ids, logits, columns=columns, softmax=softmax, **rows)
            # Out of place at another alignment: the second variant.
            apart = torch.zeros(num_rows, width + 1).bfloat16()[:, 1:]
            logprob.gradient(logits, ids, apart, columns=columns, softmax=softmax, **rows)
        logprobs, entropy, *inputs = (torch.zeros(num_rows) for _ in range(2 + len(fields(TokenInputs))))
        settings = TokenLossSettings(
            clip_high=float(temperature),
            dual_clip=1.0 + width,
            kl_coef=float(temperature),
            importance_correction="truncate",
            importance_bound=1.0 + width,
        )
        grpo_rows.grpo_rows(logprobs, entropy, tokens=TokenInputs.of(inputs), settings=settings)
    for name, kernel in zip(("statistics", "gradient", "grpo_rows"), launched, strict=True):
        print(name, len(kernel.device_caches[0][0]))


def warm_up(launch):
    return lambda *arguments, **options: launch(*arguments, **{**options, "warmup": True})


if __name__ == "__main__":
    compile_all(int(sys.argv[2])) if sys.argv[1] == "compile" else count_variants()
