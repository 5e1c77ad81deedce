"""Training whose data are divided among ranks that hold the base in parts.

Each rank runs its share of every micro-batch. Gradients are shares of a sum, which the end of a
work makes (`layers/shards.py`); log-probabilities, losses and counts are handed round at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from openmint.engine.lanes import Lanes
from openmint.engine.train_step import Item, OpenTrain, TrainLane, wants_gradient
from openmint.layers.ranks import Ranks
from openmint.models.model import Model


class SpreadTrainer:
    """Stands where `train_step.Trainer` does, on every rank at once."""

    def __init__(self, model: Model, lanes: Lanes, ranks: Ranks) -> None:
        self._lane, self._lanes, self._ranks = TrainLane(model, 0), lanes, ranks

    def run(self, items: Sequence[Item]) -> None:
        """Run these data; what came of them is in their works on every rank, but for gradients."""
        sizes = [len(work.data[i].tokens_N) for work, i in items]
        cuts = self._lanes.split(sizes, 1, self._ranks.size)
        own: Sequence[Item] = []
        if self._ranks.rank < len(cuts):
            own = items[cuts[self._ranks.rank]]
        self._lane.run(own or [_idle(items[0])], wants_gradient(items))
        found = [(work.logprobs[i], work.losses[i], work.routes.get(i)) for work, i in own]
        everyones = [each for ranks in self._ranks.gather_values(found) for each in ranks]
        for (work, i), (logprobs, loss, counts) in zip(items, everyones, strict=True):
            work.logprobs[i], work.losses[i] = logprobs, loss
            if counts is not None:
                work.routes[i] = counts


def _idle(item: Item) -> Item:
    """For a rank without data, as all must gather a block's weights together: somebody's datum,
    whose results and gradient nobody reads."""
    work, i = item
    return OpenTrain(work.run, (work.data[i],), work.loss, work.forward_only), 0
