"""(seed, epoch, step, rank, world size) -> the packs that this rank computes on; the position is the whole state.

The packs of an optimizer step depend on the seed, the epoch and the step alone, so a run that goes on with another
number of ranks still sees every row once an epoch. Ranks and micro-batches only share a step's packs out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.shards import IGNORE, PackedSplit
from trainer.errors import TrainerError

EMPTY = -1  # in a plan: no pack, a sequence of padding only
_WIDTH_MULTIPLE = 8  # padded widths are multiples of it, which tensor cores like


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in one optimizer step."""

    split: PackedSplit
    packs: npt.NDArray[np.int64]
    """This rank's packs, shape [num_micro_batches, micro_batch_size]; -1 is a sequence of padding only."""
    num_target_tokens: int
    """Targets of the whole step, over all ranks: the loss is divided by it."""
    num_tokens: int
    """Tokens of the whole step, over all ranks, without padding."""
    num_slots: int
    """Tokens of the whole step, over all ranks, padding included."""

    @property
    def micro_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches in order, read from disk as they are asked for; see `collate`."""
        return (collate(self.split, packs) for packs in self.packs)

    def row_ids(self, micro_batch: int) -> list[str]:
        """Ids of the rows in one micro-batch of this rank, for messages about it."""
        split = self.split
        return [split.row_id(row) for pack in self.packs[micro_batch] if pack != EMPTY for row in split.rows(pack)]


@dataclass(frozen=True)
class Batches:
    """The order in which a split is trained on."""

    split: PackedSplit
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        share = self.world_size * self.micro_batch_size
        if self.global_batch_size % share:
            raise TrainerError(
                f"training.global_batch_size ({self.global_batch_size}) must be a multiple of ranks x micro_batch_size "
                f"({self.world_size} x {self.micro_batch_size} = {share})"
            )
        if not 0 <= self.rank < self.world_size:
            raise TrainerError(f"rank {self.rank} is not in 0..{self.world_size - 1}")
        if not self.split.num_packs:
            raise TrainerError(f"{self.split.folder} holds no rows: give the split a larger share of the data")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every row once; the last may have fewer packs."""
        return -(-self.split.num_packs // self.global_batch_size)

    def step(self, epoch: int, step_in_epoch: int) -> StepBatches:
        """This rank's share of one optimizer step.

        Args:
            epoch: number of the pass over the split, from 0.
            step_in_epoch: number of the step in it, 0..steps_per_epoch - 1.

        Returns:
            The micro-batches, and the whole step's counts.

        Raises:
            TrainerError: there is no such step.
        """
        if not 0 <= step_in_epoch < self.steps_per_epoch:
            raise TrainerError(f"step {step_in_epoch} is not in 0..{self.steps_per_epoch - 1} of the epoch")
        order = _epoch_order(self.seed, epoch, self.split.num_packs)
        packs = order[step_in_epoch * self.global_batch_size :][: self.global_batch_size]
        filled = np.full(self.global_batch_size, EMPTY, dtype=np.int64)
        filled[: packs.size] = packs
        costs = np.where(filled == EMPTY, 0, self.split.pack_costs[filled])
        shares = share_out(costs, self.world_size, self.micro_batch_size)
        by_micro_batch = filled[shares.reshape(self.world_size, -1, self.micro_batch_size)]
        widths = [_width(self.split, sequences) for rank in by_micro_batch for sequences in rank]
        return StepBatches(
            split=self.split,
            packs=by_micro_batch[self.rank],
            num_target_tokens=int(self.split.pack_target_tokens[packs].sum()),
            num_tokens=int(self.split.pack_tokens[packs].sum()),
            num_slots=sum(widths) * self.micro_batch_size,
        )


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_packs: int) -> npt.NDArray[np.int64]:
    """The packs of an epoch, each once, in seeded order."""
    order = np.random.default_rng([seed, epoch]).permutation(num_packs)
    order.flags.writeable = False
    return order


def share_out(costs: npt.NDArray[np.int64], world_size: int, micro_batch_size: int) -> npt.NDArray[np.int64]:
    """Which sequences of a step each rank takes: as many each, and about the same cost.

    From the dearest down, each next `world_size` sequences go one to a rank, the dearest of them to the rank that has
    the least so far. So the ranks' sums stay close, and so do the micro-batches that run at the same time.

    Worked example, 2 ranks: costs [9, 1, 5, 4] -> rank 0 takes 9 and 1, rank 1 takes 5 and 4: [[0, 1], [2, 3]].

    Args:
        costs: of each sequence, shape [global_batch_size].
        world_size: ranks; times micro_batch_size it divides the number of sequences.
        micro_batch_size: sequences of a micro-batch; within a rank they are kept in descending order of cost.

    Returns:
        Indices into costs, shape [world_size, global_batch_size // world_size].
    """
    descending = np.argsort(-costs, kind="stable").reshape(-1, world_size)
    shares = np.empty_like(descending)
    totals = np.zeros(world_size, dtype=costs.dtype)
    for column, sequences in enumerate(descending):
        ranks = np.argsort(totals, kind="stable")
        shares[column, ranks] = sequences
        totals[ranks] += costs[sequences]
    return np.ascontiguousarray(shares.T)


def collate(split: PackedSplit, packs: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """The tensors of some packs.

    With packing every sequence is split.sequence_length wide; without, as wide as the longest row (a multiple of 8).

    Args:
        split: where the packs lie.
        packs: their numbers, shape [num_sequences]; -1 is a sequence of padding only.

    Returns:
        input_ids, labels, position_ids: int64 tensors of shape [num_sequences, width]. labels stand beside their
        input_ids and are -100 at the first token of each row and at padding, so a shift by one never crosses from one
        row to the next. Positions start at 0 in each row, and again where padding starts.
    """
    width = _width(split, packs)
    shape = (len(packs), width)
    input_ids = np.full(shape, split.pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    position_ids = np.empty(shape, dtype=np.int64)
    positions = np.arange(width)
    for sequence, pack in enumerate(packs):
        at = 0
        for row in split.rows(pack) if pack != EMPTY else ():
            row_ids, row_labels = split.row_tokens(row)
            end = at + row_ids.size
            input_ids[sequence, at:end] = row_ids
            labels[sequence, at:end] = row_labels
            position_ids[sequence, at:end] = positions[: row_ids.size]
            at = end
        position_ids[sequence, at:] = positions[: width - at]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
    }


def _width(split: PackedSplit, packs: npt.NDArray[np.int64]) -> int:
    """Tokens of each sequence in a micro-batch."""
    if split.packing:
        return split.sequence_length
    longest = max((int(split.pack_tokens[pack]) for pack in packs if pack != EMPTY), default=1)
    return -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
