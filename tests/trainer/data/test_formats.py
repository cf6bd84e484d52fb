"""Rows of every form -> conversations, and the reason for each row that cannot be used."""

import copy
import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import Columns
from trainer.data.conversation import BadRowError
from trainer.data.fields import FieldNotes, is_blank
from trainer.data.formats import RowReader, detect_format
from trainer.data.messages import ROLE_WORDS, MessageRules
from trainer.errors import TrainerError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"name": "add", "arguments": {"a": 1}}


def read(row, form=None, **options):
    return RowReader(form or detect_format([row], "file"), " | ", **options).read(row, "default")


@pytest.mark.parametrize(
    ("row", "form", "messages"),
    [
        ({"instruction": "Q", "output": "A"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "Q", "input": "", "output": "A"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "Q", "input": "x", "output": "A"}, "alpaca", [{"role": "user", "content": "Q | x"}, ANSWER]),
        (
            {"instruction": "Q", "context": "x", "response": "A"},
            "alpaca",
            [{"role": "user", "content": "Q | x"}, ANSWER],
        ),
        ({"prompt": "Q", "completion": "A"}, "prompt_completion", [USER, ANSWER]),
        ({"prompt": "Q", "response": "A"}, "prompt_completion", [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion", [USER, ANSWER]),
        ({"messages": [USER, ANSWER]}, "messages", [USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, "messages", [USER, ANSWER]),
        (
            {"messages": [{"role": "developer", "content": "S"}, USER, ANSWER]},
            "messages",
            [{"role": "system", "content": "S"}, USER, ANSWER],
        ),
        ({"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, "messages", [USER, ANSWER]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER]},
            "messages",
            [USER, ANSWER],
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
            "sharegpt",
            [{"role": "system", "content": "S"}, USER, ANSWER],
        ),
    ],
)
def test_forms(row, form, messages):
    assert detect_format([row], "file") == form
    assert read(row).messages == messages


def test_columns():
    names = Columns(prompt="frage", response="antwort", system="rolle", input="text", category="art", id="nr")
    row = {"frage": "Q", "antwort": "A", "rolle": "S", "text": "x", "art": "k", "nr": 7}
    found = read(row, "columns", columns=names)
    assert (found.id, found.category) == ("7", "k")
    assert [message["content"] for message in found.messages] == ["S", "Q | x", "A"]


def test_tool_calls_of_both_kinds_become_one():
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "A"},
        ],
        "tools": json.dumps([{"name": "add", "parameters": {}}]),
    }
    called = {"type": "function", "function": CALL}
    openai = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [{"function": CALL | {"arguments": '{"a": 1}'}}]},
            {"role": "tool", "content": "3"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    expected = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "3"},
        ANSWER,
    ]
    assert read(sharegpt).messages == read(openai).messages == expected
    assert read(sharegpt).tools == read(openai).tools == openai["tools"]


def test_id_category_and_split_are_kept():
    found = read({"instruction": "Q", "output": "A", "id": 3, "category": "k", "part": "test"}, split_column="part")
    assert (found.id, found.category, found.split) == ("3", "k", "test")
    found = read({"instruction": "Q", "output": "A"}, category="c")
    assert (found.id, found.category, found.split) == ("default", "c", None)


ALPACA = {"instruction": "Q", "output": "A"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("text", "a row must be an object with named fields, this one is text"),
        ({"instruction": "Q"}, "output: is missing; the row has instruction"),
        (ALPACA | {"output": ""}, "output: is empty"),
        (ALPACA | {"output": " \n"}, "output: is empty"),
        (ALPACA | {"output": None}, "output: must be text, it is null"),
        (ALPACA | {"output": 0.5}, r"output: is a number \(0.5\) .* data.numbers: shortest to write 0.5"),
        (ALPACA | {"output": float("nan")}, "output: must be text, it is null"),
        (ALPACA | {"output": float("inf")}, "output: must be text, it is inf, which is no number in JSON"),
        (ALPACA | {"output": {"a": 1}}, "output: must be text, it is an object"),
        (ALPACA | {"input": ["x"]}, "input: must be text, it is a list"),
        (ALPACA | {"output": "a\0b"}, r"messages\[1\].content: holds a NUL character at position 1"),
        (ALPACA | {"instruction": "\udce9"}, r"messages\[0\].content: is not valid UTF-8 at position 0"),
        (ALPACA | {"category": ["x"]}, "category: must be text, it is a list"),
        (ALPACA | {"train": False}, "train: marks the row, or turns of it, not to be learned"),
        (ALPACA | {"loss_mask": [0, 1]}, r"loss_mask: marks .* data.metadata_fields: \[loss_mask\]"),
        (ALPACA | {"masked": 1}, "masked: marks the row"),
    ],
)
def test_bad_alpaca_rows(row, words):
    with pytest.raises(BadRowError, match=words):
        read(row, "alpaca")


def tool_call(**changes):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": CALL | changes}]}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages: must be a list of messages, it is an empty list"),
        (None, "messages: must be a list of messages, it is null"),
        (["hi"], r"messages\[0\]: a message must be an object, this is text"),
        ([USER], "ends with user, not with the assistant"),
        ([ANSWER], "role assistant cannot follow the start"),
        ([USER, USER, ANSWER], r"messages\[1\]: role user cannot follow user; data.repeated_roles: join"),
        ([USER, ANSWER, ANSWER], "role assistant cannot follow assistant"),
        ([USER, ANSWER, {"role": "system", "content": "S"}], "role system cannot follow assistant"),
        (
            [USER, ANSWER, {"role": "tool", "tool_call_id": "c", "content": "3"}, ANSWER],
            "answers a tool call, and the assistant made none",
        ),
        (
            [{"role": "narrator", "content": "x"}],
            "unknown role 'narrator'; known: system, .* data.roles.*{narrator: user}",
        ),
        ([{"content": "x"}], r"needs a role \(or from\) and a content \(or value\), this one has content"),
        ([{"role": "user", "from": "gpt", "content": "x"}], "role is 'user' and from is 'gpt'"),
        ([{"role": "user", "content": "x", "value": "y"}], "content and value differ"),
        ([{"role": "user", "content": 0.5}, ANSWER], r"content is a number \(0.5\)"),
        ([{"role": "user", "content": {"a": 1}}, ANSWER], "content must be text, it is an object"),
        ([{"role": "user", "content": " "}, ANSWER], "the question is empty"),
        ([USER, {"role": "assistant", "content": ""}], "the answer is empty"),
        ([USER, {"role": "assistant"}], "the answer is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "only text can be learned"),
        ([USER, tool_call(name=3)], "a tool call needs a name"),
        ([USER, tool_call(arguments="{")], "is not valid JSON"),
        ([USER, tool_call(arguments="[1]")], "arguments must be an object, they are a list"),
        ([USER, tool_call(arguments={"a": "\ud800"})], "is not valid UTF-8"),
        ([USER, ANSWER | {"weight": 0.5}], "weight must be 0 or 1, it is 0.5"),
        ([USER, ANSWER | {"train": "no"}], "train must be 0 or 1, it is 'no'"),
        ([USER, ANSWER | {"loss_mask": [1, 0]}], "loss_mask must be 0 or 1"),
        ([USER, ANSWER | {"train": True, "masked": True}], "train and masked contradict each other"),
        ([USER, ANSWER | {"mask": 1}], "mask does not say whether 1 is learned"),
        ([USER, ANSWER | {"train_detail": [{"begin_offset": 0}]}], "train_detail marks parts of a turn"),
        ([USER, ANSWER | {"weight": 0}], "messages: every answer is marked not to be learned"),
        ([USER | {"thinking": "hm"}, ANSWER], "only the assistant thinks and calls tools"),
        ([USER | {"tool_calls": [CALL]}, ANSWER], "only the assistant thinks and calls tools"),
        ([USER, ANSWER | {"reasoning": "a", "thought": "b"}], "has two thoughts that differ"),
        ([USER, ANSWER | {"thinking": {"a": 1}}], "thinking: must be text, it is an object"),
        ([USER, ANSWER | {"images": ["a.png"]}], "only text can be learned, and images is something else"),
        ([USER, ANSWER | {"tool_calls": [CALL], "function_call": CALL | {"name": "f"}}], "says other calls"),
        ([USER, tool_call(parameters={"a": 2})], "arguments and parameters, and they differ"),
        ([USER, tool_call(arguments='{"a": 1, "a": 2}')], "it holds the key 'a' twice"),
        ([USER, tool_call(arguments='{"a": NaN}')], "it holds NaN, which JSON forbids"),
        ([USER, tool_call(arguments={"a": float("nan")})], "cannot be written as JSON"),
        ([USER, {"role": "tool_call", "content": ""}], "a tool call needs a name"),
    ],
)
def test_bad_messages(messages, words):
    with pytest.raises(BadRowError, match=words):
        read({"messages": messages}, "messages")


def test_bad_tools():
    with pytest.raises(BadRowError, match="tools: is not valid JSON"):
        read({"messages": [USER, ANSWER], "tools": "[{"})
    with pytest.raises(BadRowError, match="tools: must be a list of descriptions"):
        read({"messages": [USER, ANSWER], "tools": {"name": "x"}})


def test_a_bad_row_tells_its_place_and_survives_pickling():
    error = pickle.loads(pickle.dumps(BadRowError("is empty", "output").at("a.json", 7)))  # noqa: S301 - our own
    assert str(error) == "a.json, row 7: output: is empty"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"chosen": "a", "rejected": "b", "prompt": "c"}], r"file, row 1: this is preference data"),
        ([{"messages": [USER, ANSWER], "rejected_response": "b"}], r"file, row 1: this is preference data"),
        ([{"frage": "Q"}], r"no known form \(fields: frage\).* format: columns"),
        ([{"id": 1, "q": "Q", "a": "A"}], r"format: columns and columns: {prompt: q, response: a}"),
        ([["a"]], r"no known form \(fields: a list\)"),
        ([], r"no known form \(fields: none\)"),
    ],
)
def test_forms_that_cannot_be_told(rows, words):
    with pytest.raises(TrainerError, match=words):
        detect_format(rows, "file")


SYSTEM = {"role": "system", "content": "S"}
CALLED = {"type": "function", "function": CALL}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
RESULT = {"role": "tool", "content": "3"}
CHAT = {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (CHAT | {"system": "S"}, [SYSTEM, USER, ANSWER]),
        (CHAT | {"systemPrompt": "S"}, [SYSTEM, USER, ANSWER]),
        ({"messages": [SYSTEM, USER, ANSWER], "system_prompt": "S "}, [SYSTEM, USER, ANSWER]),
        (ALPACA | {"system_prompt": "S"}, [SYSTEM, USER, ANSWER]),
        (ALPACA | {"System": "S", "system_prompt": None}, [SYSTEM, USER, ANSWER]),
        (ALPACA | {"system": float("nan")}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER], "system": "S"}, [SYSTEM, USER, ANSWER]),
        ({"prompt": [USER], "completion": "A"}, [USER, ANSWER]),
        ({"prompt": "Q", "completion": [ANSWER]}, [USER, ANSWER]),
        ({"query": "Q", "response": "A", "history": []}, [USER, ANSWER]),
        (ALPACA | {"history": [["Q", "A"]]}, [USER, ANSWER, USER, ANSWER]),
        (ALPACA | {"history": '[["Q", "A"]]'}, [USER, ANSWER, USER, ANSWER]),
        (ALPACA | {"history": [USER, ANSWER], "system": "S"}, [SYSTEM, USER, ANSWER, USER, ANSWER]),
        (ALPACA | {"input": "", "context": "x"}, [{"role": "user", "content": "Q | x"}, ANSWER]),
        (ALPACA | {"response": "A", "input": None}, [USER, ANSWER]),
        (ALPACA | {"thinking": "hm"}, [USER, ANSWER | {"reasoning_content": "hm"}]),
        ({"prompt": "Q", "input": "x", "completion": "A"}, [{"role": "user", "content": "Q | x"}, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        ({"messages": repr([USER, ANSWER])}, [USER, ANSWER]),
        (
            {"conversations": json.dumps([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}])},
            [USER, ANSWER],
        ),
        ({"conversation": [{"human": "Q", "assistant": "A"}] * 2}, [USER, ANSWER] * 2),
        ({"conversation": [{"system": "S", "input": "Q", "output": "A"}]}, [SYSTEM, USER, ANSWER]),
        ({"messages": None, **ALPACA}, [USER, ANSWER]),
        ({"instruction": "Q", "output": 5}, [USER, {"role": "assistant", "content": "5"}]),
        ({"instruction": "Q", "output": False}, [USER, {"role": "assistant", "content": "false"}]),
        ({"instruction": "Q", "input": 7, "output": "A"}, [{"role": "user", "content": "Q | 7"}, ANSWER]),
    ],
)
def test_columns_beside_the_known_ones_are_read(row, messages):
    assert read(row).messages == messages


def test_a_form_may_be_any_of_several_words():
    for role, words in ROLE_WORDS.items():
        if role in ("user", "assistant"):
            for word in (word for name in words for word in (name, name.upper(), f" {name.title()}")):
                turns = {"user": "human", "assistant": "gpt"} | {role: word}
                row = {
                    "conversations": [{"from": turns["user"], "value": "Q"}, {"from": turns["assistant"], "value": "A"}]
                }
                assert read(row).messages == [USER, ANSWER], word


def test_further_role_words_are_named_in_the_configuration():
    row = {"messages": [{"role": "Kunde", "content": "Q"}, {"role": "agent", "content": "A"}]}
    rules = MessageRules(roles={"kunde": "user", "AGENT": "assistant"})
    assert read(row, rules=rules).messages == [USER, ANSWER]


@pytest.mark.parametrize(
    ("marks", "weights"),
    [
        ([{"weight": 0}, {"weight": 1.0}], [0, 1]),
        ([{"train": False}, {"train": True}], [0, 1]),
        ([{"trainable": 0}, {}], [0, None]),
        ([{"training": False}, {"training": None}], [0, None]),
        ([{"loss": False}, {"loss": True}], [0, 1]),
        ([{"loss_mask": 0}, {"loss_mask": 1}], [0, 1]),
        ([{"loss_weight": 0.0}, {"loss_weight": 1.0}], [0, 1]),
        ([{"masked": True}, {"masked": False}], [0, 1]),
    ],
)
def test_marks_for_loss_become_weights(marks, weights):
    first, last = marks
    messages = read({"messages": [USER, ANSWER | first, USER | {"weight": 0}, ANSWER | last]}).messages
    assert [message.get("weight") for message in messages[1::2]] == weights


def test_the_last_answer_alone_must_be_learned():
    row = {"messages": [USER, ANSWER, USER, ANSWER | {"train": False}]}
    assert read(row).messages[-1]["weight"] == 0
    with pytest.raises(BadRowError, match="the last answer is marked not to be learned"):
        read(row, train_on="last_assistant")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_thoughts_are_read_from_every_name(key):
    thinks = ANSWER | {"reasoning_content": "hm"}
    assert read({"messages": [USER, ANSWER | {key: "hm"}]}).messages[-1] == thinks
    assert read({"messages": [USER, ANSWER | {key: " ", "content": "A"}]}).messages[-1] == ANSWER
    twice = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A"}]
    assert read({"messages": [USER, {"role": "assistant", "content": twice, key: "hm"}]}).messages[-1] == thinks


PARTS = [
    {"type": "reasoning", "text": "hm", "image_url": None},
    {"type": "text", "text": "A", "image_url": None},
    {"type": "tool_use", "id": "c", "name": "add", "input": {"a": 1}, "text": None},
]


def test_parts_of_a_content_are_read():
    result = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "3"}]}
    row = {"messages": [USER, {"role": "assistant", "content": PARTS}, {"role": "user", "content": [result]}, ANSWER]}
    assert read(row).messages == [
        USER,
        ANSWER | {"reasoning_content": "hm", "tool_calls": [CALLED | {"id": "c"}]},
        RESULT | {"tool_call_id": "c"},
        ANSWER,
    ]


@pytest.mark.parametrize(
    "calling",
    [
        [{"role": "assistant", "content": None, "tool_calls": [{"function": CALL | {"arguments": '{"a": 1}'}}]}],
        [{"role": "assistant", "tool_calls": json.dumps([CALL])}],
        [{"role": "assistant", "tool_calls": [json.dumps(CALL)]}],
        [{"role": "assistant", "content": "", "function_call": CALL, "tool_calls": []}],
        [{"role": "assistant", "content": "", "tool_calls": CALL | {"function": None}}],
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "add", "args": {"a": 1}, "arguments": None}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "add", "parameters": {"a": 1}}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": "add", "arguments": '"{\\"a\\": 1}"'}]}],
        [{"role": "tool_call", "content": json.dumps(CALL)}],
        [{"role": "tool_call", "content": CALL}],
        [{"role": "function_call", "content": json.dumps([CALL])}],
        [{"role": "tool_call", "content": "", "tool_calls": [CALL]}],
        [{"role": "assistant", "content": ""}, {"role": "tool_call", "content": json.dumps(CALL)}],
    ],
)
def test_loose_forms_of_a_tool_call(calling):
    assert read({"messages": [USER, *calling, RESULT, ANSWER]}).messages == [USER, CALLING, RESULT, ANSWER]


@pytest.mark.parametrize("nothing", ["", None, {}, "{}", "null"])
def test_a_call_without_arguments_has_none(nothing):
    (call,) = read({"messages": [USER, tool_call(arguments=nothing)]}).messages[-1]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": {}}


def test_calls_of_their_own_join_the_words_before_them():
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    results = [{"role": "tool_response", "content": "3"}, {"role": "ipython", "content": {"ok": None}}]
    messages = read({"messages": [USER, ANSWER, call, call, *results, ANSWER]}).messages
    assert messages[1:4] == [ANSWER | {"tool_calls": [CALLED] * 2}, RESULT, RESULT | {"content": '{"ok": null}'}]
    with pytest.raises(BadRowError, match="one is learned, the other is not"):
        read({"messages": [USER, ANSWER | {"loss": True}, call | {"loss": False}, *results, ANSWER]})


def test_messages_of_one_role_are_joined_where_asked():
    rules = MessageRules(repeated_roles="join")
    row = {"messages": [SYSTEM, SYSTEM, USER, USER, ANSWER, CALLING, RESULT, RESULT, ANSWER, ANSWER]}
    assert read(row, rules=rules).messages == [
        {"role": "system", "content": "S\n\nS"},
        {"role": "user", "content": "Q\n\nQ"},
        ANSWER | {"tool_calls": [CALLED]},
        *[RESULT] * 2,
        {"role": "assistant", "content": "A\n\nA"},
    ]
    for pair, words in (
        ([CALLING, ANSWER], "whose tool calls have no result yet"),
        ([ANSWER, ANSWER | {"thinking": "hm"}], "it thinks again after that"),
        ([ANSWER, ANSWER | {"weight": 0}], "one is learned, the other is not"),
        ([ANSWER | {"name": "a"}, ANSWER], "their names differ"),
    ):
        with pytest.raises(BadRowError, match=words):
            read({"messages": [USER, *pair]}, rules=rules)


CITY = {"type": "string"}
NULLABLE = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}


def add(**properties):
    parameters = {"type": "object", "properties": properties, "required": ["must"]}
    return [{"type": "function", "function": {"name": "add", "parameters": parameters}}]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"a": 1, "city": None}, {"a": 1}),
        ({"a": 1, "unknown": None}, {"a": 1}),
        ({"a": 1, "must": None}, {"a": 1, "must": None}),
        ({"a": 1, "maybe": None}, {"a": 1, "maybe": None}),
        ({"a": 1, "either": None}, {"a": 1, "either": None}),
        (
            {"nested": {"x": None, "either": 1}, "list": [None, {"y": None}]},
            {"nested": {"either": 1}, "list": [None, {}]},
        ),
    ],
)
def test_nulls_of_a_union_leave_the_arguments(given, kept):
    tools = add(a={"type": "integer"}, city=CITY, maybe=NULLABLE, either={"type": ["string", "null"]})
    notes = FieldNotes()
    found = read({"messages": [USER, tool_call(arguments=given)], "tools": tools}, notes=notes)
    assert found.messages[-1]["tool_calls"][0]["function"]["arguments"] == kept
    assert found.tools == tools
    assert sum(notes.noticed.values()) == (given != kept)


def test_nulls_of_a_union_leave_the_schemas():
    plain = add(a={"type": "integer", "enum": [1, None]}, maybe=NULLABLE, default=CITY, empty={})
    union = add(
        a={"type": "integer", "enum": [1, None], "default": None, "anyOf": None},
        maybe=NULLABLE | {"type": None, "enum": None, "const": None},
        default=CITY | {"default": None, "description": None},
        city=None,
        empty={},
    )
    union[0] |= {"strict": None}
    union[0]["function"] |= {"strict": None, "description": None}
    plain[0]["function"]["parameters"]["properties"]["a"]["default"] = None  # one of its values
    assert read(CHAT | {"tools": union}).tools == plain


@pytest.mark.parametrize(
    "tools",
    [
        add(a={}),
        json.dumps(add(a={})),
        [json.dumps(add(a={})[0])],
        [add(a={})[0]["function"]],
        [{"name": "add", "input_schema": add(a={})[0]["function"]["parameters"]}],
        [{"name": "add", "parameters": json.dumps(add(a={})[0]["function"]["parameters"])}],
        repr(add(a={})),
    ],
)
def test_loose_forms_of_tools(tools):
    assert read(CHAT | {"tools": tools}).tools == add(a={})
    assert read(CHAT | {"functions": tools, "tools": None}).tools == add(a={})
    in_system = {"messages": [SYSTEM | {"tools": tools}, USER, ANSWER]}
    assert (read(in_system).tools, read(in_system).messages[0]) == (add(a={}), SYSTEM)


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False, "other": None}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": '{"enable_thinking": false}'}, {"enable_thinking": False}),
        ({"template_kwargs": {"a": 1}, "enable_thinking": True}, {"a": 1, "enable_thinking": True}),
        ({"thinking": True, "reasoning_effort": "low"}, {"thinking": True, "reasoning_effort": "low"}),
        ({"enable_thinking": None, "chat_template_kwargs": {}}, None),
    ],
)
def test_arguments_of_the_template_are_kept(fields, kwargs):
    notes = FieldNotes()
    assert read(CHAT | fields, notes=notes).template_kwargs == kwargs
    assert not notes.unknown


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [SYSTEM, USER, ANSWER], "system": "T"}, "system: differs from the system message in the row"),
        (ALPACA | {"system": "S", "system_prompt": "T"}, "system and system_prompt, and they differ"),
        (ALPACA | {"response": "B"}, "output: the row has output and response, and they differ"),
        (ALPACA | {"input": "x", "context": "y"}, "input and context, and they differ"),
        (ALPACA | {"prompt": "Q", "completion": "B"}, "completion: says something else .* read as alpaca"),
        (CHAT | ALPACA | {"output": "B"}, "output: says something else .* data.metadata_fields: .output."),
        (CHAT | {"conversations": [USER, {"role": "assistant", "content": "B"}]}, "conversations: says something else"),
        (ALPACA | {"history": "no"}, "history: is not valid JSON"),
        (ALPACA | {"history": [["Q"]]}, r"history\[0\]: an earlier turn must be a question and its answer"),
        (ALPACA | {"history": {"a": 1}}, "history: must be a list of earlier turns, it is an object"),
        (CHAT | {"rejected_response": "B"}, "this is preference data"),
        (CHAT | {"images": ["a.png"]}, "images: only text can be learned"),
        (CHAT | {"chat_template_kwargs": {"tools": []}}, "tools is no argument that a row may give"),
        (CHAT | {"chat_template_kwargs": [1]}, "must be an object of names and values, it is a list"),
        (
            CHAT | {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
            "another enable_thinking",
        ),
        (CHAT | {"tools": add(a={}), "functions": add(b={})}, "two lists of tools that differ"),
        (CHAT | {"tools": [{"description": "d"}]}, r"tools\[0\]: a tool needs a name, this one has description"),
        (CHAT | {"tools": ["{"]}, r"tools\[0\]: is not valid JSON"),
        ({"messages": "[{"}, "messages: is not valid JSON"),
    ],
)
def test_fields_that_contradict_each_other(row, words):
    with pytest.raises(BadRowError, match=words):
        read(row, detect_format([CHAT if "messages" in row else ALPACA], "file"))


def test_fields_left_unread_by_name_contradict_nothing():
    rules = MessageRules(metadata=frozenset(["response", "mood", "images"]))
    notes = FieldNotes()
    row = ALPACA | {"response": "B", "mood": "x", "images": ["a.png"]}
    assert read(row, "alpaca", rules=rules, notes=notes).messages == [USER, ANSWER]
    assert not notes.unknown


def test_fields_that_only_repeat_the_row_are_not_reported():
    notes = FieldNotes()
    for row in (
        CHAT | {"prompt": "Q", "conversations": [USER, ANSWER], "instruction": "Q", "output": "A"},
        ALPACA | {"text": "### Q\n### A", "prompt": "Q"},
        CHAT | {"id": 1, "Source": "web", "tags": ["x"], "metadata": {"a": 1}, "note": None, "extra_field": ""},
        {"messages": [USER | {"id": 7, "lang": "en"}, ANSWER | {"model": "m", "refusal": None, "annotations": []}]},
    ):
        assert read(row, notes=notes).messages == [USER, ANSWER]
    assert not notes.unknown


def test_unknown_fields_are_counted_once_a_row():
    notes = FieldNotes()
    reader = RowReader("messages", " | ", notes=notes)
    call = {"function": CALL | {"mood": 1}, "speed": 2}
    said = {"role": "assistant", "content": [{"type": "text", "text": "A", "colour": "red"}], "tool_calls": [call]}
    for number in (3, 4):
        turns = [USER | {"mood": "x", "weight": 1}, ANSWER, USER | {"mood": "y"}, said]
        reader.read({"messages": turns, "emotion": "glad"}, "d", "a.jsonl", number)
    first = {"rows": 2, "first": "a.jsonl, row 3"}
    names = ("mood", "weight (user)", "content.colour", "tool_calls.mood", "tool_calls.speed")
    assert notes.unknown == {f"messages[].{name}": first for name in names} | {"emotion": first}
    notes.check("warn")
    notes.check("ignore")
    with pytest.raises(
        TrainerError, match=r"emotion is not read: 2 rows, the first a.jsonl, row 3(.|\n)*metadata_fields: \[colour, "
    ):
        notes.check("fail")
    reader.read(CHAT, "d")
    with pytest.raises(BadRowError):
        reader.read({"messages": [USER], "secret": 1}, "d")  # a bad row is reported as such
    assert "secret" not in notes.unknown


def test_numbers_are_written_as_asked():
    shortest = MessageRules(numbers="shortest")
    row = {"messages": [{"role": "user", "content": 0.5}, {"role": "assistant", "content": True}]}
    assert [message["content"] for message in read(row, rules=shortest).messages] == ["0.5", "true"]


def test_most_rows_decide_the_form():
    assert detect_format([ALPACA, CHAT, ALPACA, {"chosen": "a", "rejected": "b"}], "file") == "alpaca"
    with pytest.raises(
        BadRowError, match=r"instruction: is missing; .* this row is messages, and the source is read as al"
    ):
        read(CHAT, "alpaca")
    with pytest.raises(BadRowError, match="part: is 'dev', which is none of train, val, test: name your values"):
        read(ALPACA | {"part": "dev"}, split_column="part", splits=("train", "val", "test"))


# Names that mean something to the reader, in rows, messages, parts, tool calls and schemas.
_NAMES = (
    *("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "response", "history"),
    *(
        "system",
        "tools",
        "functions",
        "chat_template_kwargs",
        "enable_thinking",
        "thinking",
        "chosen",
        "rejected",
        "id",
    ),
    *(
        "role",
        "from",
        "content",
        "value",
        "weight",
        "train",
        "masked",
        "reasoning",
        "tool_calls",
        "function_call",
        "name",
    ),
    *("type", "text", "function", "arguments", "parameters", "properties", "required", "human", "assistant", "mood"),
)
_WORDS = ("user", "assistant", "system", "tool", "tool_call", "function", "text", "thinking", "tool_use", "tool_result")
_LEAVES = st.sampled_from(
    [None, True, False, 0, 1, 0.5, float("nan"), "", " ", "Q", "[]", "{}", '{"name": "f"}', *_WORDS]
)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4)
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=4), st.integers(0, 2))
def test_any_row_is_read_or_refused_with_a_reason(extra, base):
    row = copy.deepcopy([{}, ALPACA, CHAT][base]) | extra
    if "messages" in extra and base == 2:
        row["messages"] = [USER, ANSWER | {"mood": extra["messages"]}]
    before = copy.deepcopy(row)
    try:
        found = read(row, ["messages", "alpaca", "messages"][base])
    except BadRowError as error:
        assert error.reason
    else:
        json.dumps(vars(found), allow_nan=False)
        assert found.messages[-1]["role"] == "assistant"
        assert repr(row) == repr(before)  # reading changes nothing


@settings(max_examples=50, deadline=None)
@given(st.text("ab[. é", min_size=1), st.text("ab[. é", min_size=1), _LEAVES)
def test_any_unknown_field_is_reported_unless_blank(row_field, message_field, value):
    notes = FieldNotes()
    row_field, message_field = f"x-{row_field}", f"x-{message_field}"
    read({"messages": [USER | {message_field: value}, ANSWER], row_field: value}, notes=notes)
    expected = set() if is_blank(value) else {f"messages[].{message_field}", row_field}
    restated = {row_field} if value == "Q" else set()
    assert notes.unknown.keys() == expected - restated
