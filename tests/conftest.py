import os

import pytest
import torch


# Nothing in the tests may ask a Hub on the network; the one server they talk to is on loopback.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are too small to share between threads.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_lm() -> str:
    """Folder of SmolLM2-135M-Instruct, which `make test` fetches."""
    folder = os.path.join(os.path.dirname(__file__), "..", "quickstart", "SmolLM2-135M-Instruct")
    if not os.path.exists(os.path.join(folder, "config.json")):
        pytest.skip("quickstart/SmolLM2-135M-Instruct is not there; `make test` fetches it")
    return os.path.abspath(folder)
