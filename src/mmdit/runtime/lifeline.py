"""A lifeline between the processes of a parallel run: each learns at once when another one fails, dies or leaves.

Collectives alone do not tell: on NCCL, a process whose peer has died waits in a kernel until a timeout of minutes. Here
rank 0 holds a connection to every other rank. The operating system closes it when a process ends, however it ends.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

CONNECTING = 60.0  # seconds that a process waits for the connection to rank 0
_GRACE = 10.0  # seconds after which a process that is still stuck in a collective is ended
_NEWS = 1.0  # seconds in which the reason of a broken collective arrives
DIED = "its process ended without an error message (killed, crashed, or out of memory)"


class ParallelError(ConnectionError):
    """Another process of a parallel run has failed or ended; the message names its rank and the reason."""


class RanksDifferError(ValueError):
    """The ranks of a parallel run were given different values; every rank raises it, so that none waits."""


class Failure(NamedTuple):
    """The first failure that is known."""

    rank: int
    reason: str


class Lifeline:
    """The connections of one process; a thread for each of them waits for news.

    Args:
        rank: the number of this process.
        peers: the open connections by rank: all other ranks on rank 0, and rank 0 alone on the others.
        on_failure: called once, in a thread of its own, when another process has failed; this process waits for its end
            before it exits.
        grace: seconds after a failure elsewhere in which this process must leave `guarded`; then it is ended.
    """

    def __init__(
        self,
        rank: int,
        peers: dict[int, socket.socket],
        *,
        on_failure: Callable[[], None] = lambda: None,
        grace: float = _GRACE,
    ) -> None:
        self.rank, self.grace, self._peers, self._on_failure = rank, grace, peers, on_failure
        self.failure: Failure | None = None
        self._left: dict[int, int] = {}  # by rank, the number of guarded parts after which it left
        self._depth, self._entered, self._closed = 0, 0, False
        self._lock, self._news = threading.RLock(), threading.Event()
        self._threads = [
            threading.Thread(target=self._listen, args=(peer,), name=f"lifeline {peer}", daemon=True) for peer in peers
        ]
        for thread in self._threads:
            thread.start()
        self._releasing: threading.Thread | None = None
        atexit.register(self._at_exit)

    @classmethod
    def connected(
        cls, rank: int, world: int, share: Callable[[Any], Any], *, host: str = "127.0.0.1", **options: Any
    ) -> Lifeline:
        """Connect all processes; every rank calls this at the same time.

        Args:
            rank, world: the number of this process, and of all processes.
            share: gives every rank the value of rank 0.
            host: the address at which rank 0 listens.
            options: further arguments of the class.
        """
        if rank:
            address, token = share(None)
            peer = socket.create_connection(tuple(address), timeout=CONNECTING)
            peer.settimeout(None)
            _send(peer, {"rank": rank, "token": token})
            return cls(rank, {0: peer}, **options)
        with socket.create_server((host, 0), backlog=world) as server:
            server.settimeout(CONNECTING)
            token = secrets.token_hex(16)
            share((server.getsockname()[:2], token))
            return cls(0, _accepted(server, world, token), **options)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Within the context, this rank works together with the others; a failure on any rank ends it on all.

        An error inside is reported to the other ranks. If it is the consequence of a failure elsewhere, a ParallelError
        that names that rank is raised instead. Contexts may be nested.

        Raises:
            ParallelError: another rank has failed, or has left.
        """
        self._enter()
        try:
            yield
        except RanksDifferError:
            raise
        except BaseException as error:
            if self._is_consequence(error):
                raise self._error() from error
            self.fail(error)
            raise
        else:
            self.check()
        finally:
            with self._lock:
                self._depth -= 1

    @property
    def waits(self) -> bool:
        """Whether the main thread is within `guarded`."""
        return self._depth > 0

    def check(self) -> None:
        """Raise ParallelError if another rank has failed."""
        if self.failure is not None:
            raise self._error()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one has failed."""
        if self._depth <= 1:
            self._tell({"failed": self.rank, "reason": _said(error)})

    def close(self) -> None:
        """Leave the run. Rank 0 waits for the others, because they hear of each other through it."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._releasing is None:
            atexit.unregister(self._at_exit)
        self._tell({"left": self.rank, "after": self._entered})
        if self.rank == 0:
            for thread in self._threads:
                thread.join()
        for peer in self._peers.values():
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()

    def _enter(self) -> None:
        with self._lock:
            self.check()
            if self._depth == 0:
                self._entered += 1
                for rank, after in self._left.items():
                    if after < self._entered:
                        raise ParallelError(_has_left(rank, after, self.rank))
            self._depth += 1

    def _is_consequence(self, error: BaseException) -> bool:
        """Whether another rank has failed before: then its collective broke here, or left values that are wrong."""
        if isinstance(error, RuntimeError) and _of_collective(error):
            self._news.wait(_NEWS)
        return self.failure is not None and isinstance(error, Exception)

    def _error(self) -> ParallelError:
        assert self.failure is not None, "there is a failure to report"
        rank, reason = self.failure
        return ParallelError(f"rank {rank} failed: {reason}. Rank {self.rank} stops; start the run again")

    def _listen(self, peer: int) -> None:
        """Read the messages of a rank until its connection ends."""
        left = False
        with suppress(OSError, ValueError), self._peers[peer].makefile("r", encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                left |= message.get("left") == peer
                self._hear(message, peer)
        if not left:
            self._hear({"failed": peer, "reason": DIED}, peer)

    def _hear(self, message: dict[str, Any], source: int) -> None:
        if self.rank == 0:
            self._tell(message, but=source)
        if "left" in message:
            with self._lock:
                rank, after = message["left"], message["after"]
                self._left[rank] = after
                if self._depth and after < self._entered:
                    self._record(Failure(rank, _has_left(rank, after, self.rank)))
        else:
            self._record(Failure(message["failed"], message["reason"]))

    def _record(self, failure: Failure) -> None:
        with self._lock:
            if self.failure is not None or self._closed:
                return
            self._releasing = threading.Thread(target=self._release, name="release", daemon=True)
            self.failure = failure
            self._releasing.start()
        self._news.set()

    def _release(self) -> None:
        """Free the main thread from a collective that will never end; end the process if that does not help."""
        freeing = threading.Thread(target=self._on_failure, name="on failure", daemon=True)
        if self._depth:  # in a thread of its own, because what frees the main thread can itself wait for ever
            freeing.start()
        end = time.monotonic() + self.grace
        while self._depth and time.monotonic() < end:
            time.sleep(0.05)
        if self._depth:
            sys.stderr.write(f"mmdit: {self._error()}\n")
            sys.stderr.flush()
            os._exit(1)
        if freeing.ident is not None:
            freeing.join()

    def _at_exit(self) -> None:
        """Leave the run, after what frees collectives has ended: in the middle of it torch would abort the process."""
        self.close()
        if self._releasing is None:
            return
        self._releasing.join(self.grace)
        if self._releasing.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _tell(self, message: dict[str, Any], but: int | None = None) -> None:
        for rank, peer in self._peers.items():
            if rank != but:
                with suppress(OSError), self._lock:
                    _send(peer, message)


def _accepted(server: socket.socket, world: int, token: str) -> dict[int, socket.socket]:
    """The connections of all other ranks, by rank."""
    peers: dict[int, socket.socket] = {}
    while len(peers) < world - 1:
        peer, _ = server.accept()
        peer.settimeout(CONNECTING)
        hello = _first_line(peer)
        if not secrets.compare_digest(str(hello.get("token")), token):
            peer.close()
            continue
        peer.settimeout(None)
        peers[int(hello["rank"])] = peer
    return peers


def _first_line(peer: socket.socket) -> dict[str, Any]:
    """The first message, read byte by byte, so that nothing of the next one is taken."""
    line = b""
    while not line.endswith(b"\n"):
        byte = peer.recv(1)
        if not byte or len(line) > 1000:
            return {}
        line += byte
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _has_left(rank: int, after: int, own: int) -> str:
    return f"rank {rank} has ended after {after} calls, and rank {own} made another one: all ranks make the same calls"


def _of_collective(error: RuntimeError) -> bool:
    """Whether an error may come from a collective whose peers are gone."""
    words = ("gloo", "nccl", "connection", "socket", "process group", "cuda", "timed out", "aborted")
    said = f"{type(error).__name__} {error}".lower()
    return any(word in said for word in words)


def _said(error: BaseException) -> str:
    """The first line of an error, with its type."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
