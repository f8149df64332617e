"""Two nodes under a real SLURM, for the tests marked `slurm`; they are skipped, with the reason, where that cannot be had.

IGPT_DS_REQUIRE_SLURM=1 makes them fail there instead, so that a machine which must run them cannot leave them out in silence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launcher
import psutil
import pytest

from igpt_ds.config import ModelConfig, Recipe, recipe_to_dict
from igpt_ds.json_files import read_json_lines
from igpt_ds.model.cpu_speed import PRODUCT_VARIABLE
from igpt_ds.train.ledger.rows import append_row

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("cluster.py")
PATH = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
# What a user's shell would hand to sbatch, which exports all of it to the job. tests/conftest.py says why.
SETTINGS = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", PRODUCT_VARIABLE)
ENVIRONMENT = {"PATH": PATH, "HOME": "/tmp", "LANG": "C.UTF-8"} | {name: os.environ[name] for name in SETTINGS}
STEPS = 40
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Cluster:
    """A running cluster, seen from its login node at the repository root. Every wait has a deadline."""

    def __init__(self, directory: Path, nodes: int) -> None:
        command = [sys.executable, str(PROGRAM), str(directory), "--nodes", str(nodes)]
        self._log = open(directory.parent / "cluster.log", "w")  # noqa: SIM115 # closed in `close`
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env={"PATH": PATH}
        )
        word, _, pid = self._answer().partition(" ")
        assert word == "ready", Path(self._log.name).read_text()
        self._pid, self._names = pid.strip(), [f"node{n}" for n in range(1, nodes + 1)]
        self.small_disk, self._config = directory / "small", directory / "etc" / "slurm.conf"

    def close(self) -> None:
        """The end of the cluster and of everything on it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
        self._log.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def tell(self, verb: str, node: str) -> None:
        """One of cluster.py's commands: power, slurmd, cut, disk, heal."""
        print(verb, node, file=self._process.stdin, flush=True)
        assert self._answer() == "done\n", Path(self._log.name).read_text()

    def run(self, *command: str | Path, status: int | None = 0, timeout: float = 120, **environment: str) -> str:
        """A command on the login node; what it printed, both streams. `status` None: whatever it may be."""
        inside = ["nsenter", "-t", self._pid, "-m", "-u", "-n", "-p", "--", "env", "-C", str(ROOT), *map(str, command)]
        done = subprocess.run(
            inside,
            env=ENVIRONMENT | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert status in (None, done.returncode), f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def set_timer(self, name: str, seconds: int) -> None:
        """KillWait is the time between SIGTERM and SIGKILL, SlurmdTimeout that after which a silent node is down."""
        fresh = self._config.with_name("fresh")  # a daemon may be reading the file since the last change
        fresh.write_text(re.sub(rf"^{name}=\d+", f"{name}={seconds}", self._config.read_text(), flags=re.M))
        os.replace(fresh, self._config)
        self.run("scontrol", "reconfigure")

    def sbatch(self, *words: str | Path, **environment: str) -> str:
        """Submits; the job's number."""
        return self.run("sbatch", "--parsable", *words, **environment).split()[-1]

    def facts(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job: JobState, Restarts, ExitCode, NodeList, ExcNodeList ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def until(self, what: Callable[[], Any], timeout: float = 120, story: Callable[[], str] = str) -> Any:
        """What the function returns as soon as that is true; fails with the story after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not (found := what()):
            assert time.monotonic() < end, f"not in {timeout} s: {story()}"
            time.sleep(0.1)
        return found

    def ended(self, job: str, log: Path | None = None, timeout: float = 400) -> str:
        """Waits for the end of a job; its state."""

        def story() -> str:
            return f"{self.facts(job)}\n{log.read_text()[-5000:] if log and log.exists() else ''}"

        def state() -> str:
            found = self.run("squeue", "-h", "-t", "all", "-o", "%T", "-j", job).split()
            return found[0] if set(found) <= set(ENDED) else ""

        return str(self.until(state, timeout, story))

    def clean(self) -> None:
        """No job, all nodes idle, the small disk empty."""
        for node in self._names:
            self.tell("heal", node)
        self.run("scancel", "--user=root")
        self.run("find", self.small_disk, "-mindepth", "1", "-delete")

        def idle() -> bool:
            self.run("sh", "-c", "scontrol update nodename=ALL state=resume", status=None)
            found = self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split()
            return sorted(found) == self._names

        self.until(idle, 300, lambda: self.run("sinfo", "-N", "-o", "%N %T %E"))


def why_not() -> str:
    """Why no cluster can be started here; "" where it can."""
    if missing := [name for name in NEEDED if shutil.which(name, path=PATH) is None]:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge iproute2"
    if os.geteuid() != 0:
        return "only root may make namespaces"
    trial = subprocess.run(["unshare", "--mount", "--pid", "--net", "--uts", "--fork", "true"], capture_output=True, text=True)
    return trial.stderr.strip() if trial.returncode else ""


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Cluster]]:
    """clusters(3) starts a cluster of three nodes."""
    if reason := why_not():
        if os.environ.get("IGPT_DS_REQUIRE_SLURM"):
            pytest.fail(f"IGPT_DS_REQUIRE_SLURM is set, but no SLURM can be started: {reason}")
        pytest.skip(f"no SLURM can be started: {reason}")
    started: list[Cluster] = []

    def start(nodes: int) -> Cluster:
        started.append(Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes))
        return started[-1]

    yield start
    for cluster in started:
        cluster.close()


@pytest.fixture(scope="session")
def running_cluster(clusters: Callable[[int], Cluster]) -> Cluster:
    """The cluster of all tests but those of spare nodes."""
    return clusters(2)


@pytest.fixture
def short_kill_wait(slurm: Cluster) -> Iterator[None]:
    """Ranks that hang because a node is gone are killed soon, for tests where nothing else is to be saved in that time."""
    slurm.set_timer("KillWait", 5)
    yield
    slurm.set_timer("KillWait", 60)


@pytest.fixture
def slow_to_notice(slurm: Cluster) -> Iterator[None]:
    """A dead node is down after 5 minutes, as SLURM has it by default."""
    slurm.set_timer("SlurmdTimeout", 300)
    yield
    slurm.set_timer("SlurmdTimeout", 10)


@pytest.fixture
def slurm(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, and after the test nothing left of it."""
    yield running_cluster
    running_cluster.clean()


class Training:
    """One training under SLURM: its command, its log and what it left."""

    def __init__(self, slurm: Cluster, log: Path, flags: list[str], run_dir: Path, settings: Path, name: str) -> None:
        self.slurm, self.run_dir, self.log, self.job = slurm, run_dir, log, ""
        self._flags, self._settings, self._name = [*flags, f"--run_dir={run_dir}"], settings, name

    def submit(self, *flags: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """sbatch with its options, the script, and the program's flags; the job's number."""
        words = ["--gpus-per-node=1", "--nodes=2", "--time=60", f"--output={self.log}", *options, f"slurm/{self._name}.sbatch"]
        environment = {"IGPT_DS_CLUSTER": str(self._settings)} | environment
        self.job = self.slurm.sbatch(*words, *self._flags, *flags, **environment)
        return self.job

    def submit_by_script(self, *options: str, **environment: str) -> str:
        """slurm/submit.sh with sbatch's options; the job's number."""
        words = ["bash", "slurm/submit.sh", f"--output={self.log}", *options, self._name, *self._flags]
        self.job = self.slurm.run(*words, IGPT_DS_CLUSTER=str(self._settings), **environment).split()[-1]
        return self.job

    def text(self) -> str:
        """The job's log."""
        return self.log.read_text() if self.log.exists() else ""

    def said(self, words: str, times: int = 1, timeout: float = 240) -> None:
        """Waits until the log holds the words."""
        self.slurm.until(lambda: self.text().count(words) >= times, timeout, lambda: f"{words!r} in\n{self.text()[-5000:]}")

    def ended(self, timeout: float = 400) -> str:
        """Waits for the job's end; its state."""
        return self.slurm.ended(self.job, self.log, timeout)

    def curves(self) -> list[dict[str, Any]]:
        """See `learned`."""
        return learned(self.run_dir)

    def is_preempted(self) -> None:
        """A more urgent job takes all nodes, while we still have steps to go; returns when it has ended."""
        first = self.rank(0)
        first.suspend()  # or the few steps that are left would be over before SLURM preempts
        urgent = self.slurm.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        self.said("USR1: every rank is told to save and stop")
        first.resume()
        assert self.slurm.ended(urgent) == "COMPLETED"

    def usr1_before_its_ranks(self) -> None:
        """Sends USR1 to the batch script as soon as the script has taken the run, a moment before the ranks start."""
        owner = self.run_dir / "owner"
        self.slurm.until(lambda: owner.exists() and owner.read_text().startswith(f"{self.job}."), 240, self.text)
        self.slurm.run("scancel", "--batch", "--signal=USR1", self.job)

    def suffers(self, fault: str) -> None:
        """Notes a fault and its time, for tools/bench/restart.py."""
        append_row(self.run_dir / "faults.jsonl", {"what": fault, "time": time.time()})

    def steps(self) -> int:
        """The last step in train.jsonl."""
        path = self.run_dir / "train.jsonl"
        return max((row["step"] for row in read_json_lines(path)), default=0) if path.exists() else 0

    def reaches(self, step: int, timeout: float = 240) -> None:
        """Waits until that many steps are in train.jsonl."""
        self.slurm.until(lambda: self.steps() >= step, timeout, lambda: self.text()[-5000:])

    def rank(self, number: int) -> psutil.Process:
        """A running rank's process."""

        def found() -> psutil.Process | None:
            for process in psutil.process_iter():
                try:
                    ours = f"--run_dir={self.run_dir}" in process.cmdline() and process.environ().get("RANK") == str(number)
                    if ours and process.name().startswith("python"):
                        return process
                except psutil.Error:
                    continue  # it has gone
            return None

        return self.slurm.until(found)

    def starts(self) -> list[dict[str, Any]]:
        """What restarts.jsonl tells of each start."""
        return [row for row in read_json_lines(self.run_dir / "restarts.jsonl") if row["event"] == "start"]

    def ends(self) -> list[dict[str, Any]]:
        """What restarts.jsonl tells of each end; the next start writes that of one that SLURM ended."""
        return [row for row in read_json_lines(self.run_dir / "restarts.jsonl") if row["event"] == "end"]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of cluster-specific values that a user would have copied and changed."""
    path = tmp_path_factory.mktemp("settings") / "cluster.sh"
    values = "PARTITION=main CPU_PARTITION=main NODES=2 GPUS_PER_NODE=1 PARTS=3 CPUS=2 TIME=30 MAX_FRUITLESS=2"
    path.write_text(f"{values} LOGS={path.parent}/logs PREFLIGHT=${{PREFLIGHT:-0}}\n")
    return path


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ds_config that shards every parameter over all ranks."""
    path = tmp_path_factory.mktemp("ds_config") / "sharded.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 500}
    path.write_text(json.dumps({"zero_optimization": zero}))
    return path


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path, tiny_config: ModelConfig, sharded: Path) -> list[str]:
    """train.py's flags: some steps on the tiny dataset."""
    folder = tmp_path_factory.mktemp("common")
    recipe = Recipe("tiny", tiny_config, batch_images=12, steps=STEPS, lr=0.01, warmup_steps=3, augment_pad=1)
    (folder / "recipe.json").write_text(json.dumps(recipe_to_dict(recipe)))
    flags = [f"--config={folder}/recipe.json", f"--data={tiny_dataset}", f"--ds_config={sharded}"]
    return [*flags, "--log_every=1", "--val_every=10", "--save_every=10"]


def learned(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of train.jsonl, of each what was learned and not what a clock measured."""
    names = ("step", "images_seen", "loss", "val_loss", "val_accuracy", "lr", "grad_norm", "skipped_steps")
    return [{name: row[name] for name in names if name in row} for row in read_json_lines(run_dir / "train.jsonl")]


@pytest.fixture(scope="session")
def alone() -> Callable[..., None]:
    """alone(2, "train.py", ...) runs a program on so many ranks, without SLURM, to its end."""

    def run(ranks: int, *words: str) -> None:
        command = ["deepspeed", f"--num_gpus={ranks}", f"--master_port={launcher.free_port()}", *words]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return run


@pytest.fixture(scope="session")
def undisturbed(common: list[str], alone: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The curves of the same training on one machine, without SLURM."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    alone(2, "train.py", *common, f"--run_dir={run_dir}")
    return learned(run_dir)


@pytest.fixture
def training(slurm: Cluster, common: list[str], settings: Path, tmp_path: Path) -> Callable[..., Training]:
    """training() -> a Training that writes to tmp_path/run, or to `run_dir`; of another script with its flags where named."""

    def made(run_dir: Path | None = None, name: str = "pretrain", flags: list[str] = common, log: str = "log") -> Training:
        return Training(slurm, tmp_path / log, flags, run_dir or tmp_path / "run", settings, name)

    return made


@pytest.fixture
def curves() -> Callable[[Path], list[dict[str, Any]]]:
    """See `learned`."""
    return learned
