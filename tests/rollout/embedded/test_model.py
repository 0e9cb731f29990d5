"""What the embedded engine samples, against transformers."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tests.rollout.engines import generate, push, request
from tests.tiny_models import make_model
from xrl.rollout.engine import Engine

MODELS = [
    ("qwen2", True),
    ("qwen2", False),
    ("qwen3", True),
    ("qwen3", False),
    ("llama", True),
    ("llama", False),
    ("mistral", True),
    ("mistral", False),
    ("internlm3", True),
    ("internlm3", False),
    ("qwen3_moe", True),
    ("qwen3_moe", False),
]
PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(10, 43)), list(range(60, 76))]
EOS = 2

MakeEngine = Callable[..., Engine]


def reference_logprobs(
    model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    """[len(response)] log-probs of a whole-sequence forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, dim=-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_greedy_tokens_are_those_of_transformers(make_engine: MakeEngine, family: str, tied: bool) -> None:
    model = make_model(family, tied=tied)
    engine = make_engine(model)
    futures = [
        engine.submit(request(prompt, id=str(i), temperature=0, max_new_tokens=40, stop_token_ids=(EOS,)))
        for i, prompt in enumerate(PROMPTS)
    ]
    for prompt, future in zip(PROMPTS, futures, strict=True):
        inputs = torch.tensor([prompt])
        expected = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=40, do_sample=False)
        assert future.result(timeout=60)[0].token_ids.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_logprobs_are_those_of_a_full_forward(
    make_engine: MakeEngine, family: str, tied: bool, temperature: float
) -> None:
    model = make_model(family, tied=tied)
    engine = make_engine(model)
    for prompt in PROMPTS:
        for completion in generate(engine, prompt, num_samples=3, temperature=temperature, max_new_tokens=40):
            expected = reference_logprobs(model, prompt, completion.token_ids.tolist(), temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_greedy_logprobs_are_of_the_unscaled_softmax(make_engine: MakeEngine) -> None:
    model = make_model()
    (completion,) = generate(make_engine(model), [5, 6, 7], temperature=0)
    expected = reference_logprobs(model, [5, 6, 7], completion.token_ids.tolist(), 1.0)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_plain_torch_kernels_give_the_same_answers(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_model())
    native = generate(engine, PROMPTS[2], num_samples=4, max_new_tokens=40, seed=3)
    for module in ("decode_layers", "decode_attention", "rms_norm", "rope_cache", "sample_tokens"):
        monkeypatch.setattr(f"xrl.kernels.decode.{module}.native_module", lambda: None)
    plain = generate(engine, PROMPTS[2], num_samples=4, max_new_tokens=40, seed=3)
    assert [c.token_ids.tolist() for c in plain] == [c.token_ids.tolist() for c in native]
    for one, other in zip(plain, native, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_bf16_logprobs_follow_a_bf16_model(make_engine: MakeEngine, family: str) -> None:
    model = make_model(family)
    engine = make_engine(model, dtype="bfloat16")
    (completion,) = generate(engine, PROMPTS[2], max_new_tokens=40)
    expected = reference_logprobs(model.bfloat16(), PROMPTS[2], completion.token_ids.tolist(), 1.0)
    difference = (torch.tensor(completion.logprobs) - expected).abs()
    assert difference.mean() < 0.05


def test_a_prompt_longer_than_a_cache_block_boundary_is_attended_whole(make_engine: MakeEngine) -> None:
    model = make_model()
    engine = make_engine(model)
    for length in (15, 16, 17, 32, 33):
        prompt = [(7 * i) % 90 for i in range(length)]
        (completion,) = generate(engine, prompt, max_new_tokens=20)
        expected = reference_logprobs(model, prompt, completion.token_ids.tolist(), 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_every_update_changes_what_is_sampled(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model(seed=0), load=False)
    for version, seed in enumerate((0, 1, 2)):
        model = make_model(seed=seed)
        push(engine, model, version)
        (completion,) = generate(engine, [5, 6, 7])
        assert completion.weights_version == engine.weights_version == version
        expected = reference_logprobs(model, [5, 6, 7], completion.token_ids.tolist(), 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)
