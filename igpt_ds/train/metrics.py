"""The curves of a run: train.jsonl, TensorBoard and one console line. Rank 0 writes; steps never appear twice.

A training row holds the loss of one step, in nats per token, over the whole global batch; a validation row the mean over
the validation images. `step` counts completed steps.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from igpt_ds import dist, plan
from igpt_ds.ds_config import Run
from igpt_ds.files import read_json_lines, write_json_lines
from igpt_ds.model.fused import linear
from igpt_ds.plan import GIB, train_flops_per_token


class Metrics:
    """Collects what the loop measures. On ranks other than 0 every method returns at once."""

    def __init__(self, run_dir: Path, run: Run, start_step: int, peak: float) -> None:
        """Rows after start_step, left by a run that was killed, are dropped. peak: FLOP/s of all ranks together."""
        self.run, self.peak, self.speaks = run, peak, dist.rank() == 0
        self.clock, self.clock_step = time.perf_counter(), start_step
        if not self.speaks:
            return
        path = run_dir / "train.jsonl"
        write_json_lines(path, [row for row in read_json_lines(path) if 0 < start_step >= row["step"]])
        self.rows = open(path, "a", buffering=1)  # noqa: SIM115  (closed in `close`)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self.bar = tqdm(total=run.recipe.steps, initial=start_step, unit="step", disable=None)

    def training(self, step: int, loss: float, lr: float, grad_norm: float, skipped_steps: int) -> None:
        """Logs a completed step, and the speed since the last one that was logged."""
        now, recipe = time.perf_counter(), self.run.recipe
        images_per_s = (step - self.clock_step) * recipe.batch_images / (now - self.clock)
        self.clock, self.clock_step = now, step
        if not self.speaks:
            return
        tokens_per_s = images_per_s * recipe.model.n_ctx
        mfu, memory = tokens_per_s * train_flops_per_token(recipe.model) / self.peak, memory_gib()
        row: dict[str, float | None] = {
            "step": step,
            "images_seen": step * recipe.batch_images,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "images_per_s": images_per_s,
            "tokens_per_s": tokens_per_s,
            "mfu": mfu,
            "memory_gib": memory,
            "skipped_steps": skipped_steps,
        }
        self._write(row, "train")
        self.bar.update(step - self.bar.n)
        self._say(
            f"step {step}/{recipe.steps} | loss {loss:.4f} nats/token | lr {lr:.2e} | grad norm {grad_norm:.3f} | "
            f"{images_per_s:.1f} images/s | MFU {100 * mfu:.1f} % | {memory:.2f} GiB"
            + (f" | {skipped_steps} steps skipped" if skipped_steps else "")
        )

    def validation(self, step: int, val_loss: float) -> None:
        """Logs a validation loss; the time it took does not count as training time."""
        if self.speaks:
            self._write({"step": step, "images_seen": step * self.run.recipe.batch_images, "val_loss": val_loss}, "val")
            uniform = math.log(self.run.recipe.model.n_vocab)
            self._say(f"step {step}/{self.run.recipe.steps} | validation {val_loss:.4f} nats/token (uniform {uniform:.4f})")
        self.restart_clock(step)

    def restart_clock(self, step: int) -> None:
        """Leaves out of the next speed what happened since the last log (validation, saving)."""
        self.clock, self.clock_step = time.perf_counter(), step

    def close(self) -> None:
        """Flushes everything."""
        if self.speaks:
            self.rows.close()
            self.board.close()
            self.bar.close()

    def _write(self, row: dict[str, float | None], group: str) -> None:
        self.rows.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name not in ("step", "images_seen") and value is not None:
                self.board.add_scalar(f"{group}/{name}", value, row["step"])

    def _say(self, line: str) -> None:
        self.bar.write(line)


def memory_gib() -> float:
    """The most memory this rank has held so far: of its GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def peak_of_all_ranks(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s of all ranks together, how it is known): the printed bf16 peak of a GPU, else a matmul measured here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    printed = plan.peak_flops(name)
    peak = printed if printed else _measured_matmul(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    total = float(dist.sum_over_ranks(torch.tensor(peak, dtype=torch.float64, device=device)))
    return total, f"{name}, {'printed bf16 peak' if printed else 'measured matmul'}"


def _measured_matmul(device: torch.device, dtype: torch.dtype, n: int = 1024, repeats: int = 5) -> float:
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        linear(x, x).sum().item()  # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)
