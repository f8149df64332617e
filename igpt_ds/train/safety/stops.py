"""Stops that lose nothing: a signal, a file or a time limit enters, one decision of all ranks leaves. train/loop.py asks.

USR1 (what SLURM's --signal sends), TERM, a file STOP in the run directory and --max_minutes all mean the same: finish the step,
save, leave with status 85 (`cli.STOPPED`), and go on with --resume auto. Validation is broken off and made up for at the next
start; a save that is under way is finished first. A second signal changes nothing. A stop before the first step leaves at once:
there is nothing to save that is not saved.

Send USR1 to the ranks, not to their launcher: the `deepspeed` launcher dies of USR1 and leaves its ranks behind, unless it was
started with the signal ignored (`trap '' USR1`), which the ranks undo for themselves. TERM it hands on to its ranks one after
the other, and kills each that has not ended after 30 seconds: less than a large model takes to save. `torchrun` passes TERM on
with the same limit, and itself exits with 1 whatever its ranks exit with.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from igpt_ds import dist
from igpt_ds.train.run_dir import refuse_file, this_start

REASONS = ("signal USR1", "signal TERM", "a file STOP in the run directory", "--max_minutes")
_LOOK_EVERY = 1.0  # seconds between two looks at the file: a shared disk is asked for nothing more often


class Stop:
    """Whether this run shall end now.

    Args:
        run_dir: where rank 0 looks for a file STOP. One that lies there already was meant for the run before: it is removed,
            under SLURM by the batch script, else when the ranks first ask. By then the run directory is surely ours: a start
            that is refused leaves the file to the run that is at work there.
        max_minutes: of this process's life; None: no limit.

    Raises:
        ValueError: run_dir is a file; on every rank.

    Attributes:
        reason: why all ranks agreed to stop, one of REASONS; "" before.
    """

    def __init__(self, run_dir: Path, max_minutes: float | None = None) -> None:
        refuse_file(run_dir)
        self.reason = ""
        self._file = run_dir / "STOP"
        self._heard = [False, False]
        self._until = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._next_look, self._found = 0.0, False
        self._old = None if this_start() else _stamp(self._file)  # slurm/restarts.sh has looked; one of since then is for us

    def listen(self) -> None:
        """From now on USR1 and TERM are heard, also where whoever started us had them ignored or blocked."""
        signal.signal(signal.SIGUSR1, self._hear)
        signal.signal(signal.SIGTERM, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, signal.SIGTERM])  # slurm/one_node.sh blocks TERM

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard[number == signal.SIGTERM] = True

    def asked(self) -> list[bool]:
        """For each of REASONS, whether this rank has it."""
        now = time.monotonic()
        if dist.rank() == 0 and not self._found and now >= self._next_look:
            self._found, self._next_look = self._look(), now + _LOOK_EVERY
        return [*self._heard, self._found, self._until is not None and now >= self._until]

    def _look(self) -> bool:
        found, old, self._old = _stamp(self._file), self._old, None
        if found is not None and found == old:
            self._file.unlink(missing_ok=True)
            return False
        return found is not None

    def agree(self, loss: Tensor | None = None, device: torch.device | str = "cpu") -> float:
        """All ranks meet here: `reason` is set on all of them when any has one.

        A step brings its loss, a scalar, and gets the sum over the ranks: what the log needs anyway, so that asking costs no
        message of its own.
        """
        mine = torch.tensor(self.asked(), dtype=torch.float64, device=device if loss is None else loss.device)
        values = torch.cat([mine, mine.new_zeros(1) if loss is None else loss.detach().double().reshape(1)])
        *asked, total = dist.sum_over_ranks(values).tolist()
        self.reason = self.reason or next((reason for reason, count in zip(REASONS, asked, strict=True) if count), "")
        return float(total)

    def now(self, device: torch.device | str = "cpu") -> bool:
        """Whether all ranks have agreed to stop."""
        if not self.reason:
            self.agree(device=device)
        return bool(self.reason)


def _stamp(path: Path) -> tuple[int, int] | None:
    """By what a file is known again, also after another `touch`; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
