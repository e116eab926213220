"""KILL, TERM and STOP for a listener, its spawner, a client's PROG, and its connection's server at HOST, in each state of a session.

A second client has said EHLO meanwhile: unless it is the listener or its spawner that is killed or told to end, it must notice nothing, and a third
one's letter must arrive. A listener that was stopped is continued, and its sessions go on where they were; whoever else is stopped is silent,
and a timer must end that. In the end nobody is left. Timers are those of session.py; on SIGTERM sessions have no time to end (`--drain 0`).
"""

import contextlib
import os
import re
import signal

import session
import signals
from listening import GONE, Listener, Visit
from session import Cut, Refused, check_letters
from signals import CONTINUES, PROG, RELAYED, SIGNALS, STOPPED, STOPPED_LATER, check_letter, follow, helloed, is_stopped, resume
from stage import Broken, below, children_of, expect, wait_for

SHUTDOWN = {("listener", "TERM"), ("spawner", "KILL")}
UNHIT = {("listener", "STOP"), ("spawner", "TERM"), ("spawner", "STOP")}  # sessions go on, unless they need the spawner


def needing_prog(one):
    one.send(b"MAIL FROM:<a@client.example>\r\n")


# As in signals.py: PROG is there where a session needs it, and not before.
ALL = ["listener", "spawner"]
IN_CLEAR = {
    "dialogue": (helloed, PROG, PROG, ALL),
    "half a line": (signals.half_a_line, PROG, PROG, ALL),
    "briefing": (signals.needing_prog, STOPPED, PROG, [*ALL, "prog"]),
    "relay": (signals.in_text, PROG, PROG, [*ALL, "prog"]),
}
TO_HOST = {
    "backend's greeting": (signals.asked, PROG, STOPPED, [*ALL, "backend"]),
    "replay": (signals.asked, PROG, STOPPED_LATER, [*ALL, "backend"]),
    "client's handshake": (signals.switched, PROG, PROG, [*ALL, "backend"]),
    "gate": (signals.answered_inside, PROG, PROG, [*ALL, "backend"]),
    "relay inside TLS": (signals.in_text_inside, PROG, PROG, [*ALL, "backend"]),
}
STATES_OF = {
    "listen": {**IN_CLEAR, "backend's handshake": (signals.asked, PROG, None, [*ALL, "backend"]), **TO_HOST},
    "listen-clear": TO_HOST,
    "listen-keep": {
        "client's handshake": (signals.switched, PROG, None, [*ALL, "prog"]),
        "briefing": (signals.asked, STOPPED, None, [*ALL, "prog"]),
        "gate": (signals.answered_inside, PROG, None, [*ALL, "prog"]),
        "relay inside TLS": (signals.in_text_inside, PROG, None, [*ALL, "prog"]),
    },
    # "prog" is the server that the daemon has started for the client.
    "listen-plain": {
        "dialogue": (helloed, PROG, PROG, ["listener"]),
        "relay": (signals.in_text, PROG, PROG, ["listener", "prog"]),
        "client's handshake": (signals.switched, PROG, PROG, ["listener", "backend"]),
        "relay inside TLS": (signals.in_text_inside, PROG, PROG, ["listener", "backend"]),
    },
    "listen-raw": {
        "client's handshake": (signals.switched, PROG, PROG, ALL),
        "muted greeting": (signals.inside, PROG, STOPPED, [*ALL, "backend"]),
        "relay inside TLS": (signals.in_text_inside, PROG, PROG, [*ALL, "backend"]),
    },
}


class Client(Visit):
    """One whose end the listener's log tells."""

    def __init__(self, listener):
        super().__init__(listener.stage, listener.port)
        self.listener = listener

    def summary(self):
        return "".join(re.findall(session.SUMMARY % re.escape(self.name), self.listener.said())[-1:])


def cases(ground):
    states = STATES_OF[ground.way.name].items() if ground.way.listens else []
    return [("listener-signals", state, (who, name)) for state, (*_, hit) in states for who in hit for name in SIGNALS]


def run(ground, state, detail):
    """The verdict of the client that is in this state."""
    who, name = detail
    reach, prog, backend_prog, _ = STATES_OF[ground.way.name][state]
    stage, tag = ground.stage, f"{ground.way.name}-signal-{next(ground.numbers)}"
    port = ground.way.behind(stage, ground.tls, backend_prog or PROG, tag)
    daemon_port = stage.tcpserver(f"{tag}-daemon", PROG, ground.plain) if ground.way.is_daemons else None
    backend, daemon = stage.daemons.get(tag), stage.daemons.get(f"{tag}-daemon")
    listener = Listener(ground, more=["--drain", "0"], prog=prog, backend=port, daemon=daemon_port)
    try:
        one, other = Client(listener), Client(listener)
        helloed(other)
        if backend and backend_prog is None:
            os.kill(backend.pid, signal.SIGSTOP)  # the kernel still accepts connections for it
        try:
            reach(one)
        except (Cut, Refused) as why:
            raise Broken(f"the state is not reached: {why!r}") from None
        spawner = daemon.pid if daemon else wait_for("one spawner", lambda: children_of(listener.process.pid)[:1], 5)[0]
        targets = {
            "listener": lambda: listener.process.pid,
            "spawner": lambda: spawner,
            "prog": lambda: next(iter(children_of(spawner)), None),
            "backend": lambda: backend.pid if backend_prog is None else next(iter(children_of(backend.pid)), None),
        }
        pid = wait_for(f"the {who}", targets[who], 5)
        settle(listener, backend, prog, backend_prog)
        stopped = [each for each in below(listener.process.pid) if is_stopped(each)]
        os.kill(pid, SIGNALS[name])
        if name == "STOP" and who in ALL:
            wait_for("it to stop", lambda: is_stopped(pid), 5)
        is_unhit = detail in UNHIT and state in CONTINUES
        if is_unhit:
            (needing_prog if detail == ("spawner", "STOP") and state == "dialogue" else CONTINUES[state])(one)
        if detail == ("listener", "STOP"):
            os.kill(pid, signal.SIGCONT)
        if who in ("listener", "spawner") and name == "KILL":
            for each in stopped:  # or nothing would ever make it notice
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGCONT)
        is_end = detail in SHUTDOWN or detail == ("listener", "KILL")
        seen = follow(other, None if is_end else lambda one: None)
        verdict = follow(one, resume if is_unhit else None)
        expect(is_right(ground.way, state, detail, one, verdict), f"{verdict} in phase {one.phase}:", listener.said()[-400:])
        expect("panicked" not in listener.said(), listener.said()[-400:])
        check_letter(ground, one, verdict)
        if is_end:
            check_end(listener, detail, seen)
        else:
            check_others(ground, listener, prog, seen, pid)
        return verdict
    finally:
        listener.kill()
        for name in (tag, f"{tag}-daemon"):
            signals.put_away(stage, name)
        listener.log.unlink(missing_ok=True)


def settle(listener, backend, prog, backend_prog):
    """Waits until those that stop themselves have."""
    for process, each in ((listener.process, prog), (backend, backend_prog)):
        if each in (STOPPED, STOPPED_LATER):
            wait_for("somebody to stop", lambda process=process: any(map(is_stopped, below(process.pid))), 5)


def is_right(way, state, detail, one, verdict):
    """What README promises to the client that is in this state."""
    who, name = detail
    if detail == ("listener", "KILL"):
        return verdict == "cut"
    if detail in SHUTDOWN:
        is_silent = state in RELAYED | {"client's handshake"} or one.tls and way.name == "listen-raw"
        # No client takes what was cut for whole.
        return verdict == "cut" and not (way.ends_tls and one.parted) if is_silent else verdict == "421"
    if (who, name, state) == ("spawner", "STOP", "dialogue"):
        # PROG was needed, and could not be had in time.
        return verdict == "421" and "snoop" not in wait_for("the log to tell its end", one.summary, GONE)
    if who in ("listener", "spawner") and state in CONTINUES:
        return verdict == "right"
    if verdict == "454":
        return not one.tls
    said = wait_for("the log to tell its end", one.summary, GONE)
    if "bug" in said:
        return False
    if verdict == "421":
        return said != "over" or one.tls and way.name == "listen-raw"  # HOST says it
    if verdict == "cut" and said == "over":
        # Somebody behind a server was hit, and that has ended as it always does.
        return who == "backend" and one.parted or who == "prog" and way.is_daemons
    return verdict == "cut" and said != "over" and one.phase != "snoop"


def check_end(listener, detail, seen):
    """What the other client has seen, and the supervisor sees, of a listener that has ended by the signal."""
    wanted = {("listener", "KILL"): ("cut", -signal.SIGKILL), ("listener", "TERM"): ("421", 0), ("spawner", "KILL"): ("421", 111)}[detail]
    code = listener.process.wait(GONE)
    listener.wait_until_gone()
    expect((seen, code) == wanted, f"the other one: {seen}; exit {code}:", listener.said()[-300:])


def check_others(ground, listener, prog, seen, pid):
    """The others have noticed nothing, and the listener ends as it should."""
    expect(seen == "right", f"the other one: {seen}:", listener.said()[-300:])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    third = Client(listener)
    if prog is STOPPED:  # it would be for this one too
        helloed(third)
        third.send(b"QUIT\r\n")
        third.reply("221")
    else:
        leave_a_letter(ground, listener, third)
    third.close()
    code = listener.end()
    expect(code == 0, f"told to end: exit {code}:", listener.said()[-300:])


def leave_a_letter(ground, listener, third):
    mark = f"Subject: third {third.name} of {os.getpid()}\r\n".encode()
    verdict, accepted = third.deliver(mark + b"\r\ntext\r\n", by_tls=False)
    expect(verdict == "right", f"the third one: {verdict}:", listener.said()[-300:])
    check_letters(mark.strip(), b"\r\ntext\r\n", False, verdict, accepted, ground.plain, ground.tls)
