"""The data stage beside TRL's, in one run on the same rows: packing, and rendering + tokenizing + masking.

    python tests/benchmarks/data_speed.py --data FILE.json [--rows 20000] [--packing-rows 100000]
        [--prepare-rows 40000] [--json OUT.json]

FILE is an Alpaca file; its rows are repeated, each time with another number in front, until there are enough. Every
measurement runs in a process of its own, so that peak memory is its own too. The tokenizer is a byte-level BPE of 8,192
entries learned from the file, the template ChatML, the mask on the prompt.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCE_LENGTH = 2048
MICRO_BATCH_SIZE = 8


def lognormal_lengths(num_rows: int) -> np.ndarray:
    """The lengths of the target: lognormal(5.2, 0.8), clipped to 8..2048."""
    return np.clip(np.random.default_rng(0).lognormal(5.2, 0.8, num_rows), 8, SEQUENCE_LENGTH).astype(np.int64)


def pack_ours(lengths: np.ndarray, _: Path) -> dict[str, Any]:
    """Plan the packs of these lengths."""
    from trainer.data.packing import plan_packs

    before, cpu, start = _memory(), time.process_time(), time.perf_counter()
    plan = plan_packs(lengths, SEQUENCE_LENGTH)
    seconds = time.perf_counter() - start
    return _packed(seconds, time.process_time() - cpu, before, int(plan.max()) + 1, lengths)


def pack_and_build_ours(lengths: np.ndarray, folder: Path) -> dict[str, Any]:
    """Plan the packs, and build the tensors of all of them from the shards on disk."""
    from trainer.data.batches import Batches
    from trainer.data.shards import PackedSplit, SplitWriter

    writer = SplitWriter(folder)
    for at in range(0, lengths.size, 1000):
        rows = [np.ones(length, dtype=np.int32) for length in lengths[at : at + 1000]]
        writer.add_rows([str(at)] * len(rows), [(row, row) for row in rows])
    before, cpu, start = _memory(), time.process_time(), time.perf_counter()
    writer.finish(sequence_length=SEQUENCE_LENGTH, packing=True, pad_token_id=0, seed=0)
    split = PackedSplit.open(folder)
    order = Batches(split, seed=0, global_batch_size=64, micro_batch_size=MICRO_BATCH_SIZE, rank=0, world_size=1)
    num_tokens = 0
    for number in range(order.steps_per_epoch):
        for batch in order.step(0, number).micro_batches:
            num_tokens += batch["input_ids"].numel()
    seconds = time.perf_counter() - start
    return _packed(seconds, time.process_time() - cpu, before, split.num_packs, lengths)


def pack_trl(lengths: np.ndarray, _: Path) -> dict[str, Any]:
    """TRL's pack_dataset with its best strategy: rows of a table, no tensors yet."""
    from trl import pack_dataset

    dataset = _table(lengths, "input_ids")
    before, cpu, start = _memory(), time.process_time(), time.perf_counter()
    packed = pack_dataset(dataset, SEQUENCE_LENGTH, "bfd")
    seconds = time.perf_counter() - start
    return _packed(seconds, time.process_time() - cpu, before, len(packed), lengths)


def pack_and_build_trl(lengths: np.ndarray, _: Path) -> dict[str, Any]:
    """The same, and the tensors of all packs (ids, labels, positions) by the collator of TRL's trainer."""
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    dataset = _table(lengths, "input_ids", "labels")
    collate = DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=True)
    before, cpu, start = _memory(), time.process_time(), time.perf_counter()
    packed = pack_dataset(dataset, SEQUENCE_LENGTH, "bfd")
    num_tokens = 0
    for at in range(0, len(packed), MICRO_BATCH_SIZE):
        batch = collate([packed[row] for row in range(at, min(at + MICRO_BATCH_SIZE, len(packed)))])
        num_tokens += batch["input_ids"].numel()
    seconds = time.perf_counter() - start
    return _packed(seconds, time.process_time() - cpu, before, len(packed), lengths)


def _table(lengths: np.ndarray, *columns: str) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_dict({column: [[1] * length for length in lengths.tolist()] for column in columns})


def _packed(seconds: float, cpu: float, before: int, num_packs: int, lengths: np.ndarray) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "memory_mib": (_memory() - before) / 2**20,
        "packs": num_packs,
        "over_lower_bound": num_packs / float(np.ceil(lengths.sum() / SEQUENCE_LENGTH)),
    }


def real_lengths(rows: list[dict[str, str]], folder: Path) -> np.ndarray:
    """Lengths of the file's own rows with the trained BPE."""
    from transformers import PreTrainedTokenizerFast

    from trainer.data.conversation import Conversation
    from trainer.data.renderer import Renderer
    from trainer.data.tokens import Encoder

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    renderer = Renderer(tokenizer, "assistant")
    conversations = [Conversation(str(i), _messages(row)) for i, row in enumerate(rows)]
    encoded = Encoder(tokenizer).encode([renderer.segments(conversation) for conversation in conversations])
    lengths = np.array([row.input_ids.size for row in encoded])
    return lengths[lengths <= SEQUENCE_LENGTH]


def tokenize_ours(rows: Path, folder: Path, audit: bool = False) -> dict[str, Any]:
    """Read collected lines; render, tokenize and mask them in this process."""
    from trainer.data.encode import Settings, encode_chunk
    from trainer.data.spread import chunked

    settings = Settings(str(folder), "", "assistant", SEQUENCE_LENGTH, "drop", audit)
    encode_chunk(settings, rows.read_bytes().splitlines()[:1])
    before, cpu, start = _memory(), time.process_time(), time.perf_counter()
    num_rows = num_targets = 0
    with rows.open("rb") as file:
        for chunk in chunked(iter(file)):
            encoded = encode_chunk(settings, chunk)
            num_rows += len(encoded.rows)
            num_targets += sum(int((labels != -100).sum()) for _, labels in encoded.rows)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory = (_memory() - before) / 2**20
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "rows_per_s": num_rows / seconds,
        "memory_mib": memory,
        "target_tokens": num_targets,
    }


def audit_ours(rows: Path, folder: Path) -> dict[str, Any]:
    """The same with the audit, which decodes every row and compares."""
    return tokenize_ours(rows, folder, audit=True)


def prepare_ours(rows: Path, folder: Path, num_processes: int = 1) -> dict[str, Any]:
    """The whole stage: read, check, split, compare for leaks, render, tokenize, mask, audit, pack, write."""
    from transformers import AutoTokenizer

    from trainer.config import TrainerConfig
    from trainer.prepare import prepare

    AutoTokenizer.from_pretrained(folder)  # imports are measured elsewhere, and TRL's are not counted either

    config = TrainerConfig.model_validate(
        {
            "model": {"name_or_path": str(folder)},
            "data": {
                "path": str(rows),
                "template": "chatml",
                "sequence_length": SEQUENCE_LENGTH,
                "split": {"train": 0.98, "validation": 0.01, "test": 0.01},
                "num_processes": num_processes,
            },
        }
    )
    before, cpu, start = _memory(), time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as run:
        summary = prepare(config, Path(run))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        start = time.perf_counter()
        prepare(config, Path(run))
        again = time.perf_counter() - start
    num_rows = sum(split["rows"] for split in summary["splits"].values())
    memory = (_memory() - before) / 2**20
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "rows_per_s": num_rows / seconds,
        "memory_mib": memory,
        "second_time_s": again,
    }


def prepare_ours_by_2(rows: Path, folder: Path) -> dict[str, Any]:
    """The whole stage in two processes; cpu_s is the first one's alone."""
    return prepare_ours(rows, folder, num_processes=2)


def tokenize_trl(rows: Path, folder: Path) -> dict[str, Any]:
    """What TRL's SFTTrainer does to a data set of prompts and completions before it trains, without packing."""
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    disable_caching()
    read = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    dataset = Dataset.from_list([{"prompt": messages[:1], "completion": messages[1:]} for messages in read])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    with tempfile.TemporaryDirectory() as output:
        asked = SFTConfig(output, max_length=None, use_cpu=True, bf16=False, report_to=[], completion_only_loss=True)
        before, cpu, start = _memory(), time.process_time(), time.perf_counter()
        trainer = SFTTrainer(model, asked, train_dataset=dataset, processing_class=tokenizer)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        num_rows = len(trainer.train_dataset)
    memory = (_memory() - before) / 2**20
    return {"seconds": seconds, "cpu_s": cpu, "rows_per_s": num_rows / seconds, "memory_mib": memory}


def _memory() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _messages(row: dict[str, str]) -> list[dict[str, str]]:
    question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _write_rows(rows: list[dict[str, str]], num_rows: int, folder: Path) -> tuple[Path, Path]:
    """The same rows as an Alpaca file and as lines that prepare has collected."""
    alpaca, collected = folder / "rows.jsonl", folder / "collected.jsonl"
    with alpaca.open("w", encoding="utf-8") as one, collected.open("w", encoding="utf-8") as other:
        for number in range(num_rows):
            row = rows[number % len(rows)]
            row = {**row, "instruction": f"{number}. {row['instruction']}"}
            one.write(json.dumps(row) + "\n")
            line = {"id": str(number), "messages": _messages(row), "file": "rows.jsonl", "row": number + 1}
            other.write(json.dumps(line) + "\n")
    return alpaca, collected


def _train_tokenizer(rows: list[dict[str, str]], folder: Path) -> None:
    from trainer.data.tokenizer import train_tokenizer

    texts = [message["content"] for row in rows for message in _messages(row)]
    train_tokenizer(texts, "chatml", 8192).save_pretrained(folder)


def _alone(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Run a measurement in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(function, *arguments).result()
    shown = "  ".join(f"{name} {value:,.4g}" for name, value in found.items())
    sys.stdout.write(f"{function.__name__:22} {shown}\n")
    sys.stdout.flush()
    return found


def main() -> None:
    """Measure, print, and write JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--prepare-rows", type=int, default=40_000)
    parser.add_argument("--packing-rows", type=int, default=100_000)
    parser.add_argument("--without-trl", action="store_true", help="measure ours alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = json.loads(options.data.read_text(encoding="utf-8"))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), Path(name) / "tokenizer"
        _train_tokenizer(rows, tokenizer)
        packers = [pack_ours, pack_and_build_ours]
        packers += [] if options.without_trl else [pack_trl, pack_and_build_trl]
        for what, lengths in (
            ("lognormal", lognormal_lengths(options.packing_rows)),
            (options.data.name, real_lengths(rows, tokenizer)),
        ):
            sys.stdout.write(f"\npacking {lengths.size:,} rows, lengths {what}, capacity {SEQUENCE_LENGTH}\n")
            results[f"packing {what}"] = {f.__name__: _alone(f, lengths, folder / "split") for f in packers}
        _, collected = _write_rows(rows, options.rows, folder)
        sys.stdout.write(f"\nrender + tokenize + mask {options.rows:,} rows\n")
        work = [tokenize_ours, audit_ours] + ([] if options.without_trl else [tokenize_trl])
        results["tokenizing"] = {f.__name__: _alone(f, collected, tokenizer) for f in work}
        alpaca, _ = _write_rows(rows, options.prepare_rows, folder)
        sys.stdout.write(f"\nthe whole stage, {options.prepare_rows:,} rows\n")
        results["prepare"] = {f.__name__: _alone(f, alpaca, tokenizer) for f in (prepare_ours, prepare_ours_by_2)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
