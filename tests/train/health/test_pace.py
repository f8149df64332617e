"""Who is slow and why, from the paces of the ranks."""

import threading
import time

import pytest
import torch
import torch.distributed as td

from igpt_ds.train.health import step_clock
from igpt_ds.train.health.pace import NAME_SECONDS, SLOW, Naming, Pace, SlowRank, pace_from, slow_ranks
from igpt_ds.train.health.step_clock import StepClock


def test_the_rank_that_waits_least_is_the_slow_one() -> None:
    """The network takes 0.1 s of each step; rank 2 computes twice as long, and the others wait for it."""
    usual = Pace(0.0, 0.4, 0.5, "a")
    first, *others = slow_ranks({0: usual, 1: usual, 2: Pace(0.0, 0.8, 0.1, "b"), 3: usual})
    assert first == SlowRank(2, pytest.approx(0.9 / 0.5), "device", 0.8, 0.4, "b")  # type: ignore[arg-type]
    assert [slow.ratio for slow in others] == [1.0, 1.0, 1.0]
    assert str(first) == "rank 2 on b, 1.80 times the median (device: computes for 0.8 s a step, median 0.4)"


def test_one_of_two_ranks_waits_for_data() -> None:
    slow = slow_ranks({0: Pace(0.0, 0.3, 0.4), 1: Pace(0.3, 0.3, 0.1)})[0]
    assert (slow.rank, slow.reason, slow.seconds, slow.median) == (1, "data", 0.3, 0.0)
    assert slow.ratio == pytest.approx(0.7 / 0.4)


def test_a_slow_network_makes_no_rank_slow_and_nothing_gives_nothing() -> None:
    assert {slow.ratio for slow in slow_ranks({0: Pace(0.0, 0.1, 2.0), 1: Pace(0.0, 0.1, 2.0)})} == {1.0}
    assert {slow.ratio for slow in slow_ranks({0: Pace(0.0, 0.0, 0.0), 1: Pace(0.0, 0.0, 0.0)})} == {1.0}
    assert slow_ranks({}) == []


def test_a_slow_link_is_the_reason_where_the_network_takes_the_time() -> None:
    """The network takes 0.6 s of a step of 1 s; with a link like the others' it would take 0.15 s."""
    paces = {rank: Pace(0.0, 0.4, 0.6, "a", 0.01) for rank in range(3)} | {3: Pace(0.0, 0.4, 0.6, "b", 0.04)}
    first, *others = slow_ranks(paces)
    assert first == SlowRank(3, pytest.approx(1 / 0.55), "network", 0.04, 0.01, "b")  # type: ignore[arg-type]
    assert str(first).endswith("1.82 times the median (network: a message takes 0.04 s, median 0.01)")
    assert {slow.reason for slow in others} == {"device"}
    assert pace_from(paces[3].to_dict(), "b") == paces[3]


def test_the_log_names_a_rank_once_in_a_while() -> None:
    naming, slow = Naming(), SlowRank(1, 1.5, "data", 0.3, 0.0, "b")
    assert naming.text(None, 0.0) == naming.text(SlowRank(1, SLOW, "data", 0.3, 0.0), 0.0) == ""
    assert naming.text(slow, 0.0) == f"  {slow}"
    assert naming.text(slow, NAME_SECONDS - 1) == ""
    assert naming.text(SlowRank(1, 1.5, "device", 0.3, 0.0), 1.0) != ""
    assert naming.text(slow, NAME_SECONDS) != ""


@pytest.mark.parametrize("values", [None, {}, {"data": -1, "device": 1, "wait": 1}, {"data": 1, "device": "nan", "wait": 1}])
def test_what_is_no_pace(values: object) -> None:
    assert pace_from(values, "a") is None


def test_waiting_for_messages_is_not_own_work(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    """A wait of 50 ms in a message, beside 20 ms of work. Afterwards torch's methods are what they were."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    wait = td.Work.wait
    td.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        clock = StepClock(torch.device("cpu"))
        assert clock.pace is None
        methods = dict(vars(td.ProcessGroup))
        with monkeypatch.context() as slower:
            slower.setattr(td.Work, "wait", lambda work, *more: time.sleep(0.05) or wait(work, *more))
            for _ in range(4):
                with clock.step(data=0.01):
                    td.all_reduce(torch.ones(3))
                    time.sleep(0.02)
        pace = clock.pace
        assert pace is not None
        assert pace.data == 0.01
        assert pace.wait >= 0.05
        assert 0.02 <= pace.device < 0.07
        assert dict(vars(td.ProcessGroup)) == methods
        assert len(clock._window) == 3 <= step_clock.WINDOW
        td.all_reduce(torch.ones(3))
    finally:
        td.destroy_process_group()


def test_the_messages_of_another_thread_are_no_wait_of_the_step() -> None:
    waits = step_clock._HostWaits()
    message = waits.timed(lambda: time.sleep(0.02))
    saver = threading.Thread(target=message)
    saver.start()
    saver.join()
    assert waits.seconds() == 0
    message()
    assert waits.seconds() >= 0.02


def test_a_wait_for_a_save_is_no_part_of_the_step() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.step(data=0.0):
            time.sleep(0.05)
            clock.aside(0.05)
    pace = clock.pace
    assert pace is not None
    assert pace.device < 0.05
