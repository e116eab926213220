"""Processes of a contender: how they are started, and what they cost, counted on the server's side only.

Two ways, both exact to the scheduler's nanoseconds:
- `Running.end`: what the whole tree has used from `ready` to its end. This process is a sub-reaper: whatever a contender forks away
  comes to us, and wait4's rusage has it. A server that forks for each session (tcpserver, socat) is ended when its last session is,
  and its rusage holds theirs. A daemon's clock is read before it is killed, so that its end is not on the account.
- `Running.sample`, at two moments of one session: the clocks of all processes that live now, by name.

The kernel charges what a loopback connection costs to whoever runs: a part of a server's receiving is on the client's account. That is
so for every contender and for the bare server.
"""

import contextlib
import ctypes
import os
import pathlib
import signal
import socket
import tempfile
import threading
import time

# What tcpserver would have set, for the sessions that we spawn ourselves.
UCSPI = {"PROTO": "TCP", "TCPLOCALIP": "127.0.0.1", "TCPLOCALPORT": "25", "TCPLOCALHOST": "localhost",
         "TCPREMOTEIP": "127.0.0.1", "TCPREMOTEPORT": "50000"}
# Not the contender's own: the UCSPI server, the mail server. Names as the kernel cuts them.
BYSTANDERS = {"tcpserver", "mailfront", "bench-sink"}
PATIENCE = 40  # seconds that anything may take to end
DEAF = 5  # seconds after which a daemon that does not listen never will


class Failure(Exception):
    """A contender does not do what is asked of it; its row says so."""


class NoStart(Failure):
    """It does not even start; its last words are in here."""


def become_subreaper():
    if ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0) != 0:  # PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "prctl")


def wait_until(condition, what, seconds=None, failure=Failure):
    deadline = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise failure(what)
        time.sleep(0.005)
    return found


# --- /proc ------------------------------------------------------------------------------------------------------------------

def read(pid, name):
    try:
        return pathlib.Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def parents():
    """Parent by process."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := read(entry, "stat")):
            found[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    return found


def descendants(roots):
    above = parents()
    found = [pid for pid in roots if pid in above]
    for pid in found:
        found += [child for child, parent in above.items() if parent == pid]
    return found


def name_of(pid):
    return read(pid, "comm").strip()


def clock(pid):
    """Nanoseconds that all threads of a process ran, those that have ended included (clock_getcpuclockid)."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def status(text, key):
    for line in text.splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    return 0


def switches(pid, kinds=("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")):
    """Of all threads that live."""
    with contextlib.suppress(OSError):
        return sum(status(text, kind) for task in os.listdir(f"/proc/{pid}/task")
                   if (text := read(pid, f"task/{task}/status")) for kind in kinds)
    return 0


def faults(pid):
    fields = read(pid, "stat").rpartition(")")[2].split()
    return int(fields[7]) + int(fields[9]) if fields else 0


def memory(pid):
    """KiB that no other process shares, and KiB of anonymous memory in which what is shared is split among the sharers. Root only, for a
    process that is not dumpable."""
    lines = [line.split() for line in read(pid, "smaps_rollup").splitlines()]
    if not lines:
        raise Failure("the kernel does not show smaps_rollup (run as root)")
    total = lambda begin: sum(int(line[1]) for line in lines if line[0].startswith(begin))
    return total("Private_"), total("Pss_Anon:")


def listening(port):
    ending = f":{port:04X}"
    rows = [line.split() for name in ("tcp", "tcp6") for line in read("net", name).splitlines()[1:]]
    return any(row[1].endswith(ending) and row[3] == "0A" for row in rows)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class OthersShare:
    """What ran beside us from now on until it is said: all processor time but that of our children, who by then have ended."""

    def __init__(self):
        self.began = self.now()

    @staticmethod
    def now():
        user, nice, system, idle, waiting, hard, soft, steal = map(int, read("", "stat").split()[1:9])
        tick = os.sysconf("SC_CLK_TCK")
        return [(user + nice + system + hard + soft) / tick, (idle + waiting) / tick, steal / tick, sum(os.times()[:4])]

    def __str__(self):
        busy, idle, steal, ours = (now - then for now, then in zip(self.now(), self.began))
        all_of_it = max(busy + idle + steal, 0.01)
        return (f"of the processors' time meanwhile, other programs and the kernel had {max(busy - ours, 0) / all_of_it:.0%}, "
                f"the hypervisor {steal / all_of_it:.0%}")


# --- a contender that runs --------------------------------------------------------------------------------------------------

class Usage:
    """seconds, switches, faults. own: seconds of the contender's daemons alone."""

    def __init__(self):
        self.seconds = self.own = 0.0
        self.switches = self.faults = 0

    def add(self, used):
        self.seconds += used.ru_utime + used.ru_stime
        self.switches += used.ru_nvcsw + used.ru_nivcsw
        self.faults += used.ru_minflt + used.ru_majflt


class Running:
    """The processes of one contender; `with Running(stage) as run: port = contender.start(way, run, prog)`; `usage` afterwards.

    What fails in there is told with the last words of these processes, or as the death of one that ran when all were ready."""

    def __init__(self, stage):
        self.stage = stage
        self.forking, self.daemons = [], []
        self.start_cost = {}
        self.usage = Usage()

    def __enter__(self):
        file, self.errors = tempfile.mkstemp(prefix="stderr-", dir=self.stage.folder)
        os.close(file)
        return self

    def last_words(self):
        lines = [line.strip() for line in pathlib.Path(self.errors).read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "nothing said"

    def spawn(self, command, output=None):
        """posix_spawn: between clone and exec nothing of ours runs on the child's account."""
        actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                   (os.POSIX_SPAWN_DUP2, output, 1) if output is not None
                   else (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                   (os.POSIX_SPAWN_OPEN, 2, self.errors, os.O_WRONLY | os.O_APPEND, 0)]
        try:
            pid = os.posix_spawnp(command[0], [str(word) for word in command], self.stage.env, file_actions=actions)
        except OSError as error:
            raise NoStart(f"{command[0]}: {error.strerror}") from error
        self.stage.roots.add(pid)
        return pid

    def said_port(self, command):
        """Starts what prints its port first; returns process and port."""
        read_end, write_end = os.pipe()
        try:
            pid = self.spawn(command, write_end)
        finally:
            os.close(write_end)
        with os.fdopen(read_end) as told:
            line = told.readline()
        if not line.strip().isdigit():
            os.waitpid(pid, 0)
            raise NoStart(f"{command[0]} does not start: {self.last_words()}")
        return pid, int(line)

    def tcpserver(self, command, *options):
        base = ["tcpserver", *options, "-1", "-H", "-R", "-l", "localhost", "-c", "1100", "-b", "1100", "127.0.0.1", "0"]
        pid, port = self.said_port([*base, *command])
        self.forking.append(pid)
        return port

    def tls_server(self, *options):
        """The sink that speaks TLS from the first octet: HOST PORT of those that need one."""
        pid, port = self.said_port([self.stage.sink, "--tls", self.stage.cert, self.stage.key, *options])
        self.daemons.append(pid)
        return port

    def daemon(self, command, port, forking=False):
        """Starts what listens at `port` after a while; `forking` if it has a child for each session."""
        pid = self.spawn(command)
        (self.forking if forking else self.daemons).append(pid)

        def there():
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                raise NoStart(f"{command[0]} does not start: {self.last_words()}")
            return listening(port)
        wait_until(there, f"{command[0]} does not listen after {DEAF} s", DEAF, NoStart)
        return port

    def pids(self):
        return descendants(self.forking + self.daemons)

    def ready(self):
        """What was used until now is no session's."""
        self.start_cost = {pid: (clock(pid), switches(pid), faults(pid)) for pid in self.pids()}

    def sample(self):
        """By process: name, nanoseconds, switches."""
        found = {}
        for pid in self.pids():
            with contextlib.suppress(OSError):
                found[pid] = (name_of(pid), clock(pid), switches(pid))
        return found

    def __exit__(self, kind, error, _):
        try:
            try:
                if kind is None:
                    self.finish()
            except Failure as at_the_end:
                error = at_the_end
            if isinstance(error, Failure) and not isinstance(error, NoStart):
                raise Failure(f"{self.death() or error}; last words: {self.last_words()}") from error
        finally:
            self.end()

    def finish(self):
        wait_until(lambda: self.death() or not self.session_processes(), "a session does not end")
        if death := self.death():  # the figures of what died half-way are not its figures
            raise Failure(death)
        self.count_daemons()

    def death(self):
        """Of what ran when all were ready."""
        for pid in self.start_cost:
            if read(pid, "stat").rpartition(")")[2].split()[:1] in ([], ["Z"]):
                return f"{name_of(pid) or 'a process of it'} died while it was measured"
        return ""

    def session_processes(self):
        return [pid for pid in descendants(self.forking) if pid not in self.forking] + self.orphans()

    def orphans(self):
        """What has come to us by losing its parent. Those that have ended are reaped and counted. Where several contenders run at a
        time (idle), an orphan is anyone's: usage is not asked there."""
        found = []
        ours = {*self.stage.roots, *(child.pid for child in self.stage.children)}
        for pid, parent in parents().items():
            if parent == os.getpid() and pid not in ours:
                ended, _, used = os.wait4(pid, os.WNOHANG)
                self.usage.add(used) if ended else found.append(pid)
        return found

    def count_daemons(self):
        """All processor time of the daemons until now; the rest is counted when they are reaped."""
        for pid in descendants(self.daemons):
            seconds = (clock(pid) - self.start_cost.get(pid, (0,))[0]) / 1e9
            self.usage.seconds += seconds
            self.usage.own += 0 if name_of(pid) in BYSTANDERS else seconds

    def end(self):
        # Those that were there when all were ready, too: what has lost its parent is nobody's descendant any more.
        daemons = descendants([*self.daemons, *(pid for pid in self.start_cost if pid not in self.forking)])
        for pid in descendants(self.forking):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if pid in self.forking else signal.SIGKILL)
        for pid in daemons:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self.forking:
            self.reap(pid)
        counted = self.usage.seconds
        for pid in self.daemons:
            self.reap(pid, seconds=False)
        with contextlib.suppress(Failure):
            wait_until(lambda: not self.orphans(), "orphans")
        if self.daemons:
            self.usage.seconds = counted
        for pid, (spent, switched, faulted) in self.start_cost.items():
            self.usage.switches -= switched
            self.usage.faults -= faulted
            if pid in self.forking:
                self.usage.seconds -= spent / 1e9
        self.forking, self.daemons = [], []

    def reap(self, pid, seconds=True):
        """Waits for it; one that does not go on SIGTERM is killed."""
        wait = lambda: os.wait4(pid, os.WNOHANG)
        deadline = time.monotonic() + 5
        while not (found := wait())[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        self.stage.roots.discard(pid)
        before = self.usage.seconds
        self.usage.add(found[2])
        if not seconds:
            self.usage.seconds = before


class Door:
    """A UCSPI server of our own, one session at a time, that tells what the very process it starts has used, without its children:
    the wrapper alone. Its clock is read when it has ended and before it is reaped."""

    def __init__(self, running, command):
        self.running, self.command = running, [str(word) for word in command]
        self.milliseconds = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def serve(self):
        while True:
            try:
                session, _ = self.listener.accept()
            except OSError:
                return
            end = session.fileno()
            actions = [(os.POSIX_SPAWN_DUP2, end, 0), (os.POSIX_SPAWN_DUP2, end, 1),
                       (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0)]
            pid = os.posix_spawnp(self.command[0], self.command, self.running.stage.env, file_actions=actions)
            session.close()
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            self.milliseconds.append(clock(pid) / 1e6)
            os.waitpid(pid, 0)

    def mean(self):
        """Milliseconds of a session; what a daemon's clock says of a batch is the mean, too."""
        return sum(self.milliseconds) / len(self.milliseconds)

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(PATIENCE)


class Between:
    """What lay between two samples: nanoseconds and switches, of the whole tree and of the contender's own processes."""

    def __init__(self, before, after):
        self.whole = self.own = self.switches = self.own_switches = 0
        self.own_pids = []
        for pid, (name, spent, switched) in after.items():
            _, spent_before, switched_before = before.get(pid, (name, 0, 0))
            self.whole += spent - spent_before
            self.switches += switched - switched_before
            if name not in BYSTANDERS:
                self.own_pids.append(pid)
                self.own += spent - spent_before
                self.own_switches += switched - switched_before
