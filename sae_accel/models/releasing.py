import tempfile
from collections.abc import Callable
from typing import Any


def push_saved(save: Callable[[str], None], repo_id: str, license: str | None, **kwargs: Any) -> Any:
    """Releases what `save` writes into a folder."""
    # The releases' module reads heads, and so comes after this one.
    from ..hub.release import Release

    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return Release(folder, repo_id, license=license).push(**kwargs)
