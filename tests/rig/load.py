"""Many sessions at once through a listener, every letter found again octet for octet.

    load.py SESSIONS [IDLE]    so many at once, half in clear and half by STARTTLS; then so many idle ones (default: none), which must not wake it

The listener has no PROG: its plaintext server is a daemon (--plain), HOST another that speaks TLS from the first octet; both are the
`serve` of this file, in processes of their own. No session goes on to its letter before all are greeted and past EHLO. Letters are drawn
at random and differ all. What is found out besides: that memory does not stay with what is over, that no session is refused or lost, and
that the daemon is connected to for the letters in clear alone.
PROGRAM is the program. The exit code is 0 if nothing is lost, damaged or left behind.
"""

import asyncio
import contextlib
import os
import pathlib
import random
import resource
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request

PATIENCE = 120  # seconds for anything
GREETED = 100  # clients that are greeted at a time
ROUNDS = 2
SPARE = 2 * 2 * 4  # descriptors that its two loops may keep: four pipes each (src/engine/through.rs)
GROWTH = 2048  # KiB that memory may be after the last round above what it was after the first: what allocator and loops keep is kept by then


class Broken(Exception):
    """The claim does not hold."""


def expect(is_so, what):
    if not is_so:
        raise Broken(what)


# --- the servers behind it --------------------------------------------------------------------------------------------------

async def session(reader, writer, folder):
    """The least SMTP there is; a letter is kept as it is on the wire, in a file called by its first line."""
    async def say(text):
        writer.write(text + b"\r\n")
        await writer.drain()
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        await say(b"220 mx.example ESMTP")
        while line := await reader.readline():
            verb = line.split()[0].upper() if line.split() else b""
            if verb == b"EHLO":
                await say(b"250-mx.example\r\n250 PIPELINING")
            elif verb == b"DATA":
                await say(b"354 go on")
                letter = await reader.readuntil(b"\r\n.\r\n")
                name = letter.split(b"\r\n", 1)[0].removeprefix(b"Subject: ").decode()
                pathlib.Path(folder, name).write_bytes(letter)
                await say(b"250 taken")
            elif verb == b"QUIT":
                await say(b"221 bye")
                break
            else:
                await say(b"250 ok")
    writer.close()


async def serve(folder, cert, key):
    context = None
    if cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
    answer = lambda reader, writer: session(reader, writer, folder)
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context, backlog=4096, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# --- the clients ------------------------------------------------------------------------------------------------------------

class Client:
    def __init__(self, port, context):
        self.port, self.context = port, context

    async def ask(self, line, code):
        if line:
            self.writer.write(line + b"\r\n")
        while True:
            reply = await asyncio.wait_for(self.reader.readline(), PATIENCE)
            if reply[3:4] != b"-":
                break
        expect(reply.startswith(code), f"{line[:40]} is answered {reply!r}")

    async def begin(self):
        self.reader, self.writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", self.port), PATIENCE)
        await self.ask(b"", b"220")
        await self.ask(b"EHLO client.example", b"250")
        if self.context:
            await self.ask(b"STARTTLS", b"220")
            await asyncio.wait_for(self.writer.start_tls(self.context, server_hostname="localhost"), PATIENCE)
            await self.ask(b"EHLO client.example", b"250")

    async def deliver(self, letter):
        for line, code in [(b"MAIL FROM:<a@client.example>", b"250"), (b"RCPT TO:<b@mx.example>", b"250"), (b"DATA", b"354")]:
            await self.ask(line, code)
        self.writer.write(letter)
        await self.ask(b"", b"250")
        await self.quit()

    async def quit(self):
        await self.ask(b"QUIT", b"221")
        self.writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await self.writer.wait_closed()


async def begun(clients):
    """All of them greeted, some at a time."""
    gate = asyncio.Semaphore(GREETED)

    async def one(client):
        async with gate:
            await client.begin()
    await asyncio.gather(*(one(client) for client in clients))


def letter(rng, name):
    """As it is on the wire."""
    lines = [bytes(rng.choices(b"abcdefgh \t=\xfc", k=rng.randint(1, 70))) + b"x" for _ in range(rng.choice([1, 10, 100, 1500]))]
    return b"\r\n".join([b"Subject: " + name.encode(), b"", *lines]) + b"\r\n.\r\n"


async def deliver_all(port, count, context, folders):
    rng = random.Random(count)
    letters = [letter(rng, f"letter-{number}") for number in range(count)]
    clients = [Client(port, context if number % 2 else None) for number in range(count)]
    await begun(clients)
    await asyncio.gather(*(client.deliver(text) for client, text in zip(clients, letters)))
    for number, text in enumerate(letters):
        path = pathlib.Path(folders[number % 2], f"letter-{number}")
        expect(path.exists(), f"letter {number} is lost")
        expect(path.read_bytes() == text, f"letter {number} is not what was sent")
        path.unlink()
    expect(not any(map(os.listdir, folders)), "there are other letters too")


# --- the listener -----------------------------------------------------------------------------------------------------------

class Listener:
    def __init__(self, folder, plain, host):
        self.log = pathlib.Path(folder, "log")
        self.port = 10_000 + os.getpid() % 10_000  # below those that the system gives away
        self.metrics = f"127.0.0.1:{self.port + 10_000}"
        command = [os.environ["PROGRAM"], "--listen", f"127.0.0.1:{self.port}", "--workers", "2", "--max-sessions", "12000", "--cert", f"{folder}/cert.pem",
                   "--key", f"{folder}/key.pem", "--trusted-loopback", "--metrics", self.metrics, "--plain", f"127.0.0.1:{plain}", "127.0.0.1", str(host)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stderr=log, env={"PATH": os.environ["PATH"]})
        self.says("is started when a client needs it")

    def said(self):
        return self.log.read_text(errors="replace")

    def says(self, words):
        deadline = time.monotonic() + PATIENCE
        while words not in self.said():
            expect(time.monotonic() < deadline and self.process.poll() is None, f"{words!r} is not said: {self.said()[-500:]}")
            time.sleep(0.05)

    def of_proc(self, name):
        return pathlib.Path(f"/proc/{self.process.pid}/{name}").read_text()

    def memory(self):
        """KiB of its own."""
        return next(int(line.split()[1]) for line in self.of_proc("status").splitlines() if line.startswith("RssAnon:"))

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wakings(self):
        tasks = os.listdir(f"/proc/{self.process.pid}/task")
        texts = [self.of_proc(f"task/{task}/status") for task in tasks]
        return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("voluntary_ctxt_switches:"))

    def summoned(self):
        """Sessions for which the daemon was connected to."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=PATIENCE) as page:
            text = page.read().decode()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("starttls_wrapper_plaintext_servers_summoned_total "))

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        expect(self.process.wait(PATIENCE) == 0, f"it ends with {self.process.returncode}: {self.said()[-500:]}")


def until(is_so, what):
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        expect(time.monotonic() < deadline, what)
        time.sleep(0.05)


def server(stack, *words):
    command = [sys.executable, __file__, "serve", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return int(process.stdout.readline())


def run(count, idle):
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        folders = [os.path.join(folder, name) for name in ("clear", "tls")]
        for each in folders:
            os.mkdir(each)
        cert, key = f"{folder}/cert.pem", f"{folder}/key.pem"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                        "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert], check=True, capture_output=True)
        listener = Listener(folder, server(stack, folders[0]), server(stack, folders[1], cert, key))
        stack.callback(listener.process.kill)
        context = ssl.create_default_context(cafile=cert)
        descriptors, memory = listener.descriptors(), [listener.memory()]
        for _ in range(ROUNDS):
            began = time.monotonic()
            asyncio.run(deliver_all(listener.port, count, context, folders))
            until(lambda: listener.descriptors() <= descriptors + SPARE, f"{listener.descriptors()} descriptors, {descriptors} before")
            memory.append(listener.memory())
            print(f"{count} letters, all at once: {time.monotonic() - began:.1f} s, {memory[-1]} KiB behind them", flush=True)
        expect(memory[-1] <= memory[1] + GROWTH, f"memory grows from round to round: {memory} KiB")
        if idle:
            asyncio.run(hold(listener, idle, context))
        ended = lambda: listener.said().count(" end=\"over\"")
        until(lambda: ended() == ROUNDS * count + idle, f"not each of {ROUNDS * count + idle} sessions has ended well")
        summoned, clear = listener.summoned(), ROUNDS * len(range(0, count, 2))
        expect(summoned == clear, f"the daemon was connected to for {summoned} sessions; {clear} were in clear")
        listener.end()


async def rested(listener):
    """Until nothing wakes it for longer than what it does by the second."""
    for _ in range(20):
        before = listener.wakings()
        await asyncio.sleep(1.5)
        if listener.wakings() == before:
            return
    raise Broken("it does not come to rest")


async def hold(listener, count, context):
    """They are silent, and it sleeps."""
    clients = [Client(listener.port, context) for _ in range(count)]
    before = listener.memory()
    await begun(clients)
    await rested(listener)
    each = (listener.memory() - before) / count
    wakings = listener.wakings()
    await asyncio.sleep(10)
    wakings = listener.wakings() - wakings
    print(f"{count} idle in TLS: {each:.1f} KiB a session, {wakings} wake-ups in 10 s", flush=True)
    expect(each <= 12, f"{each:.1f} KiB a session")
    expect(wakings == 0, f"{wakings} wake-ups")
    await asyncio.gather(*(client.quit() for client in clients))


def main():
    match sys.argv[1:]:
        case ["serve", folder, *files]:
            asyncio.run(serve(folder, *(files or (None, None))))
        case [count, *idle]:
            try:
                run(int(count), int(*idle or [0]))
            except Broken as why:
                sys.exit(f"load: {why}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
