"""Under ZeRO-3 no rank ever holds the whole base model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import FromScratch
from trainer.scratch import build_from_scratch


@pytest.mark.slow
def test_a_rank_of_zero_3_loads_its_share_and_a_layer_at_a_time(tmp_path, tiny_tokenizer):
    # 90 MB of bf16 weights (fp32 on disk), so that what else a process takes while it loads is little beside them.
    sizes = FromScratch(vocab_size=2048, hidden_size=768, intermediate_size=2048, num_layers=6, num_heads=12)
    build_from_scratch(sizes.model_copy(update={"num_kv_heads": 12}), tiny_tokenizer, seed=0, folder=tmp_path / "base")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("loading_worker.py"))
    loaded = {}
    for stage in (2, 3):
        command = [*launch, script, str(tmp_path), str(stage)]
        subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
        loaded[stage] = json.loads((tmp_path / f"loaded-{stage}.json").read_text())
    assert [rank["checksum"] for rank in loaded[3]] == pytest.approx([loaded[2][0]["checksum"]] * 2)
    print({stage: [round(rank["peak"], 2) for rank in ranks] for stage, ranks in loaded.items()})
    assert min(rank["peak"] for rank in loaded[2]) > 0.9
    assert max(rank["peak"] for rank in loaded[3]) < 0.75
