"""What TLS testers find in the TLS that stands behind our STARTTLS, as one table; scripts/tls-conformance installs them.

    tls_conformance.py TOOLS [brief] [child] [listener]    TOOLS is a folder with venv/ (sslyze, tlslite-ng) and tlsfuzzer/ (a checkout of its repository)

Judged are a UCSPI child, which gives no session tickets here, and a listener, which does.

tlsfuzzer's scripts know no STARTTLS and go through shim.py. What one of them expects and does not get is in order only if it is listed
here, with the very words of the failure, the reason, and how many may fail; anything else fails. The rustls client of tests/ is not asked again here.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time

from servers import Target, listener
from shim import Shim
from smtp import Client, deliver, tls_context
from stage import Broken, Stage, expect, limit, many_files, wait_for
from ways import LISTENERS, WAYS

NO_FEATURE = "rustls has no such suite, group, signature or version, and says so by handshake_failure"
OTHER_ALERT = "the connection ends by another fatal alert than tlsfuzzer expects"
TOLERANT = "rustls takes it, and goes on as if it were in order"
CBC = "its TLS 1.2 handshake wants CBC or static RSA, which rustls has not; what it tests before that holds"
FAILURE = r"Unexpected message from peer: Alert\(fatal, handshake_failure\)"
OTHER = r"Expected alert description .* does not match received"
HELLO = r"Unexpected message from peer: Handshake\(server_hello"
SILENT = r"Unexpected closure from peer|^(BrokenPipe|ConnectionReset)Error"
# Script: the failures that are in order, why, and how many of its conversations end so at most; or None where all must pass.
# (Of a script with more than some 300 conversations so many are drawn at random.)
SCRIPTS = {
    "tls13-ccs": None, "tls13-conversation": None, "tls13-count-tickets": None, "tls13-hrr": None, "tls13-invalid-ciphers": None,
    "tls13-nociphers": None, "tls13-record-padding": None, "tls13-unencrypted-alert": None, "sslv2-connection": None,
    "tls13-no-unknown-groups": (HELLO, TOLERANT + ", and asks for another group", 1),
    "tls13-signature-algorithms": (
        f"{SILENT}|{HELLO}", "rustls takes the largest; a ClientHello of nearly 64 KiB is over our cap and ends the connection", 6),
    "tls13-keyupdate": (
        rf"{SILENT}|Timeout when waiting|ApplicationData\(len",
        "rustls answers key updates once, in front of its next data, as RFC 8446 4.6.3 allows; no alert for data inside a handshake message", 6),
    "tls13-0rtt-garbage": (r"bad_record_mac|handshake_failure", "0-RTT that was not offered is no record of this session: bad_record_mac", 5),
    "tls13-certificate-compression": (
        r"Handshake\(certificate\)|handshake_failure|illegal_parameter", "certificates are not compressed, which is optional", 12),
    "tls13-connection-abort": (r"ApplicationData\(len", "it waits for a session ticket; none is sent", 10),
    "tls13-crfg-curves": (f"{FAILURE}|{OTHER}", "there is no x448; " + OTHER_ALERT, 9),
    "tls13-ecdhe-curves": (f"{OTHER}|{FAILURE}", "P-521 is not offered; " + OTHER_ALERT, 12),
    "tls13-empty-alert": (OTHER, OTHER_ALERT, 8),
    "tls13-finished": (OTHER, OTHER_ALERT, 50),
    "tls13-finished-plaintext": (OTHER, OTHER_ALERT, 1),
    "tls13-keyshare-omitted": (OTHER, OTHER_ALERT, 1),
    "tls13-keyupdate-from-server": (r"ApplicationData\(len", "we begin no key update at a client's GET", 1),
    "tls13-large-number-of-extensions": (r"Alert\(fatal, decode_error\)", "a ClientHello with thousands of extensions is refused", 4),
    "tls13-legacy-version": (HELLO, TOLERANT, 8),
    "tls13-lengths": (r"ApplicationData of unexpected size", "it is made for a server that echoes; ours answers 503 to each line", 300),
    "tls13-multiple-ccs-messages": (r"Timeout when waiting", "rustls drops two change_cipher_spec before it objects", 3),
    "tls13-obsolete-curves": (f"{HELLO}|{OTHER}|{FAILURE}", TOLERANT + "; " + OTHER_ALERT, 165),
    "tls13-pkcs-signature": (HELLO, TOLERANT + ": it takes another signature of the offer", 6),
    "tls13-record-layer-limits": (f"{OTHER}|{HELLO}", OTHER_ALERT, 131),
    "tls13-rsa-signatures": (HELLO, TOLERANT + ": it takes another signature of the offer", 3),
    "tls13-serverhello-random": (FAILURE, NO_FEATURE + " (FFDHE, P-521, x448)", 128),
    "tls13-shuffled-extentions": (rf"{HELLO}|decode_error", TOLERANT, 17),
    "tls13-symetric-ciphers": (FAILURE, NO_FEATURE + " (CCM)", 125),
    "tls13-unrecognised-groups": (FAILURE, NO_FEATURE + " (FFDHE)", 12),
    "tls13-version-negotiation": (r"Alert\(fatal, protocol_version\)", "there is no TLS 1.1 to fall back to", 1),
    "tls13-zero-content-type": (SILENT, "rustls gives no alert for this, and the connection ends", 6),
    "tls13-zero-length-data": (SILENT, "rustls gives no alert for data inside a handshake message, and the connection ends", 3),
    "tls13-ffdhe-groups": (f"{FAILURE}|{OTHER}", NO_FEATURE + " (FFDHE)", 62),
    "tls13-psk_ke": (FAILURE, NO_FEATURE + " (PSK without a key exchange)", 2),
    "tls13-session-resumption": (
        r"did not send extension\(s\): session_ticket|ApplicationData\(len", "no tickets are given: each session is a full handshake", 7),
    "connection-abort": None, "conversation": None, "cve-2016-6309": None, "early-application-data": None, "fuzzed-ciphertext": None,
    "hello-request-by-client": None, "invalid-compression-methods": None, "invalid-content-type": None, "no-mlkem-in-old-tls": None,
    "version-numbers": None, "zero-length-data": None,
    "aes-gcm-nonces": (r"decode_error|Not enough nonces", "told of a suite of 128 bits, it offers none at all where it asks for 256", 2),
    "ccs": (OTHER, OTHER_ALERT, 1),
    "invalid-client-hello-w-record-overflow": (OTHER, OTHER_ALERT + ", in one of many hundred made at random", 3),
    "interleaved-CKE-with-CCS": (SILENT, "rustls gives no alert for this, and the connection ends", 2),
    "interleaved-application-data-in-renegotiation": (r"Alert\(warning, no_renegotiation\)", "there is no renegotiation", 3),
    "point-extension": (r"did not send extension\(s\): ec_point_formats", "rustls does not send what RFC 8422 5.2 lets a server leave out", 1),
    "record-layer-fragmentation": (f"{SILENT}|{HELLO}|ApplicationData", TOLERANT + ", a hello in pieces of one octet; one over our cap ends the connection", 4),
    "renegotiation-disabled": (r"ApplicationData\(len", "no renegotiation, and the session goes on: its GET is answered 503", 4),
    "truncating-of-client-hello": (SILENT, "a ClientHello of 64 KiB is over our cap and ends the connection", 4),
    "TLSv1_2-rejected-without-TLSv1_2": (FAILURE, CBC, 3),
    "invalid-client-hello": (f"{FAILURE}|{OTHER}", CBC, 6), "invalid-cipher-suites": (FAILURE, CBC, 2),
    "signature-algorithms": (f"{FAILURE}|{SILENT}", CBC + "; a ClientHello over 64 KiB ends the connection", 20),
    "clienthello-md5": (FAILURE, CBC, 2), "extensions": (f"{FAILURE}|{SILENT}", CBC, 37),
    "export-ciphers-rejected": (rf"{FAILURE}|protocol_version", CBC, 78),
    "sslv2hello-protocol": (rf"{FAILURE}|decode_error", CBC + "; SSLv2 hellos are refused", 3),
}
# The same for a listener: where its tickets make the difference. Scripts about the tickets of TLS 1.2 have no suite in common with us; those
# are offered by our own test of resumption.
WITH_TICKETS = {
    "tls13-connection-abort": (
        r"ApplicationData\(len", "it waits for a session ticket, for which it has offered no use (psk_key_exchange_modes)", 10),
    "tls13-session-resumption": (
        r"ApplicationData\(len", "no ticket for a client that would use it without a key exchange alone, which rustls has not", 1),
}
# A script begins and ends with a sane conversation; so many scripts must show more than these.
SANE, SHOWN = 2, 50
# What else a script is told, so that it offers what we have where it would otherwise offer CBC alone.
OURS = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"
OFFERED = """aes-gcm-nonces ccs connection-abort conversation cve-2016-6309 early-application-data fuzzed-ciphertext hello-request-by-client
    interleaved-CKE-with-CCS interleaved-application-data-in-renegotiation invalid-client-hello-w-record-overflow invalid-compression-methods
    invalid-content-type no-mlkem-in-old-tls point-extension record-layer-fragmentation tls13-version-negotiation truncating-of-client-hello
    version-numbers zero-length-data"""
TOLD = {
    **dict.fromkeys(OFFERED.split(), ["-C", OURS, "-M"]),
    "renegotiation-disabled": ["-C", OURS],
    "tls13-session-resumption": ["--tls1.2-cipher", OURS, "-M"],
}


class Table:
    def __init__(self, front):
        self.failed, self.front = 0, front

    def row(self, tester, test, held, what):
        self.failed += not held
        print(f"{self.front:9} {tester:12} {test:40} {'ok    ' if held else 'FAILED'} {what}", flush=True)

    def check(self, tester, test, act):
        try:
            self.row(tester, test, True, act() or "")
        except (Broken, OSError, ssl.SSLError, subprocess.SubprocessError) as why:
            self.row(tester, test, False, repr(why)[:300])


def tlsfuzzer(tools, shim, name, expected):
    """(whether it is in order; what is to be said: how many of its conversations went as it wishes, and why not all; that number)"""
    command = [f"{tools}/venv/bin/python", f"scripts/test-{name}.py", "-h", shim.target.address, "-p", str(shim.port), "-n", "300", *TOLD.get(name, [])]
    environment = {**os.environ, "PYTHONPATH": "."}
    try:
        done = subprocess.run(command, cwd=f"{tools}/tlsfuzzer", env=environment, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired:
        return False, "not done after 400 s", 0
    output = done.stdout + done.stderr
    numbers = {key: int(number) for key, number in re.findall(r"^(PASS|XFAIL|FAIL): *(\d+)", output, re.M)}
    conversations = re.split(r"\.\.\.$", output, flags=re.M)
    failures = [words[-1] for each in conversations if (words := re.findall(r"^(?:[\w.]*Error: .*|.*, FAIL$)", each, re.M))]
    if not sum(numbers.values()) or len(failures) < numbers["FAIL"]:
        return False, "it did not run: " + output[-200:].replace("\n", " "), 0
    went = numbers["PASS"] + numbers["XFAIL"]
    told = f"{went} of {sum(numbers.values())}"
    if not numbers["FAIL"]:
        return True, told, went
    in_order, why, most = expected or ("$^", "", 0)
    other = [failure for failure in failures if not re.search(in_order, failure)]
    held = not other and numbers["FAIL"] <= most
    return held, f"{told}; {why if held else other[0] if other else f'at most {most} may fail'}", went


def sslscan(at):
    found = subprocess.run(["sslscan", "--starttls-smtp", "--no-colour", at], capture_output=True, text=True, timeout=120).stdout
    enabled = re.findall(r"^(SSLv\d|TLSv1\.\d) +enabled", found, re.M)
    expect(enabled == ["TLSv1.2", "TLSv1.3"], "versions:", enabled)
    suites = re.findall(r"^(?:Preferred|Accepted) +(\S+) +(\d+) bits +(\S+)", found, re.M)
    weak = [suite for suite in suites if int(suite[1]) < 128 or not re.search("GCM|POLY1305", suite[2])]
    expect(suites and not weak, "suites:", weak or "none")
    expect(found.count("not vulnerable to heartbleed") == 2 and "renegotiation not supported" in found, found[:400])
    return f"{len(suites)} suites, all AEAD with a key exchange; TLS 1.2 and 1.3 alone"


SSLYZE = ["sslv2", "sslv3", "tlsv1", "tlsv1_1", "tlsv1_2", "tlsv1_3", "compression", "heartbleed", "robot", "reneg", "openssl_ccs", "early_data", "ems", "resum"]


def sslyze(tools, at, folder):
    out = folder / f"sslyze-{at}.json"
    command = [f"{tools}/venv/bin/sslyze", "--starttls=smtp", f"--json_out={out}", *(f"--{scan}" for scan in SSLYZE), at]
    subprocess.run(command, capture_output=True, timeout=240, check=False)
    scans = json.loads(out.read_text())["server_scan_results"][0]["scan_result"]
    result = {name: scan["result"] for name, scan in scans.items() if scan["status"] == "COMPLETED"}
    expect(len(result) == len(SSLYZE), "scans not completed:", [name for name, scan in scans.items() if scan["status"].startswith("ERR")])
    accepted = {name: bool(scan["accepted_cipher_suites"]) for name, scan in result.items() if name.endswith("cipher_suites")}
    expect([name for name, yes in accepted.items() if yes] == ["tls_1_2_cipher_suites", "tls_1_3_cipher_suites"], accepted)
    expect(not result["heartbleed"]["is_vulnerable_to_heartbleed"], "heartbleed")
    expect(not result["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"], "CCS injection")
    expect(not result["tls_compression"]["supports_compression"], "compression")
    expect(result["robot"]["robot_result"].startswith("NOT_VULNERABLE"), result["robot"])
    expect(not result["session_renegotiation"]["is_vulnerable_to_client_renegotiation_dos"], "renegotiation")
    expect(not result["tls_1_3_early_data"]["supports_early_data"], "early data")
    expect(result["tls_extended_master_secret"]["supports_ems_extension"], "no extended master secret")
    return f"{len(result)} scans, nothing vulnerable"


# testssl.sh's findings above INFO that are the test certificate's or the rig's: by the beginning of their id.
OF_THE_RIG = {
    **dict.fromkeys(["cert_chain_of_trust", "cert_expirationStatus", "cert_notAfter"], "the certificate of the rig is self-signed and of two days"),
    "cert_revocation": "it names no CRL and no OCSP",
    "engine_problem": "it is about testssl.sh's own OpenSSL", "fallback_SCSV": "TLS 1.2 is the oldest version there is, so nothing can be fallen back to",
}


def testssl(at, folder):
    out = folder / f"testssl-{at}.json"
    command = ["testssl", "--quiet", "--ip", at.split(":")[0], "--nodns", "none", "--color", "0", "--warnings", "batch", "--jsonfile", out, "-t", "smtp", at]
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=900, check=False)
    findings = json.loads(out.read_text())
    expect(len(findings) > 50, f"only {len(findings)} findings: it did not run")
    above = [each for each in findings if each["severity"] not in ("OK", "INFO", "DEBUG")]
    other = [each for each in above if not each["id"].startswith(tuple(OF_THE_RIG))]
    expect(not other, *(f"{each['id']} {each['severity']}: {each['finding'][:80]};" for each in other))
    return f"{len(findings)} findings; above INFO only {', '.join(sorted(each['id'].split(' ')[0] for each in above)) or 'none'}: the rig's certificate"


SESSION = b"EHLO client.example\r\nQUIT\r\n"


def openssl(stage, port, version):
    command = ["openssl", "s_client", "-starttls", "smtp", "-brief", "-ign_eof", "-verify_return_error", "-verify_hostname", "localhost"]
    command += ["-CAfile", stage.cert, "-connect", f"{stage.address}:{port}", f"-tls{version.replace('.', '_')}"]
    done = subprocess.run(command, input=SESSION, capture_output=True, timeout=30)
    output = (done.stdout + done.stderr).decode(errors="replace")
    expect(f"TLSv{version}" in output and "\n221 " in output, output[-300:])


def gnutls(stage, port, version):
    command = ["gnutls-cli", "--starttls-proto=smtp", "--verify-hostname=localhost", f"--x509cafile={stage.cert}", "-p", str(port)]
    command += ["--priority", f"NORMAL:-VERS-ALL:+VERS-TLS{version}", stage.address]
    done = subprocess.run(command, input=SESSION, capture_output=True, timeout=30)
    output = (done.stdout + done.stderr).decode(errors="replace")
    expect(f"(TLS{version}" in output and "\n221 " in output, output[-300:])


def python(target, version):
    with Client(target) as client:
        client.starttls(context_of(version))
        client.ask(b"EHLO c", b"250")
        deliver(client, b"Subject: python\r\n\r\n")
        client.ask(b"QUIT", b"221")
        expect(client.socket.recv(1) == b"", "more behind the 221")  # a missing close_notify raises SSLEOFError
    return "a letter; the server's close_notify comes"


def context_of(version):
    return tls_context(ssl.TLSVersion.TLSv1_2 if version == "1.2" else ssl.TLSVersion.TLSv1_3)


def client_closes_first(target, version):
    with Client(target) as client:
        client.starttls(context_of(version))
        client.ask(b"EHLO c", b"250")
        client.socket.settimeout(10)
        client.socket.unwrap()  # raises where no close_notify answers
    return "answered by close_notify"


def truncation(target, version, stage):
    before = stage.log(target.name).count("client broke off")
    with Client(target) as client:
        client.starttls(context_of(version))
        client.ask(b"EHLO c", b"250")
        client.ask(b"MAIL FROM:<a@client.example>", b"250")
        client.ask(b"RCPT TO:<b@localhost>", b"250")
        client.ask(b"DATA", b"354")
        client.send(b"Subject: truncated\r\n\r\n")
        client.socket.shutdown(socket.SHUT_WR)  # without close_notify
        with contextlib.suppress(ssl.SSLError, OSError):
            client.rest(5)
    wait_for("the log", lambda: stage.log(target.name).count("client broke off") > before, 10)
    expect(not any(b"truncated" in letter for queue in target.queues for letter in queue.letters()), "delivered")
    return "told as broken off, not delivered"


def resumption(target, version, is_due):
    """Three sessions, each of which offers what the last one has given."""
    context, session, resumed = context_of(version), None, []
    for _ in range(3):
        with Client(target) as client:
            client.greeting()
            client.ask(b"EHLO c", b"250")
            client.ask(b"STARTTLS", b"220")
            client.socket = context.wrap_socket(client.socket, server_hostname="localhost", session=session)
            client.ask(b"EHLO c", b"250")
            resumed.append(client.socket.session_reused)
            session = client.socket.session if client.socket.session and client.socket.session.has_ticket else None
            expect(bool(session) == is_due, "tickets:", session)
            client.ask(b"QUIT", b"221")
    expect(resumed == [False, is_due, is_due], "resumed:", resumed)
    return "a ticket in each session, the next one is resumed" if is_due else "no tickets, each handshake a full one"


class Octetwise(Shim):
    """A shim of which each segment, either way, is one octet; it leads nobody through STARTTLS."""

    def lead(self, tester):
        with tester, contextlib.suppress(OSError), socket.create_connection((self.target.address, self.target.port)) as server:
            for end in (tester, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.copy, args=(tester, server), daemon=True).start()
            self.copy(server, tester)

    @staticmethod
    def copy(source, sink):
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                for octet in piece:
                    sink.send(bytes([octet]))
            sink.shutdown(socket.SHUT_WR)


def child(stage, queues):
    """Under tcpserver; its port."""
    return stage.tcpserver("child", WAYS["tls"].wrapper(stage, stage.stunnel(queues[1], name="child-backend"), TIMER), queues[0])


def listening(stage, queues):
    """By itself; its port."""
    way = LISTENERS["listen"]
    return listener(stage, "listener", way, way.behind(stage, queues[1], name="listener-backend"), [TIMER], queues[0])


TIMER = "--handshake-timeout=10"
FRONTS = {"child": (child, False), "listener": (listening, True)}


def judge(stage, tools, name, is_brief):
    """How much of one front is not in order, and how many scripts have shown something."""
    start, gives_tickets = FRONTS[name]
    table = Table(name)
    queues = [stage.queue(f"{name}-{kind}") for kind in ("plain", "tls")]
    port = start(stage, queues)
    target = Target(name, stage.address, port, queues)
    at = f"{stage.address}:{port}"
    for version in ("1.2", "1.3"):
        table.check("OpenSSL", f"TLS {version}", lambda: openssl(stage, port, version))
        table.check("GnuTLS", f"TLS {version}", lambda: gnutls(stage, port, version))
        table.check("Python", f"TLS {version}", lambda: python(target, version))
        table.check("Python", f"close_notify of the client, {version}", lambda: client_closes_first(target, version))
        table.check("Python", f"truncation, {version}", lambda: truncation(target, version, stage))
        table.check("Python", f"resumption, {version}", lambda: resumption(target, version, gives_tickets))
        octetwise = Octetwise(target)
        slow = Target("octetwise", stage.address, octetwise.port, [])
        table.check("Python", f"segments of one octet, {version}", lambda: python(slow, version))
    table.check("sslscan", "all", lambda: sslscan(at))
    if is_brief:
        return table.failed, 0
    table.check("sslyze", "all", lambda: sslyze(tools, at, stage.folder))
    shim = Shim(target)
    scripts = SCRIPTS | WITH_TICKETS if gives_tickets else SCRIPTS
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        audit = pool.submit(testssl, at, stage.folder)
        found = pool.map(lambda script: tlsfuzzer(tools, shim, script, scripts[script]), scripts)
        shown = 0
        for script, (held, what, went) in zip(scripts, found):
            table.row("tlsfuzzer", script, held, what)
            shown += held and went > SANE
        table.check("testssl.sh", "all", audit.result)
    # Where nothing worked any more, every script would fail for a reason that is listed.
    table.row("tlsfuzzer", f"{shown} of {len(scripts)} show more than sanity", shown >= SHOWN, f"at least {SHOWN}")
    return table.failed, shown


def main():
    tools, is_brief = os.path.abspath(sys.argv[1]), "brief" in sys.argv
    names = [name for name in sys.argv[2:] if name != "brief"] or (["listener"] if is_brief else FRONTS)
    limit(6000)
    many_files()
    started = time.monotonic()
    with Stage() as stage:
        stage.certificate(("rsa:2048",))
        found = [judge(stage, tools, name, is_brief) for name in names]
    failed = sum(failed for failed, _ in found)
    scripts = "no" if is_brief else " and ".join(str(scripts) for _, scripts in found)
    print(f"{scripts} tlsfuzzer scripts; {failed} failed; {time.monotonic() - started:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
