"""TLS with Redis: the context for the options of a rediss:// URL, whose files it reads."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.text import reason


def tls_context(options: Mapping[str, Any]) -> ssl.SSLContext:
    """For the options of a rediss:// URL, which mean what they mean to redis-py.

    Raises:
        ConfigurationError: A file of them cannot be used; it says which one, and why.
    """
    authorities, folder = options.get("ssl_ca_certs"), options.get("ssl_ca_path")
    certificate, key = options.get("ssl_certfile"), options.get("ssl_keyfile")
    with _told(ssl_ca_path=folder):
        if folder:
            with os.scandir(folder):  # the library takes one that is not there for an empty one
                pass
    with _told(ssl_ca_certs=authorities):
        context = ssl.create_default_context(cafile=authorities, capath=folder)
    for name, file in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        with _told(**{name: file}):
            if file:  # of the two the library does not say which one it cannot read
                os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))
    if certificate:
        password = options.get("ssl_password", "")  # else the library asks for one on the terminal, and waits
        with _told(ssl_certfile=certificate, ssl_keyfile=key):
            context.load_cert_chain(certificate, key, password)
    elif key:
        raise ConfigurationError("ssl_keyfile is given without ssl_certfile: give both, or none")
    verify = options.get("ssl_cert_reqs", "required")
    context.check_hostname = options.get("ssl_check_hostname", True) and verify != "none"
    context.verify_mode = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL}.get(verify, ssl.CERT_REQUIRED)
    return context


_TAKES = {
    "ssl_ca_certs": "a readable PEM file of certificates",
    "ssl_ca_path": "a readable folder of certificates",
    "ssl_certfile": "a readable PEM file of a certificate, and of its key without ssl_keyfile",
    "ssl_keyfile": "the readable PEM file of its key",
}


@contextmanager
def _told(**files: str | None) -> Iterator[None]:
    """An error of one of these files says which option names it, and what that takes."""
    try:
        yield
    except (OSError, ValueError) as error:  # SSLError is an OSError
        named = {name: file for name, file in files.items() if file}
        where = ", ".join(f"{name}={file}" for name, file in named.items())
        takes = "; ".join(f"{name} takes {_TAKES[name]}" for name in named)
        raise ConfigurationError(f"{where}: {reason(error)} ({takes})") from None
