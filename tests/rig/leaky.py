"""leaky.py CERT KEY PROG...: a STARTTLS wrapper with every hole that tests/rig/attacks.py looks for, to show that it sees them.

Run by tcpserver. Plaintext that came behind STARTTLS is kept and run inside TLS; the child stays the same; what the child says late is
passed on; line ends are made CRLF; any ALPN is taken; HTTP is passed to the child; nobody is ever timed out.
"""

import os
import select
import socket
import ssl
import subprocess
import sys


def main():
    client = socket.socket(fileno=0)
    child = subprocess.Popen(sys.argv[3:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    buffer = b""
    while True:
        if not (isinstance(client, ssl.SSLSocket) and client.pending()):
            ready, _, _ = select.select([client, child.stdout], [], [])
        if child.stdout in ready:
            said = os.read(child.stdout.fileno(), 65536)
            if not said:
                return
            if b"PIPELINING\r\n" in said and not isinstance(client, ssl.SSLSocket):
                said = said.replace(b"250-PIPELINING", b"250-STARTTLS\r\n250-PIPELINING", 1)
                said = said.replace(b"250 PIPELINING", b"250-STARTTLS\r\n250 PIPELINING", 1)
            client.sendall(said)
        if client in ready:
            piece = client.recv(65536)
            if not piece:
                return
            buffer += piece
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            line = line.rstrip(b"\r") + b"\r\n"
            if line.upper().startswith(b"STARTTLS") and not isinstance(client, ssl.SSLSocket):
                if select.select([client], [], [], 0.005)[0]:
                    buffer += client.recv(65536)
                client.sendall(b"220 ready\r\n")
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(sys.argv[1], sys.argv[2])
                client = context.wrap_socket(client, server_side=True)
            else:
                child.stdin.write(line)


try:
    main()
except (OSError, ssl.SSLError):
    pass
