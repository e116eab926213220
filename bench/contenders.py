"""Who is measured, and how each is started, with the same server behind it.

A contender has a way in for each of `plain`, `starttls`, `implicit` (TLS from the first octet), `promised` (STARTTLS is said, and all
goes on in clear) and `paced` (the same at TLS' pace) that it can do: a function that starts it in a Running before a command (the UCSPI way of writing an SMTP server) and
returns the port. The limit of a question is the contender named `bare`: no forwarder at all.
"""

import shlex

from measure import NoStart, free_port


class Contender:
    """`alone` is the command of a wrapper of one process, by way in, which the Door can start to see its own cost."""

    def __init__(self, name, ways, alone=None, note=""):
        self.name, self.ways, self.alone, self.note = name, ways, alone or {}, note
        self.lost = {}

    def start(self, way, run, prog):
        """One that did not start is not waited for again."""
        if way in self.lost:
            raise self.lost[way]
        try:
            port = self.ways[way](run, prog)
        except NoStart as why:
            self.lost[way] = why
            raise
        run.ready()
        return port

    def is_ours(self):
        return self.name.startswith("ours")

    def secure_way(self):
        return next((way for way in ("starttls", "implicit", "promised", "paced") if way in self.ways), None)


BARE = Contender("bare", {"plain": lambda run, prog: run.tcpserver(prog), "implicit": lambda run, _: run.tls_server()},
                 note="no forwarder: tcpserver and the mail server; with TLS, a mail server that speaks TLS itself (rustls)")

# Said at every table of TLS in which bare is a row.
BARE_IN_TLS = ("bare: rustls' buffered server with a thread for each session, no process of tcpserver's: something to hold the others against, "
               "no limit; one that reads and writes in larger pieces can be cheaper")
BARE_LINE = "a buffered TLS server"


# --- ours -------------------------------------------------------------------------------------------------------------------

def wrapper(name, *options, backend="tls", ways=("plain", "starttls"), note=""):
    """The program of this tree. HOST PORT is a server that speaks TLS, or the same server in plaintext, or there is none. To those of
    --way raw it is one that does not greet."""
    servers = {"tls": lambda run, prog: run.tls_server(), "plain": lambda run, prog: run.tcpserver(prog),
               "raw": lambda run, prog: run.tls_server("--silent"),
               "raw in clear": lambda run, prog: run.tcpserver([run.stage.sink, "--silent"]),
               "raw, paced": lambda run, prog: run.tcpserver([run.stage.sink, "--as-tls", "--silent"], "-D")}

    def command(run, prog):
        stage = run.stage
        words = [stage.wrapper, *(stage.tickets if word == "{tickets}" else word for word in options), *(["--cert", stage.cert, "--key", stage.key] if "raw" not in options else [])]
        if backend:
            words += ["--trusted-loopback"] * ("--trusted-loopback" in stage.wrapper_help)  # older builds do not know it
            words += ["127.0.0.1", servers[backend](run, prog)]
        return [*words, *prog]
    start = lambda run, prog: run.tcpserver(command(run, prog))
    return Contender(name, dict.fromkeys(ways, start), dict.fromkeys(ways, command), note)


def ours():
    tls = {"ways": ("starttls",)}
    return [wrapper("ours", note="plaintext by splice; in TLS two legs, the backend is a server that speaks TLS (rustls)"),
            wrapper("ours copy", "--relay", "copy", ways=("plain",), note="the same with --relay copy"),
            wrapper("ours keep", "--way", "keep", backend=None, **tls, note="--way keep: one TLS leg, to PROG"),
            wrapper("ours plain", "--way", "plain", backend="plain", **tls,
                    note="--way plain: one TLS leg, HOST PORT is the same server in plaintext"),
            wrapper("ours respawn", "--way", "respawn", backend=None, **tls, note="--way respawn: one TLS leg, to a fresh PROG"),
            wrapper("ours raw", "--way", "raw", backend="raw", **tls,
                    note="--way raw: the client's TLS goes to HOST PORT by splice, a server that speaks TLS (rustls) and does not greet")]


def with_tickets():
    """Whose clients may resume: without the option a process that serves one of them gives no ticket."""
    return wrapper("ours tickets", "--ticket-keys", "{tickets}", ways=("starttls",), note="ours with --ticket-keys FILE")


def raw_in_clear():
    """The relay of --way raw, from one TCP connection to another, with plaintext in it."""
    return wrapper("ours raw, in clear", "--way", "raw", backend="raw in clear", ways=("promised",),
                   note="--way raw and a client that says STARTTLS and goes on in clear: the same relay, nobody's TLS")


def raw_paced():
    """The same between ends that are as slow as those of TLS, and move as much at once: what of the difference is theirs."""
    return wrapper("ours raw, in clear, paced", "--way", "raw", backend="raw, paced", ways=("paced",),
                   note="the same, and client and server do a cipher's work, and read and write as much at once as those of TLS do")


# --- peers that start a process for each session ----------------------------------------------------------------------------

def tlswrapper(run, prog):
    return run.tcpserver(["tlswrapper", "-Q", "-n", "-f", run.stage.pem, "tlswrapper-smtp", "-T", "300", *prog])


def socat(run, prog):
    behind, port = run.tcpserver(prog), free_port()
    return run.daemon(["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork,backlog=1100,nodelay", f"TCP:127.0.0.1:{behind},nodelay"],
                      port, forking=True)


def stranger(name, command):
    """NAME=COMMAND of the command line: any program that speaks the UCSPI way."""
    def start(run, prog):
        known = {"{cert}": run.stage.cert, "{key}": run.stage.key, "{pem}": run.stage.pem, "{host}": "127.0.0.1"}
        words = []
        for word in shlex.split(command):
            if word == "{prog}":
                words += prog
                continue
            if "{port}" in word:
                word = word.replace("{port}", str(run.tls_server()))
            for place, value in known.items():
                word = word.replace(place, value)
            words.append(word)
        return run.tcpserver(words if "{prog}" in shlex.split(command) else [*words, *prog])
    return Contender(name, {"plain": start, "starttls": start}, note=command)


# --- daemons ----------------------------------------------------------------------------------------------------------------

def configured(name, text, command, forking=False):
    """A daemon that is told by a file; `text` is a function of the stage, its own port and the port behind."""
    def start(run, prog):
        behind, port = run.tcpserver(prog), free_port()
        path = f"{run.stage.folder}/{name}-{port}.conf"
        with open(path, "w") as file:
            file.write(text(run.stage, port, behind))
        return run.daemon([path if word == "{file}" else word for word in command], port, forking)
    return start


def stunnel(service):
    return configured("stunnel", lambda stage, port, behind: f"""\
foreground = quiet
pid =
debug = err
syslog = no
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[smtp]
accept = 127.0.0.1:{port}
connect = 127.0.0.1:{behind}
cert = {stage.cert}
key = {stage.key}
{service}
""", ["stunnel4", "{file}"])


def haproxy(bind, options):
    return configured("haproxy", lambda stage, port, behind: f"""\
global
  maxconn 2200
defaults
  mode tcp
  timeout connect 10s
  timeout client 300s
  timeout server 300s
  {options}
listen smtp
  bind 127.0.0.1:{port} backlog 1100 {bind.format(pem=stage.pem)}
  server behind 127.0.0.1:{behind}
""", ["haproxy", "-db", "-q", "-f", "{file}"])


# The defaults of Debian's version stop at TLS 1.2 and resume nothing.
NGINX_TLS = "ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache shared:tls:1m;"


def nginx(block, module):
    return configured("nginx", lambda stage, port, behind: f"""\
load_module /usr/lib/nginx/modules/ngx_{module}_module.so;
daemon off;
worker_processes 1;
pid {stage.folder}/nginx-{port}.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
""" + block(stage, port, behind), ["nginx", "-e", "stderr", "-c", "{file}"])


def nginx_stream(secure):
    return nginx(lambda stage, port, behind: f"""\
stream {{ server {{
  listen 127.0.0.1:{port} backlog=1100 {secure};
  {f"ssl_certificate {stage.cert}; ssl_certificate_key {stage.key}; {NGINX_TLS}" if secure else ""}
  proxy_pass 127.0.0.1:{behind};
}} }}
""", "stream")


def nginx_mail(stage, port, behind):
    """The mail proxy asks an HTTP server where to go; it is nginx itself."""
    asked = free_port()
    return f"""\
http {{
  access_log off;
  server {{
    listen 127.0.0.1:{asked};
    location / {{
      add_header Auth-Status OK;
      add_header Auth-Server 127.0.0.1;
      add_header Auth-Port {behind};
      return 200;
    }}
  }}
}}
mail {{
  server_name localhost;
  auth_http 127.0.0.1:{asked}/;
  server {{
    listen 127.0.0.1:{port} backlog=1100;
    protocol smtp;
    timeout 300s;
    smtp_auth none;
    xclient off;
    starttls on;
    ssl_certificate {stage.cert};
    ssl_certificate_key {stage.key};
    {NGINX_TLS}
  }}
}}
"""


def hitch(run, prog):
    behind, port = run.tcpserver(prog), free_port()
    return run.daemon(["hitch", "--quiet", "--workers=1", "--backlog=1100", "--user=nobody", f"--frontend=[127.0.0.1]:{port}",
                       f"--backend=[127.0.0.1]:{behind}", run.stage.pem], port)


def everyone(strangers):
    """In the order of the tables. Which of them can do what is in their ways. ValueError where a stranger can't have its row."""
    mail = nginx(nginx_mail, "mail")
    splice = "option splice-request\n  option splice-response"
    peers = [
        Contender("tlswrapper", dict.fromkeys(("plain", "starttls"), tlswrapper), note="tlswrapper -n with tlswrapper-smtp -T 300 (its 15 s would end idle sessions)"),
        Contender("stunnel", {"starttls": stunnel("protocol = smtp")}, note="protocol = smtp; drops clients that want plaintext"),
        Contender("stunnel implicit", {"implicit": stunnel("")}, note="TLS from the first octet, no STARTTLS"),
        Contender("nginx mail", {"plain": mail, "starttls": mail},
                  note="the mail proxy, its auth_http answered by itself; MAIL and what precedes it are answered by nginx"),
        Contender("nginx stream", {"plain": nginx_stream(""), "implicit": nginx_stream("ssl")}, note="TLS from the first octet, no STARTTLS"),
        Contender("haproxy", {"plain": haproxy("", splice), "implicit": haproxy("ssl crt {pem}", splice)},
                  note="mode tcp with splice; TLS from the first octet, no STARTTLS"),
        Contender("hitch", {"implicit": hitch}, note="TLS from the first octet, no STARTTLS"),
        Contender("socat", {"plain": socat}, note="a process for each session, no TLS"),
    ]
    found = [BARE, *ours(), *peers]
    for name, command in strangers:
        if not name.strip() or not command.strip():
            raise ValueError(f"{name}={command}: NAME=COMMAND, neither of them empty")
        if name in (one.name for one in found) or name.startswith("ours"):
            raise ValueError(f"{name}=...: that name is taken")
        found.append(stranger(name, command))
    return found


