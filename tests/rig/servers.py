"""What the attacks and dialogues are run against: this program, and peers, each put up as its manual says, with any PROG behind it."""

import dataclasses
import http.server
import pathlib
import sys
import threading

from stage import MAILFRONT, wait_for
from ways import WAYS, is_learnable

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
    has_plaintext = True  # a client that does not ask for TLS is served
    relays_replies = True  # PROG's replies reach the client unchanged
    is_ours = False
    many = 20  # clients that begin TLS at once and leave the machine time for another
    passes_dialogue = True  # the client's dialogue is with PROG from its greeting on
    hands_over = False  # another PROG goes on behind TLS
    ends_handshakes = True  # a client's handshake is its own to end

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
    """This program, with another PROG behind it where the way has a backend."""

    name = "starttls-wrapper"
    is_ours = True
    hands_over = True  # by the way `tls`, which dialogues are played through
    SHORT = {"snoop-timeout": 2, "snoop-total": 2, "handshake-timeout": 2, "relay-timeout": 2}

    def __init__(self, stage, way=WAYS["tls"]):
        super().__init__(stage)
        self.way = way
        self.ends_handshakes = "handshake-timeout" in way.time_outs
        self.many = 2 if way.under else self.many  # the UCSPI-TLS server of the rig is an interpreter
        if way.name != "tls":
            self.name += f"-{way.name}"

    def start(self, name, queues, prog, timers):
        backend = self.way.behind(self.stage, queues[1], prog, f"{name}-backend")
        options = self.way.timers(self.SHORT if timers else {"handshake-timeout": 300})  # longer than opening the half-open ones takes
        if self.way.listens:
            return listener(self.stage, name, self.way, backend, options, queues[0], prog)
        return self.stage.tcpserver(name, self.way.wrapper(self.stage, backend, *options, prog=prog), queues[0])


# What a listener says when PROG waits for a client that needs it, and till then what it has learned of PROG is said.
LAZY = "is started when a client needs it, and not before"


def listener(stage, name, way, backend, options, queue, prog=MAILFRONT):
    """Starts the program as a listener, lazily where PROG is one that can be learned; its port."""
    is_lazy = is_learnable(prog)
    port = stage.port()
    options = [*options, "--listen", f"{stage.address}:{port}", "--workers", "2", f"--lazy={'yes' if is_lazy else 'no'}"]
    if way.is_daemons:
        options += ["--plain", f"{stage.address}:{stage.tcpserver(f'{name}-plain', prog, queue)}"]
        prog = []
    stage.start(name, way.wrapper(stage, backend, *options, prog=prog), port, QUEUEDIR=str(queue.folder), RUST_LOG="info")
    wait_for("it to listen", lambda: "listening on" in stage.log(name))
    if is_lazy:
        wait_for("the second probe", lambda: LAZY in stage.log(name))
    return port


class Leaky(Server):
    """The negative control; each attack has its own."""

    def __init__(self, stage, attack):
        super().__init__(stage)
        self.name = "leaky-" + attack.replace(" ", "-")

    def start(self, name, queues, prog, timers):
        argv = [sys.executable, "-I", RIG / "leaky.py", self.stage.cert, self.stage.key, *prog]
        return self.stage.tcpserver(name, argv, queues[0])


class Tlswrapper(Server):
    """tlswrapper and its SMTP helper: TLS and STARTTLS before the same PROG."""

    name = "tlswrapper-smtp"
    relays_replies = False  # it puts an id behind each

    def start(self, name, queues, prog, timers):
        seconds = ["-t", "2", "-T", "2"] if timers else []
        argv = ["tlswrapper", "-q", "-n", *seconds, "-f", self.stage.folder / "both.pem", "tlswrapper-smtp", "-q", *seconds, *prog]
        return self.stage.tcpserver(name, argv, queues[0])


class Stunnel(Server):
    """stunnel with `protocol = smtp`, which has STARTTLS alone and no plaintext."""

    name = "stunnel"
    has_plaintext = False
    relays_replies = passes_dialogue = False  # greeting and EHLO are its own

    def start(self, name, queues, prog, timers):
        behind = self.stage.tcpserver(f"{name}-behind", prog, queues[0])
        port = self.stage.port()
        seconds = "TIMEOUTbusy = 2\nTIMEOUTidle = 2\nTIMEOUTclose = 2\n" if timers else ""
        file = self.stage.folder / f"{name}.conf"
        file.write_text(
            f"foreground = yes\npid =\nsyslog = no\ndebug = 4\n[smtp]\naccept = {self.stage.address}:{port}\nprotocol = smtp\n"
            f"connect = {self.stage.address}:{behind}\ncert = {self.stage.cert}\nkey = {self.stage.key}\n{seconds}")
        return self.stage.start(name, ["stunnel4", file], port)


class Nginx(Server):
    """nginx's mail proxy, told by a small HTTP service where PROG is."""

    name = "nginx-mail"
    relays_replies = passes_dialogue = False  # up to RCPT it is its own

    def start(self, name, queues, prog, timers):
        behind = self.stage.tcpserver(f"{name}-behind", prog, queues[0])
        directory = http.server.ThreadingHTTPServer((self.stage.address, 0), directory_of(self.stage.address, behind))
        threading.Thread(target=directory.serve_forever, daemon=True).start()
        port = self.stage.port()
        file = self.stage.folder / f"{name}.conf"
        seconds = "timeout 2s; proxy_timeout 2s;" if timers else ""
        file.write_text(
            f"load_module /usr/lib/nginx/modules/ngx_mail_module.so;\ndaemon off; pid {file}.pid; error_log stderr;\n"
            f"events {{ worker_connections 4000; }}\nmail {{ server_name rig; auth_http {self.stage.address}:{directory.server_port}/;\n"
            f"ssl_certificate {self.stage.cert}; ssl_certificate_key {self.stage.key}; {seconds}\n"
            f"server {{ listen {self.stage.address}:{port}; protocol smtp; smtp_auth none; starttls on; xclient off; }} }}\n")
        return self.stage.start(name, ["nginx", "-c", file, "-e", "stderr"], port)


def directory_of(address, port):
    class Directory(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            for header, value in (("Auth-Status", "OK"), ("Auth-Server", address), ("Auth-Port", port)):
                self.send_header(header, str(value))
            self.end_headers()

        def log_message(self, *_):
            pass

    return Directory
