"""`python -m xrl.kernels` prints which backend runs the kernels here."""

from xrl.kernels.backend import describe

print(describe())
