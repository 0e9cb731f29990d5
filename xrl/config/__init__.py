"""Every setting of a run: one dataclass a room, parsed from flags and YAML. Imports no torch."""

from xrl.config.algorithm import AlgorithmConfig
from xrl.config.data import DataConfig, PackingConfig
from xrl.config.errors import SettingsError
from xrl.config.model import ModelConfig
from xrl.config.optimizer import OptimizerConfig
from xrl.config.parallel import ParallelConfig
from xrl.config.rewards import RewardConfig
from xrl.config.rollout import RolloutConfig
from xrl.config.run import EvaluationConfig, RunConfig
from xrl.config.settings import Settings

__all__ = [
    "AlgorithmConfig",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PackingConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Settings",
    "SettingsError",
]
