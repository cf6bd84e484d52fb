"""Files -> rows: every kind of file, streamed, and what is wrong with a row or a file."""

import csv
import gzip
import json
import tracemalloc
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from trainer.config import SourceConfig
from trainer.data.conversation import BadRowError, check_text
from trainer.data.sources import read_source
from trainer.errors import TrainerError

ROWS = [
    {"instruction": "Say ü", "output": 'a "b",\nc'},
    {"instruction": "二", "output": "\\ud"},
    {"instruction": "3", "output": "x"},
]


def read(path, **options):
    return [row for *_, row in read_source(SourceConfig(path=str(path), **options))]


def lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def write_csv(path, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "output"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def zipped(path, text):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
        ("lines.json", lambda path: path.write_text(lines(ROWS))),
        ("a.jsonl", lambda path: path.write_text(lines(ROWS) + "\n\n")),
        ("crlf.jsonl", lambda path: path.write_bytes(lines(ROWS).replace("\n", "\r\n").encode())),
        ("bom.json", lambda path: path.write_text("\ufeff" + json.dumps(ROWS))),
        ("a.jsonl.gz", lambda path: zipped(path, lines(ROWS))),
        ("a.json.gz", lambda path: zipped(path, json.dumps(ROWS))),
        ("a.parquet", lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path)),
        ("a.csv", write_csv),
        ("a.tsv", lambda path: write_csv(path, "\t")),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert read(tmp_path / name) == ROWS


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jsonl").write_text(lines(ROWS[1:]))
    (tmp_path / "1.json").write_text(json.dumps(ROWS[:1]))
    (tmp_path / "README.md").write_text("not rows")
    (tmp_path / ".hidden.json").write_text("[1]")
    found = list(read_source(SourceConfig(path=str(tmp_path))))
    assert [row for *_, row in found] == ROWS
    assert [(file.rpartition("/")[2], number) for file, number, _ in found] == [
        ("1.json", 1),
        ("2.jsonl", 1),
        ("2.jsonl", 2),
    ]


def test_a_folder_that_the_datasets_library_saved(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ROWS
    DatasetDict({"train": Dataset.from_list(ROWS), "rest": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two", hub_split="rest") == ROWS[:1]
    with pytest.raises(TrainerError, match="has no split 'tset'; it has train, rest"):
        read(tmp_path / "two", hub_split="tset")


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_json_list_is_read_whatever_piece_of_it_has_been_read(tmp_path, monkeypatch, size):
    monkeypatch.setattr("trainer.data.sources._READ_CHARACTERS", size)
    rows = [*ROWS, 12, 3.5e2, -1, "a,]b", [], {}, None, [[1], {"a": ["]"]}], True]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read(tmp_path / "a.json") == rows


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[")
        for i in range(40_000):
            file.write(("," if i else "") + json.dumps({"instruction": "x" * 500, "output": str(i)}))
        file.write("]")
    assert path.stat().st_size > 20e6
    rows = read_source(SourceConfig(path=str(path)))
    tracemalloc.start()
    count = sum(1 for _ in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak < 12e6


def test_a_row_of_ten_megabytes(tmp_path):
    rows = [ROWS[0], {"instruction": "x" * 10_000_000, "output": "y"}, ROWS[1]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("instruction,output\n" + "x" * 10_000_000 + ",y\n")
    assert read(tmp_path / "a.json") == rows
    assert len(read(tmp_path / "a.csv")[0]["instruction"]) == 10_000_000


def test_a_broken_line_is_a_bad_row_and_the_others_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": \n' + "[" * 100_000 + "\n" + '{"a": 2}')
    first, broken, deep, last = read(tmp_path / "a.jsonl")
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(broken, BadRowError)
    assert str(broken) == "line 4 is not valid JSON: Expecting value at column 6"
    assert isinstance(deep, BadRowError)


def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "good"}\n{"a": "caf\xe9"}\n{"a": "\\ud800"}')
    good, latin, lone = (row["a"] for row in read(tmp_path / "a.jsonl"))
    check_text(good, "a")
    for text, position in ((latin, 3), (lone, 0)):
        with pytest.raises(BadRowError, match=f"a: is not valid UTF-8 at position {position}"):
            check_text(text, "a")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"a": 1}, {"a": 2', "a.json, row 2: the JSON list is broken or cut off"),
        ("a.json", b'\n[{"a": 1},\n{"a" 2}]', "row 2: the JSON list is broken or cut off: line 3: Expecting ':'"),
        ("a.json", b"[1,\n2", "row 2: the JSON list is broken or cut off: the file ends inside the list"),
        ("a.json", b"[" * 100_000, "row 1: is not valid JSON: maximum recursion depth"),
        ("a.json.gz", b"no gzip", "a.json.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:-20], "cannot be read"),
        ("a.parquet", b"PAR1 no parquet", "a.parquet cannot be read"),
        ("a.csv", b'a,b\n"1,2\n', "line 2: unexpected end of data"),
        ("a.txt", b"hello", r"is no file of .json, .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainerError, match=words):
        read(tmp_path / name)


def test_a_csv_row_with_too_many_fields_is_a_bad_row(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n")
    good, bad = read(tmp_path / "a.csv")
    assert good == {"a": "1", "b": "2"}
    assert "more fields than the header" in str(bad)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(TrainerError, match=r"there is no file or folder .*nothing\.json"):
        read(tmp_path / "nothing.json")
    with pytest.raises(TrainerError, match="holds no file of"):
        read(tmp_path)


def test_only_the_rows_asked_for_are_parsed(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}, broken')
    rows = read_source(SourceConfig(path=str(tmp_path / "a.json")))
    assert [row for *_, row in islice(rows, 2)] == [{"a": 1}, {"a": 2}]
