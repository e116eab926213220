"""One session of the program, started on an accepted socket as tcpserver does, driven by a client that follows what it is told, and judged.

The client delivers one letter, in clear or by STARTTLS, taking 454 for an answer. Verdicts:

    right     all replies were the expected ones, TLS ended with a close_notify, and the letter arrived once, where it should
    454       STARTTLS was refused, and the letter went to PROG in clear
    421       the session ended by a whole reply with a 4yz, in its turn
    cut       the connection ended without a word, or TLS without a close_notify, where no word can be said: inside the relay or TLS, or the
              client's own connection was what broke; exit code and summary say why
and Broken is raised for everything else: a hang, a reply out of turn, plaintext behind the 220, a letter damaged, doubled or lost though
accepted, an orphan, a zombie, a processor kept busy.
"""

import contextlib
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import time

import stage as rig
from smtp import CONTEXT
from stage import Broken, children_of, described, expect

TIMERS = {"snoop-timeout": 4, "snoop-total": 6, "dial-timeout": 2, "backend-handshake-timeout": 2, "greeting-timeout": 2, "replay-timeout": 2}
TIMERS |= {"handshake-timeout": 2, "relay-timeout": 2, "farewell-timeout": 1}
LATEST = 14.0  # several of these timers may follow each other
BUSY = 1.5  # seconds of a processor
ABORTS = (-signal.SIGABRT, -signal.SIGSEGV)
OF_MEMORY = {"mmap", "mprotect", "brk", "as", "data"}
FIRST = "close_range("  # the program's first call of its own
UNREACHED = "unreached"  # the verdict where a fault was not injected
SUMMARY = r'starttls-wrapper\[\d+\]: client=%s end="((?:[^"\\]|\\.)*)"'


class Cut(Exception):
    """The connection has ended; `octets` are an unfinished reply."""

    def __init__(self, octets):
        super().__init__(octets)
        self.octets = octets


class Refused(Exception):
    """A whole 4yz came."""


class Session:
    """The program, running, and its client."""

    def __init__(self, stage, argv, queue, tag="", greets=True):
        self.stage, self.queue, self.tag, self.greets = stage, queue, tag, greets
        with socket.create_server((stage.address, 0)) as listener:
            self.client = socket.create_connection(listener.getsockname())
            served, (_, port) = listener.accept()
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.log = stage.folder / f"session-{tag}.txt"
        ucspi = {"PROTO": "TCP", "TCPREMOTEIP": stage.address, "TCPREMOTEPORT": str(port), "TCPLOCALIP": stage.address}
        environment = {**stage.environment, **ucspi, "QUEUEDIR": str(queue.folder)}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in argv], stdin=served, stdout=served, stderr=log, env=environment, cwd=stage.folder,
                start_new_session=True)
        served.close()
        self.deadline = time.monotonic() + LATEST
        self.phase = "snoop"
        self.buffer, self.raw, self.tls = b"", b"", None
        self.over = False  # TLS has ended
        self.parted = False  # by a close_notify
        self.heard = 0  # octets of the program's or PROG's
        self.mark = b""  # of a letter that it has begun
        self.codes = []  # of the replies that it has heard
        self.asked = 0.0  # when it said QUIT, where that counts

    # ---- the client

    def receive(self):
        """More of the dialogue into the buffer; Cut at the end."""
        if self.over:
            raise Cut(self.buffer)
        left = self.deadline - time.monotonic()
        expect(left > 0, f"hang: nothing comes in phase {self.phase}")
        self.client.settimeout(left)
        try:
            piece = self.client.recv(65536)
        except TimeoutError:
            raise Broken(f"hang: nothing comes in phase {self.phase}") from None
        except ConnectionError:
            piece = b""
        self.heard += len(piece)
        if self.tls is None:
            if not piece:
                raise Cut(self.buffer)
            self.buffer += piece
            return
        self.check_records(piece)
        if piece:
            self.incoming.write(piece)
        else:
            self.incoming.write_eof()
        if self.phase != "handshake":
            self.decrypt(not piece)

    def decrypt(self, at_end):
        """What came into the buffer; the end is told when the buffer was looked at."""
        try:
            while octets := self.tls.read(65536):
                self.buffer += octets
            self.over = self.parted = True
        except ssl.SSLZeroReturnError:
            self.over = self.parted = True
        except ssl.SSLWantReadError:
            self.over = at_end
        except ssl.SSLError:
            self.over = True

    def check_records(self, piece):
        """Behind the 220 there are TLS records and nothing else."""
        self.raw += piece
        while self.raw:
            expect(self.raw[0] in (20, 21, 22, 23) and self.raw[1:2] in (b"", b"\3"), "no TLS behind the 220:", self.raw[:80])
            length = 5 + int.from_bytes(self.raw[3:5], "big")
            if len(self.raw) < 5 or len(self.raw) < length:
                return
            self.raw = self.raw[length:]

    def send(self, octets):
        try:
            if self.tls:
                self.tls.write(octets)
                octets = self.outgoing.read()
            self.client.settimeout(max(0.1, self.deadline - time.monotonic()))
            self.client.sendall(octets)
        except (ConnectionError, ssl.SSLError):
            pass  # what it said last is still to be read
        except TimeoutError:
            raise Broken(f"hang: nothing is taken in phase {self.phase}") from None

    def reply(self, *codes):
        """The next reply, whole; one of these, or Refused."""
        while not (whole := re.match(rb"(?:(\d\d\d)-[^\n]*\n)*(\d\d\d)(?: [^\n]*)?\r?\n", self.buffer)):
            bad = [line for line in self.buffer.split(b"\n")[:-1] if not re.match(rb"\d\d\d[- ]", line)]
            expect(not bad, "no reply:", self.buffer[:200])
            self.receive()
        reply, self.buffer = whole[0], self.buffer[whole.end():]
        code = whole[2].decode()
        self.codes.append(code)
        if code in codes:
            return code
        if code[0] == "4":
            raise Refused(reply.decode(errors="replace").strip())
        raise Broken(f"{reply!r} in phase {self.phase}, expected {codes}")

    def hello(self):
        """The first of a handshake, to which the answer is not awaited."""
        expect(not self.buffer, "said behind the 220:", self.buffer)
        self.phase = "handshake"
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = CONTEXT.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        self.flush()

    def handshake(self):
        if self.tls is None:
            self.hello()
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.flush()
                self.receive()
            except ssl.SSLError:
                raise Cut(b"") from None
        self.flush()
        self.phase = "tls"

    def flush(self):
        with contextlib.suppress(ConnectionError):
            self.client.sendall(self.outgoing.read())

    def deliver(self, letter, by_tls):
        """The dialogue; the verdict as far as the client can tell, and whether the letter was accepted."""
        refused = accepted = False
        try:
            if self.greets:
                self.reply("220")
            else:
                # With EHLO the gate opens, and nobody knows any more where a reply ends.
                self.send(b"NOOP\r\n")
                self.reply("250")
                self.phase = "relay"
            self.send(b"EHLO client.example\r\n")
            self.reply("250")
            if by_tls:
                self.send(b"STARTTLS\r\n")
                try:
                    self.reply("220")
                except Refused as why:
                    if not str(why).startswith("454"):
                        raise
                    refused = True
                else:
                    self.handshake()
                    self.send(b"EHLO client.example\r\n")
                    self.reply("250")
            self.phase = "tls" if self.tls else "relay"
            self.send(b"MAIL FROM:<a@client.example>\r\n")
            self.reply("250")
            self.send(b"RCPT TO:<b@localhost>\r\n")
            self.reply("250")
            self.send(b"DATA\r\n")
            self.reply("354")
            self.send(letter + b".\r\n")
            self.reply("250")
            accepted = True
            self.send(b"QUIT\r\n")
            self.reply("221")
            self.end()
            return "454" if refused else "right", accepted
        except Refused:
            # After a 4yz of the whole session nothing follows; after one of PROG's the client goes.
            self.send(b"QUIT\r\n")
            with contextlib.suppress(Refused, Broken, Cut):
                self.reply("221")
            self.close()
            return "421", accepted
        except Cut as cut:
            expect(not cut.octets or self.phase != "snoop", "cut inside a reply:", cut.octets)
            return "cut", accepted

    def end(self):
        """QUIT was answered: both sides close, TLS first; Cut if the other one's end of it is missing."""
        self.phase = "farewell"
        if self.tls:
            with contextlib.suppress(ssl.SSLError):
                self.tls.unwrap()
            self.flush()
        with contextlib.suppress(OSError):
            self.client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(Cut):
            while True:
                self.receive()
        expect(not self.buffer, "said behind the 221:", self.buffer)
        if self.tls and not self.parted:
            raise Cut(b"")

    def close(self):
        self.client.close()

    # ---- the verdict

    def wait(self):
        """The exit of what was started: code, and seconds of a processor."""
        self.close()
        limit = max(time.monotonic() + 1, self.deadline)
        while True:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                return self.process.returncode, usage.ru_utime + usage.ru_stime
            if time.monotonic() > limit:
                tree = [described(each) for each in [self.process.pid, *rig.below(self.process.pid)]]
                self.kill()
                raise Broken(f"hang: does not end after {LATEST:g} s: {tree}")
            time.sleep(0.002)

    def kill(self):
        for pid in [*rig.below(self.process.pid), self.process.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, 9)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.process.pid, 0)
        self.process.returncode = -9

    def said(self):
        return self.log.read_text(errors="replace")

    def summary(self):
        """How the session ended, in the words of its line in the log; nothing if there is none."""
        return "".join(re.findall(SUMMARY % r"\S+", self.said())[-1:])


def aborted(code, said, name, trace, heard, stack_too_small=False):
    """The verdict of a program that a signal of its own has ended: `start`, before its first statement, where `trace` shows that or nobody has heard
    of it; or `memory`. `name` is the call that failed, or the limit."""
    if not trace and name in OF_MEMORY and not heard and "starttls-wrapper[" not in said:
        return "start"
    injected, begun = (next((n for n, line in enumerate(trace) if mark in line), None) for mark in ("(INJECTED)", FIRST))
    if injected is not None and (begun is None or injected < begun):
        return "start"
    # The library of TLS aborts without a word.
    is_out_of_memory = code == -signal.SIGABRT and ("memory allocation of" in said or name in OF_MEMORY)
    expect(is_out_of_memory or stack_too_small, f"exit {code}: {said[-300:]}")
    return "memory"


def found_in(queue, mark):
    """The letters with this mark, which are taken away."""
    letters = []
    for file in list((queue.folder / "new").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            letter = file.read_bytes()
            if mark in letter:
                letters.append(letter)
                file.unlink()
    return letters


def check_letters(mark, text, by_tls, verdict, accepted, plain, tls):
    """The letter is where it belongs and whole, as often as it was accepted. `tls` is `plain` where PROG goes on behind TLS."""
    here, there = found_in(plain, mark), found_in(tls, mark)
    by_tls = by_tls and tls is not plain
    for letter in here + there:
        expect(letter.endswith(text.replace(b"\r\n", b"\n")), "a damaged letter:", letter[-200:])
    expect(len(here + there) <= 1, f"the letter came {len(here)} + {len(there)} times")
    expect(here + there or not accepted, "a letter was accepted and is lost")
    if verdict == "right":
        expect(len(there if by_tls else here) == 1, "the letter went the other way")
    if verdict == "454":
        expect(len(here) == 1, "after the 454 the letter went to the backend")
