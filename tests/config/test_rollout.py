"""Settings of rollout workers and weight updates that cannot be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from xrl.config import RolloutConfig, SettingsError


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"on_lost_worker": "wait"}, "--on-lost-worker must be one of continue, stop, got 'wait'"),
        ({"weight_transport": "http"}, "--weight-transport must be one of auto, shared_memory, cuda_ipc, broadcast"),
        ({"rollout_max_restarts": -1}, "--rollout-max-restarts must be >= 0"),
        ({"weight_sync_timeout_s": 0.0}, "--weight-sync-timeout-s > 0"),
        ({"weight_sync_timeout_s": 3601.0}, "--weight-sync-timeout-s > 0 and at most 3600"),
        ({"rollout_worker_key_file": Path("/k")}, "--rollout-worker-key-file is for workers of --rollout-worker-urls"),
        ({"temperature": 1e-9}, "--temperature must be > 0 in training, in [1e-06, 1e+06], got 1e-09"),
        ({"top_k": 2**63, "allow_biased_sampling": True}, "--top-k must be >= 0"),
        ({"rollout_kv_cache_gb": 0.0}, "--rollout-kv-cache-gb must be > 0, got 0"),
        ({"rollout_kv_cache_gb": float("nan")}, "--rollout-kv-cache-gb must be > 0, got nan"),
        ({"rollout_kv_cache_gb": 1.0, "engine": "turbomind"}, "--rollout-kv-cache-gb bounds the embedded engine"),
        ({"rollout_kv_cache_gb": 1.0, "rollout_worker_urls": "a:1"}, "--rollout-kv-cache-gb is for workers that are"),
        ({"oversampling": 0.5}, "--oversampling must be a number >= 1, got 0.5"),
        ({"canary_tokens": -1}, "--canary-tokens must be >= 0, got -1"),
        ({"canary_stop": 0.0}, "--canary-stop must be > 0, got 0"),
        ({"oversampling": float("inf")}, "--oversampling must be a number >= 1, got inf"),
        ({"weight_sync_timeout_s": float("nan")}, "--weight-sync-timeout-s > 0"),
        ({"rollout_python": Path("/")}, "--rollout-python / must be a Python interpreter"),
        ({"rollout_worker_urls": ","}, "--rollout-worker-urls needs host:port,host:port, found ','"),
        ({"rollout_worker_urls": "host"}, "--rollout-worker-urls needs host:port,host:port, found 'host'"),
        ({"rollout_worker_urls": "host:99999"}, "--rollout-worker-urls needs host:port"),
        ({"rollout_worker_urls": "host:²"}, "--rollout-worker-urls needs host:port,host:port, found 'host:²'"),
        ({"rollout_worker_urls": "host:+80"}, "--rollout-worker-urls needs host:port"),
        ({"rollout_worker_urls": "[::1]:80"}, "host:port,host:port (of IPv6, the host's name), found '[::1]:80'"),
        ({"rollout_worker_urls": "::1:80"}, "host:port,host:port (of IPv6, the host's name), found '::1:80'"),
        ({"rollout_worker_urls": "user:word@a:80"}, "--rollout-worker-urls needs host:port"),
        ({"rollout_worker_urls": "a/b:80"}, "--rollout-worker-urls needs host:port"),
        ({"rollout_worker_urls": "a b:80"}, "--rollout-worker-urls needs host:port"),
        ({"rollout_worker_urls": "https://a:80"}, "--rollout-worker-urls needs host:port"),
        ({"oversampling": 1e308}, "--oversampling must be at most 1,000, got 1e+308"),
        ({"rollout_timeout_s": 1e300}, "--rollout-timeout-s must be at most 10,000,000, got 1e+300"),
        ({"weight_sync_timeout_s": 1e300}, "--weight-sync-timeout-s must be at most 10,000,000, got 1e+300"),
        ({"rollout_worker_urls": "a:1,a:1"}, "--rollout-worker-urls a:1,a:1 names a worker twice"),
        ({"rollout_worker_urls": "a:1", "rollout_num_workers": 2}, "--rollout-num-workers starts workers here"),
        (
            {"rollout_worker_urls": "a:1", "weight_transport": "shared_memory"},
            "--weight-transport shared_memory reaches workers on this host only",
        ),
    ],
)
def test_is_refused_in_a_sentence(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        RolloutConfig(**settings)  # type: ignore[arg-type]
    assert sentence in str(caught.value)


def test_workers_elsewhere_are_reached_by_broadcast() -> None:
    config = RolloutConfig(rollout_worker_urls="10.0.0.2:7000, http://b:80/")
    assert config.worker_addresses == [("10.0.0.2", 7000), ("b", 80)]
    assert config.chosen_transport == "broadcast"
    assert RolloutConfig().chosen_transport == "shared_memory"
