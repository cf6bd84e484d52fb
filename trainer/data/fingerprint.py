"""What prepared data depends on, as one short text: the same fingerprint means the same bytes."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from trainer.config import DataConfig, TrainerConfig

_CODE = 3  # raised when the same input gives other bytes than before
_TOKENIZER_FILES = "*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja"
_MODEL_KEYS = {"name_or_path", "revision", "from_scratch", "new_tokens"}
_LARGEST_TOKENIZER_FILE = 64 << 20  # bytes; the shards' index of a large model is smaller, its weights are larger


def fingerprint(config: TrainerConfig, data: DataConfig) -> str:
    """Digest of the content of all sources, the base's tokenizer, the options, and the libraries that tokenize.

    Args:
        config: its model and seed.
        data: its data section, hub sources pinned to a commit.

    Returns:
        32 hexadecimal digits.
    """
    kept = data.model_dump(mode="json", exclude={"cache", "num_processes"})
    asked = {
        "code": _CODE,
        "data": kept,
        "model": config.model.model_dump(mode="json", include=_MODEL_KEYS),
        "seed": config.seed,
        "versions": {name: version(name) for name in ("transformers", "tokenizers")},
    }
    digest = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16)
    for path in data.local_paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            _add(digest, file)
    base = Path(config.model.name_or_path or "")
    if config.model.name_or_path and base.is_dir():
        files = sorted(file for pattern in _TOKENIZER_FILES for file in base.glob(pattern))
        for file in files:
            if file.stat().st_size <= _LARGEST_TOKENIZER_FILE:
                _add(digest, file)
            if "strftime_now" in file.read_text(encoding="utf-8", errors="ignore"):
                # A chat template that writes today's date gives other tokens tomorrow.
                digest.update(datetime.now(UTC).date().isoformat().encode())
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Digest of a saved tokenizer's files.

    Args:
        folder: written by save_pretrained.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):  # further templates are in a folder
        _add(digest, file)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, file: Path) -> None:
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, "blake2b")
    digest.update(file.name.encode() + b"\0" + content.digest())
