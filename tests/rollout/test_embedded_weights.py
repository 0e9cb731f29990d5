"""Which tensors the embedded decoder expects."""

import pytest

from tests.tiny_models import make_model
from xrl.models.shape import model_shape
from xrl.rollout.embedded.weights import expected_tensors


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)])
def test_expected_tensors_are_the_parameters_of_transformers(family: str, tied: bool) -> None:
    model = make_model(family, tied=tied)
    shape = model_shape(model.config.to_dict() | {"architectures": [type(model).__name__]})
    expected = {name: size for part in expected_tensors(shape).values() for name, size in part.items()}
    assert expected == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
