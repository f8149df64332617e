"""Every flag that a script or text of slurm/ passes to a program of ours exists; every variable of a cluster is read."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted(SLURM.glob("*.s*"))
# What scripts pass to programs that are not ours.
FOREIGN = {
    "srun": {"ntasks", "ntasks-per-node", "nodes", "nodelist", "cpu-bind", "kill-on-bad-exit", "wait", "overcommit", "overlap"}
    | {"cpus-per-task"},
    "sbatch": {"partition", "nodes", "gpus-per-node", "cpus-per-task", "time", "account", "output", "array", "dependency"}
    | {"kill-on-invalid-dep", "parsable", "job-name", "ntasks", "ntasks-per-node", "exclusive", "mem", "signal", "requeue"}
    | {"no-kill", "open-mode", "qos", "constraint", "sbatch_option"},
    "deepspeed": {"no_ssh", "log_level", "hostfile", "node_rank", "master_addr", "master_port", "num_gpus"},
}


def program(name: str, words: list[str]) -> tuple[str, list[str]]:
    """The program that NAME.sbatch runs, and the words that are for it."""
    text = re.sub(r"^#.*\n", "", (SLURM / f"{name}.sbatch").read_text(), flags=re.MULTILINE)
    if "sweep " in text:
        return "tools/sweep_lr.py", words[: words.index("--")]
    found = re.search(r'(?:launch|one_task) "?([\w./$@]+)', text)
    assert found, f"{name}.sbatch runs nothing"
    return (words[0], words[1:]) if found[1] == "$@" else (found[1], words)


def submissions() -> list[tuple[str, str, list[str]]]:
    """(where, script's name, words for it) of each command in a text or a comment."""
    found = []
    for path in [*SCRIPTS, SLURM / "README.md", SLURM.parent / "docs" / "cluster.md"]:
        for line in path.read_text().replace("\\\n", " ").splitlines():
            command = re.search(
                r"bash slurm/submit\.sh ((?:--\S+ )*)([a-z_]+) (.*)|sbatch (?:--\S+ )*slurm/()([a-z_]+)\.sbatch (.*)", line
            )
            if command and "..." not in line and "[" not in line and "$(" not in line:
                name, rest = [group for group in command.groups() if group is not None][1:3]
                found.append((path.name, name, shlex.split(rest.split("`")[0].split("; ")[0], comments=True)))
    return found


def test_commands_pass_flags_that_exist(flags: dict[str, set[str]]) -> None:
    commands = submissions()
    assert {"pretrain", "finetune", "sweep_lr", "make_shards", "extract_features", "probe", "tool"} <= {
        name for _, name, _ in commands
    }
    for where, name, words in commands:
        called, mine = program(name, words)
        if called == "finetune.py" and called not in flags:
            continue  # the script came before the program
        unknown = {word.split("=")[0] for word in mine if word.startswith("--")} - flags[called]
        assert not unknown, f"{where}: {called} has no {', '.join(unknown)}"
        if name == "sweep_lr":
            unknown = {word for word in words[words.index("--") + 1 :] if word.startswith("--")} - flags["train.py"]
            assert not unknown, f"{where}: train.py has no {', '.join(unknown)}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_know_no_other_flag(path: Path, flags: dict[str, set[str]]) -> None:
    code = re.sub(r"(^|\s)# .*$", "", path.read_text(), flags=re.MULTILINE)
    known = {f"--{name}" for names in FOREIGN.values() for name in names} | set().union(*flags.values())
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", code)) <= known


def test_flags_that_scripts_add_are_those_of_the_program(flags: dict[str, set[str]]) -> None:
    added = {
        "launch.sh": {
            "train.py": {"--run_dir", "--data", "--resume", "--stop_at_step"},
            "tools/sweep_lr.py": {"--out", "--array_index"},
        },
        "submit.sh": {"tools/make_shards.py": {"--stage"}},
        "one_task.sh": {"tools/make_shards.py": {"--part"}},
    }
    for name, programs in added.items():
        for called, names in programs.items():
            assert names <= flags[called]
            assert all(flag in (SLURM / name).read_text() for flag in names)


def test_every_value_of_the_cluster_is_read_somewhere() -> None:
    names = re.findall(r"^([A-Z_]+)=", (SLURM / "cluster.example.sh").read_text(), flags=re.MULTILINE)
    code = "".join(path.read_text() for path in SCRIPTS if path.name != "cluster.example.sh")
    assert len(names) > 10
    assert [name for name in names if not re.search(rf"\$\{{?{name}\b", code)] == []


@pytest.mark.parametrize(("spare", "status"), [("1", 0), ("0", 2)])
def test_the_paper_is_planned_without_the_spare_nodes(spare: str, status: int, tmp_path: Path) -> None:
    """A batch of 128 images divides over 64 GPUs, and not over 72."""
    command = ["bash", "slurm/story_paper.sh", "own", str(tmp_path / "out"), "digits:", "--", "--recipe", "igpt_s_ar_32"]
    nodes = {"NODES": "9", "SPARE_NODES": spare, "GPUS_PER_NODE": "8"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=SLURM.parent, env=os.environ | nodes)
    assert done.returncode == status, done.stderr
    assert ("does not divide over 72" in done.stderr) == (status == 2)


@pytest.mark.parametrize("what", ["new", "link", "open", "set"])
def test_compiled_files_go_to_a_directory_of_this_user_alone(tmp_path: Path, what: str) -> None:
    mine = tmp_path / f"{os.getuid()}-triton"
    if what == "link":
        mine.symlink_to("/")
    elif what == "open":
        mine.mkdir()
        mine.chmod(0o777)
    before = "TRITON_CACHE_DIR=/set" if what == "set" else "unset TRITON_CACHE_DIR"
    command = f'{before}; source slurm/caches.sh; echo "$TRITON_CACHE_DIR"'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=SLURM.parent, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    chosen = Path(done.stdout.strip())
    if what == "set":
        assert chosen == Path("/set")
    else:
        assert (chosen == mine) == (what == "new")
        assert stat.S_IMODE(chosen.stat().st_mode) == 0o700
        assert (str(mine) in done.stderr) == (what != "new")
