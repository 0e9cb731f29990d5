"""One micro-batch as tensors on its device.

Shapes: B rows of S tokens (one row when packed), R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from xrl.config import PackingConfig
from xrl.data.packing import Pack, pack, pad, plan_microbatches
from xrl.models.packed import attention_inputs, flash_inputs
from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.types import Sample, SampleSize

if TYPE_CHECKING:
    from xrl.types import FloatArray

# oneDNN, which multiplies bf16 on the CPU, compiles its products anew for each length it meets and keeps them all:
# without this, memory would grow with every rollout.
ONEDNN_LENGTH_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What goes through the model once, and what the loss needs to know about it."""

    input_ids: Tensor  # [B, S] int64
    position_ids: Tensor  # [B, S] int64
    attention: PackedSeqParams | None  # positions and borders, for the attention in use
    rows: Tensor  # [R] index in the flattened [S, B] that predicts each trained token
    response_ids: Tensor  # [R] int64
    rollout_logprobs: Tensor  # [R] fp32
    advantages: Tensor  # [R] fp32
    token_shares: Tensor  # [R] fp32 share of each token in the loss of the update
    sequence_ids: Tensor  # [R] int64 episode that each token is of, 0.. in the order in which they stand here
    num_sequences: int  # episodes
    temperature: float  # of all its samples
    num_tokens: int  # real and padded tokens that go through the model


@dataclass(frozen=True, kw_only=True)
class MicrobatchMaker:
    """Plans micro-batches for all replicas, the same on every rank, and makes this replica's."""

    packing: PackingConfig
    shape: ModelShape
    groups: ParallelGroups
    dtype: torch.dtype
    transformer_engine: bool
    sequence_parallel: bool

    def plan(self, sizes: Sequence[SampleSize], update: Sequence[int]) -> list[list[list[int]]]:
        """[replica][micro-batch] -> indices of the samples that go through the model at once.

        Args:
            sizes: of all samples of the rollout.
            update: indices of those that this update learns from.
        """
        plan = plan_microbatches(
            [sizes[index] for index in update],
            num_replicas=self.groups.layout.data_size,
            max_tokens=self.packing.max_tokens_per_microbatch,
            share_prompts=self.shares_prompts,
            samples_per_microbatch=self.packing.micro_batch_size,
        )
        return [[[update[index] for index in indices] for indices in replica] for replica in plan]

    @property
    def shares_prompts(self) -> bool:
        """Prompts are computed once a group where our own attention runs on packed rows."""
        if self.packing.micro_batch_size is not None or self.transformer_engine:
            return False
        return self.packing.share_prompt_prefix is not False

    def make(self, samples: Sequence[Sample], token_shares: Sequence[float]) -> Microbatch:
        """Make the tensors of one micro-batch.

        Args:
            samples: all of one temperature.
            token_shares: share of each trained token of a sample in the loss.
        """
        temperatures = {sample.temperature for sample in samples} or {1.0}  # of no tokens any will do
        assert len(temperatures) == 1, f"a micro-batch has one temperature, got {sorted(temperatures)}"
        multiple = self.groups.layout.tensor_size if self.sequence_parallel else 1
        if self.groups.device.type == "cpu" and self.dtype == torch.bfloat16:
            multiple *= ONEDNN_LENGTH_MULTIPLE
        if self.packing.micro_batch_size is None:
            packed = pack(samples, share_prompts=self.shares_prompts, multiple=multiple)
            height, width = 1, len(packed.token_ids)
        else:
            packed = pad(samples, multiple=multiple)
            assert packed.padded_shape is not None
            height, width = packed.padded_shape
        rows = torch.from_numpy(packed.rows)
        ordered = [samples[index] for index in packed.order]
        device = self.groups.device
        lengths = [np.count_nonzero(sample.trained) for sample in ordered]
        sequence_ids = {
            episode_id: index for index, episode_id in enumerate(dict.fromkeys(s.episode_id for s in ordered))
        }

        def repeated(values: Sequence[float], dtype: type[np.generic]) -> Tensor:
            return torch.from_numpy(np.repeat(np.array(values, dtype), lengths)).to(device)

        def of_trained(values: Sequence[FloatArray]) -> Tensor:
            parts = [array[sample.trained] for array, sample in zip(values, ordered, strict=True)]
            return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts])).to(device)

        return Microbatch(
            input_ids=torch.from_numpy(packed.token_ids).view(height, width).to(device),
            position_ids=torch.from_numpy(packed.position_ids).view(height, width).to(device),
            attention=self._attention(packed),
            # Packs count row by row, the model's hidden states are [S, B].
            rows=(rows % width * height + rows // width).to(device),
            response_ids=torch.from_numpy(packed.targets).to(device),
            rollout_logprobs=of_trained([sample.rollout_logprobs for sample in ordered]),
            advantages=of_trained([sample.advantages for sample in ordered]),
            token_shares=repeated([token_shares[index] for index in packed.order], np.float32),
            sequence_ids=repeated([sequence_ids[sample.episode_id] for sample in ordered], np.int64),
            num_sequences=len(sequence_ids),
            temperature=temperatures.pop(),
            num_tokens=height * width,
        )

    def _attention(self, packed: Pack) -> PackedSeqParams | None:
        if self.transformer_engine:
            return flash_inputs(packed, device=self.groups.device)
        return attention_inputs(packed, self.shape, dtype=self.dtype, device=self.groups.device)
