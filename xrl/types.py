"""The data that flows through one GRPO step. No torch import at run time.

    Prompt -> Completion -> Turn -> Episode -> Group -> Sample -> Microbatch -> LossOutput
    weights: WeightBucket, one decoder layer at a time, from the actor to the rollout engines

Shapes: L tokens of one answer, T tokens of one sample or micro-batch, R trained tokens (the rows that
have a log-prob) of one micro-batch, G answers to one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    IntArray = NDArray[np.int32]
    FloatArray = NDArray[np.float32]
    BoolArray = NDArray[np.bool_]

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question, tokenised through the model's chat template."""

    id: int  # row number in the dataset file, unique within it
    token_ids: list[int]  # [L] the chat template's output, generation prompt included
    text: str  # the same, as text
    ground_truth: str  # what the judge compares with
    data_source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's extra_info, for user judges


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Log-probs are always those of the distribution drawn from."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0  # 1 keeps every token
    max_new_tokens: int = 1024
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt and how many answers to draw for it, or to go on with.

    What is drawn depends on the seed, the sample's ordinal and the token's index in the response, so a group that is
    asked for in several requests, or an answer that goes on in another, draws what one request would have drawn.
    """

    id: str  # unique among the requests in flight
    token_ids: Sequence[int]  # [L] prompt, and the response so far
    num_samples: int
    sampling: SamplingParams  # max_new_tokens counts those to come
    first_sample: int = 0  # ordinal of the first sample within its group
    num_drawn: int = 0  # so many at the end of token_ids are the response so far, the same of all samples


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """One sampled answer. The stop token, where there is one, is its last token."""

    token_ids: IntArray  # [L] int32, response only
    logprobs: FloatArray  # [L] float32 of the distribution sampled from, at the sampling temperature
    finish_reason: FinishReason
    weights_version: int  # version of the weights that sampled it (its end, where several did)
    parts: tuple[tuple[int, int], ...] = ()  # (weights version, tokens) of each part, where several versions sampled it

    @property
    def is_whole(self) -> bool:
        """Whether it ended by itself or at the length limit."""
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One call of the model within an episode."""

    completion: Completion
    text: str  # the completion as text, special tokens removed
    temperature: float  # that it was drawn at; 0 is greedy
    parent: int | None = None  # index of the turn whose tokens it continues; None: it follows the prompt
    context_ids: Sequence[int] = ()  # [C] given since its parent's end: template, user, tool output; never trained on


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge says of an episode: a reward, or why there is none."""

    reward: float | None  # None: nobody could say, so it is in no mean and is not trained on
    failure: str = ""  # kind of failure: the exception's name, "time-out", "process died", ...; empty: judged
    detail: str = ""  # what happened
    location: str = ""  # in the judge's own file: "my_reward.py, line 12, in reward"

    @property
    def failed(self) -> bool:
        """Whether the judge gave no reward of its own."""
        return bool(self.failure)

    @property
    def error(self) -> str:
        """One line: the kind, what happened and where; empty where it was judged."""
        location = f" ({self.location})" if self.location else ""
        return f"{self.failure}: {self.detail}{location}" if self.failure else ""


EpisodeStatus = Literal["done", "length", "max_turns", "timeout", "env_died", "aborted"]
_STATUS_OF: Mapping[FinishReason, EpisodeStatus] = {
    "stop": "done",
    "length": "length",
    "abort": "aborted",
    "error": "aborted",
}


@dataclass(frozen=True, kw_only=True)
class Episode:
    """All turns that a prompt led to, and their verdict. An answer is an episode of one turn."""

    prompt: Prompt
    turns: tuple[Turn, ...]  # at least one, parents before their children
    verdict: Verdict
    status: EpisodeStatus

    @classmethod
    def of_answer(
        cls, prompt: Prompt, completion: Completion, text: str, verdict: Verdict, *, temperature: float
    ) -> Episode:
        """Make an episode of one answer."""
        turn = Turn(completion=completion, text=text, temperature=temperature)
        return cls(prompt=prompt, turns=(turn,), verdict=verdict, status=_STATUS_OF[completion.finish_reason])

    @property
    def is_answered(self) -> bool:
        """Whether it ended, by itself or at the length limit, and the model said anything."""
        return self.status in ("done", "length", "max_turns") and self.num_tokens > 0

    @property
    def response(self) -> str:
        """The last turn as text: what judges of an answer see."""
        return self.turns[-1].text

    @property
    def num_tokens(self) -> int:
        """Tokens that the model sampled, in all turns."""
        return sum(len(turn.completion.token_ids) for turn in self.turns)


@dataclass(frozen=True, kw_only=True)
class Group:
    """All episodes of one prompt: what group-relative advantages compare."""

    episodes: tuple[Episode, ...]  # [G]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One row to train on: the prompt, then what was sampled, and what was given in between."""

    token_ids: IntArray  # [T] int32, the engine's own tokens
    trained: BoolArray  # [T] whether the policy sampled the token and is to learn from it; never in the prompt
    rollout_logprobs: FloatArray  # [T] float32 from the rollout engine, 0 where not sampled
    advantages: FloatArray  # [T] float32, 0 where not trained
    versions: IntArray  # [T] int32, of the weights that sampled the token, -1 where not sampled
    prompt_length: int  # samples with equal group_id have equal prompts, of at least one token
    group_id: int
    episode_id: int  # ordinal of the answer in its rollout; samples of one episode share it
    temperature: float  # > 0, that its tokens were drawn at; the actor scores them at the same


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """The sizes of a sample, which every rank needs to plan micro-batches and to share the loss out."""

    num_tokens: int  # T
    prompt_length: int
    input_length: int  # tokens that go through the model: all before the last trained one
    num_trained: int
    group_id: int
    episode_id: int
    temperature: float


@dataclass(frozen=True)
class Mean:
    """A weighted mean that has not been divided yet: merged across micro-batches and ranks, divided once.

    `total` and `count` may be floats or 0-d tensors: tensors stay on their device until read, so
    that collecting a metric never waits for the GPU.
    """

    total: float | Tensor
    count: float | Tensor

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; NaN where nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else float("nan")


@dataclass(frozen=True, kw_only=True)
class WeightBucket:
    """Whole (unsharded) Hugging Face tensors of one part of a model: a decoder layer, or what is outside the layers."""

    version: int
    part: str  # "embeddings", "layers.3" or "final"; names the bucket in errors
    tensors: Mapping[str, Tensor]  # Hugging Face name -> tensor


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Everything a loss may look at, for the R trained tokens of one micro-batch; fp32 [R] unless told otherwise."""

    logprobs: Tensor  # of the model being trained, at the sampling temperature; carries the gradient
    entropy: Tensor  # of its next-token distribution, in nats
    old_logprobs: Tensor  # denominator of the ratio
    rollout_logprobs: Tensor  # from the rollout engine
    reference_logprobs: Tensor | None  # of the frozen starting model; None where no KL is asked for
    advantages: Tensor
    token_shares: Tensor  # of each token in the loss; they sum to 1 over the whole update, all ranks together
    sequence_ids: Tensor  # [R] int64, the answer that a token is of: 0.. within the micro-batch
    num_sequences: int  # answers of the micro-batch, each of which is in it whole

    def sum_over_answers(self, values: Tensor) -> Tensor:
        """The sum of each answer's values, [R] -> [num_sequences], with gradient; 0 where it has no trained token."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence_ids, values)


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A loss and what is worth reporting about it."""

    loss: Tensor  # [] already divided by the batch-wide denominator
    metrics: Mapping[str, Mean]  # sums and counts; merged across ranks, divided once


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What one optimizer update did; the same on every rank."""

    metrics: Mapping[str, Mean]
    grad_norm: float
    lr: float
    num_tokens: int  # prompt and response tokens of the update's samples, each sample's prompt counted
    computed_tokens: int  # tokens that went through the model, all replicas together
