"""Plays a dialogue of tests/dialogues against any server of servers.py, as far as both can be black boxes: client and PROG speak as it
says; what the client must see counts by its reply codes and keywords, since words and their order are each server's own.
"""

import os
import re
import select
import socket
import tempfile

from smtp import Client
from stage import HOME, Broken, expect

FOLDER = HOME / "tests/dialogues"
PATIENCE = 8.0


def unescaped(text):
    """The octets of a line of FORMAT.md."""
    text = re.sub(r"\\\*(\d+)\{([^}]*)\}", lambda many: many[2] * int(many[1]), text)
    end = b"" if text.endswith("\\c") else b"\r\n"
    escapes = {"r": b"\r", "n": b"\n", "0": b"\0", "t": b"\t", "\\": b"\\"}
    octets, rest = b"", text.removesuffix("\\c")
    while rest:
        if found := re.match(r"\\x([0-9A-Fa-f]{2})", rest):
            octets, rest = octets + bytes([int(found[1], 16)]), rest[4:]
        elif rest[0] == "\\":
            octets, rest = octets + escapes[rest[1]], rest[2:]
        else:
            octets, rest = octets + rest[0].encode(), rest[1:]
    return octets + end


def steps_of(name):
    """(who, octets or what) of each line, lines of one sender together; who also said what the client must see."""
    steps = []
    for line in (FOLDER / f"{name}.txt").read_text().splitlines():
        if found := re.match(r"([CSKk]): (.*)|([CSKk]):$", line):
            who, octets = found[1] or found[3], unescaped(found[2] or "")
            if steps and steps[-1][0] == who:
                steps[-1] = (who, steps[-1][1] + octets)
            else:
                steps.append((who, octets))
        elif line.startswith(("!", "=")):
            steps.append(("!", line))
    return steps


class Puppet:
    """PROG, played by us: the example program `puppet` hands its descriptors over."""

    def __init__(self, listener):
        listener.settimeout(PATIENCE)
        self.socket, _ = listener.accept()
        self.socket.settimeout(PATIENCE)
        _, fds, _, _ = socket.recv_fds(self.socket, 65536, 2)
        self.input, self.output = fds
        self.buffer = b""

    def send(self, octets):
        os.write(self.output, octets)

    def get(self, octets):
        while len(self.buffer) < len(octets):
            expect(select.select([self.input], [], [], PATIENCE)[0], f"PROG waits for {octets!r}, has {self.buffer!r}")
            piece = os.read(self.input, 65536)
            expect(piece, f"PROG's input ends before {octets!r}")
            self.buffer += piece
        expect(self.buffer.startswith(octets), f"PROG must get {octets!r}, gets {self.buffer!r}")
        self.buffer = self.buffer[len(octets):]

    def close(self):
        for fd in (self.input, self.output):
            os.close(fd)
        self.socket.close()


def essence(octets):
    """Reply codes, and the keywords of an EHLO reply."""
    lines = octets.decode("latin-1").replace("\r\n", "\n").splitlines()
    codes = [line[:3] for line in lines if line[3:4] != "-"]
    return codes, sorted(line[4:].strip().upper() for line in lines if line[4:].strip().upper() == "STARTTLS")


def play(server, name, run):
    """Raises Broken where the server differs; `run` tells one try from the next."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        os.chmod(folder, 0o755)
        path = f"{folder}/puppets"
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.listen()
        target = server.front([os.environ["PUPPET"], path, run])
        with Client(target, PATIENCE) as client:
            puppet = Puppet(listener)
            try:
                for who, what in steps_of(name):
                    if who == "C":
                        client.send(what)
                    elif who == "K":
                        puppet.send(what)
                    elif who == "k" and what != b"QUIT\r\n":
                        puppet.get(what)
                    elif who == "S":
                        seen = b"".join(client.reply() for _ in essence(what)[0])
                        expect(essence(seen) == essence(what), f"the client must see {what!r}, sees {seen!r}")
            except (OSError, TimeoutError) as error:
                raise Broken(f"{error!r}") from None
            finally:
                puppet.close()
