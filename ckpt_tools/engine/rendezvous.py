"""How the processes of one run find and talk to the first of them: a TCP connection each, JSON objects one a line.

The first process listens on a port of its own and writes address, port and a secret into a small file beside the
output, which only the same user can read. A connection answers at once whether its other end lives: the kernel closes
it when a process is killed, and keep-alive notices a machine that is gone. So nothing is left to be mistaken for a
later run's: a stale file leads to nobody, and the reader tries again.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ckpt_tools.core.errors import RankError, UsageError
from ckpt_tools.core.storage import storage_errors

JOIN_SECONDS = 120.0
"""How long processes wait for each other at the start. NFS may hide a new file from another machine for 60 s."""

HANDSHAKE_SECONDS = 10.0
_HELLO_LIMIT = 4096
_LINE_LIMIT = 64 << 20
_RUN_VARIABLES = (
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID"),
)

Message = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """One process among those that share a run.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        address: of the first one's machine, as the others reach it.
        one_machine: all of them run on one machine.
        run: what all of them have in common and no other run has.
    """

    rank: int
    world: int
    address: str
    one_machine: bool
    run: str

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Place | None:
        """The place that torchrun gave in RANK, WORLD_SIZE and so on; None for a process that is alone.

        Raises:
            UsageError: they are no numbers, or do not fit each other.
        """
        if not environment.get("RANK") or not environment.get("WORLD_SIZE"):
            return None
        numbers = [environment[name] for name in ("RANK", "WORLD_SIZE")]
        if not all(text.isdecimal() for text in numbers) or not int(numbers[0]) < int(numbers[1]):
            raise UsageError(
                f"RANK={numbers[0]} and WORLD_SIZE={numbers[1]} do not name one process of several",
                hint="RANK counts from 0 to WORLD_SIZE - 1; unset both to run alone",
            )
        rank, world = map(int, numbers)
        if world == 1:
            return None
        run = "\n".join(f"{name}={environment.get(name, '')}" for name in _RUN_VARIABLES)
        one_machine = environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]
        address = environment.get("MASTER_ADDR") or socket.gethostname()
        return cls(rank, world, address, one_machine, sha256(run.encode()).hexdigest()[:16])

    def meeting_point(self, destination: Path) -> Path:
        """The file that tells where the first process listens."""
        final = Path(os.path.abspath(destination))
        return final.with_name(f".{final.name}.ckpt-ranks-{self.run}")


class Channel:
    """One connection. Sending is safe from several threads, receiving is for one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._incoming = connection.makefile("rb")
        self._lock = threading.Lock()
        _notice_dead_machines(connection)

    def send(self, message: Message) -> None:
        """Sends one object; raises `OSError` when the other end is gone."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._connection.sendall(data)

    def receive(self, *, limit: int = _LINE_LIMIT, seconds: float | None = None) -> Message | None:
        """The next object, or None when the other end is gone or does not speak this language."""
        try:
            self._connection.settimeout(seconds)
            line = self._incoming.readline(limit)
            self._connection.settimeout(None)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def finish_sending(self) -> None:
        """Nothing more will be sent; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._incoming.close()
        self._connection.close()


class Listener:
    """The first process's door: published for the others, who must know the secret."""

    def __init__(self, place: Place, destination: Path) -> None:
        self._place = place
        self._path = place.meeting_point(destination)
        self._secret = secrets.token_hex(16)
        self._server = _server(place)
        try:
            self._publish()
        except BaseException:
            self._server.close()
            raise

    def _publish(self) -> None:
        addresses = ["127.0.0.1"] if self._place.one_machine else [self._place.address, socket.gethostname()]
        door = {"addresses": addresses, "port": self._server.getsockname()[1], "secret": self._secret}
        temporary = self._path.with_name(f"{self._path.name}-{self._secret[:8]}")
        with storage_errors("write", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(json.dumps(door).encode())
                file.flush()
                os.fsync(fd)
            os.rename(temporary, self._path)

    def accept(self) -> tuple[int, str, Channel] | None:
        """(rank, who it is, connection) of the next process of this run; None once the door is closed."""
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return None
            channel = Channel(connection)
            hello = channel.receive(limit=_HELLO_LIMIT, seconds=HANDSHAKE_SECONDS) or {}
            rank, given = hello.get("rank"), str(hello.get("secret")).encode(errors="replace")
            known = hmac.compare_digest(given, self._secret.encode()) and hello.get("world") == self._place.world
            if known and isinstance(rank, int) and 0 < rank < self._place.world:
                with contextlib.suppress(OSError):
                    channel.send({"welcome": self._place.run})
                    return rank, str(hello.get("who", "")), channel
            channel.close()

    def close(self) -> None:
        """Nobody else comes in."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Wakes the thread that waits in accept.
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


def _server(place: Place) -> socket.socket:
    """A socket that listens where the other processes are: on this machine alone, or to all of its networks."""
    if place.one_machine:
        return socket.create_server(("127.0.0.1", 0), backlog=place.world)
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=place.world, dualstack_ipv6=True)
    except (OSError, ValueError):
        return socket.create_server(("", 0), backlog=place.world)


def connect(place: Place, destination: Path, *, seconds: float = JOIN_SECONDS) -> Channel:
    """The connection to the first process of the run.

    Raises:
        RankError: it did not appear in time.
    """
    path, deadline, pause = place.meeting_point(destination), time.monotonic() + seconds, 0.05
    while time.monotonic() < deadline:
        channel = _knock(place, path)
        if channel is not None:
            return channel
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
    raise RankError(
        f"rank {place.rank} has waited {seconds:.0f} s for rank 0 and found nobody",
        hint=f"start all {place.world} ranks together, with an output directory that all of them share; "
        "a process that is to run alone is started as `ckpt`, or without RANK and WORLD_SIZE",
    )


def _knock(place: Place, path: Path) -> Channel | None:
    try:
        door = json.loads(path.read_bytes())
        addresses, port, secret = list(door["addresses"]), int(door["port"]), str(door["secret"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for address in dict.fromkeys(map(str, addresses)):
        try:
            channel = Channel(socket.create_connection((address, port), timeout=HANDSHAKE_SECONDS))
        except (OSError, OverflowError):
            continue
        with contextlib.suppress(OSError):
            channel.send({"rank": place.rank, "world": place.world, "secret": secret, "who": who_am_i()})
            answer = channel.receive(limit=_HELLO_LIMIT, seconds=HANDSHAKE_SECONDS)
            if answer == {"welcome": place.run}:
                return channel
        channel.close()
    return None


def who_am_i() -> str:
    """Machine and process, for messages."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def _notice_dead_machines(connection: socket.socket) -> None:
    """A machine that no longer answers is noticed after 20 s; a process that is only slow is waited for."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}.items():
        option = getattr(socket, name, None)  # not all systems have all of them
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
