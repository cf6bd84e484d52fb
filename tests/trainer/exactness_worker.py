"""One rank of the exactness test: takes one optimizer step for each case and saves the step's gradients.

Started by torchrun: exactness_worker.py FOLDER CASES_JSON. FOLDER holds packed/ and padded/, two run folders of the
same rows. A case is {"name", "packing", and fields of the training and deepspeed sections}.

fp16 is refused on CPUs, where it is slow and DeepSpeed finds it unsupported on most; PyTorch computes in it all the
same. So both refusals are lifted here, and the rest is DeepSpeed's and our own fp16, as on a GPU.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import safe_get_full_grad

from trainer import engine_state, worker
from trainer.config import TrainerConfig
from trainer.failures import StepGuard
from trainer.loop import optimizer_step
from trainer.worker import batches_of, build_engine, first_loss_scale, join


def config_of(case, folder, world_size):
    training = {"precision": "fp32", "max_grad_norm": None, "num_workers": world_size, **case["training"]}
    return TrainerConfig.model_validate(
        {
            "model": {"from_scratch": {"vocab_size": 300}, "attention": case.get("attention", "auto")},
            "data": {"path": folder / "rows.json", "sequence_length": 96, "packing": case["packing"]},
            "training": training,
            "deepspeed": case["deepspeed"],
        }
    )


def take_step(case, folder):
    """The loss as it is reported, and every parameter's gradient of the step as DeepSpeed would use it."""
    run_dir = folder / ("packed" if case["packing"] else "padded")
    config = config_of(case, folder, int(os.environ["WORLD_SIZE"]))
    found = join(config, run_dir)
    timeouts = group_timeouts()
    engine = build_engine(config, found)
    timeouts += group_timeouts()
    scale = first_loss_scale(config.training, None)
    gradients = {}
    real_step = engine.step

    def step():
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                gradients[name] = safe_get_full_grad(parameter).detach().float() / (scale.value if scale else 1)
        real_step()

    engine.step = step
    batch = batches_of(config, found, "train").step(0, 0)
    outcome = optimizer_step(engine, batch, 1e-3, found, StepGuard(engine), loss_scale=scale)
    steps = engine_state.num_optimizer_steps(engine)
    engine.destroy()
    loss = outcome.summed_loss / batch.num_target_tokens
    measured = {"loss": loss, "gradients": gradients, "norm": outcome.gradient_norm, "steps": steps}
    return measured | {"timeouts": timeouts}


def group_timeouts():
    """Timeout of every process group of this process, in seconds."""
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def main():
    folder = Path(sys.argv[1])
    worker.device_problems = lambda *_, **__: []
    CPU_Accelerator.is_fp16_supported = lambda _: True
    for case in json.loads(sys.argv[2]):
        result = take_step(case, folder)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{case['name']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
