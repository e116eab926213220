"""What the attacks and dialogues are run against: this program, and peers, each put up as its manual says, with any PROG behind it."""

import dataclasses
import pathlib
import sys

from stage import MAILFRONT

RIG = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass
class Target:
    """Where clients connect, and where letters end up: of plaintext sessions and of those inside TLS."""

    name: str
    address: str
    port: int
    queues: list

    def letters(self):
        return [letter for queue in self.queues for letter in queue.letters()]

    def clear(self):
        for queue in self.queues:
            queue.clear()


class Server:
    """One way to put STARTTLS before PROG."""

    name = ""
    # Whether its own timers can be set to so few seconds that a rig can wait for them.
    has_timers = True

    def __init__(self, stage):
        self.stage = stage
        self.targets = {}

    def front(self, prog=MAILFRONT, timers=False):
        """The server with this PROG, started once; with `timers` those that end a stalled session are set to 2 seconds."""
        key = (tuple(prog), timers)
        if key not in self.targets:
            number = f"{self.name}-{len(self.targets)}"
            queues = [self.stage.queue(f"{number}-{kind}") for kind in ("plain", "tls")]
            port = self.start(number, queues, prog, timers)
            self.targets[key] = Target(number, self.stage.address, port, queues)
        return self.targets[key]

    def start(self, name, queues, prog, timers):
        raise NotImplementedError


class Bare(Server):
    """PROG without anything: what the others are compared with."""

    name = "bare"

    @classmethod
    def of(cls, stage):
        """The one of this stage."""
        if not hasattr(stage, "bare"):
            stage.bare = cls(stage)
        return stage.bare

    def start(self, name, queues, prog, timers):
        return self.stage.tcpserver(name, prog, queues[0])


class Wrapper(Server):
    """This program, its backend stunnel before another PROG."""

    name = "starttls-wrapper"
    SHORT = [f"--{timer}=2" for timer in ("snoop-timeout", "snoop-total", "handshake-timeout", "relay-timeout")]

    def start(self, name, queues, prog, timers):
        path = "/usr/sbin/mailfront" if prog[0] == "mailfront" else prog[0]
        backend = self.stage.stunnel(queues[1], [path, *prog], f"{name}-backend")
        options = self.SHORT if timers else ["--handshake-timeout=60"]
        return self.stage.tcpserver(name, self.stage.wrapper(backend, *options, prog=prog), queues[0])


class Leaky(Server):
    """The negative control; each attack has its own."""

    def __init__(self, stage, attack):
        super().__init__(stage)
        self.name = "leaky-" + attack.replace(" ", "-")

    def start(self, name, queues, prog, timers):
        argv = [sys.executable, "-I", RIG / "leaky.py", self.stage.cert, self.stage.key, *prog]
        return self.stage.tcpserver(name, argv, queues[0])
