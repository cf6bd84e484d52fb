"""The words of cluster.slurm and cluster.stages: what is asked of Slurm, and how a node is made ready."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from trainer.config import Section

# What goes into an #SBATCH line: nothing that its parser or a shell would read as the end of a word.
SlurmWord = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:@%+=&|()\[\]*!/-]+$", max_length=500)]
SlurmOption = Annotated[str, StringConstraints(pattern=r"^--[a-z][A-Za-z0-9_.,:@%+=&|()\[\]*!/-]*$", max_length=500)]


def _as_word(value: object) -> object:
    """A bare number as the word that Slurm reads: `gpus_per_node: 8`, `mem: 0`."""
    return str(value) if type(value) is int else value


def _no_number(value: object) -> object:
    if type(value) is int:
        raise ValueError(f'{value} is a number, and YAML reads 1:30:00 as one too; put the time in quotes: "1:30:00"')
    return value


SlurmCount = Annotated[SlurmWord, BeforeValidator(_as_word)]
SlurmTime = Annotated[str, StringConstraints(pattern=r"^(\d+-)?\d+(:\d{1,2}){0,2}$"), BeforeValidator(_no_number)]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4000)]

SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")


class SlurmContainer(Section):
    """The image that every process of the run starts in."""

    type: Literal["apptainer", "pyxis"] = Field(description="apptainer exec, or srun's pyxis plugin.")
    image: OneLine = Field(description="Path or URL of the image, as the container tool reads it.")
    mounts: tuple[OneLine, ...] = Field((), description="Folders to mount, each source or source:target.")
    python: OneLine = Field("python3", description="Python in the image that has this package.")


class SlurmConfig(Section):
    """One job: what is asked of Slurm, and what the nodes need before anything starts."""

    nodes: int = Field(1, ge=1, le=10_000, description="Nodes of the job; one Ray node each.")
    account: SlurmWord | None = Field(None, description="Account that is charged.")
    partition: SlurmWord | None = Field(None, description="Partition; null is the site's default.")
    qos: SlurmWord | None = Field(None, description="Quality of service.")
    constraint: SlurmWord | None = Field(None, description="Features that the nodes must have.")
    time: SlurmTime | None = Field(None, description="Time limit: minutes, H:MM:SS or D-H:MM:SS.")
    cpus_per_node: int | None = Field(
        None, ge=1, description="CPUs of each node; null asks for what workers and engines need."
    )
    gpus_per_node: SlurmCount | None = Field(
        None, description="GPUs of each node: a number, or type:number; null asks for what workers and engines need."
    )
    gres: SlurmWord | None = Field(
        None, description="Generic resources of each node, such as gpu:h100:8, where a site has no gpus_per_node."
    )
    mem: SlurmCount | None = Field(
        None,
        description="Memory of each node, such as 900G; 0 asks for all of it; null is the partition's default, or all "
        "of a node that is taken whole (exclusive).",
    )
    exclusive: bool = Field(False, description="Take whole nodes.")
    options: tuple[SlurmOption, ...] = Field((), description="Further sbatch options, such as --reservation=name.")
    container: SlurmContainer | None = Field(None, description="Image that everything runs in; null runs on the node.")
    modules: tuple[SlurmWord, ...] = Field((), description="Environment modules to load.")
    environment: dict[VariableName, OneLine] = Field(
        default_factory=dict, description="Variables set in the job; they can be read by others, so never secrets."
    )
    pass_environment: tuple[VariableName, ...] = Field(
        (), description="Names of variables taken along from where the job is submitted, secrets among them."
    )
    setup: tuple[OneLine, ...] = Field((), description="Shell lines run on the first node before anything starts.")
    python: OneLine | None = Field(
        None, description="Python on the nodes that has this package; null is the one that submits."
    )
    interface: SlurmWord | None = Field(None, description="Network interface between nodes; null follows the route.")
    node_folder: Path = Field(Path("/tmp"), description="Folder on each node's own disk for Ray's files; a short path.")  # noqa: S108
    start_s: int = Field(600, ge=10, description="Longest wait for Ray on all nodes, in seconds.")
    signal_s: int = Field(300, ge=30, le=65_535, description="Seconds before the time limit at which the run saves.")
    max_requeues: int = Field(3, ge=0, description="Times that the job goes back to the queue to go on.")

    @model_validator(mode="after")
    def _gpus_once(self) -> Self:
        if self.gpus_per_node is not None and any(word.startswith("gpu") for word in (self.gres or "").split(",")):
            raise ValueError(
                f"gpus_per_node ({self.gpus_per_node}) and gres ({self.gres}) both ask for GPUs: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for name in self.environment:
            if any(word in name.upper() for word in SECRET_NAMES):
                raise ValueError(
                    f"environment.{name} looks like a secret, and its value would stand in the script; "
                    f"set it where you submit, and name it in pass_environment"
                )
        return self

    @model_validator(mode="after")
    def _time_to_save(self) -> Self:
        limit_s = None if self.time is None else seconds_of(self.time)
        if limit_s is not None and limit_s <= self.signal_s + 60:
            raise ValueError(
                f"time ({self.time}, {limit_s} s) leaves nothing to work in: the run is asked to save signal_s "
                f"({self.signal_s} s) before its end; give more time, or a smaller signal_s"
            )
        return self

    @model_validator(mode="after")
    def _short_folder(self) -> Self:
        # Ray adds up to 80 bytes, and the path of a socket may have 107.
        if not self.node_folder.is_absolute() or len(str(self.node_folder)) > 25:
            raise ValueError(
                f"node_folder = {self.node_folder}: must be absolute and at most 25 characters, "
                f"because the path of a Unix socket below it may have 107"
            )
        return self


class StageResources(Section):
    """What one stage asks of Slurm instead of what cluster.slurm asks, when every stage gets a job of its own."""

    nodes: int | None = Field(None, ge=1, le=10_000, description="Nodes of the stage's job.")
    cpus: int | None = Field(None, ge=1, description="CPUs of each node.")
    gpus: SlurmCount | None = Field(None, description="GPUs of each node: a number, or type:number; 0 asks for none.")
    memory: SlurmCount | None = Field(None, description="Memory of each node, such as 64G.")
    partition: SlurmWord | None = Field(None, description="Partition.")
    qos: SlurmWord | None = Field(None, description="Quality of service.")
    constraint: SlurmWord | None = Field(None, description="Features that the nodes must have.")
    time: SlurmTime | None = Field(None, description="Time limit: minutes, H:MM:SS or D-H:MM:SS.")
    exclusive: bool | None = Field(None, description="Take whole nodes.")


class StagesConfig(Section):
    """Stages with wishes of their own; each of them begins a job under --split-stages."""

    prepare: StageResources | None = Field(None, description="Instructions to shards; one node without GPUs.")
    train: StageResources | None = Field(None, description="Training, and the export after it.")
    export: StageResources | None = Field(None, description="Export, where it shall not go along with training.")
    generate: StageResources | None = Field(None, description="Generation, and the judge after it.")
    judge: StageResources | None = Field(None, description="The judge, where it shall not go along with generation.")
    report: StageResources | None = Field(None, description="The report, and a sweep's comparison; one node, no GPUs.")


def seconds_of(time: str) -> int:
    """Slurm's forms of a time limit, in seconds.

    >>> [seconds_of(time) for time in ("90", "2:30", "1:00:00", "1-12", "1-0:30", "1-0:0:5")]
    [5400, 150, 3600, 129600, 88200, 86405]

    Args:
        time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or all four.

    Returns:
        Seconds.
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, parts[0], 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
