"""Loaded by every Python that the tests start (this folder is on their PYTHONPATH): refuse sockets beyond loopback.

A lesson that needs the network then fails in the tests, wherever they run.
"""

import sys

LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.")


def refuse(event, args):
    if event == "socket.connect":
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None  # a Unix socket's address is a path
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host and not str(host).startswith(LOCAL):
        raise ConnectionError(f"the course runs without the network, and something tried to reach {host!r}")


sys.addaudithook(refuse)
