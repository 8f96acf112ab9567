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
        raise ConfigurationError(f"subscriber.tls_ca: {authorities}: {reason(error)}") from None


def why_not_connected(error: Exception) -> str:
    """Why a connection failed, and what to do where its certificate is not known here."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{reason(error)} (if it is the right hub, give its certificate, or its CA's, as subscriber.tls_ca)"
    return reason(error)
