"""The tokenizer of a run: the base model's, or a small byte-level BPE learned from the train split."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.config import ModelConfig
from trainer.data.sources import is_hub_id
from trainer.data.templates import TemplateName, built_in, set_template
from trainer.errors import TrainerError
from trainer.hub import tokenizer_folder

if TYPE_CHECKING:  # rows are read and checked before transformers is loaded
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"  # noqa: S105 - a token of the vocabulary, not a password


def load_tokenizer(model: ModelConfig, template: TemplateName) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with the template and its stop token set.

    Args:
        model: names the base.
        template: how conversations are written.

    Returns:
        A tokenizer whose eos_token ends assistant turns and whose pad_token is set.

    Raises:
        TrainerError: it cannot be loaded, or the template does not fit it.
    """
    from transformers import AutoTokenizer  # loads torch, which a run from scratch does not need yet

    place = Path(model.name_or_path or "")
    if not place.is_dir():
        if not is_hub_id(str(place)):
            raise TrainerError(f"model.name_or_path: there is no folder {place}")
        place = tokenizer_folder(str(model.name_or_path), model.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # what a broken file makes the libraries raise is anything
        raise TrainerError(
            f"model.name_or_path: no tokenizer could be loaded from {model.name_or_path}: {error}"
        ) from error
    set_template(tokenizer, template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def scratch_tokenizer(template: TemplateName) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has the template and its special tokens, and has learned nothing yet."""
    return train_tokenizer((), template, vocab_size=300)


def train_tokenizer(texts: Iterable[str], template: TemplateName, vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE.

    Args:
        texts: what it is learned from, the train split alone.
        template: its special tokens are kept whole.
        vocab_size: entries at most: special tokens, 256 bytes and merges.

    Returns:
        A tokenizer with the template, its stop token as eos_token, and a pad_token of its own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_special_tokens(template),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, template)


def _special_tokens(template: TemplateName) -> list[str]:
    known = built_in(template)
    if known is None:
        raise TrainerError(
            "data.template is chat, but a model from scratch has no chat template of its own: choose alpaca, phi3 "
            "or chatml"
        )
    return [*known.special_tokens, PAD_TOKEN]


def _wrap(tokenizer: Tokenizer, template: TemplateName) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    stop, *others = _special_tokens(template)
    tokenizer.add_special_tokens([stop, *others])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=stop,
        pad_token=PAD_TOKEN,
        additional_special_tokens=[token for token in others if token != PAD_TOKEN],
        clean_up_tokenization_spaces=False,
    )
    set_template(wrapped, template)
    return wrapped
