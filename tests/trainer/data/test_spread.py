"""Chunks of rows: bounded by number and size, done in order however many processes there are."""

import os

import pytest

from trainer.data.spread import CHUNK_ROWS, LocalMap, chunked
from trainer.errors import TrainerError


def test_chunks_are_bounded_by_rows_and_by_bytes():
    assert [len(chunk) for chunk in chunked(iter([b"x"] * 1201))] == [CHUNK_ROWS, CHUNK_ROWS, 201]
    large = b"x" * (3 << 20)
    assert [len(chunk) for chunk in chunked(iter([large] * 7 + [b"y"]))] == [3, 3, 2]
    assert list(chunked(iter([]))) == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_outcomes_come_in_order_and_chunks_are_read_only_as_they_are_needed(num_processes):
    read = []

    def chunks():
        for number in range(60):
            read.append(number)
            yield [b"x"] * number

    with LocalMap(num_processes) as spread:
        outcomes = spread(len, chunks())
        assert [next(outcomes) for _ in range(3)] == [0, 1, 2]
        assert len(read) < 20
        assert list(outcomes) == list(range(3, 60))


def killed(_chunk):
    os._exit(9)


def test_a_process_that_is_killed_is_told():
    with LocalMap(2) as spread, pytest.raises(TrainerError, match="one of 2 processes that tokenize was killed"):
        list(spread(killed, iter([[b"x"]] * 3)))
