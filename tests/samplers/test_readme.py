"""The README of the package: its tables are complete, its links lead somewhere, its examples run."""

import re
from pathlib import Path

import samplers

FILE = Path(samplers.__file__).parent / "README.md"
TEXT = FILE.read_text(encoding="utf-8")


def test_the_table_of_solvers_is_the_printed_one():
    assert samplers.solvers_markdown() in TEXT


def test_every_schedule_has_its_row():
    rows = TEXT.split("## Schedules")[1].split("## Guidance")[0]
    assert set(samplers.SCHEDULES) <= set(re.findall(r"`(\w+)`", rows))


def test_the_map_names_every_file():
    rows = TEXT.split("## The files")[1]
    files = {str(path.relative_to(FILE.parent)) for path in FILE.parent.rglob("*.py") if path.name != "__init__.py"}
    assert files == set(re.findall(r"`([\w/]+\.py)`", rows))


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    assert len(links) >= 4
    assert not [link for link in links if not (FILE.parent / link).exists()]


def test_the_loop_of_ones_own_runs(capsys):
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[1:]:  # the first draws a picture
        exec(compile(code, str(FILE), "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert isinstance(names["last"], samplers.Step)
    assert names["last"].sigma == 0
