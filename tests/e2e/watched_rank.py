"""A rank in miniature that broadcasts and watches, until somebody hangs: `watched_rank.py FOLDER`.

Its environment tells it its place, as torchrun would.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from xrl.launch.limits import MORE_S, Limits
from xrl.launch.progress import Progress
from xrl.launch.watch import Self, Watch
from xrl.metrics.ending import Ending
from xrl.parallel.recorder import pending_collectives, switch_on
from xrl.parallel.store import connect_to_store
from xrl.watching import end_hung, tell_hung

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
SILENCE_S, PHASE_S = 5.0, 600.0
SETTLED = 40  # broadcasts, after which the ranks have heard of each other

switch_on(os.environ)
dist.init_process_group("gloo")
group = dist.new_group(backend="gloo", group_desc="control", timeout=timedelta(days=1))
progress = Progress()
progress.enter("update 1", "update")
Watch(
    lambda: connect_to_store(os.environ),
    Self(rank=RANK, progress=progress, pending=pending_collectives, host=f"node{RANK}"),
    world_size=2,
    limits=Limits(silence_s=SILENCE_S, phases=dict.fromkeys(MORE_S, PHASE_S)),
    tell=lambda hang: tell_hung(hang, Ending()),
    end=end_hung,
    beat_interval_s=1.0,
)
while True:
    dist.broadcast(torch.zeros(3), src=0, group=group)
    progress.advance()
    if progress.pieces > SETTLED:
        (FOLDER / f"beats-{RANK}").touch()
    time.sleep(0.1)
