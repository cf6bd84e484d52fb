"""What the evaluation must know about a model before loading it: limits, stop tokens, a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from evaluation.config import ModelSource
from evaluation.errors import EvaluationError
from evaluation.prompts import Prompt
from evaluation.thoughts import thinking_of

_WHOLE_BYTES = 64 * 2**20
_BLOCK_BYTES = 64 * 2**10
_NUM_BLOCKS = 256


@dataclass(frozen=True)
class ModelFacts:
    """Read from a model's small files.

    Attributes:
        fingerprint: Changes when the weights, the tokenizer or the configuration change.
        stop_token_ids: Tokens that end a response: the tokenizer's and the generation configuration's.
        max_positions: Longest sequence that the model was built for, in tokens.
        vocab_size: Rows of the embedding; every prompt token is below it.
        adapter_rank: Rank of the LoRA adapter; 0 without one.
        family: The architecture's word, such as llama.
        head_dim: Width of an attention head.
        special_tokens: Texts of the tokenizer's special tokens by id.
    """

    fingerprint: str
    stop_token_ids: tuple[int, ...]
    max_positions: int
    vocab_size: int
    adapter_rank: int
    family: str
    head_dim: int
    special_tokens: Mapping[int, str] = field(default_factory=dict)


def inspect_model(source: ModelSource) -> ModelFacts:
    """Read a model's limits and stop tokens, and fingerprint it.

    Args:
        source: Where the model is.

    Returns:
        What its small files say.

    Raises:
        EvaluationError: The folder is missing, or holds no model.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{source.path}: no model can be read from there ({error})") from error
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    try:
        declared = GenerationConfig.from_pretrained(source.path, revision=source.revision or "main").eos_token_id
    except OSError:  # the file is optional
        declared = config.eos_token_id
    stops |= set(declared if isinstance(declared, list) else [declared]) - {None}
    text = config.get_text_config()
    local = Path(source.path).is_dir()
    weights = fingerprint_folder(Path(source.path)) if local else f"{source.path}@{config._commit_hash}"
    adapter, rank = ("", 0) if source.adapter is None else _inspect_adapter(Path(source.adapter))
    return ModelFacts(
        fingerprint=f"{weights}+{adapter}",
        stop_token_ids=tuple(sorted(stops)),
        max_positions=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        adapter_rank=rank,
        family=config.model_type,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        special_tokens={
            number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special
        },
    )


def family_of(name: str) -> str:
    """Guess a model's family from its name at an endpoint, where there is no configuration to read it from.

    >>> family_of("meta-llama/Llama-3.1-8B-Instruct"), family_of("gpt-5-mini"), family_of("o3")
    ('llama', 'gpt', 'o3')
    """
    last = name.rpartition("/")[2].casefold()
    word = re.match("[a-z]*", last)
    return word[0] if word and len(word[0]) > 2 else last


def render_as_chat(prompts: Sequence[Prompt], source: ModelSource) -> list[Prompt]:
    """Give each prompt the tokens that a model's own chat template makes of its messages.

    Args:
        prompts: The test set.
        source: The model.

    Returns:
        The same prompts with other tokens, and the texts that this template writes around a thought; the text that a
        judge reads stays.

    Raises:
        EvaluationError: The model has no chat template, or it refuses the messages.
    """
    tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise EvaluationError(f"{source.path} has no chat template; set prompt: trained for this model")
    rendered = []
    for prompt in prompts:
        try:
            text = str(
                tokenizer.apply_chat_template(
                    list(prompt.messages), add_generation_prompt=True, tokenize=False, **prompt.template_kwargs
                )
            )
        except TemplateError as error:
            raise EvaluationError(f"{source.path}: its chat template refuses prompt {prompt.id!r} ({error})") from error
        # The template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        thinking = thinking_of(tokenizer.chat_template, text)
        rendered.append(replace(prompt, token_ids=tuple(ids), thinking=thinking))
    return rendered


def respell(prompts: Sequence[Prompt], spelled: Mapping[int, Sequence[int]]) -> list[Prompt]:
    """Give each prompt other tokens in place of those that a model does not have. Pure.

    Args:
        prompts: The test set.
        spelled: Id to the ids in its place.

    Returns:
        The same prompts; the text that a judge reads stays.
    """
    if not spelled:
        return list(prompts)
    read = [tuple(part for token in prompt.token_ids for part in spelled.get(token, (token,))) for prompt in prompts]
    return [replace(prompt, token_ids=ids) for prompt, ids in zip(prompts, read, strict=True)]


def fingerprint_folder(folder: Path) -> str:
    """Hash a model folder's files by name and content.

    A file above 64 MiB is hashed by its size and 256 evenly spaced blocks of 64 KiB, its ends included: training moves
    every weight a little, and reading 100 GB to find that out would take longer than the evaluation.

    Args:
        folder: The model's folder.

    Returns:
        128 bits in hexadecimal.

    Raises:
        EvaluationError: The folder holds no file.
    """
    digest = hashlib.sha256()
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not files:
        raise EvaluationError(f"{folder}: no model files are there")
    for path in files:
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for block in range(_NUM_BLOCKS):
                file.seek(block * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:32]


def _inspect_adapter(folder: Path) -> tuple[str, int]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise EvaluationError(f"{path} is missing; generation.adapter must be a folder written by PEFT")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise EvaluationError(f"{path}: vLLM serves LoRA adapters only, this one is {settings.get('peft_type')}")
    ranks = [int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values())]
    return fingerprint_folder(folder), max(ranks)
