import tempfile
from collections.abc import Callable
from typing import Any


def push_saved(save: Callable[[str], None], repo_id: str, license: str | None, **kwargs: Any) -> Any:
    """
    Releases the files that `save` writes into a temporary folder.

    Args:
        save (`Callable[[str], None]`): Writes a head into the folder whose path it gets.
        repo_id (`str`): The repo: `name` or `user/name`.
        license (`str`, *optional*): The Hub's identifier of a license, for the card.
        kwargs (*optional*): Arguments of [`Release.push`].
    """
    # Imported here, because the module of releases imports this one.
    from ..hub.release import Release

    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return Release(folder, repo_id, license=license).push(**kwargs)
