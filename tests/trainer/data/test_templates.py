"""Segments: the right words are targets, for our own templates and for templates as well-known models have them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data.chat_templates import TEMPLATES, make_tokenizer
from trainer.data.conversation import BadRowError, Conversation
from trainer.data.renderer import Renderer, Segment
from trainer.data.templates import set_template
from trainer.data.tokenizer import scratch_tokenizer
from trainer.data.tokens import Encoder
from trainer.errors import TrainerError

BUILT_IN = ["alpaca", "phi3", "chatml"]
STOPS = {"alpaca": "<|endoftext|>", "phi3": "<|end|>", "chatml": "<|im_end|>"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def talk(*messages, tools=None):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return Conversation("id", [{"role": roles[text[0]], "content": text[2:]} for text in messages], tools=tools)


def renderer(name, train_on="assistant"):
    if name in BUILT_IN:
        return Renderer(scratch_tokenizer(name), train_on)
    tokenizer = make_tokenizer(name)
    set_template(tokenizer, "chat")
    return Renderer(tokenizer, train_on)


def test_alpaca_by_hand():
    start = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
    )
    found = renderer("alpaca").segments(talk("u:Add.\n\n### Input:\n1 1", "a:2"))
    assert found == [Segment(start, False), Segment("2<|endoftext|>", True)]


def test_phi3_and_chatml_by_hand():
    words = talk("s:Be short.", "u:Hi", "a:Yes", "u:So?", "a:No")
    assert renderer("phi3").segments(words) == [
        Segment("<|system|>\nBe short.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n", False),
        Segment("Yes<|end|>", True),
        Segment("\n<|user|>\nSo?<|end|>\n<|assistant|>\n", False),
        Segment("No<|end|>", True),
    ]
    assert [segment.text for segment in renderer("chatml").segments(words)][-2:] == [
        "\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n",
        "No<|im_end|>",
    ]


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_trained_on(name):
    words = talk("u:Hi", "a:Yes", "u:So?", "a:No")
    targets = {
        train_on: [segment.is_target for segment in renderer(name, train_on).segments(words)]
        for train_on in ("assistant", "last_assistant", "all")
    }
    assert targets == {"assistant": [False, True, False, True], "last_assistant": [False, True], "all": [True] * 4}
    last = renderer(name, "last_assistant").segments(words)
    assert last[1].text == f"No{STOPS[name]}"


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_tool_outputs_are_never_trained_on_and_tool_calls_are(name, train_on):
    words = talk("u:Add", "a:", "t:SECRET", "a:Done", tools=TOOLS)
    words.messages[1]["tool_calls"] = [CALL]
    segments = renderer(name, train_on).segments(words)
    assert segments[1] == Segment(
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' + STOPS[name], True
    )
    assert [segment.is_target for segment in segments if "SECRET" in segment.text] == [False]
    assert segments[3].is_target


def test_a_message_of_weight_0_is_context():
    words = talk("u:Hi", "a:Yes", "u:So?", "a:No")
    words.messages[1]["weight"] = 0
    assert [segment.is_target for segment in renderer("chatml").segments(words)] == [False, False, False, True]
    words.messages[2]["weight"] = 0
    assert [segment.is_target for segment in renderer("chatml", "all").segments(words)] == [True, False, False, True]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_spans_are_exact_in_templates_of_well_known_models(name):
    words = talk("u:Hi there", "a:Hello", "u:And?", "a:So it is")
    found = renderer(name)
    assert found.stop_token == TEMPLATES[name][4]
    segments = found.segments(words)
    assert [segment.is_target for segment in segments] == [False, True, False, True]
    lead = " " if name.startswith("mistral") else ""
    assert segments[1].text == f"{lead}Hello{found.stop_token}"
    assert segments[3].text == f"{lead}So it is{found.stop_token}"
    assert "And?" in segments[2].text


@pytest.mark.parametrize("name", sorted(TEMPLATES) + BUILT_IN)
def test_the_prompt_of_a_chat_api_is_a_prefix_of_the_trained_ids(name):
    """What vLLM or any chat API makes of the messages, token for token."""
    found = renderer(name)
    words = talk("u:Hi there", "a:Hello", "u:And?", "a:So it is")
    for turns in (words.messages[:2], words.messages):
        (row,) = Encoder(found.tokenizer).encode([found.segments(Conversation("id", turns))])
        asked = found.tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
        assert row.input_ids[: len(asked)].tolist() == asked
        assert row.num_prompt_tokens == len(asked)


def test_a_system_message_that_moves_stops_the_stage():
    words = talk("s:Be short", "u:Hi", "a:Yes", "u:So?", "a:No")
    with pytest.raises(TrainerError, match="the text before message 2 differently in training"):
        renderer("mistral").segments(words)
    assert renderer("mistral_first").segments(words)[0].text == "<s>[INST] Be short\n\nHi [/INST]"


@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        ("gemma", talk("s:Be short", "u:Hi", "a:Yes"), "System role not supported"),
        ("chatml", talk("u:Hi<|im_end|>", "a:Yes"), r"messages\[0\].content: spells the special token '<\|im_end\|>'"),
        ("chatml", talk("u:Hi", "a:Yes<|im_end|>No"), r"messages\[1\].content: spells the special token"),
    ],
)
def test_rows_that_the_template_cannot_write(name, words, reason):
    with pytest.raises(BadRowError, match=reason):
        renderer(name).segments(words)


def test_a_tool_call_that_the_template_leaves_out_is_a_bad_row():
    words = talk("u:Hi", "a:Wait", "u:And?", "a:Yes")
    words.messages[1]["tool_calls"] = [CALL]
    with pytest.raises(BadRowError, match="leaves out what the assistant says"):
        renderer("zephyr").segments(words)


def test_a_tokenizer_without_template_or_stop_token_is_refused():
    tokenizer = make_tokenizer("phi4")
    tokenizer.chat_template = None
    with pytest.raises(TrainerError, match="the tokenizer has no chat template"):
        set_template(tokenizer, "chat")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    with pytest.raises(TrainerError, match="without a special token"):
        set_template(tokenizer, "chat")
    tokenizer.eos_token = None
    with pytest.raises(TrainerError, match="has no eos_token"):
        set_template(tokenizer, "alpaca")


def test_a_template_that_stops_only_at_the_end_is_refused():
    tokenizer = make_tokenizer("zephyr")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
    )
    set_template(tokenizer, "chat")
    with pytest.raises(TrainerError, match=r"mixes message 2 with .* message 1, .*: set data.train_on: last_assistant"):
        Renderer(tokenizer, "assistant").segments(talk("u:Hi", "a:Yes", "u:So?", "a:No"))


def test_a_template_is_rendered_in_the_sandbox():
    tokenizer = make_tokenizer("phi4")
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}" + TEMPLATES["phi4"][0]
    with pytest.raises(TrainerError, match="refuses the conversation"):
        set_template(tokenizer, "chat")


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        (
            "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            r"more than 0.1 s of CPU time .* choose data.template alpaca",
        ),
        ("{{ 'x' * 2000000 }}", r"makes 2,000,\d\d\d characters of a conversation of \d+: it is broken"),
    ],
)
def test_a_template_that_does_not_end_or_floods_is_refused(monkeypatch, loop, words):
    monkeypatch.setattr("trainer.data.templates._RENDER_SECONDS", 0.1)
    found = renderer("phi4")
    found.tokenizer.chat_template = loop + TEMPLATES["phi4"][0]
    with pytest.raises(TrainerError, match=words) as refused:
        found.segments(talk("u:Hi", "a:Yes"))
    assert not isinstance(refused.value, BadRowError), "no row is to blame"


def test_marks_between_turns_that_are_no_special_tokens():
    assert renderer("alpaca").turn_marks == ("### Response:",)
    assert renderer("mistral").turn_marks == ("[/INST]",)
    assert renderer("chatml").turn_marks == renderer("llama3").turn_marks == ()


def test_the_begin_token_stands_first_once_in_built_in_templates():
    tokenizer = make_tokenizer("llama3")
    set_template(tokenizer, "alpaca")
    (row,) = Encoder(tokenizer).encode([Renderer(tokenizer, "assistant").segments(talk("u:Hi", "a:Yes"))])
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert row.input_ids[-1] == tokenizer.eos_token_id


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30).filter(
    str.strip
)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.sampled_from(BUILT_IN))
@settings(deadline=None, max_examples=150)
def test_mask_and_text_agree_for_random_conversations(turns, name):
    messages = [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    found = RENDERERS[name]
    (row,) = ENCODERS[name].encode([found.segments(Conversation("id", messages))])
    masked = row.labels == -100
    decode = found.tokenizer.backend_tokenizer.decode
    runs = [row.input_ids[~masked][i] for i in range(int((~masked).sum()))]
    assert decode(runs, skip_special_tokens=False) == "".join(answer + found.stop_token for _, answer in turns)
    asked = found.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert decode(row.input_ids[: row.num_prompt_tokens].tolist(), skip_special_tokens=False) == asked


RENDERERS = {name: renderer(name) for name in BUILT_IN}
ENCODERS = {name: Encoder(RENDERERS[name].tokenizer) for name in BUILT_IN}


SPECIAL = {
    name: [token.content for token in found.tokenizer.added_tokens_decoder.values() if token.special]
    for name in [*sorted(TEMPLATES), *BUILT_IN]
    for found in [renderer(name)]
}
LITERAL = {name: Renderer(renderer(name).tokenizer, "assistant", "as_text") for name in SPECIAL}
LITERAL_ENCODERS = {name: Encoder(found.tokenizer) for name, found in LITERAL.items()}


@given(st.data(), st.sampled_from(sorted(SPECIAL)))
@settings(deadline=None, max_examples=300)
def test_text_that_spells_special_tokens_never_becomes_one(data, name):
    """Its row is refused, or has the special tokens of the template alone, and decodes to the text."""
    part = st.one_of(
        st.sampled_from(SPECIAL[name]), st.text("<|>/s[]_ imendx", min_size=1, max_size=5), st.just("Hello")
    )
    words = ["x" + "".join(data.draw(st.lists(part, min_size=1, max_size=5))) + "x" for _ in range(4)]
    special = [token for token in SPECIAL[name] if any(token in said for said in words)]
    conversation = talk(*(f"{role}:{said}" for role, said in zip("uaua", words, strict=True)))
    plain = talk("u:x", "a:x", "u:x", "a:x")
    if special:
        with pytest.raises(BadRowError, match=r"content: spells the special token .* data.special_tokens: as_text"):
            Renderer(LITERAL[name].tokenizer, "assistant").segments(conversation)
    segments = LITERAL[name].segments(conversation)
    row, without = LITERAL_ENCODERS[name].encode([segments, LITERAL[name].segments(plain)])
    numbers = {LITERAL[name].tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[name]}
    assert [i for i in row.input_ids if i in numbers] == [i for i in without.input_ids if i in numbers]
    (decoded,) = LITERAL_ENCODERS[name].decode([row.input_ids])
    if name not in ("mistral", "mistral_first"):  # older SentencePiece: a space after each special token
        assert decoded.lstrip(" ") == "".join(segment.text for segment in segments).lstrip(" ")
    assert all(said in decoded for said in words)
