"""What the rigs stand on: a loopback address, a scratch folder, a certificate, real servers, and nothing left behind.

Leaving a Stage ends all that it started: it adopts orphans (prctl PR_SET_CHILD_SUBREAPER), so that every process below it can be
found, named and ended by its id. A rig that hangs is ended by `limit`, with what it was doing. Times are bounded everywhere.
"""

import contextlib
import ctypes
import itertools
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HOME = pathlib.Path(__file__).resolve().parent.parent.parent
MAILFRONT = ["mailfront", "smtp", "queuedir", "accept"]
PATIENCE = 30.0
SUBREAPER = 36


class Broken(Exception):
    """What must not happen has."""


def expect(condition, *what):
    if not condition:
        raise Broken(" ".join(str(part) for part in what))


def wait_for(what, condition, patience=PATIENCE):
    """Looks until `condition` gives something."""
    deadline = time.monotonic() + patience
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Broken(f"waited {patience:g} s in vain for {what}")
        time.sleep(0.002)  # between two looks


def limit(seconds):
    """Ends the rig, and by its exit its stage, when it takes longer than anything can."""

    def over():
        print(f"{sys.argv[0]}: not done after {seconds} s", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))
    timer = threading.Timer(seconds, over)
    timer.daemon = True
    timer.start()


def program():
    """The program under test: scripts/ALL name it."""
    return os.path.abspath(os.environ["PROGRAM"])


def children_of(pid):
    """The ids of its children, in whatever thread they were started."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def below(pid):
    """The ids of all that descends from it."""
    found = children_of(pid)
    return found + [each for child in found for each in below(child)]


def described(pid):
    """`ID (NAME) STATE`, or nothing when it is gone."""
    with contextlib.suppress(OSError):
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return stat[: stat.rindex(")") + 3]
    return ""


def descriptors(pid):
    """How many are open."""
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def is_listening(address, port):
    """Looked up in the kernel's table: a probe would be a session."""
    octets = "".join(f"{int(octet):02X}" for octet in reversed(address.split(".")))
    wanted = f" {octets}:{port:04X} "
    with open("/proc/net/tcp", encoding="ascii") as table:
        return any(wanted in line and line.split()[3] == "0A" for line in table)


class Stage:
    """See the file's head; a context manager."""

    def __enter__(self):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
        self.address = f"127.{random.randint(2, 250)}.{random.randint(1, 250)}.{random.randint(2, 250)}"
        self.ports = itertools.count(2525)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="starttls-rig-"))
        self.folder.chmod(0o755)
        self.daemons = {}
        self.cert, self.key = self.folder / "cert.pem", self.folder / "key.pem"
        self.environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C",
            "HOME": str(self.folder),
        }
        return self

    def __exit__(self, kind, *_):
        if kind not in (None, SystemExit):
            for log in sorted(self.folder.glob("*.log")):
                last = log.read_text(errors="replace").splitlines()[-12:]
                print(f"---- {log.name}", *last, sep="\n", file=sys.stderr)
        deadline = time.monotonic() + 10
        while (left := below(os.getpid())) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            for daemon in self.daemons.values():
                daemon.poll()
            time.sleep(0.01)
        shutil.rmtree(self.folder, ignore_errors=True)

    def reap(self):
        """Reaps what was adopted and has died."""
        for pid in self.adopted():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def port(self):
        return next(self.ports)

    def certificate(self, key=("ec", "-pkeyopt", "ec_paramgen_curve:P-256")):
        """Makes the one certificate of this stage, for localhost."""
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", *key, "-nodes", "-days", "2", "-subj", "/CN=localhost"]
            + ["-addext", f"subjectAltName=DNS:localhost,IP:{self.address}"]
            + ["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", self.key, "-out", self.cert],
            check=True, capture_output=True, timeout=60,
        )
        both = self.folder / "both.pem"
        both.write_bytes(self.cert.read_bytes() + self.key.read_bytes())
        both.chmod(0o644)
        self.key.chmod(0o644)
        return both

    def queue(self, name):
        """A folder into which mailfront puts what it accepts."""
        for part in ("tmp", "new"):
            (self.folder / name / part).mkdir(parents=True)
            (self.folder / name / part).chmod(0o777)
        return Queue(self.folder / name)

    def start(self, name, argv, port, **environment):
        """Starts a server and waits until it listens there."""
        with open(self.folder / f"{name}.log", "ab") as log:
            daemon = subprocess.Popen(
                [str(part) for part in argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                env={**self.environment, **environment}, start_new_session=True,
            )
        self.daemons[name] = daemon
        wait_for(f"{name} to listen", lambda: is_listening(self.address, port) or daemon.poll() is not None)
        expect(daemon.poll() is None, f"{name} ended at once:", self.log(name))
        return port

    def log(self, name):
        with contextlib.suppress(OSError):
            return (self.folder / f"{name}.log").read_text(errors="replace")
        return ""

    def stunnel(self, queue, prog=MAILFRONT, name="stunnel", more=""):
        """A TLS-enabled server: stunnel before this PROG for each connection."""
        port = self.port()
        path = shutil.which(prog[0], path=self.environment["PATH"])
        file = self.folder / f"{name}.conf"
        file.write_text(
            f"foreground = yes\npid =\nsyslog = no\ndebug = 4\n[smtps]\naccept = {self.address}:{port}\n"
            f"cert = {self.cert}\nkey = {self.key}\n{more}exec = {path}\nexecArgs = {' '.join(prog)}\n"
        )
        return self.start(name, ["stunnel4", file], port, QUEUEDIR=str(queue.folder))

    def tcpserver(self, name, argv, queue, most=2000, **environment):
        """tcpserver with this command for every connection."""
        port = self.port()
        tcpserver = ["tcpserver", "-v", "-H", "-R", "-l", "front.example", "-c", most, "-b", 500]
        return self.start(
            name, [*tcpserver, self.address, port, *argv], port, QUEUEDIR=str(queue.folder), **environment)

    def sessions(self, name):
        """The processes that belong to the sessions of a server."""
        return below(self.daemons[name].pid)

    def adopted(self):
        """Processes whose own parent has gone without waiting for them."""
        daemons = {daemon.pid for daemon in self.daemons.values()}
        return [pid for pid in children_of(os.getpid()) if pid not in daemons]

    def strays(self):
        """Those of them that are still running."""
        self.reap()
        return self.adopted()


class Queue:
    """Letters that mailfront has accepted."""

    def __init__(self, folder):
        self.folder = folder

    def letters(self):
        return [file.read_bytes() for file in sorted((self.folder / "new").iterdir())]

    def clear(self):
        for part in ("new", "tmp"):
            for file in (self.folder / part).iterdir():
                file.unlink()


def many_files():
    """As many descriptors as we may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
