"""Stops without loss. In: a signal, a file or a time limit. Out: one decision of all ranks. Called by train/loop.py.

USR1 (sent by SLURM's --signal), TERM, Ctrl-C, a file STOP in the run directory and --max_minutes have the same effect: the run
finishes the step, saves, and exits with status 85 (`cli.STOPPED`); --resume auto continues it. An interrupted validation is rerun
on resume. A save in progress is finished first. A second signal changes nothing, but a second Ctrl-C ends the process at once,
even inside a collective. A stop before the first step exits at once: nothing is trained yet, or everything is saved already.

What the launchers do with Ctrl-C, which a terminal sends to all processes of the command:
- `deepspeed` ends with a traceback of its own. Its second process sends TERM to the ranks one by one, and kills each that still
  runs after 30 seconds, which is too short to save a large model. TERM after Ctrl-C is the same stop.
- `torchrun` forwards it, kills after 30 seconds, and always exits with 1.
- `mpirun` (Open MPI 4.1) sends CONT to the ranks, TERM a second later, and kills them after another second. With
  `--mca odls_base_sigkill_timeout 300` both times are five minutes. It prints nothing meanwhile. CONT is the same stop there.
- `srun` forwards it to the ranks if it comes twice within a second.
A file STOP needs no signal, and no launcher limits its time.

Native libraries such as NCCL have threads and may install handlers of their own. Linux hands a signal of the process to its main
thread, and so to Python. A system call that the signal interrupts there is restarted, so that no library meets EINTR. Each step
installs the handlers again. No run has met NCCL yet. If a library replaces them within a step, USR1 is lost; a file STOP works.

Send USR1 to the ranks, not to their launcher: USR1 kills the `deepspeed` launcher and its ranks stay behind, unless the launcher
was started with the signal ignored (`trap '' USR1`); the ranks handle it in any case. `deepspeed` and `torchrun` treat TERM as
Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from igpt_ds import cli, dist, launcher
from igpt_ds.train.run_dir import refuse_file, this_start

REASONS = ("signal USR1", "signal TERM", "a file STOP in the run directory", "--max_minutes", "Ctrl-C")
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 1.0  # a launcher may forward a Ctrl-C that the terminal has sent as well
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
        meeting: whether this rank still waits for the others; TERM and Ctrl-C then end it with status 85.
        resume: the command that continues the run, found now because a launcher may end before its ranks.
        busy: says whether this rank writes in the background.
        idle: whether no rank was busy when the ranks last agreed.
    """

    def __init__(self, run_dir: Path, max_minutes: float | None = None) -> None:
        refuse_file(run_dir)
        self.meeting, self._listens = False, False
        self.reason, self.resume = "", launcher.resume_command()
        self.busy: Callable[[], bool] = lambda: False
        self.idle = True
        self._file = run_dir / "STOP"
        self._heard = dict.fromkeys(_SIGNALS, False)
        self._until = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._next_look, self._found = 0.0, False
        self._old = None if this_start() else _stamp(self._file)  # ops/restarts.py has looked; a later file is for us

    def listen(self) -> None:
        """Starts to handle USR1, TERM and Ctrl-C, even if the parent process ignored or blocked them."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._arm()
        if "OMPI_COMM_WORLD_RANK" in os.environ:
            signal.signal(signal.SIGCONT, lambda *_: self._hear(signal.SIGINT, None))
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._end_at_second, args=(read,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # slurm/one_node.sh blocks TERM
        self._listens = True

    def _arm(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._hear)
            signal.siginterrupt(number, False)  # restarts system calls

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGTERM or not self._heard[signal.SIGINT]:  # a launcher's TERM after Ctrl-C is no reason of its own
            self._heard[signal.Signals(number)] = True

    def _end_at_second(self, numbers: int) -> None:
        """Runs in a thread, because the main thread handles no signal while it waits for other ranks."""
        first = None
        while True:
            heard = os.read(numbers, 64)
            if signal.getsignal(signal.SIGINT) != self._hear:
                continue
            if (signal.SIGINT in heard or signal.SIGTERM in heard) and self.meeting:
                os._exit(cli.STOPPED)  # nothing is trained yet, and the others may never come
            if signal.SIGINT not in heard:
                continue
            now = time.monotonic()
            if first is None:
                first = now
                dist.say("Ctrl-C: this run saves and stops; a second Ctrl-C ends it at once, without saving")
            elif now - first > _SAME_SECONDS:
                dist.say(f"interrupted; continue with: {self.resume}")
                os._exit(128 + signal.SIGINT)

    def asked(self) -> list[bool]:
        """For each of REASONS, whether it applies to this rank."""
        now = time.monotonic()
        if dist.rank() == 0 and not self._found and now >= self._next_look:
            self._found, self._next_look = self._look(), now + _LOOK_EVERY
        user, term, ctrl_c = self._heard.values()
        return [user, term, self._found, self._until is not None and now >= self._until, ctrl_c]

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
        if self._listens:
            self._arm()  # a library may have replaced the handlers
        mine = torch.tensor([*self.asked(), self.busy()], dtype=torch.float64, device=device if loss is None else loss.device)
        values = torch.cat([mine, mine.new_zeros(1) if loss is None else loss.detach().double().reshape(1)])
        *asked, busy, total = dist.sum_over_ranks(values).tolist()
        self.idle = not busy
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
