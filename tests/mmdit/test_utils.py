"""The bar counts what passes and stays out of files; tables line up."""

import sys
import threading
import time

import pytest

from mmdit.utils import ahead, bar, markdown_table


def test_it_passes_everything_on_and_is_silent_in_a_pipe(capsys):
    assert list(bar(iter("abc"), 3, None)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    assert list(bar(iter("abc"), 3, True)) == ["a", "b", "c"]
    assert "3/3" in capsys.readouterr().err


def test_none_shows_it_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(bar(iter("ab"), 2, None))
    assert "2/2" in capsys.readouterr().err


def test_a_table_lines_up_and_escapes_bars():
    lines = markdown_table(("", "a|b"), [("one", 1), ("x" * 6, 2.5)])
    assert lines == ["|        | a\\|b |", "| ------ | ---- |", "| one    | 1    |", "| xxxxxx | 2.5  |"]
    assert markdown_table(("a",), []) == ["| a   |", "| --- |"]
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        markdown_table(("a", "b"), [("c",)])


def test_what_runs_ahead_gives_or_raises_what_it_did():
    own = threading.current_thread()
    with ahead(threading.current_thread) as found:
        assert found() is not own
    with ahead(lambda: 1 / 0) as found, pytest.raises(ZeroDivisionError):
        found()


def test_what_runs_ahead_has_ended_after_an_error():
    begun, ended = threading.Event(), []

    def run():
        begun.wait()
        time.sleep(0.02)
        ended.append(True)

    with pytest.raises(ZeroDivisionError), ahead(run):
        begun.set()
        raise ZeroDivisionError
    assert ended
