"""Files and folders appear whole or not at all: links, threads, kills, permissions, and what was made meanwhile."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import pytest

from full import FULL
from mmdit import utils
from mmdit.utils import replacing, replacing_folder
from skips import SKIPS

linux = pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason=SKIPS["links"])


def test_a_link_that_stands_in_for_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "out" / "file"
    victim.write_text("kept")
    path.parent.mkdir()
    monkeypatch.setattr(utils, "_temporary_name", lambda: ".mmdit-0123456789abcdef")
    (path.parent / ".mmdit-0123456789abcdef").symlink_to(victim)
    with pytest.raises(FileExistsError), replacing(path):
        pass
    assert victim.read_text() == "kept"
    assert not path.exists()


def test_a_temporary_file_that_is_exchanged_is_noticed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("kept")
    with pytest.raises(OSError, match="was replaced while it was written"), replacing(path) as part:
        part.unlink()
        part.symlink_to(victim)
    assert victim.read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["victim"]


def test_names_are_random_and_of_one_length(tmp_path):
    """A file name as long as the system takes leaves room for no longer temporary name."""
    seen = set()
    for name in ("a", "a", "x" * 255):
        with replacing(tmp_path / name) as part:
            part.write_text(name)
            seen.add(part.name)
        assert (tmp_path / name).read_text() == name
    assert len(seen) == 3
    assert {len(name) for name in seen} == {23}


def test_permissions_are_kept(tmp_path):
    path = tmp_path / "file"
    for mode in (0o600, 0o644):
        path.write_text("old")
        path.chmod(mode)
        with replacing(path) as part:
            part.write_text("new")
        assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", mode)


def test_a_target_that_is_made_meanwhile_is_refused(tmp_path):
    with pytest.raises(FileExistsError, match="file"), replacing(tmp_path / "file", new=True) as part:
        part.write_text("mine")
        (tmp_path / "file").write_text("theirs")
    for made in (lambda path: path.mkdir(), lambda path: path.write_text("theirs")):
        folder = tmp_path / f"folder{made.__code__.co_firstlineno}{made.__code__.co_name}"
        with pytest.raises(FileExistsError, match="folder"), replacing_folder(folder) as part:
            (part / "a").write_text("mine")
            made(folder)
        assert not (folder / "a").exists()
        folder.rmdir() if folder.is_dir() else folder.unlink()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "theirs")]


def test_a_folder_takes_the_place_of_another_or_leaves_it(tmp_path):
    folder, target = tmp_path / "folder", tmp_path / "elsewhere"
    for text in ("first", "second"):
        with replacing_folder(folder, over=True) as part:
            (part / text).write_text(text)
        assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(text, text)]
    with pytest.raises(ZeroDivisionError), replacing_folder(folder, over=True) as part:
        (part / "third").write_text("third")
        raise ZeroDivisionError
    assert [file.name for file in folder.iterdir()] == ["second"]
    target.mkdir()
    for name, make in (("link", lambda path: path.symlink_to(target)), ("file", lambda path: path.write_text("x"))):
        make(tmp_path / name)
        with pytest.raises(FileExistsError, match=name), replacing_folder(tmp_path / name, over=True):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "elsewhere", "link", "file"}


def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename = Path.rename

    def refused(part: Path, path: Path) -> Path:
        if (part / "new").exists():
            raise OSError(5, "refused")
        return rename(part, path)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(FileExistsError), replacing_folder(folder, over=True) as part:
        (part / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in folder.iterdir()] == ["old"]


def test_a_folder_has_no_name_before_it_is_whole(tmp_path, monkeypatch):
    """What ends a process just before the last step leaves no empty folder."""

    def stopped(part: Path, path: Path) -> None:
        assert not path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "folder") as part:
        (part / "a").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_removed_loses_its_name_first(tmp_path, monkeypatch):
    """So that a process that is killed meanwhile leaves no checkpoint of which a part is gone."""
    folder, left = tmp_path / "step-00000004", []

    def killed(path):
        left.append(path)
        raise KeyboardInterrupt

    folder.mkdir()
    (folder / "state.json").write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(utils.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            utils.remove_folder(folder)
    assert [*tmp_path.iterdir()] == left
    assert re.fullmatch(r"\.mmdit-[0-9a-f]{16}", left[0].name)
    utils.remove_folder(left[0])
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    old, young, held = (tmp_path / f".mmdit-{letter * 16}" for letter in "abc")
    folder, other = tmp_path / f".mmdit-{'d' * 16}", tmp_path / ".mmdit-settings"
    for path in (old, young, held, other):
        path.write_text("x")
    folder.mkdir()
    (folder / "shard").write_text("x")
    for path in (old, held, folder, other):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    link = tmp_path / f".mmdit-{'e' * 16}"
    link.symlink_to(other)
    with replacing(tmp_path / "file") as part:
        os.utime(part, (time.time() - 2 * 86400,) * 2)  # slow, and not dead: it holds a lock
        with replacing(tmp_path / "more") as second:
            second.write_text("x")
        assert part.exists()
        part.write_text("x")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"file", "more", young.name, other.name, link.name}


def test_two_threads_never_tear_each_others_files(tmp_path):
    path, barrier, errors = tmp_path / "file", threading.Barrier(4), []

    def write(letter):
        barrier.wait()
        try:
            for _ in range(30):
                with replacing(path) as part, part.open("w") as file:
                    for _ in range(20):
                        file.write(letter * 1000)
        except OSError as error:
            errors.append(error)

    def read():
        barrier.wait()
        for _ in range(300):
            if path.exists():
                text = path.read_text()
                if len(text) != 20_000 or len(set(text)) != 1:
                    errors.append(text[:10])

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# It imports once, forks a writer for each folder that it is told, and says how the writer ended. The writer is slow, so
# that most kills hit it while it writes, not while the system does.
PARENT = """
import os
import sys
import time
from pathlib import Path
from mmdit.utils import replacing, replacing_folder

def write(place):
    number = 0
    while True:
        number += 1
        with replacing(Path(place, "file")) as part, part.open("w") as file:
            for _ in range(50):
                file.write(str(number) * 200 + chr(10))
                file.flush()
                time.sleep(0.0004)
        with replacing_folder(Path(place, f"folder{number}")) as folder:
            for name in "ab":
                (folder / name).write_text(str(number) * 1000)
                time.sleep(0.01)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        write(line.strip())
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1, flush=True)
"""


def killed_while_it_writes(parent, place, seconds):
    """Let the parent fork a writer, and kill that so many seconds after its first file is there."""
    parent.stdin.write(f"{place}\n")
    child = int(parent.stdout.readline())
    try:
        end = time.monotonic() + 60
        while not (place / "file").exists():
            assert time.monotonic() < end, "nothing was written in a minute"
            time.sleep(0.001)
        time.sleep(seconds)
    finally:
        os.kill(child, signal.SIGKILL)
    assert parent.stdout.readline() == f"{int(signal.SIGKILL)}\n"


@linux
def test_kills_leave_whole_files_or_none(tmp_path):
    """Processes that write without an end are killed, each at a random moment after its first file."""
    command, moments = [sys.executable, "-c", PARENT], Random(0)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as parent:
        for number in range(30 if FULL else 8):
            place = tmp_path / str(number)
            place.mkdir()
            killed_while_it_writes(parent, place, moments.uniform(0.0, 0.06))
            for path in place.glob("f*"):
                if path.is_dir():
                    assert sorted(inner.name for inner in path.iterdir()) == ["a", "b"]
                    assert all(len(inner.read_text()) >= 1000 for inner in path.iterdir())
                else:
                    assert len(path.read_text().splitlines()) == 50
                    assert len(set(path.read_text().splitlines())) == 1
    assert parent.returncode == 0


def test_errors_of_the_system_name_the_file(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match="file") as caught, replacing(path):
        raise OSError(28, "No space left on device")
    assert (caught.value.errno, caught.value.filename) == (28, str(path))
    assert not list(tmp_path.iterdir())
    path.write_text("old")
    target = tmp_path / "folder"
    with pytest.raises(FileExistsError) as taken, replacing(path, new=True) as part:
        part.write_text("new")
    with pytest.raises(FileNotFoundError) as inside, replacing_folder(target) as folder:
        (folder / "in" / "file").write_text("no such folder")
    for place in (replacing(path / "file", new=True), replacing_folder(path / "folder")):
        with pytest.raises(NotADirectoryError) as blocked, place:  # not FileExistsError: no other name is free there
            pass
        assert blocked.value.filename == str(path)
    assert (taken.value.filename, taken.value.filename2) == (str(path), None)
    assert inside.value.filename == str(target)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["old"]
