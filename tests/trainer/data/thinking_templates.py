"""Chat templates that write thoughts in the form of well-known models, in our own words, and a tokenizer for each."""
# ruff: noqa: E501 - the templates are text

from transformers import PreTrainedTokenizerFast

from tests.trainer.data.chat_templates import TEMPLATES, added, byte_level

# The prompt opens the thought, or with enable_thinking false closes it; earlier turns have none.
QWEN35 = """\
{%- set place = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set place.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\\n<tools>' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- set said = message.content | trim %}
{%- if message.role == 'assistant' %}
{%- set thought = (message.reasoning_content or '') | trim %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > place.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- said }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for name, value in call.function.arguments | items %}
{{- '<parameter=' + name + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
{%- endfor %}
{{- '</function>\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' + said + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false else '<think>\\n') }}
{%- endif %}"""

# `thinking` opens the thought; each answer starts after a closing tag, and thoughts in it are cut off.
DEEPSEEK_V31 = """\
{%- if thinking is not defined %}{% set thinking = false %}{% endif %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- elif message.role == 'tool' %}{{ '<|tool_output_begin|>' + message.content + '<|tool_output_end|>' }}
{%- else %}
{{- '<|Assistant|></think>' + (message.content or '').split('</think>')[-1] }}
{%- for call in message.tool_calls or [] %}{{ '<|tool_call_begin|>' + call.function.name + '<|tool_sep|>' + call.function.arguments + '<|tool_call_end|>' }}{% endfor %}
{{- eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' + ('<think>' if thinking else '</think>') }}{% endif %}"""

# The prompt opens the thought, and the answer is written without it.
R1_DISTILL = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- else %}{{ '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

# Thoughts are messages of a channel of their own; only the last answer ends with the stop token.
GPT_OSS = """\
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if message.tool_calls %}
{%- if message.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' + call.arguments | tojson + '<|call|>' }}
{%- else %}
{%- if loop.last and message.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- endif %}
{%- elif message.role == 'tool' %}{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>' + message.content | tojson + '<|end|>' }}
{%- else %}{{ '<|start|>' + ('developer' if message.role == 'system' else message.role) + '<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# Asks for thoughts in its system text; they are a part of the content.
GRANITE = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'You help.' %}{% set rest = messages %}{% endif %}
{%- if thinking %}{% set system = system + ' Write your thoughts between <think></think>.' %}{% endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- for message in rest %}{{ '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

# Thoughts are a part of the content; without thinking an empty one is written before every answer.
SMOLLM3 = """\
{%- set thinking = enable_thinking is not defined or enable_thinking %}
{%- set empty = '' if thinking else '<think>\\n\\n</think>\\n' %}
{{- '<|im_start|>system\\nReasoning Mode: ' + ('/think' if thinking else '/no_think') + '\\n\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{{- '<|im_end|>\\n' }}
{%- for message in rest %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
{%- if message.role == 'assistant' %}{{ empty + message.content.lstrip('\\n') }}{% else %}{{ message.content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + empty }}{% endif %}"""

# No token ends a turn: the next role's token does. Earlier turns have an empty thought.
GLM = """\
[gMASK]<sop>
{%- if tools %}{{ '<|system|>\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{% endif %}
{%- set place = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set place.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|assistant|>\\n<think>' + ((message.reasoning_content or '') | trim if loop.index0 > place.last else '') + '</think>' }}
{%- if message.content | trim %}{{ '\\n' + message.content | trim }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>' + call.function.name }}
{%- for name, value in call.function.arguments.items() %}{{ '\\n<arg_key>' + name + '</arg_key>\\n<arg_value>' + (value if value is string else value | tojson) + '</arg_value>' }}{% endfor %}
{{- '\\n</tool_call>' }}
{%- endfor %}
{%- elif message.role == 'tool' %}{{ '<|observation|>\\n' + message.content }}
{%- else %}
{{- '<|' + message.role + '|>\\n' + message.content }}
{%- if message.role == 'user' and enable_thinking is defined and not enable_thinking %}{{ '/nothink' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' + ('\\n<think></think>' if enable_thinking is defined and not enable_thinking else '') }}{% endif %}"""

# Writes a system text of its own instead of the row's; thoughts are a part of the content.
PHI4_REASONING = """\
{{- '<|im_start|>system<|im_sep|>Think first, between <think> and </think>.<|im_end|>' }}
{%- for message in messages %}
{%- if message.role != 'system' %}{{ '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

# The call's arguments are joined as text; no tools are described.
STRING_ARGUMENTS = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function.name + '\\n' + call.function.arguments + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_IM = ["<|im_start|>", "<|im_end|>", "<|im_sep|>"]
_DEEPSEEK = [
    "<|User|>",
    "<|Assistant|>",
    "<|tool_output_begin|>",
    "<|tool_output_end|>",
    "<|tool_call_begin|>",
    "<|tool_sep|>",
    "<|tool_call_end|>",
]
THINKING = {
    # name: (template, special tokens)
    "qwen3": (TEMPLATES["qwen3"][0], _IM),
    "qwen3.5": (QWEN35, _IM),
    "deepseek_v3.1": (DEEPSEEK_V31, _DEEPSEEK),
    "r1_distill": (R1_DISTILL, _DEEPSEEK),
    "gpt_oss": (GPT_OSS, ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"]),
    "granite": (GRANITE, ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]),
    "smollm3": (SMOLLM3, _IM),
    "glm": (GLM, ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]),
    "phi4_reasoning": (PHI4_REASONING, _IM),
    "string_arguments": (STRING_ARGUMENTS, _IM),
}


def thinking_tokenizer(name):
    """A byte-level tokenizer with the template; the tags of thoughts and calls are tokens, as they are in most models."""
    template, special = THINKING[name]
    tokenizer = byte_level()
    tokenizer.add_special_tokens([added(token) for token in [*special, "<s>", "</s>"]])
    tokenizer.add_tokens(
        [added(tag, special=False) for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>") if tag in template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )
