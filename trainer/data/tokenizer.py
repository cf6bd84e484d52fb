"""The tokenizer of a run: the base model's, or a small byte-level BPE learned from the train split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.base_headers import vocabulary_rows
from trainer.config import DataConfig, ModelConfig
from trainer.data.names import is_hub_id
from trainer.data.new_tokens import add_new_tokens, mark_control_tokens
from trainer.data.templates import TemplateName, built_in, set_template
from trainer.errors import TrainerError

if TYPE_CHECKING:  # rows are read and checked before transformers is loaded
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"  # noqa: S105 - a token of the vocabulary, not a password


def load_tokenizer(
    model: ModelConfig, data: DataConfig, place: Path | None = None, *, with_torch: bool = True
) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the new tokens, the template and its stop token set.

    Args:
        model: names the base.
        data: its template, template_name and template_kwargs say how conversations are written.
        place: folder of its tokenizer; None looks for it.
        with_torch: whether to load torch, without which transformers can't read the class that the folder names: it
            then loads tokenizer.json as it is.

    Returns:
        A tokenizer whose eos_token ends assistant turns and whose pad_token is set.

    Raises:
        TrainerError: it cannot be loaded, has a new token already, or the template does not fit it.
    """
    place = place or tokenizer_place(model)
    loader: Any
    if with_torch:
        from transformers import AutoTokenizer as loader  # noqa: N813 - one of two, by one name
    else:
        from transformers import PreTrainedTokenizerFast as loader  # noqa: N813
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # what a broken file makes the libraries raise is anything
        raise TrainerError(
            f"model.name_or_path: no tokenizer could be loaded from {model.name_or_path}: {error}"
        ) from error
    add_new_tokens(tokenizer, model.new_tokens, _rows_of(place))
    set_template(tokenizer, data.template, data.template_name, data.template_kwargs)
    mark_control_tokens(tokenizer, model.new_tokens)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _rows_of(folder: Path) -> int | None:
    """Rows of the embedding by a model's config.json; None where the file does not say."""
    try:
        return vocabulary_rows(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return None


def tokenizer_place(model: ModelConfig) -> Path:
    """The folder with the base model's tokenizer; of a hub id its small files are downloaded. No library is loaded.

    Args:
        model: names the base.

    Returns:
        The folder, in place or in the hub's cache.

    Raises:
        TrainerError: there is no such folder, or the hub does not give the files.
    """
    place = Path(model.name_or_path or "")
    if place.is_dir():
        return place
    if not is_hub_id(str(place)):
        raise TrainerError(f"model.name_or_path: there is no folder {place}")
    from trainer.hub import tokenizer_folder  # loads the hub's client

    return tokenizer_folder(str(model.name_or_path), model.revision)


def scratch_tokenizer(template: TemplateName) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has the template and its special tokens, and has learned nothing yet."""
    return train_tokenizer((), template, vocab_size=300)


def train_tokenizer(
    texts: Iterable[str], template: TemplateName, vocab_size: int, new_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE.

    Args:
        texts: what it is learned from, the train split alone.
        template: its special tokens are kept whole.
        vocab_size: entries at most: special tokens, 256 bytes, merges and new tokens.
        new_tokens: model.new_tokens.

    Returns:
        A tokenizer with the template, its stop token as eos_token, and a pad_token of its own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(new_tokens),
        special_tokens=scratch_special_tokens(template),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = _wrap(tokenizer, template)
    add_new_tokens(wrapped, new_tokens)
    mark_control_tokens(wrapped, new_tokens)
    return wrapped


def scratch_special_tokens(template: TemplateName) -> list[str]:
    """The special tokens of a tokenizer learned for a built-in template, the stop token first.

    Args:
        template: the template's name.

    Returns:
        The tokens, the one for padding last.

    Raises:
        TrainerError: the template is the tokenizer's own, and one that is yet to be learned has none.
    """
    known = built_in(template)
    if known is None:
        raise TrainerError(
            "data.template is chat, but a model from scratch has no chat template of its own: choose alpaca, phi3 "
            "or chatml"
        )
    return [*known.special_tokens, PAD_TOKEN]


def _wrap(tokenizer: Tokenizer, template: TemplateName) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    stop, *others = scratch_special_tokens(template)
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
