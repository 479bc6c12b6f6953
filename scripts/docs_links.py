"""A hook of mkdocs: links from a page to files outside docs/ lead to the repository's copy of them."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Rewrite links such as `../SECURITY.md`; without a repository they become plain text."""

    def target(match: re.Match[str]) -> str:
        text, link = match["text"], match["link"]
        if not (DOCS / page.file.src_uri).parent.joinpath(link).resolve().is_relative_to(DOCS.parent):
            raise ValueError(f"{page.file.src_uri}: {link} lies outside the repository")
        path = link.removeprefix("../")
        return f"[{text}]({config.repo_url}/blob/main/{path})" if config.repo_url else f"{text} (`{path}`)"

    return re.sub(r"\[(?P<text>[^\]]+)\]\((?P<link>\.\./[^)#]+)\)", target, markdown)
