"""The questions about whole sessions: what one costs, how it starts, what it holds while idle, and what many at once cost."""

import contextlib
import time

from contenders import BARE_IN_TLS, BARE_LINE, with_tickets
from measure import BYSTANDERS, Door, Failure, Running, clock, memory, name_of, switches
from report import Table
from rounds import Moment, each, load, plain, row_of, secure, way_of

MAILFRONT = ["mailfront", "smtp", "echo", "accept"]
SHORT = ["--patience", 15]  # seconds after which a session that stands still has failed
MOST_FAILED = 0.05  # of a batch: what fails more often does not do what is asked, whatever it costs
AT_ONCE = (8, 32, 64)  # sessions at once, of which a contender gets the number that suits it


# --- a session --------------------------------------------------------------------------------------------------------------

COSTS = [("tree", "CPU of the tree, ms", 2), ("above", "above bare, ms", 2), ("own", "its own, ms", 2),
         ("switches", "context switches", 1), ("peak", "peak of the tree, MiB", 1), ("p50", "wall p50, ms", 2),
         ("p99", "wall p99 of all rounds, ms", 2), ("rate", "a second, many at once", 0), ("many", "so many at once", 0),
         ("failed", "failed, %", 1), ("crowded", "failed of many at once, %", 1)]


def session(stage, fields):
    """What does a session of one mail of 2 KiB cost?

    One after the other: processor time of the whole tree (UCSPI server, contender, mail server) and context switches, a session; the
    memory of the tree's processes with one session whose mail is done (the sum of their peaks, VmHWM); wall clock from connect to the
    reply to QUIT. `its own` is the contender alone: a daemon's clock, or that of a wrapper of one process, taken apart by a UCSPI server
    of the bench's; both are the mean of a round's sessions. The mail server is mailfront; behind our TLS it is the bench's own, with rustls.
    `ours tickets` is there where clients resume: a child gives no tickets without keys that it shares with the next one.
    A session that fails is one of those that were tried, with what it cost; wall clock and sessions a second are of those that succeed.
    Many at once are 8, 32 or 64: the number with which a contender was fastest when each was tried once, before the rounds.
    A contender that more than one session in twenty fails with is not measured."""
    table = Table("plain", "Plain session", COSTS, picture=("tree", "own"))
    sessions_of(stage, plain(fields), table, False, [])
    table.goal("ours", "above", 0.8, "plain session, ms above bare")
    tables = [table]
    for resume in (False, True):
        if resume and any(one.name == "ours" for one in fields):
            fields = [*fields, with_tickets()]
        title = "TLS session, " + ("resumed" if resume else "full handshake")
        shown = [*COSTS, ("resumed", "resumed, %", 0), ("tls", "negotiated", 0)]
        table = Table("resumed" if resume else "tls", title, shown, picture=("tree", "own"), beside=BARE_LINE)
        table.notes.append(BARE_IN_TLS)
        sessions_of(stage, secure(fields), table, True, ["--resume"] if resume else [])
        if not resume:
            table.goal("ours", "own", 2.0, "STARTTLS session, ms of our own process")
            table.goal("ours keep", "tree", 3.8, "STARTTLS session by keep, ms of the whole tree")
            table.goal("ours respawn", "tree", 5.0, "STARTTLS session by respawn, ms of the whole tree")
        tables.append(table)
    return tables


def sessions_of(stage, fields, table, tls, flags):
    plans = {}

    def one(contender):
        way = way_of(contender, tls)
        if contender.name not in plans:
            count = how_many(stage, contender, way)
            plans[contender.name] = count, fastest(lambda at_once: crowd(stage, contender, way, count, at_once, *flags)["rate"])
        count, at_once = plans[contender.name]
        usage, said = batch(stage, contender, way, count, *SHORT, *flags)
        values = {**costs(usage, said, count), **crowd(stage, contender, way, count, at_once, *flags), "many": str(at_once)}
        if way in contender.alone:
            values["own"] = alone(stage, contender, way, max(count // 2, 10), *flags)
        if tls:
            values |= {"resumed": said["resumed"] * 100 / (count - said["failed"]), "tls": said["tls"]}
        peak = Moment(stage, contender, way, MAILFRONT, "hold", *flags).tree / 1024
        table.add(contender.name, peak=peak, p50=said["wall"]["p50"] / 1e3, wall=milliseconds(said["wall"]), **values)

    each(stage, table, fields, stage.rounds(2, 5), one)
    table.pool("p99", "wall", 0.99)
    if not tls:
        table.above("above", "tree")  # in TLS, bare is another mail server


def costs(usage, said, tried):
    """A session, of all that were tried: usage has what the failed ones cost, too."""
    return {"tree": usage.seconds * 1e3 / tried, "own": usage.own * 1e3 / tried if usage.own else None,
            "switches": usage.switches / tried, "failed": said["failed"] * 100 / tried}


def crowd(stage, contender, way, count, at_once, *flags):
    many = max(count // at_once, 2) * at_once
    _, said = batch(stage, contender, way, many, "--at-once", at_once, *SHORT, *flags)
    return crowded(said, many)


def fastest(rate_of):
    """The number at once at which most sessions a second succeed. Chosen before the rounds: the figure is no maximum of noise."""
    rates, why = {}, None
    for number in AT_ONCE:
        try:
            rates[number] = rate_of(number)
        except Failure as error:
            why = error
    if not rates:
        raise why
    return max(rates, key=rates.get)


def milliseconds(latencies):
    """Each session's, as the load generator's histogram holds it."""
    return [microseconds / 1e3 for microseconds, count in latencies["values"] for _ in range(count)]


def crowded(said, tried):
    """Sessions a second are those that succeeded."""
    return {"rate": said["wall"]["count"] / said["seconds"], "crowded": said["failed"] * 100 / tried}


def how_many(stage, contender, way):
    """As many as take about a second, between 20 and 200."""
    _, said = batch(stage, contender, way, 5, *SHORT)
    return int(min(200, max(20, (0.3 if stage.quick else 0.8) * 5 / said["seconds"])))


def batch(stage, contender, way, count, *flags):
    with Running(stage) as run:
        port = contender.start(way, run, MAILFRONT)
        with load(stage, port, way, "session", "--sessions", count, *flags) as client:
            said = client.answer()
        few_failed(said, count)
    return run.usage, said


def few_failed(said, tried):
    if said["failed"] > MOST_FAILED * tried:
        raise Failure(f"{said['failed']} of {tried} sessions failed: {said['error']}")


def alone(stage, contender, way, count, *flags):
    with Running(stage) as run:
        command = contender.alone[way](run, MAILFRONT)
        run.ready()
        with Door(run, command) as door, load(stage, door.port, way, "session", "--sessions", count, *SHORT, *flags) as client:
            said = client.answer()
        if said["failed"]:
            raise Failure(f"{said['failed']} of {count} sessions failed where it is measured alone: {said['error']}")
    return door.mean()


# --- start ------------------------------------------------------------------------------------------------------------------

def start(stage, fields):
    """How long until the greeting?

    From connect to the whole greeting, then QUIT, one after the other, in plaintext. Page faults are those of the whole tree, a session;
    its memory is the sum of the peaks (VmHWM) of its processes with one session after EHLO.
    A contender that greets by itself, before the mail server does, shows here as faster than bare."""
    columns = [("p50", "p50, ms", 2), ("p99", "p99 of all rounds, ms", 2), ("above", "p50 above bare, ms", 2), ("faults", "page faults of the tree", 0),
               ("peak", "peak of the tree, MiB", 1), ("tree", "CPU of the tree, ms", 2)]
    table = Table("plain", "From connect to the greeting", columns, picture=("p50",))
    count = 50 if stage.quick else 150

    def one(contender):
        with Running(stage) as run:
            port = contender.start("plain", run, MAILFRONT)
            with load(stage, port, "plain", "greeting", "--sessions", count) as client:
                said = client.answer()["greeting"]
        peak = Moment(stage, contender, "plain", MAILFRONT, "hold", "--snoop").tree / 1024
        table.add(contender.name, p50=said["p50"] / 1e3, greetings=milliseconds(said), faults=run.usage.faults / count,
                  peak=peak, tree=run.usage.seconds * 1e3 / count)

    each(stage, table, plain(fields), stage.rounds(3, 7), one)
    table.above("above", "p50")
    table.pool("p99", "greetings", 0.99)
    table.goal("ours", "above", 1.0, "greeting delay, ms above bare at p50")
    return [table]


# --- idle -------------------------------------------------------------------------------------------------------------------

def idle(stage, fields):
    """What does a silent session hold, and does it ever wake up?

    Of the contender's own processes, from smaps_rollup: the private memory of those that serve a session alone, and what anonymous memory
    there is beyond that without sessions, a session (Pss_Anon: pages that a fork left shared count once). Wake-ups are voluntary
    context switches, and processor time is theirs, of all sessions together, over a window that begins when a contender has had time
    to tidy up after its traffic. All contenders are idle at the same time, once: there are no rounds."""
    states = [("snoop", "Idle after EHLO", False, ["--snoop"]), ("plain", "Idle in the plain relay, one mail done", False, []),
              ("tls", "Idle in TLS, one mail done", True, [])]
    return [idle_in(stage, fields, *state) for state in states]


def idle_in(stage, fields, name, title, tls, flags):
    window, count = (3, 4) if stage.quick else (60, 10)
    columns = [("private", "private KiB of its processes", 0), ("anonymous", "anonymous KiB", 0), ("processes", "processes", 1),
               ("woken", f"wake-ups in {window} s, all", 0), ("spent", f"CPU us in {window} s, all", 0)]
    table = Table(name, f"{title}, a session ({count} at once, {window} s)", columns, picture=("anonymous",), limit=None)
    table.notes.append("the mail server behind it is not counted, nor that which HOST PORT is")
    silent = [one for one in (secure if tls else plain)(fields) if one.name != "bare"]  # that is nothing but the mail server
    with contextlib.ExitStack() as stack:
        held = []
        for contender in silent:
            stage.progress(f"{title}: {contender.name}")
            with row_of(table, contender.name), contextlib.ExitStack() as opened:
                way = way_of(contender, tls)
                run = opened.enter_context(Running(stage))
                port = contender.start(way, run, MAILFRONT)
                before = own_memory(run)
                client = opened.enter_context(load(stage, port, way, "hold", "--sessions", count, *flags, lasts=600))
                client.until_ready()
                held.append((contender.name, run, client, before, stack.enter_context(opened.pop_all())))
        time.sleep(3)  # buffers are given back a second after traffic; nothing is counted before
        stage.progress(f"{title}: {window} s of silence")
        samples = {one: awake(run) for one, run, *_ in held}
        time.sleep(window)
        for one, run, *_ in held:
            woken, spent = (after - before for after, before in zip(awake(run), samples[one]))
            samples[one] = (woken, spent)
        for one, run, client, before, opened in held:
            with row_of(table, one), opened:
                after = own_memory(run)
                fresh = [after[pid][0] for pid in after if pid not in before]
                anonymous = sum(kib for _, kib in after.values()) - sum(kib for _, kib in before.values())
                table.add(one, private=sum(fresh) / count if fresh else None, anonymous=anonymous / count, processes=len(fresh) / count,
                          woken=samples[one][0], spent=samples[one][1] / 1e3)
                client.go()
                client.close()
    for name in [one.name for one in silent if one.is_ours()]:
        table.goal(name, "woken", 0, f"{name}: wake-ups of {count} silent sessions in {window} s")
    return table


def own_pids(run):
    return [pid for pid in run.pids() if name_of(pid) not in BYSTANDERS]


def own_memory(run):
    return {pid: memory(pid) for pid in own_pids(run)}


def awake(run):
    """Wake-ups and nanoseconds until now."""
    pids = own_pids(run)
    return sum(switches(pid, ("voluntary_ctxt_switches",)) for pid in pids), sum(clock(pid) for pid in pids)


# --- growth -----------------------------------------------------------------------------------------------------------------

def growth(stage, fields):
    """Does a session cost more when there are many?

    Processor time and context switches of the tree for each session of one mail of 2 KiB; what one holds of memory is in idle. None of those that are there at once goes on before all of them
    are open and greeted. A session that fails is one of those that were tried, with what it cost. The load generator has a thread for
    each, on the same processors. In TLS only those that do STARTTLS."""
    sizes = [1, 10, 100] if stage.quick else [1, 10, 100, 1000]
    tables = []
    for tls in (False, True):
        columns = [*((f"at{size}", f"{size:,} at once, ms", 2) for size in sizes),
                   *((f"switches{size}", f"switches, {size:,} at once", 0) for size in sizes), ("failed", "failed, %", 2)]
        title = ("TLS" if tls else "Plain") + " session, processor time of the tree"
        table = Table("tls" if tls else "plain", title, columns, picture=(f"at{sizes[0]}", f"at{sizes[-1]}"), beside=BARE_LINE if tls else "bare")
        table.notes += [BARE_IN_TLS] * tls

        def one(contender):
            way, found, failed, asked = way_of(contender, tls), {}, 0, 0
            for size in sizes:
                count = max(size, 20 if stage.quick else 60) // size * size
                usage, said = batch(stage, contender, way, count, "--at-once", size, "--together", "--patience", 60)
                cost = costs(usage, said, count)
                found |= {f"at{size}": cost["tree"], f"switches{size}": cost["switches"]}
                failed, asked = failed + said["failed"], asked + count
            table.add(contender.name, **found, failed=failed * 100 / asked)

        some = [contender for contender in (secure if tls else plain)(fields)
                if contender.name == "bare" or "starttls" in contender.ways or not tls and contender.name != "ours copy"]
        each(stage, table, some, stage.rounds(2, 3), one)
        tables.append(table)
    return tables
