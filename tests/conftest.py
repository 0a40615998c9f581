import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings


# No test may use the network: the only Hub that tests talk to is a server on loopback.
os.environ["HF_HUB_OFFLINE"] = "1"
# Under nohup, every process that a test signals would ignore SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# The models are too small for several threads.
torch.set_num_threads(1)


# Every machine runs the same examples, except in a long run. Slowness is no failure.
COMMON = dict(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.register_profile("short", derandomize=True, database=None, **COMMON)
settings.register_profile("long", **COMMON)
settings.load_profile("short")


# Drawing takes three quarters of a tiny run's time, and only the tests in these places look at the plots.
LOOK_AT_PLOTS = {"cards", "hub", "runs", "test_train.py"}


@pytest.fixture(scope="module", autouse=True)
def plots_where_they_are_looked_at(request):
    """Turns drawing off, except for the tests that look at plots."""
    with pytest.MonkeyPatch.context() as patch:
        if not LOOK_AT_PLOTS & set(request.path.relative_to(Path(__file__).parent).parts):
            patch.setattr("sae_accel.cards.model_card.draw_plots", lambda *args, **kwargs: [])
        yield


@pytest.fixture(scope="session")
def real_lm() -> str:
    """The folder of SmolLM2-135M-Instruct, which `make test` fetches."""
    folder = os.path.join(os.path.dirname(__file__), "..", "quickstart", "SmolLM2-135M-Instruct")
    if not os.path.exists(os.path.join(folder, "config.json")):
        pytest.skip("quickstart/SmolLM2-135M-Instruct is not there; `make test` fetches it")
    return os.path.abspath(folder)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with an LM, its tokenizer and a text."""
    # Imported here, since the Hub's client reads the setting above when it is imported.
    from tiny import write_place

    return write_place(tmp_path_factory.mktemp("place"))
