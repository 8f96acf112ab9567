"""Whom to believe that he is who he says: certificates for wss:// and https://."""

from __future__ import annotations

import ssl

from broadcaster.core.errors import ConfigurationError


def client_context(url: str, authorities: str) -> ssl.SSLContext | None:
    """What a connection to a URL needs; None where it is not encrypted.

    Args:
        url: ws://, wss://, http:// or https://.
        authorities: A file of certificates to trust, in PEM; empty: those of the system.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    if not url.startswith(("wss://", "https://")):
        return None
    try:
        return ssl.create_default_context(cafile=authorities or None)
    except OSError as error:  # SSLError is one
        raise ConfigurationError(f"{authorities}: {error}") from None
