"""Redaction of passwords in URLs."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit


def redact(url: str) -> str:
    """The URL without its password, for logs and archives."""
    parts = urlsplit(url)
    if parts.password is None and "password=" not in parts.query.lower():
        return url
    user, at, address = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}:***{at}{address}" if ":" in user else parts.netloc
    query = re.sub(r"(?i)((?:^|&)password=)[^&]*", r"\1***", parts.query)
    return urlunsplit(parts._replace(netloc=netloc, query=query))
