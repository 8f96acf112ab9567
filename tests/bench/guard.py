"""What a hub demands of its subscribers, and what they show."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from broadcaster.auth.tokens import create_token
from broadcaster.settings import AuthTable, JwtKey

_KEY: Final = "a key for measuring, of 32 bytes or more"
_TOKENS: Final = 5000


@dataclass(frozen=True, slots=True)
class Guard:
    """What a hub demands, and what its subscribers show.

    Attributes:
        env: Settings of the hub.
        options: For the load tool.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)


NO_GUARD: Final = Guard()


@contextmanager
def guard() -> Iterator[Guard]:
    """Access control with as many different tokens as there are subscribers (JWT, HS256)."""
    table = AuthTable(mode="token", jwt_keys=(JwtKey(algorithm="HS256", key=SecretStr(_KEY), kid="2026"),))
    env = {
        "BROADCASTER_AUTH__MODE": "token",
        "BROADCASTER_AUTH__JWT_KEYS": f'[{{"algorithm": "HS256", "key": "{_KEY}", "kid": "2026"}}]',
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokens")
        with file.open("w") as lines:
            for number in range(_TOKENS):
                token = create_token(table, f"s{number}", subscribe=["events.*"], publish=(), lasts_s=3600)
                lines.write(token + "\n")
        yield Guard(env, {"tokens": str(file)})
