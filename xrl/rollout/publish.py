"""The actor's new weights into every rollout worker, one decoder layer at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from xrl.rollout import protocol
from xrl.rollout.pool import WorkerPool
from xrl.types import WeightBucket
from xrl.weights.transport.shared_memory import SharedMemorySender


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """One update of all workers."""

    seconds: float
    num_bytes: int
    num_tensors: int


class Publisher:
    """Streams weight buckets to the pool's workers. Memory beside the model: one bucket."""

    def __init__(self, pool: WorkerPool, *, timeout_s: float = 120.0) -> None:
        self.pool = pool
        self.timeout_s = timeout_s
        self._sender = SharedMemorySender()

    def publish(self, buckets: Iterable[WeightBucket], *, version: int) -> PublishReport:
        """Send every bucket; completions sampled from then on carry `version`.

        Args:
            buckets: consumed in order, to the end, once.

        Raises:
            RuntimeError: a worker refused a layer or did not take it in time: names both.
        """
        start = time.perf_counter()
        num_bytes = num_tensors = 0
        for bucket in buckets:
            manifest = self._sender.put(bucket)
            self.pool.post_to_all(
                protocol.LOAD_LAYER,
                manifest.to_json(),
                timeout_s=self.timeout_s,
                doing=f"weights version {version}, {bucket.layer}",
            )
            num_tensors += len(bucket.tensors)
            num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in bucket.tensors.values())
        self.pool.post_to_all(
            protocol.FINISH_UPDATE,
            {"version": version},
            timeout_s=self.timeout_s,
            doing=f"weights version {version}",
        )
        return PublishReport(seconds=time.perf_counter() - start, num_bytes=num_bytes, num_tensors=num_tensors)

    def close(self) -> None:
        """Free the shared memory."""
        self._sender.close()
