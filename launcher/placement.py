"""Whether workers and engines can be placed on nodes: each of them whole on one node, by its GPUs and its CPUs. Pure.

Sums over the cluster are not enough: 8 GPUs on one node and 64 CPUs on another hold no worker that needs both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from evaluation.config import GenerationConfig, JuryJudge, VllmJudge
from launcher.config import RunConfig
from launcher.stages import Stage

# Where nothing says how many CPUs a node has, they are no reason to refuse a run.
UNKNOWN_CPUS = 10**6


@dataclass(frozen=True)
class Node:
    """What one node has.

    Attributes:
        num_cpus: CPUs.
        num_gpus: GPUs.
        name: Its host name, for messages; empty where it does not exist yet.
    """

    num_cpus: int
    num_gpus: int
    name: str = ""

    def __str__(self) -> str:
        """The node in words."""
        gpus = f"{counted(self.num_gpus, 'GPU')} and " if self.num_gpus else ""
        cpus = "CPUs of unknown number" if self.num_cpus == UNKNOWN_CPUS else counted(self.num_cpus, "CPU")
        return f"{self.name or 'a node'} has {gpus}{cpus}"


@dataclass(frozen=True)
class Group:
    """Processes of one kind that must all be placed at the same time, each whole on one node.

    Attributes:
        key: The configuration's key that says how many.
        count: How many.
        num_cpus: CPUs of each.
        num_gpus: GPUs of each; 0 where they run on CPUs.
        cpu_key: The key that says how many CPUs each takes; None where that can't be changed.
    """

    key: str
    count: int
    num_cpus: int
    num_gpus: int
    cpu_key: str | None = None

    def __str__(self) -> str:
        """The group in words."""
        gpus = f"{counted(self.num_gpus, 'GPU')} and " if self.num_gpus else ""
        return f"{self.count} x ({gpus}{counted(self.num_cpus, 'CPU')})"


def counted(number: int, word: str) -> str:
    """A number with its word.

    >>> counted(1, "GPU"), counted(8, "CPU")
    ('1 GPU', '8 CPUs')
    """
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def room(group: Group, nodes: Collection[Node]) -> int:
    """How many processes of this kind the nodes can hold together.

    >>> room(Group("training.num_workers", 8, num_cpus=8, num_gpus=1), [Node(32, 8), Node(64, 0)])
    4

    Args:
        group: One kind of process.
        nodes: What there is.

    Returns:
        The number; it may be larger than the group's.
    """
    each = ((node.num_cpus // group.num_cpus, node.num_gpus, group.num_gpus) for node in nodes)
    return sum(min(by_cpus, gpus // need) if need else by_cpus for by_cpus, gpus, need in each)


def groups_of(config: RunConfig, stages: Collection[Stage], *, on_gpu: bool) -> Iterator[Group]:
    """What the stages place on the nodes, one group after the other.

    Args:
        config: The run's configuration.
        stages: The stages that shall run there.
        on_gpu: Whether workers and engines have GPUs.

    Yields:
        The ranks of training, the check of the exported model, and each kind of engine.
    """
    if "train" in stages:
        training = config.training
        threads = training.threads_per_worker
        yield Group("training.num_workers", training.num_workers, threads, int(on_gpu), "training.threads_per_worker")
    if "export" in stages:
        yield Group("export.tensor_parallel_size", 1, 1, config.export.tensor_parallel_size if on_gpu else 0)
    if "generate" in stages:
        yield _engines("generation", config.generation, on_gpu=on_gpu)
    if "judge" in stages:
        judge = config.judge
        if isinstance(judge, VllmJudge):
            yield _engines("judge", judge, on_gpu=on_gpu)
        members = enumerate(judge.judges) if isinstance(judge, JuryJudge) else ()
        for number, member in members:
            if isinstance(member, VllmJudge):
                yield _engines(f"judge.judges.{number}", member, on_gpu=on_gpu)


def _engines(section: str, of: GenerationConfig | VllmJudge, *, on_gpu: bool) -> Group:
    """Engines with the bundles that Ray Data asks for: a CPU beside each GPU, or the CPUs alone."""
    size = of.tensor_parallel_size
    if on_gpu:
        return Group(f"{section}.engines", of.engines, size, size)
    return Group(f"{section}.engines", of.engines, size * of.cpus_per_engine, 0, f"{section}.cpus_per_engine")


def problem_of(group: Group, nodes: Sequence[Node]) -> str | None:
    """Why a group can't be placed: what it needs, what there is, and the way out.

    Args:
        group: One kind of process.
        nodes: What there is.

    Returns:
        One line; None where it can.
    """
    fit = room(group, nodes)
    if fit >= group.count:
        return None
    kind, each, there = (
        ("GPU", group.num_gpus, sum(node.num_gpus for node in nodes))
        if group.num_gpus
        else ("CPU", group.num_cpus, sum(node.num_cpus for node in nodes))
    )
    needed = group.count * each
    if needed > there:
        return (
            f"{group.key} = {group.count} needs {counted(needed, kind)}; there are {there}; ask for fewer, or name a "
            "larger cluster in cluster.address"
        )
    ways = [f"{group.key} = {fit}"] if fit and not group.key.endswith("tensor_parallel_size") else []
    if (cpus := _cpus_that_fit(group, group.count, nodes)) is not None:
        ways.insert(0, f"{group.cpu_key} = {cpus}")
    elif not ways and (cpus := _cpus_that_fit(group, 1, nodes)) is not None:
        fewer = room(replace(group, num_cpus=cpus), nodes)
        ways.append(f"{group.cpu_key} = {cpus} with {group.key} = {fewer}")
    way_out = f"what fits: {', or '.join(ways)}" if ways else "ask for less, or name a larger cluster"
    return (
        f"{group.key} = {group.count}: {group} are needed, each whole on one node, and {fit} can be placed: "
        f"{'; '.join(in_words(nodes))}; {way_out}"
    )


def in_words(nodes: Sequence[Node]) -> list[str]:
    """Each node's resources, equal unnamed ones together.

    >>> in_words([Node(8, 1, "a"), Node(4, 0), Node(4, 0)])
    ['a has 1 GPU and 8 CPUs', '2 nodes with 4 CPUs each']

    Args:
        nodes: What there is.

    Returns:
        A phrase for each.
    """
    phrases = []
    for node in dict.fromkeys(nodes):
        same = list(nodes).count(node)
        _, _, has = str(node).partition(" has ")
        phrases.append(str(node) if same == 1 else f"{same} nodes with {has} each")
    return phrases


def _cpus_that_fit(group: Group, count: int, nodes: Sequence[Node]) -> int | None:
    """The most CPUs of each process with which so many can be placed; None where the key or a fit is missing."""
    if group.cpu_key is None:
        return None
    fewer = (replace(group, num_cpus=cpus) for cpus in range(group.num_cpus - 1, 0, -1))
    return next((less.num_cpus for less in fewer if room(less, nodes) >= count), None)
