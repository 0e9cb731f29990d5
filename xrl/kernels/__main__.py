"""`python -m xrl.kernels` prints which backend runs the kernels here."""

from xrl.kernels.head.backend import describe

print(describe())
