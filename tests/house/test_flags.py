"""The command line is frozen, and every command that a text shows works with it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from doc_commands import TEXTS, Call, calls, commands, subcommand

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.s*")), *sorted((ROOT / "tools").glob("*.sh")), ROOT / ".ci" / "run"]
# What else may stand in a text's command: its first word is not ours to check.
FOREIGN = {
    "git",
    "cd",
    "tar",
    "export",
    "source",
    "squeue",
    "scancel",
    "pip",
    "tensorboard",
    "ls",
    "mkdir",
    "cp",
    "touch",
    "xdg-open",
}
STARTERS = {"python", "python3", ".venv/bin/python", "deepspeed", "torchrun", "mpirun", "srun", "sbatch", "exec"}


def test_flags_are_the_frozen_ones(flags):
    text = re.sub(r"^#.*\n", "", (ROOT / "tests" / "house" / "flags.txt").read_text(), flags=re.MULTILINE)
    blocks = [block.splitlines() for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if block]
    frozen = {program: {flag.strip() for flag in listed} for program, *listed in blocks}
    assert flags == frozen, "changed on purpose? python tests/house/fresh.py --flags > tests/house/flags.txt"


def check_command(command: str, flags: dict[str, set[str]]) -> None:
    """Fails when a command of the text names a target, a file or a flag that does not exist."""
    for part in re.split(r"\s(?:&&|\|\||[|;&]|--)(?:\s|$)", command):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if not words or words[0] in FOREIGN:
            continue
        if words[0].startswith("--"):  # flags of train.py after the " -- " of tools/paper_plan.py and its scripts
            unknown = {word.split("=")[0] for word in words if word.startswith("--")} - flags["train.py"]
            assert not unknown, f"train.py has no {', '.join(unknown)}: {command}"
        elif words[0] == "make":
            targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            unknown = [word for word in words[1:] if "=" not in word and word not in targets]
            assert not unknown, f"make has no target {unknown}: {command}"
        elif words[0] == "bash" or words[0].startswith(".ci/"):
            script = words[words[0] == "bash"]
            assert (ROOT / script).is_file(), f"{script} does not exist: {command}"
        else:
            assert words[0] in STARTERS, f"{words[0]}: what is that? {command}"
            check_arguments(words, flags, command)


def check_arguments(words: list[str], flags: dict[str, set[str]], command: str) -> None:
    """The program among the words exists, and has every flag that follows it."""
    for place, word in enumerate(words[1:], start=1):
        program = f"-m {subcommand(words[place + 1 :])}" if word == "-m" else word
        if program in flags or word.endswith((".py", ".sbatch")):
            break
    else:
        pytest.fail(f"starts no program of ours: {command}")
    if word.endswith(".sbatch"):
        assert (ROOT / word).is_file(), f"{word} does not exist: {command}"
        program = "train.py"
    assert program in flags, f"{program} does not exist: {command}"
    unknown = {word.split("=")[0] for word in words[place:] if word.startswith("--")} - flags[program] - {"--help"}
    assert not unknown, f"{program} has no {', '.join(unknown)}: {command}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_texts_exist(path, flags):
    for command in commands(path.read_text()):
        check_command(command, flags)


def test_programs_take_the_arguments_that_texts_show(fresh, shown_calls: list[Call]):
    assert len(shown_calls) > 80
    assert {name for name, _ in shown_calls} <= set(fresh["programs"])
    wrong = [f"{name} {error}" for name, report in fresh["programs"].items() for error in report["wrong_calls"]]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("A=1 deepspeed --num_gpus 2 train.py --lr 1 > out", [("train.py", ["--lr", "1"])]),
        (
            "make paper SCALE=own DATA=D OUT=O ARGS='-- --lr 1'",
            [("tools/paper_plan.py", ["--scale", "own", "--data", "D", "--out", "O"])],
        ),
        ("bash slurm/submit.sh --time=1 --nodes=2 probe --out r", [("tools/linear_probe.py", ["--out", "r"])]),
        ("bash slurm/submit.sh tool tools/tables.py --paper 1", [("tools/tables.py", ["--paper", "1"])]),
        ("sbatch -n 2 slurm/finetune.sbatch --lr 1", [("finetune.py", ["--lr", "1"])]),
        ("make check && python -m igpt_ds.plan --gpus 8 | head", [("-m igpt_ds.plan", ["--gpus", "8"])]),
    ],
)
def test_calls_of_a_command(command, found):
    assert calls(command)[:1] == found


def test_example_commands_of_programs_exist(fresh, flags):
    for name, report in fresh["programs"].items():
        text = report["help"].replace("\\\n", " ")
        examples = re.findall(r"^ *((?:python|deepspeed|torchrun|srun) (?:\S+ )*?\S+\.py .*)$", text, flags=re.MULTILINE)
        assert examples or name.startswith("-m "), f"{name} --help shows no example"
        for example in examples:
            check_command(example, flags)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_parse_and_call_programs_with_flags_they_have(path, flags):
    parsed = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    text = re.sub(r"^\s*#.*$", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in text.splitlines():
        for program, known in flags.items():
            _, called, arguments = line.partition(f"{program} ")
            unknown = {flag for flag in re.findall(r"--[\w-]+", arguments) if called} - known
            assert not unknown, f"{path}: {program} has no {', '.join(unknown)}"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("make dmeo", "no target"),
        ("python tools/nothing.py", "does not exist"),
        ("python tools/make_shards.py --sauce x", "has no --sauce"),
        ("OMP_NUM_THREADS=1 deepspeed --num_gpus 2 train.py --leraning_rate 1", "has no --leraning_rate"),
        ("sbatch slurm/none.sbatch", "does not exist"),
        ("frobnicate", "what is that"),
        ("python", "starts no program"),
    ],
)
def test_a_wrong_command_is_noticed(command, complaint, flags):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=complaint):
        check_command(command, flags)
