"""Computes log-probs and GRPO loss of a micro-batch from the output head's logits or hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor

from xrl.actor.microbatch import Microbatch
from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.config import AlgorithmConfig
from xrl.kernels.head.backend import BackendName
from xrl.kernels.head.grpo_loss import GrpoLossOutput, grpo_token_loss
from xrl.kernels.head.linear_grpo import linear_grpo_loss
from xrl.kernels.head.linear_logprob import linear_logprob
from xrl.kernels.head.logprob import LogprobOutput, vocab_parallel_logprob
from xrl.kernels.head.token_inputs import TokenInputs
from xrl.kernels.shards import VocabShard
from xrl.models.head import ResponseRows
from xrl.parallel.groups import ParallelGroups


class _KernelArguments(TypedDict):
    """What all kernels take."""

    shard: VocabShard
    temperature: float
    backend: BackendName


@dataclass(frozen=True, kw_only=True)
class TokenScorer:
    """Calls the kernels with the arguments that a run never changes. Log-probs are at the samples' temperature."""

    backend: BackendName
    groups: ParallelGroups
    head: ResponseRows
    vocab_size: int
    columns: int  # that each tensor rank holds, padding included
    upstream: float  # the gradient that the backward pass brings to a micro-batch's loss

    def logprobs(self, head_output: Tensor, microbatch: Microbatch, *, entropy_grad: bool = False) -> LogprobOutput:
        """Log-probs and entropies of the response tokens, each [R].

        Args:
            head_output: logits [R, V / tp], or hidden states [S * B, h] where the head hands them on, of which each
                tensor rank has its part, [S / tp * B, h], under sequence parallelism.
            entropy_grad: the entropy carries a gradient too.
        """
        if not self.head.returns_hidden:
            return vocab_parallel_logprob(
                head_output, microbatch.response_ids, entropy_grad=entropy_grad, **self._arguments(microbatch)
            )
        return linear_logprob(
            head_output,
            self._weight(),
            microbatch.response_ids,
            rows=microbatch.rows,
            entropy_grad=entropy_grad,
            **self._arguments(microbatch),
        )

    def grpo_loss(
        self,
        head_output: Tensor,
        microbatch: Microbatch,
        config: AlgorithmConfig,
        *,
        old: Tensor | None,
        reference: Tensor | None,
    ) -> tuple[Tensor, GrpoLossOutput]:
        """(the micro-batch's share of the loss [], per-token terms), by the kernels that form the gradient at once.

        Args:
            head_output: as in `logprobs`; logits hold their gradient afterwards.
            old, reference: log-probs [R], or None.
        """
        settings = TokenLossSettings.of(config)
        tokens = TokenInputs(
            advantages=microbatch.advantages,
            shares=microbatch.token_shares,
            old_logprobs=old,
            rollout_logprobs=microbatch.rollout_logprobs,
            reference_logprobs=reference,
        )
        if not self.head.returns_hidden:
            found = grpo_token_loss(
                head_output,
                microbatch.response_ids,
                tokens,
                settings,
                upstream=self.upstream,
                **self._arguments(microbatch),
            )
            return found.token_loss.sum(), found
        out = linear_grpo_loss(
            head_output,
            self._weight(),
            microbatch.response_ids,
            tokens,
            settings,
            rows=microbatch.rows,
            upstream=self.upstream,
            **self._arguments(microbatch),
        )
        return out.loss, out.tokens

    def _weight(self) -> Tensor:
        assert self.head.weight is not None
        return self.head.weight

    def _arguments(self, microbatch: Microbatch) -> _KernelArguments:
        first = self.columns * self.groups.tensor_rank
        return {
            "shard": VocabShard(
                group=self.groups.tensor if self.groups.layout.tensor_size > 1 else None,
                vocab_start=first,
                num_columns=min(self.columns, max(0, self.vocab_size - first)),
                sequence_parallel=self.head.sequence_parallel,
            ),
            "temperature": microbatch.temperature,
            "backend": self.backend,
        }
