"""A door for TLS testers that know no STARTTLS: each connection is led through greeting, EHLO and STARTTLS, and from there on its octets
go to and fro untouched, ends and resets included."""

import contextlib
import socket
import struct
import threading

from smtp import Client


class Shim:
    """Listens on a port of its own until the program ends."""

    def __init__(self, target):
        self.target = target
        self.listener = socket.create_server((target.address, 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            tester, _ = self.listener.accept()
            threading.Thread(target=self.lead, args=(tester,), daemon=True).start()

    def lead(self, tester):
        with tester, contextlib.suppress(Exception), Client(self.target) as client:
            tester.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.greeting()
            client.ask(b"EHLO shim.example", b"250")
            client.ask(b"STARTTLS", b"220")
            client.socket.settimeout(None)
            there = threading.Thread(target=copy, args=(tester, client.socket), daemon=True)
            there.start()
            copy(client.socket, tester)
            there.join(30)


def copy(source, sink):
    """Everything, and then the end as it came."""
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except ConnectionResetError:
        with contextlib.suppress(OSError):
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sink.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
