"""What a run needs of each node of a Slurm job: derived from its workers and engines, or compared with what is asked.

Slurm starts one task on each node (Ray); Ray places workers and engines inside it. So a job is described by nodes,
and by GPUs and CPUs of each node.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from launcher.config import RunConfig
from launcher.errors import ConfigError
from launcher.placement import counted, groups_of
from launcher.stages import STAGES, Stage
from launcher.submit.config import SlurmConfig

# What a node is taken to have where neither gpus_per_node nor gres says it; only the question below uses it.
USUAL_GPUS = 8
# An engine on GPUs has a process for requests and one for scheduling beside its worker on each GPU.
ENGINE_PROCESSES = 2
GPU_OPTIONS = ("--gpus", "--gres", "--tres-per")


@dataclass(frozen=True)
class Need:
    """Equal parts that a stage places on the nodes; a part never spans two nodes.

    Attributes:
        stage: The stage.
        key: The setting that the number of parts comes from.
        parts: How many.
        gpus: GPUs of each part.
        cpus: CPUs that Ray reserves for each part.
        good_cpus: CPUs for each part where the number is ours to choose.
    """

    stage: Stage
    key: str
    parts: int
    gpus: int
    cpus: int
    good_cpus: int

    def per_node(self, nodes: int) -> int:
        """The most parts on one node, spread evenly."""
        return -(-self.parts // nodes)


def needs_of(config: RunConfig, stages: Collection[Stage] = STAGES, *, on_gpu: bool) -> list[Need]:
    """Return what each stage places on the nodes. Pure.

    Args:
        config: The run's configuration.
        stages: The stages of the job.
        on_gpu: Whether workers and engines have GPUs.

    Returns:
        One entry for each kind of part, in the order of the stages.
    """
    return [need for stage in STAGES if stage in stages for need in _needs_of_stage(config, stage, on_gpu=on_gpu)]


def _needs_of_stage(config: RunConfig, stage: Stage, *, on_gpu: bool) -> list[Need]:
    if stage == "prepare":
        return [Need(stage, "data.num_processes", 1, 0, 1, config.data.num_processes or 1)]
    engine = ENGINE_PROCESSES if on_gpu and stage in ("generate", "judge") else 0
    found = [
        Need(stage, group.key, group.count, group.num_gpus, group.num_cpus, group.num_cpus + engine)
        for group in groups_of(config, [stage], on_gpu=on_gpu)
    ]
    return found or [Need(stage, stage, 1, 0, 1, 1)]


def gpus_asked(slurm: SlurmConfig) -> int | None:
    """Return the GPUs of each node that are asked for explicitly. Pure.

    >>> [gpus_asked(SlurmConfig(gpus_per_node=text)) for text in (8, "a100:4", "a100:2,h100:2", "0", None)]
    [8, 4, 4, 0, None]
    >>> [gpus_asked(SlurmConfig(gres=text)) for text in ("gpu:h100:4", "gpu", "nvme:1,gpu:2", "nvme:1")]
    [4, 1, 2, None]

    Args:
        slurm: What is asked of Slurm.

    Returns:
        The number; None where nothing is said of GPUs.
    """
    if slurm.gpus_per_node is not None:
        return sum(_count(entry) for entry in slurm.gpus_per_node.split(","))
    kinds = [entry for entry in (slurm.gres or "").split(",") if re.match(r"(gres[:/])?gpu([:(]|$)", entry)]
    return sum(_count(entry.removeprefix("gres:").removeprefix("gres/")) for entry in kinds) if kinds else None


def _count(entry: str) -> int:
    last = entry.partition("(")[0].rpartition(":")[2]
    return int(last) if last.isdecimal() else 1


def asks_for_gpus(slurm: SlurmConfig) -> bool:
    """Whether GPUs are asked for explicitly, by a key of cluster.slurm or by one of its options."""
    return bool(gpus_asked(slurm)) or _by_option(slurm)


def _by_option(slurm: SlurmConfig) -> bool:
    return any(option.startswith(GPU_OPTIONS) for option in slurm.options)


def most_of(asked: Sequence[SlurmConfig]) -> SlurmConfig:
    """Return what covers several members of a sweep, whose jobs are tasks of one array. Pure.

    Args:
        asked: What each member asks, filled in; they differ in what was derived alone.

    Returns:
        The first with the most GPUs and CPUs of any.
    """
    gpus = max(asked, key=lambda one: gpus_asked(one) or 0).gpus_per_node
    return asked[0].model_copy(
        update={"gpus_per_node": gpus, "cpus_per_node": max(one.cpus_per_node or 1 for one in asked)}
    )


def with_needs(config: RunConfig, slurm: SlurmConfig, stages: Collection[Stage] = STAGES) -> SlurmConfig:
    """Fill in what a job asks of each node, from what its stages need. Pure.

    Args:
        config: The run's configuration.
        slurm: What is asked explicitly; it is kept.
        stages: The stages of the job.

    Returns:
        The same with gpus_per_node and cpus_per_node, and with all memory of nodes that are taken whole.

    Raises:
        ConfigError: With every need that what is asked explicitly does not cover.
    """
    if found := problems(config, slurm, stages):
        raise ConfigError("\n".join(found))
    needs = needs_of(config, stages, on_gpu=config.cluster.device == "cuda")
    derived: dict[str, object] = {}
    gpus = max((need.gpus * need.per_node(slurm.nodes) for need in needs), default=0)
    if gpus_asked(slurm) is None and not _by_option(slurm) and gpus:
        derived["gpus_per_node"] = str(gpus)
    if slurm.cpus_per_node is None:
        derived["cpus_per_node"] = max((need.good_cpus * need.per_node(slurm.nodes) for need in needs), default=1)
    if slurm.exclusive and slurm.mem is None:
        derived["mem"] = "0"  # --exclusive gives all CPUs and GPUs of a node, but of its memory the default alone
    return slurm.model_copy(update=derived)


def problems(config: RunConfig, slurm: SlurmConfig, stages: Collection[Stage] = STAGES) -> list[str]:
    """Return why a job can't be asked for, or would be too small, or would leave a node idle. Pure.

    Args:
        config: The run's configuration.
        slurm: What is asked explicitly.
        stages: The stages of the job.

    Returns:
        A line for each.
    """
    device = config.cluster.device
    if device == "auto" and any(need.gpus for need in needs_of(config, stages, on_gpu=True)):
        return [
            "cluster.device = auto: whether the job shall have GPUs can't be seen on the machine that submits it; give "
            "cluster.slurm.gpus_per_node, or cluster.device: cuda or cpu"
        ]
    needs = needs_of(config, stages, on_gpu=device == "cuda")
    found = [line for need in needs for line in _too_small(need, slurm)]
    return found or _idle_nodes(config, needs, slurm)


def _too_small(need: Need, slurm: SlurmConfig) -> list[str]:
    here = "each node" if slurm.nodes > 1 else "the node"
    found = []
    rows = (
        ("GPU", need.gpus, gpus_asked(slurm), "cluster.slurm.gres" if slurm.gres else "cluster.slurm.gpus_per_node"),
        ("CPU", need.cpus, slurm.cpus_per_node, "cluster.slurm.cpus_per_node"),
    )
    for kind, each, asked, key in rows:
        if not each or asked is None or slurm.nodes * (asked // each) >= need.parts:
            continue
        enough = each * need.per_node(slurm.nodes)
        what = (
            f"{need.key} = {each}"
            if need.stage == "export"
            else f"{need.key} = {need.parts} ({counted(each, kind)} each)"
        )
        found.append(
            f"{what} needs {counted(enough, kind)} of {here} (cluster.slurm.nodes = {slurm.nodes}), and {key} asks for "
            f"{asked}: give {enough} or more, take more nodes, or lower {need.key}"
        )
    return found


def _held_by_a_node(need: Need, slurm: SlurmConfig) -> int:
    """How many parts a node of the job holds; as many as it must where nothing says what the node has."""
    limits = []
    if need.gpus:
        asked = gpus_asked(slurm)
        limits.append((USUAL_GPUS if asked is None else asked) // need.gpus)
    if slurm.cpus_per_node is not None:
        limits.append(slurm.cpus_per_node // need.cpus)
    return max(1, min(limits, default=need.per_node(slurm.nodes)))


def nodes_used(needs: Collection[Need], slurm: SlurmConfig) -> int:
    """Return the nodes that get some work; Ray fills one node before it takes the next. Pure.

    Args:
        needs: What the stages of a job place.
        slurm: What is asked of Slurm.

    Returns:
        At least 1; never more than are asked for.
    """
    used = [-(-need.parts // _held_by_a_node(need, slurm)) for need in needs]
    return min(slurm.nodes, max(used, default=1))


def _idle_nodes(config: RunConfig, needs: list[Need], slurm: SlurmConfig) -> list[str]:
    """Ask back where training, or without it the largest stage of the job, leaves a node without work."""
    placed = [need for need in needs if need.stage == "train"] or [need for need in needs if need.stage != "prepare"]
    used = nodes_used(placed, slurm)
    if not placed or used == slurm.nodes:
        return []
    most = max(placed, key=lambda need: need.parts)
    held = _held_by_a_node(most, slurm)
    unknown = most.gpus > 0 and gpus_asked(slurm) is None
    ways = [f"cluster.slurm.nodes = {used} (--nodes {used})"]
    if most.stage in ("train", "generate", "judge") and most.cpus:
        everywhere = held * slurm.nodes
        ways.insert(0, f"{most.key} = {everywhere}{_batch_for(config, most, everywhere)}")
    if unknown and most.parts >= slurm.nodes:
        share = most.gpus * most.per_node(slurm.nodes)
        ways.append(f"cluster.slurm.gpus_per_node = {share}, for {share} GPUs of each node")
    taken = f" (a node is taken to have {USUAL_GPUS} GPUs, as gpus_per_node is not given)" if unknown else ""
    what = f"{most.key} = {most.parts}" if most.stage in ("train", "generate", "judge") else f"the stage {most.stage}"
    return [f"{what} keeps {used} of {slurm.nodes} nodes busy and leaves the rest idle{taken}: set {' or '.join(ways)}"]


def _batch_for(config: RunConfig, need: Need, workers: int) -> str:
    """What the global batch must be for so many workers, where it is not that already."""
    training = config.training
    share = workers * training.micro_batch_size
    if need.stage != "train" or training.global_batch_size % share == 0:
        return ""
    return f" with training.global_batch_size a multiple of {share} (it is {training.global_batch_size})"


def notes(config: RunConfig, slurm: SlurmConfig, stages: Collection[Stage] = STAGES) -> list[str]:
    """Return what a job asks for and what of it a stage leaves idle. Pure.

    Args:
        config: The run's configuration.
        slurm: What is asked, filled in.
        stages: The stages of the job.

    Returns:
        Lines of text.
    """
    gpus = gpus_asked(slurm) or 0
    each = [counted(number, kind) for number, kind in ((gpus, "GPU"), (slurm.cpus_per_node or 0, "CPU")) if number]
    found = [f"asks for {counted(slurm.nodes, 'node')} with {' and '.join(each)}{' each' if slurm.nodes > 1 else ''}"]
    for need in needs_of(config, stages, on_gpu=gpus > 0 and config.cluster.device == "cuda"):
        if need.key.endswith("engines") and need.gpus and need.parts * need.gpus * 2 <= gpus * slurm.nodes:
            most = slurm.nodes * (gpus // need.gpus)
            found.append(
                f"{need.key} = {need.parts} uses {need.parts * need.gpus} of {counted(gpus * slurm.nodes, 'GPU')}; "
                f"{most} engines would use {most * need.gpus}"
            )
    return found
