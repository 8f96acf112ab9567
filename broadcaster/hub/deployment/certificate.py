"""The certificate of a hub, for wss:// and https://; another one can take its place while the hub listens."""

from __future__ import annotations

import ssl

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.text import reason
from broadcaster.settings import HubTable


class Certificate:
    """What a hub shows to its clients.

    A context that is in use is never loaded again: OpenSSL takes a new certificate before it sees that the key is
    another one's, and from then on nobody can connect. So each connection is given the context of the moment.

    Attributes:
        context: For what listens.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        """Show the certificate of a context that `read` has made."""
        self.context = self._current = context
        context.sni_callback = self._show

    def use(self, context: ssl.SSLContext) -> None:
        """Show another one to those who connect from now on."""
        self._current = context

    def _show(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Called in every handshake, also where the client gives no name."""
        connection.context = self._current


def read(hub: HubTable) -> ssl.SSLContext | None:
    """A context with the certificate of the settings; None if there is none.

    Raises:
        ConfigurationError: It cannot be read, or is not the key's.
    """
    if not hub.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # A password that is no password: else the library asks for one on the terminal, and waits.
        context.load_cert_chain(hub.tls_cert, hub.tls_key, password="")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigurationError(
            f"hub.tls_cert, hub.tls_key: {hub.tls_cert}, {hub.tls_key}: {reason(error)}"
        ) from None
    return context
