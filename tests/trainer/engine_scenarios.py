"""Runs under torchrun: small DeepSpeed engines that are saved and restored; writes what it found as JSON.

Not a test module: `test_checkpoint.py` starts it three times in one folder, because one start of torchrun and DeepSpeed
costs more than all of its scenarios together.

    torchrun --nproc-per-node 1 engine_scenarios.py FOLDER from_one     a checkpoint of one rank
    torchrun --nproc-per-node 2 engine_scenarios.py FOLDER two          all layouts, and that checkpoint on two ranks
    torchrun --nproc-per-node 1 engine_scenarios.py FOLDER to_one       the checkpoints of two ranks on one; crashes
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from trainer import checkpoint, engine_state, sealed, stored
from trainer.attempt import Attempt
from trainer.checkpoint import Progress, Saver
from trainer.config import DeepSpeedConfig, TrainingConfig
from trainer.errors import TrainerError
from trainer.failures import StepGuard
from trainer.zero import gradient_section

LAYOUTS = [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
LAYOUTS += [(1, "bf16-sums-in-bf16"), (2, "bf16-sums-in-bf16")]


class Net(torch.nn.Module):
    """Odd sizes, so that slices are padded and cut in the middle of parameters; dropout, and a frozen part."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.embed = torch.nn.Embedding(37, 13)
        self.frozen = torch.nn.Linear(13, 13)
        self.frozen.requires_grad_(False)
        self.inner = torch.nn.Linear(13, 29)
        self.norm = torch.nn.LayerNorm(29)
        self.out = torch.nn.Linear(29, 37)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(self.frozen(self.embed(ids)), self.dropout, self.training)
        logits = self.out(torch.nn.functional.gelu(self.norm(self.inner(hidden))))
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())


def make_engine(stage: int, precision: str, seed: int, dropout: float = 0.2) -> Any:
    """A fresh engine; the frozen part has the same weights whatever the seed."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4 // dist.get_world_size(),
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 30},
        "bf16": {"enabled": precision.startswith("bf16")},
        "steps_per_print": 10**9,
    }
    if stage and precision == "bf16":  # as the trainer does by default
        config |= gradient_section(TrainingConfig(), DeepSpeedConfig(stage=stage))
    torch.manual_seed(7)
    frozen = torch.nn.Linear(13, 13).state_dict()
    torch.manual_seed(seed)
    net = Net(dropout)
    net.frozen.load_state_dict(frozen)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    torch.manual_seed(100 + dist.get_rank())
    return engine


def train(engine: Any, first: int, last: int) -> list[float]:
    """Steps first+1 ... last on rows that depend on the step alone, shared out over the ranks; mean losses of steps."""
    losses = []
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for step in range(first, last):
        rows = torch.randint(37, (4, 2, 5), generator=torch.Generator().manual_seed(step))
        total = torch.zeros(())
        for part in rows[rank::world_size]:
            loss = engine(part)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / 4
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def full_state(engine: Any) -> dict[str, torch.Tensor]:
    """Whole master weights, moments and forward weights on every rank, as DeepSpeed itself assembles them."""
    link_moments(engine)
    whole: dict[str, torch.Tensor] = {}
    masters = {fragment.name: fragment.master for fragment in engine_state.fragments(engine)}
    for name, parameter in engine_state.trainable(engine).items():
        if engine.zero_optimization_stage() > 0:
            whole[f"weight/{name}"] = safe_get_full_fp32_param(parameter)
            for kind in stored.MOMENTS:
                whole[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind)
        else:
            whole[f"weight/{name}"] = masters[name].detach().view(parameter.shape)
            for kind in stored.MOMENTS:
                whole[f"{kind}/{name}"] = engine.basic_optimizer.state[masters[name]][kind].view(parameter.shape)
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            whole[f"forward/{name}"] = parameter.detach().float()
    return {name: tensor.clone() for name, tensor in whole.items()}


def link_moments(engine: Any) -> None:
    """Show DeepSpeed's reader the moments: it looks once, after the first group's first step."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def attempt_of(run_dir: Path) -> Attempt | None:
    """A new attempt, on the rank that owns it."""
    run_dir.mkdir(exist_ok=True)
    return Attempt.begin(run_dir) if dist.get_rank() == 0 else None


def begin_save(engine: Any, progress: Progress, run_dir: Path, *, keep: int, loss: float | None = None) -> Saver:
    """Begin a checkpoint in a new attempt."""
    saver = Saver(engine, run_dir, keep=keep, attempt=attempt_of(run_dir))
    saver.save(progress, validation_loss=loss)
    return saver


def save(engine: Any, progress: Progress, run_dir: Path, *, keep: int, loss: float | None = None) -> None:
    """A checkpoint from its beginning to its end."""
    begin_save(engine, progress, run_dir, keep=keep, loss=loss).finish()


def words_of(call: Callable[[], object]) -> str:
    """What an error says; the empty string where there is none."""
    try:
        call()
    except TrainerError as error:
        return str(error)
    return ""


# --- the three runs -------------------------------------------------------------------------------


def from_one(folder: Path) -> dict[str, Any]:
    """A checkpoint of one rank, and how that run went on."""
    engine = make_engine(2, "fp32", seed=3, dropout=0.0)
    train(engine, 0, 3)
    save(engine, Progress(3, 0, 3, 120), folder / "one", keep=2)
    torch.save(full_state(engine), folder / "one.pt")
    return {"losses": train(engine, 3, 6)}


def two(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage, precision in LAYOUTS:
        found[f"zero{stage}-{precision}"] = saved_and_restored(folder / f"zero{stage}-{precision}", stage, precision)
        found[f"guard zero{stage}-{precision}"] = guarded(stage, precision)
    one = torch.load(folder / "one.pt", weights_only=True)
    for stage in (0, 2, 3):
        found[f"one rank on two, zero{stage}"] = elsewhere(folder / "one", one, stage, precision="fp32")
    engine = make_engine(3, "fp32", seed=5, dropout=0.0)
    train(engine, 0, 3)
    save(engine, Progress(3, 0, 3, 120), folder / "two", keep=2)
    state = full_state(engine)
    if dist.get_rank() == 0:
        torch.save(state, folder / "two.pt")
    found["two losses"] = train(engine, 3, 6)
    found["damage"] = damage(engine, folder / "damage")
    found["not finite"] = not_finite(engine, folder / "not-finite")
    found["two attempts"] = two_attempts(engine, folder / "two-attempts")
    found["one rank cannot write"] = one_rank_cannot_write(engine, folder / "cannot-write")
    return found


def to_one(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "two.pt", weights_only=True)
    found: dict[str, Any] = {
        f"two ranks on one, zero{stage}": elsewhere(folder / "two", state, stage, precision="fp32")
        for stage in (0, 2, 3)
    }
    engine = make_engine(2, "fp32", seed=9)
    train(engine, 0, 2)
    checkpoint._gather = lambda value: [value]  # a forked child has no gloo; a world of one needs none
    found["crashes"] = crashes(engine, folder / "crashes")
    found["kept"] = kept(engine, folder / "kept")
    found["order"] = order_of_operations(engine, folder / "order")
    found["disk full"] = disk_full(engine, folder / "disk-full")
    return found


def saved_and_restored(run_dir: Path, stage: int, precision: str) -> dict[str, Any]:
    """A run that goes on after a save, and a fresh engine that goes on from what was saved."""
    engine = make_engine(stage, precision, seed=1)
    train(engine, 0, 3)
    go, write = threading.Event(), sealed.write_tensors
    with mock.patch.object(sealed, "write_tensors", lambda *arguments: go.wait() and write(*arguments)):
        saver = begin_save(engine, Progress(3, 0, 3, 120), run_dir, keep=2)
        at_save = full_state(engine)
        losses = train(engine, 3, 6)  # before a byte is written
        go.set()
        saver.finish()
    after = full_state(engine)
    again = make_engine(stage, precision, seed=2)
    progress = checkpoint.restore(again, run_dir)
    return {
        "progress": progress == Progress(3, 0, 3, 120),
        "restored": equal(full_state(again), at_save),
        "losses": [losses, train(again, 3, 6)],
        "after": equal(full_state(again), after),
    }


def guarded(stage: int, precision: str) -> dict[str, Any]:
    """A step with a NaN gradient and one with a NaN loss between two good ones, against a run without them."""
    engine, without = (make_engine(stage, precision, seed=8, dropout=0.0) for _ in range(2))
    guard = StepGuard(engine)
    train(engine, 0, 1)
    before = full_state(engine)
    causes = []
    rows = torch.arange(10).view(2, 5)
    for gradient, loss in ((torch.nan, 1.0), (1.0, torch.nan), (1.0, 1.0)):
        if loss == gradient == 1.0:
            untouched = equal(full_state(engine), before)
        for number in range(2):  # micro-batches; only rank 1 has the NaN
            output = engine(rows)
            engine.backward(output * (gradient if dist.get_rank() == 1 else 1.0))
            if number == 0:
                engine.step()
        causes.append(guard.take_step(loss))
    train(without, 0, 1)
    for _ in range(2):
        without.backward(without(rows))
        without.step()
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, causes)
    same = equal(full_state(engine), full_state(without))
    return {"causes": everywhere, "untouched": untouched, "as without": same}


def elsewhere(run_dir: Path, state: dict[str, torch.Tensor], stage: int, precision: str) -> dict[str, Any]:
    """A checkpoint of another world size and stage."""
    engine = make_engine(stage, precision, seed=4, dropout=0.0)
    checkpoint.restore(engine, run_dir)
    return {"restored": equal(full_state(engine), state), "losses": train(engine, 3, 6)}


def damage(engine: Any, run_dir: Path) -> dict[str, Any]:
    """Damage that only one of two ranks sees: both pass over the same checkpoint, or both raise."""
    for step in (1, 2, 3):
        save(engine, Progress(step, 0, step, 0), run_dir, keep=3)
    folder = run_dir / "checkpoints"
    if dist.get_rank() == 0:
        flip_a_byte(folder / "step-3" / "rank-1.safetensors")
        (folder / "step-2" / "rank-0.safetensors").unlink()
    dist.barrier()
    progress = checkpoint.restore(make_engine(0, "fp32", seed=6), run_dir)
    left = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        flip_a_byte(folder / "step-1" / "seal.json")
    dist.barrier()
    fresh = make_engine(0, "fp32", seed=6)
    first, second = (words_of(lambda: checkpoint.restore(fresh, run_dir)) for _ in range(2))
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, [progress and progress.step, first, second])
    return {"left": left, "ranks": everywhere}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def not_finite(engine: Any, run_dir: Path) -> list[Any]:
    """One NaN in one rank's share keeps every rank from saving."""
    if dist.get_rank() == 1:
        last = engine_state.fragments(engine)[-1]
        engine_state.view(engine, last, "exp_avg")[-1] = torch.nan
    words = words_of(lambda: save(engine, Progress(9, 0, 9, 0), run_dir, keep=1))
    if dist.get_rank() == 1:
        engine_state.view(engine, last, "exp_avg")[-1] = 0
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, words)
    return [everywhere, (run_dir / "checkpoints").exists()]


def two_attempts(engine: Any, run_dir: Path) -> dict[str, Any]:
    """An attempt that was asleep while its successor began: it neither seals nor touches what the other writes."""
    asleep = begin_save(engine, Progress(8, 0, 8, 0), run_dir, keep=2)
    asleep._writing.file.result()
    found: dict[str, Any] = {"before": names_in(run_dir)}
    successor = begin_save(engine, Progress(9, 0, 9, 0), run_dir, keep=2)
    found["with a successor"] = names_in(run_dir)
    found["sealing"] = words_of(asleep.finish)
    found["saving"] = words_of(lambda: asleep.save(Progress(10, 0, 10, 0)))
    if dist.get_rank() == 0:  # had it slept between its look at the attempt and the tidying
        checkpoint._make_room(run_dir / "checkpoints" / "step-10.partial-A1-ab", 0, 1)
    found["tidied by the first"] = names_in(run_dir)
    successor.finish()
    successor.save(Progress(11, 0, 11, 0), wait=True)
    return found | {"in the end": names_in(run_dir)}


def names_in(run_dir: Path) -> list[str]:
    """What lies in checkpoints/, attempts by number only; the same on every rank."""
    dist.barrier()
    names = sorted(re.sub(r"(-A\d+)-\w+", r"\1", path.name) for path in (run_dir / "checkpoints").iterdir())
    dist.barrier()
    return names


def kept(engine: Any, run_dir: Path) -> list[list[str]]:
    """The newest one and the best stay; a seal that is damaged later stops no save."""
    left = []
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 0.5)):
        save(engine, Progress(step, 0, step, 0), run_dir, keep=1, loss=loss)
        left.append(sorted(path.name for path in (run_dir / "checkpoints").iterdir()))
    flip_a_byte(run_dir / "checkpoints" / "step-5" / "seal.json")
    save(engine, Progress(6, 0, 6, 0), run_dir, keep=1)
    return [*left, sorted(path.name for path in (run_dir / "checkpoints").iterdir())]


def one_rank_cannot_write(engine: Any, run_dir: Path) -> list[Any]:
    """Files of rank 1 stay below a limit; the save fails on both ranks, and works when the limit is gone."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    words = words_of(lambda: save(engine, Progress(9, 0, 9, 0), run_dir, keep=1))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(engine, Progress(9, 0, 9, 0), run_dir, keep=1)
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, words)
    return [everywhere, sorted(path.name for path in (run_dir / "checkpoints").iterdir())]


# --- crashes --------------------------------------------------------------------------------------


class Watched:
    """A file whose writes are told."""

    def __init__(self, file: io.BufferedWriter, tell: Callable[[str], None], name: str) -> None:
        self._file, self._tell, self._name = file, tell, name

    def write(self, data: Any) -> int:
        self._tell(f"write {self._name}")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def tell_file_operations(tell: Callable[[str], None]) -> None:
    """Have every file operation of this process told before it is done; never undone, so only for a forked child."""
    open_path, fsync = Path.open, os.fsync

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        if "w" not in mode:
            return open_path(path, mode, **options)
        tell(f"open {path.name}")
        return Watched(open_path(path, mode, **options), tell, path.name)

    def fsynced(descriptor: int) -> None:
        tell(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            tell(" ".join([event.removeprefix("os."), *(Path(a).name for a in arguments if isinstance(a, str | Path))]))

    Path.open = opened  # type: ignore[method-assign]
    os.fsync = fsynced
    sys.addaudithook(audit)


def in_a_child(work: Callable[[], None]) -> int:
    """Fork, work, and give the child's exit status; a negative number is the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - a child must end here, whatever it raised
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def crashes(engine: Any, run_dir: Path) -> dict[str, Any]:
    """Kill a save before each of its file operations in turn, until one lives to its end."""
    found = []
    save(engine, Progress(1, 0, 1, 0), run_dir, keep=1)
    for number in range(10_000):
        shutil.rmtree(run_dir.with_name("trial"), ignore_errors=True)
        trial = Path(shutil.copytree(run_dir, run_dir.with_name("trial")))
        count = 0

        def killed_save(number: int = number, trial: Path = trial) -> None:
            saver = Saver(engine, trial, keep=1, attempt=attempt_of(trial))

            def tell(operation: str) -> None:
                nonlocal count
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

            tell_file_operations(tell)
            saver.save(Progress(2, 0, 2, 0))
            saver.finish()

        status = in_a_child(killed_save)
        newest = stored.newest(trial)
        resumed = in_a_child(lambda trial=trial: checkpoint.restore(engine, trial))
        repaired = in_a_child(lambda trial=trial: save(engine, Progress(3, 0, 3, 0), trial, keep=1))
        left = sorted(path.name for path in (trial / "checkpoints").iterdir())
        found.append([status, newest and newest.name, resumed, repaired, left])
        if status == 0:
            break
    return {"trials": found}


def order_of_operations(engine: Any, run_dir: Path) -> list[str]:
    """Every file operation of one save, in order."""
    log = run_dir.with_suffix(".log")

    def logged_save() -> None:
        operations: list[str] = []
        saver = Saver(engine, run_dir, keep=1, attempt=attempt_of(run_dir))
        tell_file_operations(lambda operation: operations.append(re.sub(r"-A\d+-\w+", "", operation)))
        saver.save(Progress(2, 0, 2, 0))
        saver.finish()
        log.write_text(json.dumps(operations))

    save(engine, Progress(1, 0, 1, 0), run_dir, keep=1)
    in_a_child(logged_save)
    return json.loads(log.read_text())


def disk_full(engine: Any, run_dir: Path) -> list[list[Any]]:
    """Saves on a disk that takes only so many bytes of a file; one that is full before the save."""
    found = []
    save(engine, Progress(1, 0, 1, 0), run_dir, keep=1)
    for limit in (0, 5, 3000, 20_000):
        words = run_dir / f"words-{limit}"

        def limited_save(limit: int = limit, words: Path = words) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails like one on a full disk
            saver = Saver(engine, run_dir, keep=1, attempt=attempt_of(run_dir))
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            said = words_of(lambda: [saver.save(Progress(2, 0, 2, 0)), saver.finish()])
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            words.write_text(said)

        in_a_child(limited_save)
        newest = stored.newest(run_dir)
        found.append([words.read_text(), newest and newest.name])

    def full_save() -> None:
        usage = shutil.disk_usage(run_dir)
        checkpoint.shutil.disk_usage = lambda _: usage._replace(free=1000)
        said = words_of(lambda: save(engine, Progress(2, 0, 2, 0), run_dir, keep=1))
        (run_dir / "words-full").write_text(said)

    in_a_child(full_save)
    newest = stored.newest(run_dir)
    num_bytes = sealed.num_tensor_bytes(checkpoint._tensors_of_this_rank(engine))
    found.append([(run_dir / "words-full").read_text(), newest and newest.name])
    return [*found, [f"{num_bytes:,}", None]]


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not used here; would be compiled for 20 s
    deepspeed.init_distributed("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    found = {"from_one": from_one, "two": two, "to_one": to_one}[name](folder)
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1))
    if name != "to_one":
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
