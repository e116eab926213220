//! What the operator reads: true, and no more of it because a client asks again and again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore};

use crate::door::{Door, Start};
use crate::steps::{At, Standing, ask_child};
use crate::stream::wait_until;
use crate::wire::PATIENCE;

const NOT_AVAILABLE: &[u8] = b"454 4.7.0 TLS not available\r\n";

/// Hand-overs of one session that may fail.
const HANDOVERS: usize = 10;

/// The lines of the log that hold `words`.
fn lines(door: &Door, words: &str) -> usize {
    door.said().lines().filter(|line| line.contains(words)).count()
}

#[test]
fn the_childs_own_starttls_is_told_once() {
    let mut standing = Standing::at(At::Snoop, &Start::default());
    let client = standing.door.client.as_mut().unwrap();
    for _ in 0..20 {
        client.send(b"EHLO client.example\r\n");
        standing.child.get(b"EHLO client.example\r\n").unwrap();
        standing.child.send(b"250-mail.example\r\n250 STARTTLS\r\n");
        client.get(b"250-mail.example\r\n250 STARTTLS\r\n").unwrap();
    }
    assert_eq!(lines(&standing.door, "the child offers STARTTLS"), 1, "{}", standing.door.said());
    assert_eq!(standing.close(), 1);
}

#[test]
fn a_missing_certificate_is_told_once() {
    let mut door = Door::open(&Start { certificate: false, ..Start::default() });
    let mut child = crate::child::Child::accept(&door.puppets).unwrap();
    child.send(b"220 mail.example ESMTP\r\n");
    let client = door.client.as_mut().unwrap();
    client.get(b"220 mail.example ESMTP\r\n").unwrap();
    client.send(&b"STARTTLS\r\n"[..]);
    client.get(NOT_AVAILABLE).unwrap();
    for _ in 0..20 {
        client.send(b"STARTTLS\r\n");
        client.get(NOT_AVAILABLE).unwrap();
    }
    assert_eq!(lines(&door, "STARTTLS answered 454"), 1, "{}", door.said());
    door.client = None;
    let _ = child.rest();
    child.exit(0);
    assert_eq!(door.code(), 1);
}

#[test]
fn after_ten_failed_hand_overs_the_backend_is_not_dialled_again() {
    let mut standing = Standing::at(At::Snoop, &Start::default());
    standing.door.backend.listen();
    let mut dialled = 0;
    for at in 0..HANDOVERS + 20 {
        standing.door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
        if at < HANDOVERS {
            standing.door.backend.accept_only().unwrap();
            dialled += 1;
            drop(standing.door.backend.take());
        }
        standing.door.client.as_mut().unwrap().get(NOT_AVAILABLE).unwrap();
        assert!(!standing.door.backend.is_dialled(), "dialled after {dialled} failures");
    }
    assert_eq!(lines(&standing.door, "STARTTLS answered 454"), HANDOVERS, "{}", standing.door.said());
    assert_eq!(lines(&standing.door, "the backend is not dialled again"), 1, "{}", standing.door.said());
    let length = standing.door.said().len();
    assert!(length < 4096, "{length} octets of log");
    ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").unwrap();
    assert_eq!(standing.close(), 1);
}

/// The fields of the summary line, in their order; the client's port is left out.
fn summary(door: &Door) -> Vec<(String, String)> {
    assert!(wait_until(PATIENCE, || door.said().contains(" seconds=")), "{}", door.said());
    let said = door.said();
    let mut summaries = said.lines().filter(|line| line.contains("end=\""));
    let line = summaries.next().unwrap();
    assert_eq!(summaries.next(), None, "one summary: {said}");
    let (head, fields) = line.split_once(": ").unwrap();
    assert!(head.starts_with("starttls-wrapper["), "{line}");
    let mut rest = fields;
    let mut found = Vec::new();
    while let Some((name, tail)) = rest.split_once('=') {
        let (value, tail) = match tail.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap(),
            None => tail.split_at(tail.find(' ').unwrap_or(tail.len())),
        };
        found.push((name.to_owned(), value.to_owned()));
        rest = tail.strip_prefix(' ').unwrap_or(tail);
    }
    found
}

fn field<'a>(fields: &'a [(String, String)], name: &str) -> &'a str {
    fields.iter().find(|(n, _)| n == name).map_or_else(|| panic!("no {name}: {fields:?}"), |(_, value)| value)
}

fn names(fields: &[(String, String)]) -> String {
    fields.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" ")
}

/// `seconds` is a number of them with three decimals, and about so many.
fn must_last(fields: &[(String, String)], atleast: Duration) {
    let seconds = field(fields, "seconds");
    assert_eq!(seconds.split_once('.').map(|(_, decimals)| decimals.len()), Some(3), "{seconds}");
    let seconds = Duration::from_secs_f64(seconds.parse().unwrap());
    assert!(seconds >= atleast && seconds < atleast + PATIENCE, "{seconds:?}");
}

#[test]
fn the_summary_of_a_plain_session_is_true() {
    let mut standing = Standing::at(At::Snoop, &Start::default());
    let socket = standing.door.client.as_mut().unwrap().stream().input().try_clone().unwrap();
    let client = SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap().to_string();
    drop(socket);
    ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").unwrap();
    ask_child(&mut standing.door, &mut standing.child, "MAIL FROM:<>\r\n", "250 Ok\r\n").unwrap();
    ask_child(&mut standing.door, &mut standing.child, "QUIT\r\n", "221 Bye\r\n").unwrap();
    standing.child.exit(0);
    standing.door.client.as_mut().unwrap().get_end().unwrap();
    let fields = summary(&standing.door);
    assert_eq!(names(&fields), "client end mode received sent recorded seconds");
    let received = "EHLO client.example\r\nNOOP\r\nMAIL FROM:<>\r\nQUIT\r\n".len();
    let sent = "220 mail.example ESMTP\r\n250-mail.example\r\n250 STARTTLS\r\n250 Ok\r\n250 Ok\r\n221 Bye\r\n".len();
    let (received, sent) = (received.to_string(), sent.to_string());
    for (name, value) in [
        ("client", client.as_str()),
        ("end", "over"),
        ("mode", "plain"),
        ("received", &received),
        ("sent", &sent),
        // Only what came before the cutoff.
        ("recorded", "2"),
    ] {
        assert_eq!(field(&fields, name), value, "{name}: {fields:?}");
    }
    must_last(&fields, Duration::ZERO);
    assert_eq!(standing.close(), 0);
}

#[test]
fn the_summary_of_a_tls_session_is_true() {
    let mut standing = Standing::at(At::RelayTls, &Start::default());
    let client = standing.door.client.as_mut().unwrap();
    let backend = standing.door.backend.held();
    client.send(&[b'a'; 100_000]);
    client.send(b"QUIT\r\n");
    let said = [&[b'a'; 100_000][..], b"QUIT\r\n"].concat();
    backend.get(&said).unwrap();
    client.end();
    backend.get_end().unwrap();
    backend.send(&[b'b'; 30_000]);
    backend.end();
    client.get(&[b'b'; 30_000]).unwrap();
    client.get_end().unwrap();
    let fields = summary(&standing.door);
    assert_eq!(names(&fields), "client end mode tls suite group sni resumed received sent recorded seconds");
    for (name, value) in [
        ("end", "over"),
        ("mode", "tls"),
        ("tls", "TLSv1.3"),
        ("suite", "TLS_AES_128_GCM_SHA256"),
        ("group", "X25519MLKEM768"),
        ("sni", "localhost"),
        ("resumed", "no"),
    ] {
        assert_eq!(field(&fields, name), value, "{name}: {fields:?}");
    }
    // On the wire: the payload and what TLS adds to it, a handshake and a few records.
    for (name, payload) in [("received", 100_000), ("sent", 30_000)] {
        let count: u64 = field(&fields, name).parse().unwrap();
        assert!(count > payload && count < payload + 8192, "{name}: {fields:?}");
    }
    must_last(&fields, Duration::ZERO);
    assert_eq!(standing.close(), 0);
}

#[test]
fn the_summary_of_a_client_that_never_shook_hands_is_true() {
    let mut standing = Standing::at(At::ClientHandshake, &Start::default());
    let client = standing.door.client.as_mut().unwrap();
    client.send(b"EHLO client.example\r\n");
    client.rest().unwrap();
    client.cut();
    let fields = summary(&standing.door);
    assert_eq!(names(&fields), "client end mode tls suite sni resumed received sent recorded seconds");
    for (name, value) in [("mode", "tls"), ("tls", "none"), ("suite", "none"), ("sni", "-"), ("recorded", "1")] {
        assert_eq!(field(&fields, name), value, "{name}: {fields:?}");
    }
    assert!(field(&fields, "end").starts_with("handshake failed: "), "{fields:?}");
    // What was in clear; whether what was no TLS counts is another question.
    let received: usize = field(&fields, "received").parse().unwrap();
    assert!(received >= "EHLO client.example\r\nSTARTTLS\r\n".len(), "{fields:?}");
    assert_eq!(standing.close(), 98);
}

/// A TLS client that believes nobody.
fn distrustful() -> Connection {
    let config = ClientConfig::builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    let name = "localhost".try_into().unwrap();
    Connection::Client(ClientConnection::new(Arc::new(config), name).unwrap())
}

#[test]
fn the_summary_of_a_client_that_distrusts_us_is_true() {
    let mut standing = Standing::at(At::ClientHandshake, &Start::default());
    let client = standing.door.client.as_mut().unwrap();
    client.secure(distrustful()).unwrap_err();
    client.cut();
    let fields = summary(&standing.door);
    assert_eq!(names(&fields), "client end mode tls suite group sni resumed received sent recorded seconds");
    for (name, value) in [("mode", "tls"), ("tls", "TLSv1.3"), ("sni", "localhost"), ("recorded", "1")] {
        assert_eq!(field(&fields, name), value, "{name}: {fields:?}");
    }
    let end = field(&fields, "end");
    assert!(end.starts_with("handshake failed: ") && end.contains("lert"), "{end}");
    assert_eq!(standing.close(), 98);
}

#[test]
fn each_v_says_more() {
    let said = |options: &[&str]| {
        let mut standing =
            Standing::at(At::ClientHandshake, &Start { options, environment: &[("RUST_LOG", "")], ..Start::default() });
        drop(standing.door.client.take());
        assert_eq!(standing.door.code(), 1);
        standing.door.said()
    };
    let (usual, more, most) = (said(&[]), said(&["-v"]), said(&["-vv"]));
    assert_eq!(usual.lines().count(), 1, "{usual}");
    assert!(more.contains("]: debug: child ") && !more.contains("]: trace: "), "{more}");
    let steps =
        ["snoop -> dial", "dial -> backend handshake", "announce -> client handshake", "client handshake -> close"];
    for step in steps {
        assert!(
            most.lines().any(|line| line.contains("]: trace: client=127.0.0.1:") && line.ends_with(step)),
            "{step}: {most}"
        );
    }
    assert!(most.contains("]: debug: child "), "{most}");
}

#[test]
fn a_rust_log_that_cannot_be_read_is_one_warning_of_ours() {
    let start = Start { environment: &[("RUST_LOG", "info,starttls_wrapper=\u{1b}loud")], ..Start::default() };
    let mut standing = Standing::at(At::Snoop, &start);
    let log = standing.door.said();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("]: warning: RUST_LOG is ignored: ") && log.contains("\\x1bloud"), "{log}");
    drop(standing.door.client.take());
    assert_eq!(standing.close(), 1);
}
