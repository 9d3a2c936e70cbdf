"""Every link of the Markdown files leads to a file, and every anchor to a heading: `python tests/check_links.py`.

Links to other hosts are not followed. Exit code: 0 where all links hold, 1 where one does not.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|<(?:img|a)\s[^>]*(?:src|href)=\"([^\"]+)\"")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def broken() -> Iterator[str]:
    """One line for every link that leads nowhere: the file, the link and why."""
    listed = subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).split()
    for file in (ROOT / name for name in listed):
        for match in LINK.finditer(FENCE.sub("", file.read_text(encoding="utf-8"))):
            if why := _wrong(file, match[1] or match[2]):
                yield f"{file.relative_to(ROOT)}: {match[1] or match[2]}: {why}"


def _wrong(file: Path, link: str) -> str | None:
    """Why a link leads nowhere; None where it holds or names another host."""
    if re.match(r"[a-z]+:", link):
        return None
    name, _, anchor = unquote(link).partition("#")
    target = (file.parent / name).resolve() if name else file
    if not target.is_relative_to(ROOT):
        return "it leads out of the repository"
    if not target.exists():
        return "there is no such file"
    if anchor and anchor not in _anchors(target):
        return f"{target.name} has no heading #{anchor}"
    return None


def _anchors(file: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    headings = re.findall(r"^#{1,6}\s+(.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


if __name__ == "__main__":
    found = list(broken())
    print("\n".join(found) or "all links hold")
    raise SystemExit(1 if found else 0)
