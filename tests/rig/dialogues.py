"""Plays a dialogue of tests/dialogues against any server of servers.py, as far as both can be black boxes: client, PROG and what goes on
behind TLS speak as it says; what the client must see counts by its reply codes and keywords, since words and their order are each server's
own, and by nothing more being said.

Where a server answers for PROG, or goes over to TLS without handing the client over to another PROG, what it says to PROG is its own
affair: the client's part alone is played, with a real PROG behind it.
"""

import os
import re
import select
import socket
import tempfile
import time

from smtp import Client
from stage import HOME, MAILFRONT, Broken, expect

FOLDER = HOME / "tests/dialogues"
PATIENCE = 8.0
QUIET = 0.25  # how long nothing more must come
TLS = ("!", "client-tls")


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
        if found := re.match(r"([CSKkBb]): (.*)|([CSKkBb]):$", line):
            who, octets = found[1] or found[3], unescaped(found[2] or "")
            if steps and steps[-1][0] == who:
                steps[-1] = (who, steps[-1][1] + octets)
            else:
                steps.append((who, octets))
        elif line.startswith("! "):
            steps.append(("!", line[2:]))
    return steps


def clients_part(steps):
    return [(who, what) for who, what in steps if who in "CS" or (who, what) == TLS or what[:5] == "wait "]


class Puppet:
    """PROG, played by us: the example program `puppet` hands its descriptors over."""

    def __init__(self, listener):
        listener.settimeout(PATIENCE)
        self.socket, _ = listener.accept()
        self.socket.settimeout(PATIENCE)
        _, fds, _, _ = socket.recv_fds(self.socket, 65536, 2)
        self.input, self.output = fds
        self.buffer = b""
        self.is_there = True

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

    def get_no_more(self, patience=0):
        """Nothing comes, or the end."""
        if self.is_there and (self.buffer or select.select([self.input], [], [], patience)[0]):
            more = self.buffer or os.read(self.input, 65536)
            expect(not more, f"PROG must get nothing more, gets {more!r}")
            return True
        return False

    def close(self):
        """Exits, if it has not."""
        if self.is_there:
            self.is_there = False
            os.close(self.input)
            os.close(self.output)
            self.socket.close()


def essence(octets):
    """Reply codes, and the keywords of an EHLO reply."""
    lines = octets.decode("latin-1").replace("\r\n", "\n").splitlines()
    codes = [line[:3] for line in lines if line[3:4] != "-"]
    return codes, sorted(line[4:].strip().upper() for line in lines if line[4:].strip().upper() == "STARTTLS")


class Player:
    """One dialogue being played, step by step; a context manager that leaves no puppet behind."""

    def __init__(self, client, listener):
        self.client, self.listener = client, listener
        self.puppets = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for puppet in self.puppets:
            puppet.close()

    def puppet(self, who):
        """K or B, as soon as it is there."""
        number = "KB".index(who.upper())
        while len(self.puppets) <= number:
            self.puppets.append(Puppet(self.listener))
        return self.puppets[number]

    def step(self, who, what):
        match who, what:
            case "C", _:
                self.client.send(what)
            case "S", _:
                seen = b"".join(self.client.reply() for _ in essence(what)[0])
                expect(essence(seen) == essence(what), f"the client must see {what!r}, sees {seen!r}")
            case "K" | "B", _:
                self.puppet(who).send(what)
            case "k" | "b", _:
                self.puppet(who).get(what)
            case "!", "client-tls":
                expect(not self.client.buffer, f"behind the 220 the client sees {self.client.buffer!r}")
                self.client.secure()
            case "!", "child-eof":
                self.puppet("K").close()
            case "!", "backend-eof":
                self.puppet("B").close()
            case "!", "k-eof":
                expect(self.puppet("K").get_no_more(PATIENCE), "PROG's input does not end")
            case "!", "s-eof":
                more = self.client.buffer or self.client.more()
                expect(more == b"", f"the client must see the end, sees {more!r}")
            case "!", _ if what.startswith("wait "):
                time.sleep(float(what.removeprefix("wait ")))
            case _:
                raise ValueError(f"not for a black box: {what}")

    def end(self):
        """Nothing may be left over."""
        more = self.client.buffer or self.client.more(QUIET)
        expect(not more, f"the client must see nothing more, sees {more!r}")
        for puppet in self.puppets:
            puppet.get_no_more()


def play(server, name, run):
    """Raises Broken where the server differs; `run` tells one try from the next."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        os.chmod(folder, 0o755)
        path = f"{folder}/puppets"
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.listen()
        steps = steps_of(name)
        is_whole = server.hands_over if TLS in steps else server.passes_dialogue
        target = server.front([os.environ["PUPPET"], path, run] if is_whole else MAILFRONT)
        with Client(target, PATIENCE) as client, Player(client, listener) as player:
            try:
                for step in steps if is_whole else clients_part(steps):
                    player.step(*step)
                player.end()
            except OSError as error:
                raise Broken(f"{error!r}") from None
