"""Weight buckets through CUDA memory that two processes of one host share: handles go over the control connection.

The sender keeps its tensors until the worker has answered; the worker maps them and copies out of them on its own
device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xrl.types import WeightBucket
from xrl.weights.transport import Manifest, TransportError

# What torch gives for a piece of CUDA memory, and takes to map it; the bytes among them go as hexadecimal digits.
_FIELDS = ("device", "handle", "num_bytes", "offset", "counter_handle", "counter_offset", "event_handle", "event_sync")
_BYTES_FIELDS = {"handle", "counter_handle", "event_handle"}


class Sender:
    """Keeps the last two buckets alive. See `xrl.weights.transport.Sender`."""

    keeps_copy = False
    pushes = False

    def __init__(self, *, timeout_s: float, device: torch.device) -> None:
        if device.type != "cuda":
            raise TransportError(f"--weight-transport cuda_ipc needs weights on CUDA, they are on {device}")
        self._kept: list[dict[str, Tensor]] = []

    def invite(self, worker: int, host: str) -> dict[str, Any]:
        return {}

    def accept(self, worker: int) -> None:
        pass

    def put(self, bucket: WeightBucket) -> Mapping[str, Any]:
        tensors = {name: tensor.detach().contiguous() for name, tensor in bucket.tensors.items()}
        self._kept = [*self._kept[-1:], tensors]
        torch.cuda.ipc_collect()  # what receivers have let go of
        torch.cuda.current_stream().synchronize()  # the gather of these tensors
        return {"tensors": [_share(tensor) for tensor in tensors.values()]}

    def send(self, worker: int, bucket: WeightBucket) -> None:
        pass  # it is there

    def disconnect(self, worker: int) -> None:
        pass

    def close(self) -> None:
        self._kept.clear()


class Receiver:
    """Maps the sender's memory. See `xrl.weights.transport.Receiver`."""

    def __init__(self, invitation: Mapping[str, Any], *, timeout_s: float, device: torch.device) -> None:
        if device.type != "cuda":
            raise TransportError(f"weight transport cuda_ipc needs an engine on CUDA, it is on {device}")

    def receive(self, manifest: Manifest) -> dict[str, Tensor]:
        shared = manifest.where.get("tensors")
        if not isinstance(shared, list) or len(shared) != len(manifest.tensors):
            raise ValueError(f"where needs tensors, one for each of {len(manifest.tensors)} of the manifest")
        try:
            return {
                entry.name: _open(each, entry.torch_dtype, entry.shape)
                for entry, each in zip(manifest.tensors, shared, strict=True)
            }
        except (KeyError, TypeError) as error:
            raise ValueError(f"where holds no handle of CUDA memory: {error!r}") from error
        except RuntimeError as error:
            raise TransportError(f"the sender's memory cannot be mapped: {error}") from error

    def close(self) -> None:
        pass


def _share(tensor: Tensor) -> dict[str, Any]:
    """JSON with which another process maps the tensor's memory."""
    storage = tensor.untyped_storage()
    values = dict(zip(_FIELDS, storage._share_cuda_(), strict=True))
    shared = {name: value.hex() if name in _BYTES_FIELDS else value for name, value in values.items()}
    # Which device that is does not depend on what either process calls it.
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return {**shared, "uuid": uuid, "start": tensor.storage_offset()}


def _open(shared: Mapping[str, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    values = {name: bytes.fromhex(shared[name]) if name in _BYTES_FIELDS else shared[name] for name in _FIELDS}
    values["device"] = _device_with(shared["uuid"])
    storage = torch.UntypedStorage._new_shared_cuda(*values.values())
    flat = torch.empty(0, dtype=dtype, device=storage.device).set_(storage)
    count = torch.Size(shape).numel()
    tensor: Tensor = flat[shared["start"] : shared["start"] + count].view(shape)
    return tensor


def _device_with(uuid: str) -> int:
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return index
    raise TransportError(f"the weights are on the GPU {uuid}, which this worker does not see (CUDA_VISIBLE_DEVICES)")
