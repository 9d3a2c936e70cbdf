"""Every link of Markdown files and notebooks leads to a file or heading that is there: `python tests/check_links.py`.

Links to other hosts are not followed. Exit code: 0 where all links hold, 1 where one does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|<(?:img|a)\s[^>]*(?:src|href)=\"([^\"]+)\"")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def broken() -> Iterator[str]:
    """One line for every link that leads nowhere: the file, the link and why."""
    notebooks = [file for end in ("py", "ipynb") for file in (ROOT / "notebooks").rglob(f"*.{end}")]
    for file in sorted([*ROOT.glob("*.md"), *(ROOT / "src").rglob("*.md"), *notebooks]):
        for match in LINK.finditer(FENCE.sub("", _prose(file))):
            if why := _wrong(file, match[1] or match[2]):
                yield f"{file.relative_to(ROOT)}: {match[1] or match[2]}: {why}"


def _prose(file: Path) -> str:
    """The text of a Markdown file, or of the Markdown cells of a notebook."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return "\n".join(line for line in text.splitlines() if line.startswith("# "))
    if file.suffix == ".ipynb":
        return "\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    return text


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
