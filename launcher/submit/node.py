"""Ray on one node of a Slurm job: start it, say why if it fails, stop it and nothing else.

Started by srun, once on every node of the job: `python -m launcher.submit.node --folder FOLDER --head NODE`. The
folder lies on storage that all nodes see; the head leaves its address there, and a node that fails its cause.
"""

from __future__ import annotations

import argparse
import glob
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import psutil

from launcher.run_directory import write_atomically

STARTED = "Ray runtime started."
MAX_RESTARTS = 3
LOOK_S = 5


@dataclass(frozen=True)
class Node:
    """Where this node is on the network, and what Ray may hand out here."""

    address: str
    interface: str
    num_cpus: int
    num_gpus: int


def ray_command(node: Node, head: str, *, is_head: bool, folder: Path) -> list[str]:
    """The command that starts Ray on a node. Pure.

    Every port but the head's is left to the system, so that clusters of several jobs fit on one machine.

    Args:
        node: this node.
        head: host:port of the cluster.
        is_head: whether this node is the head.
        folder: private folder for Ray's files; Ray adds up to 67 bytes for its sockets.

    Returns:
        The command's words.
    """
    role = ["--head", f"--port={parted(head)[1]}", "--include-dashboard=false"] if is_head else [f"--address={head}"]
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", *role),
        f"--node-ip-address={node.address}",
        f"--num-cpus={node.num_cpus}",
        f"--num-gpus={node.num_gpus}",
        f"--temp-dir={folder}",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
        "--log-color=false",
        "--block",
    ]


def resources(environment: Mapping[str, str]) -> tuple[int, int]:
    """CPUs and GPUs that Slurm gave this node; never more, whatever the machine has. Pure but for the CPU count."""
    num_cpus = int(environment.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
    listed = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name and name != "NoDevFiles"]
    return num_cpus, int(environment.get("SLURM_GPUS_ON_NODE") or len(listed))


def joined(host: str, port: int) -> str:
    """Host and port as one word. Pure.

    >>> joined("10.0.0.1", 6379), joined("fd00::1", 6379)
    ('10.0.0.1:6379', '[fd00::1]:6379')

    Args:
        host: an IPv4 or IPv6 address.
        port: the port.

    Returns:
        The word; an IPv6 address stands in brackets.
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parted(address: str) -> tuple[str, int]:
    """The inverse of `joined`. Pure.

    >>> parted("10.0.0.1:6379"), parted("[fd00::1]:6379")
    (('10.0.0.1', 6379), ('fd00::1', 6379))

    Args:
        address: host:port, or [host]:port.

    Returns:
        Host and port.
    """
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def reachable(entries: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The addresses that other hosts may know. Pure.

    Args:
        entries: interface and address, of both families.

    Returns:
        Address to interface, IPv4 first. Loopback is left out, and so is what is valid on one link only: an IPv6
        address of that kind says nothing without its interface.
    """
    found: dict[int, dict[str, str]] = {4: {}, 6: {}}
    for interface, text in entries:
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            continue
        if not address.is_loopback and not (address.version == 6 and address.is_link_local):
            found[address.version][str(address)] = interface
    return found[4] | found[6]


def own_address(addresses: Mapping[str, str], interface: str | None, candidates: Iterable[str]) -> str:
    """Which of this host's addresses the cluster uses. Pure.

    Args:
        addresses: address to interface, as `reachable` returns them.
        interface: the interface that is asked for, if one is.
        candidates: addresses by which this host is known, the surest first.

    Returns:
        The address; an interface's IPv4 address before its IPv6 address.

    Raises:
        OSError: if there is no such address, or it is not clear which is meant.
    """
    if interface is not None:
        own = next((address for address, name in addresses.items() if name == interface), None)
        if own is None:
            raise OSError(f"cluster.slurm.interface = {interface}: no address there; there are {dict(addresses)}")
        return own
    for address in [*candidates, *(list(addresses) if len(addresses) == 1 else [])]:
        if address in addresses:
            return address
    raise OSError(
        f"which of these addresses do other nodes reach? Name its interface in cluster.slurm.interface: "
        f"{dict(addresses)}"
    )


def find_node(towards: str | None, interface: str | None) -> Node:
    """This node's address and interface.

    Args:
        towards: host:port of the head, on the other nodes.
        interface: the interface to use; None takes the one that the route to the head, or the host's name, gives.

    Returns:
        The node, with what Slurm gave it.

    Raises:
        OSError: if no such address or interface is there.
    """
    families = (socket.AF_INET, socket.AF_INET6)
    addresses = reachable(
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
    )
    own = own_address(addresses, interface, [_route_to(towards)] if towards else _names())
    return Node(own, addresses[own], *resources(os.environ))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _route_to(address: str) -> str:
    """Address that this host's packets to another have; a UDP socket sends nothing when it connects."""
    host, port = parted(address)
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _names() -> list[str]:
    """The head's own addresses: as srun knows it, and as its name resolves."""
    candidates = [os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")]
    with suppress(OSError):
        candidates += [str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None)]
    return candidates


def _free_port(address: str) -> int:
    with socket.socket(_family(address)) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _wait_for(path: Path, stop: _Stop) -> str:
    """What the head writes; the batch script stops this process when that takes too long, or the head has failed."""
    while not path.exists():
        if stop.asked:
            raise OSError("stopped before the head had started")
        time.sleep(0.2)
    return path.read_text(encoding="utf-8").strip()


class _Ray:
    """`ray start` as a child: its output goes on to ours, its last lines are kept, and it can be stopped."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.started = False
        self.last_lines: list[str] = []
        # A session of its own: Ctrl-C at srun is not for Ray.
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stdout is not None  # noqa: S101 - PIPE was asked for
        threading.Thread(target=self._pass_on, args=(self._process.stdout,), daemon=True).start()

    def _pass_on(self, output: TextIO) -> None:
        for line in output:
            print(line, end="", flush=True)
            self.started |= STARTED in line
            self.last_lines = [*self.last_lines, line.rstrip()][-5:]

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        self._process.terminate()


class _Stop:
    """Whether the batch script has sent USR2; every other signal is for the run, and is let pass.

    Slurm signals all processes of a step, Ray's too: they inherit that USR1, the run's sign to save, is ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self.ray: _Ray | None = None
        signal.signal(signal.SIGUSR2, self.ask)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        for passing in (signal.SIGTERM, signal.SIGINT):
            signal.signal(passing, lambda *_: None)

    def ask(self, *_: object) -> None:
        self.asked = True
        if self.ray is not None:
            self.ray.stop()


def superseded(attempt: Path) -> bool:
    """Whether a later attempt of the job has begun: Slurm thinks this node lost, and nobody else ends what runs here.

    Args:
        attempt: folder of this attempt, JOB.ATTEMPT, beside those of the others.

    Returns:
        True if there is one with a higher number.
    """
    job, _, number = attempt.name.rpartition(".")
    others = (other.name.rpartition(".")[2] for other in attempt.parent.glob(f"{glob.escape(job)}.*"))
    return number.isdecimal() and any(other.isdecimal() and int(other) > int(number) for other in others)


def _end_of(ray: _Ray, stop: _Stop, shared: Path) -> int:
    """Wait for Ray's end, which comes by itself, by USR2, or when a later attempt has taken over."""
    while True:
        try:
            return ray.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            if not stop.asked and superseded(shared):
                stop.ask()


def _run_ray(stop: _Stop, node: Node, head: str, *, is_head: bool, shared: Path, folder: Path) -> str | None:
    """Run Ray until it ends or is stopped; returns the cause if it failed."""
    # Ray waits 30 s for requests in flight when it is stopped; here the run has ended before.
    environment = dict(os.environ) | {"VLLM_HOST_IP": node.address, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        environment.setdefault(variable, node.interface)
    for restarts in range(MAX_RESTARTS + 1):
        ray_folder = folder / str(restarts)
        ray = stop.ray = _Ray(ray_command(node, head, is_head=is_head, folder=ray_folder), environment)
        while is_head and ray.running() and not ray.started:
            time.sleep(0.1)
        if is_head and ray.running():
            write_atomically(shared / "address", head)
        code = _end_of(ray, stop, shared)
        shutil.rmtree(ray_folder, ignore_errors=True)
        if stop.asked:
            return None
        cause = f"ray ended with exit code {code}: " + " | ".join(ray.last_lines)
        if is_head or not ray.started:
            return cause
        print(f"{cause}\nstarting it again ({restarts + 1} of {MAX_RESTARTS})", flush=True)
    return cause


def main(arguments: Sequence[str] | None = None) -> int:
    """Start Ray on this node and stay until it ends.

    Args:
        arguments: the command's words; None takes them from the command line.

    Returns:
        0 if it was stopped with USR2 or superseded, else 1, with the cause on stderr and in the shared folder.
    """
    parser = argparse.ArgumentParser(prog="python -m launcher.submit.node", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of this attempt, which all nodes see")
    parser.add_argument("--head", required=True, help="Slurm's name of the head node")
    parser.add_argument("--node-folder", type=Path, required=True, help="where Ray's files go on this node")
    parser.add_argument("--interface", help="network interface between nodes")
    parser.add_argument("--no-gpus", action="store_true", help="hand out no GPU, whatever Slurm gave this node")
    asked = parser.parse_args(arguments)
    stop = _Stop()
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    is_head = name == asked.head
    with tempfile.TemporaryDirectory(prefix="tl-", dir=asked.node_folder, ignore_cleanup_errors=True) as folder:
        try:
            head = None if is_head else _wait_for(asked.folder / "address", stop)
            node = find_node(head, asked.interface)
            node = replace(node, num_gpus=0) if asked.no_gpus else node
            head = head or joined(node.address, _free_port(node.address))
            cause = _run_ray(stop, node, head, is_head=is_head, shared=asked.folder, folder=Path(folder))
        except OSError as error:
            cause = str(error)
    if cause is None:
        return 0
    print(f"node {name}: {cause}", file=sys.stderr, flush=True)
    with suppress(FileExistsError), (asked.folder / "cause").open("x", encoding="utf-8") as file:
        file.write(f"node {name}: {cause}\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
