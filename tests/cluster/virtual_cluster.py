"""A real SLURM cluster on one machine: every node has its own namespaces and network address; they share the disk.

    python tests/cluster/virtual_cluster.py start | stop | status | power-off NODE | power-on NODE

A node has its own address, host name, processes and /dev/shm, so it can fail alone. This needs root and the Debian packages
in `PACKAGES`. `start` prints `export SLURM_CONF=...`, which is all that `sbatch` needs. Only one cluster can run at a time:
the bridge and the addresses are fixed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = Path(tempfile.gettempdir()) / "lfm-cluster"  # a short path: the length of a socket's path is limited
NETWORK = "10.91.0"
BRIDGE = "lfmcluster0"
NODES = ("node1", "node2")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux libpmix2"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "unshare", "nsenter")
START_SECONDS = 60


class VirtualCluster:
    """The cluster in `folder`; SLURM's commands reach it with the variables in `environment`."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        binaries = os.pathsep.join(["/usr/sbin", "/sbin", os.environ.get("PATH", "/usr/bin:/bin")])
        self.environment = {**os.environ, "PATH": binaries, "SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """Start a fresh cluster, replacing one that runs or has crashed; return when all nodes are ready for jobs."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._write_configuration()
        self._run("ip", "link", "add", BRIDGE, "type", "bridge")
        self._run("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        self._run("ip", "link", "set", BRIDGE, "up")
        munge = self.folder / "munge"
        self._run(
            "munged",
            f"--key-file={munge}/key",
            f"--socket={munge}/socket",
            f"--pid-file={munge}/pid",
            f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        )
        self._run("slurmctld", "-f", str(self.configuration))
        for node in NODES:
            self.power_on(node)
        self.wait_for_nodes()

    def stop(self) -> None:
        """Power off all nodes, end the daemons and delete the network; harmless if nothing runs."""
        for node in NODES:
            self.power_off(node)
            self._run("ip", "link", "delete", _cable(node), check=False)
            self._run("ip", "netns", "delete", _namespace(node), check=False)
        for pid_file in (self.folder / "slurmctld.pid", self.folder / "munge" / "pid"):
            self._end(pid_file, signal.SIGTERM)
        self._run("ip", "link", "delete", BRIDGE, check=False)

    def power_on(self, node: str) -> None:
        """Boot a node that is off."""
        namespace, address = _namespace(node), f"{NETWORK}.{_address(node)}/24"
        if not Path("/run/netns", namespace).exists():
            self._run("ip", "netns", "add", namespace)
            self._run("ip", "link", "add", _cable(node), "type", "veth", "peer", "name", "eth0", "netns", namespace)
            self._run("ip", "link", "set", _cable(node), "master", BRIDGE)
            self._run("ip", "-n", namespace, "addr", "add", address, "dev", "eth0")
            for interface in ("lo", "eth0"):
                self._run("ip", "-n", namespace, "link", "set", interface, "up")
        self._run("ip", "link", "set", _cable(node), "up")
        spool = self.folder / "spool" / node
        spool.mkdir(parents=True, exist_ok=True)
        command = [
            "nsenter",
            f"--net=/run/netns/{namespace}",
            "unshare",
            "--uts",
            "--ipc",
            "--mount",
            "--pid",
            "--fork",
        ]
        command += ["--kill-child", "--mount-proc", "--propagation", "private"]
        command += ["bash", str(HERE / "boot_node.sh"), node, str(self.folder)]
        variables = {"PATH": self.environment["PATH"], "SLURM_CONF": str(self.configuration)}
        variables |= {"HOME": "/root", "LANG": "C.UTF-8"}
        with open(spool / "boot.log", "a") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=variables
            )
        (spool / "boot.pid").write_text(str(process.pid))

    def power_off(self, node: str) -> None:
        """Cut the power: every process of the node ends at once, and no other node is notified."""
        # The cable first, or the kernel would tell the other node that its connections are closed.
        self._run("ip", "link", "set", _cable(node), "down", check=False)
        self._end(self.folder / "spool" / node / "boot.pid", signal.SIGKILL)  # its namespaces end with it

    def power_on_if_off(self, node: str) -> None:
        """Boot a node that a test has left without power."""
        if not (self.folder / "spool" / node / "boot.pid").exists():
            self.power_on(node)

    def wait_for_nodes(self) -> None:
        """Wait until every node is ready for jobs; raise `TimeoutError` if that takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            states = self._run("sinfo", "-h", "-N", "-p", "batch", "-o", "%t", check=False).split()
            if len(states) == len(NODES) and set(states) <= {"idle", "mix", "alloc"}:  # a * marks a silent node
                return
            time.sleep(0.2)
        raise TimeoutError(f"the nodes are not ready after {START_SECONDS} s; the logs are in {self.folder}")

    def _write_configuration(self) -> None:
        for name in ("munge", "state", "spool", "tmp"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        names = {"head": _host_name(), "network": NETWORK, "folder": self.folder, "nodes": len(NODES)}
        names["last_address"] = 10 + len(NODES)
        content = (HERE / "slurm.conf").read_text()
        self.configuration.write_text(re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), content))
        for number in range(8):  # SLURM needs a device for each GPU; a copy of /dev/null will do
            os.mknod(self.folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # read, though unused
        hosts = {"127.0.0.1": "localhost", f"{NETWORK}.1": _host_name()}
        hosts |= {f"{NETWORK}.{_address(node)}": node for node in NODES}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in hosts.items()))
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")

    def _end(self, pid_file: Path, number: signal.Signals) -> None:
        """Signal the process that a file names, if it is still ours, and wait until it has gone."""
        if not pid_file.exists():
            return
        process = Path("/proc", pid_file.read_text().strip())
        deadline = time.monotonic() + 10
        while _is_of(process, self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL if time.monotonic() > deadline else number)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(process.name), os.WNOHANG)  # if this process started it
            time.sleep(0.1)
        pid_file.unlink(missing_ok=True)  # a daemon that ended cleanly has deleted it itself

    def _run(self, *command: str, check: bool = True) -> str:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        if check and result.returncode:
            raise OSError(f"{' '.join(command)} failed: {result.stderr.strip()}")
        return result.stdout


def what_is_missing() -> str:
    """Return in one sentence why no cluster can run here; empty if one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of namespaces needs root"
    path = VirtualCluster().environment["PATH"]
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"there is no {', '.join(missing)}; install {PACKAGES}"
    command = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    allowed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return f"namespaces are not permitted here ({allowed.stderr.strip()})" if allowed.returncode else ""


def _is_of(process: Path, folder: Path) -> bool:
    """Whether /proc/PID runs and its command names the folder; its number may belong to another process by now."""
    try:
        return str(folder).encode() in (process / "cmdline").read_bytes()  # a zombie's command line is empty
    except OSError:
        return False


def _address(node: str) -> int:
    return 11 + NODES.index(node)


def _namespace(node: str) -> str:
    return f"lfmcluster-{node}"


def _cable(node: str) -> str:
    return f"lfmc-{node}"


def _host_name() -> str:
    return socket.gethostname().split(".")[0]


def main() -> None:
    cluster = VirtualCluster()
    actions = {
        "start": cluster.start,
        "stop": cluster.stop,
        "power-off": cluster.power_off,
        "power-on": cluster.power_on,
    }
    match sys.argv[1:]:
        case ["start" | "stop" as action]:
            actions[action]()
            if action == "start":
                print(f"export SLURM_CONF={cluster.configuration}")
        case ["power-off" | "power-on" as action, node] if node in NODES:
            actions[action](node)
        case ["status"]:
            subprocess.run(["sinfo", "--Node", "--long"], env=cluster.environment, timeout=60, check=True)
            subprocess.run(["squeue"], env=cluster.environment, timeout=60, check=True)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
