"""Weight buckets to an engine in the trainer's own process: the tensors themselves."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xrl.types import WeightBucket
from xrl.weights.transport import Manifest, TransportError


class Sender:
    """Keeps the last two buckets for receivers to take. See `xrl.weights.transport.Sender`."""

    keeps_copy = False
    pushes = False

    def __init__(self, *, timeout_s: float, device: torch.device) -> None:
        self._buckets: dict[str, Mapping[str, Tensor]] = {}
        _SENDERS[id(self)] = self

    def invite(self, worker: int, host: str) -> dict[str, Any]:
        return {"sender": id(self)}

    def accept(self, worker: int) -> None:
        pass

    def put(self, bucket: WeightBucket) -> Mapping[str, Any]:
        kept = list(self._buckets.items())[-1:]
        self._buckets = {**dict(kept), bucket.part: bucket.tensors}
        return {}

    def send(self, worker: int, bucket: WeightBucket) -> None:
        pass

    def disconnect(self, worker: int) -> None:
        pass

    def close(self) -> None:
        self._buckets.clear()

    def take(self, part: str) -> Mapping[str, Tensor]:
        """The tensors of a bucket that was put.

        Raises:
            TransportError: it was not.
        """
        if part not in self._buckets:
            raise TransportError(f"the sender holds no {part}")
        return self._buckets[part]


class Receiver:
    """Takes what the sender holds. See `xrl.weights.transport.Receiver`."""

    def __init__(self, invitation: Mapping[str, Any], *, timeout_s: float, device: torch.device) -> None:
        number = invitation.get("sender")
        sender = _SENDERS.get(number) if isinstance(number, int) else None
        if sender is None:
            raise TransportError("the sender is not in this process")
        self._sender = sender

    def receive(self, manifest: Manifest) -> dict[str, Tensor]:
        tensors = self._sender.take(manifest.part)
        missing = [entry.name for entry in manifest.tensors if entry.name not in tensors]
        if missing:
            raise ValueError(f"the sender's {manifest.part} has no {missing[0]}")
        return {entry.name: tensors[entry.name] for entry in manifest.tensors}

    def close(self) -> None:
        pass


# An invitation is JSON, so it can only name its sender.
_SENDERS: weakref.WeakValueDictionary[int, Sender] = weakref.WeakValueDictionary()
