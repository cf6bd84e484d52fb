"""One rank of the method x stage matrix: trains every cell for 20 steps in its own run folder.

Started by torchrun: matrix_worker.py FOLDER. FOLDER holds a folder for each cell, with cell.json in it.

fp16 is refused on CPUs; the refusals are lifted here, because PyTorch and DeepSpeed do all of it there, slowly.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from trainer import worker
from trainer.config import TrainerConfig


def main():
    worker.device_problems = lambda *_, **__: []
    CPU_Accelerator.is_fp16_supported = lambda _: True
    dist.init_process_group("gloo")
    for file in sorted(Path(sys.argv[1]).glob("*/cell.json")):
        config = TrainerConfig.model_validate(json.loads(file.read_text()))
        result = worker.train(config, file.parent)
        if dist.get_rank() == 0:
            (file.parent / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
