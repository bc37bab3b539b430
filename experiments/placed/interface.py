"""An interface with a rate for each process: network namespaces of this machine, joined by a bridge.

A token bucket (`tbf`) limits what leaves a namespace. Namespaces have names in a mount namespace only, so they vanish
with their processes, however these end.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..train.distributed.launch import launch

INSIDE = "EXPERTIER_NAMESPACES"
"""Set where processes have interfaces of their own."""
NAME = "eth0"
"""Of the only interface of a process but loopback."""
STARTER = "10.77.0.1"
"""The address of the program that starts the processes; theirs follow it, and nobody else sees any."""
MOST_PROCESSES = 253
"""Addresses that are left."""
BURST_BYTES = 1 << 17
"""Bytes that pass at once: two of the largest packets that are cut at the interface."""
QUEUE = "400ms"
"""How long a packet may wait for the bucket before it is dropped; connections send less when they meet drops."""
SET_UP = """
mount -t tmpfs names /var/run
mkdir /var/run/netns
ip link set lo up
ip link add hub type bridge
ip addr add $0/24 dev hub
ip link set hub up
for number in $(seq 0 $(($1 - 1))); do
  ip netns add $number
  ip link add to$number type veth peer name $2 netns $number
  ip link set to$number master hub up
  ip -n $number addr add ${0%.*}.$(($number + 2))/24 dev $2
  ip -n $number link set lo up
  ip -n $number link set $2 up
  tc -n $number qdisc add dev $2 root $3
done
shift 3
exec "$@"
"""
"""Takes the starter's address, how many processes, the interface's name, a bucket, and the command to go on with."""
ENTER = ("sh", "-c", 'exec ip netns exec "$LOCAL_RANK" "$@"', "sh")
"""Before the command of a process that torchrun starts."""


def is_apart() -> bool:
    """Whether this program is in namespaces that `launch_apart` made; elsewhere no interface is touched."""
    return INSIDE in os.environ


def launch_apart(arguments: Sequence[str], processes: int, bytes_per_s: float) -> int:
    """Run `expertier` with these arguments on processes that reach each other by limited interfaces only.

    Args:
        arguments: of the command line, which comes here again in the namespaces.
        processes: how many, 1 to 253.
        bytes_per_s: that may leave each process.

    Returns:
        The exit code.

    Raises:
        ValueError: if network namespaces or limited interfaces may not be made here.
    """
    if is_apart():
        return launch(arguments, processes, entry=ENTER, address=STARTER)
    if processes > MOST_PROCESSES:
        raise ValueError(f"{processes} processes; there are addresses for 1 to {MOST_PROCESSES}")
    begin = apart(processes, bytes_per_s)
    _expect_allowed((*begin, "true"))
    command = (*begin, sys.executable, "-m", "experiments.cli", *arguments)
    # torch would warn that no name server knows these addresses
    inside = {INSIDE: "1", "GLOO_SOCKET_IFNAME": NAME, "TORCH_CPP_LOG_LEVEL": "FATAL"}
    return subprocess.run(command, env=os.environ | inside).returncode


def apart(processes: int, bytes_per_s: float) -> tuple[str, ...]:
    """A program that makes the namespaces 0, 1, ... and goes on as the command that follows it.

    Args:
        processes: how many namespaces, with the addresses 10.77.0.2, 10.77.0.3, ...
        bytes_per_s: that may leave each.
    """
    # who is not root becomes root of a user namespace
    namespaces = ("unshare", *(("--map-root-user",) if os.geteuid() else ()), "--net", "--mount")
    return (*namespaces, "sh", "-e", "-c", SET_UP, STARTER, str(processes), NAME, _bucket(bytes_per_s))


def _expect_allowed(command: Sequence[str]) -> None:
    """Refuse in one line what cannot be set up."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else ""
    except FileNotFoundError as error:
        reason = f"{error.filename} is not installed"
    if reason:
        raise ValueError(
            f"a limited interface for each process needs unshare, ip, tc and the right to make network namespaces; "
            f"take --simulated ({reason})"
        )


def _bucket(bytes_per_s: float) -> str:
    """A token bucket in the words of `tc`."""
    return f"tbf rate {round(8 * bytes_per_s)}bit burst {BURST_BYTES} latency {QUEUE}"


class Interface:
    """The interface of this process, which `launch_apart` gave it."""

    def limit(self, bytes_per_s: float) -> None:
        """Let so much leave this process from now on."""
        subprocess.run(["tc", "qdisc", "change", "dev", NAME, "root", *_bucket(bytes_per_s).split()], check=True)

    @property
    def sent_bytes(self) -> int:
        """What has left this process, headers and acknowledgements included."""
        lines = Path("/proc/net/dev").read_text().splitlines()
        return int(next(line for line in lines if line.strip().startswith(f"{NAME}:")).split()[9])
