"""Near duplicates are found by sketches as comparing every pair finds them, and the work stays bounded."""

import json
import tracemalloc

import numpy as np
import pytest

from trainer.data.collect import Collected
from trainer.data.leaks import _conversation, _jaccard, _pieces, find_leaks, sketch_chunk
from trainer.data.spread import LocalMap

WORDS = [f"{one}{two}{three}" for one in "bdfgk" for two in "aeiou" for three in "lmnrs"]


def collected(path, texts):
    """Rows of a question and an answer."""
    starts = []
    with path.open("wb") as file:
        for number, (question, answer) in enumerate(texts):
            starts.append(file.tell())
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            line = {"id": str(number), "messages": messages, "file": "a.json", "row": number + 1}
            file.write(json.dumps(line).encode() + b"\n")
    none = np.zeros(len(texts), dtype=np.int32)
    return Collected(path, np.array(starts), none, none.astype(np.int8), none, ("alpaca",))


def find(rows, num_test, similarity=0.8):
    train, test = np.arange(num_test, rows.num_rows), np.arange(num_test)
    with LocalMap(1) as spread:
        return find_leaks(rows, train, test, similarity, spread)


def texts(rng, num_rows, length=40):
    return [(" ".join(rng.choice(WORDS, length)), " ".join(rng.choice(WORDS, length))) for _ in range(num_rows)]


@pytest.mark.parametrize("similarity", [0.7, 0.8, 0.9])
def test_sketches_find_what_comparing_every_pair_finds(tmp_path, similarity):
    rng = np.random.default_rng(0)
    test = texts(rng, 200)
    train = texts(rng, 200)
    for number in range(120):  # from hardly changed to half another
        words = test[number][1].split()
        for place in rng.choice(40, number // 6, replace=False):
            words[place] = "other"
        train[number] = (test[number][0] + "?", " ".join(words))
    rows = collected(tmp_path / "rows.jsonl", test + train)
    pieces = [_pieces(_conversation(rows, row)) for row in range(400)]
    true = {row for row in range(200, 400) if max(_jaccard(pieces[row], pieces[t]) for t in range(200)) >= similarity}
    leaks = find(rows, 200, similarity)
    assert set(leaks.near) <= true
    assert len(leaks.near) >= 0.97 * len(true) > 10
    assert not leaks.exact
    assert leaks.test_rows == {row - 200 for row in leaks.near}


def test_test_rows_that_are_all_alike_are_compared_a_few_at_a_time(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (long, _), *_ = texts(rng, 1, 200)
    alike = [(f"{long} {number}", "yes") for number in range(300)]
    train = [(f"{long} {number}x", "yes") for number in range(50)]
    compared = []
    monkeypatch.setattr("trainer.data.leaks._jaccard", lambda one, other: compared.append(1) or _jaccard(one, other))
    leaks = find(collected(tmp_path / "rows.jsonl", alike + train), 300)
    assert len(leaks.near) == 50
    assert len(compared) <= 5 * 50


def test_a_question_asked_again_is_exact_whatever_the_answer(tmp_path):
    rng = np.random.default_rng(0)
    test = texts(rng, 1200)  # more than a chunk
    train = [(test[1100][0].upper() + " ", "another answer altogether"), *texts(rng, 600)]
    leaks = find(collected(tmp_path / "rows.jsonl", test + train), 1200)
    assert (leaks.exact, leaks.near, leaks.test_rows) == ([1200], [], {1100})
    assert leaks.examples[0]["same_question"]


def test_a_row_of_megabytes_takes_little_memory(tmp_path):
    letters = np.random.default_rng(0).integers(0x4E00, 0x9000, 2_000_000, dtype=np.uint32)
    rows = collected(tmp_path / "rows.jsonl", [(letters.tobytes().decode("utf-32-le"), "yes")])
    (line,) = rows.lines(np.array([0]))
    tracemalloc.start()
    sketch_chunk([line])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6
