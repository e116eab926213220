"""The questions about what flows: bulk, one command and its reply, and our own two ways of moving plaintext."""

import collections

from beside import NotCounted, count_syscalls
from contenders import BARE_IN_TLS, BARE_LINE, raw_in_clear, raw_paced, wrapper
from measure import Running
from report import Table
from rounds import GIB, KIB, MIB, Moment, each, load, plain, secure, way_of


SLOW = 6  # seconds for a transfer; who needs longer is given an eighth of it


def sink(stage):
    return [stage.sink]


# --- bulk -------------------------------------------------------------------------------------------------------------------

def bulk(stage, fields):
    """What does a gigabyte cost?

    One session, after MAIL and RCPT: a letter to the server, or a reply of the same size to the client (XSEND, a command of the bench's
    mail server, which reads and writes blocks of 64 KiB). Clocks are read before and after the transfer, per GiB; `its own` is the
    contender without UCSPI server and mail server, and so is the memory. System calls of the
    whole tree are counted by perf, in a transfer of their own of an eighth of the size. In TLS, `bare` is a mail server with TLS, and the tree
    of `ours` has such a one as HOST PORT. `ours raw, in clear` is no TLS at all: the plain relay
    through TCP that `ours raw` is held against. `ours raw, in clear, paced` explains: there the ends are made to keep TLS' pace. Switches are
    context switches, wanted or not, of the whole tree and of its own processes."""
    in_clear = [raw_in_clear(), raw_paced()] if any(one.name == "ours raw" for one in fields) else []
    fields = [*fields, *in_clear]
    tables = []
    for tls in (False, True):
        for from_server in (False, True):
            title = ("TLS" if tls else "Plaintext") + (", to the client" if from_server else ", to the server")
            name = ("tls" if tls else "plain") + ("-out" if from_server else "-in")
            tables.append(bulk_one_way(stage, (secure if tls else plain)(fields), name, title, tls, from_server))
    for table in tables[:2]:
        table.goal("ours", "times", 1.6, "plain bulk, times bare")
        table.goal("ours", "switches", 10_000, "context switches per GiB")
    for table in tables[2:]:
        table.goal("ours", "own", 750, "two TLS legs, own ms per GiB")
        for one_leg in ("ours keep", "ours plain"):
            table.goal(one_leg, "own", 550, f"one TLS leg ({one_leg}), own ms per GiB")
        table.goal("ours keep", "tree", 850, "one TLS leg (ours keep), ms per GiB of the whole tree")
        for one, relay in zip(in_clear, ("its plain relay through TCP", "its plain relay between ends of TLS' pace (explains the one above)")):
            if clear := table.figure(one.name, "own"):
                table.goal("ours raw", "own", round(clear.median), f"ours raw, own ms per GiB: at most that of {relay}")
        table.notes += [f"{one.name}: {one.note}" for one in in_clear]
    return tables


def bulk_one_way(stage, fields, name, title, tls, from_server):
    octets = 64 * MIB if stage.quick else GIB
    columns = [("tree", "CPU of the tree, ms per GiB", 0), ("times", "times bare", 2), ("own", "its own, ms per GiB", 0),
               ("speed", "MiB/s", 0), ("switches", "switches per GiB", 0), ("own_switches", "its own switches per GiB", 0), ("syscalls", "system calls per GiB", 0),
               ("memory", "its memory, MiB", 1)]
    table = Table(name, f"{title} ({octets // MIB} MiB)", columns, picture=("tree", "own"), beside=BARE_LINE if tls else "bare")
    table.notes += [BARE_IN_TLS] * tls
    flags = ["--from-server"] if from_server else []
    sizes, uncounted = {}, []

    def one(contender):
        way = way_of(contender, tls)
        if contender.name not in sizes:
            probe = Moment(stage, contender, way, sink(stage), "bulk", "--octets", octets // 32, *flags)
            slow = octets / MIB > SLOW * (octets // 32 / MIB / probe.said["seconds"])
            sizes[contender.name] = octets // 8 if slow else octets
        octets_of = sizes[contender.name]
        scale = GIB / octets_of
        found = Moment(stage, contender, way, sink(stage), "bulk", "--octets", octets_of, *flags)
        table.add(contender.name, tree=found.whole / 1e6 * scale, own=found.own / 1e6 * scale if found.own else None,
                  speed=octets_of / MIB / found.said["seconds"], switches=found.switches * scale,
                  own_switches=found.own_switches * scale if found.own else None,
                  memory=found.peak / 1024 if found.peak else None)
        if uncounted:
            return
        try:
            counted = system_calls(stage, contender, way, octets_of // 8, flags)
            table.add(contender.name, syscalls=counted * GIB / (octets_of // 8))
        except NotCounted as why:
            uncounted.append(f"system calls are not counted: {why}")

    each(stage, table, fields, stage.rounds(2, 3), one)
    table.times("times", "tree")
    table.notes += uncounted
    table.notes += [f"{row}: measured with {sizes[row] // MIB} MiB" for row in table.rows if sizes[row] != octets]
    return table


def system_calls(stage, contender, way, octets, flags):
    with Running(stage) as run:
        port = contender.start(way, run, sink(stage))
        with load(stage, port, way, "bulk", "--octets", octets, *flags) as client:
            client.until_ready()
            counted = count_syscalls(stage, run.pids(), client.go)
            client.close()
    return counted


# --- round trip -------------------------------------------------------------------------------------------------------------

def round_trip(stage, fields):
    """How much later does a reply come?

    NOOP and its reply again and again in one session, after RCPT (nginx mail answers what comes before by itself), and for those who snoop
    also right after EHLO. Added is p50 and p99 above that of `bare` in the same round; in TLS, above a mail server that speaks TLS
    itself, so that the client's own part is not in it."""
    count = 2000 if stage.quick else 10000
    columns = [("p50", "p50, us", 1), ("p99", "p99, us", 1), ("p999", "p99.9, us", 1), ("above50", "added p50, us", 1),
               ("above99", "added p99, us", 1), ("own", "its own CPU, us", 1), ("switches", "switches of the tree", 1)]
    kinds = [("relay", "NOOP after RCPT, plaintext", False, [], plain(fields)), ("tls", "NOOP after RCPT, TLS", True, [], secure(fields)),
             ("snoop", "NOOP after EHLO, plaintext", False, ["--snoop"], plain(fields))]
    tables = []
    for name, title, tls, flags, contenders in kinds:
        table = Table(name, f"{title} ({count} a round)", columns, picture=("p50",), beside=BARE_LINE if tls else "bare")
        table.notes += [BARE_IN_TLS] * tls

        def one(contender):
            found = Moment(stage, contender, way_of(contender, tls), sink(stage), "trip", "--count", count, *flags)
            trip = found.said["trip"]
            table.add(contender.name, p50=trip["p50"], p99=trip["p99"], p999=trip["p999"],
                      own=found.own / 1e3 / count if found.own else None, switches=found.switches / count)

        each(stage, table, contenders, stage.rounds(2, 5), one)
        table.above("above50", "p50")
        table.above("above99", "p99")
        tables.append(table)
    relay, tls, _ = tables
    relay.goal("ours", "above50", 20, "added round trip in the plain relay, us at p50")
    relay.goal("ours", "above99", 60, "added round trip in the plain relay, us at p99")
    tls.goal("ours", "above50", 35, "added round trip in the TLS relay, us at p50")
    return tables


# --- splice or copy ---------------------------------------------------------------------------------------------------------

def splice_or_copy(stage, _):
    """Is our relay cheaper by splice or by copy, and from which size on?

    Our own process alone. One by one: a chunk of that size to the server, which acknowledges it before the next is sent, so that the relay
    meets each chunk by itself. In a stream: the client writes chunks of that size without waiting, and they pile up on the way.
    `shipped` is the program without --relay, and is to do by itself what is cheaper."""
    sizes = [Size(written(octets), octets) for octets in (64 << (2 * step) for step in range(8))]  # 64 B to 1 MiB
    tables = []
    for name, title, unit, cost in [("chunks", "Chunks one by one", "us a chunk", chunk_alone),
                                    ("stream", "Chunks in a stream", "ms per GiB", chunk_streamed)]:
        columns = [*((one.name, f"{one.name}, {unit}", 1) for one in RELAYS), ("ratio", "copy / splice", 2),
                   ("shipped_ratio", "shipped / the cheaper", 2)]
        table = Table(name, title, columns, picture=("ratio",), limit=None, line=1.0, beside="equal")
        each(stage, table, sizes, stage.rounds(2, 5),
             lambda size: table.add(size.name, **{one.name: cost(stage, one, size.octets) for one in RELAYS}))
        verdict(table, sizes)
        tables.append(table)
    return tables


RELAYS = [wrapper("splice", "--relay", "splice"), wrapper("copy", "--relay", "copy"), wrapper("shipped")]
Size = collections.namedtuple("Size", "name octets")  # a row of its own


def verdict(table, sizes):
    """Where which is cheaper; whether what is shipped is the cheaper one, of the two by their medians."""
    for row, cells in table.rows.items():
        cells["ratio"] = [copy / splice for splice, copy in zip(cells["splice"], cells["copy"])]
        cheaper = min("splice", "copy", key=lambda name: table.figure(row, name).median)
        cells["shipped_ratio"] = [shipped / other for shipped, other in zip(cells["shipped"], cells[cheaper])]
    for size in sizes:
        table.goal(size.name, "shipped_ratio", 1.15, f"{size.name}: shipped, times the cheaper of both")
    if not table.failures:
        table.notes.append(crossing([(size.octets, table.figure(size.name, "ratio")) for size in sizes]))


def chunk_alone(stage, contender, size):
    count = max(50, min(500 if stage.quick else 2000, 64 * MIB // size))
    found = Moment(stage, contender, "plain", sink(stage), "chunk", "--block", size, "--count", count)
    return found.own / 1e3 / count


def chunk_streamed(stage, contender, size):
    octets = min(64 * MIB if stage.quick else 256 * MIB, size * 100_000)
    found = Moment(stage, contender, "plain", sink(stage), "bulk", "--octets", octets, "--block", size)
    return found.own / 1e6 * GIB / octets


def crossing(ratios):
    """Where which is cheaper in every round, by copy / splice; and from which size on it is splice all the way up."""
    splice = [size for size, figure in ratios if figure.low > 1]
    copy = [size for size, figure in ratios if figure.high < 1]
    cheaper = None
    for size, _ in reversed(ratios):
        if size not in splice:
            break
        cheaper = size
    listed = lambda sizes: ", ".join(map(written, sizes)) or "nowhere"
    return (f"cheaper in every round: splice at {listed(splice)}; copy at {listed(copy)}; "
            + (f"splice from {written(cheaper)} on" if cheaper else "splice not at the largest size"))


def written(size):
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB" if size >= KIB else f"{size} B"
