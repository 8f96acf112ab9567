"""SIGHUP: a hub re-reads keys, origins, limits, certificates and Redis' password, and nothing else happens."""

from __future__ import annotations

import shutil
import signal
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import SecretStr

from broadcaster.hub.reload import _with_credentials
from broadcaster.redis.server import RedisServer
from broadcaster.settings import RedisTable
from tests.certificates import Certificates, make
from tests.hub.test_access import Guest, ask, bearer, status_of
from tests.support import (
    HubProcess,
    RedisClient,
    broadcaster,
    event_payload,
    eventually,
    free_port,
    upgrade_request,
)

OLD, NEW = "old-key_0123456789", "new-key_0123456789"


def keys(*shown: str, channels: tuple[str, ...] = ("events.*",)) -> dict[str, Any]:
    """Access control with these keys."""
    return {"mode": "token", "api_keys": [{"name": key[:3], "key": key, "subscribe": channels} for key in shown]}


class Reloading:
    """A hub whose settings are in a file that a test writes again."""

    def __init__(self, hub: HubProcess, file: Path, hub_table: dict[str, Any]) -> None:
        self.hub = hub
        self._file = file
        self._hub_table = hub_table
        self._times = 0

    def reload(self, auth: dict[str, Any], **hub: Any) -> str:
        """Write other settings, and send SIGHUP; what the hub says."""
        self._file.write_text(tomli_w.dumps({"auth": auth, "hub": self._hub_table | hub}))
        self._times += 1
        self.hub.signal(signal.SIGHUP)

        def said() -> list[str]:
            lines = [line for line in list(self.hub.lines) if "SIGHUP" in line]
            return lines if len(lines) == self._times else []

        return eventually(said, "it does not say what it has read")[-1]

    def status(self, key: str | None, **headers: str) -> int:
        """With which status a subscriber is answered."""
        shown = bearer(key) if key else {}
        with Guest(self.hub.port, upgrade_request(self.hub.port, **shown, **headers)) as guest:
            return status_of(guest.response)


@contextmanager
def reloading(redis: RedisServer, folder: Path, auth: dict[str, Any], **hub: Any) -> Iterator[Reloading]:
    file = folder / "broadcaster.toml"
    file.write_text(tomli_w.dumps({"auth": auth, "hub": hub}))
    with HubProcess(redis.url, BROADCASTER_CONFIG=str(file)) as process:
        process.said("events get through")
        yield Reloading(process, file, hub)
        assert not process.ended


def test_keys_change_and_who_has_a_good_one_notices_nothing(
    steady_redis: RedisServer, client: RedisClient, tmp_path: Path
) -> None:
    """A new key is good at once; the connections of one that is gone end with 4001, those of others go on."""
    both = keys(OLD, NEW)
    with reloading(steady_redis, tmp_path, keys(OLD)) as one:
        assert one.status(NEW) == 401
        with Guest(one.hub.port, upgrade_request(one.hub.port, **bearer(OLD))) as old:
            assert one.reload(both).endswith("were read again")
            with Guest(one.hub.port, upgrade_request(one.hub.port, **bearer(NEW))) as new:
                payload = event_payload()
                client.publish(payload)
                assert [guest.text().encode() for guest in (old, new)] == [payload, payload]
                one.reload(keys(NEW))
                assert old.close_code() == 4001
                client.publish(payload)
                assert new.text().encode() == payload
        assert (one.status(OLD), one.status(NEW)) == (401, 101)
        one.reload(keys(NEW, channels=("events.info",)))
        assert one.status(NEW) == 403


def test_a_key_that_is_replaced_is_gone_whatever_its_name(steady_redis: RedisServer, tmp_path: Path) -> None:
    """Who shows the old one, which may have leaked, is closed."""
    old, new = (keys(key) for key in (OLD, NEW))
    new["api_keys"][0]["name"] = old["api_keys"][0]["name"]
    with (
        reloading(steady_redis, tmp_path, old) as one,
        Guest(one.hub.port, upgrade_request(one.hub.port, **bearer(OLD))) as guest,
    ):
        one.reload(new)
        assert guest.close_code() == 4001
        assert (one.status(OLD), one.status(NEW)) == (401, 101)


def test_access_control_is_not_switched_while_it_runs(steady_redis: RedisServer, tmp_path: Path) -> None:
    """Where it may listen depends on it; and without the file that it began with, all would be default."""
    with reloading(steady_redis, tmp_path, keys(OLD)) as one:
        assert "nothing has changed: " in one.reload({"mode": "none"})
        assert one.status(None) == 401
        (tmp_path / "broadcaster.toml").unlink()
        one.hub.signal(signal.SIGHUP)
        one.hub.said("there is no config file")
        assert (one.status(None), one.status(OLD)) == (401, 101)


def test_the_file_of_the_folder_may_not_be_missing_either(steady_redis: RedisServer, tmp_path: Path) -> None:
    """The one that nobody has named."""
    file = tmp_path / "broadcaster.toml"
    file.write_text(tomli_w.dumps({"auth": keys(OLD)}))
    settings = {"BROADCASTER_REDIS__URL": steady_redis.url, "BROADCASTER_HUB__PORT": str(free_port())}
    with broadcaster("hub", cwd=tmp_path, **settings) as hub:
        hub.said("events get through")
        file.unlink()
        hub.signal(signal.SIGHUP)
        hub.said("nothing has changed: there is no config file broadcaster.toml any more")


def test_what_needs_a_restart_is_not_used_before(steady_redis: RedisServer, tmp_path: Path) -> None:
    """Neither what admission control goes by, nor with the rest of a table."""
    with reloading(steady_redis, tmp_path, {}, header_max_bytes=16_384) as one:
        table = {"channels": {"max_per_connection": 1}, "hub": {"handshake_timeout_s": 1.5}}
        (tmp_path / "broadcaster.toml").write_text(tomli_w.dumps(table))
        one.hub.signal(signal.SIGHUP)
        one.hub.said("; a restart is needed for channels.max_per_connection, hub.handshake_timeout_s")
        several = upgrade_request(one.hub.port, path="/ws?channel=events.a&channel=events.b")
        with Guest(one.hub.port, several) as guest:
            assert status_of(guest.response) == 101


def test_origins_and_limits_change(steady_redis: RedisServer, tmp_path: Path) -> None:
    with reloading(steady_redis, tmp_path, {}) as one:
        assert one.status(None, Origin="https://wall.example") == 403
        one.reload({}, allowed_origins=["https://wall.example"])
        assert one.status(None, Origin="https://wall.example") == 101
        with Guest(one.hub.port, upgrade_request(one.hub.port)):
            one.reload({}, max_connections=1)
            assert one.status(None) == 503


def test_what_needs_a_restart_is_said_and_what_is_wrong_changes_nothing(
    steady_redis: RedisServer, tmp_path: Path
) -> None:
    with reloading(steady_redis, tmp_path, keys(OLD)) as one:
        assert one.reload(keys(NEW), beat_interval_s=7, backlog=5).endswith(
            "; a restart is needed for hub.backlog, hub.beat_interval_s"
        )
        assert (one.status(OLD), one.status(NEW)) == (401, 101)
        for wrong in (keys(), keys(OLD) | {"jwt_keys": [{"algorithm": "EdDSA", "key": "x" * 40}]}, {"mode": "no"}):
            assert "nothing has changed: auth" in one.reload(wrong)
            assert (one.status(OLD), one.status(NEW)) == (401, 101)
        assert "nothing has changed: " in one.reload(keys(OLD), prove_interval_s=0)
        assert one.status(NEW) == 101


def test_a_certificate_is_renewed(steady_redis: RedisServer, tmp_path: Path) -> None:
    """Connections from then on see the new one; a broken file changes nothing."""
    first, second = (make(tmp_path, name) for name in ("first", "second"))
    shown = [str(tmp_path / name) for name in ("cert.pem", "key.pem")]

    def put(certificates: Certificates) -> None:
        shutil.copy(certificates.certificate, shown[0])
        shutil.copy(certificates.key, shown[1])

    def trusts(certificates: Certificates) -> bool:
        context = ssl.create_default_context(cafile=certificates.authority)
        try:
            return status_of(ask(one.hub.port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", context)) == 200
        except ssl.SSLCertVerificationError:
            return False

    put(first)
    with reloading(steady_redis, tmp_path, {}, tls_cert=shown[0], tls_key=shown[1]) as one:
        assert (trusts(first), trusts(second)) == (True, False)
        put(second)
        one.reload({})
        assert (trusts(first), trusts(second)) == (False, True)
        shutil.copy(first.certificate, shown[0])
        for key in (Path(second.key).read_text(), "no key"):
            Path(shown[1]).write_text(key)
            assert "nothing has changed: hub.tls_cert" in one.reload({})
            assert (trusts(first), trusts(second)) == (False, True)
        put(first)
        assert "nothing has changed: auth" in one.reload({"leeway_s": -1})
        assert (trusts(first), trusts(second)) == (False, True)
        one.reload({})
        assert (trusts(first), trusts(second)) == (True, False)


def clients_of(client: RedisClient, kind: str) -> dict[str, str]:
    """Who is connected to Redis: by the number of the connection its last command."""
    lines = client.command("CLIENT", "LIST", "TYPE", kind).decode().splitlines()
    fields = [dict(word.partition("=")[::2] for word in line.split()) for line in lines]
    return {each["id"]: each["cmd"] for each in fields if not each["cmd"].startswith("client")}


def test_the_password_of_redis_changes_and_no_connection_is_cut(
    redis: RedisServer, publish: RedisClient, tmp_path: Path
) -> None:
    """What is open stays; new connections log in with the new one, those for events over HTTP, too."""
    secret = tmp_path / "password"
    secret.write_text("old-word-7\n")
    publish.command("ACL", "SETUSER", "default", "resetpass", ">old-word-7", ">new-word-7")
    with HubProcess(redis.url, BROADCASTER_REDIS__PASSWORD_FILE=str(secret)) as hub:
        hub.until_ready()
        before = {kind: set(clients_of(publish, kind)) for kind in ("pubsub", "normal")}
        assert all(before.values())
        secret.write_text("new-word-7\n")
        hub.signal(signal.SIGHUP)
        hub.said("the password of Redis were read again")
        publish.command("ACL", "SETUSER", "default", "<old-word-7")
        assert {kind: set(clients_of(publish, kind)) for kind in before} == before
        for kind in before:
            publish.command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        eventually(lambda: hub.stats()["redis_reconnects"] == 1, "it does not come back")
        hub.until_ready()
        assert "restart is needed" not in hub.output
        assert "word-7" not in hub.output


AGAIN = {
    "another password": ("redis://hub:a@h/0", "redis://hub:b@h/0", True),
    "another user": ("redis://hub:a@h/0", "redis://other:a@h/0", True),
    "a password as an option": ("rediss://h/0?db=0&password=a", "rediss://h/0?db=0&password=b", True),
    "another host": ("redis://hub:a@h/0", "redis://hub:b@g/0", False),
    "another socket": ("unix:///run/a@1.sock", "unix:///run/b@1.sock", False),
    "another option": ("rediss://hub:a@h", "rediss://hub:b@h?ssl_cert_reqs=none", False),
}


@pytest.mark.parametrize(("before", "after", "is_used"), AGAIN.values(), ids=AGAIN.keys())
def test_only_who_logs_in_changes_not_where(before: str, after: str, is_used: bool) -> None:
    """In a URL, too; so it is with those of replicas."""
    old, new = (RedisTable(url=url, password=SecretStr(word)) for url, word in ((before, "1"), (after, "2")))
    used = _with_credentials(old, new)
    assert (used.url, used.password) == (after if is_used else before, SecretStr("2"))
    several = [RedisTable(subscribe_url=f"{url},redis://i:{word}@i/0") for url, word in ((before, 1), (after, 2))]
    assert _with_credentials(*several).subscribe_url == several[is_used].subscribe_url
