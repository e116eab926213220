"""The two programs that run beside a contender: the load generator, and perf when system calls are counted."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import threading

from measure import Failure


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

    def begin(self):
        print(file=self.child.stdin, flush=True)

    def go(self):
        self.begin()
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


class NotCounted(Exception):
    """perf is not there, or may not."""


def count_syscalls(stage, pids, between):
    """Runs `between` while perf counts the system calls of these processes; told to begin, it says when it has."""
    order, ordered, answer, answered = *os.pipe(), *os.pipe()
    report = f"{stage.folder}/perf"
    command = ["perf", "stat", "-x,", "-o", report, "-e", "raw_syscalls:sys_enter", "-p", ",".join(map(str, pids)), "--delay=-1",
               f"--control=fd:{order},{answered}"]
    with open(order), open(ordered, "w") as orders, open(answer) as answers, open(answered, "w") as theirs:
        try:
            perf = subprocess.Popen(command, pass_fds=(order, answered), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        except OSError as error:
            raise NotCounted(error) from error
        try:
            theirs.close()
            print("enable", file=orders, flush=True)
            if not answers.readline():
                raise NotCounted(" ".join(perf.stderr.read().split())[:240])
            between()
        finally:
            perf.send_signal(signal.SIGINT)
            perf.communicate()
    counted = [line.split(",")[0] for line in pathlib.Path(report).read_text().splitlines() if "sys_enter" in line]
    if not counted or not counted[0].isdigit():
        raise NotCounted("perf counted nothing")
    return int(counted[0])
