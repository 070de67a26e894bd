"""Two hosts on this machine: network namespaces with an address each, and a cable between them."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest


def _ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


class Host:
    """A network namespace.

    Attributes:
        address: its address on the cable.
    """

    def __init__(self, name, address):
        self.name, self.address = name, address
        self.processes = []

    def start(self, log, *command, **environment):
        """Start a command, with gloo on the cable; what it prints goes to the file ``log``."""
        own = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable", **environment}
        inside = ["ip", "netns", "exec", self.name, *command]
        with log.open("w") as told:
            self.processes.append(subprocess.Popen(inside, env=own, stdout=told, stderr=told))
        return self.processes[-1]

    def kill(self):
        """End all its processes at once, as a power failure does."""
        for number in _ip("netns", "pids", self.name).stdout.split():
            os.kill(int(number), signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def cable(self, state):
        """Plug the cable in ("up"), or out ("down")."""
        _ip("-n", self.name, "link", "set", "cable", state)


@contextmanager
def two_hosts():
    """Two `Host`s; skip the test where this machine has no network namespaces."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("takes Linux and its command ip (Debian's package iproute2)")
    hosts = [Host(f"jfbfast-{secrets.token_hex(4)}", f"10.213.7.{number}") for number in (1, 2)]
    with ExitStack() as stack:
        for host in hosts:
            try:
                _ip("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no permission to make network namespaces ({error.stderr.strip()})")
            stack.callback(_ip, "netns", "del", host.name)
            stack.callback(host.kill)
        first, second = hosts
        _ip("link", "add", "cable", "netns", first.name, "type", "veth", "peer", "name", "cable", "netns", second.name)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.cable("up")
        yield hosts
