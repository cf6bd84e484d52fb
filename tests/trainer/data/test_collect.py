"""Files of rows -> checked conversations: which rows are left out, how that is reported, and what nothing reads."""

import json

import pytest

from trainer.config import DataConfig
from trainer.data.collect import Rejected, collect, parse_line
from trainer.data.conversation import BadRowError
from trainer.data.fields import FieldNotes, unknown_lines
from trainer.errors import TrainerError

GOOD = {"instruction": "Q", "output": "A"}
CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}


def run(tmp_path, lines, *, on_bad_row="skip", **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    config = DataConfig(path=path, on_bad_row=on_bad_row, **data)
    rejected = Rejected(tmp_path / "rejected.jsonl", skip=on_bad_row == "skip")
    return collect(config, 0, tmp_path / "collected", rejected), rejected


def rows_of(collected):
    return [parse_line(line).row for line in collected.lines(range(collected.num_rows))]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not valid JSON"),
        ([1], "a row must be an object"),
        ({"instruction": "Q"}, "output: is missing"),
        (CHAT, "this row is messages, and the source is read as alpaca"),
        ({"chosen": "a", "rejected": "b"}, "this is preference data"),
        ({"q": 1}, "instruction: is missing; the row has q"),
        (GOOD | {"id": "1", "part": "train"}, "'1' is the id of .*row 1, too"),
        (GOOD | {"part": "dev"}, "part: is 'dev', which is none of train, validation, test"),
        (GOOD | {"part": None}, "part: must be text, it is null"),
        (GOOD | {"response": "B"}, "output and response, and they differ"),
    ],
)
def test_every_kind_of_bad_row_is_skipped_or_reported(tmp_path, bad, reason):
    lines = [GOOD | {"id": f"{number}", "part": "train"} for number in (1, 2, 3)]
    lines.insert(2, bad)
    split = {"type": "column", "column": "part"}
    collected, rejected = run(tmp_path, lines, split=split)
    assert rows_of(collected) == [1, 2, 4]
    assert rejected.counts == {"bad row": 1}
    with pytest.raises(
        TrainerError, match=rf"rows.jsonl, row 3: .*{reason}.*; fix the row, or set data.on_bad_row: skip"
    ):
        run(tmp_path, lines, split=split, on_bad_row="fail")


@pytest.mark.parametrize("on_bad_row", ["skip", "fail"])
def test_reasons_are_not_lost_where_no_row_is_left(tmp_path, on_bad_row):
    with pytest.raises(TrainerError, match=r"no row that can be used:\n.*not valid JSON(.|\n)*rejected.jsonl"):
        run(tmp_path, ['{"a": }'] * 2, on_bad_row=on_bad_row)
    with pytest.raises(TrainerError, match=r"no row that can be used:\n.*output: is empty \(2 rows, also 2\)"):
        run(tmp_path, [GOOD | {"output": ""}] * 2, on_bad_row=on_bad_row)


def test_rows_after_many_unreadable_ones_are_read(tmp_path):
    collected, rejected = run(tmp_path, ['{"a": }'] * 150 + [GOOD])
    assert (rows_of(collected), rejected.counts) == ([151], {"bad row": 150})


def test_equal_reasons_are_one_line_the_most_frequent_first(tmp_path):
    rejected = Rejected(tmp_path / "rejected.jsonl", skip=False)
    for row in range(1, 8):
        rejected.add(BadRowError(f"holds {row} 'x{row}'", "a").at("f", row))
    for row in (3, 4):
        rejected.add(BadRowError("is empty", f"messages[{row}]").at("f" if row == 3 else "g", row))
    for letter in "abcdefghijklmnopqrstuvwxyz":
        rejected.add(BadRowError(f"reason {letter}").at("h", 1))
    with pytest.raises(TrainerError) as told:
        rejected.check()
    lines = str(told.value).splitlines()
    assert lines[0] == "35 rows cannot be used:"
    assert lines[1] == "  for example f, row 1: a: holds 1 'x1' (7 rows, also 2, 3, 4, 5, …)"
    assert lines[2] == "  for example f, row 3: messages[3]: is empty (2 rows, also g, row 4)"
    assert lines[3:5] == ["  h, row 1: reason a", "  h, row 1: reason b"]
    assert lines[-2:] == [
        "  8 rows for 8 other reasons",
        f"All of them are listed in {tmp_path}/rejected.jsonl. Fix them, or set data.on_bad_row: skip to leave such "
        "rows out",
    ]


def test_unknown_fields_warn_fail_or_are_ignored(tmp_path):
    lines = [GOOD, GOOD | {"mood": "x"}, GOOD | {"mood": "y", "source": "web"}]
    collected, _ = run(tmp_path, lines)
    assert {name: use["rows"] for name, use in collected.fields.unknown.items()} == {"mood": 2}
    assert collected.fields.unknown["mood"]["first"].endswith("rows.jsonl, row 2")
    with pytest.raises(
        TrainerError, match=r"mood is not read: 2 rows, the first .*row 2\n.*data.metadata_fields: \[mood\]"
    ):
        run(tmp_path, lines, unknown_fields="fail")
    assert run(tmp_path, lines, unknown_fields="fail", metadata_fields=("mood",))[0].num_rows == 3
    assert run(tmp_path, lines, unknown_fields="ignore")[0].num_rows == 3


def test_the_configuration_decides_how_messages_are_read(tmp_path):
    turns = [{"role": "customer", "content": word} for word in "ab"] + [{"role": "assistant", "content": 0.5}]
    collected, _ = run(
        tmp_path,
        [{"messages": turns}],
        roles={"Customer": "user"},
        repeated_roles="join",
        numbers="shortest",
    )
    (line,) = collected.lines([0])
    assert [message["content"] for message in parse_line(line).conversation.messages] == ["a\n\nb", "0.5"]


def test_a_fraction_is_learned_as_it_is_spelled(tmp_path):
    collected, _ = run(tmp_path, ['{"instruction": 1e3, "output": 0.50}'])
    (line,) = collected.lines([0])
    assert [message["content"] for message in parse_line(line).conversation.messages] == ["1e3", "0.50"]


def test_field_names_that_are_data_do_not_grow_without_a_bound():
    notes = FieldNotes()
    for number in range(1_500):
        notes.add([f"field-{number}"], [], "rows.jsonl", number)
    assert len(notes.unknown) == 1_001
    assert notes.unknown["(others)"]["rows"] == 500
    lines = unknown_lines(notes.unknown)
    assert len(lines) == 21
    assert lines[-1] == "981 more fields are not read"
