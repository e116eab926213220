"""System calls that fail, limits down to the floor, and processes that are killed or stopped, in real sessions; each run is judged by
session.py, and what is no verdict there is printed with how to repeat it.

    faults.py [KIND...]                    of these kinds, or none named: all six: calls limits signals, listener listener-limits listener-signals
    faults.py --sample N                   so many, as many of each kind, drawn with a seed that is printed (--seed S draws them again)

A call fails by strace's injection: EINTR, EAGAIN, EMFILE, ENOMEM, EPIPE, ECONNRESET and EIO at the 1st to 20th call of each system call
that a session without faults makes, in clear and by STARTTLS, in the program and in what it forks, up to where that becomes PROG (under a
UCSPI-TLS server in the program alone). Left out are execve (strace's own), exit_group, arch_prctl and
set_tid_address, which the C library makes before the program begins and which can't fail, and close: what strace makes fail is not
carried out, while Linux closes the descriptor whatever it returns; and getrandom and geteuid, which can't fail either, and without which
std, AWS-LC and rustix abort. Three verdicts are added here:

    unreached no call had this number: in a session without faults it had, and how often some are made is up to the scheduler
    start     the language's runtime aborted before the program's first statement; nothing had begun
    memory    an allocation failed, or a stack of less than 64 KiB was full, and the program was aborted; the client sees the end of the connection, PROG
              the end of its input
"""

import argparse
import collections
import concurrent.futures
import hashlib
import itertools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import listener_signals
import listening
import session
import signals
from session import ABORTS, UNREACHED, Session, check_letters
from stage import MAILFRONT, Broken, Stage, described, expect, limit, wait_for
from ways import LISTENERS, MUTE, WAYS

ERRORS = ["EINTR", "EAGAIN", "EMFILE", "ENOMEM", "EPIPE", "ECONNRESET", "EIO"]
MOST = 20
# Who is interrupted here tries again, and nobody notices. (A connect that is interrupted goes on by itself, but not where strace did not make it.)
INTERRUPTIBLE = {"read", "write", "splice", "epoll_wait", "epoll_pwait", "poll", "recvmsg", "sendmsg", "recvfrom", "sendto"}
NOT_OURS = {"execve", "close", "getrandom", "geteuid", "exit_group", "exit", "arch_prctl", "set_tid_address", "rt_sigreturn", "+++", "---"}
TO_CLIENT = re.compile(r"[\d ]*((readv?|writev?|recv\w+|send\w+|shutdown)\([01]\b|splice\(\d+, NULL, [01]\b)")
TO_PROG = r"[\d ]*(write\((?![012]\b)|splice\(\d+, NULL, (?![01]\b))"
READ = re.compile(r"[\d ]*read\(")
WORKERS = 3
TRIES = 3
VERDICTS = ["right", UNREACHED, "454", "421", "cut", "start", "memory", "ended", "lost", "BROKEN"]


class Ground:
    """One way of the program: what goes on behind TLS, and a queue of its own for PROG and for that."""

    def __init__(self, stage, way):
        self.stage, self.way = stage, way
        self.plain = stage.queue(f"{way.name}-plain")
        self.tls = stage.queue(f"{way.name}-tls") if way.server else self.plain
        self.backend = way.behind(stage, self.tls, name=f"{way.name}-backend")
        self.daemon = stage.tcpserver(f"{way.name}-daemon", MAILFRONT, self.plain) if way.is_daemons else None
        self.numbers = itertools.count(1)

    def modes(self):
        """How letters come: what happens in clear has to do with the way only where somebody is let go then."""
        return ("clear", "tls") if self.way.name in ("tls", "respawn", "put-off", "ucspi-tls") else ("tls",) if self.way.greets else ("clear",)

    def wrapper(self, backend, prog=MAILFRONT, through=()):
        return self.way.wrapper(self.stage, backend, *self.way.timers(session.TIMERS), prog=prog, through=through)

    def deliver(self, by_tls, through=(), traced=(), trace=list, name="", prog=MAILFRONT, stack_too_small=False, has_log=True):
        """One letter; the verdict. `trace()` are the lines of strace's log, `name` the call that fails, or the limit."""
        if traced:
            through = HELD if self.way.under else ["strace", "-f", "--detach-on=execve", *traced]
        argv, tag = self.wrapper(self.backend, prog, through), f"{self.way.name}-{next(self.numbers)}"
        run = Session(self.stage, argv, self.plain, tag, self.way.greets)
        tracer = traced and self.way.under and attach(run.process.pid, traced)
        mark = f"Subject: run {run.tag} of {os.getpid()}\r\n".encode()
        letter = mark + b"\r\n" + b"\n".join(b"..line %d\r" % n for n in range(200)) + b"\n"
        try:
            verdict, accepted = run.deliver(letter, by_tls)
            code, seconds = run.wait()
            if tracer:
                tracer.wait(5)
            if code in ABORTS:
                # PROG, if there was one, hears the end of its input and goes.
                signals.wait_for_end(run)
                self.check(letter, by_tls, verdict, accepted)
                return session.aborted(code, run.said(), name, trace(), run.heard, stack_too_small)
            signals.check_reaped(run)
            # A UCSPI-TLS server, which under strace is not its child, may take its time.
            signals.wait_for_end(run)
        except Broken:
            run.kill()
            raise
        expect(code >= 0 and code != 101, f"exit {code}: {run.said()[-300:]}")
        expect(seconds < session.BUSY, f"busy: {seconds:.2f} s of a processor")
        self.check(letter, by_tls, verdict, accepted)
        injected = lambda: injected_of(trace())
        if verdict == "cut":
            expect(run.phase != "snoop" or self.is_clients(injected()), f"cut in the dialogue, exit {code}: {run.said()[-300:]}")
            is_told = code and (run.summary() not in ("", "over") or not has_log)
            is_over = (code, run.summary()) == (0, "over") and any(map(self.may_go_unsaid(run.phase).match, injected()))
            expect(is_told or is_over, f"cut in phase {run.phase}, exit {code}, {injected()}: {run.said()[-300:]}")
        run.log.unlink()
        return verdict

    def may_go_unsaid(self, phase):
        """The calls whose failure is no failure of the session: what is said to a PROG that reads no more (EPIPE), and the last of the client's TLS, behind everything else."""
        to_prog = TO_PROG + ".*EPIPE"
        return re.compile(f"{to_prog}|{TO_CLIENT.pattern}" if phase == "farewell" else to_prog)

    def is_clients(self, injected):
        """It was the client's own connection, descriptor 0 or 1, that broke."""
        # Behind TLS what is lost of PROG's words is an end without one.
        return any(map(TO_CLIENT.match, injected)) or not self.way.greets and any(map(READ.match, injected))

    def check(self, letter, by_tls, verdict, accepted):
        mark, text = letter.splitlines()[0], letter.replace(b"\r\n..", b"\r\n.")
        check_letters(mark, text, by_tls, verdict, accepted, self.plain, self.tls)


def injected_of(trace):
    return [line for line in trace if "(INJECTED)" in line]


# ---- system calls

# A strace before the program would hold the descriptors by whose end a UCSPI-TLS server is told to go: there it comes from outside.
HELD = ["sh", "-c", 'kill -STOP $$; exec "$@"', "sh"]


def attach(pid, options):
    wait_for("the program to be held", lambda: described(pid).endswith("T"), 5)
    tracer = subprocess.Popen(["strace", *map(str, options), "-p", str(pid)], stderr=subprocess.DEVNULL)
    wait_for("strace", lambda: "TracerPid:\t0\n" not in pathlib.Path(f"/proc/{pid}/status").read_text(), 5)
    os.kill(pid, signal.SIGCONT)
    return tracer


def trace_options(name, error, nth, log):
    return ["-o", log, "-e", "signal=none", "-e", f"trace={name},close_range", "-e", f"inject={name}:error={error}:when={nth}"]


def calls_made(ground, by_tls):
    """Name and number of the system calls of a session without faults, in the process that makes the most of each."""
    log = ground.stage.folder / "clean.trace"
    verdict = ground.deliver(by_tls, traced=["-o", log])
    expect(verdict == "right", "a session without faults:", verdict)
    counted = collections.Counter(re.findall(r"^(\d* *)(\w+)\(", log.read_text(), re.M))
    most = collections.Counter()
    for (_, name), count in counted.items():
        most[name] = max(most[name], count)
    return {name: count for name, count in most.items() if name not in NOT_OURS}


def call_cases(ground):
    return [
        ("calls", name, (mode, error, nth))
        for mode in ground.modes() for name, count in sorted(calls_made(ground, mode == "tls").items())
        for nth in range(1, min(count, MOST) + 1) for error in ERRORS
    ]


def run_call(ground, name, detail):
    mode, error, nth = detail
    log = ground.stage.folder / f"{ground.way.name}-{mode}-{name}-{error}-{nth}.trace"

    def trace():
        return log.read_text(errors="replace").splitlines()

    # A PROG that has gone when it is looked for is not waited for.
    prog = [signals.RIG_PROG, "lingering", *MAILFRONT] if name == "pidfd_open" else MAILFRONT
    # Another time where the number was not reached; or the machine was too slow for the timers.
    for _ in range(TRIES):
        verdict = ground.deliver(mode == "tls", traced=trace_options(name, error, nth, log), trace=trace, name=name, prog=prog)
        if injected_of(trace()):
            break
    expect(verdict == "right" or error != "EINTR" or name not in INTERRUPTIBLE, f"an interrupted call made it {verdict}")
    if not injected_of(trace()):
        expect(verdict == "right", f"{verdict} without a fault")
        verdict = UNREACHED
    log.unlink(missing_ok=True)
    return verdict


# ---- limits

LIMITS = (
    [("nofile", n) for n in range(20, 2, -1)]
    + [("as", n << 20) for n in (64, 32, 24, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2)]
    + [("data", n << 10) for n in (16384, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 0)]
    + [("stack", n << 10) for n in (1024, 256, 128, 64, 32, 16)]
    + [("fsize", 0), ("sigpending", 0), ("memlock", 0), ("msgqueue", 0), ("core", 0), ("cpu", 1), ("locks", 0)]
    + [("nproc", n) for n in (3, 2, 1)]
)
USERS = itertools.count(61184 + os.getpid() % 4000)  # each session of few processes has one of its own, out of a range that nobody has (systemd's dynamic ones)


def limit_cases(ground):
    return [("limits", name, (mode, value)) for name, value in LIMITS for mode in ground.modes()]


def limited(name, value):
    """What runs a program within this limit."""
    through = ["prlimit", f"--{name}={value}"]
    if name == "nproc" and os.geteuid() == 0:
        # Root is exempt from it, and a user's other processes count.
        user = next(USERS)
        through = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *through]
    return through


def listener_limit_cases(ground):
    others = [(name, value) for name, value in LIMITS if name in ("as", "data", "stack", "nproc")]
    return [("listener-limits", name, (value,)) for name, value in [*(("nofile", n) for n in range(60, 2, -3)), *others]]


def run_listener_limit(ground, name, detail):
    return listening.run_within(ground, name, limited(name, *detail), stack_too_small=name == "stack" and detail[0] < 64 << 10)


def run_limit(ground, name, detail):
    mode, value = detail
    through = limited(name, value)
    # The log is a file.
    return ground.deliver(mode == "tls", through, name=name, stack_too_small=name == "stack" and value < 64 << 10, has_log=name != "fsize")


RUNNERS = {"calls": run_call, "limits": run_limit, "signals": signals.run}
RUNNERS |= {"listener": listening.run, "listener-limits": run_listener_limit, "listener-signals": listener_signals.run}
CASES = {"calls": call_cases, "limits": limit_cases, "signals": signals.cases}
CASES |= {"listener": listening.cases, "listener-limits": listener_limit_cases, "listener-signals": listener_signals.cases}


def told(case):
    way, kind, name, detail = case
    return f"{way} {kind} {name} {' '.join(map(str, detail))}"


def sample(cases, size, seed):
    """So many, in equal parts of each kind as far as it has as many. A case is in or out by its own description: the next run, in which some call
    is made once more, draws the same."""
    drawn = sorted(cases, key=lambda case: hashlib.sha256(f"{seed} {told(case)}".encode()).digest())
    kinds = [[case for case in drawn if case[1] == kind] for kind in CASES]
    dealt = [case for deal in itertools.zip_longest(*kinds) for case in deal if case]
    return dealt[:size]


def is_idle(counted, part):
    """More than one `part` of all faults were not injected, after TRIES: what is left of a row says too little."""
    return counted[UNREACHED] * part > sum(counted.values())


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("kinds", nargs="*", help="calls, limits, signals, listener, listener-limits, listener-signals")
    arguments.add_argument("--sample", type=int)
    arguments.add_argument("--seed", type=int, default=None)
    arguments.add_argument("--only", help="cases whose description, as printed, matches this pattern")
    options = arguments.parse_args()
    limit(5400)
    table, broken, started = collections.defaultdict(collections.Counter), [], time.monotonic()
    with Stage() as stage:
        stage.certificate()
        grounds = {name: Ground(stage, way) for name, way in {**WAYS, MUTE.name: MUTE, **LISTENERS}.items()}
        cases = [
            (way, *case) for way, ground in grounds.items() for kind in options.kinds or CASES
            if kind.startswith("listener") == ground.way.listens for case in CASES[kind](ground)
        ]
        if options.only:
            cases = [case for case in cases if re.search(options.only, told(case))]
            expect(cases, "no run is described so:", options.only)
        if options.sample:
            seed = options.seed if options.seed is not None else random.randrange(10**6)
            print(f"seed {seed}")
            cases = sample(cases, options.sample, seed)

        def run(case):
            try:
                way, kind, name, detail = case
                return case, RUNNERS[kind](grounds[way], name, detail), ""
            except Broken as why:
                return case, "BROKEN", str(why)

        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            for case, verdict, why in pool.map(run, cases):
                table[case[:3]][verdict] += 1
                if why:
                    broken.append(f"{told(case)}: {why}")
                    print(broken[-1], flush=True)
    print(f"{'':55}" + "".join(f"{verdict:>10}" for verdict in VERDICTS))
    for (way, kind, name), counted in sorted(table.items()):
        print(f"{way:18}{kind:17}{name:20}" + "".join(f"{counted[verdict] or '':>10}" for verdict in VERDICTS))
    sums = [sum(counted[verdict] for counted in table.values()) for verdict in VERDICTS]
    print(f"{'in all':35}{sum(sums):<20}" + "".join(f"{number:>10}" for number in sums))
    print(f"{time.monotonic() - started:.0f} s; {len(broken)} broken")
    calls = sum((counted for (_, kind, _), counted in table.items() if kind in ("calls", "listener")), collections.Counter())
    idle = ["all in all"] if is_idle(calls, 10) else []
    # All in all it was 0.3 %; a part may be of the calls that lose most, where it was 3 %.
    share = 20 if options.only or options.kinds else 50
    idle += ["what was lost"] if calls["lost"] > max(2, sum(calls.values()) / share) else []
    if not options.sample:  # which has too few of each
        idle += [" ".join(row) for row, counted in sorted(table.items()) if is_idle(counted, 2)]
    for row in idle:
        print(f"{row}: too few faults were injected to say anything")
    sys.exit(1 if broken or idle else 0)


if __name__ == "__main__":
    main()
