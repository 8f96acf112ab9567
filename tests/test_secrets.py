"""No secret is ever shown: whatever it looks like, wherever it was given, whatever command runs or fails.

The secrets of these tests have two marks in them, with anything around: neither may be seen anywhere, so that half
a secret counts as a whole one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, quote_plus, unquote

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from broadcaster import Subscriber
from broadcaster.core import redaction
from broadcaster.core.errors import ConfigurationError, HubRefused, HubUnavailable
from broadcaster.core.logs import configure_logging
from broadcaster.core.redaction import hide, redact, scrub
from broadcaster.loadtest.fleet import Fleet
from broadcaster.settings import RedisTable, Settings, SubscriberTable, dump, load
from broadcaster.settings.tables import SECRETS
from broadcaster.subscribe import hub_status
from broadcaster.wire.bearer import authorization
from tests.fuzz import fuzzed
from tests.support import CommandLine, broadcaster, finished, free_port, run_async

MARKS = ("Zq7hunTer", "4xkSecr3t")

_NOISE = st.text(
    st.sampled_from("@:/?#%&=+ '\"\\\n\r\t[]{}$;,<>|~^`.-_0aZé€🚨")
    | st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    max_size=4,
)
SECRETS_OF_ANY_SHAPE = st.builds(
    lambda before, between, after: before + MARKS[0] + between + MARKS[1] + after, _NOISE, _NOISE, _NOISE
)


@pytest.fixture(autouse=True)
def nothing_hidden() -> Iterator[None]:
    """What other tests have hidden does not help these."""
    forget()
    yield
    forget()


def forget() -> None:
    redaction._known.clear()
    redaction._longest_first = None


def assert_unseen(*texts: str) -> None:
    for text in texts:
        for mark in MARKS:
            assert mark not in text
            assert mark not in unquote(text)


# Where secrets are given


def in_url(scheme: str, encode: Callable[[str], str] = str) -> Callable[[str], str]:
    return lambda secret: f"{scheme}://app:{encode(secret)}@127.0.0.1:1/{'0' if scheme[0] != 'w' else 'ws'}"


def keys(kind: str) -> Callable[[str], list[dict[str, str]]]:
    return lambda secret: [{kind: "HS256" if kind == "algorithm" else "wall", "key": f"{secret:x<32}"}]


PLACES: list[tuple[str, Callable[[str], Any]]] = [
    ("redis.url", in_url("redis")),
    ("redis.url", in_url("rediss", lambda secret: quote(secret, safe=""))),
    ("redis.url", in_url("unix")),
    ("redis.url", in_url("http")),
    ("redis.url", lambda secret: f"redis://{secret}@127.0.0.1:1/0"),
    ("redis.url", lambda secret: f"redis://127.0.0.1:1/0?password={quote_plus(secret)}"),
    ("redis.url", lambda secret: f"redis://127.0.0.1:1/0?passwrod={secret}"),
    ("redis.url", lambda secret: secret),
    ("redis.url", lambda secret: [secret]),
    ("redis.subscribe_url", in_url("redis")),
    ("redis.password", lambda secret: secret),
    ("redis.password", lambda secret: [secret]),
    ("subscriber.url", in_url("ws")),
    ("subscriber.url", in_url("wss", lambda secret: quote(secret, safe=""))),
    ("subscriber.url", in_url("https")),
    ("subscriber.url", lambda secret: f"ws://127.0.0.1:1/ws?access_token={secret}"),
    ("subscriber.url", lambda secret: f"ws://127.0.0.1:1/ws?token={quote(secret, safe='')}&channel=events.a"),
    ("subscriber.url", lambda secret: f"ws://127.0.0.1:1/ws#{secret}"),
    ("fleet.url", in_url("ws")),
    ("fleet.url", in_url("ws", lambda secret: quote(secret, safe=""))),
    ("subscriber.token", lambda secret: secret),
    ("subscriber.token", lambda secret: {secret: secret}),
    ("auth.api_keys", keys("name")),
    ("auth.jwt_keys", keys("algorithm")),
    ("auth.jwt_keys", lambda secret: [secret]),
    ("auth.jwt_keys", lambda secret: secret),
]

COMMANDS = (
    ("config", "show"),
    ("publish", "--type", "T", "--source", "s"),
    ("token", "create", "--name", "wall"),
    ("fleet", "--clients", "1"),
    ("report", "--loadtest", "--no-such-option"),
)


def given_in(layer: str, folder: Path, place: str, value: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """Arguments and variables that give this value in a layer."""
    table, key = place.split(".")
    text = value if isinstance(value, str) else json.dumps(value)
    variable = f"BROADCASTER_{table}__{key}".upper()
    if layer == "option":
        return ("--set", f"{place}={text}"), {}
    if layer == "variable":
        return (), {variable: text}
    if layer == "file of a variable":
        (folder / "secret").write_text(text, encoding="utf-8")
        return (), {f"{variable}_FILE": str(folder / "secret")}
    if layer == "file":
        (folder / "mine.toml").write_text(tomli_w.dumps({table: {key: value}}), encoding="utf-8")
    else:
        (folder / "mine.toml").write_text(tomli_w.dumps({table: value}), encoding="utf-8")
    return ("--config", "mine.toml"), {}


@fuzzed(250)
@given(
    SECRETS_OF_ANY_SHAPE,
    st.sampled_from(PLACES),
    st.sampled_from(("option", "variable", "file of a variable", "file", "instead of a table")),
    st.sampled_from(COMMANDS),
)
def test_no_secret_is_in_any_output(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    secret: str,
    place: tuple[str, Callable[[str], Any]],
    layer: str,
    command: tuple[str, ...],
) -> None:
    """Of any shape, in any setting and layer, valid or not: no command shows a part of it, nor a traceback."""
    key, value_of = place
    forget()
    with monkeypatch.context() as patch:
        run = CommandLine(tmp_path, patch, capsys)
        arguments, variables = given_in(layer, tmp_path, key, value_of(secret))
        patch.setenv("BROADCASTER_SUBSCRIBER__CONNECT_TIMEOUT_S", "0.5")
        variables = {"BROADCASTER_REDIS__URL": "redis://127.0.0.1:1/0", **variables}
        if any(name.endswith("_FILE") for name in variables):
            variables.pop(next(name for name in variables if name.endswith("_FILE")).removesuffix("_FILE"), None)
        ended = run(*arguments, *command, **variables)
    assert_unseen(ended.stdout, ended.stderr)
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ended.code in (0, 2, 69, 78)


USAGE_ERRORS = {
    "no argument is taken": ("subscribe", f"ws://wall:{MARKS[0]}@h/ws"),
    "nor a second one": ("config", "init", "a", f"ws://h/ws?token={MARKS[0]}"),
    "half an assignment": ("--set", f"subscriber.token:{MARKS[0]}", "config", "show"),
    "no such file": ("--config", f"redis://:{MARKS[0]}@h/0", "config", "show"),
    "no such preset": ("--preset", f"redis://:{MARKS[0]}@h/0", "config", "show"),
    "no such command": (f"redis://:{MARKS[0]}@h/0",),
    "no number": ("hub", "--port", f"redis://:{MARKS[0]}@h/0"),
}


@pytest.mark.parametrize("arguments", USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_an_address_in_the_wrong_place_is_redacted(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it is quoted because nothing like it is expected there."""
    ended = CommandLine(tmp_path, monkeypatch, capsys)(*arguments)
    assert ended.code in (2, 78)
    assert ended.stderr
    assert_unseen(ended.stdout, ended.stderr)


def test_the_traceback_of_a_bug_shows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither where it is asked for; what was loaded is struck out, in whatever form it is quoted."""
    secret = f"{MARKS[0]}/{MARKS[1]}"

    def fail(*arguments: object) -> None:
        raise RuntimeError(f"a bug with {secret!r} and {quote(secret, safe='')}")

    monkeypatch.setattr("broadcaster.cli.people.dump", fail)
    run = CommandLine(tmp_path, monkeypatch, capsys)
    ended = run("config", "show", BROADCASTER_SUBSCRIBER__TOKEN=secret, BROADCASTER_TRACEBACK="1")
    assert ended.code == 70
    assert "RuntimeError: a bug with '***' and ***" in ended.stderr
    assert_unseen(ended.stdout, ended.stderr)


@fuzzed(150)
@given(SECRETS_OF_ANY_SHAPE, st.sampled_from(["redis", "unix", "ws"]))
@example("p" + MARKS[0] + "@ss#" + MARKS[1], "redis")
@example("p" + MARKS[0] + "@ss/" + MARKS[1], "redis")
@example("p" + MARKS[0] + "@ss?" + MARKS[1], "redis")
def test_a_redacted_url_shows_nothing(secret: str, scheme: str) -> None:
    """Wherever a user may have put a secret into a URL; of what is ambiguous, not even half is shown."""
    for url in (
        in_url(scheme)(secret),
        in_url(scheme, quote)(secret),
        in_url(scheme, lambda text: quote(text, safe=""))(secret),
        f"{scheme}://:{secret}@h",
        f"{scheme}://h/ws?access_token={secret}",
        f"{scheme}://h/ws?{secret}",
        f"{scheme}://h/ws#{secret}",
    ):
        assert_unseen(redact(url))


@fuzzed(100)
@given(SECRETS_OF_ANY_SHAPE, st.text(max_size=20), st.text(max_size=20))
def test_what_is_hidden_is_found_in_every_form(secret: str, before: str, after: str) -> None:
    """As it is, percent-encoded, as JSON and as Python write it."""
    forget()
    hide(secret)
    forms = (secret, secret.strip(), quote(secret), quote(secret, safe=""), quote_plus(secret), repr(secret),
             ascii(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False))  # fmt: skip
    for form in forms:
        assert_unseen(scrub(f"{before} {form} {after}"))


@pytest.mark.parametrize(
    "text",
    [
        "the password of redis://127.0.0.1:6390/0 is not known",
        "waiting for the hub at ws://127.0.0.1:8765/ws?channel=events.a&since=1-2 (connection refused)",
        "redis: lost (redis://app:***@10.0.0.5/0); trying again",
        "events.critical: a bearer token is missing, https://wall.example/?page=2",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """Also if a password is a word that stands everywhere."""
    for word in ("password", "events", "redis", "6390", "bearer"):
        hide(word)
    assert scrub(text) == text


# Addresses that are refused

REFUSED = {
    "redis://app:p@ss#word@10.0.0.5/0": "percent-encode the password",
    "redis://app:p@ss/word@10.0.0.5/0": "percent-encode the password",
    "redis://app:p@ss?word@10.0.0.5/0": "percent-encode the password",
    "rediss://:p#word@10.0.0.5/0": "percent-encode the password",
    "redis://app:1/word@10.0.0.5/0": "percent-encode the password",
    "redis://app:p[word@10.0.0.5/0": "percent-encode the password",
    "redis://app:p word@10.0.0.5/0": "percent-encode the password",
    "unix://app:p@/word@/run/redis.sock": "percent-encode the password",
    "redis://app:p%zzword@10.0.0.5/0": "percent-encode the password",
    "redis://10.0.0.5/0?password=x&word=1": "percent-encode the password",
    "redis://10.0.0.5/0?password=x&word": "percent-encode the password",
    "redis://10.0.0.5/0?password=word+x": "percent-encode the password",
    "redis://10.0.0.5/0?password=word%": "percent-encode the password",
    "redis://10.0.0.5/0?password=x#word": "percent-encode the password",
    "unix://run/redis.sock": "no path of a socket",
    "redis://127.0.0.1:0/0": "no valid port",
    "ws://127.0.0.1:0/ws": "no valid port",
    "redis://127.0.0.1/0?db=word": "db: it takes the number of a database",
    "redis://127.0.0.1/0?db=-1": "db: it takes the number of a database",
    "redis://127.0.0.1/0?db=": "db: it takes the number of a database",
    "redis://127.0.0.1/0?db=1": "two databases",
    "redis://127.0.0.1/?db=1&db=1": "db more than once",
    "redis://127.0.0.1/0?socket_timeout=5s": "socket_timeout, which is not taken here (the setting is redis",
    "redis://127.0.0.1/0?foo=bar": "foo, which is not taken here",
    "redis://127.0.0.1/word": "no number of a database",
    "redis://127.0.0.1/1/2": "no number of a database",
    "redis://127.0.0.1/0#word": "fragment",
    "redis://127.0.0.1/0?ssl_cert_reqs=none": "ssl_cert_reqs, which is for rediss:// only",
    "rediss://127.0.0.1/0?ssl_cert_reqs=word": "none, optional or required",
    "rediss://127.0.0.1/0?ssl_check_hostname=word": "true or false",
    "rediss://127.0.0.1/0?ssl_ca_certs=": "a PEM file",
    "redis://a..b/0": "no valid host",
    "unix://": "no path of a socket",
    "ws://127.0.0.1:8765/ws#word": "fragment",
    "ws://127.0.0.1:8765/ws#": "fragment",
    "ws://a..b/ws": "no valid host",
    "ws://app:p/word@h/ws": "percent-encode the password",
    "ws://app:p@ss?word@h/ws": "percent-encode the password",
    "ws://word@h/ws": "a user without a password",
}


@pytest.mark.parametrize(("url", "words"), REFUSED.items(), ids=REFUSED)
def test_what_is_ambiguous_or_would_be_ignored_is_refused(url: str, words: str) -> None:
    """By the name of the option and what it takes, and with nothing of the value."""
    table, key = ("subscriber", "url") if url.startswith("ws") else ("redis", "url")
    with pytest.raises(ConfigurationError) as refused:
        load(overrides={table: {key: url}})
    said = str(refused.value)
    assert words in said
    assert said.startswith(f"{table}.{key}: ")
    assert "\n" not in said
    assert "word@" not in said
    assert "=word" not in said
    assert "has word" not in said
    assert "/word" not in said


_PEM = f"-----BEGIN PRIVATE KEY-----\n{MARKS[0] * 3}\n-----END PRIVATE KEY-----\n"

MISPLACED = {
    "url for a channel": ("event.channel", f"redis://app:{MARKS[0] * 30}@h/0"),
    "url for a number": ("hub.port", f"redis://app:{MARKS[0] * 30}@h/0"),
    "url for a list": ("channels.allow", [f"ws://wall:{MARKS[0] * 30}@h/ws"]),
    "key for its file": ("hub.tls_key", _PEM),
    "key for the authority": ("subscriber.tls_ca", _PEM),
    "key for a number": ("hub.port", _PEM),
}


@pytest.mark.parametrize(("key", "value"), MISPLACED.values(), ids=MISPLACED)
def test_a_secret_in_the_place_of_something_else_is_not_shown(key: str, value: object) -> None:
    """Not even as far as a long value is shown at all; a key is no name of a file."""
    table, name = key.split(".")
    with pytest.raises(ConfigurationError, match=rf"^{table}\.{name}(, item 1)?: .*may be secret") as refused:
        load(overrides={table: {name: value}})
    assert_unseen(str(refused.value))


def test_only_a_url_is_shown_in_part() -> None:
    """What is no URL may be the secret itself."""
    assert redact(MARKS[0]) == "***"
    assert (
        scrub(f"cannot read {_PEM!r}")
        == "cannot read '-----BEGIN PRIVATE KEY-----***-----END PRIVATE KEY-----\\n'"
    )


@pytest.mark.parametrize(
    "url",
    [
        "redis://app:p%40ss%23word%2F%3F@10.0.0.5/0",
        "redis://app:p@ss@10.0.0.5/0",
        "redis://10.0.0.5",
        "redis://10.0.0.5/",
        "redis://10.0.0.5?db=3",
        "redis://[::1]:6379/0",
        "rediss://h/0?ssl_cert_reqs=none&ssl_ca_path=/etc/ssl/certs",
        "unix:///run/redis@1.sock?db=2",
        "unix:///run/a%20b.sock",
    ],
)
def test_what_is_certain_is_taken(url: str) -> None:
    """White space around it is not a part of it."""
    assert load(overrides={"redis": {"url": f" {url}\n"}}).settings.redis.url == url


def test_a_subscriber_and_a_fleet_refuse_such_an_address() -> None:
    """As ConfigurationError, also without the settings."""
    for url in ("ws://127.0.0.1:8765/ws#x", "ws://a..b/ws", "ws://u:p@ss/word@h/ws", "http://h"):
        with pytest.raises(ConfigurationError, match="url"):
            Subscriber(url, settings=Settings.model_construct())
        with pytest.raises(ConfigurationError, match="url"):
            Fleet(url, clients=1, ramp_per_s=1.0)


# Tokens and keys


def test_white_space_around_a_secret_is_no_part_of_it() -> None:
    """In every layer, and from Python."""
    key = "k" * 40
    loaded = load(
        overrides={
            "subscriber": {"token": " abc\r\n"},
            "redis": {"password": "p w\n"},
            "auth": {"api_keys": [{"name": "wall", "key": f"{key}\n"}]},
        }
    ).settings
    assert loaded.subscriber.token.get_secret_value() == "abc"
    assert loaded.redis.password.get_secret_value() == "p w"
    assert loaded.auth.api_keys[0].key.get_secret_value() == key
    assert SubscriberTable(token=SecretStr("abc\n")).token.get_secret_value() == "abc"
    assert authorization("abc\n") == {"Authorization": "Bearer abc"}


WRONG_TOKENS = {"new line": "Zq7hunTer\n4xkSecr3t", "letter": "Zq7hunTer€", "space": "Zq7hunTer 4xkSecr3t"}


@pytest.mark.parametrize("token", WRONG_TOKENS.values(), ids=WRONG_TOKENS)
def test_a_token_that_no_header_can_carry_is_one_line(token: str, tmp_path: Path) -> None:
    """Exit code 78, at once, in the client and in the fleet; the token is not shown."""
    (tmp_path / "token").write_text(token, encoding="utf-8")
    for command in (("subscribe",), ("fleet",)):
        ended = finished(*command, BROADCASTER_SUBSCRIBER__TOKEN_FILE=str(tmp_path / "token"))
        assert ended.code == 78
        assert "no header can carry" in ended.complaint
        assert_unseen(ended.stdout, ended.stderr)


@pytest.mark.parametrize("token", WRONG_TOKENS.values(), ids=WRONG_TOKENS)
def test_a_subscriber_does_not_retry_with_such_a_token(token: str) -> None:
    """Given as text it is refused before anything is connected; a function's at the first attempt."""
    with pytest.raises(ConfigurationError) as refused:
        Subscriber("ws://127.0.0.1:1/ws", settings=Settings.model_construct(), token=token)
    assert_unseen(str(refused.value))

    async def main() -> None:
        async with Subscriber(
            "ws://127.0.0.1:1/ws", settings=Settings.model_construct(), token=lambda: token
        ) as subscriber:
            with pytest.raises(ConfigurationError) as late:
                await subscriber.receive()
            assert_unseen(*traceback.format_exception(late.value))

    run_async(main())


# Secrets from files


def test_every_secret_can_be_read_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With KEY_FILE in the environment, and `key_file` in TOML; `config show` says where it came from."""
    values = {
        "redis.url": "redis://app:word@h/0",
        "redis.subscribe_url": "redis://h/0",
        "redis.password": "p@ss#word",
        "subscriber.url": "ws://h/ws",
        "fleet.url": "ws://h/ws",
        "subscriber.token": "abc",
        "auth.api_keys": json.dumps(keys("name")("k")),
        "auth.jwt_keys": json.dumps(keys("algorithm")("k")),
    }
    assert values.keys() == SECRETS
    from_toml: dict[str, dict[str, str]] = {}
    for key, text in values.items():
        table, name = key.split(".")
        file = tmp_path / key
        file.write_text(f"{text}\n")
        from_toml.setdefault(table, {})[f"{name}_file"] = str(file)
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(from_toml))
    plain = load(
        overrides={
            table: {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{table}.")}
            for table in ("redis", "subscriber", "fleet")
        }
        | {"auth": {"api_keys": keys("name")("k"), "jwt_keys": keys("algorithm")("k")}}
    ).settings.model_dump()
    assert load(config=tmp_path / "mine.toml").settings.model_dump() == plain
    for key in values:
        monkeypatch.setenv(f"BROADCASTER_{key.replace('.', '__')}_FILE".upper(), str(tmp_path / key))
    loaded = load()
    assert loaded.settings.model_dump() == plain
    assert Settings().model_dump() == plain
    assert Settings(redis=RedisTable()).redis == RedisTable()
    for key in values:
        assert loaded.origins[key] == f"BROADCASTER_{key.replace('.', '__')}_FILE".upper()


def test_each_key_of_a_list_can_have_a_file_of_its_own(tmp_path: Path) -> None:
    """So a PEM file need not be written as JSON."""
    (tmp_path / "key").write_text("k" * 32 + "\n")
    for kind in ("name", "algorithm"):
        item = {**keys(kind)("")[0], "key_file": str(tmp_path / "key")}
        del item["key"]
        name = "api_keys" if kind == "name" else "jwt_keys"
        [found] = getattr(load(overrides={"auth": {name: [item]}}).settings.auth, name)
        assert found.key.get_secret_value() == "k" * 32


NO_FILES: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda folder: str(folder / "Zq7hunTer"), "No such file"),
    "folder": (str, "Is a directory"),
    "empty": (lambda folder: _written(folder, b" \n"), "it is empty"),
    "not text": (lambda folder: _written(folder, b"\xff\xfe\x00"), "it is not UTF-8"),
    "too large": (lambda folder: _written(folder, b"x" * (2**20 + 1)), "larger than 1 MiB"),
    "no name": (lambda folder: " ", "no name of a file"),
}


def _written(folder: Path, data: bytes) -> str:
    (folder / "file").write_bytes(data)
    return str(folder / "file")


@pytest.mark.parametrize(("path_in", "words"), NO_FILES.values(), ids=NO_FILES)
def test_a_file_without_a_secret_is_one_line(
    path_in: Callable[[Path], str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one, too: a connection without the token is not meant; what was given as its name is not shown."""
    monkeypatch.setenv("BROADCASTER_SUBSCRIBER__TOKEN_FILE", path_in(tmp_path))
    with pytest.raises(ConfigurationError, match=r"subscriber\.token_file: .*environment") as refused:
        load()
    assert words in str(refused.value)
    assert_unseen(str(refused.value))


def test_a_secret_is_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one layer either the value or the file; a higher layer wins as ever; other keys have no file."""
    (tmp_path / "token").write_text("from-file")
    monkeypatch.setenv("BROADCASTER_SUBSCRIBER__TOKEN_FILE", str(tmp_path / "token"))
    assert (
        load(overrides={"subscriber": {"token": "other"}}).settings.subscriber.token.get_secret_value() == "other"
    )
    monkeypatch.setenv("BROADCASTER_SUBSCRIBER__TOKEN", "plain")
    with pytest.raises(ConfigurationError, match=r"subscriber\.token and subscriber\.token_file are both given"):
        load()
    monkeypatch.delenv("BROADCASTER_SUBSCRIBER__TOKEN")
    monkeypatch.setenv("BROADCASTER_HUB__PORT_FILE", str(tmp_path / "token"))
    with pytest.raises(ConfigurationError, match="BROADCASTER_HUB__PORT_FILE"):
        load(strict=True)


@pytest.mark.parametrize("url", ["redis://h:1/0", "redis://app@h:1/0", "unix:///run/redis.sock?db=1"])
def test_the_password_of_its_own_goes_into_the_address(url: str) -> None:
    """As it is, without percent-encoding; where the address has one, that counts."""
    table = RedisTable(url=url, password=SecretStr("p@ss#/? word"))
    assert table.node_urls == (table.command_url,)
    assert table.command_url.replace(":p%40ss%23%2F%3F%20word@", "@").replace("//@", "//") == url
    assert RedisTable(url="redis://:a@h/0", password=SecretStr("b")).command_url == "redis://:a@h/0"


# Errors, logs, archives


@fuzzed(60)
@given(SECRETS_OF_ANY_SHAPE)
def test_an_error_of_the_settings_shows_nothing_to_programs(secret: str) -> None:
    """Whoever builds the tables in Python gets pydantic's errors, without their inputs."""
    for build in (
        lambda: RedisTable(url=f"redis://h/{secret}"),
        lambda: RedisTable(url=f"redis://:{secret}#@h"),
        lambda: SubscriberTable(url=f"ws://:{secret}#@h"),
        lambda: SubscriberTable(token=SecretStr(f"{secret} €")),
        lambda: Settings.model_validate(
            {"redis": secret, "auth": {"api_keys": [{"key": secret}], "jwt_keys": secret}}
        ),
    ):
        with pytest.raises(ValidationError) as refused:
            build()
        assert_unseen(str(refused.value), repr(refused.value), *traceback.format_exception(refused.value))


@fuzzed(60)
@given(SECRETS_OF_ANY_SHAPE)
def test_a_log_line_and_its_traceback_show_nothing(secret: str) -> None:
    """Of any library: what was loaded as a secret is struck out."""
    forget()
    lines: list[str] = []

    class Stream:
        def write(self, text: str) -> None:
            lines.append(text)

        def flush(self) -> None:
            """Nothing is kept back."""

    with contextlib.suppress(ConfigurationError):
        load(overrides={"redis": {"password": secret}})
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        configure_logging(Stream())  # type: ignore[arg-type]
        try:
            raise RuntimeError(f"cannot connect as {secret!r}")
        except RuntimeError:
            logging.getLogger("some.library").exception("failed with %s", quote(secret))
    finally:
        root.handlers[:], root.level = before
    assert_unseen("".join(lines))
    assert "RuntimeError: cannot connect as" in "".join(lines)


def test_the_archive_of_a_load_test_has_no_secret() -> None:
    """Its broadcaster.toml is what `dump` writes."""
    secret = MARKS[0]
    tables = load(
        overrides={
            "redis": {
                "url": f"redis://app:{secret}@h/0",
                "subscribe_url": f"redis://:{secret}@h/0",
                "password": secret,
            },
            "subscriber": {"url": f"ws://wall:{secret}@h/ws", "token": secret},
            "fleet": {"url": f"ws://h/ws?access_token={secret}&source=a"},
            "auth": {"api_keys": keys("name")(secret), "jwt_keys": keys("algorithm")(secret)},
        }
    ).settings
    text = dump(tables)
    assert_unseen(text)
    assert 'url = "ws://wall:***@h/ws"' in text
    assert 'url = "ws://h/ws?access_token=***&source=a"' in text


def test_the_status_of_a_hub_is_asked_for_with_the_password_and_said_without() -> None:
    """`/stats` behind a proxy that asks for a password."""
    url = hub_status.base_url(f"ws://wall:{MARKS[0]}@127.0.0.1:1/ws")

    async def main() -> None:
        with pytest.raises(HubUnavailable) as failed:
            await hub_status.wait_until_ready(url, within_s=0.01)
        assert_unseen(str(failed.value))
        assert "http://wall:***@127.0.0.1:1" in str(failed.value)

    run_async(main())


class Quoting(BaseHTTPRequestHandler):
    """A server that answers with the credentials it was sent."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        credentials = self.headers.get("Authorization", "none")
        if self.path == "/stats":
            basic = f"Basic {b64encode(b'wall:p@ss').decode()}"
            body = json.dumps({"ready": credentials == basic, "connected": 0}).encode()
            self.send_response(200)
        else:
            body = f"who is {credentials}?".encode()
            self.send_response(403, f"not for {credentials}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def quoting_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Quoting) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_server_that_quotes_the_token_is_not_quoted(quoting_port: int) -> None:
    """Neither by a subscriber, nor by a fleet."""
    url = f"ws://127.0.0.1:{quoting_port}/ws"

    async def main() -> None:
        subscriber = Subscriber(url, settings=Settings.model_construct(), token="".join(MARKS))
        async with subscriber:
            with pytest.raises(HubRefused, match=r"403 who is Bearer \*\*\*") as refused:
                await subscriber.receive()
        table = SubscriberTable(token=SecretStr("".join(MARKS)))
        fleet = Fleet(url, clients=1, ramp_per_s=100.0, subscriber=table)
        await fleet.connect()
        [failure] = fleet.result(1).failures
        assert "403 not for Bearer ***" in failure
        assert_unseen(str(refused.value), failure)

    run_async(main())


def test_a_proxy_that_asks_for_a_password_gets_that_of_the_address(quoting_port: int) -> None:
    """Also for `/stats`, which the load test reads; decoded."""
    url = hub_status.base_url(f"ws://wall:p%40ss@127.0.0.1:{quoting_port}/ws")
    assert run_async(hub_status.statistics(url))["ready"]


@pytest.mark.parametrize("role", ["hub", "subscribe"])
def test_a_process_that_waits_shows_nothing(role: str) -> None:
    """The hub for its Redis, a client for its hub: each says the address without the password."""
    words = {
        "hub": "waiting for Redis at redis://app:***@127.0.0.1:1/0",
        "subscribe": "waiting for the hub at ws://wall:***@127.0.0.1:1/ws?access_token=***",
    }[role]
    with broadcaster(
        role,
        BROADCASTER_HUB__PORT=str(free_port()),
        BROADCASTER_REDIS__URL=f"redis://app:{MARKS[0]}@127.0.0.1:1/0",
        BROADCASTER_SUBSCRIBER__URL=f"ws://wall:{MARKS[0]}@127.0.0.1:1/ws?access_token={MARKS[1]}",
        BROADCASTER_SUBSCRIBER__TOKEN=MARKS[1],
    ) as process:
        process.said(words)
    assert_unseen(process.output)
