"""`python -m xrl.kernels` prints which code runs here: the backend of the head, and what computes a layer."""

from xrl.kernels.head.backend import describe
from xrl.kernels.layers.choice import describe_layers

print(describe())
print(describe_layers())
