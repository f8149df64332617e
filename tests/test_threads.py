"""How many threads a calculation gets."""

import numpy as np
import pytest
import torch

from igpt_ds.evaluate.probes import logistic
from igpt_ds.evaluate.probes.logistic import fit_logistic
from igpt_ds.threads import SMALL, sleep_while_waiting, threads_for


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("three_threads")
def test_small_loops_have_one_thread_and_large_ones_all():
    for flops, threads in ((0, 1), (SMALL - 1, 1), (SMALL, 3)):
        with threads_for(flops):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError), threads_for(0):
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_a_small_probe_is_the_same_for_any_number_of_threads(monkeypatch):
    seen = []
    minimise = logistic.minimise
    monkeypatch.setattr(logistic, "minimise", lambda *args: seen.append(torch.get_num_threads()) or minimise(*args))
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(300, 8)).astype(np.float32)), rng.integers(0, 3, 300)
    found = fit_logistic(x, y, [0.1, 1.0])
    assert set(seen) == {1}
    torch.set_num_threads(1)
    assert np.array_equal(found.weights, fit_logistic(x, y, [0.1, 1.0]).weights)


def test_a_users_own_setting_stays():
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        sleep_while_waiting(given)
        assert given["OMP_WAIT_POLICY"] == expected
