"""The two programs that run beside a contender: the load generator, and strace when system calls are counted."""

import contextlib
import json
import signal
import subprocess
import threading

from measure import Failure, read, status, wait_until


class Load:
    """bench-load, killed after `lasts` seconds. `answer` for the modes that run through; `go` and `close` for those with two pauses."""

    def __init__(self, stage, port, tls, mode, *options, lasts):
        flags = ["--tls", tls] if tls else []
        command = [stage.load, mode, "--port", port, "--ca", stage.cert, *flags, *options]
        self.stage = stage
        self.child = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True)
        stage.children.append(self.child)
        self.lasts = lasts
        self.timer = threading.Timer(lasts, self.child.kill)
        self.timer.start()

    def __enter__(self):
        return self

    def line(self):
        line = self.child.stdout.readline().strip()
        if not line:
            said = self.child.stderr.read().strip() or f"the load generator was stopped after {self.lasts} s"
            raise Failure(said.removeprefix("bench-load: "))
        return line

    def answer(self):
        return json.loads(self.line())

    def until_ready(self):
        if (line := self.line()) != "ready":
            raise Failure(f"the load generator says {line!r}")

    def go(self):
        print(file=self.child.stdin, flush=True)
        return self.answer()

    def close(self):
        print(file=self.child.stdin, flush=True)
        if self.child.wait() != 0:
            raise Failure(self.child.stderr.read().strip())

    def __exit__(self, kind, *_):
        self.timer.cancel()
        if kind is not None:
            self.child.kill()
        for stream in (self.child.stdin, self.child.stdout, self.child.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # at the end of its stdin it ends, if it has not
        self.child.wait()
        self.stage.children.remove(self.child)


def count_syscalls(stage, pids, between):
    """Runs `between` while strace counts the system calls of these processes. strace slows them, so nothing else is measured then."""
    with open(f"{stage.folder}/strace", "w+") as report:
        tracer = subprocess.Popen(["strace", "-f", "-c", "-q", "-o", report.name, *(f"-p{pid}" for pid in pids)],
                                  stderr=subprocess.PIPE)
        try:
            wait_until(lambda: all(status(read(pid, "status"), "TracerPid") == tracer.pid for pid in pids), "strace cannot attach")
            between()
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.communicate()
            lines = report.read().splitlines()
    for line in lines:
        if line.endswith(" total"):
            return int(line.split()[3])
    raise Failure("strace counted nothing")
