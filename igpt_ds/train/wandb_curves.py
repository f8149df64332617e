"""The curves of a run in Weights and Biases. In: rows of train.jsonl. Out: runs there. Called by metrics.py, on rank 0.

The service takes no step twice: of repeated rows it keeps the first. So a resume or a rollback that drops rows of train.jsonl
opens another run there, in the same group, and sends it the rows that are left. RUN_DIR/wandb_id names the newest run. Without
the file its name is the hash of the run directory. A start that drops nothing continues the run.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igpt_ds.config import recipe_to_dict
from igpt_ds.ds_config import Run
from igpt_ds.files import atomic_file
from igpt_ds.json_files import read_json_lines

Value = float | int | None
HIDDEN = ("step", "images_seen", "time")  # columns that are axes, and no curves


def curves_of(row: Mapping[str, Value]) -> dict[str, Value]:
    """The values of a row by the names of their curves: "train/loss", "val/val_loss"."""
    group = "val" if "val_loss" in row else "train"
    return {f"{group}/{name}": value for name, value in row.items() if name not in HIDDEN}


class WandbCurves:
    """The curves of one run directory.

    Args:
        dropped: whether rows of train.jsonl were dropped since the last start.
    """

    def __init__(self, project: str, run_dir: Path, run: Run, dropped: bool) -> None:
        self._project, self._run_dir, self._config = project, run_dir, recipe_to_dict(run.recipe)
        self._run = self._branch() if dropped else self._init(self._id())

    def log(self, curves: Mapping[str, Value], step: int, images_seen: int) -> None:
        """Sends the values of a step."""
        self._run.log({**curves, "images_seen": images_seen}, step=step)

    def branch(self) -> None:
        """Opens another run with the rows of train.jsonl, because a rollback dropped some."""
        self._run.finish()
        self._run = self._branch()

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()

    def _branch(self) -> Any:
        name = uuid.uuid4().hex[:16]
        with atomic_file(self._run_dir / "wandb_id", "w") as file:
            file.write(f"{name}\n")
        run = self._init(name)
        for row in read_json_lines(self._run_dir / "train.jsonl"):
            run.log({**curves_of(row), "images_seen": row.get("images_seen")}, step=row["step"])
        return run

    def _id(self) -> str:
        path = self._run_dir / "wandb_id"
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
        return hashlib.sha256(os.fsencode(self._run_dir.resolve())).hexdigest()[:16]

    def _init(self, name: str) -> Any:
        import wandb

        about = {"name": self._run_dir.name, "group": self._run_dir.name, "dir": str(self._run_dir), "config": self._config}
        return wandb.init(project=self._project, id=name, resume="allow", **about)
