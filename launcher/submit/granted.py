"""What a Slurm job has for a run, reckoned from what is asked for it; the machine that submits it does not count."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

from launcher.config import RunConfig
from launcher.errors import ConfigError
from launcher.gpus import Card, card_of
from launcher.placement import UNKNOWN_CPUS, Node
from launcher.ray_cluster import Resources, together
from launcher.submit.config import SlurmConfig
from launcher.submit.needs import gpus_asked, with_needs

SLURM = "cluster.slurm"


def slurm_resources(config: RunConfig) -> Resources:
    """The nodes of the run's job, with the GPUs and CPUs that are asked for.

    Args:
        config: A run's configuration with cluster.slurm.

    Returns:
        The resources; the memory of a GPU is its type's usual one, None where the type is not named or not known.
    """
    slurm = config.cluster.slurm or SlurmConfig()
    with suppress(ConfigError):  # the job's own check reports it; what is asked explicitly still counts
        slurm = with_needs(config, slurm)
    node = Node(slurm.cpus_per_node or UNKNOWN_CPUS, gpus_asked(slurm) or 0)
    cards = list(cards_of(slurm))
    known = [card for _, card in cards if card]
    if len(known) < len(cards) or _differs_by_stage(config):
        known = []  # which GPUs a model is to fit into is then not clear
    return together(
        [node] * slurm.nodes,
        SLURM,
        gpu_memory=min((card.memory for card in known), default=None),
        capability=max((card.capability for card in known), default=None),
        gpu_kind=", ".join(word for word, _ in cards),
    )


def _differs_by_stage(config: RunConfig) -> bool:
    """Whether single stages ask for other GPUs than the job of the whole run, under --split-stages."""
    stages = (getattr(config.cluster.stages, name) for name in type(config.cluster.stages).model_fields)
    own = config.cluster.slurm.constraint if config.cluster.slurm else None
    return any(
        stage is not None and (":" in (stage.gpus or "") or stage.constraint not in (None, own)) for stage in stages
    )


def cards_of(slurm: SlurmConfig) -> Iterator[tuple[str, Card | None]]:
    """The kinds of GPU that a job may get: by type, else by the features its nodes must have.

    >>> from launcher.submit.config import SlurmConfig
    >>> [word for word, card in cards_of(SlurmConfig(gpus_per_node="h100:8"))]
    ['h100']
    >>> [card.memory // 2**30 for word, card in cards_of(SlurmConfig(gres="gpu:4", constraint="ib&(a100-80|a100-40)"))]
    [80, 40]

    Args:
        slurm: What is asked of Slurm.

    Yields:
        The type's word, and the card that it means; None where that is not known.
    """
    by_count = [entry.partition(":") for entry in (slurm.gpus_per_node or "").split(",")]
    typed = [kind for kind, _, number in by_count if number]
    for text in (slurm.gres or "", *slurm.options):
        typed += re.findall(r"(?:\bgpu[:/]|^--gpus[a-z-]*=)([A-Za-z][\w.-]*):\d", text)
    if typed:
        yield from ((word, card_of(word)) for word in typed)
        return
    for word in re.split(r"[^\w.-]+", slurm.constraint or ""):
        if (card := card_of(word)) is not None:
            yield word, card
