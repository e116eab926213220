"""What all questions do alike: rounds that alternate, one session with two moments, the way in."""

import contextlib

from beside import Load
from measure import Between, Failure, Running, read, status

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def each(stage, table, fields, count, one):
    """`one` of each contender, count times: A B C A B C. One that fails has its row say why, and is in no further round."""
    left = list(fields)
    for number in range(count):
        for contender in list(left):
            stage.progress(f"{table.title}: round {number + 1} of {count}: {contender.name}")
            with row_of(table, contender.name) as outcome:
                one(contender)
            if outcome.failed:
                left.remove(contender)


class Outcome:
    failed = False


@contextlib.contextmanager
def row_of(table, name):
    """A failure in here is the row's, and not the run's."""
    outcome = Outcome()
    try:
        yield outcome
    except (Failure, OSError, ValueError) as error:
        outcome.failed = True
        table.fail(name, error)


def plain(fields):
    return [one for one in fields if "plain" in one.ways]


def secure(fields):
    return [one for one in fields if one.secure_way()]


def way_of(contender, tls):
    return contender.secure_way() if tls else "plain"


def load(stage, port, way, mode, *options, lasts=120):
    return Load(stage, port, None if way == "plain" else way, mode, *options, lasts=lasts)


def high_water(pids):
    return sum(status(read(pid, "status"), "VmHWM") for pid in pids)


class Moment:
    """What one session cost between two moments: see Between; `said` by the load generator; `peak` KiB of the own processes, `tree`
    of all of them: the sum of VmHWM, in which what processes share counts for each."""

    def __init__(self, stage, contender, way, prog, mode, *options):
        with Running(stage) as run:
            port = contender.start(way, run, prog)
            with load(stage, port, way, mode, *options) as client:
                client.until_ready()
                before = run.sample()
                self.said = client.go()
                between = Between(before, run.sample())
                self.whole, self.own = between.whole, between.own
                self.switches, self.own_switches = between.switches, between.own_switches
                self.peak, self.tree = high_water(between.own_pids), high_water(run.pids())
                client.close()
