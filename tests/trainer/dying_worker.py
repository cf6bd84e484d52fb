"""One rank of a real training on which something happens at a chosen step; started by torchrun.

    dying_worker.py CONFIG.yaml RUN_DIR '{"kind": "SIGKILL", "rank": 1, "step": 3, "delay_s": 0.01}'

Kinds: any signal, which the rank sends to itself `delay_s` after the step; `nan_loss` and `nan_gradient`, where the
row with token 255 gives a loss or a gradient that is not finite; `lock`, where the rank sleeps after the step in C code
that keeps the interpreter's lock. The worker itself is the product's, unchanged, but that "fp16_on_cpu" lifts the
refusals of fp16 (see exactness_worker.py).
"""

import ctypes
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from trainer import worker
from trainer.config import load_trainer_config
from trainer.errors import Preempted
from trainer.stopping import RESUME_ME, clear_stop, stop_on_signals


def poison(engine, kind):
    """Make sequences with token 255 give numbers that are not finite."""

    def on_embedding(_module, arguments, output):
        poisoned = (arguments[0] == 255).any(dim=1)
        if kind == "nan_loss":
            return output.masked_fill(poisoned[:, None, None], torch.inf)
        if poisoned.any() and output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)
        return output

    engine.module.get_input_embeddings().register_forward_hook(on_embedding)
    return engine


def main():
    config_path, run_dir, what = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    kind = what.get("kind", "")
    if what.get("fp16_on_cpu"):
        worker.device_problems = lambda *_, **__: []
        CPU_Accelerator.is_fp16_supported = lambda _: True
    if kind.startswith("nan"):
        build_engine = worker.build_engine
        worker.build_engine = lambda config, found: poison(build_engine(config, found), kind)

    told, happened = [], []

    def on_step(row):
        if row["kind"] != "train":
            return
        if not told and dist.get_rank() == 0:
            with (run_dir / "starts.txt").open("a") as file:
                print(row["step"] - 1, file=file)
        told.append(row["step"])
        if dist.get_rank() != what["rank"] or happened or row["step"] < what.get("step", math.inf):
            return
        happened.append(row["step"])
        if kind == "lock":
            ctypes.PyDLL(None).sleep(600)
        if kind.startswith("SIG"):
            threading.Timer(what["delay_s"], os.kill, (os.getpid(), getattr(signal, kind))).start()

    if os.environ.get("RANK", "0") == "0":
        clear_stop(run_dir)  # torchrun ends the ranks beside a killed one by SIGTERM, which is taken for a request
    stop_on_signals(run_dir)
    try:
        worker.train(load_trainer_config(config_path), run_dir, on_step=on_step)
    except Preempted:
        (run_dir / f"preempted-{dist.get_rank()}").touch()
        sys.exit(RESUME_ME)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
