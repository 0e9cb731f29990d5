"""How weights are read out: by the ranks themselves where they can write where workers read, gathered elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import groups, layout
from xrl.weights.source import WeightSource, can_share_memory


@pytest.mark.parametrize(
    ("transport", "has_native", "local_world_size", "shares"),
    [
        ("shared_memory", True, None, True),
        ("shared_memory", True, "2", True),
        ("shared_memory", False, None, False),
        ("broadcast", True, None, False),
        ("cuda_ipc", True, None, False),
        ("shared_memory", True, "1", False),  # ranks of other hosts cannot write there
    ],
)
def test_ranks_of_one_host_write_weights_into_shared_memory_themselves(
    monkeypatch: pytest.MonkeyPatch, transport: str, has_native: bool, local_world_size: str | None, shares: bool
) -> None:
    monkeypatch.setattr("xrl.weights.source.native_module", lambda: object() if has_native else None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_world_size:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    assert can_share_memory(transport, groups(layout(data=2))) is shares


class Model:
    """Weights that say how they were asked for."""

    shape: Any = None

    def named_weights(self) -> dict[str, torch.Tensor]:
        return {"a": torch.zeros(1)}

    def weights(self, *, version: int) -> Any:
        return iter([f"gathered {version}"])


def test_elsewhere_they_are_gathered() -> None:
    source = WeightSource(Model(), groups(), transport="broadcast", timeout_s=1.0)
    assert list(source.stream(None, version=3)) == ["gathered 3"]


def test_where_they_are_shared_the_memory_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Exporter:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def stream(self, weights: Any, memory: Any, *, version: int) -> Any:
            asked.append(([list(each) for each in weights], memory, version))
            return iter(["shared"])

    monkeypatch.setattr("xrl.weights.source.native_module", object)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("xrl.weights.source.SharedExporter", Exporter)
    memory: Any = object()
    source = WeightSource(Model(), groups(), transport="shared_memory", timeout_s=1.0)
    assert list(source.stream(memory, version=3)) == ["shared"]
    assert asked == [([["a"]], memory, 3)]
