"""The ways of the program (`--way`), as the rigs set them up: what goes on behind TLS, whose TLS the client's is, and what time-outs can be set.

`--mute` is no way of its own: it stands behind the TLS that `raw` leads to, and so is attacked with it. To be faulted it stands alone (MUTE).
"""

import collections.abc
import dataclasses
import os
import subprocess
import tempfile

from stage import HOME, MAILFRONT, program

UCSPI_TLS = ["/usr/bin/python3", "-I", HOME / "tests/hostile/ucspi_tls_server.py", "serve"]
IN_CLEAR = {"snoop-timeout", "snoop-total", "relay-timeout", "farewell-timeout"}
OF_CHILD = IN_CLEAR | {"handshake-timeout", "replay-timeout"}


@dataclasses.dataclass(frozen=True)
class Way:
    """One way; its methods are given a Stage."""

    name: str
    time_outs: set  # those that say something here
    server: collections.abc.Callable = None  # starts what is behind TLS, if that is not PROG itself; returns its port
    ends_tls: bool = True  # the client's TLS is the program's own
    under: tuple = ()  # what it is run under; its certificate and key follow
    waits: bool = False  # a process waits to become PROG
    options: tuple = ()  # what the command line says of it; without, `--way` and its name
    greets: bool = True  # the client was not greeted elsewhere
    listens: bool = False  # it is no UCSPI server's child: it listens itself, and starts PROG when a client needs it
    puts_off: bool = False  # a UCSPI child too starts PROG when a client needs it (`--greeting`), where PROG is one that can be learned
    is_daemons: bool = False  # PROG is started by a UCSPI server, which it connects to (`--plain`)

    def behind(self, stage, queue, prog=MAILFRONT, name="backend"):
        """The port of what goes on behind TLS, or None where that is PROG itself."""
        return self.server and self.server(stage, queue, prog, name)

    def timers(self, seconds):
        """The options for these time-outs, by name, as far as they say something here."""
        return [f"--{name}={value}" for name, value in seconds.items() if name in self.time_outs]

    def wrapper(self, stage, backend, *options, prog=MAILFRONT, through=()):
        """The command line; `through` is what stands right before the program."""
        identity = ["--cert", stage.cert, "--key", stage.key] if self.ends_tls else []
        place = [] if backend is None else ["--trusted-loopback", stage.address, backend]
        if self.puts_off and is_learnable(prog):
            options = ("--greeting", greeting(stage, prog), *options)
        under = [*self.under, stage.cert, stage.key] if self.under else []
        return [*under, *through, program(), *(self.options or ("--way", self.name)), *identity, *options, *place, *prog]


def is_learnable(prog):
    """It says the same to everybody, and when it is asked."""
    return prog[1:2] != ["chatty"]


def greeting(stage, prog):
    """The file of what `--probe` prints of this PROG."""
    file = stage.folder / f"greeting-{abs(hash(tuple(map(str, prog))))}"
    if not file.exists():
        environment = {**stage.environment, "QUEUEDIR": str(stage.folder)}
        text = subprocess.run([program(), "--probe", *prog], check=True, capture_output=True, timeout=30, env=environment).stdout
        with tempfile.NamedTemporaryFile(dir=stage.folder, delete=False) as whole:
            whole.write(text)
        os.chmod(whole.name, 0o644)
        os.replace(whole.name, file)  # others may look for it meanwhile
    return file


def stunnel(stage, queue, prog, name):
    return stage.stunnel(queue, prog, name)


def in_the_clear(stage, queue, prog, name):
    return stage.tcpserver(name, prog, queue)


def stunnel_and_mute(stage, queue, prog, name):
    """Whoever comes here was greeted by the program already."""
    return stage.stunnel(queue, [program(), "--mute=always", *prog], name)


def haproxy(*bind):
    """One that wants the PROXY header of whoever comes, before the server in the clear."""
    def start(stage, queue, prog, name):
        behind, port = in_the_clear(stage, queue, prog, f"{name}-behind"), stage.port()
        both, file = stage.folder / f"{name}.pem", stage.folder / f"{name}.cfg"
        both.write_bytes(stage.cert.read_bytes() + stage.key.read_bytes())
        file.write_text(
            f"defaults\n  mode tcp\n  timeout connect 60s\n  timeout client 600s\n  timeout server 600s\nlisten smtp\n"
            f"  bind {stage.address}:{port} accept-proxy {' '.join(bind).format(both=both)}\n  server behind {stage.address}:{behind}\n"
        )
        return stage.start(name, ["haproxy", "-db", "-f", file], port)
    return start


LATE = ("--send-proxy", "v2", "--proxy-facts", "late")

WAYS = {
    way.name: way
    for way in (
        Way("tls", OF_CHILD | {"dial-timeout", "backend-handshake-timeout", "greeting-timeout"}, stunnel),
        Way("plain", OF_CHILD | {"dial-timeout", "greeting-timeout"}, in_the_clear),
        Way("keep", OF_CHILD),
        Way("respawn", OF_CHILD | {"greeting-timeout"}, waits=True),
        Way("raw", IN_CLEAR | {"dial-timeout"}, stunnel_and_mute, ends_tls=False),
        Way("tls-late", OF_CHILD | {"dial-timeout", "backend-handshake-timeout", "greeting-timeout"}, haproxy("ssl crt {both}"),
            options=("--way", "tls", *LATE)),
        Way("plain-late", OF_CHILD | {"dial-timeout", "greeting-timeout"}, haproxy(), options=("--way", "plain", *LATE)),
        Way("put-off", OF_CHILD | {"dial-timeout", "backend-handshake-timeout", "greeting-timeout"}, stunnel,
            options=("--way", "tls"), waits=True, puts_off=True),
        Way("ucspi-tls", OF_CHILD, ends_tls=False, under=tuple(UCSPI_TLS)),
        Way("ucspi-tls-respawn", OF_CHILD | {"greeting-timeout"}, ends_tls=False, under=tuple(UCSPI_TLS), waits=True),
    )
}

MUTE = Way("mute", IN_CLEAR | {"greeting-timeout", "replay-timeout"}, ends_tls=False, options=("--mute=always",), greets=False)

# The same program as a listener, whose clients are served before PROG is there.
LISTENERS = {
    way.name: way
    for way in (
        Way("listen", WAYS["tls"].time_outs, stunnel, options=("--way", "tls"), listens=True),
        Way("listen-keep", OF_CHILD | {"greeting-timeout"}, options=("--way", "keep"), listens=True),
        Way("listen-clear", WAYS["plain"].time_outs, in_the_clear, options=("--way", "plain"), listens=True),
        Way("listen-raw", WAYS["raw"].time_outs, stunnel_and_mute, ends_tls=False, options=("--way", "raw"), listens=True),
        Way("listen-plain", WAYS["tls"].time_outs, stunnel, options=("--way", "tls"), listens=True, is_daemons=True),
    )
}
