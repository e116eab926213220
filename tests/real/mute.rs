//! `--mute` behind real readers of the PROXY header: whom it mutes, only the header of `--way raw` can have told it.

use std::ffi::OsString;
use std::net::SocketAddrV4;

use crate::clients::{Mode, silent_tls, swaks_by_tls};
use crate::front::{Identity, MAILFRONT, sessions_ended_well, tcpserver, wrapper_by};
use crate::letter::{Queue, letter};
use crate::proxy::{OUTSIDE, front};
use crate::stage::{Stage, wait_for};
use crate::ways::{self, WAYS};

/// PROG: writes down who it was told that its client is and which port that has dialled, and is a mailfront.
const NOTING: [&str; 3] = [
    "sh",
    "-c",
    "echo \"$TCPREMOTEIP $TCPREMOTEPORT $TCPLOCALIP $TCPLOCALPORT\" >>\"$QUEUEDIR/clients\"; exec mailfront smtp queuedir accept",
];

/// tlswrapper before the muted PROG. `reads` is what reads the header, `tls` what tlswrapper is told of it.
fn muted(
    stage: &Stage,
    identity: &Identity,
    reads: &[OsString],
    tls: &[&str],
    mute: &str,
    queue: &Queue,
) -> SocketAddrV4 {
    let read = |path| std::fs::read(path).expect("certificate and key");
    let both = stage.write("both.pem", [read(&identity.key), read(&identity.certificate)].concat());
    let mut argv = reads.to_vec();
    argv.push("tlswrapper".into());
    argv.extend(tls.iter().map(Into::into));
    argv.extend(["-f".into(), both.into(), env!("CARGO_BIN_EXE_starttls-wrapper").into(), mute.into()]);
    argv.extend(NOTING.map(Into::into));
    tcpserver(stage, "muted", &argv, queue)
}

/// The codes of the replies that swaks shows, those inside TLS.
fn codes_inside(output: &str) -> Vec<&str> {
    let replies = output.lines().filter_map(|line| line.strip_prefix("<~").map(str::trim_start));
    replies.filter(|reply| reply.as_bytes().get(3) == Some(&b' ')).map(|reply| &reply[..3]).collect()
}

const OF_A_LETTER: [&str; 6] = ["250", "250", "250", "354", "250", "221"];

/// What PROG was told of its newest client.
fn newest_client(queue: &Queue) -> String {
    wait_for("a client", || {
        let clients = std::fs::read_to_string(queue.folder().join("clients")).ok()?;
        clients.lines().last().map(str::to_owned)
    })
}

/// A client from elsewhere that dials port 25; what reads the header is `reads` and `tls`.
#[track_caller]
pub(crate) fn mutes_who_dialled_25(version: &str, reads: &[OsString], tls: &[&str]) {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let (queue, child) = (Queue::new(&stage, "backend"), Queue::new(&stage, "child"));
    let host = muted(&stage, &identity, reads, tls, "--mute", &queue);
    let server = ["--send-proxy", version].map(str::to_owned).into_iter().chain(host_and_port(host));
    let argv = wrapper_by(&identity, "raw", &server.collect::<Vec<_>>(), &MAILFRONT);
    let at = front(&stage, "front", OUTSIDE, argv, &child);
    silent_tls(&stage, at);
    let text = letter("muted");
    let output = swaks_by_tls(&stage, at, Mode::Tls12, &identity, &text);
    assert_eq!(codes_inside(&output), OF_A_LETTER, "{output}");
    queue.holds(&text);
    child.is_empty();
    assert_eq!(newest_client(&queue), "192.0.2.7 4711 192.0.2.25 25");
    sessions_ended_well(&stage);
}

fn host_and_port(at: SocketAddrV4) -> [String; 2] {
    [at.ip().to_string(), at.port().to_string()]
}

#[test]
fn tlswrapper_reads_the_header_and_the_greeting_is_swallowed() {
    mutes_who_dialled_25("v1", &[], &["-p", "1"]);
}

/// Behind stunnel and behind tlswrapper, all muted.
#[test]
fn behind_each_tls_server_there_is_one_ehlo_reply_and_no_greeting_and_the_letter_is_the_same() {
    let raw: Vec<_> = WAYS.iter().filter(|way| way.name == "raw").collect();
    assert_eq!(raw.len(), 2);
    for way in raw {
        for &mode in way.modes() {
            let stage = Stage::new();
            let (identity, at, behind, child) = ways::front(&stage, way);
            silent_tls(&stage, at);
            let text = letter("muted");
            let output = swaks_by_tls(&stage, at, mode, &identity, &text);
            assert_eq!(codes_inside(&output), OF_A_LETTER, "{output}");
            behind.queue.holds(&text);
            child.expect("a queue of PROG's").is_empty();
            sessions_ended_well(&stage);
        }
    }
}

/// Nothing is set by hand here: the ports are those that were dialled. HAProxy hands a client of implicit TLS on, untouched, and
/// says so by a header of its own.
#[test]
fn one_port_mutes_who_comes_from_a_wrapper_and_greets_who_speaks_tls_from_the_first_octet() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let (queue, child) = (Queue::new(&stage, "backend"), Queue::new(&stage, "child"));
    // Ports are handed out in order: the front's is the next but one.
    let dialled = stage.unused_port().port() + 2;
    let host = muted(&stage, &identity, &[], &["-p", "1"], &format!("--mute={dialled}"), &queue);
    let server = ["--send-proxy", "v1"].map(str::to_owned).into_iter().chain(host_and_port(host));
    let argv = wrapper_by(&identity, "raw", &server.collect::<Vec<_>>(), &MAILFRONT);
    let at = tcpserver(&stage, "front", &argv, &child);
    assert_eq!(at.port(), dialled);
    let implicit = stage.unused_port();
    let configuration = format!(
        "defaults\n  mode tcp\n  timeout connect 60s\n  timeout client 60s\n  timeout server 60s\nlisten smtps\n  bind {implicit}\n  \
         server muted {host} send-proxy\n"
    );
    let file = stage.write("haproxy.cfg", configuration);
    stage.start("smtps", stage.command(["haproxy", "-db", "-f"]).arg(file), implicit);

    let (by_starttls, by_implicit_tls) = (letter("by-starttls"), letter("by-implicit-tls"));
    let output = swaks_by_tls(&stage, at, Mode::Tls12, &identity, &by_starttls);
    assert_eq!(codes_inside(&output), OF_A_LETTER, "{output}");
    queue.holds(&by_starttls);
    assert!(newest_client(&queue).ends_with(&format!(" {} {dialled}", at.ip())), "{}", newest_client(&queue));

    let output = crate::clients::swaks_by_implicit_tls(&stage, implicit, &identity, &by_implicit_tls);
    assert_eq!(codes_inside(&output), [&["220"], &OF_A_LETTER[..]].concat(), "{output}");
    let letters = wait_for("the second letter", || Some(queue.entries()).filter(|letters| letters.len() == 2));
    assert!(letters.iter().any(|entry| entry.ends_with(&by_implicit_tls)));
    child.is_empty();
    assert!(newest_client(&queue).ends_with(&format!(" {}", implicit.port())), "{}", newest_client(&queue));
}
