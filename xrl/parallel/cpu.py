"""megatron-core without CUDA.

megatron-core 0.16 to 0.19 has no CPU path: its modules name CUDA devices and CUDA random states
directly. Here each `megatron.core` module sees a `torch` whose CUDA answers are the CPU's, and the
few functions that test for CUDA tensor types are replaced. Nothing outside megatron-core is
touched but `Tensor.cuda()` (which can only raise in a process without CUDA), and nothing at all
happens where CUDA is present.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)

# Modules whose `torch` global must be replaced before anything is built; the rest are caught when imported.
_MODULES = (
    "megatron.core",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.moe.moe_layer",
)


class _Stream:
    """Stands for a CUDA stream or event: on the CPU everything is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def record_event(self, event: object = None) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _CudaOnCpu(types.ModuleType):
    """`torch.cuda` as megatron-core sees it: the current device is the CPU."""

    Stream = _Stream
    Event = _Stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: object = None) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def current_stream(device: object = None) -> _Stream:
        return _Stream()

    @staticmethod
    def default_stream(device: object = None) -> _Stream:
        return _Stream()

    @staticmethod
    def stream(stream: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _TorchOnCpu(types.ModuleType):
    """`torch` as megatron-core sees it: tensors asked for on "cuda" are made on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.__dict__["cuda"] = _CudaOnCpu("torch.cuda")
        for name in _FACTORIES:
            self.__dict__[name] = _on_cpu(getattr(torch, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device") or "").startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class _MegatronImporter(importlib.abc.MetaPathFinder):
    """Gives every `megatron.core` module imported from now on the CPU view of torch."""

    def __init__(self, torch_on_cpu: types.ModuleType) -> None:
        self.torch_on_cpu = torch_on_cpu

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self.rebind([module])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def rebind(self, modules: Iterable[types.ModuleType | None]) -> None:
        for module in modules:
            if module is not None and module.__dict__.get("torch") is torch:
                module.__dict__["torch"] = self.torch_on_cpu


def prepare_megatron_for_cpu() -> None:
    """Make megatron-core importable and runnable without CUDA; call before any other use of it."""
    if torch.cuda.is_available() or any(isinstance(finder, _MegatronImporter) for finder in sys.meta_path):
        return
    importer = _MegatronImporter(_TorchOnCpu())
    sys.meta_path.insert(0, importer)
    with _without_compile(), warnings.catch_warnings():
        # It warns of every CUDA package that is missing, which is the point here.
        warnings.simplefilter("ignore")
        for name in _MODULES:
            importlib.import_module(name)
    importer.rebind([module for name, module in list(sys.modules.items()) if name.startswith("megatron.core")])
    _replace_cuda_only_functions()


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    """megatron-core wraps small functions in torch.compile at import; a CPU run would spend a minute compiling them."""
    compile_function = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda function: function)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


def _replace_cuda_only_functions() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random.__dict__["_get_cuda_rng_state"] = lambda *args, **kwargs: torch.get_rng_state()
    random.__dict__["_set_cuda_rng_state"] = lambda state, *args, **kwargs: torch.set_rng_state(state)

    # The original asserts that gradients are torch.cuda.FloatTensor.
    optimizer = importlib.import_module("megatron.core.optimizer.optimizer")
    optimizer.__dict__["clip_grad_by_total_norm_fp32"] = _clip_grad_by_total_norm

    # These take tensors for the CPU's, and a package for installed, only where the other is found.
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.__dict__["maybe_move_tensor_to_cpu"] = _on_host
    importlib.import_module("megatron.core.transformer.moe.moe_utils").__dict__.setdefault("te_general_gemm", None)

    # gloo moves equal parts only; experts get as many tokens as routers send them.
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings").__dict__
    mappings["_gather_along_first_dim"] = _gather_unequal(mappings["_gather_along_first_dim"])
    mappings["_reduce_scatter_along_first_dim"] = _reduce_scatter_unequal(mappings["_reduce_scatter_along_first_dim"])

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What megatron-core's function makes of a CUDA tensor; the signature is megatron-core's."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_unequal(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """megatron-core's gather along the first dimension, with parts of unequal lengths padded to the longest."""

    @functools.wraps(gather)
    def padded(
        x: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(x, group, sizes, *args, **kwargs)
        longest = max(1, *sizes)
        parts = gather(_padded(x, longest), group).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return padded


def _reduce_scatter_unequal(scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same of megatron-core's reduce-scatter."""

    @functools.wraps(scatter)
    def padded(
        x: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return scatter(x, group, sizes, *args, **kwargs)
        longest = max(1, *sizes)
        parts = [_padded(part, longest) for part in x.split(list(sizes))]
        return scatter(torch.cat(parts), group)[: sizes[group.rank()]]

    return padded


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])]) if len(x) < length else x


def _clip_grad_by_total_norm(
    parameters: Iterable[torch.nn.Parameter] | torch.nn.Parameter,
    max_norm: float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    """Scale gradients so that their global norm is at most `max_norm`; the signature is megatron-core's."""
    scale = max_norm / (total_norm + 1e-6)
    if scale >= 1.0:
        return
    for parameter in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
        gradient = getattr(parameter, "decoupled_grad", None) if use_decoupled_grad else parameter.grad
        if gradient is not None:
            gradient.detach().mul_(scale)


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """While megatron-core sorts parameters by `Tensor.type()`, CPU types answer with the CUDA names it knows."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def type_with_cuda_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_with_cuda_name  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
