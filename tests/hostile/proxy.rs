//! Servers that want no PROXY header, or want it sooner than it comes: each failure is a 454 where the 220 is not out, and behind it
//! a 421 inside TLS, and one line of the log names the way and the step.

use std::time::Duration;

use starttls_wrapper::session::Way;

use crate::door::{Start, tls_client};
use crate::steps::{At, Standing, all_of, ask_child};
use crate::wire::{End, Wire};

const EARLY: Start<'_> = Start { options: &["--send-proxy", "v2"], ..Start::USUAL };

/// How a server goes.
const ENDS: [fn(Wire); 2] = [|mut wire| wire.end(), Wire::reset];

/// Exactly one line is a warning, and it says this.
fn is_told_once(said: &str, what: &str) {
    let warnings: Vec<&str> = said.lines().filter(|line| line.contains("]: warning: ")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains(what), "{what}: {said}");
}

/// The client shakes hands and hears that there is no service; the log says where it failed.
fn is_turned_away_inside_tls(mut standing: Standing, at: &str) {
    let client = standing.door.client.as_mut().unwrap();
    client.secure(tls_client()).unwrap();
    client.get(b"421 4.3.0 Mail server not available\r\n").unwrap();
    assert_eq!(client.get_end(), Ok(End::Clean));
    drop(standing.door.client.take());
    assert_eq!(standing.door.code(), 111);
    is_told_once(&standing.door.said(), at);
    standing.must_be_gone();
}

#[test]
fn a_server_that_closes_on_an_early_header_is_a_454() {
    let ways = [(Way::Tls, "way tls, backend handshake failed"), (Way::Plain, "way plain, backend greeting failed")];
    let cases: Vec<_> = ways.iter().flat_map(|&(way, step)| ENDS.map(|end| (way, step, end))).collect();
    all_of(&cases, |&(way, step, end)| {
        let mut standing = Standing::at(At::Snoop, &Start { way, ..EARLY });
        standing.door.backend.listen();
        standing.door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
        standing.door.backend.accept_only().unwrap();
        standing.door.backend.held().proxy_header().unwrap();
        end(standing.door.backend.take());
        standing.door.client.as_mut().unwrap().get(b"454 4.7.0 TLS not available\r\n").unwrap();
        ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").unwrap();
        is_told_once(&standing.door.said(), &format!("STARTTLS answered 454: {step}"));
        assert_eq!(standing.close(), 1);
    });
}

/// The client hears its 220 before HOST has looked at the header, and then nothing: that TLS is HOST's.
#[test]
fn by_raw_a_server_that_closes_on_an_early_header_is_no_good_end() {
    let ends = [(ENDS[0], "the backend closed without a word"), (ENDS[1], "the backend broke off without a word")];
    all_of(&ends, |&(end, why)| {
        let mut standing = Standing::at(At::Snoop, &Start { way: Way::Raw, ..EARLY });
        standing.door.backend.listen();
        let client = standing.door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\n");
        standing.door.backend.accept_only().unwrap();
        standing.door.backend.held().proxy_header().unwrap();
        client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
        standing.child.get(b"QUIT\r\n").unwrap();
        standing.child.exit(0);
        end(standing.door.backend.take());
        assert_eq!(client.get_end(), Ok(End::Clean));
        drop(standing.door.client.take());
        assert_eq!(standing.door.code(), 111);
        let said = standing.door.said();
        assert!(said.contains(&format!("end=\"way raw, relay failed: {why}\" mode=raw")), "{said}");
        // HOST ends a stranger's silence in the same way.
        assert!(!said.contains("]: warning: "), "{said}");
        standing.must_be_gone();
    });
}

/// A client that takes its time is longer than some servers wait for a header.
#[test]
fn a_server_that_does_not_wait_for_a_late_header_is_a_421_inside_tls() {
    let cases: Vec<_> = [Way::TlsLate, Way::PlainLate].iter().flat_map(|&way| ENDS.map(|end| (way, end))).collect();
    all_of(&cases, |&(way, end)| {
        let mut standing = Standing::at(At::ClientHandshake, &Start { way, ..Start::default() });
        end(standing.door.backend.take());
        is_turned_away_inside_tls(standing, &format!("way {way}, PROXY header failed: "));
    });
}

#[test]
fn a_server_that_greets_before_its_late_header_is_a_421_inside_tls() {
    all_of(&[Way::TlsLate, Way::PlainLate], |&way| {
        let mut standing = Standing::at(At::ClientHandshake, &Start { way, ..Start::default() });
        standing.door.backend.held().send(b"220 in.a.hurry ESMTP\r\n");
        is_turned_away_inside_tls(standing, &format!("way {way}, PROXY header failed: the backend spoke unasked"));
    });
}

#[test]
fn a_server_that_closes_on_a_late_header_is_a_421_inside_tls() {
    let ways = [(Way::TlsLate, "backend handshake failed"), (Way::PlainLate, "backend greeting failed")];
    let cases: Vec<_> = ways.iter().flat_map(|&(way, step)| ENDS.map(|end| (way, step, end))).collect();
    all_of(&cases, |&(way, step, end)| {
        let mut standing = Standing::at(At::ClientHandshake, &Start { way, ..Start::default() });
        let mut backend = standing.door.backend.take();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                backend.proxy_header().unwrap();
                end(backend);
            });
            is_turned_away_inside_tls(standing, &format!("way {way}, {step}: "));
        });
    });
}

#[test]
fn a_server_to_be_told_late_hears_nothing_before_the_client_has_shaken_hands() {
    all_of(&[Way::TlsLate, Way::PlainLate], |&way| {
        let mut standing = Standing::at(At::ClientHandshake, &Start { way, ..Start::default() });
        let client = standing.door.client.as_mut().unwrap();
        // Half a ClientHello.
        client.send(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]);
        client.listen_for(Duration::from_millis(300));
        assert_eq!(standing.door.backend.held().left_over(), b"");
        standing.close();
    });
}
