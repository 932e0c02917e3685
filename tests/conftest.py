"""What every test module gets: a process as it found it, whatever an in-process run did to it."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest
import torch

# CI draws the same examples every time, so that a run says something about the change under test; `make test-all`
# draws new ones.
# A machine that is busy, or stands still for a while, says nothing of the code under test.
_UNTIMED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("ci", derandomize=True, **_UNTIMED)
hypothesis.settings.register_profile("explore", print_blob=True, **_UNTIMED)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="module")
def process_left_as_it_was():
    """Undo process-wide state: signal mask, launcher's variables, working folder, torch's determinism, threads and type.

    A process group stays: DeepSpeed remembers the groups of the first one for the life of the process.
    """
    environment = dict(os.environ)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    deterministic = torch.are_deterministic_algorithms_enabled()
    folder, threads, dtype = os.getcwd(), torch.get_num_threads(), torch.get_default_dtype()
    yield
    os.chdir(folder)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    torch.use_deterministic_algorithms(deterministic)
    os.environ.clear()
    os.environ.update(environment)
