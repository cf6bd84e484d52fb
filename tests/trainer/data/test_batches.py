"""Batches: every pack once an epoch whatever the ranks, ranks of equal cost, positions and labels per row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches import EMPTY, Batches, share_out
from trainer.data.shards import PackedSplit, SplitWriter
from trainer.errors import TrainerError


def write(folder, lengths, *, sequence_length=16, packing=True):
    """Row r has the ids 100 r, 100 r + 1, ...; the first half of each row is masked."""
    writer = SplitWriter(folder)
    for row, length in enumerate(lengths):
        ids = 100 * (row + 1) + np.arange(length)
        writer.add_row(f"row {row}", ids, np.where(np.arange(length) < length // 2, -100, ids))
    counts = writer.finish(sequence_length=sequence_length, packing=packing, pad_token_id=0, seed=0)
    return PackedSplit.open(folder), counts


def batches(split, *, rank=0, world_size=1, global_batch_size=4, micro_batch_size=1, seed=0):
    return Batches(
        split,
        seed=seed,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
    )


def test_tensors_by_hand(tmp_path):
    split, counts = write(tmp_path, [4, 3, 2], sequence_length=8)
    # Best fit: 4 and 3 share a sequence of 8, one token of padding is left; 2 stands alone.
    assert counts == {"rows": 3, "tokens": 9, "target_tokens": 2 + 2 + 1, "packs": 2, "utilisation": 9 / 16}
    step = batches(split, global_batch_size=2, micro_batch_size=2).step(0, 0)
    (tensors,) = step.micro_batches
    assert tensors["input_ids"].tolist() == [
        [100, 101, 102, 103, 200, 201, 202, 0],
        [300, 301, 0, 0, 0, 0, 0, 0],
    ]
    assert tensors["labels"].tolist() == [
        [-100, -100, 102, 103, -100, 201, 202, -100],
        [-100, 301, -100, -100, -100, -100, -100, -100],
    ]
    assert tensors["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert all(tensor.dtype == torch.int64 for tensor in tensors.values())
    assert (step.num_target_tokens, step.num_tokens, step.num_slots) == (5, 9, 16)
    assert step.row_ids(0) == ["row 0", "row 1", "row 2"]


def test_the_first_token_of_a_row_is_never_a_target(tmp_path):
    writer = SplitWriter(tmp_path)
    writer.add_row("all", [5, 6, 7], [5, 6, 7])
    counts = writer.finish(sequence_length=4, packing=True, pad_token_id=0, seed=0)
    assert counts["target_tokens"] == 2
    assert PackedSplit.open(tmp_path).row_tokens(0)[1].tolist() == [-100, 6, 7]


@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60),
    world_size=st.sampled_from([1, 2, 4]),
    micro_batch_size=st.sampled_from([1, 2]),
    seed=st.integers(0, 3),
    packing=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_ranks_are_disjoint_and_complete_and_counts_are_true(
    tmp_path_factory, lengths, world_size, micro_batch_size, seed, packing
):
    split, _ = write(tmp_path_factory.mktemp("split"), lengths, packing=packing)
    options = {"seed": seed, "global_batch_size": 8, "micro_batch_size": micro_batch_size, "world_size": world_size}
    ranks = [batches(split, rank=rank, **options) for rank in range(world_size)]
    for epoch in range(2):
        seen = []
        for number in range(ranks[0].steps_per_epoch):
            steps = [rank.step(epoch, number) for rank in ranks]
            assert {step.packs.shape for step in steps} == {(8 // world_size // micro_batch_size, micro_batch_size)}
            read = [tensors for step in steps for tensors in step.micro_batches]
            assert sum(int((t["labels"] != -100).sum()) for t in read) == steps[0].num_target_tokens
            assert sum(t["labels"].numel() for t in read) == steps[0].num_slots
            assert len({(s.num_target_tokens, s.num_tokens, s.num_slots) for s in steps}) == 1
            seen += [name for step in steps for i in range(len(step.packs)) for name in step.row_ids(i)]
        assert sorted(seen) == sorted(f"row {row}" for row in range(len(lengths)))


@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=80),
    ranks=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2])), min_size=2, max_size=4),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=40)
def test_changes_of_ranks_in_the_middle_of_an_epoch_still_see_every_row_once(tmp_path_factory, lengths, ranks, epoch):
    split, _ = write(tmp_path_factory.mktemp("split"), lengths)
    seen = []
    for number in range(batches(split, global_batch_size=8).steps_per_epoch):
        world_size, micro_batch_size = ranks[number % len(ranks)]  # resumed with other ranks before each step
        options = {"world_size": world_size, "micro_batch_size": micro_batch_size, "global_batch_size": 8}
        steps = [batches(split, rank=rank, **options).step(epoch, number) for rank in range(world_size)]
        seen += [name for step in steps for i in range(len(step.packs)) for name in step.row_ids(i)]
    assert sorted(seen) == sorted(f"row {row}" for row in range(len(lengths)))


def test_epochs_and_seeds_have_orders_of_their_own_and_come_again(tmp_path):
    split, _ = write(tmp_path, [9] * 40)
    orders = [
        batches(split, seed=s, global_batch_size=40).step(e, 0).packs for s, e in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    # Within a step packs stand by cost; with equal costs the epoch's order remains.
    assert orders[0].tolist() == orders[3].tolist()
    assert orders[0].tolist() != orders[1].tolist()
    assert orders[0].tolist() != orders[2].tolist()


def test_a_short_last_step_is_filled_with_empty_sequences(tmp_path):
    split, _ = write(tmp_path, [16] * 5)
    last = batches(split, global_batch_size=4).step(0, 1)
    assert sorted(last.packs.ravel().tolist())[:3] == [EMPTY] * 3
    assert (last.num_target_tokens, last.num_tokens, last.num_slots) == (8, 16, 64)
    assert [int((t["labels"] != -100).sum()) for t in last.micro_batches] == [8, 0, 0, 0]


def test_padded_batches_group_rows_of_like_length(tmp_path):
    split, counts = write(tmp_path, [1, 16, 2, 15, 3, 14, 4, 13], packing=False)
    assert counts["utilisation"] is None
    step = batches(split, global_batch_size=8, micro_batch_size=2).step(0, 0)
    assert [tensors["input_ids"].shape for tensors in step.micro_batches] == [(2, 16), (2, 16), (2, 8), (2, 8)]
    assert step.num_slots == 2 * (16 + 16 + 8 + 8)


def test_share_out_by_hand():
    assert share_out(np.array([9, 1, 5, 4]), 2, 1).tolist() == [[0, 1], [2, 3]]


@given(st.lists(st.integers(0, 1000), min_size=32, max_size=32))
def test_ranks_differ_by_at_most_the_dearest_sequence(costs):
    costs = np.array(costs)
    totals = costs[share_out(costs, 4, 2)].sum(axis=1)
    assert totals.max() - totals.min() <= costs.max()


def test_balanced_cost_is_much_closer_than_an_arbitrary_deal():
    rng = np.random.default_rng(0)
    shared, dealt = [], []
    for _ in range(50):
        costs = np.clip(rng.lognormal(10, 0.5, 64), 0, 2048**2).astype(np.int64)
        shared.append(np.ptp(costs[share_out(costs, 8, 1)].sum(axis=1)))
        dealt.append(np.ptp(costs.reshape(8, 8).sum(axis=1)))
    assert np.mean(shared) < 0.25 * np.mean(dealt)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch_size": 6, "world_size": 4}, r"global_batch_size \(6\) must be a multiple .* \(4 x 1 = 4\)"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not in 0..1"),
    ],
)
def test_impossible_shapes_are_refused(tmp_path, options, words):
    split, _ = write(tmp_path, [3])
    with pytest.raises(TrainerError, match=words):
        batches(split, **options)


def test_a_step_beyond_the_epoch_is_refused(tmp_path):
    split, _ = write(tmp_path, [3])
    with pytest.raises(TrainerError, match=r"step 1 is not in 0..0"):
        batches(split).step(0, 1)


def test_an_empty_split_is_refused(tmp_path):
    split, _ = write(tmp_path, [])
    with pytest.raises(TrainerError, match="holds no rows"):
        batches(split)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "index.json").unlink(), "run the prepare stage"),
        (lambda folder: (folder / "labels.npy").unlink(), "lacks labels"),
        (lambda folder: (folder / "index.json").write_text('{"format": 99}'), "has format 99, this version reads 1"),
    ],
)
def test_a_split_that_is_not_whole_is_refused(tmp_path, damage, words):
    write(tmp_path, [3])
    damage(tmp_path)
    with pytest.raises(TrainerError, match=words):
        PackedSplit.open(tmp_path)
