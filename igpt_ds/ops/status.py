"""How a run is doing, from its directory alone: files enter, numbers and a few lines of text leave.

Called by tools/status.py and `diagnose.py`. The run may be writing at the same moment, on other machines. Neither torch nor numpy
is needed, so that looking costs nothing; of a long train.jsonl the end alone is read.
"""

from __future__ import annotations

import json
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from igpt_ds.files import read_json, read_json_lines
from igpt_ds.train.checkpoint.manifest import list_checkpoints
from igpt_ds.train.run_dir import read_run
from igpt_ds.train.run_lock import BEGINNING, ENDED

TAIL_BYTES = 1 << 18  # of train.jsonl: a thousand rows
SPEED_ROWS = 10  # whose median is the speed
SILENT_SECONDS = 60.0  # a rank writes its heartbeat every ten: six of them missing
HANG_SECONDS, HANG_STEPS = 120.0, 20  # a live process that takes as long for a step, and so many times what the last one took
MOST_RANKS = 8  # shown one by one


def read_status(run_dir: Path, now: float) -> dict[str, Any]:
    """Everything that is known of a run at a time, in seconds since 1970; JSON-ready.

    Raises:
        ValueError: no run directory.
    """
    if not (run_dir / "run.json").exists():
        what = "is no run directory: it has no run.json" if run_dir.is_dir() else "does not exist"
        raise ValueError(f"{run_dir} {what}; name the --run_dir of train.py, once training has begun")
    run = read_run(run_dir)
    recipe, rows = run["recipe"], tail_rows(run_dir / "train.jsonl")
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "val_loss" in row]
    last: dict[str, Any] = training[-1] if training else {}
    ranks = read_heartbeats(run_dir, run["world_size"], now)
    speed = statistics.median(row["images_per_s"] for row in training[-SPEED_ROWS:]) if training else None
    step = max((row["step"] for row in rows), default=0)
    left = (recipe["steps"] - step) * recipe["batch_images"] / speed if speed else None
    state, why = state_of(run_dir, ranks), None
    if state in ("lost", "failed"):
        left, why = None, _reason(state, read_lost(run_dir), ranks)
    return {
        "run_dir": str(run_dir),
        "recipe": recipe["name"],
        "state": state,
        "why": why,
        "step": step,
        "steps": recipe["steps"],
        "images_seen": step * recipe["batch_images"],
        "loss": last.get("loss"),
        "val_loss": validation[-1]["val_loss"] if validation else None,
        "val_step": validation[-1]["step"] if validation else None,
        "images_per_s": speed,
        "mfu": last.get("mfu"),
        "data_wait": last.get("data_wait"),
        "skipped_steps": last.get("skipped_steps"),
        "seconds_left": left,
        "checkpoint": _newest_checkpoint(run_dir / "checkpoints", now),
        "restarts": _count_restarts(run_dir),
        "rollbacks": _count_rollbacks(run_dir / "rollbacks.json"),
        "slowest": _slowest(last, ranks),
        "world_size": run["world_size"],
        "ranks": ranks,
        "time": now,
    }


def tail_rows(path: Path, size: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The last rows of a .jsonl file; a half-written line at either end of what is read is left out."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        file.seek(max(0, length - size))
        lines = file.read().split(b"\n")
    rows = []
    for line in lines[1:-1] if length > size else lines[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_heartbeats(run_dir: Path, world_size: int, now: float) -> list[dict[str, Any]]:
    """What each rank said last: its heartbeat with "rank", "age" (seconds since its last sign of life) and "silent".

    A rank whose file was not written for a minute is silent, unless it ended; one without a file has "phase" None.
    """
    ranks = []
    for rank in range(world_size):
        path = run_dir / "heartbeat" / f"rank-{rank:05d}.json"
        try:
            beat = read_json(path, "heartbeat")
            ended = beat["phase"] in ENDED
            silent = not ended and now - beat.get("written", beat["time"]) > SILENT_SECONDS
            ranks.append(beat | {"rank": rank, "age": max(0.0, now - beat["time"]), "silent": silent})
        except (ValueError, KeyError, TypeError):
            ranks.append({"rank": rank, "phase": None, "step": 0, "age": None, "silent": True, "host": None, "pid": None})
    return ranks


def state_of(run_dir: Path, ranks: list[dict[str, Any]]) -> str:
    """One word: finished, stopped (saved; goes on with --resume auto), lost (to its loss), failed (each rank ended, some with an
    error), dead, hanging, stopping or running.

    A rank that gave no sign of life since the loss was lost is about to end; where one did, another start is on its way.
    "unknown": no rank ever had a heartbeat. "hanging": a rank is silent while others are not, or they have taken long for a step
    (HANG_SECONDS and HANG_STEPS), as they do when one waits for what another never sends.
    """
    if (run_dir / "FINISHED").exists():
        return "finished"
    known = [rank for rank in ranks if rank["phase"] is not None]
    lost = read_lost(run_dir)
    since = 0.0 if lost is None else lost.get("time", 0.0)
    going = [rank for rank in known if rank["phase"] not in ENDED and rank["time"] > since]
    live = [rank for rank in going if not rank["silent"]]
    if live:
        patience = max(HANG_SECONDS, HANG_STEPS * max(rank.get("step_seconds", 0.0) for rank in live))
        stuck = min(rank["age"] for rank in live) > patience and live[0]["phase"] not in BEGINNING
        if stuck or (len(live) < len(known) and any(rank["silent"] for rank in known)):
            return "hanging"
        return "stopping" if (run_dir / "STOP").exists() else "running"
    if lost is not None and not going:
        return "lost"
    if known and all(rank["phase"] in ENDED for rank in known):
        return "failed" if any(rank.get("error") for rank in known) else "stopped"
    return "dead" if known else "unknown"


def read_lost(run_dir: Path) -> dict[str, Any] | None:
    """RUN_DIR/LOST.json, what the guards said of a run that they ended: step, since, loss, lr, why, time. None: they did not.

    The next start of the run removes it.
    """
    path = run_dir / "LOST.json"
    if not path.exists():
        return None
    try:
        found = read_json(path, "report")
    except ValueError:  # removed at this moment, or torn
        return {}
    return found if isinstance(found, dict) else {}


def lost_words(lost: dict[str, Any]) -> str:
    """A LOST.json in words."""
    loss = "not finite" if lost.get("loss") is None else f"{lost['loss']:.4f}"
    return f"the loss is lost at step {lost.get('step', '?')}: it is {loss}, and {lost.get('why', 'nobody says why')}"


def _reason(state: str, lost: dict[str, Any] | None, ranks: list[dict[str, Any]]) -> str:
    if state == "lost":
        return lost_words(lost or {})
    return next(f"rank {rank['rank']}: {rank['error']}" for rank in ranks if rank.get("error"))


def _newest_checkpoint(directory: Path, now: float) -> dict[str, Any] | None:
    whole = [path for path in list_checkpoints(directory) if (path / "COMPLETE").exists()]
    if not whole:
        return None
    age = max(0.0, now - (whole[-1] / "COMPLETE").stat().st_mtime)
    return {"step": int(whole[-1].name.removeprefix("step-")), "age": age, "path": str(whole[-1])}


def _count_restarts(run_dir: Path) -> int:
    """Starts but the first: as the batch script counts them (restarts.jsonl), else by the file of curves that each one opens."""
    try:
        begun = [row for row in read_json_lines(run_dir / "restarts.jsonl") if row.get("event") == "start"]
    except ValueError:
        begun = []
    return max(0, max(len(begun), len(list((run_dir / "tensorboard").glob("events.*")))) - 1)


def _count_rollbacks(path: Path) -> int:
    try:
        found = read_json(path, "rollbacks")
    except ValueError:
        return 0
    return len(found.get("rollbacks", ())) if isinstance(found, dict) else 0


def _slowest(row: dict[str, Any], ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The rank with the most work of its own, as the last row measured it; else the one whose last step took longest."""
    if "slowest_rank" in row:
        return {"rank": row["slowest_rank"], "ratio": row["slowest_ratio"]}
    timed = {rank["rank"]: rank["step_seconds"] for rank in ranks if rank.get("step_seconds")}
    if not timed:
        return None
    slow = max(timed, key=lambda rank: timed[rank])
    return {"rank": slow, "ratio": timed[slow] / statistics.median(timed.values())}


def describe(status: dict[str, Any]) -> str:
    """A run in a few lines."""
    hosts = list(dict.fromkeys(rank["host"] for rank in status["ranks"] if rank["host"]))
    where = f" on {', '.join(hosts[:MOST_RANKS])}{' ...' if len(hosts) > MOST_RANKS else ''}" if hosts else ""
    validation = f"; validation {status['val_loss']:.4f} at step {status['val_step']:,}" if status["val_loss"] is not None else ""
    saved = status["checkpoint"]
    counts = f"{status['restarts']} restarts, {status['rollbacks']} rollbacks, {status['skipped_steps'] or 0} steps skipped"
    newest = f"step {saved['step']:,}, {duration(saved['age'])} old" if saved else "none yet"
    slow = status["slowest"]
    slowest = f"rank {slow['rank']}, {slow['ratio']:.2f} times the median" if slow else "-"
    return "\n".join(
        (
            f"{status['run_dir']}: {status['state']}, {status['recipe']} on {status['world_size']} ranks{where}",
            f"  step        {status['step']:,} of {status['steps']:,} ({100 * status['step'] / status['steps']:.1f} %), "
            f"{status['images_seen']:,} images",
            f"  loss        {_number(status['loss'], '{:.4f} nats/token')}{validation}",
            f"  speed       {_number(status['images_per_s'], '{:.1f} images/s')}, MFU {_number(status['mfu'], '{:.1%}')}, "
            f"waiting for data {_number(status['data_wait'], '{:.1%}')}",
            f"  end         {_end(status)}",
            f"  checkpoint  {newest}; {counts}",
            f"  slowest     {slowest}",
            f"  heartbeats  {heartbeats_line(status['ranks'])}",
        )
    )


def _number(value: float | None, text: str) -> str:
    return "-" if value is None else text.format(value)


def _end(status: dict[str, Any]) -> str:
    if status["why"]:
        return str(status["why"])
    if status["step"] >= status["steps"]:
        return "all steps are done"
    if status["seconds_left"] is None:
        return "-"
    moment = datetime.fromtimestamp(status["time"] + status["seconds_left"], timezone.utc).astimezone()
    going = "" if status["state"] in ("running", "stopping") else " if it went on now"
    return f"in {duration(status['seconds_left'])}, {moment:%Y-%m-%d %H:%M %Z}{going}"


def heartbeats_line(ranks: list[dict[str, Any]]) -> str:
    """The age of each rank's last sign of life and its phase; of many ranks, the oldest."""
    if all(rank["phase"] is None for rank in ranks):
        return "none"
    oldest = sorted(ranks, key=lambda rank: (rank["age"] is not None, -(rank["age"] or 0.0)))[:MOST_RANKS]
    shown = sorted(oldest, key=lambda rank: rank["rank"])
    words = [f"{rank['rank']}: {_beat(rank)}" for rank in shown]
    more = f" and {len(ranks) - len(shown)} younger ones" if len(ranks) > len(shown) else ""
    return ", ".join(words) + more


def _beat(rank: dict[str, Any]) -> str:
    if rank["phase"] is None:
        return "none"
    return f"{duration(rank['age'])} ({rank['phase']} {rank['step']}{', silent' if rank['silent'] else ''})"


def duration(seconds: float) -> str:
    """Seconds in the two largest units: "45 s", "3 min 20 s", "2 h 5 min", "8 d 14 h"."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = round(seconds)
    for place, (name, size) in enumerate(units[:-1]):
        if whole >= size:
            rest, small = divmod(whole % size, units[place + 1][1])[0], units[place + 1][0]
            return f"{whole // size} {name} {rest} {small}" if rest else f"{whole // size} {name}"
    return f"{whole} s"
