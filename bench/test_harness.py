#!/usr/bin/env python3
"""Checks of the harness itself: its arithmetic, its pictures, its accounting on processes whose cost is known, and a run of it."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import unittest
from xml.etree import ElementTree

sys.dont_write_bytecode = True
HOME = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME / "bench"))

import contenders  # noqa: E402
import listener  # noqa: E402
import measure  # noqa: E402
import picture  # noqa: E402
import sessions  # noqa: E402
from report import Figure, Table  # noqa: E402
from transfers import crossing  # noqa: E402


class Figures(unittest.TestCase):
    def test_median_and_spread(self):
        figure = Figure([3.0, 1.0, 2.0], 1)
        self.assertEqual((figure.median, figure.low, figure.high), (2.0, 1.0, 3.0))
        self.assertEqual(str(figure), "2.0 (1.0 .. 3.0) noisy")
        self.assertEqual(figure.brief(), "2.0 ~100% noisy")

    def test_noisy_is_more_than_three_tenths_of_the_median(self):
        self.assertFalse(Figure([85, 100, 115], 0).noisy)
        self.assertTrue(Figure([84, 100, 115], 0).noisy)

    def test_one_round_has_no_spread_and_what_reads_the_same_is_not_noisy(self):
        self.assertEqual(str(Figure([7], 0)), "7")
        self.assertFalse(Figure([0.001, 0.002, 0.004], 2).noisy)


class Tables(unittest.TestCase):
    def table(self):
        table = Table("plain", "Sessions", [("tree", "CPU, ms", 2), ("above", "above bare, ms", 2), ("times", "times bare", 1)], ("tree",))
        for bare, ours in ((1.0, 2.5), (1.2, 2.0), (1.1, 2.2)):
            table.add("bare", tree=bare)
            table.add("ours", tree=ours)
        table.fail("lost | found", "does not\nstart")
        return table

    def test_differences_and_ratios_are_taken_round_by_round(self):
        table = self.table()
        table.above("above", "tree")
        table.times("times", "tree")
        self.assertAlmostEqual(table.figure("ours", "above").median, 1.1)  # of 1.5, 0.8, 1.1
        self.assertAlmostEqual(table.figure("ours", "times").low, 2.0 / 1.2)
        self.assertIsNone(table.figure("bare", "above"))

    def test_a_quantile_is_of_all_rounds(self):
        table = Table("plain", "Sessions", [("p99", "p99", 1)])
        for first in (1, 101, 201):
            table.add("ours", wall=[float(first + more) for more in range(100)])
        table.pool("p99", "wall", 0.99)
        self.assertEqual(table.figure("ours", "p99").values, [297.0])
        self.assertEqual(sessions.milliseconds({"values": [[1000.0, 2], [3000.0, 1]]}), [1.0, 1.0, 3.0])

    def test_goals(self):
        table = self.table()
        table.goal("ours", "tree", 2.2, "at the limit")
        table.goal("ours", "tree", 2.19, "below it")
        table.goal("absent", "tree", 1, "of a row that is not there")
        table.goal("lost | found", "tree", 1, "of one that failed")
        self.assertEqual([goal.partition(":")[0] for goal in table.goals], ["reached", "MISSED", "not measured", "not measured"])

    def test_a_table_of_one_round_says_so(self):
        said = "one round: no spread"
        table = Table("idle", "Idle", [("private", "KiB", 0)])
        self.assertNotIn(said, table.text())
        table.add("ours", private=90)
        self.assertIn(said, table.text())
        self.assertNotIn(said, self.table().text())

    def test_a_failed_row_says_so_and_a_column_of_nothing_is_left_out(self):
        table = self.table()
        for text in (table.text(), table.markdown(["a.svg"])):
            self.assertIn("lost | found: not measured: does not start", text)
            self.assertNotIn("times bare", text)
        self.assertIn("| ours | 2.20 (2.00 .. 2.50) |", table.markdown())

    def test_the_limit_is_a_line_and_no_bar(self):
        rows, limit = self.table().bars("tree")
        self.assertEqual(([name for name, *_ in rows], limit), (["ours"], 1.1))
        table = Table("ratios", "Ratios", [("ratio", "copy / splice", 2)], limit=None, line=1.0)
        table.add("64 B", ratio=0.9)
        self.assertEqual(table.bars("ratio"), ([("64 B", 0.9, 0.9, 0.9)], 1.0))


class Pictures(unittest.TestCase):
    def shapes(self, *arguments):
        root = ElementTree.fromstring(picture.bars("a < b & c", "ms", *arguments))
        return {kind: root.findall(f"{{http://www.w3.org/2000/svg}}{kind}") for kind in ("rect", "line", "text")}

    def test_bars_are_as_long_as_their_medians(self):
        bars = self.shapes([("ours", 10, 9, 20), ("peer", 5, 5, 5)], 2)["rect"][1:]
        first, second = (float(bar.get("width")) for bar in bars)
        self.assertAlmostEqual(first, 2 * second, delta=0.2)

    def test_the_limit_stands_where_a_bar_of_its_length_would_end(self):
        shapes = self.shapes([("peer", 2, 2, 2), ("other", 8, 8, 8)], 2)
        bar, line = shapes["rect"][1], shapes["line"][-1]
        self.assertAlmostEqual(float(bar.get("x")) + float(bar.get("width")), float(line.get("x1")), delta=0.2)

    def test_a_bar_that_would_hide_the_others_is_cut(self):
        bars = self.shapes([("ours", 2, 2, 2), ("peer", 10, 10, 10), ("slow", 31, 31, 31)])["rect"][1:]
        ours, peer, slow, gap = (float(bar.get("width")) for bar in bars)
        self.assertAlmostEqual(slow, 1.5 * peer, delta=0.2)
        self.assertAlmostEqual(peer, 5 * ours, delta=0.4)
        self.assertLess(gap, 6)
        self.assertEqual(len(self.shapes([("peer", 10, 10, 10), ("slow", 30, 30, 30)])["rect"]), 3)

    def test_nothing_to_draw_is_no_picture(self):
        self.assertEqual(picture.bars("t", "ms", [], 3), "")
        self.assertEqual(picture.bars("t", "ms", [("ours", 0, 0, 0)]), "")


class Crossing(unittest.TestCase):
    def test_where_splice_begins_to_be_cheaper(self):
        ratios = lambda *values: [(64 << (2 * step), Figure(value, 2)) for step, value in enumerate(values)]
        self.assertEqual(crossing(ratios([0.7, 0.9], [0.9, 1.1], [1.1, 1.2], [3, 4])),
                         "cheaper in every round: splice at 1 KiB, 4 KiB; copy at 64 B; splice from 1 KiB on")
        self.assertEqual(crossing(ratios([1.1, 1.2], [0.9, 0.9], [1.2, 1.2])),
                         "cheaper in every round: splice at 64 B, 1 KiB; copy at 256 B; splice from 1 KiB on")
        self.assertEqual(crossing(ratios([1.1, 1.2], [0.9, 1.3])),
                         "cheaper in every round: splice at 64 B; copy at nowhere; splice not at the largest size")


class Sessions(unittest.TestCase):
    def test_a_failed_session_is_one_of_those_that_share_the_cost(self):
        usage = types.SimpleNamespace(seconds=1.0, own=0.5, switches=60)
        self.assertEqual(sessions.costs(usage, {"failed": 5}, 100), {"tree": 10.0, "own": 5.0, "switches": 0.6, "failed": 5.0})

    def test_where_more_than_one_in_twenty_fails_nothing_is_cheap(self):
        sessions.few_failed({"failed": 5}, 100)
        with self.assertRaisesRegex(measure.Failure, "^6 of 100 sessions failed: closed$"):
            sessions.few_failed({"failed": 6, "error": "closed"}, 100)

    def test_sessions_a_second_are_those_that_succeed_and_the_others_are_shown(self):
        said = {"failed": 2, "seconds": 0.5, "wall": {"count": 6}}
        self.assertEqual(sessions.crowded(said, 8), {"rate": 12.0, "crowded": 25.0})
        self.assertLess({"failed", "crowded"}, {key for key, *_ in sessions.COSTS})

    def test_the_number_at_once_is_the_fastest_at_which_few_fail(self):
        def rate(number):
            if number == 64:
                raise measure.Failure("7 of 64 sessions failed")
            return {8: 37.0, 32: 123.0}[number]

        self.assertEqual(sessions.fastest(rate), 32)
        with self.assertRaisesRegex(measure.Failure, "64 sessions failed"):
            sessions.fastest(lambda _: rate(64))

    def test_its_own_is_a_mean_as_a_daemon_s_clock_gives_it(self):
        with measure.Door(None, []) as door:
            door.milliseconds += [1.0, 1.0, 4.0]
        self.assertEqual(door.mean(), 2.0)


class Others(unittest.TestCase):
    def test_what_is_not_ours_is_theirs(self):
        times = iter([[100.0, 50.0, 1.0, 40.0], [106.0, 53.0, 2.0, 44.0]])  # busy 6, idle 3, steal 1; ours 4 of the 6
        share = type("Share", (measure.OthersShare,), {"now": staticmethod(lambda: next(times))})()
        self.assertIn("other programs and the kernel had 20%, the hypervisor 10%", str(share))

    def test_what_our_children_use_is_ours(self):
        before = measure.OthersShare.now()
        subprocess.run([sys.executable, "-c", BURN], check=True)
        busy, _, _, ours = (now - then for now, then in zip(measure.OthersShare.now(), before))
        self.assertAlmostEqual(ours, 0.25, delta=0.1)
        self.assertGreater(busy, 0.15)


class Starts(unittest.TestCase):
    def test_what_did_not_start_is_not_waited_for_again(self):
        tried = []

        def way(run, prog):
            tried.append(prog)
            raise measure.NoStart("deaf")

        contender = contenders.Contender("deaf", {"plain": way})
        for _ in range(2):
            with self.assertRaisesRegex(measure.NoStart, "^deaf$"):
                contender.start("plain", None, [])
        self.assertEqual(len(tried), 1)


class Strangers(unittest.TestCase):
    def test_one_is_a_row_of_its_own_beside_the_others(self):
        self.assertEqual(contenders.everyone([("proxy", "one"), ("other", "two")])[-2].name, "proxy")

    def test_a_name_that_is_taken_or_empty_is_refused(self):
        for pairs in ([("bare", "x")], [("ours", "x")], [("ours too", "x")], [("socat", "x")], [("a", "x"), ("a", "y")], [("", "x")], [("a", " ")]):
            with self.assertRaises(ValueError, msg=pairs):
                contenders.everyone(pairs)


BURN = "import time\nwhile time.process_time() < 0.2: pass"


class Accounting(unittest.TestCase):
    """Processes that use a fifth of a second of processor time each, started in the ways in which contenders start theirs."""

    @classmethod
    def setUpClass(cls):
        measure.become_subreaper()

    def stage(self, folder):
        return types.SimpleNamespace(folder=folder, env=dict(os.environ), roots=set(), children=[])

    def usage(self, command, forking):
        with tempfile.TemporaryDirectory() as folder:
            with measure.Running(self.stage(folder)) as run:
                done = pathlib.Path(folder, "done")
                pid = run.spawn(["/bin/sh", "-c", command.replace("BURN", f"{sys.executable} -c '{BURN}'") + f"; touch {done}; exec sleep 60"])
                (run.forking if forking else run.daemons).append(pid)
                run.start_cost = {pid: (0, 0, 0)}
                measure.wait_until(done.exists, "the burning does not end")
            return run.usage

    def test_children_and_grandchildren_are_counted(self):
        self.assertAlmostEqual(self.usage("BURN; (BURN; true)", True).seconds, 0.4, delta=0.15)

    def test_an_orphan_is_counted(self):
        self.assertAlmostEqual(self.usage("(BURN & true)", True).seconds, 0.2, delta=0.12)

    def test_a_daemon_is_read_before_it_ends(self):
        with tempfile.TemporaryDirectory() as folder:
            with measure.Running(self.stage(folder)) as run:
                run.daemons.append(run.spawn([sys.executable, "-c", BURN + "\ntime.sleep(60)"]))
                run.ready()
                measure.wait_until(lambda: measure.clock(run.daemons[0]) > 0.2e9, "no burning")
                time.sleep(0.05)
            self.assertAlmostEqual(run.usage.own, 0.2, delta=0.1)
            self.assertAlmostEqual(run.usage.seconds, run.usage.own, delta=0.01)

    def test_a_daemon_s_worker_is_counted_once(self):
        with tempfile.TemporaryDirectory() as folder:
            burn = f"{sys.executable} -c '{BURN}\ntime.sleep(60)' & wait"
            with measure.Running(self.stage(folder)) as run:
                run.daemons.append(run.spawn(["/bin/sh", "-c", burn]))
                run.ready()
                measure.wait_until(lambda: any(measure.clock(pid) > 0.2e9 for pid in run.pids()), "no burning")
                time.sleep(0.05)
            self.assertAlmostEqual(run.usage.seconds, 0.2, delta=0.1)

    def test_what_was_used_before_ready_is_not_counted(self):
        with tempfile.TemporaryDirectory() as folder:
            with measure.Running(self.stage(folder)) as run:
                run.forking.append(run.spawn([sys.executable, "-c", BURN + "\ntime.sleep(60)"]))
                measure.wait_until(lambda: measure.clock(run.forking[0]) > 0.2e9, "no burning")
                time.sleep(0.05)
                run.ready()
            self.assertLess(run.usage.seconds, 0.05)


    def test_the_door_counts_all_threads_of_what_it_starts_and_no_children(self):
        program = ("import subprocess, sys, threading, time\n"
                   "def burn():\n  while time.process_time() < 0.3: pass\n"  # of both, and the interpreter's start
                   f"subprocess.run([sys.executable, '-c', {BURN!r}])\n"
                   "threads = [threading.Thread(target=burn) for _ in range(2)]\n"
                   "for one in threads: one.start()\nfor one in threads: one.join()")
        with tempfile.TemporaryDirectory() as folder, measure.Running(self.stage(folder)) as run:
            with measure.Door(run, [sys.executable, "-c", program]) as door:
                with socket.create_connection(("127.0.0.1", door.port)) as session:
                    session.recv(1)  # its end
            self.assertAlmostEqual(door.milliseconds[0], 300, delta=80)


    def test_a_daemon_that_does_not_start_says_its_last_words(self):
        with tempfile.TemporaryDirectory() as folder:
            stage = self.stage(folder)
            began = time.monotonic()
            with self.assertRaisesRegex(measure.Failure, "does not start: no such directive"), measure.Running(stage) as run:
                run.daemon(["/bin/sh", "-c", "echo no such directive >&2; exit 1"], measure.free_port())
            self.assertLess(time.monotonic() - began, measure.DEAF)

    def test_a_daemon_that_dies_has_no_figures_and_leaves_nothing(self):
        for its_client_fails in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                stage = self.stage(folder)
                with self.assertRaisesRegex(measure.Failure, "^sh died while it was measured; last words: out of order$"):
                    with measure.Running(stage) as run:
                        run.daemons.append(run.spawn(["/bin/sh", "-c", "sleep 60 & echo out of order >&2; wait"]))
                        measure.wait_until(lambda: len(run.pids()) == 2 and run.last_words() == "out of order", "no worker")
                        run.ready()
                        worker = run.pids()[1]
                        os.kill(run.daemons[0], signal.SIGKILL)
                        measure.wait_until(run.death, "it lives")
                        if its_client_fails:
                            raise measure.Failure("closed")
                self.assertNotIn(worker, measure.parents())
                with measure.Running(stage) as next_one:
                    self.assertEqual(next_one.session_processes(), [])

    def test_a_failure_is_told_with_the_last_words_of_that_very_contender(self):
        with tempfile.TemporaryDirectory() as folder:
            stage, last = self.stage(folder), []
            for words in ("one", "two"):
                run = measure.Running(stage).__enter__()
                run.forking.append(run.spawn(["/bin/sh", "-c", f"echo {words} >&2; sleep 60"]))
                measure.wait_until(lambda: run.last_words() == words, "no words")
                last.append(run)
            for words, run in zip(("one", "two"), last):
                with self.assertRaisesRegex(measure.Failure, f"^closed; last words: {words}$"):
                    run.__exit__(measure.Failure, measure.Failure("closed"), None)


class Run(unittest.TestCase):
    def test_a_run_has_its_rows_and_a_peer_that_is_missing_says_so(self):
        command = [HOME / "bench/run", "--quick", "--dev", "--only", "ours", "--only", "hitch", "session", "absent=/no/such/program"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        page = (HOME / "target/bench/session.md").read_text()
        plain, tls, resumed = page.split("\n## ")[1:]
        self.assertRegex(plain, r"\n\| ours \| [0-9]")
        for table in (tls, resumed):
            self.assertRegex(table, r"\n\| bare \| [0-9]")
            self.assertRegex(table, r"\n\| ours \| [0-9].*TLSv1_3")
            self.assertRegex(table, r"\n\| hitch \| [0-9].*TLSv1_3")
            self.assertIn(f"\n- {contenders.BARE_IN_TLS}", table)
        self.assertRegex(resumed, r"\n\| ours tickets \| [0-9].* \| 9[0-9] \(9.*\) \| TLSv1_3")
        self.assertNotIn("ours tickets", plain + tls)
        for table in (plain, tls, resumed):
            self.assertRegex(table, r"\n- absent: not measured: .*last words: tcpserver: .* file does not exist")
            self.assertIn(" | wall p99 of all rounds, ms | a second, many at once | so many at once | failed, % | failed of many at once, % |", table)
        ElementTree.parse(HOME / "target/bench/session-plain-tree.svg")

    def test_every_question_has_its_tables_and_pictures(self):
        with_bare = {"bulk": 4, "round-trip": 3, "start": 1, "growth": 2}
        command = [HOME / "bench/run", "--quick", "--dev", "--rounds", "1", "--only", "ours", *with_bare, "idle", "splice-or-copy"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        tables = lambda name: (HOME / f"target/bench/{name}.md").read_text().split("\n## ")[1:]
        for question, count in with_bare.items():
            self.assertEqual(len(tables(question)), count, question)
            for table in tables(question):
                self.assertRegex(table, r"\n\| bare \| [0-9]")
                self.assertRegex(table, r"\n\| ours \| [0-9]")
        self.assertEqual([re.search(r"\n\| ours \| [0-9].*\| 0 \|", table) is not None for table in tables("idle")], [True] * 3)
        for table in tables("splice-or-copy"):
            sizes = re.findall(r"\n\| (\d+ [KM]?i?B) \| [0-9]", table)
            self.assertEqual((sizes[0], sizes[-1], len(sizes)), ("64 B", "1 MiB", 8))
            self.assertRegex(table, r"cheaper in every round: splice at ")
        pages = [*with_bare, "idle", "splice-or-copy"]
        pictures = [name for page in pages for name in re.findall(r"\]\((.*?\.svg)\)", (HOME / f"target/bench/{page}.md").read_text())]
        self.assertGreater(len(pictures), 15)
        for name in pictures:
            ElementTree.parse(HOME / "target/bench" / name)


    def test_raw_is_held_against_its_relay_in_clear_by_itself_and_at_tls_pace(self):
        command = [HOME / "bench/run", "--quick", "--dev", "--rounds", "1", "--only", "ours raw", "bulk"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        tables = (HOME / "target/bench/bulk.md").read_text().split("\n## ")[1:]
        for table in tables[:2]:
            self.assertNotIn("ours raw", table)
        for table in tables[2:]:
            heads = re.search(r"\n\|  \| (.*) \|\n", table)[1].split(" | ")
            own = heads.index("its own, ms per GiB")
            figures = {}
            for row in ("ours raw", "ours raw, in clear", "ours raw, in clear, paced"):
                cells = re.search(rf"\n\| {row} \| (.*) \|\n", table)[1].split(" | ")
                self.assertRegex(cells[heads.index("its own switches per GiB")], "^[0-9]", row)
                figures[row] = cells[own]
            for row, relay in (("ours raw, in clear", "its plain relay through TCP"), ("ours raw, in clear, paced", "its plain relay between ends of TLS' pace")):
                self.assertRegex(table, rf"\n- (reached|MISSED): ours raw, .* of {relay}.*: {figures['ours raw']}, to reach {figures[row]}\n")
                self.assertIn(f"\n- {row}: --way raw" if not row.endswith("paced") else f"\n- {row}: the same, ", table)

    def test_the_listener_has_a_table_for_each_of_its_figures(self):
        command = [HOME / "bench/run", "--quick", "--dev", "--rounds", "1", "--only", "ours", "--only", "haproxy", "listener"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        tables = (HOME / "target/bench/listener.md").read_text().split("\n## ")[1:]
        self.assertEqual(len(tables), 10)
        for number, table in enumerate(tables):
            self.assertRegex(table, r"\n\| ours listen( plain)? \| [0-9]", table)
            judged = re.search(r"\n- (reached|MISSED): ", table) is not None
            self.assertEqual(judged, number not in (0, 1), "of so few idle sessions nothing is said: " + table)
        beside = ["ours", "ours", None, "haproxy", "ours", "in memory", "haproxy", "haproxy", "haproxy", "beside bulk to the client"]
        for other, table in zip(beside, tables):
            self.assertRegex(table, rf"\n\| {other or listener.LISTENER.name} \| [0-9]", table)

    def test_where_our_program_does_not_run_nothing_is_concluded(self):
        command = [HOME / "bench/run", "--quick", "--dev", "--rounds", "1", "--wrapper", "/bin/false", "splice-or-copy"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        self.assertEqual(run.returncode, 1, run.stdout + run.stderr)
        self.assertIn("bench/run: not measured: splice-or-copy: Chunks one by one: 64 B; ", run.stderr)
        page = (HOME / "target/bench/splice-or-copy.md").read_text()
        self.assertEqual(page.count("- not measured: "), 16)
        self.assertNotIn("cheaper in every round", page)


if __name__ == "__main__":
    unittest.main()
