"""Instructions in, tuned model out: one rank's work, which knows nothing of Ray or Slurm."""

import logging

EXPECTED = (
    "Failed to load CPU gemm_4bit_forward from kernels-community",  # bitsandbytes: an inference kernel, from the hub
    "Setting accelerator to CPU",  # DeepSpeed, on every machine without a GPU; `plan` and the record name the device
    "OVERFLOW! Skipping step",  # DeepSpeed; in fp16 the loop takes the step again, else it says itself what was skipped
)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a library's line tells a person anything that is so and is not told otherwise."""
    message = record.getMessage()
    return not any(part in message for part in EXPECTED)


for name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed"):
    logging.getLogger(name).addFilter(is_news)
