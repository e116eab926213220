"""A UCSPI-TLS server, to the letter: ucspi_tls_server.py MODE CERT KEY PROG...

It makes a control socket and two pipes, forks, and becomes PROG, which finds them in SSLCTLFD, SSLREADFD and SSLWRITEFD. The other
half waits for `y` or `Y`, speaks TLS on descriptors 0 and 1 from then on, and moves what is inside through the pipes; after `Y` it tells
VARIABLE=VALUE NUL ... NUL on the control socket when the handshake is done. The end of that socket instead ends it.

MODE: serve; apart (the same, PROG's child it is not); dead (it is gone before PROG begins); gives-up (it ends when it is asked to
begin); secretive (it tells nothing); liar (it tells what nobody may be told); flooder (it tells 16 MiB, and no end); dies-telling (it is
gone in the middle of a variable).
"""

import os
import select
import socket
import sys

mode, certificate, key, *prog = sys.argv[1:]
ours, theirs = socket.socketpair()
from_tls, into_prog = os.pipe()
from_prog, into_tls = os.pipe()

waiting = os.fork()
if not waiting and mode == "apart" and os.fork():
    os._exit(0)
if waiting:
    if mode == "apart":
        os.waitpid(waiting, 0)
    if mode == "dead":
        os.waitid(os.P_PID, waiting, os.WEXITED | os.WNOWAIT)
    for descriptor in (ours.fileno(), into_prog, from_prog):
        os.close(descriptor)
    for name, descriptor in (("SSLCTLFD", theirs.fileno()), ("SSLREADFD", from_tls), ("SSLWRITEFD", into_tls)):
        os.set_inheritable(descriptor, True)
        os.environ[name] = str(descriptor)
    os.execvp(prog[0], prog)

for descriptor in (theirs.fileno(), from_tls, into_tls):
    os.close(descriptor)
if mode == "dead":
    os._exit(0)
command = ours.recv(1)
if not command or mode == "gives-up":
    os._exit(0)
assert command in b"yY", command
import ssl  # noqa: E402 (half of what it takes to start, and most sessions of the tests come to no TLS)

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
# The clients of these tests keep what they get, and would offer it to others.
context.num_tickets = 0
named = []
context.sni_callback = lambda _, name, __: named.append(name)
try:
    client = context.wrap_socket(socket.socket(fileno=os.dup(0)), server_side=True)
except (ssl.SSLError, OSError):
    os._exit(98)
os.close(0)
os.close(1)
if command == b"Y":
    told = [f"SSL_PROTOCOL={client.version()}", f"SSL_CIPHER={client.cipher()[0]}", "SSL_PEER_CERT_HASH"]
    told += [f"SSL_TLS_SNI_SERVERNAME={name}" for name in named]
    if mode == "secretive":
        told = []
    if mode == "liar":
        told += ["PATH=/poisoned", "SSL_CERT_FILE=/poisoned", "SSL_X=a\nPOISONED=1", "SSL_y=poisoned", "=poisoned", "SSL_LONG=" + "x" * 5000]
        told += [f"SSL_MANY_{number}=" + "x" * 200 for number in range(100)]
    octets = "".join(word + "\0" for word in told).encode() + b"\0"
    if mode == "dies-telling":
        ours.sendall(octets[: octets.index(b"SSL_CIPHER=") + len("SSL_CIPHER=TLS_")])
        os._exit(0)
    try:
        ours.sendall(octets if mode != "flooder" else b"SSL_X=" + b"x" * (16 << 20))
    except BrokenPipeError:
        os._exit(0)
ours.close()
reading = [client, from_prog]
while from_prog in reading:
    ready = [client] if client in reading and client.pending() else select.select(reading, [], [])[0]
    if client in ready:
        octets = client.recv(65536)
        if octets:
            os.write(into_prog, octets)
        else:
            reading.remove(client)
            os.close(into_prog)
    if from_prog in ready:
        octets = os.read(from_prog, 65536)
        if octets:
            client.sendall(octets)
        else:
            reading.remove(from_prog)
try:
    client.unwrap()
except (ssl.SSLError, OSError):
    pass
