"""Random conversations x templates: all that is said is in the text or reported, and the mask is exact."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.trainer.data.chat_templates import TEMPLATES, make_tokenizer
from tests.trainer.data.thinking_templates import THINKING, thinking_tokenizer
from trainer.config import ThinkingConfig
from trainer.data.conversation import BadRowError, Conversation
from trainer.data.renderer import Renderer
from trainer.data.templates import set_template
from trainer.data.tokenizer import scratch_tokenizer
from trainer.data.tokens import Encoder

ARGUMENTS = {
    "qwen3.5": ({}, {"enable_thinking": False}),
    "deepseek_v3.1": ({}, {"thinking": True}),
    "granite": ({}, {"thinking": True}),
    "smollm3": ({}, {"enable_thinking": False}),
    "glm": ({}, {"enable_thinking": False}),
}
BUILT_IN = ("alpaca", "phi3", "chatml")
PLAIN = ("llama3", "gemma", "zephyr")


def tokenizer_of(name, arguments):
    if name in BUILT_IN:
        return scratch_tokenizer(name)
    tokenizer = thinking_tokenizer(name) if name in THINKING else make_tokenizer(name)
    set_template(tokenizer, "chat", arguments=arguments)
    return tokenizer


TOKENIZERS = [
    tokenizer_of(name, arguments) for name in (*THINKING, *PLAIN, *BUILT_IN) for arguments in ARGUMENTS.get(name, ({},))
]
ENCODERS = {id(tokenizer): Encoder(tokenizer) for tokenizer in TOKENIZERS}
SETTINGS = [
    ThinkingConfig(train=train, empty=empty, earlier_turns=earlier)
    for train in (True, False)
    for empty in ("keep", "drop")
    for earlier in ("as_template", "mask")
]
RENDERERS = [
    Renderer(tokenizer, train_on, "as_text", thinking, "warn")
    for tokenizer in TOKENIZERS
    for thinking in SETTINGS
    for train_on in ("assistant", "last_assistant")
]

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufdd0"), max_size=12)
values = st.one_of(words, st.integers(-9, 99), st.booleans(), st.none(), st.lists(words, max_size=2))


@st.composite
def conversations(draw):
    """Messages whose texts start and end with marks of their own, so that none is found by chance."""
    messages, rounds = [], draw(st.integers(1, 3))

    def say(role, **fields):
        spaces = draw(st.sampled_from(["", "", " ", "\n"]))
        content = f"{spaces}<{len(messages)}({draw(words)})>{spaces}"
        messages.append({"role": role, "content": content} | fields)

    def think():
        return {"reasoning_content": f"[{len(messages)}({draw(words)})]"} if draw(st.booleans()) else {}

    if draw(st.booleans()):
        say("system")
    for _ in range(rounds):
        say("user")
        if draw(st.booleans()):
            calls = [
                {"name": f"f{len(messages)}x{at}", "arguments": draw(st.dictionaries(words, values, max_size=2))}
                for at in range(draw(st.integers(1, 2)))
            ]
            listed = [{"type": "function", "id": f"abcdefgh{at}", "function": call} for at, call in enumerate(calls)]
            say("assistant", tool_calls=listed, **think())
            if draw(st.booleans()):
                messages[-1]["content"] = ""
            for _ in calls:
                say("tool")
        say("assistant", **think(), **draw(st.sampled_from([{}, {}, {"weight": 0}])))
    return Conversation("id", messages)


def check(conversation, renderer):
    try:
        written = renderer.written(conversation)
    except BadRowError:
        return  # refused with a reason
    text = "".join(segment.text for segment in written.segments)
    learned = "".join(segment.text for segment in written.segments if segment.is_target)
    check_content(conversation, renderer, written.notes, text, learned)
    (row,) = ENCODERS[id(renderer.tokenizer)].encode([written.segments])
    check_mask(renderer.tokenizer, written.segments, row)
    assert row.input_ids[: row.num_prompt_tokens].tolist() == ENCODERS[id(renderer.tokenizer)].prompt_ids(
        written.prompt
    ) or any(segment.cuts for segment in written.segments)
    talk, _ = renderer._talk(conversation)
    dropped = renderer._shape(talk).dropped
    asked = renderer.writer.prompt(talk, len(conversation.messages) - 1, dropped).replace("\ufdd0", "")
    assert text.startswith(asked), "the generation prompt is how the row starts"
    assert written.prompt == asked


def check_content(conversation, renderer, notes, text, learned):
    last = len(conversation.messages) - 1
    silent = set()
    for number, message in enumerate(conversation.messages):
        said = message["content"].strip()
        spoken = said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text
        silent |= set() if spoken else {f"the chat template leaves out what the {message['role']} says"}
        if message["role"] != "assistant" and said:
            assert said not in learned
        elif said in learned and said:
            assert message.get("weight") != 0
        elif said and spoken and message.get("weight") != 0 and number == last:
            raise AssertionError("the last answer is not learned")
        thought = message.get("reasoning_content")
        if thought:
            kept = "drops the thought of an earlier turn"
            noted = any(kept in note or "leaves out the assistant's thought" in note for note in notes)
            context = renderer.train_on == "last_assistant" or message.get("weight") == 0
            assert thought in text or noted or (context and number != last)
            assert renderer.thinking.train or thought not in learned
        for call in message.get("tool_calls", ()):
            silent |= set() if call["function"]["name"] in text else {"calls"}
    contents = {note for note in notes if note.endswith(" says") and "leaves out" in note}
    assert contents == silent - {"calls"}, "what is left out is reported, and nothing else"
    assert any("of tool call" in note for note in notes) == ("calls" in silent)


def check_mask(tokenizer, segments, row):
    """The bytes of the target tokens are those of the target segments."""
    added = tokenizer.get_added_vocab()
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids.tolist())
    # A token of the byte-level vocabulary is one character for each byte.
    sizes = [len(token.encode()) if token in added else len(token) for token in tokens]
    by_tokens = np.repeat(row.labels >= 0, sizes)
    by_text = np.repeat([s.is_target for s in segments], [len(s.text.encode()) for s in segments])
    assert by_tokens.tolist() == by_text.tolist()


random = given(conversations(), st.sampled_from(RENDERERS))
relaxed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@random
@settings(max_examples=40, **relaxed)
def test_random_conversations(conversation, renderer):
    check(conversation, renderer)


@pytest.mark.slow
@random
@settings(max_examples=1500, **relaxed)
def test_many_random_conversations(conversation, renderer):
    check(conversation, renderer)


def test_ten_templates_are_tried():
    assert len({tokenizer.chat_template for tokenizer in TOKENIZERS}) >= 10
    assert set(PLAIN) < set(TEMPLATES)
