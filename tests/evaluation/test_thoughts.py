"""Thoughts are told apart from answers, in the forms that chat templates write them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.thoughts import KNOWN, Parts, Thinking, split, split_known, thinking_of

THINK = Thinking("<think>\n", "\n</think>\n\n")
OPENED = Thinking("<think>\n", "\n</think>\n\n", opened=True)
HARMONY = Thinking(
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    plain="<|channel|>final<|message|>",
)
PROSE = Thinking("Here is my thought process:", "Here is my response:")


@pytest.mark.parametrize(
    ("text", "thinking", "thought", "answer"),
    [
        ("<think>\nabc\n</think>\n\nParis", THINK, "abc", "Paris"),
        ("<think>abc</think>Paris", THINK, "abc", "Paris"),
        (" \n<think>\nabc\n</think>\n\nParis", THINK, "abc", "Paris"),
        # The prompt opened the thought; a model may open it again.
        ("abc\n</think>\n\nParis", OPENED, "abc", "Paris"),
        ("<think>\nabc\n</think>\n\nParis", OPENED, "abc", "Paris"),
        # A thought that nothing opened.
        ("abc\n</think>\n\nParis", THINK, "abc", "Paris"),
        # An empty thought is none.
        ("<think>\n\n</think>\n\nParis", THINK, None, "Paris"),
        ("\n</think>\n\nParis", OPENED, None, "Paris"),
        # Words before it belong to the answer; an answer may speak of the tags.
        ("Well. <think>abc</think>Paris", THINK, "abc", "Well. Paris"),
        ("The tag <think> opens one.", THINK, None, "The tag <think> opens one."),
        ("Write </think> after it.", THINK, None, "Write </think> after it."),
        ("<think>\na\n</think>\n\nThe tag <think> opens one.", THINK, "a", "The tag <think> opens one."),
        # Two in a row; white space of the answer's first line stays.
        ("<think>\n\n</think>\n\n<think>\na\n</think>\nParis", THINK, "a", "Paris"),
        ("<think>a</think><think>b</think>Paris", THINK, "a\n\nb", "Paris"),
        ("<think>\na\n</think>\n\n    return 1\n", THINK, "a", "    return 1\n"),
        ("Paris", THINK, None, "Paris"),
        ("\nParis ", THINK, None, "\nParis "),
        ("", THINK, None, ""),
        (f"{HARMONY.open}abc{HARMONY.close}Paris", HARMONY, "abc", "Paris"),
        ("<|channel|>final<|message|>Paris", HARMONY, None, "Paris"),
        # What follows a thought may be a call.
        (f"{HARMONY.open}abc<|end|><|start|>assistant to=f", HARMONY, "abc", "<|start|>assistant to=f"),
        ("Here is my thought process: abc Here is my response: Paris", PROSE, "abc", " Paris"),
    ],
)
def test_a_thought_is_split_from_its_answer(text, thinking, thought, answer):
    parts = split(text, thinking)
    assert (parts.thought, parts.answer) == (thought, answer)
    assert parts.closed is (None if thought is None else True)


@pytest.mark.parametrize(
    ("text", "thinking", "thought"),
    [
        ("<think>\nabc", THINK, "abc"),
        ("abc", OPENED, "abc"),
        ("", OPENED, None),
        ("<think>a</think><think>b", THINK, "a\n\nb"),
        (f"{HARMONY.open}abc", HARMONY, "abc"),
    ],
)
def test_an_unclosed_thought_has_no_answer(text, thinking, thought):
    assert split(text, thinking) == Parts(thought, None, False)


@pytest.mark.parametrize("thinking", KNOWN, ids=lambda thinking: thinking.open.strip())
@settings(max_examples=25, deadline=None)
@given(thought=st.text("ab <\n", min_size=1), answer=st.text("xy <\n"))
def test_known_tags_are_split_whatever_is_said(thinking, thought, answer):
    for found in (
        split(thinking.open + thought + thinking.close + answer, thinking),
        split_known(thinking.open + thought + thinking.close + answer),
    ):
        assert found.thought == (thought.strip() or None)
        # Blank lines before the answer are the template's.
        assert found.answer is not None and answer.endswith(found.answer)
        assert answer.removesuffix(found.answer).strip() == ""


def test_a_text_without_known_tags_is_the_answer():
    for text in ("Paris", "Use <b> and </b>.", "It said <think> once.", "\n a"):
        assert split_known(text) == Parts(None, text, None)


@pytest.mark.parametrize(
    ("template", "rendered", "opened"),
    [
        ("{% if x %}<think>{% endif %}</think>", "user: a\nassistant:\n", False),
        ("...'<think>\\n' }}", "user: a\nassistant:\n<think>\n", True),
        ("<think></think>", "assistant:\n<think>\n\n</think>\n\n", None),
        ("{{ messages }}", "user: a", None),
        ("<|channel|>analysis<|message|>", "<|start|>assistant", False),
    ],
)
def test_a_template_says_which_tags_it_writes(template, rendered, opened):
    found = thinking_of(template, rendered)
    assert (None if found is None else found.opened) is opened
