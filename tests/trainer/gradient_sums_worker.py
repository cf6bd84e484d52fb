"""One rank of the test of gradient sums: the gradient of one step of 64 micro-batches a rank, by stage and format.

Started by torchrun: gradient_sums_worker.py RUN_DIR. Writes RUN_DIR/sums.json: for each case the norm of the error of
the whole gradient, as a share of the norm of the exact sum. Exact is the sum in fp64 of the same micro-batches'
bf16 gradients, so the errors are those of summing alone, over micro-batches and ranks.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from exactness_worker import take_step

from trainer import worker
from trainer.config import TrainerConfig
from trainer.loss import gradient_scale
from trainer.worker import batches_of, join

NUM_MICRO_BATCHES = 64
CASES = [(0, "bf16"), *((stage, sums) for stage in (1, 2, 3) for sums in ("bf16", "fp32"))]


def case(stage, sums):
    batch = {"micro_batch_size": 1, "global_batch_size": NUM_MICRO_BATCHES * int(os.environ["WORLD_SIZE"])}
    deepspeed = {"stage": stage, "grad_accum_dtype": sums}
    return {"packing": True, "training": {"precision": "bf16", **batch}, "deepspeed": deepspeed}


def exact_sum(config, run_dir):
    """The step's gradients by name, in fp64, with no engine: each micro-batch's are added as soon as they are made."""
    found = join(config, run_dir)
    model = worker.load_base(config.model, run_dir, torch.bfloat16, found.device, config.data.sequence_length)
    worker.return_the_loss(model)
    batch = batches_of(config, found, "train").step(0, 0)
    scale = gradient_scale(batch.num_target_tokens, found.world_size)
    sums = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in model.named_parameters()}
    for micro_batch in batch.micro_batches:
        model.zero_grad()
        (model(**micro_batch) * scale).backward()
        for name, weight in model.named_parameters():
            sums[name] += weight.grad
    for total in sums.values():
        dist.all_reduce(total)
    return {name: total / found.world_size for name, total in sums.items()}


def main():
    run_dir = Path(sys.argv[1])
    config = TrainerConfig.model_validate(
        {
            "model": {"from_scratch": {"vocab_size": 300}},
            "data": {"path": "rows.json", "sequence_length": 96},
            "training": case(1, "fp32")["training"]
            | {"num_workers": int(os.environ["WORLD_SIZE"]), "max_grad_norm": None},
            "deepspeed": {"stage": 1},
        }
    )
    exact = exact_sum(config, run_dir)
    length = torch.cat([total.flatten() for total in exact.values()]).norm()
    errors = {}
    for stage, sums in CASES:
        gradients = take_step(case(stage, sums), run_dir)["gradients"]
        difference = torch.cat([(gradients[name] - total).flatten() for name, total in exact.items()])
        errors[f"zero-{stage}, {sums}"] = float(difference.norm() / length)
    if dist.get_rank() == 0:
        (run_dir / "sums.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
