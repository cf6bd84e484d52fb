"""Which address a node has, and how Ray is started there. Pure functions: nothing is started."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from launcher.config import load_config
from launcher.submit import node
from launcher.submit.node import Node, own_address, ray_command, reachable

ENTRIES = [
    ("lo", "127.0.0.1"),
    ("lo", "::1"),
    ("ib0", "fe80::1%ib0"),
    ("ib0", "fd00::7"),
    ("ib0", "10.1.0.7"),
    ("eth0", "192.168.3.7"),
    ("eth6", "2001:db8::7"),
    ("bond0", "not an address"),
]


def test_what_other_hosts_may_know() -> None:
    assert list(reachable(ENTRIES).items()) == [
        ("10.1.0.7", "ib0"),
        ("192.168.3.7", "eth0"),
        ("fd00::7", "ib0"),
        ("2001:db8::7", "eth6"),
    ]


@pytest.mark.parametrize(
    ("interface", "candidates", "expected"),
    [
        ("ib0", [], "10.1.0.7"),
        ("eth6", ["10.1.0.7"], "2001:db8::7"),
        (None, ["", "127.0.0.1", "fd00::7"], "fd00::7"),
        (None, ["192.168.3.7", "10.1.0.7"], "192.168.3.7"),
    ],
)
def test_the_address_of_the_right_interface(interface: str | None, candidates: list[str], expected: str) -> None:
    assert own_address(reachable(ENTRIES), interface, candidates) == expected


def test_an_address_that_is_not_clear_is_asked_for() -> None:
    with pytest.raises(OSError, match=r"Name its interface in cluster.slurm.interface: .*'fd00::7': 'ib0'"):
        own_address(reachable(ENTRIES), None, ["::1"])
    with pytest.raises(OSError, match=r"interface = ib1: no address there"):
        own_address(reachable(ENTRIES), "ib1", ["10.1.0.7"])
    assert own_address({"2001:db8::7": "eth6"}, None, []) == "2001:db8::7"


def test_ray_is_told_addresses_of_both_families() -> None:
    here = Node("fd00::7", "ib0", num_cpus=4, num_gpus=2)
    head = ray_command(here, "[fd00::7]:40001", is_head=True, folder=Path("/private"))
    assert {"--head", "--port=40001", "--node-ip-address=fd00::7", "--num-cpus=4", "--num-gpus=2"} <= set(head)
    worker = ray_command(here, "[fd00::1]:40001", is_head=False, folder=Path("/private"))
    assert "--address=[fd00::1]:40001" in worker
    assert "--head" not in worker


def test_the_script_hands_an_ipv6_address_to_the_launcher_as_text(repository: Path) -> None:
    quickstart = repository / "configs/quickstart.yaml"
    assert load_config(quickstart, ["cluster.address='[fd00::1]:40001'"]).cluster.address == "[fd00::1]:40001"
    assert "cluster.address=\"'$(cat" in (repository / "slurm/run.sh").read_text()


def test_the_examples_hold() -> None:
    assert doctest.testmod(node).failed == 0
