"""The live page, in a real Chromium."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcaster.core.event import draft
from broadcaster.publish.publisher_sync import PublisherSync
from broadcaster.redis.server import RedisServer
from tests.clients.browser import Tab
from tests.clients.conftest import Kit
from tests.clients.nginx import nginx
from tests.clients.publishing import publish
from tests.faults.ledger import settings_for
from tests.support import Hub, HubProcess, HubThread, Proxy, eventually, redis_client

WATCH = (
    "window.wrong = []; window.alert = () => window.wrong.push('a script ran');"
    "addEventListener('error', (event) => window.wrong.push(event.message), true);"
    "addEventListener('unhandledrejection', (event) => window.wrong.push(String(event.reason)));"
    "addEventListener('securitypolicyviolation', (event) => window.wrong.push(event.violatedDirective))"
)


@contextlib.contextmanager
def live_page(kit: Kit, port: int, query: str = "", *, until: str = "live") -> Iterator[Tab]:
    """The page in a tab of its own; nothing may have gone wrong in it at the end."""
    tab = kit.browser.open(f"http://127.0.0.1:{port}/health/live")
    try:
        tab.call("Page.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/{query}")
        eventually(lambda: text(tab, "#state") == until, f"the page is not {until}", 20)
        yield tab
        assert tab.evaluate("JSON.stringify(window.wrong)") == "[]"
    finally:
        tab.close()


def text(tab: Tab, selector: str) -> str:
    found: str = tab.evaluate(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")
    return found


def rows(tab: Tab) -> list[list[str]]:
    """What is in the document, newest first: severity, type, source of each row, or the text of a gap."""
    script = (
        "JSON.stringify([...document.querySelectorAll('#rows .row:not([hidden])')]"
        ".sort((a, b) => a.ariaPosInSet - b.ariaPosInSet)"
        ".map((row) => [...row.children].slice(0, 3).map((part) => part.textContent)))"
    )
    found: list[list[str]] = json.loads(tab.evaluate(script))
    return found


def shown(tab: Tab) -> int:
    return int(text(tab, "#count").partition(" ")[0].replace(",", "") or 0)


def key(tab: Tab, name: str) -> None:
    for kind in ("keyDown", "keyUp"):
        typed = {"text": name} if kind == "keyDown" and len(name) == 1 else {}
        tab.call("Input.dispatchKeyEvent", type=kind, key=name, **typed)


def test_the_last_fifty_and_then_live(kit: Kit, redis: RedisServer, hub: Hub) -> None:
    """Newest first; only what is seen is in the document; the keyboard opens an event."""
    publish(redis.url, *({"number": number} for number in range(60)))
    with live_page(kit, hub.port) as tab:
        eventually(lambda: shown(tab) == 50, "not the last fifty")
        publish(redis.url, *({"number": number} for number in range(60, 300)))
        eventually(lambda: shown(tab) == 290, "they do not come")
        assert len(rows(tab)) < 100
        tab.evaluate("document.querySelector('#list').focus()")
        for name in ("Home", "ArrowDown", "Enter"):
            key(tab, name)
        eventually(lambda: text(tab, "#detail-json"), "it does not open")
        assert json.loads(text(tab, "#detail-json"))["data"] == {"number": 298}


EVIL = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>${alert(3)}{{alert(4)}}<svg/onload=alert(5)>"


def test_no_text_of_an_event_is_markup(kit: Kit, redis: RedisServer, hub: Hub) -> None:
    """Every field that a publisher writes, also those that nobody knows: shown as it is, and nothing runs."""
    fields: dict[str, Any] = json.loads(draft(EVIL, EVIL, 1, data={EVIL: [EVIL, {EVIL: EVIL}]}).stamp(1))
    with live_page(kit, hub.port) as tab, redis_client(redis) as client:
        client.publish(json.dumps({**fields, EVIL: EVIL, "__proto__": {"kind": EVIL}, "control": EVIL}).encode())
        eventually(lambda: shown(tab) == 1, "it does not come")
        assert rows(tab) == [["critical", EVIL, EVIL]]
        tab.evaluate("document.querySelector('.row').click()")
        assert EVIL in json.loads(text(tab, "#detail-json"))["data"]
        assert text(tab, "#detail-title") == f"{EVIL} – {EVIL}"
        query = "'#rows img, #rows script, #rows svg, #detail img, #detail script, #detail svg'"
        assert tab.evaluate(f"document.querySelectorAll({query}).length") == 0


@pytest.mark.parametrize(
    "query", [f"?type={'%3Cscript%3Ealert(1)%3C/script%3E'}", "?kiosk=%22%3E%3Cimg%20src=x%3E"]
)
def test_nor_is_one_of_the_url(kit: Kit, steady_hub: Hub, query: str) -> None:
    """A link that somebody sends."""
    with live_page(kit, steady_hub.port, query) as tab:
        assert tab.evaluate("document.querySelectorAll('body script, body img').length") == 0


def test_filters_are_in_the_url(kit: Kit, redis: RedisServer, hub: Hub) -> None:
    """What is typed gets there, and a page that is opened with it shows the same."""
    with PublisherSync(settings_for(redis.url)) as publisher, live_page(kit, hub.port) as tab:
        tab.evaluate(
            "const form = document.querySelector('#filters'); form.elements.type.value = 'A, B c';"
            "form.elements.severity.value = 'critical warning'; form.requestSubmit()"
        )
        url = tab.evaluate("location.search")
        assert url == "?type=A&type=B+c&severity=critical&severity=warning"
        with live_page(kit, hub.port, url) as other:
            hub.until_connected(2)
            for kind, severity in (("A", "info"), ("A", "warning"), ("C", "critical"), ("B c", "critical")):
                publisher.publish(kind, "s", severity=severity)
            for page in (tab, other):
                page.call("Page.bringToFront")
                eventually(lambda page=page: len(rows(page)) > 1, "they do not come")  # type: ignore[misc]
                assert [row[1] for row in rows(page)] == ["B c", "A"]
                assert page.evaluate("document.querySelector('#filters').elements.type.value") == "A, B c"


def test_a_pause_counts_what_waits(kit: Kit, redis: RedisServer, hub: Hub) -> None:
    """The list stands still; nothing is lost when it goes on."""
    with live_page(kit, hub.port) as tab:
        publish(redis.url, {"number": 0})
        eventually(lambda: shown(tab) == 1, "it does not come")
        key(tab, "p")
        publish(redis.url, *({"number": number} for number in range(1, 11)))
        eventually(lambda: text(tab, "#pause") == "Resume (10 waiting)", "it does not count")
        assert shown(tab) == 1
        key(tab, "p")
        eventually(lambda: shown(tab) == 11, "they do not come")


def test_it_says_loudly_what_it_does_not_see(kit: Kit, redis: RedisServer) -> None:
    """Without heartbeats it is blind; what has expired meanwhile is told; and it comes back by itself."""
    with (
        HubProcess(redis.url, None, BROADCASTER_HUB__BEAT_INTERVAL_S="0.3") as hub,
        Proxy(hub.until_ready().port) as proxy,
        live_page(kit, proxy.port) as tab,
    ):
        publish(redis.url, {"number": 0})
        eventually(lambda: shown(tab) == 1, "it does not come")
        hub.signal(signal.SIGKILL)
        eventually(lambda: text(tab, "#blind").startswith("BLIND: no connection"), "it is not said", 20)
        assert tab.evaluate("document.title").startswith("⚠")
        publish(redis.url, *({"number": number} for number in range(1, 9)))
        with redis_client(redis) as client:
            client.command("XTRIM", "{events.critical}:log", "MAXLEN", "3")
        with HubThread(redis.url) as other:
            proxy.target_port = other.until_ready().port
            eventually(lambda: text(tab, "#state") == "live", "it does not come back", 30)
            eventually(lambda: shown(tab) == 5, "events are missing")
            assert text(tab, "#blind") == ""
            assert text(tab, "#missing").startswith("Events are missing: 1 gap, the last one 5 events, expired")
            assert rows(tab)[3][1].startswith("▲ 5 events missing: expired")


CARELESS = """\
        location / {
            proxy_pass http://hub;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            %s
        }
"""
"""A location of somebody who has read no document of ours: answers are buffered."""

TUNNEL = 'proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";'


def numbers(tab: Tab) -> list[int]:
    """Of the events that are shown, oldest first."""
    return sorted(int(row[2]) for row in rows(tab))


def test_behind_a_proxy_that_cuts_what_is_silent_nothing_is_missing(
    kit: Kit, redis: RedisServer, tmp_path: Path
) -> None:
    """Its patience is shorter than the time between two heartbeats: cut again and again, and back each time."""
    location = CARELESS % f"proxy_read_timeout 1s; {TUNNEL}"
    with (
        HubThread(redis.url, None, BROADCASTER_HUB__BEAT_INTERVAL_S="4") as hub,
        nginx(tmp_path, hub.until_ready().port, location=location) as port,
        PublisherSync(settings_for(redis.url)) as publisher,
        live_page(kit, port) as tab,
    ):
        for number in range(4):
            opened = hub.stats()["opened"]
            eventually(lambda opened=opened: hub.stats()["opened"] > opened, "it is not cut, or stays away", 30)  # type: ignore[misc]
            publisher.publish("T", str(number))
        eventually(lambda: numbers(tab) == [0, 1, 2, 3], f"{rows(tab)}", 30)
        assert tab.evaluate("document.querySelector('#missing').hidden")


def test_behind_a_proxy_without_websockets_events_come_at_once(
    kit: Kit, redis: RedisServer, tmp_path: Path
) -> None:
    """As a stream, which the hub asks the proxy not to buffer."""
    with (
        HubThread(redis.url) as hub,
        nginx(tmp_path, hub.until_ready().port, location=CARELESS % "") as port,
        PublisherSync(settings_for(redis.url)) as publisher,
        live_page(kit, port, until="live over SSE") as tab,
    ):
        publisher.publish("T", "1")
        eventually(lambda: numbers(tab) == [1], "it does not come", 3)


def test_behind_a_proxy_that_holds_everything_back_it_says_that_it_is_blind(
    kit: Kit, redis: RedisServer, tmp_path: Path
) -> None:
    """A stream of which nothing gets through; and as soon as something does, the page is live by itself."""
    location = CARELESS % "proxy_ignore_headers X-Accel-Buffering; proxy_buffers 8 64k; proxy_buffer_size 64k;"
    (tmp_path / "held").mkdir()
    with (
        HubThread(redis.url) as hub,
        PublisherSync(settings_for(redis.url)) as publisher,
        contextlib.ExitStack() as stack,
    ):
        port = stack.enter_context(nginx(tmp_path / "held", hub.until_ready().port, location=location))
        way = stack.enter_context(Proxy(port))
        with live_page(kit, way.port, until="connecting") as tab:
            eventually(
                lambda: text(tab, "#blind").startswith("BLIND"), f"it is not said: {text(tab, '#state')}", 30
            )
            publisher.publish("T", "1")
            way.target_port = hub.port
            eventually(lambda: text(tab, "#state") == "live", "it does not come back", 60)
            eventually(lambda: numbers(tab) == [1], "it does not come")


def test_a_link_to_an_event_opens_it(kit: Kit, redis: RedisServer, hub: Hub) -> None:
    """As long as it is stored."""
    event = publish(redis.url, *({"number": number} for number in range(100)))[7]
    with live_page(kit, hub.port, f"?channel={event.channel}&at={event.position}") as tab:
        eventually(lambda: text(tab, "#detail-json"), "it does not open")
        assert json.loads(text(tab, "#detail-json"))["event_id"] == event.event_id
        eventually(lambda: shown(tab) == 93, "not the event and all that came after it")


def test_a_token_is_asked_for_and_kept_nowhere(kit: Kit, redis: RedisServer) -> None:
    """Without one the page says so; with one it is live, sends a test event, and knows nothing after a reload."""
    token = "0123456789abcdef~wall"
    keys = [{"name": "wall", "key": token, "subscribe": ["events.*"], "publish": ["events.*"], "monitor": True}]
    variables = {"BROADCASTER_AUTH__MODE": "token", "BROADCASTER_AUTH__API_KEYS": json.dumps(keys)}
    with HubThread(redis.url, None, **variables) as hub:
        hub.until_ready()
        with live_page(kit, hub.port, until="refused") as tab:
            eventually(lambda: tab.evaluate("document.querySelector('#ask').open"), "it does not ask")
            for given, state in (("wrong" * 5, "refused"), (token, "live")):
                tab.evaluate(
                    f"document.querySelector('#ask-token').value = {json.dumps(given)};"
                    "document.querySelector('#ask button[value=use]').click()"
                )
                eventually(lambda state=state: text(tab, "#state") == state, f"not {state}")  # type: ignore[misc]
            eventually(lambda: "Subscribers" in text(tab, "#tiles"), "no counters")
            tab.evaluate("document.querySelector('#test-event').click()")
            eventually(lambda: rows(tab), "the test event does not come")
            assert rows(tab)[0] == ["info", "TEST", "live page"]
            kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
            assert token not in tab.evaluate(kept)
            assert token not in tab.evaluate("document.documentElement.outerHTML")
            tab.call("Page.reload")
            eventually(lambda: text(tab, "#state") == "refused", "it knows the token still")


def test_a_wrong_filter_is_said(kit: Kit, steady_hub: Hub) -> None:
    """The hub's own sentence; and the filter can be mended."""
    with live_page(kit, steady_hub.port, "?channel=no+such", until="refused") as tab:
        assert "channel" in text(tab, "#blind")
        tab.evaluate("document.querySelector('#filters').reset()")
        eventually(lambda: text(tab, "#state") == "live", "it stays refused")
