"""The tests' cluster is what it says: nodes of their own, failures that SLURM notices, nothing left when its test dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_each_node_has_its_name_and_network(slurm: Any) -> None:
    said = slurm.run("srun", "-N2", "-n2", "-l", "sh", "-c", "hostname; hostname -I").splitlines()
    assert sorted(line.strip() for line in said) == ["0: 10.83.0.11", "0: node1", "1: 10.83.0.12", "1: node2"]


def test_a_node_without_current_is_down_and_comes_back(slurm: Any) -> None:
    slurm.tell("power", "node2")
    slurm.until(lambda: "node2" in slurm.run("sinfo", "-h", "-N", "-t", "down", "-o", "%N"), timeout=120)
    slurm.tell("heal", "node2")
    slurm.until(lambda: "node2" in slurm.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N"), timeout=120)


def test_the_cluster_ends_with_whoever_started_it(running_cluster: Any, tmp_path: Path) -> None:
    """Its daemons are the only processes whose command line or environment lies in its directory."""
    program = str(Path(__file__).with_name("cluster.py"))
    parent = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], stdin=sys.stdin)"
    command = [sys.executable, "-c", parent, program, str(tmp_path / "cluster"), "--nodes", "1"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdin is not None
    inside = psutil.Process(int(holder.stdout.readline().split()[1]))
    everything = [inside, *inside.children(recursive=True)]
    assert {"slurmctld", "slurmd", "munged"} <= {process.name() for process in everything}
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    _, alive = psutil.wait_procs(everything, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("1", "1 error")])
def test_without_rights_it_is_skipped_or_fails_and_says_why(
    running_cluster: Any, required: str, outcome: str, tmp_path: Path
) -> None:
    here = f"{__file__}::{test_each_node_has_its_name_and_network.__name__}"
    pytest_again = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/again", here]
    command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *pytest_again]
    done = subprocess.run(
        command, env=os.environ | {"IGPT_DS_REQUIRE_SLURM": required}, capture_output=True, text=True, timeout=240
    )
    assert outcome in done.stdout, done.stdout + done.stderr
    assert "no SLURM can be started: unshare: unshare failed: Operation not permitted" in done.stdout
