"""Attacks on STARTTLS and on what stands around it, each against any server of servers.py, each judged by what the client can see and
by what was delivered; this program also by how it refuses, and by what PROG hears. An attack returns what it found in order, and raises
Broken for what must not be.

    attacks.py [RUNS [WAY...]]   against the program in each of its ways, or in these, RUNS times the command injection and ten times as often
                         its race before the 220 (default 1000; a tenth under the UCSPI-TLS server, each of whose sessions is an interpreter of Python as
                         well, unless its ways are named); then against leaky.py, where every attack must find its hole

The method and verdicts of the command injection are those of the command-injection-tester of the USENIX Security 2021 study
(Poddebniak and others, "Why TLS is better without STARTTLS").
"""

import argparse
import collections
import concurrent.futures
import contextlib
import itertools
import random
import re
import socket
import ssl
import statistics
import sys
import time

from servers import RIG, Bare, Leaky, Wrapper
from smtp import Client, deliver, tls_context
from stage import Broken, Stage, descriptors, described, expect, limit, many_files, wait_for
from ways import LISTENERS, WAYS

QUIET = 0.25  # how long a server is listened to that should say nothing
TESTERS_QUIET = 10.0  # the same by the tester, which looks five times for two seconds: for servers that are not ours, since by ours none of its connections comes so far
WORKERS = 8
MOST_RACES = 60  # times RUNS, until enough of them came before the 220


def run_many(runs, once):
    """Runs `once(number)` so often, a few at a time; a Counter of what they returned."""
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        return collections.Counter(pool.map(once, range(runs)))


def told(counted):
    return ", ".join(f"{count} {what}" for what, count in counted.most_common())


def verdict_inside_tls(client, quiet):
    """The tester's: nothing may be said inside TLS before we speak, and what we say is answered as what it is."""
    said = client.more(quiet)
    if said == b"":
        return "TLS ended behind its handshake"
    expect(not said, "Command injection here!" if b"250" in (said or b"") else "Probable command injection:", said)
    client.send(b"FAKE commandinjectiontester\r\n")
    said = client.more()
    expect(said, "Server unresponsive: possible command injection")
    expect(b"250" not in said, "Possible command injection:", said)
    return "started TLS without the bytes"


def quiet_of(server):
    return QUIET if server.is_ours else TESTERS_QUIET


def command_injection(server, runs):
    """A command in the segment of STARTTLS."""
    target = server.front()
    target.clear()
    with Client(target) as client:  # the sanity run: without the injected line TLS works
        client.starttls()
        client.ask(b"QUIT", b"221")

    def once(_):
        with Client(target) as client:
            client.greeting()
            client.ask(b"EHLO c", b"250")
            client.send(b"STARTTLS\r\nEHLO commandinjectiontester\r\n")
            try:
                reply = client.reply()
            except Broken:
                return "closed"
            if not reply.startswith(b"220"):
                return refused(client, server, reply)
            try:
                client.secure()
            except (ssl.SSLError, OSError):
                return "TLS handshake failed"
            return verdict_inside_tls(client, quiet_of(server))

    found = run_many(runs, once)
    expect(not server.is_ours or set(found) == {"refused with 421"}, "not all were refused as an attack:", told(found))
    return told(found)


def refused(client, server, reply):
    """STARTTLS was, with a 4yz or 5yz; by this program as an attack, behind which nothing is answered."""
    expect(reply[:1] in (b"4", b"5"), "STARTTLS was answered", reply)
    if server.is_ours:
        expect(reply.startswith(b"421 4.7.0 Bytes after STARTTLS"), "STARTTLS was answered", reply)
        said = client.rest()
        expect(not said, "behind the refusal:", said)
    return "refused with " + reply[:3].decode()


def injection_race(server, runs):
    """The same in a segment of its own, at any moment between STARTTLS and its reply: so often before that, and as it comes behind it."""
    target = server.front()
    target.clear()

    def measured(_):
        with Client(target) as client:
            client.greeting()
            client.ask(b"EHLO c", b"250")
            client.send(b"STARTTLS\r\n")
            started = time.perf_counter()
            client.reply()
            return time.perf_counter() - started

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        spread = 1.2 * statistics.median(pool.map(measured, range(10 * WORKERS)))
    injected = [b"EHLO commandinjectiontester\r\n", b"MAIL FROM:<injected@evil.example>\r\n", b"\n", b"RSET\r\n"]

    def once(number):
        with Client(target) as client:
            client.greeting()
            client.ask(b"EHLO c", b"250")
            client.send(b"STARTTLS\r\n")
            until = time.perf_counter() + random.random() ** 2 * spread  # most come before the 220, and some behind it
            while time.perf_counter() < until:
                pass
            client.send(injected[number % len(injected)])
            try:
                reply = client.reply()
            except Broken:
                return "closed"
            if not reply.startswith(b"220"):
                return refused(client, server, reply)
            behind = client.buffer
            expect(not behind or behind[:1] == b"\x15", "said in clear behind the 220:", behind)
            try:
                client.secure()
            except TimeoutError:
                return "TLS handshake never ended"
            except OSError:
                return "TLS handshake failed"
            return verdict_inside_tls(client, quiet_of(server))

    found = collections.Counter()
    while found.total() < 10 * runs or server.is_ours and found["refused with 421"] < 10 * runs and found.total() < MOST_RACES * runs:
        batch = run_many(2 * runs, once)
        found += batch
        early = batch["refused with 421"] / batch.total()
        spread *= 0.5 if early < 0.6 else 1.5 if early > 0.9 else 1  # how long a hand-over takes changes with what else the machine does
    # Octets that were thrown away in silence, before or behind the 220, would let TLS start.
    in_order = {"refused with 421", "TLS handshake failed"}
    expect(not server.is_ours or set(found) <= in_order, "neither refused nor ended by TLS:", told(found))
    if server.is_ours:
        # Octets that always came too early, or too late, would have raced with nothing.
        expect(found["refused with 421"] >= 10 * runs, "too few came before the 220:", told(found))
        expect(found["TLS handshake failed"] >= found.total() // 50, "none came right behind the 220:", told(found))
    return told(found)


def response_injection(server, runs):
    """Nothing is said behind the 220 in clear, nor inside TLS before the client speaks, however late PROG talks."""
    target = server.front([str(RIG / "prog.sh"), "chatty"])

    def once(_):
        with Client(target) as client:
            client.greeting()
            client.ask(b"EHLO c", b"250")
            client.send(b"STARTTLS\r\n")
            while not (reply := client.reply()).startswith((b"220", b"4", b"5")):
                pass
            if not reply.startswith(b"220"):
                return "no TLS offered"
            said = client.buffer + (client.more(0.3) or b"")
            expect(not said, "in clear behind the 220:", said)
            client.secure()
            said = client.more(0.3)
            if said and re.fullmatch(rb"421 [^\n]*\n", said):
                return "only a 421 inside TLS"  # the backend is as chatty, and is given up
            expect(not said, "inside TLS and unasked:", said)
            return "nothing said"

    found = run_many(max(1, min(runs // 20, 50)), once)
    expect(not server.is_ours or set(found) != {"no TLS offered"}, "TLS was never begun")
    return told(found)


def session_fixation(server, runs):
    """Who logged in before TLS is a stranger inside it, whether STARTTLS waits for the reply to AUTH or comes in one segment with it."""
    target = server.front([str(RIG / "prog.sh"), "authenticating"])

    def once(number):
        with Client(target) as client:
            client.greeting()
            client.ask(b"EHLO c", b"250")
            auth, starttls = b"AUTH PLAIN AGEAYg==", b"STARTTLS"
            if number % 2:
                auth, starttls = auth + b"\r\n" + starttls, None
            client.ask(auth, b"235")
            reply = client.ask(starttls) if starttls else client.reply()
            if not reply.startswith(b"220"):
                return "no TLS after AUTH"
            client.secure()
            client.ask(b"EHLO c", b"250")
            reply = client.ask(b"MAIL FROM:<a@client.example>")
            expect(b"authenticated" not in reply, "still logged in inside TLS:", reply)
            return "a stranger inside TLS"

    found = run_many(max(2, min(runs, 20)), once)
    expect(not server.is_ours or set(found) == {"no TLS after AUTH"}, "what follows AUTH is PROG's to answer:", told(found))
    return told(found)


def forgets_the_transaction(server, _):
    """A MAIL from before TLS is not known inside it (RFC 3207, section 4.2)."""
    target = server.front()
    with Client(target) as client:
        client.greeting()
        client.ask(b"EHLO c", b"250")
        client.ask(b"MAIL FROM:<a@client.example>", b"250")
        if not client.ask(b"STARTTLS").startswith(b"220"):
            return "no TLS inside a transaction"
        client.secure()
        client.ask(b"EHLO c", b"250")
        reply = client.ask(b"RCPT TO:<b@localhost>")
        expect(reply.startswith((b"4", b"5")), "the transaction goes on inside TLS:", reply)
        return "forgotten"


def forgets_the_hello(server, _):
    """What the client called itself before TLS is not known inside it: MAIL without EHLO is refused (RFC 3207, section 4.2)."""
    target = server.front()
    with Client(target) as client:
        client.starttls()
        reply = client.ask(b"MAIL FROM:<a@client.example>")
        expect(reply.startswith((b"4", b"5")), "MAIL without EHLO inside TLS:", reply)
        return "refused"


# What some servers take for the end of the text, and what is next to it.
ENDINGS = [
    b"\r\r\n.\r\r\n", b"\n.\n", b"\r\n.\n", b"\n.\r\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\r.\n", b"\n.\r", b"\r\n\0.\r\n", b"\r\n.\0\r\n",
    b"\r\n.\r\r\n", b"\r\r\n.\r\n", b"\n\r.\r\n", b"\r\n.\n\r\n", b"\r\n. \r\n", b"\r\n..\r\n", b"\n\n.\n\n",
]


def smuggled(target, ending, secret):
    """The replies and the letters that come of a letter with another one behind this ending."""
    target.clear()
    with Client(target) as client:
        if secret:
            client.starttls()
        else:
            client.greeting()
        client.ask(b"EHLO client.example", b"250")
        envelope = b"MAIL FROM:<%s@client.example>\r\nRCPT TO:<b@localhost>\r\nDATA\r\n"
        client.send(envelope % b"first" + b"Subject: one\r\n\r\nbody" + ending + envelope % b"smuggled")
        client.send(b"Subject: two\r\n\r\nbody\r\n.\r\nQUIT\r\n")
        replies = client.rest()
    # Queue ids, sizes and dates are no verdict.
    letters = [re.sub(rb"^Received:.*\n(\s.*\n)*", b"", letter, flags=re.M) for letter in target.letters()]
    return re.sub(rb"(?<=\D)\d+(?= |\r|$)", b"N", replies), sorted(letters)


def smuggling(server, _):
    """What ends a letter is decided by PROG alone: replies and letters are those of the bare PROG, in clear and inside TLS."""
    bare, target = Bare.of(server.stage).front(), server.front()
    for ending in ENDINGS:
        verdict = smuggled(bare, ending, False)
        for secret in (False, True) if server.has_plaintext else (True,):
            found = smuggled(target, ending, secret)
            where = "inside TLS" if secret else "in clear"
            same = found == verdict if server.relays_replies else found[1] == verdict[1]
            expect(same, f"{ending!r} {where}: bare {verdict}, wrapped {found}")
    what = "replies and letters" if server.relays_replies else "letters"
    return f"{len(ENDINGS)} endings, {what} as of the bare PROG"


BODY = b"EHLO browser\r\nMAIL FROM:<a@evil.example>\r\nRCPT TO:<b@localhost>\r\nDATA\r\nSubject: cross\r\n\r\n.\r\nQUIT\r\n"


def http(server, _):
    """A browser that is made to send a form to the mail port delivers nothing; by this program it gets 421, and PROG hears nothing of it."""
    target = server.front()
    target.clear()
    notes = server.stage.folder / f"{target.name}-heard"
    targets = [target, server.front([str(RIG / "prog.sh"), "noting", str(notes)])] if server.is_ours else [target]
    requests = [
        b"POST / HTTP/1.1\r\nHost: mx.example\r\nContent-Length: 99\r\n\r\n", b"GET / HTTP/1.1\r\nHost: mx.example\r\n\r\n",
        b"PUT /x HTTP/1.0\r\n\r\n", b"Host: mx.example\r\n\r\n", b"CONNECT mx.example:25 HTTP/1.1\r\n\r\n",
    ]
    for target, request in itertools.product(targets, requests):
        with Client(target) as client:
            with contextlib.suppress(OSError):
                client.send(request + BODY)
            said = client.rest(None if server.is_ours else 2)  # ours ends it by itself
        expect(not target.letters(), request[:20], "delivered a letter:", said)
        is_turned_away = re.fullmatch(rb"220[^\n]*\n421 4\.7\.0 [^\n]*\n", said)
        expect(is_turned_away or not server.is_ours, request[:20], "got no 421 alone:", said)
    if server.is_ours:
        with Client(target) as client:  # what comes last is heard last
            client.greeting()
            client.ask(b"EHLO witness", b"250")
            client.ask(b"MAIL FROM:<a@client.example>", b"250")
        heard = set(notes.read_bytes().split(b"\r\n"))
        expect(b"EHLO witness" in heard, "PROG heard no honest client:", heard)
        # It is dismissed with QUIT.
        said = set(b"".join([*requests, BODY]).split(b"\r\n")) - {b"QUIT", b""}
        expect(not heard & said, "PROG heard of a request:", heard & said)
    return f"{len(requests)} requests, nothing delivered"


def alpn(server, _):
    """A client that offers only other protocols gets an alert that says so (ALPACA); smtp is chosen, and none at all is served."""
    target = server.front()
    for offer in (["h2", "http/1.1"], ["http/1.1"], ["ftp"], ["imap"]):
        with Client(target) as client:
            try:
                client.starttls(tls_context(alpn=offer))
                raise Broken(f"ALPN {offer} is taken")
            except OSError as error:
                expect("no application protocol" in str(error), f"ALPN {offer} is refused without the alert: {error}")
    for offer, chosen in ((["smtp"], "smtp"), (["h2", "smtp"], "smtp"), (None, None)):
        with Client(target) as client:
            client.starttls(tls_context(alpn=offer))
            found = client.socket.selected_alpn_protocol()
            expect(found == chosen, f"of ALPN {offer} {found} is chosen")
            client.ask(b"EHLO c", b"250")
    return "others get an alert, smtp and none are served"


def first_octets_are_tls(server, _):
    """A ClientHello without STARTTLS gets no TLS and stalls nothing."""
    target = server.front()
    with Client(target) as client:
        try:
            client.secure()
        except (ssl.SSLError, OSError):
            return "no TLS"
        raise Broken("TLS without STARTTLS")


def drip(client, octets):
    """An octet now and then, until the server ends it."""
    deadline = time.monotonic() + SOON
    for octet in octets:
        if client.more(0.2) == b"":
            return
        expect(time.monotonic() < deadline, f"not ended within {SOON:g} s, an octet now and then")
        with contextlib.suppress(OSError):
            client.send(bytes([octet]))


def hello():
    """A ClientHello that never becomes whole."""
    return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(400)


def handed_over(client):
    client.greeting()
    client.ask(b"EHLO c", b"250")
    client.ask(b"STARTTLS", b"220")


def in_data(client):
    client.ask(b"EHLO c", b"250")
    client.ask(b"MAIL FROM:<a@client.example>", b"250")
    client.ask(b"RCPT TO:<b@localhost>", b"250")
    client.ask(b"DATA", b"354")


def dripped_line(client):
    client.greeting()
    drip(client, b"EHLO " + b"x" * 4000)


def dripped_hello(client):
    handed_over(client)
    drip(client, hello())


def silent_inside(client):
    client.starttls()
    client.ask(b"EHLO c", b"250")


DRIPPED_HELLO = "a ClientHello octet by octet"
STALLS = {
    "silent from the start": lambda client: client.greeting(),
    "half a line": lambda client: (client.greeting(), client.send(b"EHL")),
    "a line octet by octet": dripped_line,
    "silent after the 220": handed_over,
    DRIPPED_HELLO: dripped_hello,
    "silent inside TLS before EHLO": lambda client: client.starttls(),
    "silent inside TLS": silent_inside,
    "silent in the text, in clear": lambda client: (client.greeting(), in_data(client)),
    "silent in the text, inside TLS": lambda client: (client.starttls(), in_data(client)),
}
SOON = 8.0  # timers are set to 2 s, of which several may follow each other


def honest_letter(target):
    """How long one letter inside TLS takes meanwhile."""
    started = time.monotonic()
    with Client(target) as honest:
        honest.starttls()
        honest.ask(b"EHLO c", b"250")
        deliver(honest, b"Subject: honest\r\n\r\n")
        honest.ask(b"QUIT", b"221")
    took = time.monotonic() - started
    expect(took < 15, f"an honest client waited {took:.1f} s")
    return took


def slowloris(server, runs):
    """Clients that stall in every state, many at once: each is ended by a timer, and an honest client does not notice."""
    target = server.front(timers=True)
    each = max(1, min(runs // 50, server.many))
    # By the way `raw` only the server behind it can tell octets of a ClientHello from a session's.
    stalls = [name for name in STALLS if server.ends_handshakes or name != DRIPPED_HELLO]

    def stall(name):
        try:
            with Client(target) as client:
                STALLS[name](client)
                started = time.monotonic()
                while client.more(SOON) is not None and time.monotonic() < started + SOON:
                    with contextlib.suppress(OSError):
                        if client.more(0.01) == b"":
                            break
                took = time.monotonic() - started
                return f"{name}: not ended within {SOON:g} s" if took >= SOON else None
        except (Broken, OSError, ssl.SSLError) as error:
            return f"{name}: {error}"

    threads = len(stalls) * each
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        stalled = [pool.submit(stall, name) for name in stalls for _ in range(each)]
        took = honest_letter(target)
        faults = sorted({fault for each in stalled if (fault := each.result())})
    expect(not faults, "; ".join(faults))
    return f"{threads} stalled in {len(stalls)} states, all ended; an honest letter took {took:.2f} s"


def all_open(clients, when):
    """To each neither an end nor a word has come."""
    ended = 0
    for client in clients:
        client.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            with contextlib.suppress(ConnectionError):
                client.socket.recv(1, socket.MSG_PEEK)
            ended += 1
    expect(not ended, f"{ended} of {len(clients)} half-open ones had ended {when}")


def half_open(server, runs):
    """Many clients at once stand between the 220 and their ClientHello; an honest one is served, and nothing of theirs stays."""
    target = server.front()
    many, before = min(runs, 1000), len(server.stage.sessions(target.name))
    daemon = server.stage.daemons[target.name].pid
    open_before = descriptors(daemon)
    opened, started = [], time.monotonic()

    def open_one(_):
        client = Client(target, 60)
        handed_over(client)
        return client

    try:
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            opened = list(pool.map(open_one, range(many)))
        took = time.monotonic() - started
        all_open(opened, f"before the honest letter, {took:.1f} s after the first was opened")
        honest_took = honest_letter(target)
        all_open(opened, "behind the honest letter")
    finally:
        for client in opened:
            client.socket.close()
    wait_for("their processes to end", lambda: len(server.stage.sessions(target.name)) <= before)
    if server.is_ours:
        wait_for("their descriptors to close", lambda: descriptors(daemon) <= open_before)
    return f"{many} open at once after {took:.1f} s; an honest letter took {honest_took:.2f} s; nothing left"


ATTACKS = {
    "command injection": command_injection,
    "command injection, race": injection_race,
    "response injection": response_injection,
    "session fixation": session_fixation,
    "transaction kept across TLS": forgets_the_transaction,
    "EHLO kept across TLS": forgets_the_hello,
    "smuggled letter": smuggling,
    "HTTP to the mail port": http,
    "other ALPN": alpn,
    "TLS without STARTTLS": first_octets_are_tls,
    "stalling clients": slowloris,
    "half-open handshakes": half_open,
}
# By way, what is not tried, and why.
NOT_FOR = {
    "raw": {"other ALPN": "the TLS is that of HOST, and so is what it makes of ALPN"},
    "ucspi-tls": {"other ALPN": "the TLS is that of the UCSPI-TLS server, and so is what it makes of ALPN"},
}
NOT_FOR["listen-raw"] = NOT_FOR["raw"]
NOT_FOR["ucspi-tls-respawn"] = NOT_FOR["ucspi-tls"]
# What each says of the negative control. No hole there: TLS without STARTTLS it does not know, and tcpserver serves as many as come.
HOLES = {
    "command injection": "Command injection here!|Probable command injection",
    "command injection, race": "Command injection here!|Probable command injection",
    "response injection": "inside TLS and unasked|in clear behind the 220",
    "session fixation": "still logged in inside TLS",
    "transaction kept across TLS": "the transaction goes on inside TLS",
    "EHLO kept across TLS": "MAIL without EHLO inside TLS",
    "smuggled letter": "bare .*, wrapped",
    "HTTP to the mail port": "delivered a letter",
    "other ALPN": "ALPN .* is taken",
    "stalling clients": "not ended within",
}


def attack(server, name, runs):
    """(whether it held, what was found)"""
    try:
        return True, ATTACKS[name](server, runs)
    except Broken as broken:
        return False, str(broken)[:400]


def main():
    every = {**WAYS, **LISTENERS}
    arguments = argparse.ArgumentParser()
    arguments.add_argument("runs", nargs="?", type=int, default=1000, help="of the command injection; ten times as many of its race (1000)")
    arguments.add_argument("ways", nargs="*", metavar="way", help=f"of {', '.join(every)} (all)")
    options = arguments.parse_args()
    if unknown := set(options.ways) - set(every):
        arguments.error(f"no such way: {', '.join(sorted(unknown))}")
    runs = options.runs
    limit(180 + 6 * runs)
    many_files()
    failed = 0
    with Stage() as stage:
        stage.certificate()
        for way in map(every.get, options.ways or every):
            server = Wrapper(stage, way)
            many = max(1, runs // 10) if way.under and not options.ways else runs
            if many < runs:
                print(f"{way.name:18}{'':30} {many} instead of {runs} runs, as its sessions are slow")
            for name in ATTACKS:
                if why := NOT_FOR.get(way.name, {}).get(name):
                    print(f"{way.name:18}{name:30} not tried: {why}")
                    continue
                started = time.monotonic()
                held, found = attack(server, name, many)
                failed += not held
                took = time.monotonic() - started
                print(f"{way.name:18}{name:30} {'held  ' if held else 'BROKEN'} {took:6.1f} s  {found}", flush=True)
        strays = wait_for_none(stage)
        failed += bool(strays)
        print(f"{'processes left':48} {'none' if not strays else strays}")
        with concurrent.futures.ThreadPoolExecutor(len(HOLES)) as pool:
            found = list(pool.map(lambda name: attack(Leaky(stage, name), name, 1), HOLES))
        for (name, hole), (held, what) in zip(HOLES.items(), found):
            seen = not held and re.search(hole, what)
            failed += not seen
            print(f"control: {name:28} {'seen' if seen else 'NOT SEEN'}: {what[:90]}", flush=True)
    sys.exit(1 if failed else 0)


def wait_for_none(stage):
    """What is left of any session, once all had their time."""
    with contextlib.suppress(Broken):
        wait_for("strays to end", lambda: not stage.strays(), 10)
    return [described(pid) for pid in stage.strays()]


if __name__ == "__main__":
    main()
