"""The six stages in order: skip what is finished, stop at what differs, record what is done."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from evaluation.config import AnsweringModel, ModelSource, VllmJudge
from launcher import base_model, plan
from launcher.config import RunConfig, dump_config
from launcher.errors import ConfigError, LauncherError, Preempted
from launcher.estimate.memory import rank_memory
from launcher.progress import MetricsFollower
from launcher.ray_cluster import check_fits, ray_cluster, resources_of, uses_gpus
from launcher.run_directory import is_held, open_run_directory, write_atomically
from launcher.stage_process import estimate_apart, generate_apart, judge_apart, prepare_apart, quieten
from launcher.stages import STAGES, Differs, Finished, Stage, begin, finish, state_of
from launcher.storage import RunCopy
from trainer.data.fields import unknown_lines
from trainer.data.new_tokens import read_new_tokens
from trainer.stopping import clear_stop, stop_on_signals


def run_stages(
    config: RunConfig,
    run_dir: Path,
    stages: Sequence[Stage],
    *,
    force: bool,
    strict: bool,
    command: str,
    console: Console,
) -> None:
    """Run stages in a run's folder.

    Args:
        config: the checked configuration.
        run_dir: the run's folder.
        stages: a stretch of STAGES; the stages before it must be finished.
        force: do them again even where they are finished; what they made is set aside in superseded/.
        strict: fail if a canary shows that the judge can be talked over.
        command: the command as typed, without --force, for messages.
        console: where progress is shown.

    Raises:
        ConfigError: before anything starts, if the configuration cannot work, or an earlier result is of another.
    """
    is_prepared = (run_dir / "prepare.record.json").is_file()
    plan.check(config, stages, look=plan.FirstLook() if is_prepared else None)
    quieten()
    with open_run_directory(run_dir):
        copy = RunCopy(config.run.url, run_dir) if config.run.url else None
        if copy is not None:
            copy.begin(lambda line: console.print(line, soft_wrap=True, markup=False))
        _check_before(config, run_dir, stages[0])
        for line in base_model.rehearse(config, run_dir, stages):
            console.print(line, soft_wrap=True, markup=False)
        with ExitStack() as held:
            work = _Work(config, run_dir, stages, console, held, strict=strict, copy=copy)
            for stage in stages:
                _run_stage(work, stage, force=force, command=command)
        if copy is not None and copy.problem:
            raise LauncherError(f"{copy.problem}\nall is done in {run_dir}; the same command copies it")
    console.print(f"all asked stages are done: {run_dir}", soft_wrap=True)


def judge_file(
    config: RunConfig,
    run_dir: Path,
    responses: Path,
    model: str,
    *,
    references: Path | None,
    strict: bool,
    console: Console,
) -> None:
    """Bring responses made elsewhere into a run's folder, and judge them beside the run's own.

    Args:
        config: the checked configuration; its judge section is used.
        run_dir: the run's folder; where it has no test set, the file becomes its test set.
        responses: the file.
        model: the name under which they are judged and reported.
        references: reference answers in AlpacaEval's form, where the file and the run's folder hold none.
        strict: fail if a canary shows that the judge can be talked over.
        console: where counts are shown.
    """
    from evaluation.interchange import import_responses
    from evaluation.judge import judge

    plan.check(config, ["judge"])
    with open_run_directory(run_dir), ExitStack() as held:
        compares = config.judge.type in ("reference", "label")
        counts = import_responses(responses, run_dir, model, references, needs_references=compares)
        console.print(
            f"{responses}: {counts['num_responses']} responses ({counts['format']}) as {model}", soft_wrap=True
        )
        if _judges_on_ray(config):
            held.enter_context(ray_cluster(config.cluster))
            counts = judge_apart(config.judge, [model], run_dir, strict=strict)
        else:
            counts = judge(config.judge, [model], run_dir, strict=strict)
        judged = counts["models"][model]
        console.print(f"{model}: mean {judged['mean']:.1f}, {judged['scored']} of {judged['asked']} scored")


def estimate_judging(config: RunConfig, run_dir: Path) -> str:
    """What judging would take now: calls, tokens and, where prices are given, cost; a line for each judge.

    Args:
        config: the checked configuration.
        run_dir: the run's folder, with the responses.

    Returns:
        The text.
    """
    found = estimate_apart(config.judge, list(answering_models(config, run_dir)), run_dir)
    if not found:
        return f"the {config.judge.type} judge asks nobody: nothing to pay"
    return "\n".join(
        f"{judge}: "
        + "; ".join(
            f"{quantity.replace('_', ' ')} {size['expected']:,.6g} ({size['low']:,.6g} to {size['high']:,.6g})"
            for quantity, size in quantities.items()
        )
        for judge, quantities in found.items()
    )


def _run_stage(work: _Work, stage: Stage, *, force: bool, command: str) -> None:
    state = state_of(stage, work.config, work.run_dir)
    match state:
        case Finished(record) if not force:
            work.console.print(f"[bold]{stage}[/] is done ({record['wall_s']:.1f} s, {record['finished_at']})")
            _show_result(work, stage, record["counts"])
            return
        case Differs(differences) if not force:
            listed = "\n".join(f"  {line}" for line in differences)
            raise ConfigError(
                f"{work.run_dir}: stage {stage} was done, or begun, with other settings:\n{listed}\n"
                f"put the settings back, or choose another run.name or --run-dir, or do it again from here "
                f"(the old result is kept in superseded/): {command} --from {stage} --force"
            )
    # Only now, when it is known that nothing made by other settings stands in the way.
    write_atomically(work.run_dir / "config.yaml", dump_config(work.config))
    begin(stage, work.config, work.run_dir, again=force)
    work.console.print(f"[bold]{stage}[/] ...")
    started = time.monotonic()
    counts = work.do(stage)
    wall_s = time.monotonic() - started
    finish(stage, work.run_dir, counts, wall_s)
    work.push()
    work.console.print(f"[bold]{stage}[/] done in {wall_s:.1f} s")
    _show_result(work, stage, counts)


def _check_before(config: RunConfig, run_dir: Path, first: Stage) -> None:
    for stage in STAGES[: STAGES.index(first)]:
        if not isinstance(state_of(stage, config, run_dir), Finished):
            raise ConfigError(
                f"{run_dir}: stage {stage} comes before {first} and is not finished with these settings; "
                f"`launcher plan` shows each stage's state, `launcher run` does what is missing"
            )


def told_of_rows(counts: dict[str, Any]) -> list[str]:
    """What became of each model's rows, after generate or judge: every row asked for is in one state.

    Args:
        counts: what generate or judge returned.

    Returns:
        A line of text for each model.
    """
    states = ("generated", "scored", "judge_failed", "generation_failed", "too_long", "skipped")
    lines = []
    for name, found in counts["models"].items():
        parts = ", ".join(f"{found[state]} {state}" for state in states if found.get(state))
        mean = f"mean {found['mean']:.1f}; " if found.get("mean") is not None else ""
        lines.append(f"{name}: {mean}{parts or 'none'} of {found['asked']} asked")
    return lines


def _show_result(work: _Work, stage: Stage, counts: dict[str, Any]) -> None:
    if stage in ("generate", "judge"):
        for line in told_of_rows(counts):
            work.console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
    if stage == "report":
        work.console.print(f"report: {work.run_dir / 'report.html'}", soft_wrap=True)
        work.console.print(counts["line"], soft_wrap=True, markup=False, highlight=False, style="bold")


class _Work:
    """What the stages share while they run: the configuration, the folder, and Ray once it is needed."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        stages: Sequence[Stage],
        console: Console,
        held: ExitStack,
        *,
        strict: bool,
        copy: RunCopy | None = None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.stages = stages
        self.console = console
        self.strict = strict
        self.copy = copy
        self._held = held
        self._use_gpu: bool | None = None

    def do(self, stage: Stage) -> dict[str, Any]:
        """Do one stage, and return its counts. Each stage's packages are loaded only when it is done."""
        config, run_dir = self.config, self.run_dir
        match stage:
            case "prepare":
                return self._prepare()
            case "train":
                return self._train()
            case "export":
                use_gpu = self._ray()
                from launcher.ray_export import export_on_ray

                return export_on_ray(config.trainer, run_dir, use_gpu=use_gpu)
            case "generate":
                return self._generate()
            case "judge":
                return self._judge()
            case "report":
                from evaluation.report.build import write_report

                return write_report(config.report, run_dir)

    def _ray(self) -> bool:
        """Hold a Ray cluster from here to the end of the run; returns whether workers get GPUs."""
        if self._use_gpu is None:
            resources = self._held.enter_context(ray_cluster(self.config.cluster))
            if self.config.cluster.address != "local":
                from launcher.cluster_check import wait_until_fit

                resources = wait_until_fit(self.config, self.run_dir, self.stages, self._say)
            check_fits(self.config, resources, self.stages)
            self._use_gpu = uses_gpus(self.config.cluster, resources)
        return self._use_gpu

    def _say(self, line: str) -> None:
        self.console.print(f"  {line}", soft_wrap=True, markup=False)

    def _prepare(self) -> dict[str, Any]:
        on_ray = self.config.data.engine == "ray"
        if on_ray:
            self._ray()
        counts = prepare_apart(self.config.trainer, self.run_dir, on_ray=on_ray)
        for line in told_of(counts, self.config.data.leaks):
            self._say(line)
        return counts

    def _train(self) -> dict[str, Any]:
        for words in plan.slow_settings(self.config):
            self._say(words)
        use_gpu = self._ray()
        from launcher.ray_training import smaller_setting, train_on_ray

        resources, _ = resources_of(self.config)
        limit = rank_memory(self.config, resources, on_gpu=use_gpu)

        follower = MetricsFollower(self.run_dir / "metrics.jsonl", self._say, every_s=5)

        def tick() -> None:
            follower.tick()
            if self.copy is not None:
                self.copy.push_checkpoint()

        try:
            with _stop_requests(self.run_dir):
                return train_on_ray(
                    self.config.trainer,
                    self.run_dir,
                    use_gpu=use_gpu,
                    tick=tick,
                    notify=self._say,
                    wait_s=self.config.cluster.wait_s,
                    smaller=lambda: smaller_setting(self.config, limit, on_gpu=use_gpu),
                )
        except Preempted:
            self.push()
            raise

    def push(self) -> None:
        """Bring the copy in the store up to date, where there is one; one that fails is told, and tried again later."""
        if self.copy is not None:
            self.copy.push()
            if self.copy.problem:
                self._say(self.copy.problem)

    def _generate(self) -> dict[str, Any]:
        self._ray()
        return generate_apart(self.config.generation, self.run_dir, answering_models(self.config, self.run_dir))

    def _judge(self) -> dict[str, Any]:
        models = list(answering_models(self.config, self.run_dir))
        if _judges_on_ray(self.config):
            self._ray()
            return judge_apart(self.config.judge, models, self.run_dir, strict=self.strict)
        from evaluation.judge import judge

        return dict(judge(self.config.judge, models, self.run_dir, strict=self.strict))


def answering_models(config: RunConfig, run_dir: Path) -> dict[str, AnsweringModel]:
    """The models that answer the test set, by name: base, tuned (an adapter on top of the base), and further ones.

    With model.adapter the base answers with it, as it was tuned from. New tokens are unknown to the base: it reads the
    pieces that it has for their text.
    """
    plain = ModelSource(path=config.model.name_or_path or str(run_dir / "base"), revision=config.model.revision)
    adapter = config.model.adapter and str(Path(config.model.adapter).absolute())
    base = plain.model_copy(update={"adapter": adapter, "spelled": read_new_tokens(config.model, run_dir)})
    model = run_dir / "model"
    is_adapter = (model / "adapter_config.json").is_file()
    tuned = plain.model_copy(update={"adapter": str(model)}) if is_adapter else ModelSource(path=str(model))
    return {"base": base, "tuned": tuned, **config.generation.models}


def told_of(counts: dict[str, Any], leaks_policy: str) -> list[str]:
    """What a person should know of the prepared data: its size, and everything that was left out, cut or leaked.

    Args:
        counts: what prepare returned.
        leaks_policy: data.leaks, which says what became of train rows that test rows repeat.

    Returns:
        Lines of text.
    """
    splits, train = counts["splits"], counts["splits"]["train"]
    rows = ", ".join(f"{split['rows']:,} {name}" for name, split in splits.items())
    packed = train["utilisation"] is not None
    lines = [
        f"{rows} rows, read as {counts['format']}",
        f"train: {train['target_tokens']:,} of {train['tokens']:,} tokens are targets, "
        + (f"{train['utilisation']:.1%} of {train['packs']:,} packs is filled" if packed else "not packed"),
    ]
    listed = {"bad row": " (data/rejected.jsonl)"}
    lines += [
        f"dropped, {reason}: {count:,} rows{listed.get(reason, '')}" for reason, count in counts["dropped"].items()
    ]
    if (longest := counts["longest_row_tokens"]) > (length := counts["sequence_length"]):
        lines.append(f"the longest row has {longest:,} tokens, data.sequence_length is {length:,}")
    lines += [f"cut, {reason}: {count:,} rows" for reason, count in counts["truncated"].items()]
    lines += [f"kept, {reason}: {count:,} rows" for reason, count in counts.get("noticed", {}).items()]
    lines += unknown_lines(counts.get("unknown_fields", {}))
    lines += counts.get("notes", [])
    leaks = counts.get("leaks", {})
    if leaks.get("exact_train_rows") or leaks.get("near_train_rows"):
        fate = (
            "they were left out"
            if leaks_policy == "drop"
            else "they stay in training; data.leaks: drop leaves them out"
        )
        lines.append(
            f"leaks: train rows that ask a test row's question: {leaks['exact_train_rows']:,}, near duplicates of a "
            f"test row: {leaks['near_train_rows']:,}; {fate} (examples in data/summary.json)"
        )
    return lines


def _judges_on_ray(config: RunConfig) -> bool:
    return any(isinstance(member, VllmJudge) for member in plan.judge_members(config.judge))


@contextmanager
def _stop_requests(run_dir: Path) -> Iterator[None]:
    """While training, SIGTERM and SIGUSR1 ask the workers to save at the step's edge and end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    clear_stop(run_dir)
    # A signal to an attempt that slept, and lost the run, would otherwise stop its successor.
    stop_on_signals(run_dir, only_if=lambda: is_held(run_dir))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
