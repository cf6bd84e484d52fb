"""Which address a node has, how Ray is started there, and when it ends. No Ray is started."""

from __future__ import annotations

import doctest
import sys
import time
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


def test_a_later_attempt_of_the_same_job_is_seen(tmp_path: Path) -> None:
    mine = tmp_path / "7_1.9"
    for name in ("7_1.9", "7_1.8", "7_1.log", "7_11.12", "17_1.12", "7_1.9.partial"):
        (tmp_path / name).mkdir()
    assert not node.superseded(mine)
    assert not node.superseded(tmp_path / "elsewhere")
    (tmp_path / "7_1.10").mkdir()
    assert node.superseded(mine)


RAY_OF_ONE_NODE = """
import time
print("Ray runtime started.", flush=True)
time.sleep(60)
"""


def test_ray_on_a_lost_node_ends_when_a_later_attempt_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "ray_command", lambda *_, **__: [sys.executable, "-c", RAY_OF_ONE_NODE])
    monkeypatch.setattr(node, "LOOK_S", 0.2)
    monkeypatch.setattr(node.signal, "signal", lambda *_: None)
    shared = tmp_path / "7.0"
    shared.mkdir()
    (tmp_path / "7.1").mkdir()
    here = Node("127.0.0.1", "lo", num_cpus=1, num_gpus=0)
    began = time.monotonic()
    assert node._run_ray(node._Stop(), here, "127.0.0.1:1", is_head=True, shared=shared, folder=tmp_path) is None
    assert time.monotonic() - began < 20


def test_the_examples_hold() -> None:
    assert doctest.testmod(node).failed == 0
