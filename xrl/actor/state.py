"""The state of what is trained: this rank's share of it, and how it comes back at any layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from xrl.actor.actor import Actor
from xrl.actor.optimizer_state import TrainedParameter, trained_parameters
from xrl.checkpoint.choose import SavedState
from xrl.checkpoint.manifest import Cut, Manifest, rank_file
from xrl.checkpoint.pieces import MAIN, MOMENTS, HeldParameter, pieces_to_write, writers
from xrl.checkpoint.reader import StateReader
from xrl.weights.plan import ParameterPlan, plan
from xrl.weights.slices import find_name, has_te_layers


class ActorState:
    """Main weights, Adam's moments, its count, and the learning rate's schedule."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        te_layers = has_te_layers(actor.named_weights())
        layout = actor.groups.layout
        self.cut = Cut(
            layout=layout,
            use_distributed_optimizer=actor.parallel.use_distributed_optimizer,
            te_layers=te_layers,
        )
        self._plan = plan(actor.shape, layout, transformer_engine=te_layers)
        self._place = layout.place(actor.groups.rank)
        self._writers = writers(self._plan, self._place)

    @property
    def file_name(self) -> str:
        """Of this rank's file."""
        return rank_file(self._place)

    @property
    def num_updates(self) -> int:
        """Updates that the optimizer has made.

        Raises:
            RuntimeError: parameters differ in theirs, so that no single number tells it.
        """
        counts = {trained.num_updates for trained in self._trained().values()}
        if len(counts) > 1:
            raise RuntimeError(f"parameters have had {sorted(counts)} updates, they must have had equally many")
        return counts.pop() if counts else 0

    def schedule(self) -> dict[str, Any]:
        """The learning rate's, as megatron-core saves it."""
        return dict(self._actor.schedule.state_dict())

    def pieces(self) -> dict[str, Tensor]:
        """What this rank has to write, by its names in the file: views."""
        return pieces_to_write(self._held(), self._writers)

    def load(self, saved: SavedState) -> None:
        """Take a saved state, whatever layout has written it. Not collective: each rank reads what it needs.

        Raises:
            Unusable: a file is damaged.
        """
        manifest, weights, trained = saved.manifest, self._actor.named_weights(), self._trained()
        written = plan(self._actor.shape, manifest.cut.layout, transformer_engine=manifest.cut.te_layers)
        with StateReader(saved.folder, manifest, written) as reader:
            for parameter in self._plan.parameters(self._place):
                name = find_name(parameter, [weights])
                self._load_one(parameter, weights[name], trained.get(name), reader, manifest)
        self._actor.schedule.load_state_dict(dict(manifest.schedule))

    def _load_one(
        self,
        parameter: ParameterPlan,
        weight: Tensor,
        trained: TrainedParameter | None,
        reader: StateReader,
        manifest: Manifest,
    ) -> None:
        main = reader.parameter(parameter, MAIN, self._plan, self._place)
        if trained is None:  # another rank trains it, or nobody does
            with torch.no_grad():
                weight.view(-1).copy_(main)
            return
        kinds = MOMENTS if manifest.num_updates else ()
        moments = {
            kind: reader.share(parameter, kind, self._plan, self._place, start=trained.start, stop=trained.stop)
            for kind in kinds
        }
        trained.put_back(main, moments, num_updates=manifest.num_updates)

    def _held(self) -> Iterator[HeldParameter]:
        """What this rank trains, and the rest of what it holds: a router's bias, say."""
        weights, trained = self._actor.named_weights(), self._trained()
        for parameter in self._plan.parameters(self._place):
            name = find_name(parameter, [weights])
            if name in trained:
                yield trained[name].held()
            elif not self.cut.use_distributed_optimizer or not weights[name].requires_grad:
                weight = weights[name].detach().view(-1)
                yield HeldParameter(name=name, start=0, stop=weight.numel(), tensors={MAIN: weight})

    def _trained(self) -> Mapping[str, TrainedParameter]:
        return trained_parameters(self._actor.model, self._actor.optimizer)
