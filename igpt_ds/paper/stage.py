"""One command of the paper's experiments: its words, the batch script that runs it, and whether its output exists.

In: a program and its flags. Out: a `Stage`. stages.py makes them, tools/paper_plan.py prints them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json

Value = object  # True: a flag without a value; None or False: the flag is left out; a sequence: several values
Flags = dict[str, Value]
# The batch script in slurm/ of each program; all other programs run as tools.
JOBS = {
    "train.py": "pretrain",
    "finetune.py": "finetune",
    "tools/make_shards.py": "make_shards",
    "tools/extract_features.py": "extract_features",
    "tools/linear_probe.py": "probe",
    "tools/sweep_lr.py": "sweep_lr",
}
SHOWS = ("tools/figures.py", "tools/tables.py", "tools/model_card.py", "tools/report.py")  # seconds each
GPU_TOOLS = ("tools/evaluate.py", "tools/filter_shards.py", "tools/sgd_probe.py", "tools/sample.py")  # one process each, on a GPU


@dataclass(frozen=True)
class Stage:
    """One command. Paths are relative to the repository root, where commands run."""

    name: str
    words: tuple[str, ...]  # the program, then its flags
    leaves: Path  # a file or a directory
    rows: int = 0  # rows that a complete results file has
    printed: bool = False  # the output file holds what the command prints
    needs: tuple[str, ...] = ()  # names of stages
    section: str = ""  # of the paper, with its tables and figures; "": not in the paper

    @property
    def job(self) -> str:
        """The batch script's name, "tool", or "gpu_tool"."""
        return JOBS.get(self.words[0], "gpu_tool" if self.words[0] in GPU_TOOLS else "tool")

    @property
    def done(self) -> bool:
        """Whether its output exists and is complete."""
        if self.job in ("pretrain", "finetune"):
            return (self.leaves / "FINISHED").exists()
        if self.job == "sweep_lr":
            return search_finished(self.leaves)
        return self.leaves.exists() and (not self.rows or self.leaves.read_bytes().count(b"\n") >= self.rows)


def unfinished(found: Sequence[Stage]) -> list[Stage]:
    """The stages that have to run, in their order: those that are not done, and those that show what another will change."""
    left: dict[str, Stage] = {}
    for stage in found:
        if not stage.done or (stage.words[0] in SHOWS and not left.keys().isdisjoint(stage.needs)):
            left[stage.name] = stage
    return list(left.values())


def search_finished(out: Path) -> bool:
    """Whether the search of a learning rate has its end: tools/sweep_lr.py also writes a table of some rates."""
    file = out / "sweep.json"
    return file.exists() and read_json(file, "sweep").get("finished") is True


def shown(stage: Stage) -> str:
    """The command as it can be typed; a training by the launcher of one machine."""
    program, *rest = stage.words
    if "--" in rest:
        cut = rest.index("--") + 1
        return shlex.join(["python", program, *rest[:cut], "deepspeed", *rest[cut:]])
    return shlex.join(["deepspeed" if stage.job in ("pretrain", "finetune") else "python", program, *rest])


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
