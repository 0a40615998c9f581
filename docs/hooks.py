"""Fits pages that also stand in the repository into the site."""

import re


REPOSITORY = "https://github.com/sae-accel/sae_accel/blob/main/"
# README and changelog are included; their links are those of the repository's root.
INCLUDED = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links of an included page to `docs/` lead to the page, and links to other files to the repository."""
    if page.file.src_uri not in INCLUDED:
        return markdown
    with open(INCLUDED[page.file.src_uri], encoding="utf-8") as file:
        text = re.sub(r"\]\(docs/", "](", file.read())
    return re.sub(r"\]\((?!https?:|#)([\w./-]+)\)", lambda link: _placed(link[1], files), text)


def _placed(target: str, files) -> str:
    return f"]({target})" if files.get_file_from_path(target) else f"]({REPOSITORY}{target})"
