"""`python -m xrl.kernels` prints which backend runs the kernels here."""

from xrl.kernels.native import describe

print(f"CPU kernels: {describe()}\nCUDA kernels: plain PyTorch")
