"""Gated MLPs and mixtures of them, against the same in plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.rollout.embedded.parts import CPU
from xrl.kernels.decode.packed_linear import PackedLinear, PackedSwiGLU
from xrl.models.shape import ExpertShape
from xrl.rollout.embedded.mlp import Experts, GatedMLP

HIDDEN, WIDE = 16, 24
EXPERTS = ExpertShape(num_experts=6, experts_per_token=2, ffn_hidden_size=WIDE, normalize_top_k=True)


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


class Plain:
    """SwiGLU as its paper writes it."""

    def __init__(self, seed: int, *, has_bias: bool = False) -> None:
        self.gate_up, self.down = random(2 * WIDE, HIDDEN, seed=seed), random(HIDDEN, WIDE, seed=seed + 1)
        self.biases = (random(2 * WIDE, seed=seed), random(HIDDEN, seed=seed + 1)) if has_bias else (None, None)

    def __call__(self, h: Tensor) -> Tensor:
        gate, up = F.linear(h, self.gate_up, self.biases[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down, self.biases[1])

    def packed(self) -> GatedMLP:
        return GatedMLP(
            gate_up=PackedSwiGLU(self.gate_up, self.biases[0]), down=PackedLinear(self.down, self.biases[1])
        )


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 33])
def test_a_gated_mlp_is_swiglu(num_rows: int, has_bias: bool) -> None:
    plain, h, other = Plain(1, has_bias=has_bias), random(num_rows, HIDDEN), random(num_rows, HIDDEN, seed=9)
    mlp = plain.packed()
    torch.testing.assert_close(mlp(h), plain(h), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mlp.plus(h, other), plain(h) + other, rtol=1e-5, atol=1e-4)


def mixture(shape: ExpertShape) -> tuple[Experts, Tensor, list[Plain]]:
    router = random(shape.num_experts, HIDDEN, seed=5)
    plain = [Plain(10 * expert) for expert in range(shape.num_experts)]
    return Experts(shape, router, [each.packed() for each in plain]), router, plain


def expected(shape: ExpertShape, router: Tensor, experts: list[Plain], h: Tensor) -> Tensor:
    """Token by token."""
    rows = []
    for token in h:
        probabilities = (router @ token).softmax(-1)
        chosen = probabilities.argsort(descending=True)[: shape.experts_per_token].tolist()
        total = sum(probabilities[each] for each in chosen) if shape.normalize_top_k else 1.0
        rows.append(sum(probabilities[each] / total * experts[each](token[None])[0] for each in chosen))
    return torch.stack(rows)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("per_token", [1, 2, 6])
def test_a_token_gets_its_likeliest_experts_by_their_weights(per_token: int, normalize: bool) -> None:
    shape = replace(EXPERTS, experts_per_token=per_token, normalize_top_k=normalize)
    experts, router, plain = mixture(shape)
    h, other = random(7, HIDDEN), random(7, HIDDEN, seed=9)
    found = experts.plus(h, other)
    torch.testing.assert_close(found, expected(shape, router, plain, h) + other, rtol=1e-5, atol=1e-4)


def test_other_is_left_as_it_is() -> None:
    experts, _, _ = mixture(EXPERTS)
    other = random(4, HIDDEN, seed=9)
    experts.plus(random(4, HIDDEN), other)
    assert torch.equal(other, random(4, HIDDEN, seed=9))


def test_experts_that_no_token_wants_are_not_asked() -> None:
    experts, router, _ = mixture(replace(EXPERTS, experts_per_token=1))
    wanted = int((router @ random(1, HIDDEN)[0]).argmax())
    experts.experts = [each if number == wanted else None for number, each in enumerate(experts.experts)]  # type: ignore[misc]
    assert experts.plus(random(1, HIDDEN), torch.zeros(1, HIDDEN)).isfinite().all()


def test_a_router_of_bf16_scores_in_fp32() -> None:
    experts = Experts(EXPERTS, random(EXPERTS.num_experts, HIDDEN).bfloat16(), [])
    assert experts.router.dtype == torch.float32
    assert torch.equal(experts.router, random(EXPERTS.num_experts, HIDDEN).bfloat16().float())


def test_they_stay_themselves_where_they_are_moved() -> None:
    experts, _, _ = mixture(EXPERTS)
    h, other = random(3, HIDDEN), torch.zeros(3, HIDDEN)
    before = experts.plus(h, other)
    assert experts.to(CPU) is experts
    assert torch.equal(experts.plus(h, other), before)
