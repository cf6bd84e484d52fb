"""Completions of OpenAI-compatible endpoints, in the forms that servers and proxies write."""

import pytest

from evaluation.reply import finish_reason_of, is_known_reason, read_reply


def body(message, reason="stop"):
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": {"prompt_tokens": 3}}


THINKING_PART = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
TEXT_PART = {"type": "text", "text": "Paris"}


@pytest.mark.parametrize(
    ("message", "thought"),
    [
        ({"content": "Paris"}, None),
        ({"content": [TEXT_PART]}, None),
        ({"content": [{"type": "output_text", "text": "Pa"}, "ris"]}, None),
        ({"content": [THINKING_PART, TEXT_PART]}, "hm"),
        ({"content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, TEXT_PART]}, "hm"),
        ({"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}, TEXT_PART]}, "hm"),
        ({"content": [{"text": "hm", "thought": True}, TEXT_PART]}, "hm"),
        ({"content": [{"type": "redacted_thinking", "data": "x"}, TEXT_PART]}, None),
        ({"content": "Paris", "reasoning_content": "hm"}, "hm"),
        ({"content": "Paris", "reasoning": "hm", "reasoning_content": "hm"}, "hm"),
        ({"content": "Paris", "reasoning_content": ""}, None),
        ({"content": "Paris", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}, "hm"),
        ({"content": "Paris", "thinking": "hm"}, "hm"),
    ],
)
def test_text_is_the_answer_and_thoughts_are_apart(message, thought):
    reply = read_reply(body(message))
    assert (reply.text, reply.thought, reply.finish_reason, reply.cause) == ("Paris", thought, "stop", None)


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (body({"content": None, "reasoning_content": "hm"}, "length"), "not closed within judge.max_tokens=9: raise"),
        (body({"content": [THINKING_PART]}), "a thought and no answer"),
        (body({"content": None, "refusal": "I can't"}), "refused"),
        (body({"content": [{"type": "refusal", "refusal": "I can't"}]}), "refused"),
        (body({"content": [{"type": "image_url", "image_url": {}}]}), "no text, only image_url"),
        ({"error": {"code": 429, "message": "the text of a row"}}, "an error (code 429)"),
        ({"choices": None}, "no message"),
        ({"choices": [{"delta": {}}]}, "no message"),
        ({"choices": ["x"]}, "no message"),
        ("oops", "no message"),
        (None, "no message"),
    ],
)
def test_a_reply_without_an_answer_has_its_cause(given, cause):
    reply = read_reply(given, "judge.max_tokens=9")
    assert reply.text is None
    assert cause in reply.cause


@pytest.mark.parametrize("usage", [None, {}, "x", {"prompt_tokens": None}])
def test_a_reply_without_counts_is_read(usage):
    reply = read_reply(body({"content": "a"}) | {"usage": usage})
    assert (reply.text, reply.num_prompt_tokens, reply.num_response_tokens) == ("a", 0, 0)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        *((word, "stop") for word in ("stop", "eos_token", "STOP", "end_turn", "stop_sequence", {"type": "stop"})),
        *((word, "length") for word in ("length", "MAX_TOKENS", "model_length", "max_tokens")),
        ("SAFETY", "content_filter"),
        ("tool_use", "tool_calls"),
        *((word, None) for word in (None, "", "none")),
        ("abort", "abort"),
    ],
)
def test_finish_reasons_are_put_into_openais_words(word, reason):
    assert finish_reason_of(word) == reason
    assert is_known_reason(reason) == (reason != "abort")
