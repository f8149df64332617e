"""A real SLURM cluster on one machine: a login node with the controller, and nodes node1, node2 ..., all in namespaces.

    python tests/slurm/cluster.py DIR --nodes 2
    nsenter -t PID -m -u -n -p -- bash            # a shell on the login node

Started by conftest.py, as root; it prints "ready PID" when all nodes are idle, and then takes one command a line from stdin and
answers each with a line: `power NODE` (the current goes off), `slurmd NODE` (kill -9 of its daemon), `cut NODE` (its network
is gone), `disk NODE` (nothing can be written to its /mnt any more), `heal NODE` (whatever it was). The cluster ends when stdin
closes, so it cannot outlive its test.

Each node has its own process ids, host name, network, /run, /dev/shm and /mnt; all share the rest of the file system. The
nodes' namespaces lie inside the login node's: when that one's first process ends, the kernel ends everything. PID is that
process as seen from outside, for nsenter. Nothing of the machine itself is changed: what the cluster sees differently is
mounted inside the namespaces alone.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "mount")
NAMESPACES = ("unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--mount-proc", "--kill-child")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
NET = "10.83.0"
GPUS = 2  # of a node; no more than files, which SLURM hands out as if they were GPUs
SMALL_DISK = "12M"  # DIR/small: a disk that all nodes share and that fills up soon

# Timers in seconds where a cluster has minutes. No cgroups, no accounting: neither is needed for what the scripts do.
CONFIG = """\
ClusterName=test
SlurmctldHost=login({net}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_min_interval=100000,nohold_on_prolog_fail
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
BatchStartTimeout=30
KillWait=60
CompleteWait=0
UnkillableStepTimeout=120
MinJobAge=3600
EnforcePartLimits=ALL
GresTypes=gpu
MailProg=/bin/true
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def main() -> None:
    """Starts the login node, or is the first process of a node."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="an empty directory, not below /run, /dev or /mnt")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=4, help="that each node claims to have")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["PATH"] = f"{PATH}:{os.environ.get('PATH', '')}"
    if args.inside is None:
        write_files(args.dir, args.nodes, args.cpus)
        outer = subprocess.Popen([*NAMESPACES, sys.executable, *sys.argv, "--inside=login"], stdout=subprocess.PIPE, text=True)
        assert outer.stdout is not None
        if outer.stdout.readline() != "up\n":
            sys.exit("the cluster did not start")
        print(f"ready {first_process(outer)}", flush=True)
        for line in outer.stdout:
            print(line, end="", flush=True)
        sys.exit(outer.wait())
    elif args.inside == "login":
        as_first_process(lambda: Login(args.dir, args.nodes).serve())
    else:
        as_first_process(lambda: be_node(args.dir, args.inside))


def write_files(directory: Path, nodes: int, cpus: int) -> None:
    """The configuration, the key and the empty directories of a cluster."""
    for name in ("etc", "state", "log", "small", *(f"spool/node{n}" for n in range(1, nodes + 1))):
        (directory / name).mkdir(parents=True)
    names = {f"node{n}": f"{NET}.{10 + n}" for n in range(1, nodes + 1)}
    lines = [f"NodeName={name} NodeAddr={ip} CPUs={cpus} RealMemory=8000 Gres=gpu:{GPUS}" for name, ip in names.items()]
    (directory / "etc" / "slurm.conf").write_text(CONFIG.format(net=NET, dir=directory) + "\n".join(lines) + "\n")
    (directory / "etc" / "gres.conf").write_text(f"NodeName=node[1-{nodes}] Name=gpu File=/run/gpu[0-{GPUS - 1}]\n")
    hosts = {"localhost": "127.0.0.1", "login": f"{NET}.1", **names}
    (directory / "etc" / "hosts").write_text("".join(f"{ip} {name}\n" for name, ip in hosts.items()))
    (directory / "etc" / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)


def run(*command: str | Path) -> str:
    """A command that must succeed; what it printed."""
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout


def as_first_process(work: Callable[[], None]) -> None:
    """The work in a child. We ourselves collect the processes that lost their parent, and end with the child, and all with us."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    while os.wait()[0] != child:
        pass


def first_process(unshare: subprocess.Popen[str]) -> int:
    """The first process inside the namespaces that an `unshare --fork` made."""
    return int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()[0])


def private_mounts(directory: Path, name: str) -> None:
    """What a node sees differently from the machine, and its host name."""
    run("mount", "--make-rprivate", "/")
    for place in ("/run", "/dev/shm", "/mnt"):
        run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", place)
    for gpu in range(GPUS):
        Path(f"/run/gpu{gpu}").touch()
        run("mount", "--bind", "/dev/null", f"/run/gpu{gpu}")
    run("mount", "--bind", directory / "etc", "/etc/slurm")
    for file in ("hosts", "nsswitch.conf"):
        run("mount", "--bind", directory / "etc" / file, f"/etc/{file}")
    run("hostname", name)
    run("ip", "link", "set", "lo", "up")


def start_munged(directory: Path) -> None:
    """The service that signs the messages. Its files lie in a directory that nobody else may write to."""
    place = Path("/run/munge")
    place.mkdir(mode=0o755)
    place.parent.chmod(0o755)
    shutil.copy(directory / "munge.key", place / "key")
    files = {"key-file": "key", "socket": "munge.socket.2", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    run("munged", "--force", *(f"--{flag}={place / file}" for flag, file in files.items()))


def be_node(directory: Path, name: str) -> None:
    """The life of a node: it says that it is there, is given its network, and runs slurmd for as long as it lives."""
    private_mounts(directory, name)
    print("up", flush=True)
    sys.stdin.readline()
    run("ip", "address", "add", f"{NET}.{10 + int(name.removeprefix('node'))}/24", "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    start_munged(directory)
    run("slurmd", "-N", name)
    print("up", flush=True)
    sys.stdin.readline()


class Login:
    """The login node, which also runs the controller and starts the others."""

    def __init__(self, directory: Path, nodes: int) -> None:
        self._directory = directory
        self._names = [f"node{n}" for n in range(1, nodes + 1)]
        self._nodes: dict[str, subprocess.Popen[str]] = {}

    def serve(self) -> None:
        """Starts everything, then obeys stdin until it closes."""
        private_mounts(self._directory, "login")
        run("mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", self._directory / "small")
        run("ip", "link", "add", "br0", "type", "bridge")
        run("ip", "address", "add", f"{NET}.1/24", "dev", "br0")
        run("ip", "link", "set", "br0", "up")
        start_munged(self._directory)
        run("slurmctld")
        for name in self._names:
            self.boot(name)
        self.wait_idle()
        print("up", flush=True)
        verbs = {"power": self.power, "slurmd": self.kill_slurmd, "cut": self.cut, "disk": self.disk, "heal": self.heal}
        for line in sys.stdin:
            verb, name = line.split()
            verbs[verb](name)
            print("done", flush=True)

    def boot(self, name: str) -> None:
        """Starts a node and gives it a cable."""
        command = [*NAMESPACES, sys.executable, __file__, str(self._directory), f"--inside={name}"]
        log = open(self._directory / "log" / f"{name}.log", "a")  # noqa: SIM115 # the node's, for as long as it lives
        node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert node.stdin is not None
        assert node.stdout is not None
        assert node.stdout.readline() == "up\n", f"{name} did not start"
        run("ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
        run("ip", "link", "set", f"to-{name}", "master", "br0", "up")
        print(file=node.stdin, flush=True)
        assert node.stdout.readline() == "up\n", f"{name} did not start"
        self._nodes[name] = node

    def wait_idle(self) -> None:
        """Returns when SLURM may use every node."""
        end = time.monotonic() + 90
        while len(set(run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split())) < len(self._names):
            assert time.monotonic() < end, f"nodes not idle after 90 s; see {self._directory}/log"
            time.sleep(0.05)

    def power(self, name: str) -> None:
        """The cable first, or the processes' ends would still be told to their peers, as no power failure does."""
        run("ip", "link", "delete", f"to-{name}")
        node = self._nodes.pop(name)
        os.kill(first_process(node), 9)
        node.wait()

    def kill_slurmd(self, name: str) -> None:
        """kill -9 of the daemon; what it started lives on."""
        self.on(name, "sh", "-c", "kill -9 $(cat /run/slurmd.pid)")

    def cut(self, name: str) -> None:
        """The cable is unplugged."""
        run("ip", "link", "set", f"to-{name}", "down")

    def disk(self, name: str) -> None:
        """The node's own disk fails: the kernel makes it read-only, as it does with a real one."""
        self.on(name, "mount", "-o", "remount,ro", "/mnt")

    def heal(self, name: str) -> None:
        """Everything that the others do is undone; jobs of before have left no process behind."""
        if name not in self._nodes:
            self.boot(name)
        else:
            run("ip", "link", "set", f"to-{name}", "up")
            self.on(name, "mount", "-o", "remount,rw", "/mnt")
            self.on(name, "sh", "-c", 'kill -0 $(cat /run/slurmd.pid) 2>/dev/null || slurmd -N "$0"', name)

    def on(self, name: str, *command: str) -> None:
        """Runs a command on a node."""
        run("nsenter", "-t", str(first_process(self._nodes[name])), "-m", "-u", "-n", "-p", "--", *command)


if __name__ == "__main__":
    main()
