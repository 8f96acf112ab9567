"""What a subscriber wants of a channel: by type, source and severity of an event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Labels(NamedTuple):
    """What filters look at."""

    event_type: str
    source: str
    severity: str

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Labels:
        """The labels of a valid event."""
        return cls(fields["event_type"], fields["source"], fields.get("severity", "critical"))


@dataclass(frozen=True, slots=True)
class Filter:
    """Wanted values per label, any of them; an empty set wants all. Equal filters are one for the hub.

    Attributes:
        types: Of `event_type`.
        sources: Of `source`.
        severities: Of `severity`.
    """

    types: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    severities: frozenset[str] = frozenset()

    def wants(self, labels: Labels) -> bool:
        return (
            (not self.types or labels.event_type in self.types)
            and (not self.sources or labels.source in self.sources)
            and (not self.severities or labels.severity in self.severities)
        )

    def __bool__(self) -> bool:
        """Whether it holds anything back."""
        return bool(self.types or self.sources or self.severities)


EVERYTHING = Filter()
