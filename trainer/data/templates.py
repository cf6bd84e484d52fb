"""The chat template that is saved beside the model: the built-in ones, the tokenizer's own, and how one is rendered.

Every template is a Jinja chat template, the built-in ones too: what is trained on and what any chat API makes of the
exported tokenizer come from one text. Only the sandboxed engine of transformers renders it.
"""

from __future__ import annotations

import difflib
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.meta
import jinja2.sandbox

from trainer.data.conversation import BadRowError, Message
from trainer.errors import TrainerError

if TYPE_CHECKING:  # rows are read and checked before transformers is loaded
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["alpaca", "phi3", "chatml", "chat"]
TrainOn = Literal["assistant", "last_assistant", "all"]
SpecialTokens = Literal["refuse", "as_text"]

_RENDER_SECONDS = 10.0  # CPU time of one conversation; ten megabytes of text take well under a second
_FREE_CHARACTERS = 1_000_000  # a template may write so many, and
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # known to transformers alone, and without variables
_CHARACTERS_A_CHARACTER = 20  # so many more for each character of the conversation

# What an assistant says: its thoughts, its words and its tool calls; and how tools are offered to it.
_MACROS = """\
{%- macro words(message) -%}
{%- if message['reasoning_content'] %}{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' }}{% endif %}
{{- message['content'] }}
{%- for call in message['tool_calls'] or [] -%}
{{ '\n' if message['content'] or not loop.first else '' }}
{{- '<tool_call>\n' + call['function'] | tojson + '\n</tool_call>' }}
{%- endfor %}
{%- endmacro -%}
{%- macro offer(tools) -%}
{{ 'You may call tools. To call one, write <tool_call>, a JSON object with its name and arguments, and </tool_call>.' }}
{%- for tool in tools %}{{ '\n' + tool['function'] | tojson }}{% endfor %}
{%- endmacro -%}
"""

_ALPACA = (
    _MACROS
    + """\
{%- for message in messages -%}
{%- if loop.first -%}
{%- if message['role'] == 'system' %}{{ message['content'] }}
{%- else %}{{ 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.' }}
{%- endif %}
{{- '\n\n' }}
{%- if tools %}{{ offer(tools) + '\n\n' }}{% endif %}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}
{%- elif message['role'] == 'tool' %}{{ '### Tool output:\n' + message['content'] + '\n\n' }}
{%- elif message['role'] == 'assistant' %}{{ '### Response:\n' + words(message) + eos_token + '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""
)

_MARKED = (
    _MACROS
    + """\
{%- for message in messages -%}
{%- if loop.first and tools and message['role'] != 'system' -%}
{{ START + 'system' + MIDDLE + offer(tools) + END }}
{%- endif %}
{{- START + message['role'] + MIDDLE }}
{%- if message['role'] == 'assistant' %}{{ words(message) + eos_token + '\n' }}
{%- else %}{{ message['content'] }}
{%- if loop.first and tools and message['role'] == 'system' %}{{ '\n\n' + offer(tools) }}{% endif %}
{{- END }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ START + 'assistant' + MIDDLE }}{% endif %}"""
)


def _marked(start: str, middle: str, end: str) -> str:
    """A template that marks each message with the same three texts."""
    names = f"{{%- set START, MIDDLE, END = {start!r}, {middle!r}, {end!r} -%}}\n"
    return names + _MARKED


@dataclass(frozen=True)
class BuiltIn:
    """A template that comes with the product."""

    jinja: str
    stop_token: str | None
    """Ends a turn where the tokenizer knows it as one special token; else its own eos_token does."""
    special_tokens: tuple[str, ...]
    """What a tokenizer made for this template keeps whole, the stop token first."""
    input_separator: str
    """Stands between an Alpaca row's instruction and its input."""


def built_in(name: TemplateName) -> BuiltIn | None:
    """The built-in template of this name; None for `chat`, which is the tokenizer's own."""
    match name:
        case "alpaca":
            return BuiltIn(_ALPACA, None, ("<|endoftext|>",), "\n\n### Input:\n")
        case "phi3":
            tokens = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
            return BuiltIn(_marked("<|", "|>\n", "<|end|>\n"), "<|end|>", tokens, "\n\n")
        case "chatml":
            return BuiltIn(
                _marked("<|im_start|>", "\n", "<|im_end|>\n"), "<|im_end|>", ("<|im_end|>", "<|im_start|>"), "\n\n"
            )
        case "chat":
            return None


def input_separator(name: TemplateName) -> str:
    """What stands between an Alpaca row's instruction and its input under this template."""
    template = built_in(name)
    return template.input_separator if template else "\n\n"


def set_template(
    tokenizer: PreTrainedTokenizerBase,
    name: TemplateName,
    template_name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Give a tokenizer the template, and the template's stop token as its eos_token.

    A begin token that the tokenizer puts before text by itself is written into a built-in template.

    Args:
        tokenizer: changed in place.
        name: of the template.
        template_name: which of the tokenizer's own templates becomes its default; None keeps its default. Rows with
            tools take the one that is called tool_use, as every chat API does.
        arguments: defaults of the template's arguments, written into it, so that a chat API renders the same text.

    Raises:
        TrainerError: `chat` with a tokenizer that has no template, no template of this name, or none that reads an
            argument; or no stop token can be found.
    """
    template = built_in(name)
    if template is None:
        tokenizer.chat_template = _own_template(tokenizer, template_name)
    else:
        if template.stop_token in tokenizer.get_added_vocab():
            tokenizer.eos_token = template.stop_token
        if tokenizer.eos_token is None:
            raise TrainerError(
                "the tokenizer has no eos_token, so the model could never learn to stop: choose another base"
            )
        begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + template.jinja
    if arguments:
        tokenizer.chat_template = _with_defaults(tokenizer.chat_template, arguments)
    if template is None:
        tokenizer.eos_token = _stop_token(tokenizer)


Templates = str | dict[str, str]
"""A chat template, or several by name."""


def _own_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> Templates:
    """The tokenizer's own template, or all of its named ones with the chosen one as the default."""
    own: Templates | None = tokenizer.chat_template
    if not own:
        raise TrainerError(
            "data.template is chat, but the tokenizer has no chat template: choose alpaca, phi3 or chatml, or tune "
            "an instruct model"
        )
    if isinstance(own, str):
        own = {"default": own}
    if (name or "default") not in own:
        what = f"none called {name!r}" if name else "several chat templates and none of them is the default"
        raise TrainerError(f"data.template_name: the tokenizer has {what}: choose one of {', '.join(sorted(own))}")
    own = own | {"default": own[name or "default"]}
    return own["default"] if len(own) == 1 else own


def arguments_read(template: str) -> set[str]:
    """The names of the arguments that a chat template reads."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return set(jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION_TAG.sub("", template))))
    except jinja2.TemplateError as error:
        raise TrainerError(
            f"the chat template is no valid Jinja (line {getattr(error, 'lineno', '?')}): {error}"
        ) from error


def _with_defaults(templates: Templates, arguments: Mapping[str, Any]) -> Templates:
    """The templates with a default for each argument that they read; an argument that is given goes first."""
    texts = {"default": templates} if isinstance(templates, str) else templates
    read = {name: arguments_read(text) for name, text in texts.items()}
    known = set().union(*read.values())
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise TrainerError(f"data.template_kwargs: the chat template does not read {name!r}{meant}")
    lines = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif -%}}\n"
        for name, value in arguments.items()
    )
    changed = {name: lines + text for name, text in texts.items()}
    return changed["default"] if isinstance(templates, str) else changed


def _stop_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The first special token that the tokenizer's own template writes after an assistant's words.

    Where it writes none after the last words, as GLM's, the token that starts the next turn ends this one.
    """
    words = "Fine words"
    turn: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": words}]
    try:
        after = [render(tokenizer, turn, None, False).rpartition(words)[2]]
        if not special_tokens_in(tokenizer, after[0]):
            with suppress(BadRowError):
                after.append(render(tokenizer, turn * 2, None, False).partition(words)[2].partition("Hello")[0])
    except BadRowError as error:
        raise TrainerError(
            f"data.template is chat, but the tokenizer's own template can't be used ({error.reason}): choose "
            "alpaca, phi3 or chatml, or correct it in the tokenizer's files"
        ) from error
    stops = special_tokens_in(tokenizer, after[-1])
    if not stops:
        raise TrainerError(
            "the tokenizer's chat template ends an assistant turn without a special token, so the model could never "
            "learn to stop: choose data.template alpaca, phi3 or chatml"
        )
    return stops[0]


def special_tokens_in(tokenizer: PreTrainedTokenizerBase, text: str, *, only_special: bool = False) -> list[str]:
    """The tokens of a text that a tokenizer keeps whole, in their order.

    Args:
        tokenizer: its special and added tokens count.
        text: tokenized.
        only_special: leave out added tokens that are not special, such as </tool_call>.

    Returns:
        The tokens.
    """
    known = set(tokenizer.all_special_ids)
    if only_special:
        known |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    else:
        known |= set(tokenizer.get_added_vocab().values())
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids if token in known]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any] | None,
    ask: bool,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The text that the tokenizer's chat template makes of messages.

    Args:
        tokenizer: has the template.
        messages: as the template takes them.
        tools: descriptions of tools.
        ask: add the generation prompt.
        arguments: more of the template's arguments.

    Returns:
        The text.

    Raises:
        BadRowError: the template refuses the conversation.
        TrainerError: the template writes without end.
    """
    try:
        with _limited_time():
            text = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=ask, **(arguments or {})
            )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise BadRowError(f"the chat template refuses the conversation: {error}", "messages") from error
    text = str(text)
    if len(text) > _FREE_CHARACTERS:
        given = len(str(messages)) + len(str(tools))
        if len(text) > _FREE_CHARACTERS + _CHARACTERS_A_CHARACTER * given:
            raise TrainerError(
                f"the chat template makes {len(text):,} characters of a conversation of {given:,}: {_OTHER_TEMPLATE}"
            )
    return text


_OTHER_TEMPLATE = "it is broken or means harm; fix it, or choose data.template alpaca, phi3 or chatml"


@contextmanager
def _limited_time() -> Iterator[None]:
    """Raise TrainerError in what takes too much CPU time; a template is code, and the sandbox lets it loop.

    Only the main thread of a process can be interrupted, which is where rows are rendered.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise TrainerError(
            f"the chat template takes more than {_RENDER_SECONDS:g} s of CPU time for one conversation: "
            f"{_OTHER_TEMPLATE}"
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
