"""The commands that README.md, docs/ and the folders' READMEs show, as calls of our programs. Read by the house tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = [path for path in sorted(ROOT.rglob("*.md")) if not {".venv", "runs", "site"} & set(path.relative_to(ROOT).parts)]
# The programs that slurm/submit.sh starts by the name of a job. The job `tool` is given its program.
JOBS = {
    "pretrain": "train.py",
    "finetune": "finetune.py",
    "sweep_lr": "tools/sweep_lr.py",
    "make_shards": "tools/make_shards.py",
    "extract_features": "tools/extract_features.py",
    "probe": "tools/linear_probe.py",
}
Call = tuple[str, list[str]]  # "tools/tables.py" or "-m igpt_ds.plan", and its arguments


def commands(text: str) -> list[str]:
    """The commands of the ```bash blocks, continuation lines joined, comments left out; and those in the cells of tables."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    cells = re.findall(r"`((?:python tools/|deepspeed )[^`]+)`", "\n".join(re.findall(r"^\|.*\|$", text, flags=re.MULTILINE)))
    return [*(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")), *cells]


def calls(command: str) -> list[Call]:
    """The programs of ours that a line starts, in its order; what follows ` -- ` is a call of its own."""
    words, found = shlex.split(command, comments=True), []
    while words:
        cut = next((place for place, word in enumerate(words) if word in ("&&", "||", "|", ";", "&")), len(words))
        found += _of_one(words[:cut])
        words = words[cut + 1 :]
    return found


def subcommand(words: list[str]) -> str:
    """The module that answers `python -m` with these words: `igpt_ds.plan goodput` has one of its own."""
    return "igpt_ds.plan.goodput_command" if words[:2] == ["igpt_ds.plan", "goodput"] else words[0]


def _of_one(words: list[str]) -> list[Call]:
    words = words[: words.index(">")] if ">" in words else words
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words[:2] == ["make", "paper"]:
        given = dict(word.split("=", 1) for word in words[2:])
        data = [given["DATA"]] if "DATA" in given else []
        return _paper([given.get("SCALE", "tiny"), given.get("OUT", "OUT"), *data, *shlex.split(given.get("ARGS", ""))])
    if words[:1] == ["bash"] and words[1] in ("tools/paper.sh", "slurm/story_paper.sh"):
        return _paper(words[2:])
    if words[:2] == ["bash", "slurm/submit.sh"]:
        words = words[2:]
        while words[0].startswith("--"):
            words = words[1:]
        return _split(words[1] if words[0] == "tool" else JOBS[words[0]], words[2 if words[0] == "tool" else 1 :])
    for place, word in enumerate(words):
        if word == "-m" and words[place + 1].startswith("igpt_ds"):
            program = subcommand(words[place + 1 :])
            return _split(f"-m {program}", words[place + 2 + (program != words[place + 1]) :])
        if word.endswith(".sbatch"):
            return _split(JOBS[Path(word).stem], words[place + 1 :])
        if word.endswith(".py") and not word.startswith("tests/"):
            return _split(word, words[place + 1 :])
    return []


def _paper(words: list[str]) -> list[Call]:
    """The call of tools/paper_plan.py that the scripts make of SCALE OUT [DATA] [FLAG ...] [-- FLAG OF TRAIN ...]."""
    scale, out, *rest = words
    data = ["--data", rest.pop(0)] if rest and not rest[0].startswith("-") else []
    return _split("tools/paper_plan.py", ["--scale", scale, *data, "--out", out, *rest])


def _split(program: str, words: list[str]) -> list[Call]:
    """The call, and the training command or its flags after ` -- `, which the program completes by its own --run_dir."""
    if "--" not in words:
        return [(program, words)]
    cut = words.index("--")
    after = words[cut + 1 :]
    inner = [("train.py", after)] if after and after[0].startswith("--") else _of_one(after)
    kept = words if program == "tools/sweep_lr.py" else words[:cut]
    return [(program, kept), *((name, [*given, "--run_dir", "RUN_DIR"]) for name, given in inner)]
