"""Mixed real sessions at full speed under tcpserver and through the listener, and long transfers in clear and inside TLS.

    soak.py MINUTES [GIB]    so long, half of it each (fractions will do), and so many GiB in each direction, in clear and inside TLS (default:
                             one for each minute, 10 at most); a tenth of that by each other way that relays otherwise

Sessions are drawn at random: a letter in clear, by STARTTLS with TLS 1.2 or 1.3, one broken off by a reset or a close somewhere, and one
that misbehaves. Every reply is checked, every accepted letter is found again with its sha256, each kind in its own queue. What must
stay flat is sampled each second: descriptors and memory of the one process that stays (tcpserver, the listener), zombies; of a transfer's own
program: descriptors and memory. Exit codes come from tcpserver's log; a listener's must have no bug of ours and no other server than was learned of.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import os
import pathlib
import random
import re
import ssl
import subprocess
import sys
import threading
import time

from servers import RIG, Target, listener
from smtp import Client, deliver, tls_context
from stage import Broken, Stage, below, descriptors, described, expect, limit, many_files, wait_for
from ways import LISTENERS, WAYS

WORKERS = 6
GIB = 1 << 30
CONTEXTS = [tls_context(ssl.TLSVersion.TLSv1_2), tls_context(ssl.TLSVersion.TLSv1_3)]
FLAT = 512  # KiB that a program's memory may grow once it is at work
AT_WORK = GIB // 4  # octets behind which the buffers of a transfer have grown
LOOPS = 2048  # KiB for a listener: each of its loops keeps what it has used once (src/buffer.rs), at its own time
EACH = 10  # descriptors of a listener's session at most (src/driver/listen.rs)
MOST = 8192  # KiB that a program may have in a transfer, however short
PIPES = 8  # descriptors that come and go at the beginning of a relay by the other ways: pipes of its own, and those of a PROG that is let go
# The relays that are not those of `tls` under tcpserver: between a socket and TLS, between two sockets, and all of them in a listener.
OTHERS = [WAYS["keep"], WAYS["plain"], WAYS["raw"], *(LISTENERS[name] for name in ("listen", "listen-keep", "listen-clear", "listen-raw"))]
IN_CLEAR = [LISTENERS["listen"], LISTENERS["listen-plain"]]


def letter(rng):
    """A letter of up to 100 KB whose subject is the sha256 of its lines; as it is on the wire, without the last dot."""
    lines = [bytes(rng.choices(b".abcdefgh \t=", k=rng.randint(0, 70))) for _ in range(rng.choice([1, 10, 100, 1500]))]
    lines = [line.rstrip() + b"x" for line in lines]
    digest = hashlib.sha256(b"\n".join(lines)).hexdigest().encode()
    stuffed = [b"." + line if line.startswith(b".") else line for line in lines]
    return b"\r\n".join([b"Subject: " + digest, b"", *stuffed]) + b"\r\n"


def is_whole(entry):
    """An entry of a queue is a letter of ours, unharmed."""
    found = re.search(rb"Subject: ([0-9a-f]{64})\n\n(.*)\n\Z", entry, re.S)
    return bool(found) and hashlib.sha256(found[2]).hexdigest().encode() == found[1]


def in_clear(target, rng):
    with Client(target) as client:
        client.greeting()
        client.ask(b"EHLO client.example", b"250")
        for _ in range(rng.randint(0, 3)):
            client.ask(rng.choice([b"NOOP", b"RSET", b"VRFY x", b"HELP"]))
        deliver(client, letter(rng))
        client.ask(b"QUIT", b"221")
        expect(not client.rest(), "more after the 221")
    return "clear"


def by_starttls(target, rng):
    with Client(target) as client:
        client.starttls(rng.choice(CONTEXTS))
        reply = client.ask(b"EHLO client.example", b"250")
        expect(b"STARTTLS" not in reply, "STARTTLS inside TLS:", reply)
        for _ in range(rng.randint(1, 2)):
            deliver(client, letter(rng))
        client.ask(b"QUIT", b"221")
        client.end_of_tls()
    return "tls"


def broken_off(target, rng):
    """Goes without a word at a random place, never behind a letter's end."""
    with Client(target) as client:
        steps = [
            lambda: client.greeting(), lambda: client.ask(b"EHLO client.example", b"250"), lambda: client.send(b"NOO"),
        ] if rng.random() < 0.4 else [
            lambda: client.greeting(), lambda: client.ask(b"EHLO client.example", b"250"), lambda: client.ask(b"STARTTLS", b"220"),
            lambda: client.send(b"\x16\x03\x01\x02\x00\x01"),
        ] if rng.random() < 0.5 else [
            lambda: client.starttls(), lambda: client.ask(b"EHLO client.example", b"250"),
            lambda: client.ask(b"MAIL FROM:<a@client.example>", b"250"), lambda: client.ask(b"RCPT TO:<b@localhost>", b"250"),
            lambda: client.ask(b"DATA", b"354"), lambda: client.send(b"Subject: half\r\n"),
        ]
        for step in steps[: rng.randint(0, len(steps))]:
            step()
        if rng.random() < 0.5:
            client.reset()
    return "broken off"


def misbehaving(target, rng):
    """What the program turns away; each with its reply."""
    request, code = rng.choice([
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"421"), (b"\x16\x03\x01\x02\x00\x01\x00", b"421"),
        (b"STARTTLS\r\nEHLO x\r\n", b"421"), (b"NOOP\0\r\n" * 11, b"500"), (b"STARTTLS now\r\n", b"501"),
        (b"XCLIENT ADDR=127.0.0.1\r\n", b"550"), (b"x" * 5000 + b"\r\n", b"500"),
    ])
    with Client(target) as client:
        client.greeting()
        client.ask(b"EHLO client.example", b"250")
        client.send(request)
        reply = client.reply()
        expect(reply.startswith(code), request[:20], "was answered", reply)
    return "misbehaving"


KINDS = [in_clear] * 4 + [by_starttls] * 4 + [broken_off] * 2 + [misbehaving]


class Janitor(threading.Thread):
    """Takes letters out of the queues and checks them."""

    def __init__(self, queues):
        super().__init__(daemon=True)
        self.queues, self.found, self.bad, self.done = queues, collections.Counter(), 0, False

    def run(self):
        while not self.done:
            self.sweep()
            time.sleep(0.5)

    def sweep(self):
        for kind, queue in self.queues.items():
            for file in (queue.folder / "new").iterdir():
                self.bad += not is_whole(file.read_bytes())
                self.found[kind] += 1
                file.unlink()


def memory(pid):
    """VmRSS in KiB."""
    with contextlib.suppress(OSError, AttributeError):
        return int(re.search(r"VmRSS:\s*(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])
    return 0


def processor_time(pid):
    """Ticks of 10 ms in user and system mode: who hangs and who spins."""
    with contextlib.suppress(OSError):
        return "+".join(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])
    return "gone"


def sessions(stage, seconds, listens):
    """The mixed sessions, through the listener or under tcpserver."""
    front = "listener" if listens else "tcpserver"
    queues = {kind: stage.queue(f"{front}-{kind}") for kind in ("clear", "tls")}
    backend = stage.stunnel(queues["tls"], name=f"{front}-backend")
    if listens:
        port = listener(stage, front, LISTENERS["listen"], backend, [], queues["clear"])
    else:
        port = stage.tcpserver(front, WAYS["tls"].wrapper(stage, backend), queues["clear"])
    target, process = Target(front, stage.address, port, []), stage.daemons[front].pid
    # A listener has a spawner.
    staying = below(process)
    before = descriptors(process)
    janitor = Janitor(queues)
    janitor.start()
    until, counted, errors, accepted = time.monotonic() + seconds, collections.Counter(), [], collections.Counter()
    samples, zombies = [], collections.Counter()

    def work(number):
        rng = random.Random(number)
        while time.monotonic() < until and len(errors) < 20:
            kind = rng.choice(KINDS)
            try:
                with_letters(kind, rng)
            except (Broken, OSError, ssl.SSLError) as error:
                open_now = [f"{described(pid)} {processor_time(pid)}" for pid in stage.sessions(front)]
                errors.append(f"{kind.__name__}: {error!r}, while there were {open_now}")

    def with_letters(kind, rng):
        state = rng.getstate()
        counted[kind(target, rng)] += 1
        if kind is in_clear:
            accepted["clear"] += 1
        elif kind is by_starttls:
            rng.setstate(state)
            rng.choice(CONTEXTS)
            accepted["tls"] += rng.randint(1, 2)

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        working = [pool.submit(work, number) for number in range(WORKERS)]
        last = set()
        while not all(each.done() for each in working):
            samples.append((descriptors(process), memory(process)))
            now = {about for pid in below(process) if (about := described(pid)).endswith("Z")}
            zombies.update(now & last)  # seen twice, a second apart
            last = now
            time.sleep(1)
        for each in working:
            each.result()
    wait_for("the last sessions to end", lambda: stage.sessions(front) == staying, 60)
    wait_for("the backend's sessions to end", lambda: not below(stage.daemons[f"{front}-backend"].pid), 60)
    janitor.done = True
    janitor.join()
    janitor.sweep()
    codes = collections.Counter(
        int(status) for status in re.findall(r"^tcpserver: end \d+ status (\d+)", stage.log(front), re.M))
    strays = [described(pid) for pid in stage.strays()]
    print(f"{front}: {sum(counted.values())} sessions in {seconds:.0f} s ({sum(counted.values()) / seconds:.0f} a second): {dict(counted)}")
    print(f"letters accepted {dict(accepted)}, found {dict(janitor.found)}, damaged {janitor.bad}")
    if not listens:
        print(f"exit codes: { {code >> 8 if code & 255 == 0 else f'signal {code & 127}': number for code, number in codes.items()} }")
    half = samples[len(samples) // 4:] or samples
    grown = max(rss for _, rss in half) - half[0][1]
    print(f"its descriptors: {before} before, {max(fds for fds, _ in samples)} at most, {descriptors(process)} behind; memory {half[0][1]} KiB, grown by {grown}")
    print(f"zombies: {dict(zombies) or 'none'}; left behind: {strays or 'none'}; protocol errors: {len(errors)}")
    expect(not errors, "protocol errors:", *errors[:5])
    expect(janitor.found == accepted and not janitor.bad, "letters lost, doubled or damaged")
    expect(set(codes) <= {0, 1 << 8, 98 << 8}, "exit codes", codes)
    expect(not zombies and not strays, "processes left")
    # Of a listener's descriptors each session has its own, as long as it lasts: also that of a client which has broken off, until PROG or HOST
    # has ended too, so that there may be twice as many as clients.
    most = before + 2 * WORKERS * EACH if listens else before + 1
    flat = LOOPS if listens else FLAT
    expect(max(fds for fds, _ in samples) <= most and descriptors(process) <= before + (not listens) and grown < flat, "not flat")
    said = [line for line in stage.log(front).splitlines() if re.search("bug|panicked|not what was learned|spawner", line)]
    expect(not said, "the log:", *said[:3])


def to_prog(client, octets, digest):
    """Sends so many; yields how many so far. PROG's own sha256 must be ours."""
    block, sent = bytearray(os.urandom(1 << 18)), 0
    while sent < octets:
        block[:8] = sent.to_bytes(8, "big")
        piece = memoryview(block)[: min(len(block), octets - sent)]
        digest.update(piece)
        client.send(piece)
        sent += len(piece)
        yield sent
    reply = client.reply()
    expect(digest.hexdigest().encode() in reply, f"sha256 {digest.hexdigest()}, PROG's {reply}")


def from_prog(client, octets, digest):
    """Takes all that comes; yields how many so far. The sha256 must be that of PROG's octets, made once more here."""
    digest.update(client.buffer)
    got = len(client.buffer)
    while piece := client.more():
        digest.update(piece)
        got += len(piece)
        yield got
    expect(got == octets, f"{got} of {octets} octets came")
    made = subprocess.run([RIG / "prog.sh", "made", str(octets)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=300).stdout
    expect(made.startswith(digest.hexdigest()), f"sha256 {digest.hexdigest()}, PROG's {made}")


def transfer(stage, way, by_tls, move, octets):
    """Relays so many octets in one direction."""
    is_to_prog = move is to_prog
    prog = [str(RIG / "prog.sh"), "hashing" if is_to_prog else "sending", str(octets)]
    name = f"bulk-{way.name}-{move.__name__}-{'tls' if by_tls else 'clear'}"
    queue = stage.queue(name)
    backend = way.behind(stage, queue, prog, f"{name}-backend")
    if way.listens:
        port = listener(stage, name, way, backend, [], queue, prog)
    else:
        port = stage.tcpserver(name, way.wrapper(stage, backend, prog=prog), queue)
    samples = []
    with Client(Target(name, stage.address, port, []), 300) as client:
        if by_tls:
            client.starttls()
        else:
            client.greeting()
        client.ask(b"EHLO client.example", b"250")
        client.ask(b"MAIL FROM:<a@client.example>", b"250")
        program = stage.daemons[name].pid if way.listens else wait_for("the program", lambda: stage.sessions(name))[0]
        started = next_sample = time.monotonic()
        for moved in move(client, octets, hashlib.sha256()):
            if time.monotonic() > next_sample:
                samples.append((descriptors(program), memory(program), moved))
                next_sample += 0.05
            if moved == octets:
                took = time.monotonic() - started
    steady = [rss for _, rss, at in samples if at >= AT_WORK]
    most, fds = max(rss for _, rss, _ in samples), {fds for fds, _, _ in samples[len(samples) // 4:]}
    grown = max(steady) - steady[0] if steady else 0
    flat = f"memory {most} KiB, grown by {grown} once at work" if steady else f"memory {most} KiB, too short to see growth"
    print(f"{octets / GIB:g} GiB {'to' if is_to_prog else 'from'} PROG {'inside TLS' if by_tls else 'in clear'} by {way.name}: "
          f"sha256 equal; {octets / took / (1 << 20):.0f} MiB/s; {flat}; descriptors {sorted(fds)}", flush=True)
    expect(grown <= FLAT and most < MOST and max(fds) - min(fds) <= (0 if way is WAYS["tls"] else PIPES), "not flat")


def main():
    minutes = float(sys.argv[1])
    gib = float(sys.argv[2]) if len(sys.argv) > 2 else min(minutes, 10)
    limit(int(minutes * 60 + 300 + gib * 240))
    many_files()
    failed = False
    with Stage() as stage:
        stage.certificate()
        transfers = [(WAYS["tls"], by_tls, gib) for by_tls in (False, True)]
        transfers += [(way, False, gib / 10) for way in IN_CLEAR] + [(way, True, gib / 10) for way in OTHERS]
        for act in (
            lambda: sessions(stage, minutes * 30, False), lambda: sessions(stage, minutes * 30, True),
            *(functools.partial(transfer, stage, way, by_tls, move, int(size * GIB))
              for way, by_tls, size in transfers for move in (to_prog, from_prog)),
        ):
            try:
                act()
            except Broken as broken:
                failed = True
                print(f"BROKEN: {broken}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
