"""megatron-core's choice of experts, with its bias as a weight like all others."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """Same maths. DeepSeek's bias on the scores is loaded and exported with the weights, and stays as it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bias: torch.Tensor | None = self.__dict__["_buffers"].get("expert_bias")
        if bias is not None:
            del self.expert_bias
            self.expert_bias: torch.nn.Parameter = torch.nn.Parameter(bias, requires_grad=False)
