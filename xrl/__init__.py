"""xrl: reinforcement learning of language models, with Megatron 3D parallelism and TurboMind rollouts.

`xrl train` is the program; the names below are for loops of one's own (docs/api.md). They are imported when they are
first asked for: `import xrl` alone costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xrl import kernels as kernels
    from xrl.actor.actor import Actor as Actor
    from xrl.algorithms import Algorithm as Algorithm
    from xrl.algorithms.grpo import GRPO as GRPO
    from xrl.config import Settings as Settings
    from xrl.config.parse import load_settings as load_settings
    from xrl.experience.experience import Batch as Batch
    from xrl.experience.experience import Experience as Experience
    from xrl.rewards.judge import Judge as Judge
    from xrl.rollout.fleet import Fleet as Fleet
    from xrl.rollout.publisher import Publisher as Publisher
    from xrl.session import Session as Session
    from xrl.trainer import Trainer as Trainer
    from xrl.types import Prompt as Prompt

__version__ = "0.1.0"

_WHERE = {
    "Actor": "xrl.actor.actor:Actor",
    "Algorithm": "xrl.algorithms:Algorithm",
    "Batch": "xrl.experience.experience:Batch",
    "Experience": "xrl.experience.experience:Experience",
    "Fleet": "xrl.rollout.fleet:Fleet",
    "GRPO": "xrl.algorithms.grpo:GRPO",
    "Judge": "xrl.rewards.judge:Judge",
    "Prompt": "xrl.types:Prompt",
    "Publisher": "xrl.rollout.publisher:Publisher",
    "Session": "xrl.session:Session",
    "Settings": "xrl.config:Settings",
    "Trainer": "xrl.trainer:Trainer",
    "load_settings": "xrl.config.parse:load_settings",
}
__all__ = [*_WHERE, "kernels"]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("xrl.kernels")
    if name not in _WHERE:
        raise AttributeError(f"module 'xrl' has no attribute {name!r}")
    if name not in ("Judge", "Prompt", "Settings", "load_settings"):  # the others import megatron: not before this
        import_module("xrl.parallel.cpu").prepare_megatron_for_cpu()
    module, _, attribute = _WHERE[name].partition(":")
    found = getattr(import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
