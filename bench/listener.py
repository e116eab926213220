"""The question of the listener: one process for all clients, beside a process for each, and beside daemons."""

import contextlib
import pathlib
import resource
import time

from contenders import Contender
from measure import BYSTANDERS, Running, clock, free_port, memory, name_of, read, status, switches, wait_until
from report import Table
from rounds import GIB, MIB, Moment, each, load, row_of, way_of
from sessions import MAILFRONT, SHORT, batch, costs, few_failed

LEARNED = "is started when a client needs it"  # its second probe has said the same as the first
RATE = 1000  # connections a second
SEVERAL = 9  # descriptors that a listener counts for each session (src/driver/listen.rs, EACH), and more than it keeps for itself
KEPT = 256
MANY = 10_000


def listening(name, *options, plain=False, note=""):
    """The program of this tree as a listener. Its HOST PORT is a server that speaks TLS."""
    def start(run, prog):
        stage, port = run.stage, free_port()
        words = [stage.wrapper, "--listen", f"127.0.0.1:{port}", "--max-sessions", MANY, *options, "--cert", stage.cert, "--key", stage.key,
                 "--trusted-loopback"]
        words += ["--plain", f"127.0.0.1:{run.tcpserver(prog)}"] if plain else []
        words += ["127.0.0.1", run.tls_server(), *([] if plain else prog)]
        run.daemon(words, port)
        wait_until(lambda: LEARNED in pathlib.Path(run.errors).read_text(), "nothing is learned of the mail server")
        return port
    return Contender(name, dict.fromkeys(("plain", "starttls"), start), {}, note)


LISTENER = listening("ours listen", note="--listen, lazily: the mail server is started for mail in clear alone; in TLS two legs, as ours")
DAEMON = listening("ours listen plain", plain=True, note="--listen --plain: the mail server is tcpserver's, reached by TCP")
ALONE = listening("ours listen plain", "--workers", 1, plain=True)
# Each says in its notes why it is not in a table.
ABSENT = {"handshake": "a child's own time holds its start as well; haproxy and hitch know no STARTTLS",
          "bot": "stunnel drops clients that want plaintext, hitch has no plaintext: no bot gets a greeting of them",
          "relay": "stunnel, hitch and tlswrapper relay no plaintext from socket to socket",
          "stream": "what starts a process for each connection keeps up with fewer a second than are asked for, or with none to spare: the figure is then of its queue"}


def listener(stage, fields):
    """What does one process for all clients cost, beside a process for each?

    `ours listen` is the program with --listen, with a loop for each processor; `ours` is the same program as tcpserver's child. Idle: KiB of anonymous memory
    of the contender's own processes, a session. Bots: connect, EHLO, QUIT, processor time of the whole tree. Handshakes: sessions are brought
    to the 220 of STARTTLS, then their handshakes alone are measured, the contender's own time; `in memory` is what rustls' part of it takes by the same
    configuration, without socket and loop, the median of so many. Relay: both sides of it are TCP. Greetings: 1,000 connections a second, whether or not those
    before have come to an end; and 100 a second, with one loop (--workers 1, --plain), beside a relay in it that never pauses."""
    known = {one.name: one for one in fields}
    some = lambda *names: [known[name] for name in names if name in known]
    tables = [idle(stage, "idle-snoop", "Idle after EHLO", False, ["--snoop"], [LISTENER, *some("ours", "nginx mail", "nginx stream", "haproxy")], 4),
              idle(stage, "idle-tls", "Idle in TLS, one mail done", True, [], [LISTENER, *some("ours", "stunnel", "nginx mail")], 12),
              ten_thousand(stage),
              bots(stage, [*some("bare", "ours"), LISTENER, *some("nginx mail", "nginx stream", "haproxy")]),
              starttls(stage, [*some("ours"), LISTENER, *some("tlswrapper", "stunnel", "nginx mail")]),
              handshakes(stage, [LISTENER, *some("stunnel", "nginx mail")])]
    for from_server in (False, True):
        tables.append(relay(stage, [DAEMON, *some("haproxy", "nginx stream", "socat")], from_server))
    tables.append(greetings(stage, [*some("bare"), LISTENER, *some("nginx mail", "haproxy")]))
    tables.append(neighbours(stage))
    for table in tables:
        table.notes += [why for name, why in ABSENT.items() if table.name.startswith(name)]
    tables[0].notes += [f"{one.name}: {one.note}" for one in (LISTENER, DAEMON)]
    return tables


# --- idle -------------------------------------------------------------------------------------------------------------------

def own(run):
    return [pid for pid in run.pids() if name_of(pid) not in BYSTANDERS]


def anonymous(run):
    return sum(memory(pid)[1] for pid in own(run))


def raise_descriptors(run, *more):
    """As far as may be: what we are was given fewer, so that those who look at each of them are not slow."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for pid in [*run.pids(), *more]:
        with contextlib.suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))


def idle(stage, name, title, tls, flags, contenders, most):
    count = 20 if stage.quick else 400
    table = Table(name, f"{title} ({count} at once)", [("each", "anonymous KiB a session", 2), ("processes", "processes a session", 1)],
                  picture=("each",), limit=None)

    def one(contender):
        way = way_of(contender, tls)
        with Running(stage) as run:
            port = contender.start(way, run, MAILFRONT)
            before, processes = anonymous(run), len(own(run))
            with load(stage, port, way, "hold", "--sessions", count, "--at-once", 4, "--patience", 60, *flags) as client:
                client.until_ready()
                time.sleep(2)  # buffers are given back a second after traffic by some
                table.add(contender.name, each=(anonymous(run) - before) / count, processes=(len(own(run)) - processes) / count)
                client.go()
                client.close()

    each(stage, table, contenders, stage.rounds(1, 3), one)
    if not stage.quick:  # of so few, the first page of everything is too large a part
        table.goal(LISTENER.name, "each", most, f"{title}: KiB a session")
    return table


def ten_thousand(stage):
    """Once: there are no rounds."""
    count, window = (60, 3) if stage.quick else (MANY, 60)
    fit = (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - KEPT) // SEVERAL
    parts = [fit] * (count // fit) + [count % fit] * (count % fit > 0)
    columns = [("sessions", "sessions", 0), ("processes", "listeners", 0), ("resident", "resident MiB, all", 1), ("each", "anonymous KiB a session", 2),
               ("woken", f"wake-ups in {window} s, all", 0), ("spent", f"CPU us in {window} s, all", 0)]
    table = Table("many", f"{count:,} sessions idle in TLS on both legs, one mail done", columns, limit=None)
    if len(parts) > 1:
        table.notes.append(f"by so many listeners, because the descriptors that a process may have here are enough for {fit:,} sessions each")
    stage.progress(f"{table.title}: round 1 of 1")
    with row_of(table, LISTENER.name), contextlib.ExitStack() as stack:
        runs, clients, before = [], [], 0
        for part in parts:
            run = stack.enter_context(Running(stage))
            port = LISTENER.start("starttls", run, MAILFRONT)
            raise_descriptors(run)
            before += anonymous(run)
            client = stack.enter_context(load(stage, port, "starttls", "hold", "--sessions", part, "--at-once", 4, "--patience", 120, lasts=900))
            raise_descriptors(run, client.child.pid)
            client.until_ready()
            runs.append(run)
            clients.append(client)
        time.sleep(3)
        pids = [pid for run in runs for pid in own(run)]
        awake = lambda: (sum(switches(pid, ("voluntary_ctxt_switches",)) for pid in pids), sum(clock(pid) for pid in pids))
        woken, spent = awake()
        time.sleep(window)
        woken, spent = (after - then for after, then in zip(awake(), (woken, spent)))
        resident = sum(status(read(pid, "status"), "VmRSS") for pid in pids) / 1024
        held = (sum(anonymous(run) for run in runs) - before) / count
        table.add(LISTENER.name, sessions=count, processes=len(runs), resident=resident, each=held, woken=woken, spent=spent / 1e3)
        for client in clients:
            client.go()
            client.close()
    table.goal(LISTENER.name, "resident", 160, "resident set of all, MiB")
    table.goal(LISTENER.name, "woken", 0, f"wake-ups in {window} s")
    return table


# --- processor time ---------------------------------------------------------------------------------------------------------

def bots(stage, contenders):
    table = Table("bot", "A bot: connect, EHLO, QUIT", [("tree", "CPU of the tree, ms", 3), ("own", "its own, ms", 3), ("less", "bare / it", 1)],
                  picture=("tree",))
    count = 60 if stage.quick else 600

    def one(contender):
        with Running(stage) as run:
            port = contender.start("plain", run, MAILFRONT)
            with load(stage, port, "plain", "bot", "--sessions", count, *SHORT) as client:
                said = client.answer()
            few_failed(said, count)
        table.add(contender.name, tree=run.usage.seconds * 1e3 / count, own=run.usage.own * 1e3 / count if run.usage.own else None)

    each(stage, table, contenders, stage.rounds(1, 5), one)
    table.derive("less", "tree", "bare", lambda value, bare: bare / value if value else 0.0)
    table.goal(LISTENER.name, "tree", 0.15, "a bot, ms of the whole tree")
    if bare := table.figure("bare", "tree"):
        table.goal(LISTENER.name, "tree", round(bare.median / 15, 3), "a bot, ms: a fifteenth of tcpserver with the mail server")
    return table


def starttls(stage, contenders):
    columns = [("tree", "CPU of the tree, ms", 2), ("times", "times ours", 2), ("own", "its own, ms", 2), ("p50", "wall p50, ms", 2), ("failed", "failed, %", 1)]
    table = Table("starttls", "STARTTLS session of one mail of 2 KiB", columns, picture=("tree",), limit="ours", beside="ours")
    count = 20 if stage.quick else 200

    def one(contender):
        usage, said = batch(stage, contender, "starttls", count, *SHORT)
        table.add(contender.name, p50=said["wall"]["p50"] / 1e3, **{key: value for key, value in costs(usage, said, count).items() if key != "switches"})

    each(stage, table, contenders, stage.rounds(1, 5), one)
    table.times("times", "tree", "ours")
    table.goal(LISTENER.name, "times", 0.6, "STARTTLS session, CPU of the tree, times the UCSPI child's")
    return table


def handshakes(stage, contenders):
    columns = [("each", "us a handshake", 0), ("rate", "a second and core", 0), ("times", "times in memory", 2), ("tls", "negotiated", 0)]
    table = Table("handshake", "Full handshakes, the server's part", columns, picture=("rate",), limit="in memory", beside="in memory")
    count = 30 if stage.quick else 500
    memory_alone = Contender("in memory", {})

    def one(contender):
        if contender is memory_alone:
            with load(stage, 0, "starttls", "memory", "--sessions", count, "--key", stage.key) as client:
                said = client.answer()
                spent, tls = said["server"]["p50"], said["tls"]
        else:
            with Running(stage) as run:
                port = contender.start("starttls", run, MAILFRONT)
                raise_descriptors(run)
                with load(stage, port, "starttls", "secure", "--sessions", count, "--patience", 60) as client:
                    client.until_ready()
                    before = {pid: clock(pid) for pid in own(run)}
                    tls = client.go()["tls"]
                    spent = sum(clock(pid) - before.get(pid, 0) for pid in own(run)) / 1e3 / count
                    client.close()
        table.add(contender.name, each=spent, rate=1e6 / spent, **({"tls": tls} if tls else {}))

    each(stage, table, [memory_alone, *contenders], stage.rounds(1, 5), one)
    table.times("times", "each", "in memory")
    table.goal(LISTENER.name, "times", 1.25, "a handshake, times what it takes in memory (four fifths as many a second and core)")
    return table


def relay(stage, contenders, from_server):
    octets = 64 * MIB if stage.quick else GIB
    where = "to the client" if from_server else "to the server"
    table = Table("relay-out" if from_server else "relay-in", f"Plaintext from socket to socket, {where} ({octets // MIB} MiB)",
                  [("own", "its own CPU, ms per GiB", 0), ("speed", "MiB/s", 0)], picture=("own",), limit="haproxy", beside="haproxy")

    def one(contender):
        found = Moment(stage, contender, "plain", [stage.sink], "bulk", "--octets", octets, *(["--from-server"] if from_server else []))
        table.add(contender.name, own=found.own / 1e6 * GIB / octets, speed=octets / MIB / found.said["seconds"])

    each(stage, table, contenders, stage.rounds(1, 5), one)
    if splice := table.figure("haproxy", "own"):
        table.goal(DAEMON.name, "own", round(splice.median), f"plain relay {where}, ms per GiB: haproxy's with splice")
    return table


# --- greetings --------------------------------------------------------------------------------------------------------------

def greetings(stage, contenders):
    count = 200 if stage.quick else 10 * RATE
    columns = [("p50", "p50, ms", 2), ("p99", "p99, ms", 2), ("late", "load generator late, p99, ms", 2), ("rate", "a second, in fact", 0),
               ("tree", "CPU of the tree, ms", 3), ("failed", "failed, %", 1)]
    table = Table("stream", f"From connect to greeting, {RATE:,} connections a second", columns, picture=("p99",))

    def one(contender):
        with Running(stage) as run:
            port = contender.start("plain", run, MAILFRONT)
            with load(stage, port, "plain", "stream", "--sessions", count, "--rate", RATE, *SHORT) as client:
                said = client.answer()
            few_failed(said, count)
        table.add(contender.name, p50=said["greeting"]["p50"] / 1e3, p99=said["greeting"]["p99"] / 1e3, late=said["late"]["p99"] / 1e3,
                  rate=count / said["seconds"], tree=run.usage.seconds * 1e3 / count, failed=said["failed"] * 100 / count)

    each(stage, table, contenders, stage.rounds(1, 5), one)
    table.goal(LISTENER.name, "p99", 5, f"from connect to greeting, ms at p99, {RATE:,} a second")
    return table


def neighbours(stage):
    """The loop is one, so that its other sessions wait while the bulk is relayed, and nowhere else."""
    rate, count, endless = 100, 100 if stage.quick else 1000, 1 << 50
    columns = [("p50", "p50, ms", 2), ("p99", "p99, ms", 2), ("late", "load generator late, p99, ms", 2), ("rate", "a second, in fact", 0),
               ("failed", "failed, %", 1)]
    table = Table("beside", f"From connect to greeting, {rate} connections a second, beside a relay that never pauses in the one loop", columns, limit=ALONE.name)
    bulk = {ALONE.name: None, "beside bulk to the server": (), "beside bulk to the client": ("--from-server",)}

    def one(row):
        with Running(stage) as run, contextlib.ExitStack() as stack:
            port = ALONE.start("plain", run, [stage.sink])
            if (flags := bulk[row.name]) is not None:
                neighbour = stack.enter_context(load(stage, port, "plain", "bulk", "--octets", endless, *flags))
                neighbour.until_ready()
                neighbour.begin()
            with load(stage, port, "plain", "stream", "--sessions", count, "--rate", rate, *SHORT) as client:
                said = client.answer()
            if flags is not None:
                neighbour.child.kill()
            few_failed(said, count)
        table.add(row.name, p50=said["greeting"]["p50"] / 1e3, p99=said["greeting"]["p99"] / 1e3, late=said["late"]["p99"] / 1e3,
                  rate=count / said["seconds"], failed=said["failed"] * 100 / count)

    each(stage, table, [Contender(name, {}) for name in bulk], stage.rounds(1, 5), one)
    for name in list(bulk)[1:]:
        table.goal(name, "p99", 5, f"from connect to greeting, ms at p99, {name}")
    return table
