"""Stops without loss. In: a signal, a file or a time limit. Out: one decision of all ranks. Called by train/loop.py.

USR1 (sent by SLURM's --signal), TERM, a file STOP in the run directory and --max_minutes have the same effect: the run finishes
the step, saves, and exits with status 85 (`cli.STOPPED`); --resume auto continues it. An interrupted validation is rerun on
resume. A save in progress is finished first. A second signal changes nothing. A stop before the first step exits at once, because
everything is saved already.

Send USR1 to the ranks, not to their launcher: USR1 kills the `deepspeed` launcher and its ranks stay behind, unless the launcher
was started with the signal ignored (`trap '' USR1`); the ranks handle it in any case. The launcher forwards TERM to its ranks one
by one, and kills each that still runs after 30 seconds, which is too short to save a large model. `torchrun` forwards TERM with
the same limit, and always exits with 1.
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
_LOOK_EVERY = 1.0  # seconds between two looks at the file, to spare a shared disk


class Stop:
    """Whether this run should stop now.

    Args:
        run_dir: where rank 0 looks for a file STOP. An existing file was meant for the previous run and is removed: under SLURM
            by the batch script, otherwise when the ranks first ask. By then the run directory belongs to this start. A start that
            is refused leaves the file to the run that is active there.
        max_minutes: limit of this process's run time; None: no limit.

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
        self._old = None if this_start() else _stamp(self._file)  # ops/restarts.py has looked; a later file is for us

    def listen(self) -> None:
        """Starts to handle USR1 and TERM, even if the parent process ignored or blocked them."""
        signal.signal(signal.SIGUSR1, self._hear)
        signal.signal(signal.SIGTERM, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, signal.SIGTERM])  # slurm/one_node.sh blocks TERM

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard[number == signal.SIGTERM] = True

    def asked(self) -> list[bool]:
        """For each of REASONS, whether it applies to this rank."""
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
        """A collective: `reason` is set on all ranks if any rank has one.

        A step passes its loss, a scalar, and gets the sum over the ranks, which the log needs anyway. So the question costs no
        extra message.
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
    """What identifies a file and its last `touch`; None if there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
