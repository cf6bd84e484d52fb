"""Files -> rows: every kind of file, forms near JSON, what JSON forbids, broken rows, and the splits of folders."""

import bz2
import csv
import gzip
import json
import lzma
import tracemalloc
from datetime import date
from decimal import Decimal
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import DataConfig, SourceConfig
from trainer.data.collect import Rejected, collect
from trainer.data.conversation import BadRowError, check_text
from trainer.data.names import is_hub_id, missing, role_of
from trainer.data.sources import read_source, splits_of
from trainer.data.splits import assign_splits
from trainer.errors import TrainerError

ROWS = [
    {"instruction": "Größe?\n\u2028", "output": 'a "quoted", answer'},
    {"instruction": "Zwei", "output": "x" * 3000},
    {"instruction": "🙂", "output": "]},["},
]


def read(path, **options):
    return [row for *_, row in read_source(SourceConfig(path=str(path), **options))]


def read_text(tmp_path, name, text):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(tmp_path / name)


def reasons(rows):
    """Rows, with a bad one's words in its place."""
    return [str(row) if isinstance(row, BadRowError) else row for row in rows]


def short(value):
    """A case's name in the list of tests: its file's."""
    return value if isinstance(value, str) and len(value) < 20 and value.isprintable() else ""


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


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", ["list", "values", "pretty"])
def test_json_is_read_whatever_piece_has_been_read(tmp_path, monkeypatch, size, form):
    monkeypatch.setattr("trainer.data.json_rows._READ_CHARACTERS", size)
    rows = [*ROWS, 12, 3.5e2, -1, "a,]b", [], {}, None, [[1], {"a": ["]"]}], True]
    if form == "list":
        text = json.dumps(rows)
    else:
        rows = ROWS
        text = "\n".join(json.dumps(row, indent=1 if form == "pretty" else None) for row in rows)
    assert read_text(tmp_path, "a.json", text) == rows


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers() | st.lists(st.none()), min_size=1),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from(["lines", "list", "pretty list", "pretty values"]),
    st.integers(1, 9),
)
def test_every_way_to_write_rows_gives_the_same(tmp_path_factory, rows, form, size):
    indent = 2 if form.startswith("pretty") else None
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    if not form.endswith("list"):
        text = "\n".join(json.dumps(row, indent=indent, ensure_ascii=False) for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.data.json_rows._READ_CHARACTERS", size)
        found = read_text(tmp_path_factory.getbasetemp(), "any.jsonl", text.encode("utf-8", "surrogatepass"))
    assert found == rows


TWO = [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("list.jsonl", json.dumps(TWO), TWO),
        ("lines.json", '{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        ("commas.jsonl", '{"a": 1},\n{"a": 2},\n', [{"a": 1}, {"a": 2}]),
        ("one-line.jsonl", '{"a": 1}{"a": 2}, {"a": 3}', [{"a": 1}, {"a": 2}, {"a": 3}]),
        ("other-breaks.jsonl", '{"a": 1}\n{"a": "\u2028\x85"}', [{"a": 1}, {"a": "\u2028\x85"}]),
        ("lists.json", '[{"a": 1}]\n[{"a": 2}]', [{"a": 1}, {"a": 2}]),
        ("lone.json", '{"instruction": "x", "examples": [{"a": 1}]}', [{"instruction": "x", "examples": [{"a": 1}]}]),
        ("messages.json", '{"messages": [{"role": "user"}]}', [{"messages": [{"role": "user"}]}]),
        (
            "struct.json",
            '{"messages": {"role": ["user"], "content": ["q"]}}',
            [{"messages": [{"role": "user", "content": "q"}]}],
        ),
        ("wrapped.json", json.dumps({"version": "1", "data": TWO}), TWO),
        ("pretty.json", json.dumps({"rows": TWO, "tools": [{"name": "f"}]}, indent=2), TWO),
        ("keyed.json", json.dumps({"k": TWO[0], "l": TWO[1]}), [{"id": "k", **TWO[0]}, {"id": "l", **TWO[1]}]),
        ("own-id.json", '{"k": {"id": "own", "a": 1}}', [{"id": "own", "a": 1}]),
        ("pandas.json", '{"a": {"0": "1", "1": "2"}, "b": {"0": "x", "1": "y"}}', TWO),
        ("split.json", '{"columns": ["a", "b"], "index": [0, 1], "data": [["1", "x"], ["2", "y"]]}', TWO),
        ("columns.json", '{"a": ["1", "2"], "b": ["x", "y"]}', TWO),
        ("utf16.json", ("\ufeff" + json.dumps(TWO)).encode("utf-16-le"), TWO),
        ("utf16be.jsonl", lines(TWO).encode("utf-16-be"), TWO),
        ("utf32.json", json.dumps(TWO).encode("utf-32"), TWO),
        ("zipped.jsonl", gzip.compress(lines(TWO).encode(), mtime=0), TWO),
        ("plain.jsonl.gz", lines(TWO), TWO),
        ("a.jsonl.bz2", bz2.compress(lines(TWO).encode()), TWO),
        ("a.jsonl.xz", lzma.compress(lines(TWO).encode()), TWO),
        ("a.json.zst", pa.compress(lines(TWO).encode(), "zstd", asbytes=True), TWO),
        ("part-00000", lines(TWO), TWO),
        ("a.txt", json.dumps(TWO), TWO),
        ("semicolon.csv", "a;b\n1;x\n2;y\n", TWO),
        ("excel.csv", "sep=;\na;b\n1;x\n2;y\n", TWO),
        ("excel.csv", "\ufeffa,b\r\n1,x\r\n\r\n2,y\r\n", TWO),
        ("unicode.csv", "a\tb\n1\tx\n2\ty\n".encode("utf-16"), TWO),
        ("index.csv", ",a,b\n0,1,x\n1,2,y\n", TWO),
        ("numbers.csv", "a,b\n007,1.10\nNaN,\n", [{"a": "007", "b": "1.10"}, {"a": "NaN", "b": ""}]),
        ("empty.jsonl", "\n \n", []),
    ],
    ids=short,
)
def test_a_form_with_one_meaning_is_read(tmp_path, name, text, rows):
    assert read_text(tmp_path, name, text) == rows


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("NaN", "NaN is no JSON value"),
        ("-Infinity", "-Infinity is no JSON value"),
        ("1e999", "the number 1e999 is too large"),
        ("9" * 5000, "a number of 5,000 digits is too long"),
        ('{"k": 1, "k": 2}', "the key 'k' is there more than once in one object"),
    ],
)
@pytest.mark.parametrize("form", ["lines", "list", "pretty", "wrapped", "keyed"])
def test_what_json_forbids_is_one_bad_row(tmp_path, value, reason, form):
    rows = ['{"q": 1}', f'{{"q": [{value}]}}', '{"q": 3}']
    text = {
        "lines": "\n".join(rows),
        "list": "[" + ",\n".join(rows) + "]",
        "pretty": "[\n  " + ",\n  ".join(row.replace('"q"', '\n "q"') for row in rows) + "\n]",
        "wrapped": '{"data": [' + ",".join(rows) + "]}",
        "keyed": "{" + ",".join(f'"{number}": {row}' for number, row in enumerate(rows)) + "}",
    }[form]
    first, bad, last = reasons(read_text(tmp_path, "a.json", text))
    assert (first["q"], last["q"]) == (1, 3)
    place = {"lines": "line 2: ", "list": "line 2: ", "pretty": "line 4: "}
    assert bad == place.get(form, "") + reason


def test_numbers_keep_their_value_and_spelling(tmp_path):
    (row,) = read_text(tmp_path, "a.jsonl", '{"a": 1.10, "b": 1e3, "c": 123456789012345678901234567890, "d": 0.5}')
    assert row == {"a": 1.1, "b": 1000.0, "c": 123456789012345678901234567890, "d": 0.5}
    assert [str(value) for value in row.values()] == ["1.10", "1e3", "123456789012345678901234567890", "0.5"]
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("size", [1, 50, 1 << 20])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"a": 1},\n{"a" 2},\n{"a": 3}]', [1, "line 2 is not valid JSON: Expecting ':' delimiter", 3]),
        ('[{"a": 1},\n{"a": "x, "b": 2},\n{"a": 3}]', [1, "line 2 is not valid JSON", 3]),
        ('[{"a": 1},\n{"a": {"a": 0,}},\n{"a": 3}]', [1, "line 2 is not valid JSON", 3]),
        (
            '[\n  {\n    "a": 1\n  },\n  {\n    "a": [{"a": 2], \n {"a": 9}\n  },\n  {\n    "a": 3\n  }\n]',
            [1, "line 6 is not valid JSON: Expecting ',' delimiter", 3],
        ),
        ('{\n"a": 1\n}\n{\n"a": tru\n}\n{\n"a": 3\n}', [1, "line 5 is not valid JSON", 3]),
        ('[{"a": 1}, {"a": 2', [1, "line 1 is not valid JSON: Expecting ',' delimiter; no row begins after it"]),
        ('[{"a": 1},\n{"a": 2}\n', [1, 2, "the file ends inside its list: it is cut off"]),
        (
            '\n{"a": 1}\n\n{"a": \n' + "[" * 100_000 + "\n" + '{"a": 2}',
            [1, "line 4 is not valid JSON: Expecting value at column 6", "line 5 is not valid JSON", 2],
        ),
        ('{"a": \n{"a": 2}\n', ["line 1 is not valid JSON", 2]),
        ("{'a': None}\n", ["single quotes, as Python prints a dict; write the rows with json.dumps"]),
        ('{"a": None}\n{"a": 2}', ["Python's None", 2]),
        ('{"a": 1}\n{"a": 2} // note', [1, "a comment, which JSON has not"]),
        ('{"a": 1,}\n{"a": 2}', ["a comma before the closing bracket", 2]),
        ('{a: 1}\n{"a": 2}', ["a key without double quotes", 2]),
        ('{"a": "x\ty"}\n{"a": 2}', ["a line break or control character inside a text", 2]),
    ],
)
def test_a_broken_row_is_bad_and_the_next_is_read(tmp_path, monkeypatch, size, text, found):
    monkeypatch.setattr("trainer.data.json_rows._READ_CHARACTERS", size)
    rows = reasons(read_text(tmp_path, "a.json", text))
    assert len(rows) == len(found), rows
    for row, wanted in zip(rows, found, strict=True):
        if isinstance(wanted, int):
            assert row == {"a": wanted}
        else:
            assert wanted in row


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[")
        for i in range(4_000):
            file.write(("," if i else "") + json.dumps({"instruction": "x" * 5000, "output": str(i)}))
        file.write("]")
    assert path.stat().st_size > 20e6
    rows = read_source(SourceConfig(path=str(path)))
    tracemalloc.start()
    count = sum(1 for _ in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4_000
    assert peak < 12e6


def test_a_row_of_ten_megabytes(tmp_path):
    rows = [ROWS[0], {"instruction": "x" * 10_000_000, "output": "y"}, ROWS[1]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("instruction,output\n" + "x" * 10_000_000 + ",y\n")
    assert read(tmp_path / "a.json") == rows
    assert len(read(tmp_path / "a.csv")[0]["instruction"]) == 10_000_000


def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "good"}\n{"a": "caf\xe9"}\n{"a": "\\ud800"}')
    good, latin, lone = (row["a"] for row in read(tmp_path / "a.jsonl"))
    check_text(good, "a")
    for text, position in ((latin, 3), (lone, 0)):
        with pytest.raises(BadRowError, match=f"a: is not valid UTF-8 at position {position}"):
            check_text(text, "a")


LISTS = b'{"train": [{"a": 1}], "test": [{"a": 2}]}'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"[" * 100_000, "a.json, line 1 is not valid JSON: maximum recursion depth"),
        ("a.json", b"[{'a': 1}, {'a': 2}]", "single quotes, as Python prints a dict.*next row begins can't be known"),
        ("a.json", LISTS, r"one object with several lists of rows: train, test. .* python -c"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "cannot be read: .*cut off"),
        ("a.jsonl.zst", pa.compress(b'{"a": 1}\n' * 1000, "zstd", asbytes=True)[:-4], "cannot be read: .*cut off"),
        ("a.parquet", b"PAR1 no parquet", "a.parquet cannot be read"),
        ("a.arrow", b"ARROW1\0\0 no arrow", "a.arrow cannot be read"),
        ("a.csv", b'a,b\n"1,2\n3,4\n', "lines 2 to 3: unexpected end of data: a quote opens there"),
        ("a.csv", b"a,b,b\n1,2,3\n", "the header has 'b' in columns 2 and 3: rename or delete"),
        ("a.csv", b"a,,c\n1,2,3\n", "column 2 has no name in the header"),
        ("a.txt", b"hello", r"none of .json, .jsonl.* and it begins with 'hello', which is no JSON"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS.*git lfs pull"),
        ("a.csv", b"PK\x03\x04....", "an Excel workbook: .*save its sheet as CSV"),
        ("a.json", b"\n<!DOCTYPE html><html>", "a web page"),
        ("a.parquet", b"\x80\x04\x95", "a Python pickle, which can run code"),
    ],
    ids=short,
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    with pytest.raises(TrainerError, match=words):
        read_text(tmp_path, name, content)


def test_csv_rows_that_do_not_fit_the_header(tmp_path):
    found = read_text(tmp_path, "a.csv", 'a,b\n1,2\n1,2,3\n4\n"5"x,6\n"7\n7",8\n9\n"1,2\n')
    assert reasons(found) == [
        {"a": "1", "b": "2"},
        "line 3: 3 cells, the header names 2 columns; a cell with ',' or a line break in it needs quotes",
        "line 4: 1 cells, the header names 2 columns; a cell with ',' or a line break in it needs quotes",
        "line 5: ',' expected after '\"'",
        {"a": "7\n7", "b": "8"},
        "line 8: 1 cells, the header names 2 columns; a cell with ',' or a line break in it needs quotes",
        "line 9: unexpected end of data",
    ]


TABLE = {
    "text": pa.array(["a", None]),
    "large": pa.array(["b", "c"], pa.large_string()),
    "coded": pa.array(["d", "d"]).dictionary_encode(),
    "empty": pa.array([float("nan"), 1.5]),
    "short": pa.array([0.1, float("nan")], pa.float32()),
    "money": pa.array([Decimal("1.10"), None]),
    "day": pa.array([date(2026, 1, 2), None]),
    "when": pa.array([1, None], pa.timestamp("ns")),
    "raw": pa.array([b"caf\xc3\xa9", b"\xff"]),
    "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
    "chat": pa.array([{"from": ["human", "gpt"], "value": ["q", "a"]}, None]),
    "tools": pa.array([{"type": ["function"], "function": {"name": ["f"]}}, None]),
    "plain": pa.array([{"tags": ["x"], "n": float("nan")}, None]),
    "__index_level_0__": pa.array([7, 8]),
}
READ = [
    {"text": "a", "large": "b", "coded": "d", "empty": None, "short": 0.1, "money": "1.10", "day": "2026-01-02",
     "when": "1970-01-01T00:00:00.000000001", "raw": "café", "map": {"k": 1},
     "chat": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
     "tools": [{"type": "function", "function": {"name": "f"}}], "plain": {"tags": ["x"], "n": None}},
    {"text": None, "large": "c", "coded": "d", "empty": 1.5, "short": None, "money": None, "day": None, "when": None,
     "raw": "\udcff", "map": {}, "chat": None, "tools": None, "plain": None},
]  # fmt: skip


def write_arrow(path, table, new):
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", lambda path, table: pq.write_table(table, path)),
        ("parquet.jsonl", lambda path, table: pq.write_table(table, path)),
        ("file.arrow", lambda path, table: write_arrow(path, table, pa.ipc.new_file)),
        ("stream.arrow", lambda path, table: write_arrow(path, table, pa.ipc.new_stream)),
        ("a.feather", lambda path, table: pa.feather.write_feather(table, path)),
    ],
)
def test_a_table_gives_values_of_json(tmp_path, name, write):
    write(tmp_path / name, pa.table(TABLE))
    rows = read(tmp_path / name)
    assert rows == READ
    json.dumps(rows, allow_nan=False)


def test_a_packed_table_is_unpacked(tmp_path):
    pq.write_table(pa.table(TABLE), tmp_path / "a.parquet")
    assert read_text(tmp_path, "b.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes())) == READ


def test_a_table_cell_that_is_no_json_is_one_bad_row(tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"x": [1.0, float("inf")]}), tmp_path / "a.parquet")
    write_arrow(tmp_path / "b.arrow", pa.table({"t": broken}), pa.ipc.new_file)
    assert reasons(read(tmp_path / "a.parquet")) == [{"x": 1.0}, "x: is inf, which JSON has no number for"]
    assert reasons(read(tmp_path / "b.arrow")) == [{"t": "a"}, "a text in it is not valid UTF-8"]


def test_a_table_with_a_name_twice_is_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(TrainerError, match="the header has 'a' in columns 1 and 2"):
        read(tmp_path / "a.parquet")


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "Instructions.json").write_text("[]")
    with pytest.raises(TrainerError, match=r"no file or folder .*/instruction\.json; near it: .*/Instructions\.json$"):
        read(tmp_path / "instruction.json")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.docx").write_text("x")
    with pytest.raises(TrainerError, match=r"sub holds no file of rows \(.json, .* it holds notes.docx"):
        read(tmp_path / "sub")


def test_a_name_that_is_nowhere_may_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert is_hub_id("owner/name")
    assert not is_hub_id("own")
    assert not is_hub_id("rows.jsonl")
    assert f"there is no file or folder owm/rows in {tmp_path}; near it: own" in missing(Path("owm/rows"))


# --- splits ---------------------------------------------------------------------------------------


def fill(folder, counts):
    """Write Alpaca rows into files; a name's own rows tell it."""
    for name, number in counts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"instruction": f"{name} {row}", "output": "x"} for row in range(number)]
        (folder / name).write_text(lines(rows))
    return folder


def split(tmp_path, *, sources=None, **options):
    """The rows of each split, as the words that tell their file."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    data = DataConfig.model_validate({"template": "chatml", **({"sources": sources} if sources else {}), **options})
    collected = collect(data, 0, work / "rows.jsonl", Rejected(work / "rejected.jsonl", skip=False))
    found = assign_splits(collected, data.split, 0)
    texts = {
        name: [json.loads(line)["messages"][0]["content"].split()[0] for line in collected.lines(rows)]
        for name, rows in found.items()
    }
    return texts, collected.notes


HELD = [
    {"train.jsonl": 20, "test.jsonl": 4},
    {"train/a.jsonl": 12, "train/b.jsonl": 8, "eval/a.jsonl": 4},
    {"data/train-00000-of-00002.jsonl": 12, "data/train-00001-of-00002.jsonl": 8, "data/test-00000-of-00001.jsonl": 4},
    {"training_set.json": 20, "holdout.jsonl": 4},
    {"x-train.jsonl": 20, "x-test.jsonl": 4, "._x-train.jsonl": 9, "_SUCCESS": 1, "dataset_info.json": 1},
]


@pytest.mark.parametrize("files", HELD)
def test_a_folders_splits_are_taken(tmp_path, files):
    folder = fill(tmp_path / "set", files)
    texts, notes = split(tmp_path, path=str(folder))
    kept = {name: number for name, number in files.items() if number > 1 and not name.startswith((".", "_"))}
    test = {name for name in kept if role_of(name.rpartition("/")[0] or name.partition(".")[0]) == "test"} or {
        "data/test-00000-of-00001.jsonl"
    }
    assert sorted(texts["test"]) == sorted(name for name in test for _ in range(4))
    assert len(texts["train"]) + len(texts["validation"]) == 20
    assert len(texts["validation"]) == 1  # 0.05 of 0.90
    assert not test & {*texts["train"], *texts["validation"]}
    assert "its own splits are taken: train (train), test (test); validation is cut from train" in notes[0]


def test_all_three_splits_of_a_folder(tmp_path):
    folder = fill(tmp_path / "set", {"train.jsonl": 5, "dev.jsonl": 2, "test.jsonl": 3})
    texts, _ = split(tmp_path, path=str(folder))
    assert {name: set(rows) for name, rows in texts.items()} == {
        "train": {"train.jsonl"},
        "validation": {"dev.jsonl"},
        "test": {"test.jsonl"},
    }
    assert [len(rows) for rows in texts.values()] == [5, 2, 3]


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (HELD[0], {"split": {"train": 0.8, "validation": 0.1, "test": 0.1}}, r"set data.split: \{type: auto\}"),
        (HELD[0], {"split": {"type": "column"}}, r"several splits: test, train: set data.split: \{type: auto\}"),
        ({"train.jsonl": 5, "more.jsonl": 5}, {}, "files whose names say no split, train: their names do not say"),
        ({"validation.jsonl": 5, "test.jsonl": 5}, {}, "their names do not say which one is train"),
        ({"train/test.jsonl": 5, "train/a.jsonl": 5}, {}, "several splits: train, test or train"),
        (
            {"train_a-00000-of-00001.jsonl": 5, "train_b-00000-of-00001.jsonl": 5, "test-00000-of-00001.jsonl": 5},
            {},
            "several splits: test, train_a, train_b: their names do not say .* each once.* hub_split: train_a",
        ),
    ],
)
def test_splits_are_never_pooled_in_silence(tmp_path, files, options, words):
    folder = fill(tmp_path / "set", files)
    with pytest.raises(TrainerError, match=words):
        split(tmp_path, path=str(folder), **options)


@pytest.mark.parametrize(
    ("hub_split", "options", "sizes", "test"),
    [
        ("train_a", {}, (17, 1, 2), {"train_a-00000-of-00001.jsonl"}),
        ("test", {"split": {"train": 0.5, "validation": 0.25, "test": 0.25}}, (4, 2, 2), {"test.jsonl"}),
        ("train_a+train_b+test", {}, (26, 1, 8), {"test.jsonl"}),
        ("train_a+train_b", {}, (24, 1, 2), None),
        ("all", {"split": {"train": 0.6, "validation": 0.2, "test": 0.2}}, (21, 7, 7), None),
    ],
)
def test_hub_split_chooses_a_folders_splits(tmp_path, hub_split, options, sizes, test):
    files = {"train_a-00000-of-00001.jsonl": 20, "train_b-00000-of-00001.jsonl": 7, "test.jsonl": 8}
    folder = fill(tmp_path / "set", files)
    texts, _ = split(tmp_path, sources=[{"path": str(folder), "hub_split": hub_split}], **options)
    assert tuple(map(len, texts.values())) == sizes
    assert test is None or set(texts["test"]) == test
    with pytest.raises(TrainerError, match="has no split 'tset'; it has test, train_a, train_b: set"):
        split(tmp_path, sources=[{"path": str(folder), "hub_split": "tset"}])


def test_a_folder_without_splits_is_read_in_order(tmp_path):
    fill(tmp_path, {"b/2.jsonl": 2, "1.json": 1, ".hidden.json": 1, "__pycache__/x.json": 1, "metadata.jsonl": 1})
    (tmp_path / "README.md").write_text("not rows")
    (tmp_path / "sheet.xlsx").write_text("not rows")
    notes = []
    found = list(read_source(SourceConfig(path=str(tmp_path)), notes.append))
    assert [(file.rpartition("/")[2], number) for file, number, _ in found] == [
        ("1.json", 1),
        ("2.jsonl", 1),
        ("2.jsonl", 2),
    ]
    assert notes == [f"{tmp_path}: not read, as their names end like no file of rows: {tmp_path / 'sheet.xlsx'}"]
    assert splits_of(SourceConfig(path=str(tmp_path))) == [""]


def test_sources_with_and_without_splits(tmp_path):
    fill(tmp_path, {"set/train.jsonl": 10, "set/test.jsonl": 3, "rows.jsonl": 20})
    sources = [{"path": str(tmp_path / "rows.jsonl")}, {"path": str(tmp_path / "set"), "num_rows": 6}]
    texts, _ = split(tmp_path, sources=sources)
    assert [texts[name].count("rows.jsonl") for name in texts] == [17, 1, 2]
    assert [len(texts[name]) - texts[name].count("rows.jsonl") for name in texts] == [5, 1, 3]


def test_a_folder_that_the_datasets_library_saved(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"left by map")
    assert read(tmp_path / "one") == ROWS
    DatasetDict({"train": Dataset.from_list(ROWS), "rest": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "two")
    assert splits_of(SourceConfig(path=str(tmp_path / "two"))) == ["train", "rest"]
    assert read(tmp_path / "two", hub_split="rest") == ROWS[:1]
    with pytest.raises(TrainerError, match="has no split 'tset'; it has train, rest"):
        read(tmp_path / "two", hub_split="tset")


@pytest.mark.parametrize(
    ("num_rows", "words"),
    [
        (1, "1 rows give 1 train, 0 validation, 0 test. These shares need 19 rows. Use more rows: three at the least"),
        (
            3,
            r"leaves validation and test without a row.* need 19 rows.* set data.split: \{.*train: 0.32, validation: 0",
        ),
        (10, r"leaves validation without a row: 10 rows give 9 train, .* train: 0.8, validation: 0.1, test: 0.1"),
    ],
)
def test_too_few_rows_for_the_splits(tmp_path, num_rows, words):
    fill(tmp_path, {"rows.jsonl": num_rows})
    with pytest.raises(TrainerError, match=words) as refusal:
        split(tmp_path, path=str(tmp_path / "rows.jsonl"))
    if num_rows > 1:  # the way out works
        shares = dict(part.split(": ") for part in str(refusal.value).rpartition("{")[2].rstrip("}").split(", "))
        texts, _ = split(tmp_path, path=str(tmp_path / "rows.jsonl"), split=shares)
        assert all(texts.values())


def test_only_the_rows_asked_for_are_parsed(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}, broken')
    rows = read_source(SourceConfig(path=str(tmp_path / "a.json")))
    assert [row for *_, row in islice(rows, 2)] == [{"a": 1}, {"a": 2}]
