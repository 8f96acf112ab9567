"""A real nginx in front of a hub, with the location that docs/security.md shows."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import pwd
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.clients.programs import program
from tests.support import ROOT, Running, eventually, free_port

SHOWN_UPSTREAM = "http://127.0.0.1:8765"

_CONFIGURATION = """\
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 512; }}
http {{
    log_format reused "$request_method $uri $status $upstream_status $upstream_connect_time";
    access_log {folder}/access.log reused;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream hub {{
        server 127.0.0.1:{hub};
        keepalive 16;
    }}
    server {{
        listen 127.0.0.1:{port}{tls};
{location}
        location ~ ^/(health|stats|publish) {{
            proxy_pass http://hub;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


def shown_location() -> str:
    """The location as the document shows it, word for word."""
    blocks = re.findall(
        r"^```[^\n]*\n(.*?)^```", (ROOT / "docs/security.md").read_text(), re.MULTILINE | re.DOTALL
    )
    [block] = [block for block in blocks if "proxy_pass" in block]
    assert SHOWN_UPSTREAM in block
    return str(block)


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(signed.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


@contextlib.contextmanager
def nginx(
    folder: Path, hub_port: int, *, upstream: str = "http://hub", tls: bool = False, location: str = ""
) -> Iterator[int]:
    """An nginx on a free port in front of a hub; yields the port. Its log is in the folder.

    Args:
        folder: Of its own, for all that it writes.
        hub_port: Where the hub listens.
        upstream: What stands for the hub's address in the location that is shown.
        tls: Whether it speaks TLS, with cert.pem and key.pem of the folder.
        location: Instead of the one that is shown.
    """
    path, port = program("nginx", "/usr/sbin/nginx"), free_port()
    cert = f" ssl;\n        ssl_certificate {folder}/cert.pem;\n        ssl_certificate_key {folder}/key.pem"
    configuration = _CONFIGURATION.format(
        folder=folder,
        hub=hub_port,
        port=port,
        tls=cert if tls else "",
        location=location or shown_location().replace(SHOWN_UPSTREAM, upstream),
        user=f"user {pwd.getpwuid(0).pw_name};" if os.getuid() == 0 else "",
    )
    (folder / "nginx.conf").write_text(configuration)
    command = ("-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log"))
    with Running(path, *command, "-g", "daemon off;") as running:

        def listens() -> bool:
            assert running.process.poll() is None, f"nginx has ended:\n{running.output}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        eventually(listens, "nginx does not listen")
        yield port
