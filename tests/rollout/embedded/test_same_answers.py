"""Equal answers, to the bit: whatever the order, however many engines, cut off or not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rollout.engines import request
from tests.tiny_models import make_model
from xrl.rollout.engine import Engine

MakeEngine = Callable[..., Engine]
NUM_PROMPTS, NUM_TOKENS, CUT_AFTER = 64, 40, 13
Answer = tuple[list[int], list[float]]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (NUM_PROMPTS,), generator=generator).tolist()
    return [torch.randint(1, 40, (length,), generator=generator).tolist() for length in lengths]


def answers(engines: list[Engine], order: list[int], drawn: dict[int, Answer]) -> dict[int, Answer]:
    """Each prompt's answer, from one engine after the other, going on with those that are drawn in part."""
    asked, futures = prompts(), {}
    for turn, i in enumerate(order):
        ids, _ = drawn.get(i, ([], []))
        futures[i] = engines[turn % len(engines)].submit(
            request([*asked[i], *ids], id=str(i), seed=i, num_drawn=len(ids), max_new_tokens=NUM_TOKENS - len(ids))
        )
    found = {}
    for i, future in futures.items():
        (completion,) = future.result(timeout=120)
        ids, logprobs = drawn.get(i, ([], []))
        found[i] = ([*ids, *completion.token_ids], [*logprobs, *completion.logprobs])
    return found


def cut_off_every_other(engine: Engine) -> None:
    """Abort the requests with odd names once the engine has decoded for some steps."""
    decoder = engine._decoder  # type: ignore[attr-defined]
    decode, steps = decoder.decode, [0]

    def decode_and_abort(*step: Any, **options: Any) -> Any:
        steps[0] += 1
        if steps[0] == CUT_AFTER:
            for i in range(1, NUM_PROMPTS, 2):
                engine.abort(str(i))
        return decode(*step, **options)

    decoder.decode = decode_and_abort


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_engines", [1, 2, 3])
def test_same_prompts_reversed_split_and_cut_off_get_equal_answers(
    make_engine: MakeEngine, num_engines: int, dtype: str
) -> None:
    model = make_model()
    expected = answers([make_engine(model, dtype=dtype)], list(range(NUM_PROMPTS)), {})
    assert len({tuple(ids) for ids, _ in expected.values()}) > NUM_PROMPTS // 2
    engines = [make_engine(model, dtype=dtype, max_batch_size=40) for _ in range(num_engines)]
    order = list(reversed(range(NUM_PROMPTS)))
    for engine in engines:
        cut_off_every_other(engine)
    partial = answers(engines, order, {})
    cut = {i: answer for i, answer in partial.items() if len(answer[0]) < NUM_TOKENS}
    assert set(cut) == set(range(1, NUM_PROMPTS, 2))
    assert sum(len(ids) > 1 for ids, _ in cut.values()) >= NUM_PROMPTS // 8
    # By other engines than before.
    order = [i for i in order[1:] + order[:1] if i in cut]
    assert {**partial, **answers(engines, order, cut)} == expected
