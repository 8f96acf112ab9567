"""TLS verification: the context of a client for wss:// and https://."""

from __future__ import annotations

import ssl

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.text import reason


def client_context(url: str, authorities: str) -> ssl.SSLContext | None:
    """The TLS context for a connection to `url`; None where it is not encrypted.

    Args:
        url: ws://, wss://, http:// or https://.
        authorities: A PEM file of certificates for TLS verification; empty: those of the system.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    if not url.startswith(("wss://", "https://")):
        return None
    try:
        return ssl.create_default_context(cafile=authorities or None)
    except OSError as error:  # SSLError is one
        raise ConfigurationError(f"{authorities}: {reason(error)}") from None
