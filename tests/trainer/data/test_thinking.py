"""Thoughts: what is learned of them, under which settings, with templates in the form of well-known models."""

import pytest

from tests.trainer.data.thinking_templates import THINKING, thinking_tokenizer
from trainer.config import ThinkingConfig
from trainer.data.conversation import BadRowError, Conversation
from trainer.data.renderer import Renderer
from trainer.data.templates import set_template
from trainer.data.tokenizer import scratch_tokenizer
from trainer.data.tokens import Encoder

CALL = {"type": "function", "id": "abcdefgh1", "function": {"name": "add", "arguments": {"a": 1}}}
OFF, ON = {"enable_thinking": False}, {"thinking": True}


def renderer(name, arguments=None, train_on="assistant", left_out="refuse", **thinking):
    if name in THINKING:
        tokenizer = thinking_tokenizer(name)
        set_template(tokenizer, "chat", arguments=arguments)
    else:
        tokenizer = scratch_tokenizer(name)
    return Renderer(tokenizer, train_on, thinking=ThinkingConfig(**thinking), left_out=left_out)


def talk(*said):
    """u:question, a:answer, a:thought|answer, c:thought|  for a call, t:result."""
    roles = {"s": "system", "u": "user", "a": "assistant", "c": "assistant", "t": "tool"}
    messages = []
    for text in said:
        thought, _, words = text[2:].rpartition("|")
        messages.append({"role": roles[text[0]], "content": words})
        messages[-1] |= {"reasoning_content": thought} if thought else {}
        messages[-1] |= {"tool_calls": [CALL]} if text[0] == "c" else {}
    return Conversation("id", messages)


def shown(segments):
    """The text from the first question on, targets in brackets."""
    joined = "".join(f"[{segment.text}]" if segment.is_target else segment.text for segment in segments)
    return joined.replace("][", "").partition("Hi")[2]


ONE, NONE = talk("u:Hi", "a:muse|Yes"), talk("u:Hi", "a:Yes")
TWO = talk("u:Hi", "a:muse|Yes", "u:So?", "a:doubt|No")
IM = "<|im_end|>\n<|im_start|>assistant\n"
SO = "<|im_end|>\n<|im_start|>user\nSo?" + IM


@pytest.mark.parametrize(
    ("name", "arguments", "words", "expected"),
    [
        ("qwen3", None, ONE, IM + "[<think>\nmuse\n</think>\n\nYes<|im_end|>]"),
        ("qwen3", None, NONE, IM + "[Yes<|im_end|>]"),
        ("qwen3", None, TWO, IM + "[Yes<|im_end|>]" + SO[10:] + "[<think>\ndoubt\n</think>\n\nNo<|im_end|>]"),
        ("qwen3.5", None, ONE, IM + "<think>\n[muse\n</think>\n\nYes<|im_end|>]"),
        ("qwen3.5", OFF, NONE, IM + "<think>\n\n</think>\n\n[Yes<|im_end|>]"),
        ("qwen3.5", None, TWO, IM + "[Yes<|im_end|>]" + SO[10:] + "<think>\n[doubt\n</think>\n\nNo<|im_end|>]"),
        ("deepseek_v3.1", None, NONE, "<|Assistant|></think>[Yes</s>]"),
        ("deepseek_v3.1", ON, ONE, "<|Assistant|><think>[muse</think>Yes</s>]"),
        (
            "deepseek_v3.1",
            ON,
            TWO,
            "<|Assistant|></think>[Yes</s>]<|User|>So?<|Assistant|><think>[doubt</think>No</s>]",
        ),
        ("r1_distill", None, ONE, "<|Assistant|><think>\n[muse\n</think>\n\nYes</s>]"),
        ("r1_distill", None, TWO, "<|Assistant|>[Yes</s>]<|User|>So?<|Assistant|><think>\n[doubt\n</think>\n\nNo</s>]"),
        (
            "gpt_oss",
            None,
            ONE,
            "<|end|><|start|>assistant[<|channel|>analysis<|message|>muse<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Yes<|return|>]",
        ),
        ("gpt_oss", None, NONE, "<|end|><|start|>assistant[<|channel|>final<|message|>Yes<|return|>]"),
        (
            "gpt_oss",
            None,
            talk("u:Hi", "a:Yes", "u:So?", "a:No"),
            "<|end|><|start|>assistant[<|channel|>final<|message|>Yes]<|end|><|start|>user<|message|>So?"
            "<|end|><|start|>assistant[<|channel|>final<|message|>No<|return|>]",
        ),
        (
            "gpt_oss",
            None,
            talk("u:Hi", "c:muse|", "t:3", "a:Three"),
            "<|end|><|start|>assistant[<|channel|>analysis<|message|>muse<|end|><|start|>assistant to=functions.add"
            '<|channel|>commentary json<|message|>{"a": 1}<|call|>]<|start|>functions to=assistant<|channel|>commentary'
            '<|message|>"3"<|end|><|start|>assistant[<|channel|>final<|message|>Three<|return|>]',
        ),
        (
            "granite",
            ON,
            ONE,
            "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>[<think>\nmuse\n</think>\n\nYes<|end_of_text|>]",
        ),
        ("smollm3", None, ONE, IM + "[<think>\nmuse\n</think>\n\nYes<|im_end|>]"),
        ("smollm3", OFF, NONE, IM + "<think>\n\n</think>\n[Yes<|im_end|>]"),
        ("glm", None, ONE, "<|assistant|>[\n<think>muse</think>\nYes<|user|>]"),
        ("glm", None, NONE, "<|assistant|>[Yes<|user|>]"),
        ("glm", OFF, NONE, "/nothink<|assistant|>\n<think></think>[\nYes<|user|>]"),
        (
            "glm",
            None,
            talk("u:Hi", "c:muse|", "t:3", "a:Three", "u:So?", "a:No"),
            "<|assistant|>\n<think></think>\n[<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
            "</tool_call><|observation|>]\n3<|assistant|>\n<think></think>\n[Three<|user|>]\nSo?<|assistant|>[No<|user|>]",
        ),
        (
            "phi4_reasoning",
            None,
            ONE,
            "<|im_end|><|im_start|>assistant<|im_sep|>[<think>\nmuse\n</think>\n\nYes<|im_end|>]",
        ),
        ("chatml", None, ONE, IM + "[<think>\nmuse\n</think>\n\nYes<|im_end|>]"),
    ],
)
def test_what_is_learned_by_default(name, arguments, words, expected):
    found = renderer(name, arguments)
    segments = found.segments(words)
    assert shown(segments) == expected
    (row,) = Encoder(found.tokenizer).encode([segments])
    asked = found.tokenizer.apply_chat_template(words.messages[:-1], add_generation_prompt=True)["input_ids"]
    if not any(message["role"] == "tool" for message in words.messages):
        assert row.input_ids[: row.num_prompt_tokens].tolist() == asked, "a chat API asks with the same tokens"
    learned = "".join(segment.text for segment in segments if segment.is_target)
    assert found.tokenizer.decode(row.labels[row.labels >= 0], skip_special_tokens=False) == learned


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("qwen3", None, IM + "<think>\nmuse\n</think>\n\n[Yes<|im_end|>]"),
        ("qwen3.5", None, IM + "<think>\nmuse\n</think>\n\n[Yes<|im_end|>]"),
        ("deepseek_v3.1", ON, "<|Assistant|><think>muse</think>[Yes</s>]"),
        ("r1_distill", None, "<|Assistant|><think>\nmuse\n</think>\n\n[Yes</s>]"),
        (
            "gpt_oss",
            None,
            "<|end|><|start|>assistant<|channel|>analysis<|message|>muse<|end|>"
            "<|start|>assistant<|channel|>final<|message|>[Yes<|return|>]",
        ),
        ("smollm3", None, IM + "<think>\nmuse\n</think>\n\n[Yes<|im_end|>]"),
        ("glm", None, "<|assistant|>\n<think>muse</think>\n[Yes<|user|>]"),
    ],
)
def test_thoughts_that_are_not_trained_are_context(name, arguments, expected):
    segments = renderer(name, arguments, train=False).segments(ONE)
    assert shown(segments) == expected
    # The tokens are the same as those of thoughts that are trained.
    assert [segment.text for segment in segments] == [s.text for s in renderer(name, arguments).segments(ONE)]


@pytest.mark.parametrize(
    ("name", "policy", "expected"),
    [
        ("qwen3", "keep", IM + "[<think>\n\n</think>\n\nYes<|im_end|>]"),
        ("qwen3", "drop", IM + "[Yes<|im_end|>]"),
        ("qwen3", "fail", "writes an empty thought, which data.thinking.empty: fail refuses"),
        ("qwen3.5", "keep", IM + "<think>\n[\n</think>\n\nYes<|im_end|>]"),
        ("qwen3.5", "drop", r"opens a thought, and the row has none: .*template_kwargs: \{enable_thinking: false\}"),
        ("r1_distill", "keep", "<|Assistant|><think>\n[\n</think>\n\nYes</s>]"),
        ("r1_distill", "drop", "opens a thought, and the row has none: .* data.thinking.empty: keep"),
        ("glm", "keep", "<|assistant|>[\n<think></think>\nYes<|user|>]"),
        ("phi4_reasoning", "fail", "<|im_end|><|im_start|>assistant<|im_sep|>[Yes<|im_end|>]"),
    ],
)
def test_an_empty_thought_is_learned_only_on_request(name, policy, expected):
    found = renderer(name, empty=policy)
    if "thought" in expected:
        with pytest.raises(BadRowError, match=expected):
            found.segments(NONE)
    else:
        assert shown(found.segments(NONE)) == expected


@pytest.mark.parametrize("policy", ["keep", "drop", "fail"])
def test_an_empty_thought_in_the_rows_own_words(policy):
    words = talk("u:Hi", "a:<think>\n\n</think>\n\nYes")
    found = renderer("chatml", empty=policy)
    if policy == "fail":
        with pytest.raises(BadRowError, match=r"messages\[1\]: has an empty thought"):
            found.segments(words)
        return
    block = "<think>\n\n</think>\n\n" if policy == "keep" else ""
    assert shown(found.segments(words)) == f"{IM}[{block}Yes<|im_end|>]"


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "r1_distill", "gpt_oss", "glm"])
def test_earlier_turns_whose_thought_is_dropped(name):
    found = renderer(name).written(TWO)
    assert any("drops the thought of an earlier turn: it is learned" in note for note in found.notes)
    masked = renderer(name, earlier_turns="mask").written(TWO)
    learned = "".join(segment.text for segment in masked.segments if segment.is_target)
    assert "Yes" not in learned
    assert "doubt" in learned
    assert any("drops the thought of an earlier turn: it is not learned" in note for note in masked.notes)
    with pytest.raises(BadRowError, match=r"messages\[1\]: .*drops the thought .* data.thinking.earlier_turns: mask"):
        renderer(name, earlier_turns="refuse").segments(TWO)
    assert renderer(name, earlier_turns="refuse", train_on="last_assistant").segments(TWO)[-1].is_target


def test_a_thought_that_vanishes_with_the_next_question():
    """The first thought is written while its tool runs, and left out once the next question has come."""
    words = talk("u:Hi", "c:I will call|", "t:3", "a:It is 3", "u:Sure?", "a:Yes")
    call = '[\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]'
    rest = f"\n<|im_start|>user\n3{IM}[It is 3<|im_end|>]\n<|im_start|>user\nSure?{IM}[Yes<|im_end|>]"
    assert shown(renderer("qwen3").segments(words)) == IM + call + rest
    assert shown(renderer("qwen3", earlier_turns="mask").segments(words)) == (IM + call.strip("[]") + rest)


@pytest.mark.parametrize(
    ("name", "arguments", "advice"),
    [
        ("qwen3.5", OFF, r"says that none follows: set data.template_kwargs: \{enable_thinking: true\}"),
        ("smollm3", OFF, r"says that none follows: set data.template_kwargs: \{enable_thinking: true\}"),
        ("deepseek_v3.1", None, r"leaves out the assistant's thought: set data.template_kwargs: \{thinking: true\}"),
    ],
)
def test_a_thought_where_the_prompt_says_there_is_none(name, arguments, advice):
    with pytest.raises(BadRowError, match=advice):
        renderer(name, arguments).segments(ONE)


@pytest.mark.parametrize("name", ["qwen3", "r1_distill", "gpt_oss", "glm", "chatml", "phi4_reasoning"])
@pytest.mark.parametrize("content", ["<think>muse</think>Yes", "<think>\nmuse\n</think>\n\nYes"])
def test_a_thought_inside_the_content(name, content):
    segments = renderer(name, train=False).segments(talk("u:Hi", f"a:{content}"))
    learned = "".join(segment.text for segment in segments if segment.is_target)
    assert learned.removesuffix(renderer(name).stop_token) == "Yes"
    assert "muse" in "".join(segment.text for segment in segments)
    if name == "phi4_reasoning":  # nothing but the row says how its thoughts are written
        assert content in "".join(segment.text for segment in segments)


def test_an_answer_to_a_prompt_that_opened_the_thought():
    segments = renderer("r1_distill").segments(talk("u:Hi", "a:muse\n</think>\n\nYes"))
    assert shown(segments) == "<|Assistant|><think>\n[muse\n</think>\n\nYes</s>]"
    stray = renderer("chatml").segments(talk("u:Hi", "a:the tag </think> closes"))
    assert shown(stray) == IM + "[the tag </think> closes<|im_end|>]"


def test_what_the_prompt_supplies_is_never_a_target():
    segments = renderer("qwen3.5", train_on="all").segments(ONE)
    assert shown(segments) == f"Hi{IM}]<think>\n[muse\n</think>\n\nYes<|im_end|>]".partition("Hi")[2]
    assert segments[0].is_target


def test_a_message_of_weight_0_has_no_target_in_its_thought():
    words = talk("u:Hi", "a:muse|Yes", "u:So?", "a:doubt|No")
    words.messages[1]["weight"] = 0
    learned = "".join(segment.text for segment in renderer("chatml").segments(words) if segment.is_target)
    assert learned == "<think>\ndoubt\n</think>\n\nNo<|im_end|>"
    assert not renderer("qwen3").written(words).notes, "a turn that is not learned loses nothing"
