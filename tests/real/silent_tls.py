"""HOST PORT: starts TLS by STARTTLS, listens for a second, and fails if anything is said before the first command there; then says FAKE
and fails unless that very command is answered, and then QUIT."""

import socket
import ssl
import sys

plain = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
for line in (None, b"EHLO c\r\n", b"NOOP\r\n", b"STARTTLS\r\n"):
    if line:
        plain.sendall(line)
    reply = b""
    while not any(part[3:4] == b" " for part in reply.splitlines()):
        reply += plain.recv(4096)
if reply != b"220 2.0.0 Ready to start TLS\r\n":
    sys.exit(f"{reply!r} instead of 220 alone")
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
secret = context.wrap_socket(plain)
secret.settimeout(1)  # silence can only be heard by waiting
try:
    sys.exit(f"said unasked: {secret.recv(4096)!r}")
except TimeoutError:
    pass
secret.settimeout(30)
for line, code in ((b"FAKE commandinjectiontester\r\n", b"503"), (b"QUIT\r\n", b"221")):
    secret.sendall(line)
    reply = secret.recv(4096)
    if reply[:3] != code or reply.count(b"\n") != 1:
        sys.exit(f"{line!r} was answered {reply!r}")
