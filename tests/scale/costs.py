"""What an event, a delivery, a connection and a channel cost: measured constants, kept in `costs.toml`."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

import tomli_w

FILE: Final = Path(__file__).with_name("costs.toml")


@dataclass(frozen=True, slots=True)
class Costs:
    """Constants of the model; times are CPU time on one core of the machine that they were measured on.

    Attributes:
        machine: Which one, and when.
        redis_event_us: Redis' time per published event, by how many connections are subscribed to its channel:
            pairs (connections, µs), in rising order. It is never idle meanwhile.
        redis_wake_us: What an event costs it more (or less) that finds it idle.
        redis_apply_us: A replica's time per event, besides that of its own subscribers.
        hub_event_us: A hub's time per event, besides its deliveries.
        hub_delivery_us: Its time per delivery, the kernel's part of the send included.
        hub_idle_us_per_s: Its time per second without events or subscribers.
        hub_connect_us: Its time to let one subscriber in.
        hub_resume_us: Its time per event that a resuming subscriber is given.
        receive_us: A subscriber's time per delivery; only of interest where both share a machine.
        link_us: From one process of the machine to another: between the last byte written and the first read.
        hub_bytes: Private memory of a hub with nobody connected.
        connection_bytes: Of each idle subscriber.
        channel_bytes: Of each open channel with few stored events.
        delivery_bytes: On the wire per delivery, of an event of `event_bytes`.
        event_bytes: Of the payload of the events that were measured.
    """

    machine: str
    redis_event_us: tuple[tuple[int, float], ...]
    redis_wake_us: float
    redis_apply_us: float
    hub_event_us: float
    hub_delivery_us: float
    hub_idle_us_per_s: float
    hub_connect_us: float
    hub_resume_us: float
    receive_us: float
    link_us: float
    hub_bytes: int
    connection_bytes: int
    channel_bytes: int
    delivery_bytes: int
    event_bytes: int

    @classmethod
    def load(cls, file: Path = FILE) -> Self:
        """Those of the file.

        Raises:
            TypeError: One is missing, or unknown.
        """
        table = tomllib.loads(file.read_text())
        table["redis_event_us"] = tuple((int(count), float(us)) for count, us in table["redis_event_us"])
        return cls(**table)

    def save(self, file: Path = FILE) -> None:
        """Write them, rounded to what was measured."""
        table = {name: _rounded(value) for name, value in asdict(self).items()}
        head = "# Measured by `python -m tests.scale measure`; what they mean: costs.py\n"
        file.write_text(head + tomli_w.dumps(table))

    def redis_us(self, subscribed: float) -> float:
        """Redis' time per event that so many connections get: interpolated between those that were measured.

        Beyond the last of them it grows as it did between the last two.
        """
        points = [(math.log(max(count, 0.5)), math.log(us)) for count, us in self.redis_event_us]
        at = math.log(max(subscribed, 0.5))
        upper = next((place for place, (x, _) in enumerate(points) if x >= at), len(points) - 1) or 1
        (x0, y0), (x1, y1) = points[upper - 1], points[upper]
        return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))

    def hub_us(self, deliveries: int) -> float:
        """A hub's time for one event with so many deliveries."""
        return self.hub_event_us + deliveries * self.hub_delivery_us

    def table(self) -> list[tuple[str, str]]:
        """Name and value of each, as text."""
        rows = []
        for name, value in asdict(self).items():
            if name == "redis_event_us":
                text = ", ".join(f"{count:,}: {us:,.0f}" for count, us in value)
            else:
                text = value if isinstance(value, str) else f"{value:,.4g}"
            rows.append((f"`{name}`", text))
        return rows


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, tuple):
        return [_rounded(each) for each in value]
    return value
