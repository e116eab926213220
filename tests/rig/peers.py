"""The attacks of attacks.py, and dialogues, on the program and on the peers that Debian packages, as tables for tests/PEERS.md.

A peer is judged by what it claims or what the RFC that it implements demands of it; where neither does, its cell is a dash, and what
happened is told below the table without a verdict. `peers.py brief` shows that this still runs: a few of each, on the program and on one peer.
"""

import re
import subprocess
import sys

import attacks
import dialogues
from servers import Nginx, Stunnel, Tlswrapper, Wrapper
from stage import Broken, Stage, expect, limit, many_files, program

TRIES = 3  # so often a peer must fail, one after the other
RUNS = 20  # of the command injection, and ten times as many of its race
HALF_OPEN = 100
SERVERS = [Wrapper, Tlswrapper, Stunnel, Nginx]
PACKAGES = {"tlswrapper-smtp": "tlswrapper", "stunnel": "stunnel4", "nginx-mail": "nginx"}
# The rule of each attack, and whose rule it is.
RULES = {
    "command injection": "nothing sent in clear is run inside TLS (RFC 3207, 4.2 and 6; CVE-2011-0411)",
    "command injection, race": "the same, the octets in a segment of their own",
    "response injection": "nothing is said in clear behind the 220, nor inside TLS unasked (RFC 3207, 4.2)",
    "session fixation": "who logged in before TLS is a stranger inside it (RFC 3207, 4.2)",
    "transaction kept across TLS": "a MAIL from before TLS is forgotten (RFC 3207, 4.2)",
    "EHLO kept across TLS": "MAIL without EHLO inside TLS is refused",
    "smuggled letter": "what ends a letter is decided by PROG alone",
    "HTTP to the mail port": "a browser's request delivers nothing",
    "other ALPN": "ALPN without smtp ends the handshake (ALPACA)",
    "TLS without STARTTLS": "a ClientHello without STARTTLS gets no TLS",
    "stalling clients": "a client that stalls is ended by a timer, here of 2 seconds, in every state",
    "half-open handshakes": f"{HALF_OPEN} handshakes that never begin keep nobody from being served",
}
NOT_CLAIMED = {
    "EHLO kept across TLS": "no peer says so, and PROG itself takes MAIL without EHLO",
    "HTTP to the mail port": "no peer claims to know HTTP",
    "other ALPN": "no peer claims to look at ALPN for SMTP",
}
NOT_CLAIMED_BY = {
    ("tlswrapper-smtp", "smuggled letter"): "it reads letters itself, and does not claim to leave them alone",
    ("stunnel", "TLS without STARTTLS"): "its manual says that it takes a client that speaks first for one of implicit TLS",
    ("stunnel", "session fixation"): "it knows EHLO and STARTTLS only; there is nothing to log in to",
    ("stunnel", "transaction kept across TLS"): "it takes no MAIL before TLS",
    ("stunnel", "stalling clients"): "it serves no plaintext, where some of these clients stall",
    ("nginx-mail", "session fixation"): "it is set up without AUTH here",
    ("nginx-mail", "response injection"): "it asks PROG nothing before TLS",
}


# Dialogues in which the server's part is a rule of an RFC, and which rule: of servers that pass PROG's own dialogue on,
RELAYED = {
    "rfc5321_typical_transaction": "RFC 5321, D.1", "rfc5321_aborted_transaction": "RFC 5321, D.2",
    "peer_noop": "RFC 5321, 4.1.1.9", "peer_helo": "RFC 5321, 4.1.1.1", "peer_quit_first": "RFC 5321, 4.1.1.10",
    "peer_one_line_ehlo_reply": "RFC 5321, 4.1.1.1: the first line is the name",
    "peer_child_refuses_ehlo": "RFC 5321, 4.1.4: a refusal stays one",
    "peer_empty_line": "RFC 5321, 3.8: the server closes after QUIT alone",
    "peer_line_of_2000_octets": "RFC 5321, 4.5.3.1: no limit where possible",
    "peer_half_a_line_then_the_rest": "RFC 5321, 2.3.8: CRLF ends a line, a segment does not",
    "peer_client_silent_for_16_seconds": "RFC 5321, 4.5.3.2.7: five minutes at least",
    "peer_ehlo_before_the_banner": "replies in order", "peer_helo_before_a_late_banner": "replies in order",
    "peer_ehlo_and_noop_in_one_write": "RFC 2920, 3.2: replies in order",
    "peer_ehlo_and_mail_in_one_write": "RFC 2920, 3.2", "peer_rset_and_mail_in_one_write": "RFC 2920, 3.2",
}
# and of all that know STARTTLS.
SWITCHED = {
    "peer_starttls_with_a_parameter": "RFC 3207, 4: 501", "peer_starttls_in_lower_case": "RFC 5321, 2.4: verbs in any case",
    "peer_starttls_with_a_trailing_blank": "RFC 5321, 4.1.1: blanks before CRLF are borne",
    "peer_client_hello_right_after_220": "RFC 3207, 4: the handshake follows the 220",
    "peer_ehlo_after_the_handshake_shows_no_starttls": "RFC 3207, 4.2", "peer_no_second_220_inside_tls": "RFC 3207, 4.2",
}
# Those of this program's own rules, and why nobody else is judged by them.
OWN = {
    "peer_auth_plain_before_tls": "no RFC forbids TLS behind AUTH; that nobody stays logged in is judged as session fixation",
    "peer_bdat_with_a_chunk": "PROG offers no CHUNKING there",
    "peer_child_sends_421_unasked": "RFC 5321, 3.8 lets the client find it behind its next command",
    "peer_helo_then_starttls": "RFC 3207 offers STARTTLS in a reply to EHLO, and does not say whether it is served without",
    "peer_starttls_before_ehlo": "the same",
    "peer_mail_then_starttls": "RFC 3207 does not forbid STARTTLS there; that the MAIL is forgotten is judged above",
    "peer_nul_inside_ehlo": "no RFC says how a NUL is answered",
    "peer_sixteen_rset_in_one_write": "RFC 2920 has them answered in order, and PROG may be told of one at a time",
    "peer_starttls_and_rset_in_one_write": "RFC 3207 has RSET forgotten, and not refused; it is judged as command injection",
    "peer_starttls_ended_by_lf_only": "RFC 5321, 2.3.8 has CRLF end a line, and does not say what becomes of LF",
    "peer_xclient_from_the_client": "XCLIENT is Postfix's own, and no peer claims to know it",
}
NOT_PLAYED = {
    "peer_auth_plain_before_tls_is_refused_under_require_tls": "it is about an option of this program's; `tests/ucspi.rs` plays it",
    "peer_half_a_line_then_silence": "it takes five minutes; `tests/dialogues.rs` plays it in simulated time",
}


def be_brief():
    for table, few in ((RULES, {"command injection", "response injection"}), (RELAYED, {"peer_noop"}), (SWITCHED, {"peer_no_second_220_inside_tls"})):
        for name in {*table} - few:
            del table[name]
            NOT_PLAYED.setdefault(name, "this is the brief form")
    NOT_PLAYED.update(OWN)
    OWN.clear()
    SERVERS[:] = [Wrapper, Tlswrapper]


def dialogue_held(server, name, notes):
    """Whether it did; what was seen, if not, goes to the notes."""
    server.name += f"-{name}"
    for number in range(1 if server.is_ours else TRIES):
        try:
            dialogues.play(server, name, f"{number}")
            return True
        except Broken as broken:
            seen = str(broken)
    notes.append(f"- {type(server).name}, `{name}`: {plain(server, seen)}")
    print(notes[-1], file=sys.stderr, flush=True)
    return False


def play_dialogues(stage):
    """The second table's rows, what was seen of those that failed, and whether this program held."""
    rows, notes, all_held = [], [], True
    known = {*RELAYED, *SWITCHED, *OWN, *NOT_PLAYED}
    missing = {file.stem for file in dialogues.FOLDER.glob("peer_*.txt")} - known
    expect(not missing, "neither played nor excused:", *missing)
    for name, rule in {**RELAYED, **SWITCHED, **dict.fromkeys(OWN, "this program's own")}.items():
        cells = []
        for server in (kind(stage) for kind in SERVERS):
            is_judged = server.is_ours or name in SWITCHED or (name in RELAYED and server.passes_dialogue)
            cells.append("–" if not is_judged else "holds" if dialogue_held(server, name, notes) else "**fails**")
        all_held &= cells[0] == "holds"
        rows.append(f"| `{name}` ({rule}) | {' | '.join(cells)} |")
    return rows, notes, all_held


def plain(server, text):
    """What was seen, for a page that is the same tomorrow: without our address, and without the ids that tlswrapper puts behind replies."""
    return re.sub(r" \[\w{8}\]", "", text).replace("|", "/").replace(server.stage.address, "HOST").replace("`", "'")[:220]


def version_of(server):
    if server.name not in PACKAGES:
        return subprocess.run([program(), "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    return subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", PACKAGES[server.name]], capture_output=True, text=True, check=True).stdout


def main():
    if sys.argv[1:] == ["brief"]:
        be_brief()
    limit(900)
    many_files()
    verdicts, notes = {}, []
    with Stage() as stage:
        stage.certificate()
        for kind in SERVERS:
            server = kind(stage)
            for name in RULES:
                for _ in range(1 if kind is Wrapper else TRIES):
                    held, found = attacks.attack(server, name, HALF_OPEN if name == "half-open handshakes" else RUNS)
                    if held:
                        break
                why = None if kind is Wrapper else NOT_CLAIMED.get(name) or NOT_CLAIMED_BY.get((server.name, name))
                verdicts[server.name, name] = "–" if why else "holds" if held else "**fails**"
                found = plain(server, found)
                if why:
                    notes.append(f"- {server.name}, {name}: not judged, {why}. Seen: {'held; ' if held else ''}{found}")
                elif not held:
                    notes.append(f"- {server.name}, {name}: {found}")
                print(f"{server.name:18}{name:30}{verdicts[server.name, name]:10} {found[:110]}", file=sys.stderr, flush=True)
        rows, failures, dialogues_held = play_dialogues(stage)
        heads = [f"{kind.name} {version_of(kind)}" for kind in SERVERS]
    print("# The same attacks on the peers\n")
    print("Made by `scripts/peers`, which runs `tests/rig/attacks.py` against each server, all before the same mail server (mailfront), on")
    print("loopback. A dash is a rule that the peer does not claim: it is not judged by it. A peer fails where it failed three times running.")
    print(f"The command injection is tried {RUNS} times, its race {10 * RUNS} times, half-open handshakes are {HALF_OPEN}; on this program")
    print("`scripts/attacks` tries more.\n")
    print(f"| rule | {' | '.join(heads)} |\n|---|{'---|' * len(SERVERS)}")
    for name, rule in RULES.items():
        print(f"| {name}: {rule} | {' | '.join(verdicts[kind.name, name] for kind in SERVERS)} |")
    print("\n## Dialogues\n")
    print("From tests/dialogues; reply codes, their order, STARTTLS and the end are compared, and that nothing more is said, but not words. Of a")
    print("dialogue with TLS a peer has the client's part alone, with mailfront behind it. stunnel and nginx answer the beginning of the")
    print("dialogue themselves and do not claim to pass PROG's on: they are judged by their STARTTLS.\n")
    print(f"| dialogue | {' | '.join(kind.name for kind in SERVERS)} |\n|---|{'---|' * len(SERVERS)}", *rows, sep="\n")
    print("\nOf this program's own rules no peer is judged:\n")
    print("\n".join(f"- `{name}`: {why}" for name, why in OWN.items()))
    print("\n## Dialogues that are not played, and why\n")
    print("\n".join(f"- `{name}`: {why}" for name, why in NOT_PLAYED.items()))
    print("\n## What was seen of the dialogues\n")
    print("\n".join(failures) or "Nothing failed.")
    print("\n## What was seen of the attacks\n")
    print("\n".join(notes) or "Nothing failed, and nothing was left unjudged.")
    sys.exit(0 if dialogues_held and all(verdicts[Wrapper.name, name] == "holds" for name in RULES) else 1)


if __name__ == "__main__":
    main()
