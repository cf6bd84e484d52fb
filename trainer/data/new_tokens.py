"""model.new_tokens: tokens that a tokenizer gets for a run, and their pieces in the base's own tokens.

The text of a new token is what rows are written with, so it is ordinary text of a row. Only where the template itself
writes it between turns is it a control token, which a row must not spell. The command line reads the file that is
written here, so nothing heavy is imported at the start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import ModelConfig
from trainer.errors import TrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = "new_tokens.json"
"""In run_dir/data: for each new token its id and the ids of its pieces in the base's tokens."""

_TURNS = [{"role": role, "content": "Words"} for role in ("user", "assistant", "user")]


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], rows: int | None = None) -> None:
    """Add tokens to a tokenizer, each kept whole wherever a row spells it.

    Args:
        tokenizer: Changed in place.
        tokens: model.new_tokens. One that the tokenizer has, and the embedding not, is taken as it is.
        rows: Rows of the base's embedding; None where it is not known.

    Raises:
        TrainerError: The base has such a token already.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        number = vocabulary.get(token)
        if number is not None and (rows is None or number < rows):
            raise TrainerError(
                f"model.new_tokens: the base has {token!r} already (id {number}): take it out of model.new_tokens, "
                "where tokens without a row in the embedding are listed"
            )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    named = [str(token) for token in tokenizer.extra_special_tokens]
    if set(named) & set(tokens):
        tokenizer.extra_special_tokens = [token for token in named if token not in tokens]


def mark_control_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Make those new tokens special that the template writes between turns, so that no row may spell them.

    Args:
        tokenizer: With its template set; changed in place.
        tokens: model.new_tokens.
    """
    import jinja2
    from tokenizers import AddedToken

    try:
        text = str(tokenizer.apply_chat_template(_TURNS, tokenize=False, add_generation_prompt=True))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):  # rows are refused by it too, with the reason
        return
    control = [AddedToken(token, normalized=False, special=True) for token in tokens if token in text]
    tokenizer.add_tokens(control, special_tokens=True)


def pieces_of(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    """The ids that a tokenizer gives the text of an added token without having that token.

    Args:
        tokenizer: With the token.
        token: Its text.

    Returns:
        Ids of the model's vocabulary without the added ones; empty where it has none for this text.
    """
    backend: Any = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(token) if backend.normalizer else token
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    added = set(tokenizer.get_added_vocab().values())
    return [piece.id for word in words for piece in backend.model.tokenize(word) if piece.id not in added]


def write_new_tokens(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write NEW_TOKENS into a folder of prepared data, where there are new tokens.

    Args:
        model: The model section.
        tokenizer: With the new tokens.
        folder: The data's folder.
    """
    if model.new_tokens:
        (folder / NEW_TOKENS).write_text(json.dumps(described(model, tokenizer), ensure_ascii=False), encoding="utf-8")


def described(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """Id and pieces of each new token, by its text."""
    ids = tokenizer.get_vocab()
    return {token: {"id": ids[token], "pieces": pieces_of(tokenizer, token)} for token in model.new_tokens}


def read_new_tokens(model: ModelConfig, run_dir: Path) -> dict[int, tuple[int, ...]]:
    """What prepare wrote: the pieces of each new token.

    Args:
        model: The model section.
        run_dir: The run.

    Returns:
        Id to ids of its pieces; empty where there are no new tokens.

    Raises:
        TrainerError: The data was prepared without them.
    """
    if not model.new_tokens:
        return {}
    path = run_dir / "data" / NEW_TOKENS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {entry["id"]: tuple(entry["pieces"]) for entry in (content[token] for token in model.new_tokens)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{path} does not hold model.new_tokens ({error!r}): run the prepare stage again") from error
