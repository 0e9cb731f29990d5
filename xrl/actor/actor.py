"""The policy: built from a Hugging Face checkpoint, spread over ranks, scored and updated."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from xrl.actor.broadcast import broadcast_sizes, send_samples
from xrl.actor.gather import merge_over_ranks
from xrl.actor.microbatch import Microbatch, MicrobatchMaker
from xrl.actor.offload import TrainingMemory
from xrl.actor.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from xrl.actor.pipeline import Pipeline
from xrl.actor.scorer import TokenScorer
from xrl.actor.split import split_groups
from xrl.algorithms import Algorithm
from xrl.config import ModelConfig, OptimizerConfig, PackingConfig, ParallelConfig
from xrl.launch.progress import Progress
from xrl.metrics.mean import merge
from xrl.models.build import build_model, train_dtype, transformer_config, uses_transformer_engine
from xrl.models.head import ResponseRows
from xrl.models.shape import read_model_shape
from xrl.parallel.groups import ParallelGroups
from xrl.types import LossInputs, LossOutput, Mean, Sample, SampleSize, UpdateReport, WeightBucket
from xrl.weights.export import WeightExporter
from xrl.weights.load import load_weights
from xrl.weights.slices import named_weights

WhichWeights = Literal["actor", "reference"]


class Actor:
    """This rank's share of the model that is trained."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        packing: PackingConfig,
        groups: ParallelGroups,
        num_updates: int,
        keeps_reference: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            num_updates: of the whole run, for the learning rate's schedule.
            keeps_reference: hold the weights that the run starts from too, for an algorithm with a KL to them.
            progress: advances with every micro-batch.
        """
        self.parallel = parallel
        self.groups = groups
        self.shape = read_model_shape(model.model)
        self.dtype = train_dtype(model)
        transformer_engine = uses_transformer_engine(model, self.shape)
        config = transformer_config(self.shape, model, parallel, groups.layout, transformer_engine=transformer_engine)
        self.model = build_model(self.shape, config, groups, transformer_engine=transformer_engine)
        load_weights(self.model, self.shape, groups, model.model)
        self.exporter = WeightExporter(self.shape, groups)
        # The frozen starting point, for the KL; no second model, only a second set of weights.
        self.reference = (
            {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
            if keeps_reference
            else None
        )
        head = ResponseRows(
            sequence_parallel=parallel.sequence_parallel,
            tensor_group=groups.tensor,
            returns_hidden=model.fused_linear_logprob,
        )
        if groups.is_last_stage:
            head.attach(self.model.output_layer)
        self.ddp = wrap_data_parallel(self.model, parallel)
        self.optimizer = build_optimizer(self.ddp, optimizer, parallel, dtype=self.dtype)
        self.schedule = build_schedule(self.optimizer, optimizer, num_updates=num_updates)
        self.memory = TrainingMemory(self.ddp, self.optimizer, self.reference)
        self.pipeline = Pipeline(self.ddp, head, data_parallel_size=groups.layout.data_size, progress=progress)
        self.scorer = TokenScorer(
            backend=model.kernel_backend,
            groups=groups,
            head=head,
            vocab_size=self.shape.vocab_size,
            columns=groups.layout.padded_vocab_size(self.shape.vocab_size) // groups.layout.tensor_size,
            upstream=self.pipeline.upstream,
        )
        self.microbatches = MicrobatchMaker(
            packing=packing,
            shape=self.shape,
            groups=groups,
            dtype=self.dtype,
            transformer_engine=transformer_engine,
            sequence_parallel=parallel.sequence_parallel,
        )
        self.seconds: dict[str, float] = {}

    @property
    def num_parameters(self) -> int:
        """Parameters of this rank's share."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def learn(self, samples: Sequence[Sample] | None, algorithm: Algorithm) -> list[UpdateReport]:
        """Learn from one rollout: `updates_per_rollout` optimizer updates, each on its own share of the groups.

        Collective.

        Args:
            samples: the whole rollout on rank 0, None on the others.
            algorithm: whose settings, token shares and loss are used. Where it has a `fused_loss`, kernels compute the
                same as its `loss` in fewer passes over the logits; metrics come from `loss` either way.

        Raises:
            ValueError: the algorithm has a KL to the reference, and the actor was built without one.
        """
        settings = algorithm.settings
        if settings.kl_coef and self.reference is None:
            raise ValueError(f"kl_coef is {settings.kl_coef:g}, which needs an actor that keeps a reference")
        sizes = broadcast_sizes(samples, self.groups.control)
        parts = split_groups([size.group_id for size in sizes], settings.updates_per_rollout)
        updates = self._microbatches_of(samples, sizes, parts, algorithm)

        start = time.perf_counter()
        # With a single update the first forward pass gives the old log-probs itself.
        needs_old = settings.old_logprobs == "actor" and len(updates) > 1
        old = [self.logprobs(update) if needs_old else [] for update in updates]
        reference = [self.logprobs(update, weights="reference") if self.reference else [] for update in updates]
        middle = time.perf_counter()
        reports = [
            self._one_update(
                sum(sizes[index].num_tokens for index in part),
                update,
                algorithm,
                old_logprobs,
                reference_logprobs,
            )
            for part, update, old_logprobs, reference_logprobs in zip(parts, updates, old, reference, strict=True)
        ]
        self.seconds = {"logprobs": middle - start, "update": time.perf_counter() - middle}
        return reports

    def logprobs(self, microbatches: Sequence[Microbatch], *, weights: WhichWeights = "actor") -> list[Tensor]:
        """Log-probs [R] of each micro-batch's response tokens; on the last stage, empty on the others. Collective."""
        with self._weights_of(weights):
            return self.pipeline.forward(
                microbatches, lambda output, microbatch: self.scorer.logprobs(output, microbatch).logprob
            )

    def mismatch(self, samples: Sequence[Sample] | None) -> list[float]:
        """Mean |rollout - actor log-prob| of each sample, on every rank; infinite where it is not a number. Collective.

        Every replica scores all of them: this is for a few.

        Args:
            samples: on rank 0, None on the others.
        """
        sizes = broadcast_sizes(samples, self.groups.control)
        if not sizes:
            return []
        everyone = range(len(sizes))
        own = send_samples(samples, sizes, [everyone] * self.groups.layout.data_size, self.groups)
        microbatches = [self.microbatches.make([own[index]], [0.0]) for index in everyone]
        found = torch.zeros(len(sizes), dtype=torch.float64)
        for index, logprobs in enumerate(self.logprobs(microbatches)):
            difference = logprobs.float() - microbatches[index].rollout_logprobs
            found[index] = difference.abs().mean().nan_to_num(nan=math.inf, posinf=math.inf)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.groups.control)
        return found.tolist()

    def weights(self, *, version: int) -> Iterator[WeightBucket]:
        """The current weights as Hugging Face tensors, part by part, on rank 0. Collective: run it to its end."""
        return self.exporter.stream(self.named_weights(), version=version)

    def named_weights(self) -> Mapping[str, Tensor]:
        """This rank's weights, by the names of the GPTModel's parameters."""
        return named_weights(self.model)

    def _microbatches_of(
        self,
        samples: Sequence[Sample] | None,
        sizes: Sequence[SampleSize],
        parts: Sequence[Sequence[int]],
        algorithm: Algorithm,
    ) -> list[list[Microbatch]]:
        """[update] -> this replica's micro-batches.

        Args:
            parts: [update] -> indices of samples.
        """
        plans = [self.microbatches.plan(sizes, part) for part in parts]
        replicas = range(self.groups.layout.data_size)
        wanted = [[index for plan in plans for indices in plan[replica] for index in indices] for replica in replicas]
        own = send_samples(samples, sizes, wanted, self.groups)
        shares: dict[int, float] = {}
        for part in parts:
            shares |= zip(part, algorithm.token_shares([sizes[index] for index in part]), strict=True)
        return [
            [
                self.microbatches.make([own[index] for index in indices], [shares[index] for index in indices])
                for indices in plan[self.groups.data_rank]
            ]
            for plan in plans
        ]

    def _one_update(
        self,
        num_tokens: int,
        microbatches: Sequence[Microbatch],
        algorithm: Algorithm,
        old: Sequence[Tensor],
        reference: Sequence[Tensor],
    ) -> UpdateReport:
        use_rollout = algorithm.settings.old_logprobs == "rollout"
        entropy_grad = bool(algorithm.settings.entropy_coef)

        def microbatch_loss(head_output: Tensor, number: int) -> LossOutput:
            microbatch = microbatches[number]
            old_logprobs = microbatch.rollout_logprobs if use_rollout else old[number] if old else None
            reference_logprobs = reference[number] if reference else None
            if algorithm.fused_loss is None:
                scored = self.scorer.logprobs(head_output, microbatch, entropy_grad=entropy_grad)
                fused, logprobs, entropy = None, scored.logprob, scored.entropy
            else:
                fused, tokens = self.scorer.grpo_loss(
                    head_output, microbatch, algorithm.fused_loss, old=old_logprobs, reference=reference_logprobs
                )
                logprobs, entropy = tokens.logprob, tokens.entropy
            output = algorithm.loss(
                LossInputs(
                    logprobs=logprobs,
                    entropy=entropy,
                    old_logprobs=logprobs.detach() if old_logprobs is None else old_logprobs,
                    rollout_logprobs=microbatch.rollout_logprobs,
                    reference_logprobs=reference_logprobs,
                    advantages=microbatch.advantages,
                    token_shares=microbatch.token_shares,
                    sequence_ids=microbatch.sequence_ids,
                    num_sequences=microbatch.num_sequences,
                )
            )
            return output if fused is None else LossOutput(loss=fused, metrics=output.metrics)

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self.pipeline.forward_backward(microbatches, microbatch_loss)
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(increment=1)
        metrics: dict[str, Mean] = {}
        if self.groups.reports_losses:
            for output in outputs:
                metrics = merge(metrics, output.metrics)
        computed = sum(microbatch.num_tokens for microbatch in microbatches) if self.groups.reports_losses else 0
        metrics = merge_over_ranks({**metrics, "computed_tokens": Mean(computed, 1)}, self.groups.control)
        _refuse_not_finite(loss=metrics["loss"].value if "loss" in metrics else 0.0, grad_norm=float(grad_norm))
        return UpdateReport(
            num_tokens=num_tokens,
            computed_tokens=int(metrics.pop("computed_tokens").total),
            metrics=metrics,
            grad_norm=float(grad_norm),
            lr=lr,
        )

    @contextlib.contextmanager
    def _weights_of(self, which: WhichWeights) -> Iterator[None]:
        """Let the model compute with another set of weights for a while."""
        if which == "actor":
            yield
            return
        assert self.reference is not None
        own = {name: parameter.data for name, parameter in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.data = self.reference[name]
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.data = own[name]


def _refuse_not_finite(*, loss: float, grad_norm: float) -> None:
    """End the run: weights that such an update has touched must not be published, nor saved as somebody's result.

    Raises:
        RuntimeError: on every rank alike, since both values are the whole update's.
    """
    # Both, as megatron-core takes no norm where nothing is clipped.
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise RuntimeError(
            f"the update's loss is {loss} and its gradient norm {grad_norm}: check the model's weights, or lower --lr. "
            f"Nothing of this update is saved"
        )
