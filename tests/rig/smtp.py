"""An SMTP client of which every octet is decided by the rig, and every wait has a deadline."""

import contextlib
import socket
import ssl
import struct

from stage import Broken, expect

PATIENCE = 20.0


def tls_context(version=None, alpn=None):
    """TLS that takes every certificate: who the server is, is not what is tested here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if version:
        context.minimum_version = context.maximum_version = version
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


CONTEXT = tls_context()


class Client:
    """One connection; a context manager."""

    def __init__(self, target, patience=PATIENCE):
        self.socket = socket.create_connection((target.address, target.port), timeout=patience)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, octets):
        self.socket.sendall(octets)

    def more(self, patience=None):
        """What the next read gives: b"" at the end, None when nothing comes in time."""
        before = self.socket.gettimeout()
        self.socket.settimeout(patience or before)
        try:
            return self.socket.recv(65536)
        except (TimeoutError, ssl.SSLWantReadError):
            return None
        except (ConnectionError, ssl.SSLError):
            return b""
        finally:
            self.socket.settimeout(before)

    def reply(self):
        """One whole reply, which may have several lines."""
        while True:
            lines = self.buffer.split(b"\n")
            for number, line in enumerate(lines[:-1], 1):
                if line[3:4] != b"-":
                    self.buffer = b"\n".join(lines[number:])
                    return b"\n".join(lines[:number]) + b"\n"
            piece = self.more()
            if not piece:
                state = "nothing more" if piece is None else "the end"
                raise Broken(f"a reply was due, {state} came after {self.buffer!r}")
            self.buffer += piece

    def ask(self, line, code=None):
        """A command and its reply."""
        self.send(line + b"\r\n")
        reply = self.reply()
        expect(code is None or reply.startswith(code), line, "was answered", reply)
        return reply

    def greeting(self):
        return self.reply()

    def rest(self, patience=None):
        """All that comes until the end, or until nothing more comes."""
        said = self.buffer
        while piece := self.more(patience):
            said += piece
        self.buffer = b""
        return said

    def secure(self, context=CONTEXT):
        """The TLS handshake; raises ssl.SSLError, ConnectionError or TimeoutError."""
        self.buffer = b""
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost", suppress_ragged_eofs=False)
        if not self.socket.version():
            raise ConnectionResetError("gone before its handshake, which Python leaves out then")

    def starttls(self, context=CONTEXT, hello=b"EHLO client.example"):
        """Greeting, EHLO, STARTTLS, handshake."""
        self.greeting()
        self.ask(hello, b"250")
        self.ask(b"STARTTLS", b"220")
        self.secure(context)
        return self

    def end_of_tls(self):
        """The end that a server makes of it by close_notify; any other raises."""
        expect(self.buffer == b"" and self.socket.recv(1) == b"", "more inside TLS:", self.buffer)

    def reset(self):
        """Goes without a word: RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def deliver(client, letter, sender=b"a@client.example", recipient=b"b@localhost"):
    """One transaction behind EHLO; the letter is as it is on the wire, without the last dot."""
    client.ask(b"MAIL FROM:<" + sender + b">", b"250")
    client.ask(b"RCPT TO:<" + recipient + b">", b"250")
    client.ask(b"DATA", b"354")
    client.send(letter + b".\r\n")
    reply = client.reply()
    expect(reply.startswith(b"250"), "the letter was answered", reply)
