"""Everything that a row says is in the text where it belongs, or the row is refused or reported."""

from typing import ClassVar

import pytest

from tests.trainer.data.chat_templates import make_tokenizer
from tests.trainer.data.thinking_templates import STRING_ARGUMENTS, thinking_tokenizer
from trainer.data.conversation import BadRowError, Conversation
from trainer.data.renderer import Renderer
from trainer.data.templates import set_template
from trainer.data.writer import CallStyle
from trainer.errors import TrainerError

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": 'Where "it" is'}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Looks\nup", "parameters": PARAMETERS}}]
LOOP = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
END = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CONTENT = "{{ m.content }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson }}{% endfor %}"


def renderer(template, left_out="refuse", arguments=None):
    tokenizer = thinking_tokenizer("qwen3")
    tokenizer.chat_template = template
    set_template(tokenizer, "chat", arguments=arguments)
    return Renderer(tokenizer, "assistant", left_out=left_out)


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def talk(*said, calls=(), tools=None, result="warm", **fields):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": roles[text[0]], "content": text[2:]} for text in said]
    if calls:
        called = {"role": "assistant", "content": "", "tool_calls": list(calls)}
        messages += [called, {"role": "tool", "content": result}, {"role": "assistant", "content": "Done"}]
    return Conversation("id", messages, tools=tools, **fields)


def text_of(segments):
    return "".join(segment.text for segment in segments)


@pytest.mark.parametrize(
    ("template", "words", "what"),
    [
        # A short text stands in many places by chance, "a" in each "assistant".
        (
            LOOP + "{% if m.role != 'user' %}" + CONTENT + "{% endif %}" + END,
            talk("u:a", "a:Yes"),
            "what the user says",
        ),
        (LOOP + "{% if m.role != 'system' %}" + CONTENT + "{% endif %}" + END, talk("s:us", "u:Hi", "a:Yes"), "system"),
        (LOOP + CONTENT + END, talk("u:Hi", calls=[call("weather", city="Rome")]), "the name of tool call 1"),
        (
            LOOP + CONTENT + "{{ m.tool_calls[0].function | tojson if m.tool_calls else '' }}" + END,
            talk("u:Hi", calls=[call("weather", city="Rome"), call("weather", city="Rome")]),
            "the name of tool call 2",
        ),
        (
            LOOP + CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}" + END,
            talk("u:Hi", calls=[call("weather", city="Rome")]),
            "the arguments of tool call 1",
        ),
        (
            LOOP + "{% if m.role != 'tool' %}" + CONTENT + "{% endif %}" + CALLS + END,
            talk("u:Hi", calls=[call("weather", city="Rome")], result="x"),
            "what the tool says",
        ),
        (
            LOOP + "{% if m.tool_calls %}" + CALLS + "{% else %}" + CONTENT + "{% endif %}" + END,
            Conversation(
                "id",
                [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "I look", "tool_calls": [call("weather", city="Rome")]},
                ],
            ),
            "what the assistant says",
        ),
        (
            "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + LOOP + CONTENT + CALLS + END,
            talk("u:Hi", "a:Yes", tools=TOOLS),
            "the tools",
        ),
    ],
    ids=["user", "system", "call", "second call", "arguments", "result", "words with a call", "tools"],
)
def test_what_the_template_leaves_out(template, words, what):
    with pytest.raises(BadRowError, match=rf"the chat template leaves out .*{what}.*data.left_out: warn"):
        renderer(template).segments(words)
    notes = renderer(template, left_out="warn").written(words).notes
    assert any("leaves out" in note and what in note for note in notes)


def test_a_thought_that_the_template_cannot_write():
    template = LOOP + "{{ m.content.split('</think>')[-1] }}" + END
    words = Conversation(
        "id",
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "reasoning_content": "muse"}],
    )
    with pytest.raises(BadRowError, match=r"messages\[1\]: the chat template leaves out the assistant's thought"):
        renderer(template).segments(words)
    assert "the chat template leaves out the assistant's thought" in renderer(template, "warn").written(words).notes


def test_a_template_that_leaves_out_some_contents():
    """A row of a shape that is written whole may still lose its words."""
    template = LOOP + "{{ '' if 'secret' in m.content or m.content == 'a' else m.content }}" + END
    found = renderer(template)
    assert "Hi" in text_of(found.segments(talk("u:Hi", "a:Yes")))
    with pytest.raises(BadRowError, match=r"messages\[0\]: the chat template leaves out what the user says"):
        found.segments(talk("u:a secret", "a:Yes"))
    with pytest.raises(BadRowError, match="what the user says"):
        found.segments(talk("u:a", "a:Yes"))  # not the one in "assistant"
    with pytest.raises(BadRowError, match="what the user says"):
        found.segments(talk("u:secret", "a:the secret of secrets"))


def test_a_template_that_writes_a_question_into_the_answer():
    template = LOOP + "{{ m.content + messages[0].content if loop.index == 2 else '' }}" + END
    with pytest.raises(BadRowError, match=r"mixes message 0 with the assistant's turn in message 1"):
        renderer(template).segments(talk("u:Hi", "a:Yes"))


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_stripped_white_space_is_reported_and_not_refused(name):
    tokenizer = make_tokenizer(name)
    set_template(tokenizer, "chat")
    found = Renderer(tokenizer, "assistant")
    assert not found.written(talk("u:Hi", "a:Yes")).notes
    written = found.written(talk("u: Hi\n", "a:\tYes "))
    assert written.notes == {"the chat template strips white space around what is said"}
    assert written.segments[-1].text == f"Yes{found.stop_token}"


def test_arguments_and_results_written_into_json():
    words = talk("u:Hi", calls=[call("weather", city='"Rome"\n', days=[1, 2.5, None, True])], result='he said "warm"\n')
    template = LOOP + "{{ m.content | tojson if m.role == 'tool' else m.content }}" + CALLS + END
    text = text_of(renderer(template).segments(words))
    assert r'{"city": "\"Rome\"\n", "days": [1, 2.5, null, true]}' in text
    assert r"he said \"warm\"" in text


@pytest.mark.parametrize(
    ("arguments", "style"),
    [
        ("{{ c.function.arguments }}", CallStyle(arguments_as_text=True)),  # an object would be Python's text
        ("{{ '' + c.function.arguments }}", CallStyle(arguments_as_text=True)),
        ("{{ c.function.arguments | tojson }}", CallStyle()),
        ("{% for k, v in c.function.arguments.items() %}{{ k + '=' + v | string }}{% endfor %}", CallStyle()),
        (
            "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
            CallStyle(),
        ),
    ],
)
def test_arguments_are_given_as_the_template_wants_them(arguments, style):
    calls = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}" + arguments + "{% endfor %}"
    found = renderer(LOOP + CONTENT + calls + END)
    assert found.writer.style == style
    segments = found.segments(talk("u:Hi", calls=[call("weather", city="Rom\u00e9")]))
    assert "Rom\u00e9" in segments[1].text
    assert "'city'" not in segments[1].text


def test_a_call_without_content_is_null_where_the_template_asks():
    template = LOOP + "{% if m.content is none %}" + CALLS + "{% else %}" + CONTENT + "{% endif %}" + END
    found = renderer(template)
    assert found.writer.style.no_content_as_null
    assert "Rome" in found.segments(talk("u:Hi", calls=[call("weather", city="Rome")]))[1].text


def test_a_thought_that_is_said_twice_is_written_once():
    twice = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "reasoning_content": "T", "content": "<think>T</think>A"},
    ]
    found = Renderer(thinking_tokenizer("qwen3"), "assistant")
    assert found.written(Conversation("a", twice)).answer.count("T") == 1
    twice[1]["reasoning_content"] = "Other"
    with pytest.raises(BadRowError, match="one thought of its own and another in <think> tags"):
        found.written(Conversation("a", twice))


def test_a_name_that_the_template_does_not_write_is_reported():
    named = [{"role": "user", "name": "Ann", "content": "Q"}, {"role": "assistant", "content": "A"}]
    notes = renderer(LOOP + CONTENT + END).written(Conversation("a", named)).notes
    assert notes == {"the chat template does not write a message's name"}
    assert not renderer(LOOP + "{{ m.name or '' }}" + CONTENT + END).written(Conversation("a", named)).notes


def test_a_template_without_tools_is_reported():
    found = renderer(STRING_ARGUMENTS)
    written = found.written(talk("u:Hi", calls=[call("weather", city="Rome")], tools=TOOLS))
    assert written.notes == {"the chat template does not read the tools that rows offer"}
    assert '<tool_call>weather\n{"city": "Rome"}</tool_call>' in written.segments[1].text


class TestArguments:
    """Arguments of the chat template, of a row and of all rows."""

    TEMPLATE = LOOP + CONTENT + "{{ '!' if mood == 'loud' else '' }}" + END

    def test_a_rows_own(self):
        found = renderer(self.TEMPLATE)
        loud = found.written(talk("u:Hi", "a:Yes", template_kwargs={"mood": "loud"}))
        assert text_of(loud.segments).count("!") == 2
        assert "!" not in text_of(found.segments(talk("u:Hi", "a:Yes", template_kwargs={"mood": "calm"})))

    def test_what_the_template_does_not_read_is_reported(self):
        words = talk("u:Hi", "a:Yes", template_kwargs={"enable_thinking": False, "tools": 3})
        assert renderer(self.TEMPLATE).written(words).notes == {
            "the chat template does not read the argument 'enable_thinking'",
            "the chat template does not read the argument 'tools'",
        }

    def test_those_of_all_rows_are_the_exported_defaults(self, tmp_path):
        found = renderer(self.TEMPLATE, arguments={"mood": "loud"})
        found.tokenizer.save_pretrained(tmp_path)
        again = type(found.tokenizer).from_pretrained(tmp_path)
        asked = again.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert asked.count("!") == 1
        assert text_of(found.segments(talk("u:Hi", "a:Yes"))).count("!") == 2
        quiet = talk("u:Hi", "a:Yes", template_kwargs={"mood": "calm"})
        assert "!" not in text_of(found.segments(quiet)), "a row's own go first"

    def test_one_that_the_template_does_not_read_is_refused(self):
        with pytest.raises(TrainerError, match=r"template_kwargs: .* does not read 'moods'; did you mean mood\?"):
            renderer(self.TEMPLATE, arguments={"moods": "loud"})


class TestNamedTemplates:
    """Tokenizers with several chat templates."""

    NAMED: ClassVar = {
        "default": LOOP + CONTENT + END,
        "tool_use": "T" + LOOP + CONTENT + CALLS + END,
        "rag": "R" + LOOP + CONTENT + END,
    }

    @staticmethod
    def tokenizer(templates, name=None):
        tokenizer = thinking_tokenizer("qwen3")
        tokenizer.chat_template = templates
        set_template(tokenizer, "chat", name)
        return tokenizer

    def test_rows_with_tools_take_the_one_for_tools(self, tmp_path):
        tokenizer = self.tokenizer(self.NAMED)
        tokenizer.save_pretrained(tmp_path)
        assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
        found = Renderer(type(tokenizer).from_pretrained(tmp_path), "assistant")
        assert found.tokenizer.chat_template == self.NAMED
        assert text_of(found.segments(talk("u:Hi", "a:Yes"))).startswith("<|im_start|>")
        assert text_of(found.segments(talk("u:Hi", "a:Yes", tools=TOOLS))).startswith("T<|im_start|>")

    def test_the_chosen_one_becomes_the_default(self):
        found = Renderer(self.tokenizer(self.NAMED, "rag"), "assistant")
        assert text_of(found.segments(talk("u:Hi", "a:Yes"))).startswith("R<|im_start|>")
        assert text_of(found.segments(talk("u:Hi", "a:Yes", tools=TOOLS))).startswith("T<|im_start|>")

    @pytest.mark.parametrize(
        ("templates", "name", "words"),
        [
            (NAMED, "rug", "none called 'rug': choose one of default, rag, tool_use"),
            ({"rag": "x", "tool_use": "y"}, None, "none of them is the default: choose one of rag, tool_use"),
        ],
    )
    def test_none_of_that_name(self, templates, name, words):
        with pytest.raises(TrainerError, match=words):
            self.tokenizer(templates, name)
