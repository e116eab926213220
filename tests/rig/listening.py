"""System calls that fail in a listener: in any of its threads, or in its spawner (up to where that becomes PROG), while it begins, serves, or ends.

Whatever call it is: no client is left hanging, hears anything but whole replies or TLS, or loses a letter that was accepted. Then either the
listener serves the next ones as before, or it has ended by itself, with an exit code and a word for its supervisor. It ends when it is told to, and
nobody is left. Verdicts are those of faults.py for the client that came first, and

    start     the listener has not begun: nobody was let in
    ended     it ended by itself, later
    lost      a wake-up between its threads was lost, or one end's news which is told but once, which only strace can bring about: not judged
"""

import collections
import contextlib
import os
import re
import signal
import socket
import subprocess
import time

import session
from session import UNREACHED, Session, check_letters
from stage import MAILFRONT, Broken, below, described, expect, is_listening, wait_for

ERRORS = ["EINTR", "EAGAIN", "EMFILE", "ENOMEM", "EPIPE", "ECONNRESET", "EIO"]
MOST = 20
VISITS = 5  # each of its threads and its spawner may have its fault in another one's session
NOT_OURS = {"execve", "close", "getrandom", "geteuid", "exit_group", "exit", "arch_prctl", "set_tid_address", "rt_sigreturn", "+++", "---"}
# What can't fail so, and what libraries don't expect to: wake-ups, which are lost where strace does not carry them out; the mask of signals; limits read.
NOT_OURS |= {"futex", "rt_sigprocmask", "prlimit64"}
# A thread wakes another by an eventfd, which takes every write; and nobody says EAGAIN where there is something: it would be told once.
LOST = r"(write\(\d+<anon_inode:\[eventfd\]>|(read|recvmsg|accept4)\(\d+<[^>]*(socket|TCP|UNIX|pipe).*EAGAIN).*INJECTED"
# It was a client's own connection that broke.
OF_A_CLIENT = r"\w+\((\d+<[^>]*>, NULL, )?\d+<TCP.*INJECTED"
TOLD = r"(write\(\d+|splice\(.*, NULL, \d+)<%s.*EPIPE.*INJECTED"
ENDS = {0, 111}  # told to, or the system refused something
GONE = 16.0  # a lost wake-up is made up for by the timers of a farewell


class Visit(Session):
    """A client of a listener."""

    def __init__(self, stage, port):
        self.stage = stage
        self.client = socket.create_connection((stage.address, port), 5)
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.deadline = time.monotonic() + session.LATEST
        self.phase = "snoop"
        self.buffer, self.raw, self.tls = b"", b"", None
        self.over = self.parted = False
        self.heard, self.greets, self.mark, self.codes = 0, True, b"", []
        self.name = ":".join(map(str, self.client.getsockname()))


class Listener:
    """The program, listening: under strace if `traced`."""

    def __init__(self, ground, traced=(), more=(), prog=MAILFRONT, backend=None, through=(), daemon=None):
        self.stage, self.port = ground.stage, ground.stage.port()
        self.log = ground.stage.folder / f"listener-{self.port}.log"
        self.name = f"{ground.way.name} {' '.join(str(word) for word in traced if 'inject' in str(word))}"
        self.is_traced, through = bool(traced), ["strace", "-f", "--detach-on=execve", *traced] if traced else through
        options = [*ground.way.timers(session.TIMERS), "--listen", f"{self.stage.address}:{self.port}", "--workers", "1", *more]
        if ground.way.is_daemons:
            options += ["--plain", f"{self.stage.address}:{daemon or ground.daemon}"]
            prog = []
        argv = ground.way.wrapper(self.stage, backend or ground.backend, *options, prog=prog, through=through)
        environment = {**self.stage.environment, "QUEUEDIR": str(ground.plain.folder)}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.stage.folder,
                start_new_session=True)
        # Not by the log, a write to which may be what fails.
        try:
            wait_for("it to listen or to end", lambda: is_listening(self.stage.address, self.port) or self.has_ended())
        except Broken as why:
            raise Broken(f"{why}: {[described(pid) for pid in below(self.process.pid)]}: {self.said()[-300:]}") from None

    def has_ended(self):
        return self.process.poll() is not None

    def said(self):
        return self.log.read_text(errors="replace")

    def end(self):
        """Tells it to; its exit code. Nobody may be left."""
        for pid in below(self.process.pid)[:1] if self.is_traced else [self.process.pid]:  # strace's first child
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        try:
            code = self.process.wait(GONE)
        except subprocess.TimeoutExpired:
            raise Broken(f"told to end, it does not: {[described(pid) for pid in below(self.process.pid)]}") from None
        self.wait_until_gone()
        return code

    def wait_until_gone(self):
        wait_for("its processes to end", lambda: not self.left(), GONE)

    def left(self):
        """Who of its own is still there; others' rigs are left alone, and strace is ours to wait for."""
        found = []
        for pid in self.stage.adopted():
            with contextlib.suppress(OSError):
                if pid != self.process.pid and os.getsid(pid) == self.process.pid:
                    if described(pid).endswith("Z"):
                        os.waitpid(pid, os.WNOHANG)
                    else:
                        found.append(pid)
        return found

    def kill(self):
        for pid in [*below(self.process.pid), self.process.pid, *self.left()]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def cases(ground):
    """As many calls as a run without faults makes, in the thread that makes the most of each."""
    if not ground.way.listens:
        return []
    log = ground.stage.folder / f"clean-{ground.way.name}.trace"
    verdict = attempt(ground, log, ["-o", log])
    expect(verdict == "right", "a listener without faults:", verdict)
    counted = collections.Counter(
        (line.split()[0], line.split()[1].split("(")[0]) for line in log.read_text().splitlines() if len(line.split()) > 1)
    most = collections.Counter()
    for (_, name), count in counted.items():
        if re.fullmatch(r"\w+", name) and name not in NOT_OURS:
            most[name] = max(most[name], count)
    return [
        ("listener", name, (error, nth))
        for name, count in sorted(most.items()) for nth in range(1, min(count, MOST) + 1) for error in ERRORS
    ]


def run(ground, name, detail):
    error, nth = detail
    log = ground.stage.folder / f"{ground.way.name}-{name}-{error}-{nth}.trace"
    try:
        verdict = attempt(
            ground, log, ["-yy", "-o", log, "-e", "signal=none", "-e", f"trace={name},close_range", "-e", f"inject={name}:error={error}:when={nth}"], name=name)
    except Broken as why:
        if not re.match("hang|waited|told to end", str(why)) or not re.search(LOST, log.read_text(errors="replace")):
            raise
        verdict = "lost"
    if "(INJECTED" not in log.read_text(errors="replace"):
        expect(verdict == "right", f"{verdict} without a fault")
        verdict = UNREACHED
    log.unlink(missing_ok=True)
    return verdict


def run_within(ground, name, through, stack_too_small):
    """The verdict where a limit stays: who comes may be told so each time. For want of descriptors nobody is: there is room for one, or it does not start."""
    log = ground.stage.folder / "none.trace"
    log.touch()
    return attempt(ground, log, name=name, through=through, is_lasting=name != "nofile", stack_too_small=stack_too_small)


def attempt(ground, log, traced=(), name="", through=(), is_lasting=False, stack_too_small=False):
    listener = Listener(ground, traced, through=through)
    try:
        first = None
        for number in range(VISITS):
            verdict = None if listener.has_ended() else visit(ground, listener, log, by_tls=number % 2 == 0)
            first = first or verdict
            if verdict in (None, "right") and number:
                break
        if "the listener ends" in listener.said():
            wait_for("the listener to end", listener.has_ended, GONE)
        ended = listener.has_ended()
        expect(ended or verdict == "right" or is_lasting, f"{VISITS} clients later it still says {verdict}:", listener.said()[-300:])
        code = listener.process.returncode if ended else listener.end()
        if code > 128:  # strace's word for a signal
            code = 128 - code
        is_abort = code in session.ABORTS
        if is_abort:
            session.aborted(code, listener.said(), name, log.read_text(errors="replace").splitlines(), first, stack_too_small)
        expect(code in ENDS or is_abort, f"exit {code}:", listener.said()[-300:])
        expect(not ended or listener.said().strip() or is_abort, f"it ended without a word, exit {code}")
        listener.wait_until_gone()
        words = listener.said().strip().splitlines()[-1:]
        listener.log.unlink()
        if ended and first:
            print(f"{listener.name}: ended, exit {code}: {' '.join(words)[:160]}", flush=True)
        if ended:
            return "ended" if first else "start"
        return first
    finally:
        listener.kill()


def visit(ground, listener, log, by_tls):
    """One letter; the verdict, or None where nobody listens any more."""
    try:
        one = Visit(ground.stage, listener.port)
    except OSError as error:
        wait_for("it to end, as nobody is let in", listener.has_ended, GONE)
        expect(isinstance(error, ConnectionError), "the connection:", error)
        return None
    mark = f"Subject: visit {listener.port} {one.name} of {os.getpid()}\r\n".encode()
    letter = mark + b"\r\n" + b"\n".join(b"..line %d\r" % n for n in range(200)) + b"\n"
    verdict, accepted = one.deliver(letter, by_tls)
    one.close()
    if verdict == "cut" and one.phase == "snoop" and not re.search(OF_A_CLIENT, log.read_text(errors="replace")):
        wait_for("it to end, as it has cut a dialogue", listener.has_ended, GONE)
    elif verdict == "cut":
        summary = session.SUMMARY % re.escape(one.name)
        # PROG, or HOST by the way `raw`, reads no more: its own end counts then. Behind the client's QUIT nothing but the end was left to say.
        is_by_tcp, trace = ground.way.is_daemons or ground.way.name == "listen-raw", log.read_text(errors="replace")
        goes_unsaid = re.search(TOLD % ("(pipe|TCP)" if is_by_tcp else "pipe"), trace) or one.phase == "farewell" and re.search(OF_A_CLIENT, trace)
        is_told = lambda said: any(end != "over" for end in re.findall(summary, said)) or "can't accept" in said
        wait_for("a word why it has cut", lambda: goes_unsaid or listener.has_ended() or is_told(listener.said()), GONE)
    check_letters(mark.strip(), letter.replace(b"\r\n..", b"\r\n."), by_tls, verdict, accepted, ground.plain, ground.tls)
    return verdict
