"""The look at the first rows, the chat template and the tokenizer, by what prepare would refuse or leave out."""

import json
import subprocess
import sys

import pytest

from tests.trainer.data.chat_templates import make_tokenizer
from trainer.config import TrainerConfig
from trainer.first_look import first_look

SCRATCH = {"max_position_embeddings": 512}


def rows(number=40, **changed):
    """Rows that can be used, but for fields of the first one."""
    made = [{"instruction": f"What is {i} + {i}?", "output": f"It is {2 * i}."} for i in range(number)]
    made[0] |= changed
    return made


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(path)


def configure(tmp_path, made=(), model=None, sources=None, **data):
    sources = sources or [{"path": write(tmp_path / "rows.jsonl", made)}]
    data = {"sources": sources, "sequence_length": 256} | data
    return TrainerConfig.model_validate({"model": model or {"from_scratch": SCRATCH}, "data": data})


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    make_tokenizer("zephyr").save_pretrained(folder)
    return folder


def of_base(folder):
    return {"name_or_path": str(folder)}


def test_rows_that_are_all_right(tmp_path, base):
    config = configure(tmp_path, rows(), of_base(base), template="chat")
    assert first_look(config, base) == {"problems": [], "notes": ["all 40 rows were looked at: alpaca"]}
    assert first_look(configure(tmp_path, rows(300)), None) == {
        "problems": [],
        "notes": ["the first 100 rows were looked at: alpaca"],
    }


@pytest.mark.parametrize(
    ("changed", "data", "words"),
    [
        ({"output": ""}, {}, "data: 1 of the 40 rows cannot be used (fix them, or set data.on_bad_row: skip"),
        ({"output": ""}, {}, "rows.jsonl, row 1: output: is empty"),
        ({"output": "So </s> it is"}, {}, "row 1: messages[1].content: spells the special token '</s>'"),
        ({"output": "a" * 300}, {"overlong": "fail"}, "row 1 has 3"),
        ({}, {"format": "columns", "columns": {"prompt": "q", "response": "output"}}, "q: is missing"),
        ({}, {"split": {"type": "column"}}, "split: is missing"),
    ],
)
def test_what_prepare_would_refuse_is_a_problem(tmp_path, base, changed, data, words):
    source = {"path": write(tmp_path / "rows.jsonl", rows(**changed))}
    source |= {key: data.pop(key) for key in ("format", "columns") if key in data}
    config = configure(tmp_path, model=of_base(base), sources=[source], template="chat", **data)
    assert words in "\n".join(first_look(config, base)["problems"])


@pytest.mark.parametrize(
    ("changed", "data", "words"),
    [
        ({"output": ""}, {"on_bad_row": "skip"}, "1 of the 40 rows cannot be used and will be left out"),
        ({"output": "So </s>"}, {"on_bad_row": "skip"}, "1 of the 40 rows cannot be used and will be left out"),
        ({"output": "a" * 300}, {}, "1 of them would be dropped: longer than sequence_length"),
        ({"output": "a" * 300}, {"overlong": "truncate_response"}, "1 of them would be cut: truncate_response"),
        ({"output": "a" * 300}, {}, "the longest of them has 3"),
        ({"output": "So </s> it is"}, {"special_tokens": "as_text"}, "1 of them: the text spells a special token"),
    ],
)
def test_what_becomes_of_rows_is_a_note(tmp_path, base, changed, data, words):
    found = first_look(configure(tmp_path, rows(**changed), of_base(base), template="chat", **data), base)
    assert found["problems"] == []
    assert words in "\n".join(found["notes"])


def test_each_source_has_its_problem_named(tmp_path):
    no_form = write(tmp_path / "a.jsonl", [{"text": "Hello"}])
    empty = write(tmp_path / "b.jsonl", rows(3, output=""))
    found = first_look(configure(tmp_path, sources=[{"path": no_form}, {"path": empty}]), None)["problems"]
    assert len(found) == 2
    assert "a.jsonl: the first 1 rows have no known form (fields: text)" in found[0]
    assert "b.jsonl, row 1: output: is empty" in found[1]


def test_what_only_later_rows_show_is_left_to_prepare(tmp_path):
    made = rows(300)
    made[150]["output"] = ""
    source = {"path": write(tmp_path / "rows.jsonl", made), "num_rows": 250}
    config = configure(tmp_path, sources=[source], split={"train": 0.998, "validation": 0.001, "test": 0.001})
    assert first_look(config, None)["problems"] == []


def test_where_all_rows_are_seen_too_few_are_refused(tmp_path):
    assert "data.split leaves validation" in first_look(configure(tmp_path, rows(3)), None)["problems"][0]
    source = {"path": write(tmp_path / "rows.jsonl", rows(40)), "num_rows": 50}
    found = first_look(configure(tmp_path, sources=[source]), None)["problems"]
    assert found == [f"data: num_rows of {source['path']} is 50, but it has 40 usable rows"]


def test_rows_that_cannot_be_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text("no JSON\n" * 300)
    (found,) = first_look(configure(tmp_path, sources=[{"path": str(tmp_path / "rows.jsonl")}]), None)["problems"]
    assert "100 of the first 100 rows cannot be used" in found
    assert "line 1 is not valid JSON" in found
    assert "first-look-" not in found


def test_an_id_that_two_sources_have(tmp_path):
    sources = [{"path": write(tmp_path / name, rows(id="same"))} for name in ("a.jsonl", "b.jsonl")]
    (found,) = first_look(configure(tmp_path, sources=sources), None)["problems"]
    assert "1 of the 80 rows cannot be used" in found
    assert "b.jsonl, row 1: id: 'same' is the id of" in found


def test_a_field_that_nothing_reads_is_a_note(tmp_path):
    found = first_look(configure(tmp_path, rows(wisdom="yes")), None)
    assert found["problems"] == []
    assert "the field wisdom is not read: 1 rows, the first" in found["notes"][1]
    found = first_look(configure(tmp_path, rows(wisdom="yes"), unknown_fields="fail"), None)
    assert "rows have fields that nothing reads" in found["problems"][0]


def test_bad_rows_are_not_counted_as_too_few(tmp_path):
    (found,) = first_look(configure(tmp_path, rows(20, output="")), None)["problems"]
    assert "1 of the 20 rows cannot be used" in found
    (found,) = first_look(configure(tmp_path, rows(19, output=""), on_bad_row="skip"), None)["problems"]
    assert "18 rows give 17 train, 0 validation, 1 test" in found


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_first_rows_that_are_all_bad(tmp_path, policy):
    made = [row | {"output": ""} for row in rows(120)] + rows(50)
    found = first_look(configure(tmp_path, made, on_bad_row=policy), None)
    told = found["problems"] if policy == "fail" else found["notes"]
    assert "100 of the first 100 rows cannot be used" in told[0]
    assert len(found["problems"]) == (policy == "fail")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for message in messages %}{{ message.content }}", "template can't be used"),
        ("{{ raise_exception('only French') }}", "only French"),
        (
            "{% for m in messages %}{% if '0 + 0' in m.content %}{{ raise_exception('no sums of nothing') }}{% endif %}"
            "{{ m.content + eos_token }}{% endfor %}",
            "rows.jsonl, row 1: messages: the chat template refuses the conversation: no sums of nothing",
        ),
        ("", "the tokenizer has no chat template"),
    ],
)
def test_a_chat_template_that_cannot_be_used(tmp_path, base, template, words):
    (base / "chat_template.jinja").write_text(template)
    config = configure(tmp_path, rows(), of_base(base), template="chat")
    assert words in "\n".join(first_look(config, base)["problems"])


def test_a_chat_template_that_a_model_from_scratch_has_not(tmp_path):
    found = first_look(configure(tmp_path, rows(), template="chat"), None)["problems"]
    assert "a model from scratch has no chat template of its own" in found[0]


def test_a_hub_id_that_is_like_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "rows").mkdir(parents=True)
    config = configure(tmp_path, model={"name_or_path": "owner/name"}, sources=[{"path": "data/row"}])
    note = first_look(config, None)["notes"][0]
    assert note.startswith("data/row is taken as a hub id")
    assert note.endswith("; near it: data/rows")


def test_what_is_not_on_this_machine_is_not_looked_at(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(tmp_path, model={"name_or_path": "owner/name"}, sources=[{"path": "owner/rows"}])
    assert first_look(config, None) == {
        "problems": [],
        "notes": [
            "owner/rows is taken as a hub id: prepare downloads its rows, they were not looked at",
            "owner/name is taken as a hub id: it is not in this machine's cache, its chat template and tokenizer were "
            "not looked at",
        ],
    }
    (base / "tokenizer_config.json").unlink()
    found = first_look(configure(tmp_path, rows(), of_base(base)), base)
    assert "is read by prepare alone: it was not looked at" in found["notes"][1]


IN_A_NEW_PROCESS = """
import json, sys
from pathlib import Path
from trainer.config import TrainerConfig
from trainer.errors import TrainerError
from trainer.first_look import first_look
from trainer.prepare import prepare

bad, good = (TrainerConfig.model_validate(json.loads(text)) for text in sys.argv[1:3])
base = Path(good.model.name_or_path)

def loaded():
    return [name for name in ("transformers", "torch", "datasets", "scipy", "ray") if name in sys.modules]

found = {}
try:
    prepare(bad, Path(sys.argv[3]))
except TrainerError as error:
    found["prepare"] = [str(error), loaded()]
found["rows"] = [first_look(bad, base)["problems"][0], loaded()]
found["template"] = [first_look(good, base)["problems"][0], loaded()]
print(json.dumps(found))
"""


def test_faults_are_found_before_heavy_libraries(tmp_path, base, repository):
    (base / "chat_template.jinja").write_text("{{ raise_exception('only French') }}")
    configs = [
        configure(tmp_path, sources=[{"path": write(tmp_path / name, made)}], model=of_base(base), template="chat")
        for name, made in (("bad.jsonl", rows(output="")), ("good.jsonl", rows()))
    ]
    texts = [config.model_dump_json() for config in configs]
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, *texts, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    for where in ("prepare", "rows"):
        assert "bad.jsonl, row 1: output: is empty" in found[where][0]
        assert found[where][1] == []
    assert "only French" in found["template"][0]
    assert found["template"][1] == ["transformers"]
