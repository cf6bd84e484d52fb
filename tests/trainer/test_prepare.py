"""The prepare stage, whole: what it writes, what it counts, and what it refuses."""

import io
import json
import re
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.data.chat_templates import TEMPLATES, make_tokenizer
from tests.trainer.data.thinking_templates import STRING_ARGUMENTS, thinking_tokenizer
from trainer.config import TrainerConfig
from trainer.data.collect import Line
from trainer.data.conversation import Conversation
from trainer.data.encode import Settings, audit, encode_chunk
from trainer.data.renderer import Segment
from trainer.data.shards import PackedSplit
from trainer.data.templates import set_template
from trainer.data.tokens import Encoder
from trainer.errors import TrainerError
from trainer.prepare import prepare, show

SCRATCH = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_layers": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "max_position_embeddings": 512,
}


def make_rows(num_rows, kinds=4):
    words = [f"{one}{two}" for one in "bdfgklmnprst" for two in "aeiou"]
    rng = np.random.default_rng(0)
    return [
        {
            "instruction": f"{' '.join(rng.choice(words, 12))}?",
            "output": " ".join(rng.choice(words, rng.integers(2, 12))),
            "category": f"kind {i % kinds}",
            "id": f"r{i}",
        }
        for i in range(num_rows)
    ]


def write(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def configure(path, model=None, seed=0, **data):
    asked = {"sources": data.pop("sources")} if "sources" in data else {"path": path}
    return TrainerConfig.model_validate(
        {
            "seed": seed,
            "model": model or {"from_scratch": SCRATCH},
            "data": {**asked, "sequence_length": 256, **data},
        }
    )


def local_base(folder, name="zephyr"):
    """A Hugging Face folder with a tokenizer alone, which is all that prepare reads of a base."""
    make_tokenizer(name).save_pretrained(folder)
    return {"name_or_path": str(folder)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return local_base(tmp_path_factory.mktemp("base"))


def read_test(run):
    return [json.loads(line) for line in (run / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()]


def ids(run):
    """The row ids of each split."""
    found = {}
    for name in ("train", "validation"):
        split = PackedSplit.open(run / "data" / name)
        found[name] = [split.row_id(row) for row in range(split.num_rows)]
    return found | {"test": [row["id"] for row in read_test(run)]}


def test_a_run_from_scratch(tmp_path):
    rows = make_rows(100)
    config = configure(write(tmp_path / "rows.json", rows))
    summary = prepare(config, tmp_path / "run")
    assert summary == json.loads((tmp_path / "run" / "data" / "summary.json").read_text())
    assert {name: split["rows"] for name, split in summary["splits"].items()} == {
        "train": 85,
        "validation": 5,
        "test": 10,
    }
    assert (summary["format"], summary["template"], summary["dropped"]) == ("alpaca", "alpaca", {})
    found = ids(tmp_path / "run")
    assert sorted(chain(*found.values())) == sorted(row["id"] for row in rows)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer")
    by_id = {row["id"]: row for row in rows}
    split = PackedSplit.open(tmp_path / "run" / "data" / "train")
    for number, row_id in enumerate(found["train"]):
        input_ids, labels = split.row_tokens(number)
        assert tokenizer.decode(labels[labels != -100]) == by_id[row_id]["output"] + "<|endoftext|>"
        asked = [{"role": "user", "content": by_id[row_id]["instruction"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert input_ids[: len(prompt)].tolist() == prompt
        assert np.all(labels[: len(prompt)] == -100)
    for row in read_test(tmp_path / "run"):
        assert row["reference"] == by_id[row["id"]]["output"]
        assert row["category"] == by_id[row["id"]]["category"]
        assert (
            tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
            == row["prompt_token_ids"]
        )
        assert tokenizer.decode(row["prompt_token_ids"]) == row["prompt"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["base", "data"]


def test_the_scratch_tokenizer_learns_from_train_rows_alone(tmp_path):
    rows = make_rows(60)
    for row in rows[50:]:
        row["output"] = "zyzyzyzy " * 5
    for number, row in enumerate(rows):
        row["split"] = "train" if number < 50 else "validation" if number < 55 else "test"
    prepare(configure(write(tmp_path / "rows.json", rows), split={"type": "column"}), tmp_path / "run")
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer").get_vocab()
    assert not [token for token in vocabulary if "zy" in token]
    assert [token for token in vocabulary if "struction" in token]
    found = ids(tmp_path / "run")
    assert (found["validation"], found["test"]) == ([f"r{i}" for i in range(50, 55)], [f"r{i}" for i in range(55, 60)])


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_processes(tmp_path, base):
    path = write(tmp_path / "rows.json", make_rows(1200))
    for name, options in (("one", {}), ("two", {"num_processes": 2}), ("other seed", {"seed": 1})):
        prepare(configure(path, base, **options), tmp_path / name)

    def content(name):
        files = sorted(file for file in (tmp_path / name / "data").rglob("*") if file.is_file())
        return {file.name: file.read_bytes() for file in files if file.name != "summary.json"}

    assert content("one") == content("two")
    assert content("one") != content("other seed")


def test_rows_are_stratified_by_category_on_request(tmp_path, base):
    rows = make_rows(400)
    for row in rows[:20]:
        row["category"] = "rare"
    path = write(tmp_path / "rows.json", rows)
    prepare(configure(path, base, split={"stratify": True}), tmp_path / "run")
    shares = {}
    for row in read_test(tmp_path / "run"):
        shares[row["category"]] = shares.get(row["category"], 0) + 1
    assert shares["rare"] == 2
    assert sum(shares.values()) == 40
    assert all(9 <= count <= 11 for kind, count in shares.items() if kind != "rare")


def test_validation_and_test_files_of_their_own(tmp_path, base):
    rows = make_rows(30)
    split = {
        "type": "files",
        "validation": str(write(tmp_path / "v.json", rows[20:25])),
        "test": str(write(tmp_path / "t.json", rows[25:])),
    }
    prepare(configure(write(tmp_path / "rows.json", rows[:20]), base, split=split), tmp_path / "run")
    found = ids(tmp_path / "run")
    assert [len(found[name]) for name in ("train", "validation", "test")] == [20, 5, 5]
    assert found["test"] == [f"r{i}" for i in range(25, 30)]


def test_several_sources_with_weights_limits_and_categories(tmp_path, base):
    rows = make_rows(60)
    for row in rows:
        del row["category"]
    messages = [
        {
            "id": row["id"],
            "messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": "yes"}],
        }
        for row in rows[40:]
    ]
    sources = [
        {"path": str(write(tmp_path / "a.json", rows[:40])), "weight": 2.5, "category": "a"},
        {"path": str(write(tmp_path / "b.json", messages)), "num_rows": 10, "category": "b"},
    ]
    split = {"train": 0.6, "validation": 0.2, "test": 0.2}
    summary = prepare(configure(None, base, sources=sources, split=split), tmp_path / "run")
    assert [source["format"] for source in summary["sources"]] == ["alpaca", "messages"]
    found = ids(tmp_path / "run")
    assert len(found["validation"]) == len(found["test"]) == 10
    train = [int(row_id[1:]) for row_id in found["train"]]
    of_a, of_b = [row for row in train if row < 40], [row for row in train if row >= 40]
    assert len(set(of_a)) + len(set(of_b)) == 30
    assert len(of_a) == pytest.approx(2.5 * len(set(of_a)), abs=0.5)
    assert len(of_b) == len(set(of_b))
    assert {row["category"] for row in read_test(tmp_path / "run")} == {"a", "b"}


def test_bad_rows_fail_together_or_are_skipped_and_told(tmp_path, base):
    rows = make_rows(40)
    rows[3]["output"] = ""
    path = write(tmp_path / "rows.json", rows)
    with pytest.raises(
        TrainerError, match=r"rows.json, row 4: output: is empty; fix the row, or set data.on_bad_row: skip"
    ):
        prepare(configure(path, base), tmp_path / "run")
    del rows[7]["instruction"]
    rows[9]["output"] = "end</s>more"
    write(path, rows)
    with pytest.raises(TrainerError) as told:
        prepare(configure(path, base, template="chat"), tmp_path / "run")
    assert re.fullmatch(
        r"2 rows cannot be used:\n  \S*rows.json, row 4: output: is empty\n  \S*rows.json, row 8: "
        r"instruction: is missing; .*\nAll of them are listed in (\S*/rejected.jsonl). Fix them, or set data.*: skip.*",
        str(told.value),
    )
    assert not (tmp_path / "run" / "data").exists()
    summary = prepare(configure(path, base, on_bad_row="skip", template="chat"), tmp_path / "run")
    assert summary["dropped"] == {"bad row": 3}
    rejected = [json.loads(line) for line in (tmp_path / "run" / "data" / "rejected.jsonl").read_text().splitlines()]
    assert sorted((line["row"], line["field"]) for line in rejected) == [
        (4, "output"),
        (8, "instruction"),
        (10, "messages[1].content"),
    ]


def test_equal_reasons_are_one_line_and_all_rows_are_listed(tmp_path, base):
    rows = [row | {"output": row["output"] + "</s>"} for row in make_rows(60)]
    path = write(tmp_path / "rows.json", rows)
    with pytest.raises(
        TrainerError, match=r"^60 rows cannot be used:\n.*row \d+: messages.*\(60 rows, also .*, …"
    ) as told:
        prepare(configure(path, base, template="chat"), tmp_path / "run")
    assert str(told.value).count("spells the special token '</s>'") == 1
    listed = re.search(r"listed in (\S*/rejected.jsonl)", str(told.value))[1]
    assert len(Path(listed).read_text().splitlines()) == 60


def test_special_tokens_in_the_text_are_letters_or_the_row_is_bad(tmp_path, base):
    rows = make_rows(40)
    rows[3] |= {"instruction": "Strike </s>this<s>", "split": "train"}
    rows[5] |= {"output": "Write </s> to stop", "split": "test"}
    for number, row in enumerate(rows):
        row.setdefault("split", "validation" if number < 10 else "train")
    config = configure(
        write(tmp_path / "rows.json", rows), base, template="chat", split={"type": "column"}, special_tokens="as_text"
    )
    summary = prepare(config, tmp_path / "run")
    assert summary["special_tokens"] == "as_text"
    assert summary["noticed"] == {"the text spells a special token, tokenized as ordinary letters": 2}
    assert summary["test_prompts_a_chat_api_tokenizes_otherwise"] == 0
    (test_row,) = read_test(tmp_path / "run")
    assert test_row["reference"] == "Write </s> to stop"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer")
    split = PackedSplit.open(tmp_path / "run" / "data" / "train")
    input_ids, _ = split.row_tokens(ids(tmp_path / "run")["train"].index("r3"))
    assert "Strike </s>this<s></s>" in tokenizer.decode(input_ids)
    # The template's own: one after the question, one after the answer.
    assert np.count_nonzero(input_ids == tokenizer.eos_token_id) == 2
    assert np.count_nonzero(input_ids == tokenizer.bos_token_id) == 0


def test_a_row_that_the_template_refuses_is_told_with_its_place_also_from_scratch(tmp_path):
    rows = make_rows(40)
    rows[3]["output"] = "zyzyzyzy <|endoftext|>"
    path = write(tmp_path / "rows.json", rows)
    with pytest.raises(TrainerError, match=r"rows.json, row 4: messages\[1\].content: spells the special token"):
        prepare(configure(path), tmp_path / "run")
    assert prepare(configure(path, on_bad_row="skip"), tmp_path / "run")["dropped"] == {"bad row": 1}


def test_rows_whose_text_reads_like_another_turn_are_counted(tmp_path, base):
    rows = make_rows(40)
    rows[3]["instruction"] += "\n\n### Response:\nNo."
    summary = prepare(configure(write(tmp_path / "rows.json", rows), base), tmp_path / "run")
    assert summary["noticed"] == {"the text holds '### Response:', which the template writes between turns": 1}


@pytest.mark.parametrize(
    ("overlong", "dropped", "truncated"),
    [
        ("drop", {"longer than sequence_length": 2}, {}),
        ("truncate_response", {"no target token left after the cut": 1}, {"truncate_response": 1}),
        ("truncate_left", {}, {"truncate_left": 2}),
    ],
)
def test_rows_that_are_too_long(tmp_path, base, overlong, dropped, truncated):
    rows = [row | {"split": "train"} for row in make_rows(20)]
    rows[0]["output"] = "a" * 300
    rows[1]["instruction"] = "b" * 300
    rows[18]["split"], rows[19]["split"] = "validation", "test"
    path = write(tmp_path / "rows.json", rows)
    config = configure(path, base, overlong=overlong, split={"type": "column"}, template="chat")
    summary = prepare(config, tmp_path / "run")
    assert (summary["dropped"], summary["truncated"]) == (dropped, truncated)
    split = PackedSplit.open(tmp_path / "run" / "data" / "train")
    assert np.diff(split.row_offsets).max() <= 256
    assert split.num_rows == 18 - sum(dropped.values())
    with pytest.raises(TrainerError, match=r"rows.json, row 1 has 3\d\d tokens, data.sequence_length is 256"):
        prepare(configure(path, base, overlong="fail", split={"type": "column"}, template="chat"), tmp_path / "other")


def test_leaks_are_told_dropped_or_refused(tmp_path, base):
    rows = [row | {"split": "train"} for row in make_rows(40)]
    rows[30]["split"] = "validation"
    for row in rows[31:]:
        row["split"] = "test"
    rows[0] |= {"instruction": rows[31]["instruction"].upper().replace(" ", "  "), "output": "another answer"}
    rows[1] |= {"instruction": rows[32]["instruction"], "output": rows[32]["output"]}
    rows[1]["instruction"] = rows[1]["instruction"].replace("?", "!")
    path = write(tmp_path / "rows.json", rows)
    told = prepare(configure(path, base, split={"type": "column"}), tmp_path / "run")["leaks"]
    assert (told["exact_train_rows"], told["near_train_rows"], told["test_rows"]) == (1, 1, 2)
    assert [(example["train"], example["test"]) for example in told["examples"]] == [("r0", "r31"), ("r1", "r32")]
    dropped = prepare(configure(path, base, split={"type": "column"}, leaks="drop"), tmp_path / "dropped")
    assert dropped["splits"]["train"]["rows"] == 28
    assert not {"r0", "r1"} & set(ids(tmp_path / "dropped")["train"])
    with pytest.raises(TrainerError, match="2 train rows repeat 2 test rows"):
        prepare(configure(path, base, split={"type": "column"}, leaks="fail"), tmp_path / "failed")


def test_multi_turn_tool_data_asks_for_the_last_turn(tmp_path):
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"Add {i}"},
                call,
                {"from": "observation", "value": f"sum {i}"},
                {"from": "gpt", "value": f"It is {i}"},
            ],
            "tools": '[{"name": "add", "parameters": {}}]',
        }
        for i in range(20)
    ]
    config = configure(
        write(tmp_path / "rows.json", rows), template="chatml", split={"train": 0.8, "validation": 0.1, "test": 0.1}
    )
    summary = prepare(config, tmp_path / "run")
    assert summary["format"] == "sharegpt"
    assert summary["test_prompts_a_chat_api_tokenizes_otherwise"] == 0
    row = read_test(tmp_path / "run")[0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool"]
    assert row["reference"].startswith("It is ")
    assert row["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer")
    input_ids, labels = PackedSplit.open(tmp_path / "run" / "data" / "train").row_tokens(0)
    learned = tokenizer.decode(labels[labels != -100])
    assert learned.count("<|im_end|>") == 2
    assert "<tool_call>" in learned
    assert "sum" not in learned
    assert "sum" in tokenizer.decode(input_ids)


def thinking_base(folder, name, template=None):
    tokenizer = thinking_tokenizer(name)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return {"name_or_path": str(folder)}


THIRDS = {"template": "chat", "split": {"train": 0.4, "validation": 0.3, "test": 0.3}}


@pytest.mark.parametrize(
    ("name", "arguments", "opened"), [("qwen3", {}, False), ("qwen3.5", {}, True), ("r1_distill", {}, True)]
)
def test_test_rows_say_where_a_thought_is(tmp_path, name, arguments, opened):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be short"},
                {"role": "user", "content": f"Ask {i}"},
                {"role": "assistant", "content": f"Say {i}", "reasoning_content": f"Muse {i}"},
            ]
        }
        for i in range(10)
    ]
    model = thinking_base(tmp_path / "base", name)
    config = configure(write(tmp_path / "rows.json", rows), model, template_kwargs=arguments, **THIRDS)
    assert prepare(config, tmp_path / "run")["test_prompts_a_chat_api_tokenizes_otherwise"] == 0
    row = read_test(tmp_path / "run")[0]
    number = row["question"].removeprefix("Ask ")
    assert (row["reference"], row["reference_thought"]) == (f"Say {number}", f"Muse {number}")
    assert row["thinking"] == {"open": "<think>\n", "close": "\n</think>\n\n", "opened": opened, "plain": ""}
    assert row["prompt"].endswith("<think>\n") == opened
    assert row["input_separator"] == "\n\n"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer")
    asked = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
    assert asked == row["prompt_token_ids"]


def test_a_closed_prompt_is_the_same_for_a_chat_api(tmp_path):
    rows = [{"prompt": f"Ask {i}", "completion": f"Say {i}", "system": "Be short"} for i in range(10)]
    path = write(tmp_path / "rows.json", rows)
    model = thinking_base(tmp_path / "base", "qwen3.5")
    with pytest.raises(TrainerError, match=r"opens a thought.*\{enable_thinking: false\}"):
        prepare(configure(path, model, **THIRDS), tmp_path / "refused")
    assert prepare(configure(path, model, thinking={"empty": "keep"}, **THIRDS), tmp_path / "kept")["dropped"] == {}
    config = configure(path, model, template_kwargs={"enable_thinking": False}, **THIRDS)
    summary = prepare(config, tmp_path / "run")
    assert summary["template_kwargs"] == {"enable_thinking": False}
    row = read_test(tmp_path / "run")[0]
    assert row["prompt"].endswith("<think>\n\n</think>\n\n")
    assert not {"thinking", "reference_thought"} & set(row), "no thought is expected"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer")
    asked = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
    assert asked == row["prompt_token_ids"], "the exported template has the argument as its default"
    input_ids, _ = PackedSplit.open(tmp_path / "run" / "data" / "train").row_tokens(0)
    assert tokenizer.decode(input_ids).endswith("<think>\n\n</think>\n\n" + tokenizer.decode(input_ids[-6:]))


def test_a_row_with_something_left_out_is_skipped_or_told(tmp_path):
    rows = [row | {"system": "Be short"} if number == 3 else row for number, row in enumerate(make_rows(20))]
    path = write(tmp_path / "rows.json", rows)
    model = thinking_base(tmp_path / "base", "phi4_reasoning")
    with pytest.raises(TrainerError, match=r"row 4: messages\[0\]: the chat template leaves out what the system says"):
        prepare(configure(path, model, **THIRDS), tmp_path / "run")
    skipped = prepare(configure(path, model, on_bad_row="skip", **THIRDS), tmp_path / "run")
    assert skipped["dropped"] == {"bad row": 1}
    told = prepare(configure(path, model, left_out="warn", **THIRDS), tmp_path / "run")
    assert told["noticed"] == {"the chat template leaves out what the system says": 1}


def test_named_templates_are_kept_and_fingerprinted(tmp_path):
    named = {"default": STRING_ARGUMENTS, "tool_use": "<|im_sep|>" + STRING_ARGUMENTS}
    model = thinking_base(tmp_path / "base", "string_arguments", named)
    path = write(tmp_path / "rows.json", make_rows(20))
    first = prepare(configure(path, model, **THIRDS), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer")
    assert tokenizer.chat_template == named
    prepare(configure(path, model, template_name="tool_use", **THIRDS), tmp_path / "run")
    assert read_test(tmp_path / "run")[0]["prompt"].startswith("<|im_sep|><|im_start|>")
    (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").write_text(STRING_ARGUMENTS)
    assert prepare(configure(path, model, **THIRDS), tmp_path / "run")["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"template_name": "tool_use", "template": "chatml"}, "template_name is for the tokenizer's own templates"),
        ({"template_kwargs": {"a": 1}}, "template_kwargs is for the tokenizer's own templates: set template: chat"),
        ({"template_kwargs": {"a b": 1}, "template": "chat"}, "'a b' is not the name of an argument"),
        ({"thinking": {"empty": "no"}}, "thinking.empty"),
    ],
)
def test_settings_of_templates_that_cannot_be(data, words):
    with pytest.raises(ValueError, match=words):
        configure("rows.json", **data)


def test_a_second_prepare_is_the_first_unless_something_changed(tmp_path, base):
    path = write(tmp_path / "rows.json", make_rows(40))
    options = {"cache": tmp_path / "cache"}
    first = prepare(configure(path, base, **options), tmp_path / "run")
    stamp = (tmp_path / "run" / "data" / "train" / "index.json").stat().st_mtime_ns
    assert prepare(configure(path, base, **options), tmp_path / "run") == first
    assert prepare(configure(path, base, num_processes=1, **options), tmp_path / "other run") == first
    for run in ("run", "other run"):
        assert (tmp_path / run / "data" / "train" / "index.json").stat().st_mtime_ns == stamp

    def digest(folder="changed", rows_path=path, model=base, **changes):
        return prepare(configure(rows_path, model, **changes), tmp_path / folder)["fingerprint"]

    changed_base = shutil.copytree(base["name_or_path"], tmp_path / "base")
    template = changed_base / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    rows = make_rows(40)
    rows[5]["output"] += "!"
    found = [
        digest(train_on="all"),
        digest(template="chat"),
        digest(sequence_length=200),
        digest(seed=1),
        digest(model={"name_or_path": str(changed_base)}),
        digest(rows_path=write(path, rows)),
    ]
    assert len({first["fingerprint"], *found}) == 7


def test_a_killed_prepare_leaves_nothing_that_looks_finished(tmp_path, base, monkeypatch):
    path = write(tmp_path / "rows.json", make_rows(40))
    before = prepare(configure(path, base), tmp_path / "run")

    def killed(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.prepare.encode_test_chunk", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(configure(path, base, train_on="all"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "data" / "summary.json").read_text()) == before
    monkeypatch.undo()
    assert prepare(configure(path, base, train_on="all"), tmp_path / "run")["train_on"] == "all"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]


def test_show_dims_what_is_masked_and_escapes_what_moves_the_cursor(tmp_path, base):
    rows = [row | {"split": "train"} for row in make_rows(6)]
    rows[0] |= {"instruction": "do [bold]this[/bold]\x1b[31m", "output": "two\nlines"}
    rows[4]["split"], rows[5]["split"] = "validation", "test"
    config = configure(write(tmp_path / "rows.json", rows), base, template="chat", split={"type": "column"})
    prepare(config, tmp_path / "run")
    stream = io.StringIO()
    show(config, tmp_path / "run", 1, Console(file=stream, force_terminal=True, color_system="standard", width=200))
    printed = stream.getvalue()
    assert "\x1b[31m" not in printed
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    assert "do [bold]this[/bold]\\x1b[31m" in plain
    assert "r0: " in plain
    masked, _, learned = printed.partition("two\\n")
    assert "\x1b[2m" in masked
    assert "\x1b[2m" not in learned.partition("</s>")[0]
    assert "\x1b[7m</s>" in learned
    in_a_file = io.StringIO()
    show(config, tmp_path / "run", 1, Console(file=in_a_file, width=200))
    assert in_a_file.getvalue().count("⟦two\\n\nlines</s>⟧") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:3], "leaves .*without a row"),
        (lambda rows: [], "rows.json holds no rows"),
        (lambda rows: [*rows, rows[0]], r"row 31: id: 'r0' is the id of .*row 1, too; make ids unique"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, base, change, words):
    path = write(tmp_path / "rows.json", change(make_rows(30)))
    with pytest.raises(TrainerError, match=words):
        prepare(configure(path, base), tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (
            {"from_scratch": SCRATCH},
            {"sequence_length": 513},
            "513, model.from_scratch.max_position_embeddings only 512",
        ),
        ({"from_scratch": SCRATCH}, {"template": "chat"}, "no chat template of its own"),
        ({"name_or_path": "/nowhere/at/all"}, {}, "model.name_or_path: there is no folder /nowhere/at/all"),
        (None, {"sources": [{"path": "nothing.json"}]}, "there is no file or folder nothing.json"),
        (None, {"sequence_length": 16}, "every train row was left out"),
        (None, {"split": {"type": "column"}}, "split: is missing"),
        (
            None,
            {"split": {"type": "column", "column": "category"}},
            "category: is 'kind 0', which is none of train, valid",
        ),
        (None, {"split": {"type": "files", "validation": "v.json", "test": "t.json"}}, "no file or folder v.json"),
    ],
)
def test_configurations_that_do_not_fit_the_data(tmp_path, base, model, data, words):
    path = write(tmp_path / "rows.json", make_rows(30))
    with pytest.raises(TrainerError, match=words):
        prepare(configure(path, model or base, **data), tmp_path / "run")


def test_a_file_that_is_missing_is_named(tmp_path, base):
    with pytest.raises(TrainerError, match=r"there is no file or folder .*rows\.json"):
        prepare(configure(tmp_path / "rows.json", base), tmp_path / "run")


class TestAudit:
    """Each check of the audit, by a tokenizer or a row that fails it."""

    @staticmethod
    def run(tokenizer, tmp_path, messages, audit=True):
        tokenizer.save_pretrained(tmp_path)
        settings = Settings(str(tmp_path), "", "assistant", 512, "drop", audit)
        line = json.dumps({"id": "x", "messages": messages, "file": "a.json", "row": 7}).encode()
        return encode_chunk(settings, [line])

    MESSAGES = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"})

    @pytest.mark.parametrize("name", sorted(TEMPLATES))
    def test_a_good_row_passes(self, tmp_path, name):
        tokenizer = make_tokenizer(name)
        set_template(tokenizer, "chat")
        assert self.run(tokenizer, tmp_path, self.MESSAGES * 2).row_ids == ["x"]

    def test_a_row_without_targets(self, tmp_path):
        unweighted = [self.MESSAGES[0], self.MESSAGES[1] | {"weight": 0}]
        with pytest.raises(TrainerError, match=r"audit: a.json, row 7: no token is a target"):
            self.run(make_tokenizer("zephyr"), tmp_path, unweighted)

    def test_a_tokenizer_that_loses_text(self, tmp_path):
        tokenizer = make_tokenizer("zephyr")
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        with pytest.raises(TrainerError, match="the token ids say something else than the text, from character"):
            self.run(tokenizer, tmp_path, self.MESSAGES)
        assert self.run(tokenizer, tmp_path, self.MESSAGES, audit=False).row_ids == ["x"]

    @pytest.mark.parametrize("turn", ["Yes", "Y</s>es</s>"])
    def test_a_turn_that_does_not_end_with_one_stop_token(self, tmp_path, turn):
        tokenizer = make_tokenizer("zephyr")
        tokenizer.save_pretrained(tmp_path)
        segments = [Segment("Hi", False), Segment(turn, True, in_turn=True)]
        line = Line(Conversation("x", []), "a.json", 7)
        settings = Settings(str(tmp_path), "", "assistant", 512, "drop", True)
        with pytest.raises(TrainerError, match="row 7: an assistant turn does not end with the one token '</s>'"):
            audit([line], [segments], Encoder(tokenizer).encode([segments]), settings)
