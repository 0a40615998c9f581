import shutil

import pytest
from small_world import write_small_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The small world's folder, made once."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_small_world(folder)
    return folder


@pytest.fixture
def small_world(world, monkeypatch):
    """The small world as the current folder, which an example leaves without the runs that it made."""
    monkeypatch.chdir(world)
    before = set((world / "runs").iterdir())
    yield
    for folder in set((world / "runs").iterdir()) - before:
        shutil.rmtree(folder)
