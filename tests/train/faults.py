"""train.py with a fault: run by the tests of train/ and of train/safety/ under any launcher.

faults.py FAULT train.py's words; FAULT is one of
    signal=NAME,rank,phase,step    the rank sends itself a signal at its first sign of life in that phase after that step
    nan=rank,first,end             the rank's loss of images [first, end) of the stream is not a number
    bad=first,end,nats             the loss of images [first, end) of the stream is higher by so many nats
    garbage=steps                  no fault: new garbage is collected every so many steps, and each collection is told

IGPT_DS_TEST_FLIP=rank,step flips a bit in the output of block 1 of a rank, in the first computation of that step's replay.
IGPT_DS_TEST_SLOW=reason,rank,seconds makes each step of a rank longer: "data" where it gets its images, "device" in its loss;
"network" makes each message to a neighbour longer, "copy" the copy of the state that a thread writes.
"""

import gc
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import torch

from igpt_ds import cli, dist
from igpt_ds.model.transformer import Block
from igpt_ds.train import loop
from igpt_ds.train.checkpoint.snapshot import Snapshot
from igpt_ds.train.health import links, step_clock
from igpt_ds.train.health.replay import Replay
from igpt_ds.train.safety.watchdog import Watchdog

place = next(index for index, word in enumerate(sys.argv) if "=" in word and not word.startswith("--"))
kind, _, values = sys.argv.pop(place).partition("=")
arguments = values.split(",")
spec = importlib.util.spec_from_file_location("train_story", Path(__file__).parents[2] / "train.py")
assert spec is not None
assert spec.loader is not None
story = importlib.util.module_from_spec(spec)
spec.loader.exec_module(story)
pretraining_loss, alive = story.pretraining_loss, Watchdog.alive
sent: list[object] = []
before: dict[str, int] = {}


def signalling(self: Watchdog, phase: str, step: int, step_seconds: float | None = None) -> None:
    alive(self, phase, step, step_seconds)
    name, *where = arguments
    if not sent and where == [str(dist.rank()), phase, str(step)]:
        sent.append(name)
        os.kill(os.getpid(), getattr(signal, name))


def stopping(self: Watchdog, phase: str, step: int, step_seconds: float | None = None) -> None:
    alive(self, phase, step, step_seconds)
    if not sent and step < before.get("step", 0):
        sent.append(step)
        os.kill(os.getpid(), signal.SIGUSR1)
    before["step"] = step


def damaged(recipe):
    loss = pretraining_loss(recipe)

    def nan(engine, batch):
        rank, first, end = map(int, arguments)
        return loss(engine, batch) * (float("nan") if dist.rank() == rank and first <= batch.first < end else 1.0)

    def bad(engine, batch):
        first, end, nats = map(int, arguments)
        value = loss(engine, batch)
        return value * (1 + nats / value.detach()) if first <= batch.first < end else value

    return nan if kind == "nan" else bad


def told(phase: str, about: dict[str, int]) -> None:
    if phase == "start" and not gc.isenabled():
        print(f"rank {dist.rank()} collects generation {about['generation']}", flush=True)


def slowed(call, seconds, burns):
    def slow(*args):
        end = time.perf_counter() + seconds
        while burns and time.perf_counter() < end:
            pass
        time.sleep(max(0.0, end - time.perf_counter()))
        return call(*args)

    return slow


if slow_one := os.environ.get("IGPT_DS_TEST_SLOW"):
    reason, slow_rank, slow_seconds = slow_one.split(",")
    step_clock.NETWORK = 0.0 if reason == "network" else step_clock.NETWORK
    if int(slow_rank) == dist.rank() and reason == "data":
        loop.Stream.step = slowed(loop.Stream.step, float(slow_seconds), burns=False)
    elif int(slow_rank) == dist.rank() and reason == "network":
        links._exchange = slowed(links._exchange, float(slow_seconds), burns=False)
    elif reason == "copy":
        Snapshot.copy = slowed(Snapshot.copy, float(slow_seconds) * (int(slow_rank) == dist.rank()), burns=False)
    elif int(slow_rank) == dist.rank():
        whole = pretraining_loss
        pretraining_loss = story.pretraining_loss = lambda recipe: slowed(whole(recipe), float(slow_seconds), burns=True)


def flipping(check, rank, step):
    forward = Block.forward
    armed = []

    def checked(self, now, *more):
        armed.extend([self._engine.module.blocks[1]] * (now == step and dist.rank() == rank))
        check(self, now, *more)

    def flipped(self, *more):
        output = forward(self, *more)
        if self in armed:
            armed.clear()
            output.detach().view(-1)[5:6].view(torch.int32).bitwise_xor_(1)
        return output

    Block.forward = flipped
    return checked


if flip := os.environ.get("IGPT_DS_TEST_FLIP"):
    Replay.check = flipping(Replay.check, *map(int, flip.split(",")))
if kind == "signal":
    Watchdog.alive = signalling
elif kind == "garbage":
    loop.COLLECT_EVERY = int(arguments[0])
    gc.callbacks.append(told)
else:
    story.pretraining_loss = damaged
if os.environ.get("IGPT_DS_TEST_STOP_AFTER_ROLLBACK"):  # the first sign of life after one
    Watchdog.alive = stopping
cli.run(story.main, ranks=True)
