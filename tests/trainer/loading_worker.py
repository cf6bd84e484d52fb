"""One rank of the loading test: loads a base model as a stage does, and tells how much memory of its own that took.

Started by torchrun: loading_worker.py RUN_DIR STAGE.
"""

import json
import sys
import threading
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from trainer.config import TrainerConfig
from trainer.model import load_base, return_freed_memory
from trainer.worker import join
from trainer.zero import deepspeed_dict


def own_bytes():
    """Memory of this process that no file stands behind: pages of a mapped file can be given back at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main():
    run_dir, stage = Path(sys.argv[1]), int(sys.argv[2])
    config = TrainerConfig.model_validate(
        {
            "model": {"from_scratch": {}},
            "data": {"path": "rows.json"},
            "training": {"num_workers": 2, "precision": "bf16"},
            "deepspeed": {"stage": stage},
        }
    )
    found = join(config, run_dir)
    settings = deepspeed_dict(config.training, config.deepspeed, found.world_size)
    sharded_loading = HfDeepSpeedConfig(settings) if stage == 3 else None
    before, peak, done = own_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    return_freed_memory(1 << 20)
    model = load_base(config.model, run_dir, torch.bfloat16, found.device, 512)
    done.set()
    watcher.join()
    del sharded_loading
    whole = sum(getattr(parameter, "ds_numel", parameter.numel()) * 2 for parameter in model.parameters())
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        checksum = sum(parameter.double().sum().item() for parameter in model.parameters())
    everywhere = [None, None]
    dist.all_gather_object(everywhere, {"peak": (peak[0] - before) / whole, "checksum": checksum})
    if dist.get_rank() == 0:
        (run_dir / f"loaded-{stage}.json").write_text(json.dumps(everywhere))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
