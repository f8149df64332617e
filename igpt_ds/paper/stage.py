"""One command of the paper's experiments: its words, the batch script that runs it, and whether its output exists.

In: a program and its flags. Out: a `Stage`. stages.py makes them, tools/paper_plan.py prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.errors import InputError

Value = object  # True: a flag without a value; None or False: the flag is left out; a sequence: several values
Flags = dict[str, Value]
# The batch script in slurm/ of each program; all other programs run as tools.
JOBS = {
    "train.py": "pretrain",
    "finetune.py": "finetune",
    "tools/make_shards.py": "make_shards",
    "tools/extract_features.py": "extract_features",
    "tools/linear_probe.py": "probe",
}
GPU_TOOLS = ("tools/evaluate.py", "tools/sgd_probe.py", "tools/sample.py")  # one process each, on a GPU


@dataclass(frozen=True)
class Stage:
    """One command. Paths are relative to the repository root, where commands run."""

    name: str
    words: tuple[str, ...]  # the program, then its flags
    leaves: Path  # a file or a directory
    rows: int = 0  # rows that a complete results file has
    printed: bool = False  # the output file holds what the command prints
    needs: tuple[str, ...] = ()  # names of stages

    @property
    def job(self) -> str:
        """The batch script's name, "tool", or "gpu_tool"."""
        return JOBS.get(self.words[0], "gpu_tool" if self.words[0] in GPU_TOOLS else "tool")

    @property
    def done(self) -> bool:
        """Whether its output exists and is complete."""
        if self.job in ("pretrain", "finetune"):
            return (self.leaves / "FINISHED").exists()
        return self.leaves.exists() and (not self.rows or self.leaves.read_bytes().count(b"\n") >= self.rows)


SEPARATOR = "\x1f"  # ASCII's unit separator, which no path or flag contains


def command_line(stage: Stage, needs: Sequence[str], purpose: str) -> str:
    """One line for a script: name, batch script, needed stages, file for the printed output, purpose, the words of the command.

    A script splits the line at SEPARATOR. No shell interprets what a path says.

    Raises:
        ValueError: a path or flag contains a line break or the separator.
    """
    fields = (stage.name, stage.job, ",".join(needs), str(stage.leaves) if stage.printed else "", purpose, *stage.words)
    for field in fields:
        if SEPARATOR in field or len(field.splitlines()) > 1:
            raise InputError(f"{field!r} contains a line break or a control character; rename the file or directory")
    return SEPARATOR.join(fields)


def words(program: str, flags: Flags, *first: object) -> tuple[str, ...]:
    """The words of a command; those in `first` precede the flags."""
    found = [program, *map(str, first)]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = () if value is True else value if isinstance(value, (tuple, list)) else (value,)
        texts = [f"{one:g}" if isinstance(one, float) else str(one) for one in values]
        found += [f"--{name}={texts[0]}"] if len(texts) == 1 and texts[0].startswith("-") else [f"--{name}", *texts]
    return tuple(found)
