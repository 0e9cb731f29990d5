"""LMDeploy's TurboMind as the driver drives it: which versions, and its steps over a stand-in of what they touch.

`inside_lmdeploy.py` has the same in LMDeploy's own code.
"""

from __future__ import annotations

import threading
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xrl.config import SettingsError
from xrl.rollout.engine import EngineError
from xrl.rollout.turbomind_driver import SUPPORTED_VERSIONS, TurboMindDriver, check_experts, check_version
from xrl.types import SamplingParams

# Which LMDeploy.


@pytest.mark.parametrize("version", [*SUPPORTED_VERSIONS, "0.13.0+cu128"])
def test_versions_whose_update_is_known_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    check_version()


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("0.14.0", "from 0.14.0 on TurboMind cannot take new weights"),
        ("0.18.0", "from 0.14.0 on TurboMind cannot take new weights"),
        ("1.0.0rc1", "from 0.14.0 on TurboMind cannot take new weights"),
        ("0.13.1", "proven with these versions only"),
        ("0.10.2", "proven with these versions only"),
    ],
)
def test_other_versions_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, version: str, why: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    with pytest.raises(SettingsError, match=rf"needs lmdeploy 0\.12\.3 or 0\.13\.0, found {version}: .*{why}"):
        check_version()


def test_a_number_of_experts_that_lmdeploy_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "5.24.0")
    check_experts(128)
    with pytest.raises(SettingsError, match=r"takes it for 128, found 64: install transformers<5"):
        check_experts(64)
    monkeypatch.setattr(metadata, "version", lambda _: "4.57.1")
    check_experts(64)


def test_without_lmdeploy_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", none)
    with pytest.raises(SettingsError, match=r"lmdeploy is not installed for .*: see docs/turbomind\.md"):
        check_version()


# Its steps.


class StandIn:
    """What the driver touches of a TurboMind: weights by its own names, and those that an update has yet to bring."""

    def __init__(self) -> None:
        self.weights = {name: torch.zeros(2) for name in ("a", "b", "norm.weight")}
        self._tm_model = SimpleNamespace(tm_params={})
        self.model_comm = SimpleNamespace(get_weights=lambda index: self.weights)
        self.told: list[Any] = []
        self.fails_with: Exception | None = None

    def update_params(self, request: Any) -> None:
        """As TurboMind: places are looked up where there is no `_export_iter`; what has come is crossed off."""
        if self.fails_with is not None:
            raise self.fails_with
        if not hasattr(self, "_export_iter"):
            self._export_iter = object()
            self._tm_model.tm_params.update({name: [weight] for name, weight in self.weights.items()})
        for name, tensor in request.serialized_named_tensors.items():
            for place in self._tm_model.tm_params.pop(name.removeprefix("model."), []):
                place.copy_(tensor)

    async def sleep(self, level: int) -> None:
        self.told.append(("sleep", level))

    def wakeup(self, tags: list[str]) -> None:
        self.told.append(("wakeup", tags))

    def close(self) -> None:
        self.told.append("close")


class Driver(TurboMindDriver):
    """Over the stand-in."""

    def _start(self, *_: Any) -> None:
        self._turbomind = StandIn()
        self._update_request = SimpleNamespace
        self._lmdeploy = SimpleNamespace(GenerationConfig=SimpleNamespace)


@pytest.fixture
def driver() -> Driver:
    no: Any = None
    return Driver(no, dtype="bfloat16", device_index=0, max_batch_size=4, max_model_len=64)


def filled(value: float, *names: str) -> dict[str, Tensor]:
    return {f"model.{name}": torch.full((2,), value) for name in names}


def values(driver: Driver) -> dict[str, float]:
    return {name: float(weight[0]) for name, weight in driver._turbomind.weights.items()}


def test_what_an_update_has_yet_to_bring_is_known_from_its_first_part_on(driver: Driver) -> None:
    driver.begin_update()
    assert driver.missing() == []
    driver.take("layers.0", filled(1.0, "b"))
    assert driver.missing() == ["a", "norm.weight"]
    driver.take("layers.1", filled(2.0, "a"))
    assert driver.missing() == ["norm.weight"]
    driver.take("final", filled(3.0, "norm.weight"), finished=True)
    assert driver.missing() == []
    assert values(driver) == {"a": 2.0, "b": 1.0, "norm.weight": 3.0}


def test_a_part_may_come_again_and_the_last_one_counts(driver: Driver) -> None:
    driver.begin_update()
    for value in (7.0, 1.0):
        driver.take("layers.0", filled(value, "b"))
        assert driver.missing() == ["a", "norm.weight"]
    assert values(driver)["b"] == 1.0


def test_every_update_is_written_to_the_weights_as_they_are_now(driver: Driver) -> None:
    for version in (1.0, 2.0):
        driver._turbomind.weights = {name: torch.zeros(2) for name in ("a", "b", "norm.weight")}  # sleep and wakeup
        driver.begin_update()
        driver.take("layers.0", filled(version, "a", "b"))
        driver.take("final", filled(version, "norm.weight"), finished=True)
        assert set(values(driver).values()) == {version}
    assert not hasattr(driver._turbomind, "_export_iter")  # which would hold the last tensors


def test_an_update_that_is_given_up_leaves_nothing_to_the_next(driver: Driver) -> None:
    driver.begin_update()
    driver.take("layers.0", filled(1.0, "a"))
    driver.begin_update()
    driver.take("layers.0", filled(2.0, "a"))
    assert driver.missing() == ["b", "norm.weight"]
    assert values(driver)["a"] == 2.0


def test_tensors_that_turbomind_does_not_take_are_an_error(driver: Driver) -> None:
    driver.begin_update()
    driver.take("layers.0", filled(1.0, "a"))
    with pytest.raises(EngineError, match=r"weight update, layers\.1: TurboMind took none of its 2 tensors"):
        driver.take("layers.1", filled(1.0, "c", "d"))


def test_without_the_mend_the_second_update_is_an_error_and_not_lost(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.begin_update()
    driver.take("layers.0", filled(1.0, "a", "b"))
    driver.take("final", filled(1.0, "norm.weight"))
    monkeypatch.setattr(driver, "_forget_export", lambda: None)
    driver.begin_update()
    with pytest.raises(EngineError, match="TurboMind took none of its 1 tensors"):
        driver.take("layers.0", filled(2.0, "a"))


def test_what_turbomind_fails_with_is_named(driver: Driver) -> None:
    driver._turbomind.fails_with = KeyError("w1")
    driver.begin_update()
    with pytest.raises(EngineError, match=r"weight update, layers\.0: TurboMind failed: KeyError: 'w1'") as caught:
        driver.take("layers.0", filled(1.0, "a"))
    assert caught.value.__cause__ is driver._turbomind.fails_with


def test_while_it_goes_to_sleep_the_device_is_waited_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronized = threading.Event()
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: driver._turbomind.told.append(("device", index)))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.set)
    driver.sleep(2)
    assert synchronized.is_set()
    driver.wake("weights", "kv_cache")
    driver.close()
    assert driver._turbomind.told == [("device", 0), ("sleep", 2), ("wakeup", ["weights", "kv_cache"]), "close"]


def test_sampling_is_told_in_lmdeploy_s_words(driver: Driver) -> None:
    sampling = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=11, stop_token_ids=(4, 2))
    found = driver.generation_config(sampling, seed=3)
    assert (found.do_sample, found.temperature, found.top_k, found.top_p) == (True, 0.7, 5, 0.9)
    assert (found.max_new_tokens, found.stop_token_ids, found.ignore_eos, found.random_seed) == (11, [4, 2], False, 3)
    greedy = driver.generation_config(SamplingParams(temperature=0.0, top_k=5, top_p=0.5), seed=3)
    assert (greedy.do_sample, greedy.temperature, greedy.top_k, greedy.top_p) == (False, 1.0, 1, 1.0)
    assert (greedy.stop_token_ids, greedy.ignore_eos) == (None, True)
