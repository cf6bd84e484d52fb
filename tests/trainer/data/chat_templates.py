"""Chat templates of the structure that well-known models have, in our own words, and small tokenizers with them."""
# ruff: noqa: E501 - the templates are text

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'Be kind.' %}{% set rest = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system }}
{%- if tools %}{{ '\\nTools:' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{% endif %}
{{- '<|eot_id|>' }}
{%- for message in rest %}
{%- if message.tool_calls %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + (message.tool_calls[0].function | tojson) + '<|eot_id|>' }}
{%- else %}
{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

QWEN25 = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{%- for call in message.tool_calls or [] %}{{ '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Thoughts are written only after the last question; the last answer gets an empty thought where it has none.
QWEN3 = """\
{%- set place = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
{%- if not place.found and message['role'] == 'user' %}
{%- set place.last = messages | length - 1 - loop.index0 %}{% set place.found = true %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{%- set said = message['content'] %}{% set thought = message.reasoning_content or '' %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > place.last and (loop.last or thought) %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- said }}
{%- for call in message.tool_calls or [] %}{{ '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + ('user' if message['role'] == 'tool' else message['role']) + '\\n' + message['content'] }}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.index0 >= rest | length - 2 else '') + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""

# As MISTRAL, but the system message goes before the first question, whatever follows.
MISTRAL_FIRST = MISTRAL.replace("loop.index0 >= rest | length - 2", "loop.first")

GEMMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI3 = """\
{%- for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI4 = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

ZEPHYR = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

SENTENCEPIECE = ("mistral", "mistral_first", "mistral_metaspace")
TEMPLATES = {
    # name: (template, special tokens, begin token, end-of-text token, the stop token that is to be found)
    "llama3": (
        LLAMA3,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin|>",
        "<|end|>",
        "<|eot_id|>",
    ),
    "qwen2.5": (QWEN25, ["<|im_start|>", "<|im_end|>"], None, "<|endoftext|>", "<|im_end|>"),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], None, "<|endoftext|>", "<|im_end|>"),
    "mistral": (MISTRAL, [], "<s>", "</s>", "</s>"),
    "mistral_first": (MISTRAL_FIRST, [], "<s>", "</s>", "</s>"),
    "mistral_metaspace": (MISTRAL, [], "<s>", "</s>", "</s>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", "<end_of_turn>"),
    "phi3": (PHI3, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], None, "<|endoftext|>", "<|end|>"),
    "phi4": (PHI4, ["<|im_start|>", "<|im_sep|>", "<|im_end|>"], None, "<|endoftext|>", "<|im_end|>"),
    "zephyr": (ZEPHYR, [], "<s>", "</s>", "</s>"),
}


def make_tokenizer(name):
    """A tokenizer without merges that carries the template: of bytes, or of the SentencePiece kind."""
    template, special, begin, end, _ = TEMPLATES[name]
    special = [*special, *([begin] if begin else []), end]
    tokenizer = sentencepiece_like() if name in SENTENCEPIECE else byte_level()
    if name == "mistral_metaspace":
        # The newer way: only the very start of a text gets the space, not what follows a special token.
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([added(token) for token in special])
    if begin:
        ids = tokenizer.token_to_id(begin)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, ids)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, chat_template=template, additional_special_tokens=[]
    )


def added(token, special=True):
    """A token that is kept whole."""
    return AddedToken(token, special=special, normalized=False)


def byte_level():
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_like():
    """Spaces are written as a block, one is put before the text, and unknown characters fall back to bytes."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,[]/!?"
    vocab |= {letter: len(vocab) + i for i, letter in enumerate(letters)}
    vocab |= {"▁H": len(vocab), "▁h": len(vocab) + 1}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "H"), ("▁", "h")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
