"""`broadcaster status` and `restart`: all hubs of a deployment, as whichever of them is asked knows them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import Any, Final

import click

from broadcaster.cli.common import Number, cli, examples, fail, load_settings, say
from broadcaster.core import process
from broadcaster.core.errors import HubUnavailable
from broadcaster.core.redaction import redact
from broadcaster.core.runtime import CLOCK
from broadcaster.core.text import reason
from broadcaster.settings import Settings

_EVERY_S: Final = 1.0
_LOOK_EVERY_S: Final = 0.2
_COLUMNS: Final = ("hub", "address", "state", "version", "up", "connected", "behind", "events", "deliveries")
_COUNTERS: Final = ("connected", "behind", "events_received", "deliveries")


@cli.command(epilog=examples("broadcaster status", "broadcaster status --url ws://10.0.0.7:8765/ws --json"))
@click.option("--json", "as_json", is_flag=True, help="Print /stats: one JSON object, with --watch one a line.")
@click.option("--watch", is_flag=True, help="Again every second, until stopped.")
@click.option("--url", help="ws:// or wss:// address of any hub; default: the configured one.")
@click.pass_context
def status(context: click.Context, as_json: bool, watch: bool, url: str | None) -> None:
    """Show all hubs of a deployment.

    Exit code 0: all are there, ready, and of one version and settings (green); 1: not (yellow; red: none is
    ready); 69: no hub answers.
    """
    settings = load_settings(context, subscriber__url=url).settings

    async def main(stop: asyncio.Event) -> int:
        if not watch:
            numbers = await _ask(settings)
            say(json.dumps(numbers) if as_json else screen(numbers))
            return 0 if numbers.get("deployment", {}).get("status") == "green" else 1
        while not stop.is_set():
            try:
                numbers = await _ask(settings)
                said = json.dumps(numbers) if as_json else screen(numbers)
            except HubUnavailable as error:
                said = json.dumps({"error": str(error)}) if as_json else f"no hub: {error}"
            if not as_json:
                click.clear()
            say(said)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EVERY_S):
                    await stop.wait()
        return 0

    sys.exit(process.run(main))


@cli.command(
    epilog=examples(
        "broadcaster restart systemctl restart broadcaster-hub@{}",
        "broadcaster restart --within 120 ssh wall systemctl restart broadcaster-hub@{}",
    ),
    context_settings={"ignore_unknown_options": True},
)
@click.option("--url", help="ws:// or wss:// address of the hubs; default: the configured one.")
@click.option("--within", default=60.0, show_default=True, type=Number(1, 86_400), metavar="SECONDS",
              help="Until each has to be back.")  # fmt: skip
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def restart(context: click.Context, url: str | None, within: float, command: tuple[str, ...]) -> None:
    """Restart all hubs that share a port, one after another.

    COMMAND restarts one of them; {} in it is the number of the hub. The next one's turn is when that one is ready
    again, and the whole deployment green; if that does not come to pass, the others are left alone, and the exit
    code is 1.
    """
    settings = load_settings(context, subscriber__url=url).settings

    async def work() -> int:
        numbers = await _ask(settings)
        here = numbers["name"].rpartition("#")[0]
        if problems := numbers["deployment"]["problems"]:
            fail(f"nothing was restarted: {'; '.join(problems)}", 1)
        names = [hub["name"] for hub in numbers["deployment"]["hubs"] if hub["name"].rpartition("#")[0] == here]
        for name in sorted(names, key=lambda name: int(name.rpartition("#")[2])):
            begun_s = CLOCK.monotonic_s()
            words = [word.replace("{}", name.rpartition("#")[2]) for word in command]
            try:
                restarting = await asyncio.create_subprocess_exec(*words)
            except OSError as error:
                fail(f"cannot run {words[0]}: {reason(error)}; nothing more was restarted", 1)
            if code := await restarting.wait():
                fail(f"{name}: {' '.join(words)} has ended with {code}; the others were left alone", 1)
            if trouble := await _until_back(settings, name, begun_s, within):
                fail(f"{name} was not back within {within:g} s ({trouble}); the others were left alone", 1)
            say(f"{name} is back after {CLOCK.monotonic_s() - begun_s:.1f} s")
        return 0

    async def main(stop: asyncio.Event) -> int:
        return await process.code_of(stop, work())

    sys.exit(process.run(main))


async def _until_back(settings: Settings, name: str, begun_s: float, within_s: float) -> str:
    """Wait until a hub has begun after an instant, and all are green; else what is wrong."""
    while True:
        try:
            deployment = (await _ask(settings))["deployment"]
        except HubUnavailable as error:
            trouble = str(error)
        else:
            trouble = "; ".join(deployment["problems"])
            elapsed_s = CLOCK.monotonic_s() - begun_s
            if any(hub["name"] == name and hub["uptime_s"] > elapsed_s for hub in deployment["hubs"]):
                trouble = "it has not been restarted"
            if not trouble:
                return ""
        if CLOCK.monotonic_s() - begun_s > within_s:
            return trouble
        await asyncio.sleep(_LOOK_EVERY_S)


async def _ask(settings: Settings) -> dict[str, Any]:
    """The counters of the hub at the configured address.

    Raises:
        ConfigurationError: See `statistics`.
        HubUnavailable: The message says where it was looked for, and what to do.
    """
    from broadcaster.subscribe import hub_status

    url = hub_status.base_url(settings.subscriber_url)
    token = settings.subscriber.token.get_secret_value()
    try:
        return await hub_status.statistics(url, tls_ca=settings.subscriber.tls_ca, token=token)
    except hub_status.MonitoringRefused as error:
        raise HubUnavailable(f"{redact(url)}: {error}: give it as subscriber.token") from None
    except HubUnavailable as error:
        raise HubUnavailable(f"{redact(url)}: {error}; start a hub there, or give --url") from None


def screen(numbers: dict[str, Any]) -> str:
    """What `/stats` says of a deployment, as a table with what is not as it should be below."""
    deployment = numbers.get("deployment")
    if not isinstance(deployment, dict):
        return f"this hub has version {numbers.get('version', 'unknown')}, which knows of no others"
    hubs, missing = deployment["hubs"], deployment["missing"]
    rows = [_COLUMNS, *map(_row, hubs), *((name, "", "missing", *[""] * 6) for name in missing)]
    if len(hubs) > 1:
        # Each hub hears each event: a sum of these would say nothing.
        connected, behind, _, deliveries = (f"{numbers[key]:,}" for key in _COUNTERS)
        rows.append(("all", *[""] * 4, connected, behind, "", deliveries))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        f"deployment {deployment['name']}: {deployment['status']}, "
        f"{deployment['ready']} of {len(hubs) + len(missing)} hubs ready"
    ]
    for row in rows:
        cells = [
            cell.rjust(width) if column > 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += [f"! {problem}" for problem in deployment["problems"]]
    if databases := deployment["databases"]:
        others = ", ".join(map(str, databases))
        lines.append(
            f"There are hubs in database {others} of the same Redis, too, which store and read elsewhere."
        )
    return "\n".join(lines)


def _row(hub: dict[str, Any]) -> tuple[str, ...]:
    counts = (f"{hub[key]:,}" for key in _COUNTERS)
    return (hub["name"], hub["address"], hub["state"], hub["version"], _duration(hub["uptime_s"]), *counts)


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
