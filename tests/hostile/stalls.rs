//! Somebody says nothing more: each timer fires not before its setting and soon behind it, with its words, and the waiting costs
//! no processor time.

use std::time::{Duration, Instant};

use starttls_wrapper::session::Way;

use crate::door::Start;
use crate::steps::{At, Standing, all_of};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

/// What every timer of these tests is set to, and the soonest and the latest moment that it may fire: all others are set to ten
/// seconds and more.
const SECONDS: &str = "2";
const SOONEST: Duration = Duration::from_millis(1950);
const LATEST: Duration = Duration::from_secs(6);

/// What a session may use of a processor while it waits: a tick of the kernel's clock may always be counted, in and outside the
/// kernel, and another for what was not done yet. A loop that spins uses all there is.
const NOTHING: Duration = Duration::from_millis(50);

/// The timer of a phase.
fn option(at: At) -> &'static str {
    match at {
        At::Ungreeted | At::Snoop | At::HalfLine | At::Owed | At::Gate => "--snoop-timeout",
        At::Dial => "--dial-timeout",
        At::BackendHandshake => "--backend-handshake-timeout",
        At::Greeting => "--greeting-timeout",
        At::Replay => "--replay-timeout",
        At::ClientHandshake => "--handshake-timeout",
        At::RelayPlain | At::RelayTls => "--relay-timeout",
    }
}

#[test]
fn a_stall_in_every_phase_ends_by_its_own_timer_and_costs_nothing() {
    // One way after the other: it is times that are measured.
    for cases in Way::EVERY.map(At::of) {
        all_of(&cases, |&(way, at)| {
            let begun = Instant::now();
            let mut standing = Standing::at(at, &Start { options: &[option(at), SECONDS], ..Start::by(way) });
            let before = standing.door.processor_time();
            let client = standing.door.client.as_mut().unwrap();
            if at.is_handover(way) {
                client.get(b"454 4.7.0 TLS not available\r\n").unwrap();
            } else {
                let (said, end) = client.rest().unwrap();
                match at {
                    At::ClientHandshake => assert_eq!(end, End::Clean),
                    At::RelayPlain => assert_eq!((said, end), (Vec::new(), End::Clean)),
                    At::RelayTls => {
                        assert!(said.is_empty());
                        assert!(!way.ends_tls() || end != End::Clean);
                    }
                    _ => {
                        let farewell: &[u8] = if at.is_late(way) {
                            b"421 4.3.0 Mail server not available\r\n"
                        } else {
                            b"421 4.4.2 Timeout, closing connection\r\n"
                        };
                        assert_eq!((said.as_slice(), end), (farewell, End::Clean));
                    }
                }
            }
            let lost_step = way.keeps() && at == At::Replay;
            if lost_step {
                client.get(b"421 4.3.0 Mail server not available\r\n").unwrap();
            }
            let took = standing.since.elapsed();
            let spent = standing.door.processor_time() - before;
            // The first of its waits begins with the program, before there is a child to tell of it.
            let is_first = matches!((way, at), (_, At::Ungreeted) | (Way::Mute, At::Greeting));
            let at_most = if is_first { begun.elapsed() } else { took };
            assert!(at_most >= SOONEST && took < LATEST, "fired after {took:?}");
            assert!(spent <= NOTHING, "{spent:?} of processor time");
            let code = standing.close();
            assert_eq!(
                code,
                if lost_step || at.is_late(way) {
                    111
                } else if at.is_handover(way) {
                    1
                } else {
                    99
                }
            );
        });
    }
}

#[test]
fn an_idle_session_costs_nothing_in_any_phase() {
    // One way after the other: it is times that are measured.
    for cases in Way::EVERY.map(At::of) {
        all_of(&cases, |&(way, at)| {
            let standing = Standing::at(at, &Start::by(way));
            let before = standing.door.processor_time();
            // Long enough for a tick, for the second after which buffers are given back, and for what an odd timer would do.
            std::thread::park_timeout(Duration::from_secs(3));
            let spent = standing.door.processor_time() - before;
            assert!(spent <= NOTHING, "{spent:?} of processor time");
            standing.close();
        });
    }
}

#[test]
fn an_octet_now_and_then_does_not_outlive_snoop_total() {
    let mut standing = Standing::at(At::Snoop, &Start { options: &["--snoop-total", SECONDS], ..Start::default() });
    let client = standing.door.client.as_mut().unwrap();
    let started = Instant::now();
    while started.elapsed() < LATEST && client.is_open() {
        client.send(b"x");
        client.listen_for(Duration::from_millis(100));
    }
    client.get(b"421 4.4.2 Timeout, closing connection\r\n").unwrap();
    assert!(started.elapsed() < LATEST, "{:?}", started.elapsed());
    assert_eq!(standing.close(), 99);
}

#[test]
fn an_octet_now_and_then_is_no_command_for_snoop_timeout() {
    let mut standing = Standing::at(At::Snoop, &Start { options: &["--snoop-timeout", SECONDS], ..Start::default() });
    let client = standing.door.client.as_mut().unwrap();
    let started = Instant::now();
    while started.elapsed() < LATEST && client.is_open() {
        client.send(b"x");
        client.listen_for(Duration::from_millis(100));
    }
    client.get(b"421 4.4.2 Timeout, closing connection\r\n").unwrap();
    assert!(started.elapsed() < LATEST, "{:?}", started.elapsed());
    assert_eq!(standing.close(), 99);
}

#[test]
fn an_endless_line_at_full_speed_does_not_outlive_snoop_total() {
    let floods = [vec![b'x'; 65536], b"XCLIENT a\r\n".repeat(6000), b"NOOP\0\r\n".repeat(9000)];
    all_of(&floods, |octets| {
        let options = ["--snoop-total", SECONDS];
        let mut standing = Standing::at(At::Snoop, &Start { options: &options, ..Start::default() });
        let client = standing.door.client.as_mut().unwrap();
        let started = Instant::now();
        while started.elapsed() < LATEST && client.is_open() {
            client.send_some(octets);
            client.listen_for(Duration::ZERO);
        }
        let took = started.elapsed();
        assert!(took < LATEST, "{} is served for {took:?}", octets[..8].escape_ascii());
        let code = standing.close();
        assert!(code == 99 || code == 1, "{code}");
    });
}

#[test]
fn a_hello_in_drops_does_not_outlive_the_handshakes_timer() {
    let options = ["--handshake-timeout", SECONDS];
    let mut standing = Standing::at(At::ClientHandshake, &Start { options: &options, ..Start::default() });
    let client = standing.door.client.as_mut().unwrap();
    // A record of 512 octets is announced: a ClientHello that never becomes whole.
    client.send(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]);
    let started = Instant::now();
    while started.elapsed() < LATEST && client.is_open() {
        client.send(&[7]);
        client.listen_for(Duration::from_millis(100));
    }
    assert!(started.elapsed() < LATEST);
    assert_eq!(standing.close(), 99);
}

#[test]
fn a_backend_in_drops_does_not_outlive_its_timers() {
    let drops: [(At, &[u8]); 3] =
        [(At::BackendHandshake, b"\x16\x03\x03\x40\x00\x02"), (At::Greeting, b"220-a\r\n"), (At::Replay, b"250-a\r\n")];
    all_of(&drops, |&(at, octets)| {
        let mut standing = Standing::at(at, &Start { options: &[option(at), SECONDS], ..Start::default() });
        let started = Instant::now();
        let client = standing.door.client.as_mut().unwrap();
        for octet in octets.iter().cycle() {
            standing.door.backend.held().send(&[*octet]);
            client.listen_for(Duration::from_millis(50));
            if started.elapsed() > LATEST || client.has_received() {
                break;
            }
        }
        client.get(b"454 4.7.0 TLS not available\r\n").unwrap();
        assert!(started.elapsed() < LATEST);
        assert_eq!(standing.close(), 1);
    });
}

#[test]
fn a_child_that_stays_is_terminated_and_then_killed_by_the_farewells_timer() {
    let modes = ["plain", "ignore-term"];
    let cases = modes.iter().flat_map(|mode| [(At::Snoop, mode), (At::RelayPlain, mode)]).collect::<Vec<_>>();
    all_of(&cases, |&(at, &mode)| {
        let options = ["--farewell-timeout", "4"];
        let mut standing = Standing::at(at, &Start { options: &options, mode, ..Start::default() });
        let started = Instant::now();
        drop(standing.door.client.take());
        let _ = standing.child.rest();
        if at == At::RelayPlain {
            // Nobody can tell that its client is gone before it says something.
            while !wait_until(Duration::from_millis(5), || standing.door.said().contains("end=")) {
                standing.child.send(b"250 Ok\r\n");
            }
        } else {
            standing.child.close_stdout();
        }
        assert!(wait_until(2 * PATIENCE, || standing.child.is_gone(Duration::ZERO)));
        let (took, soonest) = (started.elapsed(), Duration::from_secs(if mode == "plain" { 4 } else { 8 }));
        assert!(took >= soonest && took < soonest + Duration::from_secs(4), "{mode}: {took:?}");
        assert_eq!(standing.door.code(), 1);
    });
}
