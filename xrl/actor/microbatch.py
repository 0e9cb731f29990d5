"""One micro-batch as tensors on its device.

Shapes: B rows of S tokens (one row when packed), R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from xrl.config import DataConfig
from xrl.data.packing import Pack, pack, pad, plan_microbatches
from xrl.models.packed import attention_inputs, flash_inputs
from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.types import Sample

# oneDNN, which multiplies bf16 on the CPU, compiles its products anew for each length it meets and keeps them all:
# without this, memory would grow with every rollout.
ONEDNN_LENGTH_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What goes through the model once, and what the loss needs to know about it."""

    input_ids: Tensor  # [B, S] int64
    position_ids: Tensor  # [B, S] int64
    attention: PackedSeqParams | None  # positions and borders, for the attention in use
    rows: Tensor  # [R] place in the flattened [S, B] that predicts each response token
    response_ids: Tensor  # [R] int64
    rollout_logprobs: Tensor  # [R] fp32
    advantages: Tensor  # [R] fp32
    weights: Tensor  # [R] fp32 share of each token in the loss of the update
    num_tokens: int  # real and padded tokens that go through the model


@dataclass(frozen=True, kw_only=True)
class MicrobatchMaker:
    """Cuts samples into this replica's micro-batches; every rank of a replica makes the same ones."""

    data: DataConfig
    shape: ModelShape
    groups: ParallelGroups
    dtype: torch.dtype
    transformer_engine: bool
    sequence_parallel: bool

    def make(self, samples: Sequence[Sample], weights: Sequence[float]) -> list[Microbatch]:
        """This replica's share of one update.

        Args:
            samples: of the whole update, the same on every rank.
            weights: share of each token of a sample in the loss.
        """
        plan = plan_microbatches(
            samples,
            num_replicas=self.groups.layout.data_size,
            max_tokens=self.data.max_tokens_per_microbatch,
            share_prompts=self.shares_prompts,
            samples_per_microbatch=self.data.micro_batch_size,
        )
        return [self._microbatch(samples, weights, indices) for indices in plan[self.groups.data_rank]]

    def one_each(self, samples: Sequence[Sample]) -> list[Microbatch]:
        """A micro-batch for each sample, in their order, the same on every replica: to score, not to train on."""
        return [self._microbatch(samples, [0.0] * len(samples), [index]) for index in range(len(samples))]

    @property
    def shares_prompts(self) -> bool:
        """Prompts are computed once a group where our own attention runs on packed rows."""
        if self.data.micro_batch_size is not None or self.transformer_engine:
            return False
        return self.data.share_prompt_prefix is not False

    def _microbatch(self, samples: Sequence[Sample], weights: Sequence[float], indices: Sequence[int]) -> Microbatch:
        multiple = self.groups.layout.tensor_size if self.sequence_parallel else 1
        if self.groups.device.type == "cpu" and self.dtype == torch.bfloat16:
            multiple *= ONEDNN_LENGTH_MULTIPLE
        if self.data.micro_batch_size is None:
            packed = pack(samples, indices, share_prompts=self.shares_prompts, multiple=multiple)
            height, width = 1, len(packed.token_ids)
        else:
            packed = pad(samples, indices, multiple=multiple)
            assert packed.padded_shape is not None
            height, width = packed.padded_shape
        rows = torch.tensor(packed.response_rows, dtype=torch.long)
        chosen = [samples[index] for index in packed.samples]
        lengths = torch.tensor([len(sample.response_ids) for sample in chosen], dtype=torch.long)
        device = self.groups.device

        def per_token(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths).to(device)

        return Microbatch(
            input_ids=torch.tensor(packed.token_ids).view(height, width).to(device),
            position_ids=torch.tensor(packed.position_ids).view(height, width).to(device),
            attention=self._attention(packed),
            # Packs count row by row, the model's hidden states are [S, B].
            rows=(rows % width * height + rows // width).to(device),
            response_ids=torch.tensor(packed.response_ids, dtype=torch.long).to(device),
            rollout_logprobs=torch.tensor(
                [logprob for sample in chosen for logprob in sample.rollout_logprobs], dtype=torch.float32
            ).to(device),
            advantages=per_token([sample.advantage for sample in chosen]),
            weights=per_token([weights[index] for index in packed.samples]),
            num_tokens=height * width,
        )

    def _attention(self, packed: Pack) -> PackedSeqParams | None:
        if self.transformer_engine:
            return flash_inputs(packed, device=self.groups.device)
        return attention_inputs(packed, self.shape, dtype=self.dtype, device=self.groups.device)
