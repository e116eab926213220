"""KILL, TERM and STOP for the program, PROG, the backend, the process that waits to become PROG, and the UCSPI-TLS server, in each
state of a session with real processes.

A stopped program is continued, and the session must go on where it was. All others, stopped, are silent, and a timer must end that; a
UCSPI-TLS server, which alone holds the client then, is continued when the program has ended. Whatever was hit: the client is not left
hanging, hears nothing but whole replies or TLS, and in the end the program, its PROG and the backend's are gone, PROG reaped.
"""

import contextlib
import itertools
import os
import pathlib
import signal
import socket
import threading
import time

from servers import RIG
from session import BUSY, TIMERS, Cut, Refused, Session, found_in
from stage import MAILFRONT, Broken, below, children_of, described, expect, wait_for

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
ENDS = {0, 1, 98, 99, 111}  # of the README, but for a usage error
GONE = 8.0  # what is left has so long: timers of 2 s, a farewell of 1 s twice
PROG = MAILFRONT
RIG_PROG = str(RIG / "prog.sh")
STOPPED = [RIG_PROG, "stopped", *MAILFRONT]
STOPPED_LATER = [RIG_PROG, "stopped-behind-greeting"]
STOPPED_AT_RESET = [RIG_PROG, "stopped-at-reset"]
FRESH_STOPPED = [RIG_PROG, "fresh", "stopped", *MAILFRONT]
FRESH_STOPPED_LATER = [RIG_PROG, "fresh", "stopped-behind-greeting"]
STAYING = [RIG_PROG, "staying"]
FULL = ["nobody"]  # no PROG: a backend that accepts nobody, and whose queue is full
STOPS = (STOPPED, STOPPED_AT_RESET, FRESH_STOPPED, FRESH_STOPPED_LATER)
SERVER = "python3"
LETTERS = itertools.count(1)


def greeted(run):
    run.reply("220")


def helloed(run):
    greeted(run)
    run.send(b"EHLO client.example\r\n")
    run.reply("250")


def half_a_line(run):
    helloed(run)
    run.send(b"NO")


def asked(run):
    helloed(run)
    run.send(b"STARTTLS\r\n")


def parted(run):
    """All is said, and the connection has ended."""
    helloed(run)
    run.asked = time.monotonic()
    run.send(b"QUIT\r\n")
    run.reply("221")
    run.end()


def switched(run):
    asked(run)
    run.reply("220")
    run.phase = "handshake"


def inside(run):
    switched(run)
    run.handshake()


def answered_inside(run):
    """Whoever ends TLS knows now that it stands."""
    inside(run)
    run.send(b"NOOP\r\n")
    run.reply("250")


def in_text(run):
    helloed(run)
    text(run)


def needing_prog(run):
    helloed(run)
    run.send(b"MAIL FROM:<a@client.example>\r\n")


def in_text_inside(run):
    inside(run)
    run.send(b"EHLO client.example\r\n")
    run.reply("250")
    text(run)


def hello(run):
    run.send(b"EHLO client.example\r\n")


def muted(run):
    """PROG has greeted, which only the reply shows."""
    run.send(b"NOOP\r\n")
    run.reply("250")


def in_text_muted(run):
    muted(run)
    hello(run)
    run.reply("250")
    text(run)


def text(run):
    run.phase = "tls" if run.tls else "relay"
    run.send(b"MAIL FROM:<a@client.example>\r\nRCPT TO:<b@localhost>\r\nDATA\r\n")
    run.reply("250")
    run.reply("250")
    run.reply("354")
    run.mark = b"Subject: half a letter, %d of %d" % (next(LETTERS), os.getpid())
    run.send(run.mark + b"\r\n")


# Name: how the client comes there, PROG before its greeting, the backend's PROG before its greeting or behind it, who can be hit.
STATES = {
    "before the greeting": (lambda run: None, STOPPED, PROG, ["program", "prog"]),
    "dialogue": (helloed, PROG, PROG, ["program", "prog"]),
    "half a line": (half_a_line, PROG, PROG, ["program", "prog"]),
    "dial": (asked, PROG, FULL, ["program", "prog"]),
    "backend's handshake": (asked, PROG, None, ["program", "prog", "backend"]),
    "backend's greeting": (asked, PROG, STOPPED, ["program", "prog", "backend"]),
    "replay": (asked, PROG, STOPPED_LATER, ["program", "prog", "backend"]),
    "client's handshake": (switched, PROG, PROG, ["program", "backend"]),
    "gate": (answered_inside, PROG, PROG, ["program", "backend"]),
    "relay": (in_text, PROG, PROG, ["program", "prog"]),
    "relay inside TLS": (in_text_inside, PROG, PROG, ["program", "backend"]),
    "farewell": (parted, STAYING, PROG, ["program", "prog"]),
}
RELAYED = {"relay", "relay inside TLS"}
SAID = ["220", "250", "221"]
# Name, who is hit: all replies that the client hears, exit code, how it ended by the log, and how long PROG has at least, in seconds from the QUIT on.
EXACTLY = {
    ("dial", "program", "KILL"): (["220", "250"], -signal.SIGKILL, "", 0),
    ("dial", "program", "TERM"): (["220", "250", "421"], 0, "terminated", 0),
    ("dial", "program", "STOP"): (["220", "250", "454", "221"], 0, "over", 0),
    # That PROG is gone is seen when the dialogue with it goes on.
    ("dial", "prog", "KILL"): (["220", "250", "454", "421"], 111, "child closed", 0),
    ("dial", "prog", "TERM"): (["220", "250", "454", "421"], 111, "child closed", 0),
    ("dial", "prog", "STOP"): (["220", "250", "454", "421"], 99, "time-out (snoop)", 0),
    # The client is served: whatever comes changes nothing for it, and nothing of the line in the log.
    ("farewell", "program", "KILL"): (SAID, -signal.SIGKILL, "over", 0),
    ("farewell", "program", "TERM"): (SAID, 0, "over", 0),
    ("farewell", "program", "STOP"): (SAID, 0, "over", TIMERS["farewell-timeout"]),
    ("farewell", "prog", "KILL"): (SAID, 0, "over", 0),
    ("farewell", "prog", "TERM"): (SAID, 0, "over", 0),
    # Stopped it takes no SIGTERM.
    ("farewell", "prog", "STOP"): (SAID, 0, "over", 2 * TIMERS["farewell-timeout"]),
}


def without_backend(*more):
    """PROG that is kept can be hit where the backend was, and more."""
    return {
        "replay": (asked, STOPPED_AT_RESET, None, ["program", "prog", *more]),
        "client's handshake": (switched, PROG, None, ["program", "prog", *more]),
        "gate": (answered_inside, PROG, None, ["program", "prog", *more]),
        "relay inside TLS": (in_text_inside, PROG, None, ["program", "prog", *more]),
    }


def respawning(*more):
    """The fresh PROG can be, and the process that waits to become it."""
    return {
        "dialogue": (helloed, PROG, None, ["program", "prog", "waiting", *more]),
        "client's handshake": (switched, PROG, None, ["program", "waiting", *more]),
        "fresh greeting": (inside, FRESH_STOPPED, None, ["program", "prog", *more]),
        "fresh replay": (inside, FRESH_STOPPED_LATER, None, ["program", "prog", *more]),
        "gate": (answered_inside, PROG, None, ["program", "prog", *more]),
        "relay inside TLS": (in_text_inside, PROG, None, ["program", "prog", *more]),
        "relay": (in_text, PROG, None, ["program", "prog"]),
    }


# By way; those without TLS are the same in each but where somebody is let go. The late ones have none here: HOST is a HAProxy for all
# sessions, whose end is not a session's; tests/hostile has their states.
STATES_OF = {
    "tls": STATES,
    "plain": {state: row for state, row in STATES.items() if row[0] in (asked, switched, answered_inside, in_text_inside, parted)},
    "keep": without_backend(),
    "respawn": respawning(),
    "raw": {
        "client's handshake": (switched, PROG, PROG, ["program"]),  # the backend's is not begun
        "muted greeting": (inside, PROG, STOPPED, ["program", "backend"]),
        "relay inside TLS": (in_text_inside, PROG, PROG, ["program", "backend"]),
    },
    "put-off": {
        "dialogue": (helloed, PROG, PROG, ["program", "waiting"]),
        "backend's handshake": (asked, PROG, None, ["program", "waiting", "backend"]),
        "client's handshake": (switched, PROG, PROG, ["program", "backend"]),
        "briefing": (needing_prog, STOPPED, PROG, ["program", "prog"]),
        "relay": (in_text, PROG, PROG, ["program", "prog"]),
    },
    "ucspi-tls": without_backend("server") | {"dialogue": (helloed, PROG, None, ["program", "prog", "server"])},
    "ucspi-tls-respawn": respawning("server"),
    "mute": {
        "muted greeting": (hello, STOPPED, None, ["program", "prog"]),
        "gate": (muted, PROG, None, ["program", "prog"]),
        "relay": (in_text_muted, PROG, None, ["program", "prog"]),
    },
}


def cases(ground):
    states = STATES_OF.get(ground.way.name, {}).items()
    return [("signals", state, (who, name)) for state, (*_, hit) in states for who in hit for name in SIGNALS]


def is_stopped(pid):
    return described(pid).endswith("T")


def called(pid):
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@contextlib.contextmanager
def full(address):
    """The port of one who accepts nobody, and has no room for who dials it."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.create_server((address, 0), backlog=0))
        for _ in range(16):
            caller = held.enter_context(socket.socket())
            caller.settimeout(0.1)
            try:
                caller.connect(listener.getsockname())
            except TimeoutError:
                caller.close()  # or it would dial on, and pass for another
                break
        else:
            raise Broken("its queue is never full")
        yield listener.getsockname()[1]


def is_dialled(address, port):
    """Somebody waits for a connection to it to stand."""
    octets = "".join(f"{int(octet):02X}" for octet in reversed(address.split(".")))
    with open("/proc/net/tcp", encoding="ascii") as table:
        return any(line.split()[2:4] == [f"{octets}:{port:04X}", "02"] for line in table)


def child_of(one, who):
    """The one child that is PROG, or waits to become it, or is the UCSPI-TLS server; nothing as long as that is not clear."""
    kinds = {SERVER: "server", called(one.process.pid): "waiting"}
    children = {pid: kinds.get(called(pid), "prog") for pid in children_of(one.process.pid)}
    if one.tls and who == "prog" and "waiting" in children.values():
        return None  # the fresh one is meant
    found = [pid for pid, kind in children.items() if kind == who]
    return found[0] if len(found) == 1 else None


def run(ground, state, detail):
    """The verdict of one case."""
    who, name = detail
    reach, prog, backend_prog, _ = STATES_OF[ground.way.name][state]
    stage = ground.stage
    tag = f"{ground.way.name}-signal-{next(ground.numbers)}"
    held = contextlib.ExitStack()
    is_full = backend_prog is FULL
    port = held.enter_context(full(stage.address)) if is_full else ground.way.behind(stage, ground.tls, backend_prog or PROG, tag)
    backend = stage.daemons.get(tag)
    if backend and backend_prog is None:
        os.kill(backend.pid, signal.SIGSTOP)  # the kernel still accepts connections for it
    one = Session(stage, ground.wrapper(port, prog), ground.plain, tag, ground.way.greets)
    try:
        try:
            reach(one)
        except (Cut, Refused) as why:
            raise Broken(f"the state is not reached: {why!r}") from None
        targets = {
            "program": lambda: one.process.pid,
            **{kind: lambda kind=kind: child_of(one, kind) for kind in ("prog", "waiting", "server")},
            "backend": lambda: backend.pid if backend_prog is None else next(iter(children_of(backend.pid)), None),
        }
        pid = wait_for(f"the {who}", targets[who], 5)
        settle(backend, one, prog, backend_prog)
        if is_full:
            wait_for("it to dial", lambda: is_dialled(stage.address, port), 5)
        stopped = [pid for pid in children_of(one.process.pid) if is_stopped(pid)]
        staying = children_of(one.process.pid) if prog is STAYING else []
        try:
            os.kill(pid, SIGNALS[name])
        except ProcessLookupError:
            raise Broken(f"the {who} was gone before it was hit") from None
        goes_on = None
        if name == "STOP" and who == "program":
            wait_for("it to stop", lambda: is_stopped(pid), 5)
            if state in CONTINUES:
                CONTINUES[state](one)
                goes_on = resume
            os.kill(pid, signal.SIGCONT)
        if name == "KILL" and who == "program":
            for each in stopped:  # or nothing would ever make it notice
                os.kill(each, signal.SIGCONT)
            for each in staying:  # which nobody sends away any more
                os.kill(each, signal.SIGTERM)
        if name == "STOP" and who == "server":
            threading.Thread(target=continue_behind, args=(one.process.pid, pid), daemon=True).start()
        # A UCSPI-TLS server that awaits the client's hello hears of nobody that the program was killed.
        is_unheard = who in ("waiting", "server") or ground.way.under and (who, name) == ("program", "KILL")
        verdict = follow(one, GOES_ON.get(state) if is_unheard else goes_on)
        code, seconds = one.wait()
        lasted = time.monotonic() - one.asked
        if (who, name) != ("program", "KILL"):
            check_reaped(one)
        wait_for_end(one)
        expect(seconds < BUSY, f"busy: {seconds:.2f} s of a processor")
        expect(is_right(ground.way, state, detail, one, verdict, code, lasted), f"{verdict} in phase {one.phase}, exit {code}: {one.said()[-300:]}")
        check_letter(ground, one, verdict)
        return verdict
    finally:
        one.kill()
        put_away(stage, tag)
        held.close()
        one.log.unlink(missing_ok=True)


def put_away(stage, name):
    """Ends a server of one run, if there is one of this name."""
    if daemon := stage.daemons.pop(name, None):
        for pid in [*below(daemon.pid), daemon.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()
    (stage.folder / f"{name}.log").unlink(missing_ok=True)


def check_letter(ground, one, verdict):
    """The letter in whose midst the client was: it came if the client could end it, and else no part of it did."""
    letters = [letter for queue in {ground.plain, ground.tls} for letter in found_in(queue, one.mark)] if one.mark else []
    whole = [letter for letter in letters if letter.endswith(one.mark + b"\n")]
    expect(len(letters) == len(whole) == (1 if one.mark and verdict == "right" else 0), "letters that came:", letters)


def is_right(way, state, detail, one, verdict, code, lasted):
    """What README and tests/hostile/phases.rs promise."""
    who, name = detail
    if exactly := EXACTLY.get((state, *detail)):
        *rest, least = exactly
        is_told = "454" not in one.codes or f"answered 454: way {way.name}, dial failed: time-out" in one.said()
        return [one.codes, code, one.summary()] == rest and lasted >= least and is_told
    if who == "program" and name == "KILL":
        return verdict == "cut" and code == -signal.SIGKILL
    if code not in ENDS or "bug" in one.summary():
        return False
    if who == "program" and name == "TERM":
        is_silent = state in RELAYED | {"client's handshake"} or one.tls and way.name == "raw"
        # No client takes what was cut for whole.
        is_so = verdict == "cut" and not (way.ends_tls and one.parted) if is_silent else verdict == "421"
        return is_so and code == 0 and one.summary() == "terminated"
    if who == "program" and state in CONTINUES:
        # This client ends TLS without a close_notify.
        return verdict == "right" and (one.tls and code == 1 or (code, one.summary()) == (0, "over"))
    if verdict == "right":
        # That PROG could not be had is not missed where it was not needed.
        return way.puts_off and who == "waiting"
    if verdict == "454":
        return True
    if verdict != "cut":
        if one.tls and way.name == "raw":
            return verdict == "421"  # HOST says it
        return verdict == "421" and code and one.summary() not in ("", "over")
    if who == "backend" and code == 0 and state in RELAYED | {"muted greeting"}:
        # Its PROG was hit, and it has ended as it always does.
        return one.parted and one.summary() == "over"
    # In the dialogue, whoever else is gone, a whole reply says so.
    return code and one.summary() not in ("", "over") and (one.phase != "snoop" or not one.greets)


def reads_signals(pid):
    """SIGINT and SIGTERM are blocked, to be read: before, while PROG is started already, a SIGTERM just ends the program."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk")) == 1 << 1 | 1 << 14


def settle(backend, one, prog, backend_prog):
    """Waits until the program is at work, and the processes that stop themselves have."""
    wait_for("the program to read signals", lambda: reads_signals(one.process.pid), 5)
    if prog in STOPS:
        wait_for("PROG to stop", lambda: any(map(is_stopped, children_of(one.process.pid))), 5)
    if prog is STAYING:
        wait_for("PROG to stay behind the session", lambda: called(child_of(one, "prog")) == "sleep" and one.summary(), 5)
    if backend_prog in (STOPPED, STOPPED_LATER):
        wait_for("the backend to stop", lambda: any(map(is_stopped, below(backend.pid))), 5)


def continue_behind(program, pid):
    """Continues `pid` when the program has ended."""
    with contextlib.suppress(Broken, OSError):
        wait_for("the program to end", lambda: described(program)[-1:] in ("", "Z"), 2 * GONE)
        os.kill(pid, signal.SIGCONT)


def to_tls(one):
    """From the dialogue."""
    one.send(b"STARTTLS\r\n")
    one.reply("220")
    one.handshake()


# What the client does then, where it would notice nothing otherwise.
GOES_ON = {"dialogue": to_tls, "client's handshake": Session.handshake}


# And what it says while the program is stopped, if nobody else is.
CONTINUES = {
    "dialogue": lambda one: one.send(b"NOOP\r\n"),
    "half a line": lambda one: one.send(b"OP\r\n"),
    "client's handshake": Session.hello,
    "gate": lambda one: one.send(b"NOOP\r\n"),
    "relay": lambda one: one.send(b".\r\n"),
    "relay inside TLS": lambda one: one.send(b".\r\n"),
}


def resume(one):
    """Behind that."""
    if one.phase == "handshake":
        one.handshake()


def follow(one, goes_on=None):
    """What the client sees until the end: whole replies, or TLS."""
    verdict, farewell = "cut", b"\r\n.\r\nQUIT\r\n"  # perhaps in a letter
    try:
        if goes_on:
            try:
                goes_on(one)
            except Refused as why:
                verdict = str(why)[:3]
            one.send(b"EHLO client.example\r\n")
        while True:
            try:
                one.reply("220", "221", "250", "354", "500", "502", "503")
                verdict = "right" if verdict == "cut" else verdict
                one.send(b"QUIT\r\n" if farewell and one.phase == "snoop" else farewell)
            except Refused as why:
                verdict = str(why)[:3]
                one.send(b"QUIT\r\n" if farewell else b"")
            farewell = b""
    except Cut as cut:
        expect(not cut.octets or one.phase != "snoop", "cut inside a reply:", cut.octets)
        return verdict


def left_by(one):
    """The processes of its session that its program, which has ended, left to us."""
    found = []
    for pid in children_of(os.getpid()):
        with contextlib.suppress(OSError):
            if os.getsid(pid) == one.process.pid != pid:
                found.append(pid)
    return found


def check_reaped(one):
    """Nobody, running or dead, was left by a program that ended by itself, but the UCSPI-TLS server, whose child it is made to look."""
    left = [described(pid) for pid in left_by(one) if called(pid) != SERVER]
    expect(not left, "not reaped by it:", left)


def wait_for_end(one):
    """No process of the session is left in the end."""
    def left():
        found = []
        for pid in left_by(one):
            with contextlib.suppress(OSError, ChildProcessError):
                if described(pid).endswith("Z"):
                    os.waitpid(pid, os.WNOHANG)
                else:
                    found.append(described(pid))
        return found

    try:
        wait_for("its processes to end", lambda: not left(), GONE)
    except Broken:
        raise Broken(f"left behind: {left()}") from None
