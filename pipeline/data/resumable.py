"""What loaders over a data set have in common: their position is the data set's, in batches that were handed out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.data.library import State, check_state

if TYPE_CHECKING:
    from pipeline.data.library import Units
    from pipeline.data.shard_dataset import ShardDataset


class ResumableLoader:
    """Base class of loaders whose loops, and those of their data set, continue each other.

    Attributes:
        dataset: the samples, and the position.
    """

    dataset: ShardDataset

    @property
    def step(self) -> int:
        """Steps of which all batches have been handed out."""
        return self.dataset.position // self.dataset.source.order.global_batch

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self.dataset.source.order.epoch_of(self.step)

    def __len__(self) -> int:
        """Batches of this epoch on this rank, including those that were handed out before.

        Raises:
            TypeError: the data set is endless.
        """
        if self.dataset.endless:
            raise TypeError("an endless data set has no length")
        order = self.dataset.source.order
        first = order.first_step(self.epoch)
        return (order.next_epoch(self.step) - first) * self._units().per_step

    def state_dict(self) -> State:
        """Returns the position, which is that of the data set; see :meth:`pipeline.data.ShardDataset.state_dict`."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Lets the next loop continue at a position; see :meth:`pipeline.data.ShardDataset.load_state_dict`.

        Raises:
            DataError: the state belongs to other data, or lies within a batch or within a step that other ranks have begun.
        """
        self.dataset.next_unit(self._units(), check_state(state, self.dataset.source.identity))
        self.dataset.load_state_dict(state)

    def seek(self, step: int) -> None:
        """Lets the next loop start at a step."""
        self.dataset.seek(step)

    def _units(self) -> Units:
        return self.dataset.units(self.dataset.ranks)
