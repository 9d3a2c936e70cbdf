"""The bar counts what passes and stays out of files."""

import sys

from mmdit.utils import bar


def test_it_passes_everything_on_and_is_silent_in_a_pipe(capsys):
    assert list(bar(iter("abc"), 3, None)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    assert list(bar(iter("abc"), 3, True)) == ["a", "b", "c"]
    assert "3/3" in capsys.readouterr().err


def test_none_shows_it_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(bar(iter("ab"), 2, None))
    assert "2/2" in capsys.readouterr().err
