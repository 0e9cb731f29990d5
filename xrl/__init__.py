"""xrl: GRPO post-training with Megatron 3D parallelism and TurboMind rollouts."""

__version__ = "0.1.0"
