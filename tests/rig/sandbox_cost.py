"""What the sandbox costs at the start of a session: processor time of the program and of a PROG that ends at once, with the sandbox and without, in turn.

    sandbox_cost.py RUNS
"""

import os
import pathlib
import socket
import statistics
import subprocess
import sys

from stage import Stage, expect, limit, program

# HOST, and what is said of it: for which the sandbox has other rules.
SETUPS = {
    "HOST an address": ("--trusted-loopback", "127.0.0.1", "465"),
    "HOST a name": ("--trusted-loopback", "mx.example", "465"),
    "no HOST (keep)": ("--way", "keep"),
}


def cost(stage, options):
    """Seconds of a processor that one session takes."""
    ours, theirs = socket.socketpair()
    with ours:
        argv = [program(), *options, "/bin/true"]
        process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=stage.environment, cwd=stage.folder)
        theirs.close()
        said = b""
        while not said.endswith(b"\n") and (piece := ours.recv(4096)):
            said += piece
        ours.close()  # or it would be lingered for
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    expect(said.startswith(b"421 ") and process.returncode == 111, "exit", process.returncode, said)
    return usage.ru_utime + usage.ru_stime


def main():
    runs = int(sys.argv[1])
    limit(60 + runs)
    load = pathlib.Path("/proc/loadavg").read_text().split()[0]
    print(f"microseconds of a processor, medians of {runs} sessions each, in turn; load {load}")
    with Stage() as stage:
        stage.certificate()
        for name, options in SETUPS.items():
            options = ("--cert", str(stage.cert), "--key", str(stage.key), *options)
            pairs = [(cost(stage, options), cost(stage, ("--no-sandbox", *options))) for _ in range(runs)]
            inside, outside = (statistics.median(each) * 1e6 for each in zip(*pairs))
            spread = statistics.quantiles([(one - other) * 1e6 for one, other in pairs], n=4)
            print(f"{name:18} with {inside:7.0f}  without {outside:7.0f}  more {inside - outside:6.0f}  (a pair's quartiles {spread[0]:.0f} to {spread[2]:.0f})")


if __name__ == "__main__":
    main()
