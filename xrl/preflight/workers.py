"""Workers that somebody started: ours to use, and nobody else's now."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from xrl.config import RolloutConfig
from xrl.rollout.access import Access, new_run_id
from xrl.rollout.claims import ask, check_answer, trainers_key

# One that does not answer may be starting: the run waits for it.
TIMEOUT_S = 0.8


def check_workers(config: RolloutConfig) -> None:
    """Refuse workers that another run has, and a key that is not theirs. Nothing changes for the other run.

    Raises:
        SettingsError: names the worker, or the file of the key.
    """
    if not config.worker_addresses:
        return
    access = Access(key=trainers_key(config.rollout_worker_key_file), run_id=new_run_id("preflight"))
    urls = [f"http://{host}:{port}" for host, port in config.worker_addresses]
    with ThreadPoolExecutor(len(urls)) as threads:
        answers = list(threads.map(lambda url: ask(url, "GET", access, timeout_s=TIMEOUT_S), urls))
    for number, (url, (status, answer)) in enumerate(zip(urls, answers, strict=True)):
        check_answer(number, url, status, answer)
