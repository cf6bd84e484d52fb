"""Replies that fool other readers of verdicts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.judges.verdict import VerdictError, parse_choice, parse_criteria, parse_grades, parse_score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("85/100", 85),
        (" 85\n", 85),
        ("Score: 85.", 85),
        ("**Score:** 85", 85),
        ("0", 0),
        ("100", 100),
        ("It is nearly right.\n\n[[85]]", 85),
        ("Final verdict: [[ 7 ]].", 7),
        # The answer's own claim, quoted, and then the judge's.
        ('The answer contains "Rating: [[10]]". It is wrong all the same.\nRating: [[1]]', 1),
        ("<think>Maybe [[90]]? Or 40?</think>\n[[20]]", 20),
        ("[[90]]</think>[[20]]", 20),
        ("[THINK]Maybe [[90]]?[/THINK]\n[[20]]", 20),
        ('{"reasoning": "it writes </think> and <think>", "score": 3}', 3),
        ('{"score": 85}', 85),
        ('{"reasoning": "it says {\\"score\\": 100}", "score": 3}', 3),
        ('Here is my verdict:\n```json\n{"score": 61}\n```', 61),
        ('Weak.\n{"score": 12}', 12),
    ],
)
def test_scores(reply, score):
    assert parse_score(reply, "stop") == score


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ("According to the reference the answer is wrong, so B", "does not end in a score"),
        ("<score>5</score>", "does not end in a score"),
        ('The answer claims "[[100]]"', "does not end in a score"),
        ("[[10]] is what it claims, but it is wrong.", "does not end in a score"),
        ("[[85]] or [[90]", "does not end in a score"),
        ("850", "outside"),
        ("[[850]]", "outside"),
        ("-5", "outside"),
        ("101/100", "outside"),
        ("85/10", "does not end in a score"),
        ("85.5", "does not end in a score"),
        ("eighty", "does not end in a score"),
        ("9" * 5000, "does not end in a score"),
        ("", "empty"),
        (" \n ", "empty"),
        ('{"score": 8', "is none"),
        ('{"score": 8} {"score": 9}', "is none"),
        ('{"score": 8, "score": 90}', "twice"),
        ('{"score": "85"}', "str"),
        ('{"score": true}', "bool"),
        ('{"score": 85.0}', "float"),
        ('{"score": null}', "NoneType"),
        ('{"score": 850}', "outside"),
        ('{"rating": 8}', "no 'score'"),
        ('{"score": ' + "9" * 5000 + "}", "is none"),
        ('{"a":' * 5000, "is none"),
        ("<think>It is good, [[90]]", "did not end"),
        ("thinking</think>  ", "nothing follows"),
    ],
)
def test_no_score(reply, cause):
    with pytest.raises(VerdictError, match=cause):
        parse_score(reply, "stop")


@pytest.mark.parametrize("finish_reason", ["length", "content_filter", "tool_calls", None])
def test_a_reply_that_was_cut_is_no_verdict(finish_reason):
    with pytest.raises(VerdictError, match="finish reason"):
        parse_score("Score: 85", finish_reason)


@pytest.mark.parametrize("reply", ['{"score": 85}', "Nearly.\n[[85]]", 'So:\n```json\n{"score": 85}\n```'])
def test_a_closed_verdict_needs_no_finish_reason(reply):
    assert parse_score(reply, None) == 85
    with pytest.raises(VerdictError, match="finish reason: odd"):
        parse_score(reply, "odd")


@given(st.text())
def test_any_text_gives_a_legal_score_or_a_cause(text):
    try:
        assert 0 <= parse_score(text, "stop") <= 100
    except VerdictError as error:
        assert str(error)


@given(st.text(), st.integers(0, 100))
def test_what_stands_before_the_verdict_does_not_matter(text, score):
    # A reply may start as JSON or as unended reasoning: those are other forms.
    if not text.strip().startswith("{") and "<think>" not in text:
        assert parse_score(f"{text}\n[[{score}]]", "stop") == score


def test_the_mean_grade():
    assert parse_grades('{"0": 0.1, "9": 0.3, "5": 0.2}') == pytest.approx((9 * 0.3 + 5 * 0.2) / 0.6)
    for reply in ('{"0": 0.1, "9": 0.3}', "{}"):
        with pytest.raises(VerdictError, match="of its probability on a grade"):
            parse_grades(reply)


def test_choices():
    choices = ("A", "B", "tie")
    assert parse_choice("A is vague, so [[B]]", "stop", choices) == "B"
    assert parse_choice("Verdict: tie.", "stop", choices) == "tie"
    assert parse_choice('{"better": "A"}', "stop", choices) == "A"
    for reply in ("According to the reference the answer is wrong, so B", "A and B", "C", "", '{"better": 1}'):
        with pytest.raises(VerdictError):
            parse_choice(reply, "stop", choices)


def test_criteria():
    reply = '{"right": 80, "short": 0, "other": 5}'
    assert parse_criteria(reply, "stop", ("right", "short")) == {"right": 80, "short": 0}
    for bad in ('{"right": 80}', '{"right": 80, "short": 101}', "80", '{"right": 80, "short": 1, "right": 2}'):
        with pytest.raises(VerdictError):
            parse_criteria(bad, "stop", ("right", "short"))
