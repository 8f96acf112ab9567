"""Settings: five layers, one commented file, one clear line per mistake, and no password anywhere."""

from __future__ import annotations

import codecs
import json
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.redaction import redact
from broadcaster.redis.server import RedisServer
from broadcaster.settings import Settings, assignment, dump, load
from tests.support import ROOT, CommandLine, broadcaster, clean_environment, eventually, finished, free_port

FILE = ROOT / "broadcaster.toml"
PRESETS = sorted((ROOT / "config").glob("*.toml"))
UNITS = {"_s": "second", "_ms": "millisecond", "_bytes": "byte", "_hz": "per second"}
"""Word that the comment of a key must have, by the ending of the key."""

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test begins in an empty folder, without the product's variables."""
    for variable in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain(settings: Settings) -> dict[str, dict[str, Any]]:
    """As TOML has them: lists are lists."""
    return settings.model_dump(mode="json")


def defaults() -> dict[str, dict[str, Any]]:
    return plain(Settings.model_construct())


# The commented file


def test_the_file_says_the_defaults_of_the_code() -> None:
    """broadcaster.toml has every table and key, in the code's order, with the code's defaults."""
    tables = tomllib.loads(FILE.read_text())
    assert tables == defaults()
    assert [list(keys) for keys in tables.values()] == [list(keys) for keys in defaults().values()]


def commented_keys() -> list[tuple[str, str]]:
    """`table.key` and its comment, as the text of the file has them."""
    found, table = [], ""
    for line in FILE.read_text().splitlines():
        if heading := re.match(r"\[(\w+)\]", line):
            table = heading[1]
        elif key := re.match(r'(\w+) = (?:"[^"]*"|[^#]*)(.*)', line):
            found.append((f"{table}.{key[1]}", key[2].strip()))
    return found


def test_every_key_of_the_file_has_a_comment() -> None:
    """Each key has a comment on its line, which says the unit that its name ends with."""
    comments = dict(commented_keys())
    assert set(comments) == {f"{table}.{key}" for table, keys in defaults().items() for key in keys}
    for key, comment in comments.items():
        assert re.match(r"# \S.{5,}", comment), f"{key} has no comment"
        for ending, unit in UNITS.items():
            assert not key.endswith(ending) or unit in comment, f"{key}: no {unit!r} in {comment!r}"


def test_the_presets_that_are_promised_exist() -> None:
    """The presets smoke, burst and fanout are there."""
    assert {"smoke", "burst", "fanout"} <= {preset.stem for preset in PRESETS}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_a_preset_is_short_and_loads(preset: Path) -> None:
    """A preset has 3 to 8 lines, begins with a comment, and changes something."""
    lines = preset.read_text().splitlines()
    assert 3 <= len(lines) <= 8
    assert lines[0].startswith("# ")
    loaded = load(config=FILE, preset=preset.stem)
    assert [key for key, origin in loaded.origins.items() if origin == preset.name]


# The layers

LAYERS = ("default", "broadcaster.toml", "quick.toml", "BROADCASTER_LOADTEST__EVENTS", "command line")


@pytest.mark.parametrize("highest", range(len(LAYERS)), ids=("default", "file", "preset", "environment", "option"))
def test_the_highest_layer_wins(highest: int, empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults < file < preset < environment < command line, and the origin says which it was."""
    (empty_folder / "config").mkdir()
    if highest >= 1:
        (empty_folder / "broadcaster.toml").write_text("[loadtest]\nevents = 1001\n")
    if highest >= 2:
        (empty_folder / "config/quick.toml").write_text("[loadtest]\nevents = 1002\n")
    if highest >= 3:
        monkeypatch.setenv("BROADCASTER_LOADTEST__EVENTS", "1003")
    overrides = {"loadtest": {"events": "1004"}} if highest >= 4 else {}
    loaded = load(preset="quick" if highest >= 2 else None, overrides=overrides)
    assert loaded.settings.loadtest.events == (50 if highest == 0 else 1000 + highest)
    assert loaded.origins["loadtest.events"] == LAYERS[highest]


def test_config_show_says_where_each_value_came_from(empty_folder: Path) -> None:
    """`broadcaster config show` is TOML of what holds, with the origin of each key, layers mixed in one table."""
    (empty_folder / "config").mkdir()
    (empty_folder / "broadcaster.toml").write_text('[hub]\nhost = "localhost"\nport = 1\nbacklog = 7\n')
    (empty_folder / "config/other.toml").write_text("[hub]\nport = 2\nring_bytes = 1000000\n")
    shown = finished(
        *("--preset", "other", "--set", "hub.shutdown_s=1.5", "config", "show"),
        cwd=empty_folder,
        BROADCASTER_HUB__PORT="3",
    )
    assert (shown.code, shown.stderr) == (0, "")
    hub = tomllib.loads(shown.stdout)["hub"]
    assert (hub["host"], hub["port"], hub["ring_bytes"], hub["shutdown_s"]) == ("localhost", 3, 1_000_000, 1.5)
    table = shown.stdout.partition("[hub]")[2].partition("[publisher]")[0]
    origins = {line.partition(" = ")[0]: line.partition("# ")[2] for line in table.strip().splitlines()}
    assert origins["host"] == origins["backlog"] == "broadcaster.toml"
    assert origins["ring_bytes"] == "other.toml"
    assert origins["port"] == "BROADCASTER_HUB__PORT"
    assert origins["shutdown_s"] == "command line"
    assert origins["behind_max_ms"] == "default"


def test_files_can_be_chosen_by_the_environment(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BROADCASTER_CONFIG names the file, BROADCASTER_PRESET a file in the folder config/ beside it."""
    folder = empty_folder / "elsewhere"
    (folder / "config").mkdir(parents=True)
    (folder / "mine.toml").write_text("[fleet]\nclients = 7\n")
    (folder / "config/tiny.toml").write_text("[loadtest]\nevents = 3\n")
    monkeypatch.setenv("BROADCASTER_CONFIG", str(folder / "mine.toml"))
    monkeypatch.setenv("BROADCASTER_PRESET", "tiny")
    settings = load().settings
    assert (settings.fleet.clients, settings.loadtest.events) == (7, 3)


def test_no_file_is_needed(empty_folder: Path) -> None:
    """Without any file, from any folder, the defaults hold."""
    shown = finished("config", "show", cwd=empty_folder)
    assert (shown.code, shown.stderr) == (0, "")
    assert tomllib.loads(shown.stdout) == defaults()
    assert {line.partition("# ")[2] for line in shown.stdout.splitlines() if " = " in line} == {"default"}


LISTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "one": ('["orders.*"]', ("orders.*",)),
    "several": ('["orders.*", "events.critical", "a?[b-d]:_-"]', ("orders.*", "events.critical", "a?[b-d]:_-")),
    "none": ("[]", ()),
}


@pytest.mark.parametrize(("text", "expected"), LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("key", ["allow", "priority"])
def test_a_list_can_be_set_in_every_layer(
    key: str, text: str, expected: tuple[str, ...], empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list is written the same way in the file, in a variable and behind --set, and shown as TOML."""
    (empty_folder / "broadcaster.toml").write_text(f"[channels]\n{key} = {text}\n")
    from_file = load()
    (empty_folder / "broadcaster.toml").unlink()
    with monkeypatch.context() as variables:
        variables.setenv(f"BROADCASTER_CHANNELS__{key.upper()}", text)
        from_environment = load()
    from_option = load(overrides=assignment(f"channels.{key}={text}"))
    for loaded in (from_file, from_environment, from_option):
        assert getattr(loaded.settings.channels, key) == expected
        shown = tomllib.loads(dump(loaded.settings, loaded.origins))
        assert shown == plain(loaded.settings)
        assert tuple(shown["channels"][key]) == expected


def test_three_variables_are_enough_for_a_hub(empty_folder: Path, redis: RedisServer) -> None:
    """A hub runs from an empty folder, told nothing but where Redis is and where to listen."""
    variables = {
        "BROADCASTER_REDIS__URL": redis.url,
        "BROADCASTER_HUB__HOST": "127.0.0.1",
        "BROADCASTER_HUB__PORT": str(free_port()),
    }
    with broadcaster("hub", cwd=empty_folder, **variables) as hub:
        hub.said(f"listening on ws://127.0.0.1:{variables['BROADCASTER_HUB__PORT']}/ws")
        hub.said("subscribed to events.critical")
    eventually(lambda: hub.process.returncode == 0, hub.output)
    assert not list(empty_folder.iterdir())


# Mistakes


@dataclass(frozen=True)
class Mistake:
    """What was done wrong, and what the one line about it must name."""

    name: str
    words: tuple[str, ...]
    file: str | bytes | None = None
    preset: str | None = None
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    problems: int = 1


MISTAKES = [
    Mistake("unknown_key_in_file", ("hub.prot", "broadcaster.toml"), file="[hub]\nprot = 1"),
    Mistake("unknown_table_in_file", ("hubb", "broadcaster.toml"), file="[hubb]\nport = 1"),
    Mistake("key_outside_of_a_table", ("port", "broadcaster.toml"), file="port = 1"),
    Mistake("value_instead_of_a_table", ("hub", "broadcaster.toml"), file="hub = 3"),
    Mistake("unknown_key_in_preset", ("hub.prot", "wrong.toml"), preset="[hub]\nprot = 1"),
    Mistake("unknown_key_in_option", ("hub.prot", "command line"), arguments=("--set", "hub.prot=1")),
    Mistake("unknown_table_in_option", ("hubb", "command line"), arguments=("--set", "hubb.port=1")),
    Mistake("malformed_option", ("--set", "hub.port"), arguments=("--set", "hub.port")),
    Mistake("text_for_a_number", ("hub.port", "abc", "broadcaster.toml"), file='[hub]\nport = "abc"'),
    Mistake("text_for_a_number_in_preset", ("hub.port", "abc", "wrong.toml"), preset='[hub]\nport = "abc"'),
    Mistake("text_for_a_number_in_option", ("hub.port", "abc", "command line"),
            arguments=("--set", "hub.port=abc")),
    Mistake("text_for_a_number_in_environment", ("hub.port", "abc", "BROADCASTER_HUB__PORT"),
            environment={"BROADCASTER_HUB__PORT": "abc"}),
    Mistake("empty_variable", ("hub.port", "BROADCASTER_HUB__PORT"), environment={"BROADCASTER_HUB__PORT": ""}),
    Mistake("out_of_range", ("hub.port", "70000"), environment={"BROADCASTER_HUB__PORT": "70000"}),
    Mistake("not_a_number", ("loadtest.rate_hz", "broadcaster.toml"), file="[loadtest]\nrate_hz = nan"),
    Mistake("bad_channel", ("event.channel", "a b"), file='[event]\nchannel = "a b"'),
    Mistake("run_outside_of_results", ("loadtest.run",), file='[loadtest]\nrun = "../elsewhere"'),
    Mistake("no_redis_url", ("redis.url",), file='[redis]\nurl = "http://127.0.0.1"'),
    Mistake("redis_port_no_number", ("redis.url",), file='[redis]\nurl = "redis://127.0.0.1:abc/0"'),
    Mistake("redis_port_too_large", ("redis.url",), file='[redis]\nurl = "redis://127.0.0.1:99999/0"'),
    Mistake("no_websocket_url", ("subscriber.url", "http://h"), file='[subscriber]\nurl = "http://h"'),
    Mistake("websocket_url_without_host", ("subscriber.url",), file='[subscriber]\nurl = "ws://"'),
    Mistake("websocket_port_no_number", ("fleet.url",), file='[fleet]\nurl = "ws://127.0.0.1:abc/ws"'),
    Mistake("no_toml", ("broadcaster.toml",), file="[hub\nport = 1"),
    Mistake("no_toml_in_preset", ("wrong.toml",), preset="[hub]\nport ="),
    Mistake("key_twice", ("broadcaster.toml",), file="[hub]\nport = 1\nport = 2"),
    Mistake("not_utf8", ("broadcaster.toml",), file=b'[hub]\nhost = "\xff"'),
    Mistake("missing_named_file", ("nowhere.toml",), arguments=("--config", "nowhere.toml")),
    Mistake("missing_file_of_the_environment", ("nowhere.toml",),
            environment={"BROADCASTER_CONFIG": "nowhere.toml"}),
    Mistake("missing_preset", ("nope", "wrong"), preset="", arguments=("--preset", "nope")),
    Mistake("missing_preset_of_the_environment", ("nope",), environment={"BROADCASTER_PRESET": "nope"}),
    Mistake("preset_is_a_path", ("../wrong",), arguments=("--preset", "../wrong")),
    Mistake("mistyped_table_in_variable", ("BROADCASTER_HUBB__PORT",),
            environment={"BROADCASTER_HUBB__PORT": "1"}),
    Mistake("mistyped_key_in_variable", ("BROADCASTER_HUB__PROT",),
            environment={"BROADCASTER_HUB__PROT": "1"}),
    Mistake("variable_without_table", ("BROADCASTER_PORT",), environment={"BROADCASTER_PORT": "1"}),
    Mistake("variable_of_a_whole_table", ("BROADCASTER_HUB",), environment={"BROADCASTER_HUB": '{"port": 1}'}),
    Mistake("ring_too_small_for_events", ("hub.ring_bytes", "event.max_bytes"),
            file="[hub]\nring_bytes = 262144\n[event]\nmax_bytes = 100000"),
    Mistake("padding_beyond_the_limit", ("publisher.payload_bytes", "event.max_bytes"),
            file="[publisher]\npayload_bytes = 70000"),
    Mistake("silence_shorter_than_pings", ("redis.silence_timeout_s", "redis.ping_interval_s"),
            file="[redis]\nsilence_timeout_s = 0.5"),
    Mistake("more_processes_than_clients", ("fleet.processes", "fleet.clients"),
            file="[fleet]\nclients = 2\nprocesses = 3"),
    Mistake("no_subscribe_url", ("redis.subscribe_url",), file='[redis]\nsubscribe_url = "127.0.0.1:6379"'),
    Mistake("subscribe_port_no_number", ("redis.subscribe_url",),
            file='[redis]\nsubscribe_url = "redis://127.0.0.1:abc/0"'),
    Mistake("dedupe_shorter_than_retries", ("history.dedupe_s", "publisher.publish_deadline_s"),
            file="[history]\ndedupe_s = 10\n[publisher]\npublish_deadline_s = 10.0"),
    Mistake("history_of_nothing", ("history.max_events", "broadcaster.toml"), file="[history]\nmax_events = 0"),
    Mistake("history_without_end", ("history.max_events",), file="[history]\nmax_events = 10000001"),
    Mistake("history_expires_at_once", ("history.idle_expire_s",), file="[history]\nidle_expire_s = 0"),
    Mistake("half_seconds_where_redis_has_none", ("history.dedupe_s", "30.5"), file="[history]\ndedupe_s = 30.5"),
    Mistake("maybe", ("history.enabled", "maybe", "BROADCASTER_HISTORY__ENABLED"),
            environment={"BROADCASTER_HISTORY__ENABLED": "maybe"}),
    Mistake("nothing_may_wait", ("publisher.max_unanswered",), file="[publisher]\nmax_unanswered = 0"),
    Mistake("no_time_to_publish", ("publisher.publish_deadline_s",), file="[publisher]\npublish_deadline_s = 0"),
    Mistake("no_beats", ("hub.beat_interval_s",), file="[hub]\nbeat_interval_s = 0"),
    Mistake("no_proofs", ("hub.prove_interval_s",), file="[hub]\nprove_interval_s = -1.0"),
    Mistake("bad_pattern", ("channels.allow", "a b", "broadcaster.toml"),
            file='[channels]\nallow = ["events.*", "a b"]'),
    Mistake("pattern_with_newline", ("channels.priority",), file='[channels]\npriority = ["events.*\\n"]'),
    Mistake("empty_pattern", ("channels.allow",), file='[channels]\nallow = [""]'),
    Mistake("endless_pattern", ("channels.allow",), file=f'[channels]\nallow = ["{"x" * 129}"]'),
    Mistake("too_many_patterns", ("channels.allow",), file=f"[channels]\nallow = {['a'] * 101}"),
    Mistake("text_for_a_list", ("channels.allow", "events.*", "broadcaster.toml"),
            file='[channels]\nallow = "events.*"'),
    Mistake("text_for_a_list_in_environment", ("channels.allow", "BROADCASTER_CHANNELS__ALLOW"),
            environment={"BROADCASTER_CHANNELS__ALLOW": "events.*"}),
    Mistake("half_a_list_in_environment", ("channels.allow", "BROADCASTER_CHANNELS__ALLOW"),
            environment={"BROADCASTER_CHANNELS__ALLOW": '["events.*"'}),
    Mistake("too_many_channels_of_one", ("channels.max_per_connection",),
            file="[channels]\nmax_per_connection = 65"),
    Mistake("two_at_once", ("hub.port", "hub.prot"), file='[hub]\nport = "abc"\nprot = 1', problems=2),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_clear_line(
    mistake: Mistake, empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each mistake in the configuration is one line that names it, exit code 78, and never a traceback."""
    arguments = mistake.arguments
    if isinstance(mistake.file, str):
        (empty_folder / "broadcaster.toml").write_text(mistake.file)
    elif mistake.file is not None:
        (empty_folder / "broadcaster.toml").write_bytes(mistake.file)
    if mistake.preset is not None:
        (empty_folder / "config").mkdir()
        (empty_folder / "config/wrong.toml").write_text(mistake.preset)
        arguments = arguments or ("--preset", "wrong")
    ended = CommandLine(empty_folder, monkeypatch, capsys)(*arguments, "config", "show", **mistake.environment)
    lines = ended.stderr.splitlines()
    assert (ended.code, ended.stdout, len(lines)) == (78, "", mistake.problems), ended.stderr
    assert all(line.startswith("error: ") for line in lines)
    assert all(word in ended.stderr for word in mistake.words), ended.stderr


@pytest.mark.parametrize("role", ["redis", "hub", "publisher", "fleet", "subscribe", "publish"])
def test_no_role_starts_on_a_mistake(role: str, empty_folder: Path) -> None:
    """Every subcommand that reads settings refuses a mistyped variable with the same line."""
    options = ("--type", "T", "--source", "s") if role == "publish" else ()
    ended = finished(role, *options, cwd=empty_folder, BROADCASTER_HUBB__PORT="1")
    assert (ended.code, ended.stdout) == (78, "")
    assert "BROADCASTER_HUBB__PORT" in ended.complaint


def test_mistakes_from_python_are_one_exception(empty_folder: Path) -> None:
    """`load` raises ConfigurationError with one line per problem, and no chain of causes."""
    (empty_folder / "broadcaster.toml").write_text('[hub]\nport = "abc"\n')
    with pytest.raises(ConfigurationError, match=r"hub\.port: .*got 'abc', from broadcaster\.toml") as caught:
        load()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    "text", ["hub.port", "port=1", "hub=1", "hub.port.x=1", "=", ""],
    ids=["no_value", "no_table", "no_key", "three_parts", "nothing", "empty"],
)  # fmt: skip
def test_an_assignment_has_one_form(text: str) -> None:
    """`--set` takes `table.key=value` and nothing else."""
    with pytest.raises(ConfigurationError, match=r"table\.key=value"):
        assignment(text)


def test_an_assignment_keeps_its_value_as_it_is() -> None:
    """What stands behind the first = is the value, further ones included."""
    assert assignment("redis.url=redis://h/0?a=b") == {"redis": {"url": "redis://h/0?a=b"}}


# The password

URLS_WITH_PASSWORD = {
    "user_and_password": f"redis://user:{SECRET}@127.0.0.1:1/0",
    "password_only": f"redis://:{SECRET}@127.0.0.1:1/0",
    "password_with_at": f"redis://:{SECRET}@x@127.0.0.1:1/0",
    "tls": f"rediss://user:{SECRET}@127.0.0.1:1/0",
    "unix": f"unix://user:{SECRET}@/tmp/redis.sock?db=0",
    "in_the_query": f"redis://127.0.0.1:1/0?password={SECRET}",
}


@pytest.mark.parametrize("key", ["url", "subscribe_url"])
@pytest.mark.parametrize("url", URLS_WITH_PASSWORD.values(), ids=URLS_WITH_PASSWORD.keys())
def test_the_password_is_in_no_text_of_the_settings(url: str, key: str) -> None:
    """repr, str, dump and redact show where Redis is, and not how to get in."""
    loaded = load(overrides={"redis": {key: url}})
    assert getattr(loaded.settings.redis, key) == url
    texts = (repr(loaded), str(loaded), repr(loaded.settings), str(loaded.settings), repr(loaded.settings.redis),
             dump(loaded.settings), dump(loaded.settings, loaded.origins), redact(url))  # fmt: skip
    assert not [text for text in texts if SECRET in text]
    assert redact(url).partition("://")[0] == url.partition("://")[0]
    assert "@x@" in url or redact(url).endswith(url.partition("@")[2].partition("?password")[0])


SEVERAL = ["redis://user:word@a:1/0", "rediss://b:2?ssl_cert_reqs=none", "unix:///run/c,d.sock"]
"""One of them has a comma of its own."""


@pytest.mark.parametrize(
    "written",
    [SEVERAL, ",".join(SEVERAL), "  " + " , ".join(SEVERAL), json.dumps(SEVERAL)],
    ids=["list", "commas", "spaces", "JSON"],
)
def test_several_replicas_are_a_list_or_have_commas_between_them(
    written: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In TOML, on the command line, in the environment; each is shown without its password."""
    loaded = load(overrides={"redis": {"subscribe_url": written}})
    if isinstance(written, str):
        monkeypatch.setenv("BROADCASTER_REDIS__SUBSCRIBE_URL", written)
        assert load().settings.redis == loaded.settings.redis
    assert loaded.settings.redis.node_urls == tuple(SEVERAL)
    shown = "redis://user:***@a:1/0,rediss://b:2?ssl_cert_reqs=none,unix:///run/c,d.sock"
    assert f'subscribe_url = "{shown}"' in dump(loaded.settings)
    assert load(overrides={"redis": {"subscribe_url": shown}}).settings.redis.subscribe_url == shown


def test_a_replica_has_the_database_of_its_master() -> None:
    """It may be left out; another one is a contradiction."""
    master = "redis://m/3"
    assert load(overrides={"redis": {"url": master, "subscribe_url": "redis://r"}})
    assert load(overrides={"redis": {"url": master, "subscribe_url": "redis://r/3"}})
    with pytest.raises(ConfigurationError, match="subscribe_url names database 1, url 3"):
        load(overrides={"redis": {"url": master, "subscribe_url": ["redis://r/3", "redis://r:1/1"]}})


def test_config_show_strikes_the_password_out(empty_folder: Path) -> None:
    """`broadcaster config show` shows both URLs without their passwords."""
    url = URLS_WITH_PASSWORD["user_and_password"]
    shown = finished(
        *("config", "show"),
        cwd=empty_folder,
        BROADCASTER_REDIS__URL=url,
        BROADCASTER_REDIS__SUBSCRIBE_URL=url.replace(":1/", ":2/"),
    )
    assert shown.code == 0
    assert '\nurl = "redis://user:***@127.0.0.1:1/0"' in shown.stdout
    assert '\nsubscribe_url = "redis://user:***@127.0.0.1:2/0"' in shown.stdout
    assert SECRET not in shown.stdout + shown.stderr


MISTAKES_WITH_PASSWORD = {
    "wrong_scheme": f'[redis]\nurl = "http://user:{SECRET}@h"',
    "wrong_port": f'[redis]\nurl = "redis://user:{SECRET}@h:abc/0"',
    "not_a_url": f'[redis]\nurl = "redis://[:{SECRET}@h/0"',
    "no_text": f'[redis]\nurl = ["redis://:{SECRET}@h"]',
    "wrong_scheme_to_subscribe": f'[redis]\nsubscribe_url = "http://user:{SECRET}@h"',
    "wrong_port_to_subscribe": f'[redis]\nsubscribe_url = "redis://user:{SECRET}@h:abc/0"',
    "no_text_to_subscribe": f'[redis]\nsubscribe_url = [["redis://:{SECRET}@h"]]',
    "one_of_several_to_subscribe": f'[redis]\nsubscribe_url = ["redis://h", "redis://:{SECRET}@h:abc"]',
    "twice_to_subscribe": f'[redis]\nsubscribe_url = "redis://:{SECRET}@h,redis://:{SECRET}@h"',
    "another_database_to_subscribe": f'[redis]\nsubscribe_url = "redis://:{SECRET}@h/1"',
    "value_instead_of_a_table": f'redis = "redis://:{SECRET}@h"',
    "mistyped_key": f'[redis]\nulr = "redis://:{SECRET}@h"',
    "mistyped_table": f'[rdis]\nurl = "redis://:{SECRET}@h"',
    "another_key_is_wrong": f'[redis]\nurl = "redis://:{SECRET}@h"\nping_interval_s = "abc"',
    "values_contradict": f'[redis]\nurl = "redis://:{SECRET}@h"\nping_interval_s = 9.0',
}


@pytest.mark.parametrize("text", MISTAKES_WITH_PASSWORD.values(), ids=MISTAKES_WITH_PASSWORD.keys())
def test_the_password_is_in_no_error(text: str, empty_folder: Path) -> None:
    """A mistake in or beside redis.url is told without what may be its password."""
    (empty_folder / "broadcaster.toml").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load()
    assert SECRET not in str(caught.value)
    assert "redis" in str(caught.value) or "rdis" in str(caught.value)


@pytest.mark.parametrize("role", ["redis", "publish"])
def test_the_password_is_in_no_complaint_about_redis(role: str, empty_folder: Path) -> None:
    """Who cannot reach Redis says so without the password."""
    options = ("--type", "T", "--source", "s") if role == "publish" else ()
    url = f"rediss://user:{SECRET}@127.0.0.1:{free_port()}/0"
    ended = finished(role, *options, cwd=empty_folder, BROADCASTER_REDIS__URL=url)
    assert ended.code == 69
    assert "edis" in ended.complaint
    assert SECRET not in ended.stdout + ended.stderr


# config init


def test_config_init_writes_the_defaults(empty_folder: Path) -> None:
    """`broadcaster config init` writes a file with every key that loads back to the defaults."""
    ended = finished("config", "init", cwd=empty_folder)
    assert (ended.code, ended.stdout, ended.stderr) == (0, "wrote broadcaster.toml\n", "")
    assert tomllib.loads((empty_folder / "broadcaster.toml").read_text()) == defaults()
    loaded = load()
    assert plain(loaded.settings) == defaults()
    assert set(loaded.origins.values()) == {"broadcaster.toml"}


def test_config_init_takes_a_name(empty_folder: Path) -> None:
    """`broadcaster config init other.toml` writes there."""
    assert finished("config", "init", "other.toml", cwd=empty_folder).code == 0
    assert [path.name for path in empty_folder.iterdir()] == ["other.toml"]
    assert plain(load(config=Path("other.toml")).settings) == defaults()


def test_config_init_leaves_a_file_alone(empty_folder: Path) -> None:
    """An existing file is refused with one line, and stays as it is."""
    (empty_folder / "broadcaster.toml").write_text("# mine\n")
    ended = finished("config", "init", cwd=empty_folder)
    assert (ended.code, ended.stdout) == (78, "")
    assert "broadcaster.toml" in ended.complaint
    assert (empty_folder / "broadcaster.toml").read_text() == "# mine\n"


def test_config_init_where_nothing_can_be_written(empty_folder: Path) -> None:
    """A folder that is not there is one line, not a traceback."""
    ended = finished("config", "init", "nowhere/broadcaster.toml", cwd=empty_folder)
    assert ended.code not in (0, 1)
    assert "nowhere" in ended.complaint


# The typed object


def test_settings_are_frozen() -> None:
    """No part of the settings can be changed once they are loaded."""
    settings = load().settings
    with pytest.raises(ValidationError):
        settings.hub.port = 1
    with pytest.raises(ValidationError):
        settings.hub = settings.hub.model_copy()
    assert settings.hub.port == 8765


HUB_URLS = {
    "loopback": ("127.0.0.1", "http://127.0.0.1:8765"),
    "name": ("hub.example", "http://hub.example:8765"),
    "everywhere": ("0.0.0.0", "http://127.0.0.1:8765"),
    "everywhere_6": ("::", "http://[::1]:8765"),
    "ipv6": ("::1", "http://[::1]:8765"),
}


@pytest.mark.parametrize(("host", "url"), HUB_URLS.values(), ids=HUB_URLS.keys())
def test_the_hub_is_found_where_it_listens(host: str, url: str) -> None:
    """The hub's addresses are made from hub.host, unless subscriber.url or fleet.url say another one."""
    everybody = {"open_to_network": True}
    settings = load(overrides={"hub": {"host": host}, "auth": everybody}).settings
    assert settings.hub_url == url
    websocket = "ws" + url.removeprefix("http") + "/ws"
    assert settings.subscriber_url == settings.fleet_url == websocket
    other = {"url": "wss://h/ws"}
    settings = load(
        overrides={"hub": {"host": host}, "auth": everybody, "subscriber": other, "fleet": other}
    ).settings
    assert settings.subscriber_url == settings.fleet_url == "wss://h/ws"
    assert settings.hub_url == url


# Variables of others, and near misses

OTHERS = {
    "BROADCASTER_PORT": "tcp://10.96.1.1:8765",
    "BROADCASTER_SERVICE_HOST": "10.96.1.1",
    "BROADCASTER_SERVICE_PORT": "8765",
    "BROADCASTER_SERVICE_PORT_WS": "8765",
    "BROADCASTER_PORT_8765_TCP": "tcp://10.96.1.1:8765",
    "BROADCASTER_PORT_8765_TCP_ADDR": "10.96.1.1",
    "BROADCASTER_PORT_8765_TCP_PORT": "8765",
    "BROADCASTER_PORT_8765_TCP_PROTO": "tcp",
    "BROADCASTER_HUB_PORT": "tcp://10.96.1.2:9000",
    "BROADCASTER_HUB_SERVICE_HOST": "10.96.1.2",
    "BROADCASTER_NAME": "/app/broadcaster",
    "BROADCASTER_VERSION": "1.2",
}


@pytest.mark.parametrize(("name", "value"), OTHERS.items(), ids=OTHERS.keys())
def test_what_an_orchestrator_sets_for_a_service_of_this_name_is_not_ours(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert load(strict=True).settings.hub.port == 8765


NEAR_MISSES = {
    "BROADCASTER_HUBB__PORT": "BROADCASTER_HUB__PORT",
    "BROADCASTER_HUB_PORT": "BROADCASTER_HUB__PORT",
    "broadcaster_hub_port": "BROADCASTER_HUB__PORT",
    "BROADCASTER_REDIS_URL": "BROADCASTER_REDIS__URL",
    "BROADCASTER_CONFG": "BROADCASTER_CONFIG",
    "BROADCASTER_HUB__MAX_CONECTIONS": "BROADCASTER_HUB__MAX_CONNECTIONS",
}


@pytest.mark.parametrize(("name", "meant"), NEAR_MISSES.items(), ids=NEAR_MISSES.keys())
def test_a_near_miss_is_refused_by_the_command_line_and_logged_by_the_library(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, "9000")
    with pytest.raises(
        ConfigurationError, match=f"^unknown environment variable {name}; did you mean {meant}\\?$"
    ):
        load(strict=True)
    load()
    assert f"unknown environment variable {name}; did you mean {meant}?" in caplog.text


def test_a_mistyped_key_and_preset_are_told_what_was_meant(tmp_path: Path) -> None:
    (tmp_path / "broadcaster.toml").write_text("[hub]\nmax_conections = 5\n[redsi]\nurl = ''\n")
    with pytest.raises(ConfigurationError) as told:
        load(config=tmp_path / "broadcaster.toml")
    assert "hub.max_conections: no such key (from broadcaster.toml); did you mean hub.max_connections?" in str(
        told.value
    )
    with pytest.raises(ConfigurationError, match=r"did you mean burst\?"):
        load(preset="bursts")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (codecs.BOM_UTF8 + b"[hub]\nport = 9000\n", ""),
        ("[hub]\nport = 9000\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"[hub]\nhost = '\xff'\n", "is no UTF-8, at byte 14"),
    ],
    ids=["a mark of UTF-8", "UTF-16", "Latin-1"],
)
def test_files_of_other_editors(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "broadcaster.toml"
    file.write_bytes(content)
    if said:
        with pytest.raises(ConfigurationError, match=said):
            load(config=file)
    else:
        assert load(config=file).settings.hub.port == 9000


@pytest.mark.parametrize("host", ["[::1]", "::1", " ::1 ", "[0:0:0:0:0:0:0:1]"])
def test_an_address_may_be_in_brackets(host: str) -> None:
    """As a URL has it; in URLs it has them always."""
    settings = load(overrides={"hub": {"host": host, "port": 9000}}).settings
    assert settings.hub.host == "::1"
    assert settings.local_websocket_url == "ws://[::1]:9000/ws"
