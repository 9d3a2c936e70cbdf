"""Tests in a process of their own: what the other tests of a process hold of a GPU would count in theirs."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

ALONE = "MMDIT_ALONE"  # is set in that process
LIMIT = 300  # seconds for the tests of a file


@cache
def alone(path: Path) -> dict[str, str]:
    """What the tests of a file say in a process of their own, by name; empty for those that passed."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(path)]
        done = subprocess.run(
            command, env=os.environ | {ALONE: "1"}, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        if not report.exists():
            raise RuntimeError(
                f"{path.name} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return {case.attrib["name"]: _said(case) for case in ElementTree.parse(report).iter("testcase")}


def _said(case: ElementTree.Element) -> str:
    return "\n".join(part.text or part.attrib.get("message", part.tag) for part in case if part.tag != "properties")
