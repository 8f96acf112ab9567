"""Every command with every kind of wrong input: one line in words that names thing, place and remedy; one code."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.support import CommandLine, free_port

FILES = {
    "type.toml": b'[hub]\nport = "abc"\n',
    "unknown.toml": b"[hub]\nprot = 1\n",
    "no_table.toml": b"hub = 3\n",
    "cut.toml": b"[hub\n",
    "utf16.toml": "[hub]\n".encode("utf-16"),
    "latin.toml": b"[hub]\n# \xe9\n",
    "no_list.toml": b'[channels]\nallow = "events.*"\n',
    "mixed.toml": b'[channels]\nallow = ["events.*", 7, 8]\n',
    "junk.pem": b"no certificate\n",
    "list.json": b"[1]",
    "number.json": b'{"events.a": 7}',
    "words.json": b'{"events.a": "seven"}',
    "cut.json": b'{"events.a',
    "binary.json": b"\xff\xfe\x00",
    "deep.json": b"[" * 100_000,
}

WRONG_SETTINGS = """
    hub.port=abc  # whole number
    hub.port=  # whole number
    hub.port=1.5  # whole number
    hub.port=0  # at least 1
    hub.port=99999  # at most 65535
    hub.prot=1  # did you mean hub.port?
    hbu.port=1  # did you mean hub?
    hub=1  # --set takes table.key=value
    nonsense  # --set takes table.key=value
    hub.drain_s=x  # should be a number
    hub.drain_s=5s  # should be a number
    hub.drain_s=nan  # finite
    hub.drain_s=-1  # at least 0
    hub.max_connections=0  # more than 0
    hub.host=  # at least 1 character
    hub.host=0.0.0.0  # auth.mode
    hub.host=[::1  # should be a name or an address
    hub.host=[x]  # should be a name or an address
    hub.tls_cert=junk.pem  # hub.tls_key
    hub.allowed_origins=["x y"]  # scheme://host
    hub.allowed_origins=https://x  # should be a list
    history.enabled=maybe  # true or false
    history.dedupe_s=5  # history.dedupe_s from command line, publisher.publish_deadline_s from default
    channels.allow=events.*  # should be a list
    channels.allow=["a"  # should be a list
    channels.allow={}  # should be a list
    channels.allow=[1,2]  # item 1: should be a text
    channels.allow=["a","b c"]  # item 2: should be 1 to 128 of A-Z a-z 0-9 . _ : * ? [ ] ! -
    event.channel=a b  # channel must be 1 to 128
    event.max_bytes=1  # at least 256
    auth.mode=tokens  # should be none or token; did you mean token?
    auth.api_keys=[3]  # should be a table
    auth.api_keys=x  # list as in JSON
    auth.api_keys=[{"name":"x"}]  # item 1, key: is missing
    auth.api_keys=[{"name":"a b","key":"0123456789abcdef"}]  # item 1, name: should be 1 to 64 of
    auth.api_keys=[{"name":"a","key":"short"}]  # at least 16
    auth.api_keys=[{"name":"a","key":"0123456789abcdef","rights":1}]  # item 1: no such key: rights
    auth.jwt_keys=[{"algorithm":"HS512","key":"0123456789abcdef0123456789abcdef"}]  # HS256 or EdDSA
    loadtest.run=..  # name for a folder
    loadtest.run=a/b  # name for a folder
    fleet.processes=51  # fleet.clients
    redis.url=http://h  # redis://
    redis.url=redis://h/staging  # number of a database
    redis.url=redis://h/0?db=x  # db: it takes the number of a database
    redis.url=redis://h/0?socket_timeout=5s  # redis.silence_timeout_s
    redis.url=redis://h:x/0  # port
    subscriber.url=ws://a..b/ws  # valid host
    subscriber.url=ws://a/ws#x  # fragment
    subscriber.token=a b  # header
"""

WRONG_COMMANDS = """
    --config nowhere.toml config show  # 78 there is no config file nowhere.toml
    --config folder config show  # 78 folder is no file
    --config type.toml config show  # 78 hub.port: should be a whole number (got 'abc', from type.toml)
    --config unknown.toml config show  # 78 hub.prot: no such key (from unknown.toml); did you mean hub.port?
    --config no_table.toml config show  # 78 hub: should be a table
    --config cut.toml config show  # 78 cut.toml
    --config utf16.toml config show  # 78 save it as UTF-8
    --config latin.toml config show  # 78 latin.toml is no UTF-8, at byte
    --config no_list.toml config show  # 78 channels.allow: should be a list
    --config mixed.toml config show  # 78 channels.allow, item 2: should be a text
    --preset burts config show  # 78 did you mean burst?
    --preset ../x config show  # 78 a preset is a name
    loadtest --preset smok  # 78 did you mean smoke?
    loadtest --clients 0  # 2 --clients
    loadtest --results junk.pem  # 78 junk.pem is a file, and should be a folder
    hub --port abc  # 2 --port
    hub --port 0  # 78 hub.port
    hub extra  # 2 extra
    --set hub.tls_cert=nowhere --set hub.tls_key=nowhere hub  # 78 hub.tls_cert, hub.tls_key: nowhere
    --set hub.tls_cert=junk.pem --set hub.tls_key=junk.pem hub  # 78 no certificate in it as PEM
    --set hub.tls_cert=folder --set hub.tls_key=folder hub  # 78 is a directory
    --set redis.url=rediss://h/0?ssl_ca_certs=nowhere hub  # 78 redis.url: ssl_ca_certs=nowhere: no such file or
    --set redis.url=rediss://h/0?ssl_ca_certs=junk.pem hub  # 78 ssl_ca_certs=junk.pem: there is no certificate in
    --set redis.url=rediss://h/0?ssl_ca_certs=folder hub  # 78 ssl_ca_certs takes a readable PEM file
    --set redis.url=rediss://h/0?ssl_ca_path=nowhere hub  # 78 ssl_ca_path=nowhere: no such file or
    --set redis.url=rediss://h/0?ssl_ca_path=junk.pem hub  # 78 ssl_ca_path=junk.pem: not a directory
    --set redis.url=rediss://h/0?ssl_certfile=nowhere hub  # 78 ssl_certfile=nowhere: no such file or
    --set redis.url=rediss://h/0?ssl_certfile=junk.pem hub  # 78 ssl_certfile=junk.pem: there is no certificate in
    --set redis.url=rediss://h/0?ssl_certfile=junk.pem&ssl_keyfile=nowhere hub  # 78 ssl_keyfile=nowhere: no such
    --set redis.url=rediss://h/0?ssl_keyfile=junk.pem hub  # 78 ssl_keyfile is given without ssl_certfile
    --set redis.subscribe_url=rediss://h/0?ssl_ca_certs=nowhere hub  # 78 redis.subscribe_url: ssl_ca_certs=nowhere
    --set redis.url=rediss://h/0?ssl_ca_certs=nowhere redis  # 78 redis.url: ssl_ca_certs=nowhere
    --set redis.url=rediss://h/0?ssl_ca_certs=nowhere events  # 78 redis.url: ssl_ca_certs=nowhere
    --set redis.url=rediss://h/0?ssl_ca_certs=nowhere publish --type T --source s  # 78 redis.url: ssl_ca_certs=
    --set auth.mode=token hub  # 78 auth.jwt_keys
    fleet --clients many  # 2 --clients
    fleet --url nonsense  # 78 fleet.url: must begin with ws://
    fleet --url ws://h/ws?since=x  # 78 since is a position
    --set subscriber.tls_ca=nowhere fleet --url wss://127.0.0.1:1/ws  # 78 subscriber.tls_ca: nowhere
    report nowhere  # 65 there is no nowhere
    report folder  # 65 there is no broadcaster.toml
    report junk.pem  # 65 junk.pem is a file
    report  # 65 there is no run in results
    report --loadtest folder  # 2 --loadtest
    publish --source s  # 2 --type
    publish --type T --source s --count 0  # 2 --count
    publish --type T --source s --rate x  # 2 --rate
    publish --type '' --source s  # 2 event_type
    publish --type T --source ''  # 2 source must be
    publish --type T --source s --severity Critical  # 2 severity must be one of critical, warning, info
    publish --type T --source s --data x  # 2 data is not JSON
    publish --type T --source s --data '{"a":1,"a":2}'  # 2 data has a key twice
    publish --type T --source s --data '[1]'  # 2 a JSON object
    publish --type T --source s --channel 'events.*'  # 2 channel must be
    subscribe --channel 'events.*'  # 2 not a pattern such as
    subscribe --channel 'a b'  # 2 channel must be
    subscribe --severity Critical  # 2 severity
    subscribe --since x  # 2 since is a position
    subscribe --since 1-2 --resume-file r.json  # 2 --resume-file
    subscribe --resume-file list.json  # 78 list.json is no file of positions: it should have a JSON object
    subscribe --resume-file number.json  # 78 number.json is no file of positions: it should have a JSON object
    subscribe --resume-file words.json  # 78 words.json is no file of positions: a position is
    subscribe --resume-file cut.json  # 78 cut.json is no file of positions
    subscribe --resume-file binary.json  # 78 is no UTF-8
    subscribe --resume-file deep.json  # 78 nested too deeply
    subscribe --resume-file folder  # 2 is a directory
    subscribe --resume-file nowhere/x.json  # 78 nowhere/x.json
    subscribe --log folder  # 2 is a directory
    subscribe --log nowhere/x.log  # 78 nowhere/x.log
    subscribe --url http://h/ws  # 78 subscriber.url: must begin with ws://
    --set subscriber.tls_ca=nowhere subscribe --url wss://127.0.0.1:1/ws  # 78 subscriber.tls_ca: nowhere
    --set subscriber.tls_ca=junk.pem subscribe --url wss://127.0.0.1:1/ws  # 78 subscriber.tls_ca: junk.pem
    --set subscriber.tls_ca=folder subscribe --url wss://127.0.0.1:1/ws  # 78 subscriber.tls_ca: folder
    config shwo  # 2 did you mean 'show'
    config init junk.pem  # 78 junk.pem exists already
    config init nowhere/x.toml  # 78 nowhere/x.toml
    config init junk.pem/x.toml  # 78 junk.pem/x.toml
    token create  # 2 --name
    token create --name x --lasts 0  # 2 --lasts
    token create --name x --subscribe 'events.*'  # 78 auth.jwt_keys
    init junk.pem  # 78 junk.pem
    publihs  # 2 did you mean .*publish
"""

WRONG_VARIABLES = """
    HUB__PORT="9000"  # hub.port: the quotes are a part of the value
    HUB__PORT='9000'  # hub.port: the quotes are a part of the value
    HUB__HOST="127.0.0.1"  # hub.host: the quotes are a part of the value
    AUTH__MODE="token"  # auth.mode: the quotes are a part of the value
    HISTORY__ENABLED="true"  # history.enabled: the quotes are a part of the value
    REDIS__URL="redis://127.0.0.1/0"  # redis.url: the quotes are a part of the value
    SUBSCRIBER__TOKEN="secret-7"  # subscriber.token: the quotes are a part of the value
    LOADTEST__RESULTS="results"  # loadtest.results: the quotes are a part of the value
    CHANNELS__ALLOW='["events.*"]'  # channels.allow: the quotes are a part of the value
    PRESET="burst"  # a preset is a name .*: the quotes are a part of the value
    CHANNELS__ALLOW=events.*  # channels.allow: should be a list as in JSON
    HUB__PRT=1  # unknown environment variable .*did you mean BROADCASTER_HUB__PORT?
    HUB_PORT=1  # unknown environment variable .*did you mean BROADCASTER_HUB__PORT?
    SUBSCRIBER__TOKEN_FILE=nowhere  # subscriber.token_file: the file cannot be read
    SUBSCRIBER__TOKEN_FILE=folder  # subscriber.token_file: the file cannot be read
    CONFIG=nowhere  # there is no config file nowhere
    PRESET=burts  # did you mean burst?
"""

OF_THE_LANGUAGE = re.compile(
    r"\b(tuple|items|NoneType|object has no attribute|str|dict|dictionary|instance|pattern '|\^|literal|"
    r"argument of type|Traceback|Errno|codec|utf-8|ssl\.c|Input should|this is a bug)\b|_ssl|\[SSL"
)


def rows(table: str) -> list[tuple[str, str]]:
    """What is typed, and what is said to it."""
    pairs = (line.strip().partition("  # ") for line in table.strip().splitlines())
    return [(typed, said) for typed, _, said in pairs]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """A command in a folder with files of each wrong kind, where nothing runs."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("BROADCASTER_REDIS__URL", f"redis://127.0.0.1:{free_port()}/0")
    return CommandLine(tmp_path, monkeypatch, capsys)


def refused(run: CommandLine, line: str, code: int, said: str, **variables: str) -> None:
    """Hold a refusal: its code, its one line, and what is in it."""
    ended = run(*shlex.split(line), **variables)
    assert (ended.code, ended.stdout) == (code, "")
    complaints = [text for text in ended.stderr.splitlines() if text.lower().startswith("error: ")]
    assert len(complaints) == 1, ended.stderr
    assert code == 2 or ended.stderr.splitlines() == complaints
    wanted = said.replace("?", r"\?").replace("(", r"\(").replace(")", r"\)").replace("[ ]", r"\[ \]")
    wanted = re.sub(r"\* (?=\\)", r"\\* ", wanted)
    assert re.search(wanted, complaints[0], re.IGNORECASE), complaints[0]
    assert not OF_THE_LANGUAGE.search(complaints[0]), complaints[0]
    assert "secret-7" not in ended.stderr


@pytest.mark.parametrize(("assignment", "said"), rows(WRONG_SETTINGS))
def test_a_wrong_setting_is_told_in_words(assignment: str, said: str, run: CommandLine) -> None:
    """One line that names the key (or what is most like it), what it takes, and where it came from; 78."""
    refused(run, f"--set {shlex.quote(assignment)} config show", 78, said)


@pytest.mark.parametrize(("line", "said"), rows(WRONG_COMMANDS))
def test_a_wrong_command_is_told_in_words(line: str, said: str, run: CommandLine) -> None:
    """One line, before anything is connected or written."""
    code, _, words = said.partition(" ")
    refused(run, line, int(code), words)


@pytest.mark.parametrize(("variable", "said"), rows(WRONG_VARIABLES))
def test_a_wrong_variable_is_told_in_words(variable: str, said: str, run: CommandLine) -> None:
    """Also where Docker's --env-file has kept the quotes; no value that may be secret is shown."""
    name, _, value = variable.partition("=")
    os.environ.pop("BROADCASTER_REDIS__URL", None)
    refused(run, "config show", 78, said, **{f"BROADCASTER_{name}": value})
