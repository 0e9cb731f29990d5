"""Operations worth a kernel of our own: each is a public function beside its plain PyTorch reference.

    head/     log-probs and the GRPO loss, from logits or hidden states, on three backends
    layers/   the training pass of a layer
    decode/   the engine's steps over its paged cache

What a training loop of one's own calls is here by name, and imported when it is asked for:

    from xrl.kernels import TokenInputs, TokenLossSettings, VocabShard, linear_grpo_loss
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xrl.algorithms.loss_settings import TokenLossSettings
    from xrl.kernels.head.grpo_loss import grpo_token_loss
    from xrl.kernels.head.linear_grpo import linear_grpo_loss
    from xrl.kernels.head.linear_logprob import linear_logprob
    from xrl.kernels.head.logprob import vocab_parallel_logprob
    from xrl.kernels.head.token_inputs import TokenInputs
    from xrl.kernels.shards import VocabShard

__all__ = [
    "TokenInputs",
    "TokenLossSettings",
    "VocabShard",
    "grpo_token_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "vocab_parallel_logprob",
]

_MODULES = MappingProxyType(
    {
        "TokenInputs": "xrl.kernels.head.token_inputs",
        "TokenLossSettings": "xrl.algorithms.loss_settings",
        "VocabShard": "xrl.kernels.shards",
        "grpo_token_loss": "xrl.kernels.head.grpo_loss",
        "linear_grpo_loss": "xrl.kernels.head.linear_grpo",
        "linear_logprob": "xrl.kernels.head.linear_logprob",
        "vocab_parallel_logprob": "xrl.kernels.head.logprob",
    }
)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
