"""The text of what is handed to sbatch: one job, a job for each part of the line, or a sweep. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

import launcher
from evaluation.config import key_variables
from launcher.config import RunConfig
from launcher.errors import ConfigError
from launcher.stages import STAGES, Stage
from launcher.submit.config import SlurmConfig
from launcher.submit.needs import asks_for_gpus, gpus_asked, most_of, needs_of, nodes_used, with_needs

# A job sees these of the submitting environment, and what the configuration names; never all of it.
ALWAYS_PASSED = ("HOME", "PATH", "USER", "LOGNAME", "LANG", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE")
# What the trackers' libraries read their keys and addresses from.
TRACKER_VARIABLES = {
    "wandb": ("WANDB_API_KEY", "WANDB_BASE_URL"),
    "mlflow": ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "swanlab": ("SWANLAB_API_KEY",),
    "tensorboard": (),
}
# Where a job of its own begins under --split-stages; so does it at each stage that cluster.stages names.
PARTS: tuple[Stage, ...] = ("prepare", "train", "generate", "report")
# These need neither several nodes nor whole ones.
LIGHT: tuple[Stage, ...] = ("prepare", "report")
NO_GPUS = {"gpus_per_node": None, "gres": None}


@dataclass(frozen=True)
class Place:
    """Where a submitted run's files are; all three are on storage that the nodes see.

    Attributes:
        run_dir: the run's folder, or the sweep's; absolute.
        working_folder: what relative paths in the configuration start from; absolute.
        python: the Python that runs the launcher on the nodes, unless the configuration names one.
    """

    run_dir: Path
    working_folder: Path
    python: str

    def check(self) -> None:
        """Refuse paths that can't be written into a script.

        Raises:
            ConfigError: naming the path.
        """
        for path in (self.run_dir, self.working_folder):
            if re.search(r"[\x00-\x1f\x7f\\%]", str(path)):
                raise ConfigError(
                    f"{str(path)!r}: Slurm reads %, \\ and control characters in paths; choose another folder"
                )


@dataclass(frozen=True)
class Script:
    """One script for sbatch.

    Attributes:
        name: of its file, without the ending, and of what it does.
        text: everything in it that comes from outside is quoted, and no secret's value is in it.
        stages: what it does of the line; empty for a comparison.
        slurm: what it asks for.
        after: when it may start: at once, when the script before it has succeeded, or when that has ended.
        members: names of a sweep's members; it is a job array of so many tasks.
    """

    name: str
    text: str
    stages: tuple[Stage, ...]
    slurm: SlurmConfig
    after: Literal["", "afterok", "afterany"] = ""
    members: tuple[str, ...] = ()


def whole_run(config: RunConfig, place: Place) -> list[Script]:
    """A run as one job.

    Args:
        config: the run's configuration.
        place: where its files are.

    Returns:
        One script.
    """
    slurm = with_needs(config, slurm_of(config))
    return [Script("job", _run_script(config, slurm, place), STAGES, slurm)]


def split_run(config: RunConfig, place: Place, stages: Sequence[Stage] = STAGES) -> list[Script]:
    """A run as one job for each part of the line, each waiting for the one before it.

    Args:
        config: the run's configuration.
        place: where its files are.
        stages: what is to be done; parts without any of these are left out.

    Returns:
        The scripts, in order.
    """
    scripts: list[Script] = []
    for part in parts_of(config):
        if not set(part) & set(stages):
            continue
        slurm = with_needs(config, resources_of(config, part), part)
        text = _run_script(config, slurm, place, name=f"{config.run.name}-{part[0]}", stages=part)
        scripts.append(Script(part[0], text, part, slurm, after="afterok" if scripts else ""))
    return scripts


def whole_sweep(
    config: RunConfig, place: Place, members: Mapping[str, RunConfig], at_once: int | None = None
) -> list[Script]:
    """A sweep as a job array, with a comparison that waits until all of it has ended.

    Args:
        config: the run's configuration without a member's settings.
        place: where the sweep's files are.
        members: each member's configuration by its folder's name in the sweep's; the position is the task's number.
        at_once: most members that run at a time; None leaves it to Slurm.

    Returns:
        The two scripts; a task of the array is asked for what the largest member needs.
    """
    slurm = most_of([with_needs(member, slurm_of(member)) for member in members.values()])
    light = with_needs(config, resources_of(config, LIGHT[1:]), LIGHT[1:])
    names = tuple(members)
    array = _run_script(config, slurm, place, members=names, at_once=at_once)
    return [
        Script("members", array, STAGES, slurm, members=names),
        Script("compare", _compare_script(config, light, place), (), light, after="afterany"),
    ]


def slurm_of(config: RunConfig) -> SlurmConfig:
    """What the run asks of Slurm; the defaults where it asks nothing."""
    return config.cluster.slurm or SlurmConfig()


def parts_of(config: RunConfig) -> list[tuple[Stage, ...]]:
    """The stages that share a job under --split-stages. Pure.

    Args:
        config: the run's configuration.

    Returns:
        The six stages, cut.
    """
    parts: list[tuple[Stage, ...]] = []
    for stage in STAGES:
        if stage in PARTS or getattr(config.cluster.stages, stage) is not None:
            parts.append((stage,))
        else:
            parts[-1] = (*parts[-1], stage)
    return parts


def resources_of(config: RunConfig, part: Sequence[Stage]) -> SlurmConfig:
    """What the job of a part of the line asks for explicitly: cluster.stages laid over cluster.slurm. Pure.

    Args:
        config: the run's configuration.
        part: the stages of the job; the first one's entry in cluster.stages counts.

    Returns:
        What is asked; no GPUs where no stage of the part uses one, and no more nodes than it uses.

    Raises:
        ConfigError: if the two together make no sense.
    """
    whole, stage = slurm_of(config), part[0]
    asked = whole.model_dump()
    needs = needs_of(config, part, on_gpu=config.cluster.device != "cpu")
    if "train" not in part:
        asked["nodes"] = nodes_used(needs, whole)
    if not any(need.gpus for need in needs):
        asked |= NO_GPUS
    if stage in LIGHT:
        asked |= {"nodes": 1, "exclusive": False}
    own = getattr(config.cluster.stages, stage)
    if own is not None:
        given = own.model_dump(exclude_none=True)
        names = {"cpus": "cpus_per_node", "gpus": "gpus_per_node", "memory": "mem"}
        asked |= (NO_GPUS if "gpus" in given else {}) | {names.get(key, key): value for key, value in given.items()}
    try:
        return SlurmConfig.model_validate(asked)
    except ValidationError as error:
        said = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ConfigError(f"cluster.stages.{stage}, laid over cluster.slurm: {said}") from None


def check_job(config: RunConfig, part: Sequence[Stage], *, split: bool) -> None:
    """Refuse a job that asks for less than its stages need, or for nodes that they leave idle.

    Args:
        config: the run's configuration.
        part: the stages of the job.
        split: whether it is one of several jobs of the run.

    Raises:
        ConfigError: with every problem.
    """
    with_needs(config, resources_of(config, part) if split else slurm_of(config), part)


def _run_script(
    config: RunConfig,
    slurm: SlurmConfig,
    place: Place,
    *,
    name: str | None = None,
    stages: Sequence[Stage] = STAGES,
    members: Sequence[str] = (),
    at_once: int | None = None,
) -> str:
    node_options = ["--node-folder", str(slurm.node_folder)]
    node_options += ["--interface", slurm.interface] if slurm.interface else []
    # Engines take a GPU wherever Ray has one.
    node_options += ["--no-gpus"] if config.cluster.device == "cpu" and asks_for_gpus(slurm) else []
    # `launcher run` does the part that is named here; earlier stages must be finished.
    part = [] if tuple(stages) == STAGES else ["--from", stages[0], "--to", stages[-1]]
    further = {"array": f"0-{len(members) - 1}" + (f"%{at_once}" if at_once else "")} if members else {}
    directives = _directives(config, slurm, place.run_dir, name or config.run.name) | further
    values = _common_values(config, slurm, place) | {
        "directives": _directive_lines(directives | {"output": "%A_%a.log" if members else "%j.log"}, slurm),
        "members": f"members=({shlex.join(members)})\n" if members else "",
        "run_dir": _quoted(place.run_dir) + ('/"${members[SLURM_ARRAY_TASK_ID]}"' if members else ""),
        "job": "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if members else "$SLURM_JOB_ID",
        "node_options": shlex.join(node_options),
        "start_s": str(slurm.start_s),
        "stages": "".join(f" {shlex.quote(word)}" for word in part),
        "max_requeues": str(slurm.max_requeues),
    }
    return _filled("run.sh", values)


def _compare_script(config: RunConfig, slurm: SlurmConfig, place: Place) -> str:
    directives = _directives(config, slurm, place.run_dir, f"{config.run.name}-compare")
    return _filled(
        "compare.sh",
        _common_values(config, slurm, place)
        | {"directives": _directive_lines(directives, slurm), "run_dir": _quoted(place.run_dir)},
    )


def _common_values(config: RunConfig, slurm: SlurmConfig, place: Place) -> dict[str, str]:
    place.check()
    step_options, program = _program(config, slurm, place)
    return {
        # `module` is a shell function that only a login shell is sure to have.
        "shebang": "#!/bin/bash -l" if slurm.modules else "#!/bin/bash",
        "working_folder": _quoted(place.working_folder),
        "setup": "\n".join(_setup(slurm)),
        "step_options": "".join(f" {shlex.quote(word)}" for word in step_options),
        "program": shlex.join(program),
    }


def _filled(template: str, values: Mapping[str, str]) -> str:
    """A template with its places filled: `@{name}` and nothing else, for `$` and a single `@` are the shell's."""
    # Beside the packages, both in a checkout and where a wheel is installed.
    path = Path(launcher.__file__).parent.parent / "slurm" / template
    return re.sub(r"@\{(\w+)\}", lambda found: values[found[1]], path.read_text(encoding="utf-8"))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _directives(config: RunConfig, slurm: SlurmConfig, folder: Path, name: str) -> dict[str, object]:
    return {
        "job-name": name,
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "time": slurm.time,
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus_per_node,
        "gpus-per-node": slurm.gpus_per_node if gpus_asked(slurm) else None,
        "gres": slurm.gres,
        "mem": slurm.mem,
        "chdir": folder / "slurm",
        "output": "%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.signal_s}",
        "export": ",".join(passed_names(config)),
    }


def _directive_lines(directives: Mapping[str, object], slurm: SlurmConfig) -> str:
    flags = (["--exclusive"] if slurm.exclusive else []) + ["--requeue" if slurm.max_requeues else "--no-requeue"]
    written = [f"--{name}={_directive_word(str(value))}" for name, value in directives.items() if value is not None]
    return "\n".join(f"#SBATCH {line}" for line in (*written, *flags, *slurm.options))


def _directive_word(value: str) -> str:
    """Quote for the parser of #SBATCH lines, which is not a shell: it knows quotes, backslashes and # alone."""
    if re.fullmatch(r"[A-Za-z0-9_.,:@%+=&|()\[\]*!/-]*", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def passed_names(config: RunConfig) -> list[str]:
    """Names of the variables that the job takes along from where it is submitted."""
    names = [*ALWAYS_PASSED, *slurm_of(config).pass_environment]
    names += [variable for _, variable in key_variables(config.generation, config.judge)]
    if not config.training.trackers_offline:
        names += [variable for tracker in config.training.trackers for variable in TRACKER_VARIABLES[tracker]]
    return list(dict.fromkeys(names))


def _setup(slurm: SlurmConfig) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in slurm.environment.items()]
    return [*(f"module load {shlex.quote(name)}" for name in slurm.modules), *exports, *slurm.setup]


def _program(config: RunConfig, slurm: SlurmConfig, place: Place) -> tuple[list[str], list[str]]:
    """Further words for srun, and the words that start Python on a node: plain, or in a container."""
    container, inside = slurm.container, str(place.working_folder)
    if container is None:
        return [], [slurm.python or place.python]
    folders = dict.fromkeys((inside, str(place.run_dir), str(slurm.node_folder)))
    for folder in folders:
        if re.search("[,:]", folder):
            raise ConfigError(f"{folder}: a container cannot mount a path with ',' or ':'; choose another folder")
    if container.type == "apptainer":
        mounts = [word for folder in (*folders, *container.mounts) for word in ("--bind", folder)]
        gpus = ["--nv"] if asks_for_gpus(slurm) else []
        return [], ["apptainer", "exec", *gpus, *mounts, "--pwd", inside, container.image, container.python]
    pairs = [f"{folder}:{folder}" for folder in folders]
    pairs += [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    options = [f"--container-image={container.image}", f"--container-mounts={','.join(pairs)}"]
    return [*options, f"--container-workdir={inside}"], [container.python]
