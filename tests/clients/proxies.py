"""Real proxies with the configurations that are shipped in config/; only ports and folders are others."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.clients.programs import program
from tests.support import ROOT, Running, eventually, free_port

SHIPPED_PORT, SHIPPED_HUBS = 8080, (9765, 9766, 9767)
PROXIES = ("nginx", "haproxy")

_IN_FOLDER = "access_log off;\n" + "".join(
    f"    {kind}_temp_path {{folder}}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
)


@contextlib.contextmanager
def proxy(kind: str, folder: Path, first_hub: int) -> Iterator[int]:
    """nginx or HAProxy in front of three hubs; yields its port.

    Args:
        kind: Which of `PROXIES`.
        folder: For what it writes.
        first_hub: The port of the first hub; the others have the next ones.
    """
    name, port = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}[kind], free_port()
    text = (ROOT / "config" / name).read_text()
    ports = {SHIPPED_PORT: port} | {shipped: first_hub + at for at, shipped in enumerate(SHIPPED_HUBS)}
    for shipped, ours in ports.items():
        assert str(shipped) in text
        text = text.replace(f"127.0.0.1:{shipped}", f"127.0.0.1:{ours}")
    text = text.replace(f"listen {SHIPPED_PORT}", f"listen 127.0.0.1:{port}")
    text = text.replace(f"bind :{SHIPPED_PORT}", f"bind 127.0.0.1:{port}")
    assert "maxconn 50000" in text or kind != "haproxy"
    text = text.replace("maxconn 50000", "maxconn 9000")  # as many as may be open here
    folder.mkdir(exist_ok=True)
    file = folder / name
    if kind == "nginx":
        text = text.replace("access_log off;\n", _IN_FOLDER.format(folder=folder))
        user = f"user {pwd.getpwuid(0).pw_name}; " if os.getuid() == 0 else ""
        command = [program("nginx", "/usr/sbin/nginx"), "-p", str(folder), "-c", str(file)]
        command += ["-e", str(folder / "error.log"), "-g", f"{user}daemon off; pid {folder}/nginx.pid;"]
    else:
        command = [program("haproxy", "/usr/sbin/haproxy"), "-db", "-f", str(file)]
    file.write_text(text)
    with Running(*command) as running:

        def listens() -> bool:
            assert running.process.poll() is None, f"{kind} has ended:\n{running.output}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        eventually(listens, f"{kind} does not listen")
        yield port
