"""A PostgreSQL server of this machine's own packages, in a temporary folder, as an unprivileged user."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PASSWORD = "tea-for-2%too"
_USER = "postgres"


def server_binaries() -> Path | None:
    """The folder of `initdb` and `postgres`; None if PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return None if on_path is None else Path(on_path).resolve().parent


def cannot_run() -> str:
    """Why no server can run here; "" if one can."""
    if server_binaries() is None:
        return "needs the PostgreSQL server: apt-get install postgresql"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(_USER)
        except KeyError:
            return f"PostgreSQL does not run as root, and there is no user {_USER}"
    return ""


@dataclass
class PostgresServer:
    """A server that listens on loopback, with one database `dse` and one user `dse` with a password."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def create(cls, folder: Path) -> PostgresServer:
        server = cls(folder, _free_port())
        folder.mkdir(mode=0o755)
        (folder / "password").write_text(PASSWORD)
        if os.geteuid() == 0:
            entry = pwd.getpwnam(_USER)
            for path in (folder, folder / "password"):
                os.chown(path, entry.pw_uid, entry.pw_gid)
        command = ["initdb", "-D", str(folder / "data"), "-U", "dse", "-A", "scram-sha-256", "--pwfile"]
        server._run([*command, str(folder / "password"), "--no-sync"])
        server.start()
        server._psql("postgres", "create database dse")
        return server

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://dse@127.0.0.1:{self.port}/dse"

    def start(self) -> None:
        command = self._command(["postgres", "-D", str(self.folder / "data"), "-p", str(self.port), "-F"])
        command += ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}"]
        self.process = subprocess.Popen(
            command,
            preexec_fn=_drop_privileges(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s:
            try:
                self._psql("postgres", "select 1")
                return
            except subprocess.CalledProcessError:
                time.sleep(0.1)
        raise AssertionError("PostgreSQL did not start")

    def kill(self) -> None:
        """End the server at once, as a power failure would; its connections break."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait()
            self.process = None

    def _psql(self, database: str, statement: str) -> None:
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "dse", "-d", database]
        command = [str(self._binary("psql")), *where, "-c", statement]
        subprocess.run(command, env=environment, check=True, capture_output=True)

    def _run(self, command: list[str]) -> None:
        subprocess.run(self._command(command), preexec_fn=_drop_privileges(), check=True, capture_output=True)

    def _command(self, command: list[str]) -> list[str]:
        return [str(self._binary(command[0])), *command[1:]]

    @staticmethod
    def _binary(name: str) -> Path:
        folder = server_binaries()
        assert folder is not None
        return folder / name


def _drop_privileges() -> Callable[[], None] | None:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam(_USER)

    def drop() -> None:
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)

    return drop


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
