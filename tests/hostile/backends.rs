//! Backends that refuse, stall, die, reset, flood, lie about their end, or only do what TLS allows and nobody does.

use std::time::{Duration, Instant};

use starttls_wrapper::session::Way;

use crate::dialogue::Backend;
use crate::door::{Start, tls_client};
use crate::octets::Octets;
use crate::steps::{At, Standing, all_of, ask_child, child_behind};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

const NOT_AVAILABLE: &[u8] = b"454 4.7.0 TLS not available\r\n";

/// The plaintext session goes on.
fn goes_on(mut standing: Standing) {
    let client = standing.door.client.as_mut().unwrap();
    client.get(NOT_AVAILABLE).unwrap_or_else(|why| panic!("{why}\n{}", standing.door.said()));
    assert!(standing.door.said().contains("STARTTLS answered 454"), "{}", standing.door.said());
    ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").unwrap();
    assert_eq!(standing.close(), 1);
}

#[test]
fn a_backend_that_refuses_or_is_no_good_is_a_454() {
    let all = [Backend::Refused, Backend::Untrusted, Backend::Plaintext];
    all_of(&all, |&what| {
        let mut standing = Standing::at(At::Snoop, &Start::default());
        standing.door.backend.play(what);
        standing.door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
        goes_on(standing);
    });
}

#[test]
fn a_backend_that_dies_or_resets_before_the_220_is_a_454() {
    let phases = [At::BackendHandshake, At::Greeting, At::Replay];
    let cases: Vec<_> = phases.iter().flat_map(|&at| [(at, "end"), (at, "cut"), (at, "reset")]).collect();
    all_of(&cases, |&(at, how)| {
        let mut standing = Standing::at(at, &Start::default());
        let mut backend = standing.door.backend.take();
        match how {
            "end" => backend.end(),
            "cut" => backend.cut(),
            _ => backend.reset(),
        }
        goes_on(standing);
    });
}

#[test]
fn a_backend_that_dies_in_the_midst_of_a_line_is_a_454() {
    all_of(&[(At::Greeting, "220 secure.exa"), (At::Replay, "250-secure.example\r\n250")], |&(at, part)| {
        let mut standing = Standing::at(at, &Start::default());
        let backend = standing.door.backend.wire().unwrap();
        backend.send(part.as_bytes());
        backend.end();
        goes_on(standing);
    });
}

#[test]
fn a_backend_that_dies_while_the_client_shakes_hands_ends_the_session() {
    all_of(&["end", "cut", "reset"], |&how| {
        let mut standing = Standing::at(At::ClientHandshake, &Start::default());
        let mut backend = standing.door.backend.take();
        match how {
            "end" => backend.end(),
            "cut" => backend.cut(),
            _ => backend.reset(),
        }
        let client = standing.door.client.as_mut().unwrap();
        // What comes depends on who is faster; that the session ends does not, and no EHLO is ever answered 250.
        if client.secure(tls_client()).is_ok() {
            client.send(b"EHLO client.example\r\n");
            if let Ok((said, _)) = client.rest() {
                assert!(said.is_empty() || said.starts_with(b"421"), "{}", said.escape_ascii());
            }
        }
        // A clean end may be taken for one: nothing was cut.
        let code = standing.close();
        assert!(code == 111 || (how, code) == ("end", 0), "{code}");
    });
}

#[test]
fn a_truncation_in_either_direction_never_looks_clean() {
    let cases: Vec<_> = [At::Gate, At::RelayTls]
        .iter()
        .flat_map(|&at| [(at, true, "cut"), (at, true, "reset"), (at, false, "cut"), (at, false, "reset")])
        .collect();
    all_of(&cases, |&(at, by_backend, how)| {
        let mut standing = Standing::at(at, &Start::default());
        let mut backend = standing.door.backend.take();
        let mut client = standing.door.client.take().unwrap();
        let (first, second) = if by_backend { (&mut backend, &mut client) } else { (&mut client, &mut backend) };
        if at == At::RelayTls {
            first.send(b"half a mess");
            second.get(b"half a mess").unwrap();
        }
        let mut kept = None;
        if how == "cut" {
            first.cut();
        }
        let (first, mut second) = if by_backend { (backend, client) } else { (client, backend) };
        if how == "cut" {
            kept = Some(first);
        } else {
            first.reset();
        }
        let (said, end) = second.rest().unwrap();
        assert!(said.is_empty(), "{}", said.escape_ascii());
        assert_ne!(end, End::Clean);
        drop((kept, second));
        assert_eq!(standing.close(), if by_backend { 111 } else { 1 });
    });
}

#[test]
fn what_a_backend_said_before_it_was_cut_off_still_arrives() {
    let mut standing = Standing::at(At::RelayTls, &Start::default());
    let (client, backend) = (standing.door.client.as_mut().unwrap(), standing.door.backend.wire().unwrap());
    let mut said = Octets::new(3, 200 * 1024);
    backend.send(&said.take(200 * 1024));
    backend.cut();
    let (heard, end) = client.rest().unwrap();
    Octets::new(3, 200 * 1024).check(&heard).unwrap();
    assert_eq!((heard.len(), end == End::Clean), (200 * 1024, false));
    assert_eq!(standing.close(), 111);
}

#[test]
fn a_backend_that_resets_in_the_midst_of_a_message_is_an_abort() {
    for (way, word) in [(Way::Tls, "backend closed without close_notify"), (Way::Plain, "backend broke off")] {
        let mut standing = Standing::at(At::RelayTls, &Start { way, ..Start::default() });
        let client = standing.door.client.as_mut().unwrap();
        let mut data = Octets::new(4, 1 << 20);
        standing.door.backend.wire().unwrap().exchange(&mut Octets::none(), &mut Octets::none(), PATIENCE).unwrap();
        client.send(&data.take(64 * 1024));
        standing.door.backend.take().reset();
        let (said, end) = client.rest().unwrap();
        assert!(said.is_empty());
        assert_ne!(end, End::Clean);
        let is_told = wait_until(PATIENCE, || standing.door.said().contains(&format!("end=\"{word}\"")));
        assert!(is_told, "{}", standing.door.said());
        assert_eq!(standing.close(), 111);
    }
}

#[test]
fn key_updates_of_either_side_are_followed() {
    let mut standing = Standing::at(At::RelayTls, &Start::default());
    for _ in 0..5 {
        let (client, backend) = (standing.door.client.as_mut().unwrap(), standing.door.backend.wire().unwrap());
        for wire in [client, backend] {
            match wire.tls().unwrap() {
                rustls::Connection::Client(tls) => tls.refresh_traffic_keys().unwrap(),
                rustls::Connection::Server(tls) => tls.refresh_traffic_keys().unwrap(),
            }
            wire.flush();
        }
        let (client, backend) = (standing.door.client.as_mut().unwrap(), standing.door.backend.wire().unwrap());
        std::thread::scope(|scope| {
            let there =
                scope.spawn(|| backend.exchange(&mut Octets::new(1, 40_000), &mut Octets::new(2, 40_000), PATIENCE));
            client.exchange(&mut Octets::new(2, 40_000), &mut Octets::new(1, 40_000), PATIENCE).unwrap();
            there.join().unwrap().unwrap();
        });
    }
    standing.close();
}

#[test]
fn a_flood_instead_of_a_greeting_or_a_reply_is_a_454_and_kept_nowhere() {
    let cases: [(At, &[u8]); 4] = [
        (At::Greeting, b"220-endless\r\n"),
        (At::Greeting, b"220 without any line end "),
        (At::Replay, b"250-endless\r\n"),
        (At::BackendHandshake, b"\x16\x03\x03\x40\x00aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
    ];
    all_of(&cases, |&(at, octets)| {
        let mut standing = Standing::at(at, &Start::default());
        let memory = standing.door.memory("VmHWM");
        let flood = octets.repeat(64 * 1024 / octets.len());
        let (backend, client) = (standing.door.backend.held(), standing.door.client.as_mut().unwrap());
        let started = Instant::now();
        while !client.has_received() && started.elapsed() < Duration::from_secs(5) {
            backend.send(&flood);
            client.listen_for(Duration::ZERO);
        }
        let grown = standing.door.memory("VmHWM") - memory;
        assert!(grown < 2048, "{grown} KiB more");
        goes_on(standing);
    });
}

#[test]
fn an_urgent_octet_of_the_backend_hides_nothing_that_follows_it() {
    use std::os::fd::AsFd;
    all_of(&[At::Gate, At::RelayTls], |&at| {
        let mut standing = Standing::at(at, &Start::default());
        standing.door.client.as_mut().unwrap().send(b"NOOP\r\n");
        standing.door.backend.held().get(b"NOOP\r\n").unwrap();
        standing.door.kill(rustix::process::Signal::STOP);
        assert!(crate::stream::wait_until(PATIENCE, || standing.door.state() == 'T'));
        let pid = standing.door.pid();
        let (client, backend) = (standing.door.client.as_mut().unwrap(), standing.door.backend.held());
        backend.send(b"250-one\r\n");
        rustix::net::send(backend.stream().input().as_fd(), b"!", rustix::net::SendFlags::OOB).unwrap();
        backend.send(b"250 two\r\n");
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        client.get(b"250-one\r\n250 two\r\n").unwrap();
        standing.close();
    });
}

/// Between the 220 and the client's TLS nothing can be said. What came to pass there is told when it can, and in the log by way and step.
#[test]
fn a_server_lost_while_the_client_shakes_hands_is_named_with_way_and_step_and_the_client_hears_of_it() {
    let has_server =
        |way: &Way| !way.respawns() && !way.is_late() && At::of(*way).contains(&(*way, At::ClientHandshake));
    let ways = Way::EVERY.into_iter().filter(has_server);
    let cases: Vec<_> = ways.flat_map(|way| [true, false].map(|shakes_hands| (way, shakes_hands))).collect();
    all_of(&cases, |&(way, shakes_hands)| {
        let options = ["--handshake-timeout", if shakes_hands { "30" } else { "5" }];
        let mut standing = Standing::at(At::ClientHandshake, &Start { options: &options, ..Start::by(way) });
        let (door, child) = (&mut standing.door, &mut standing.child);
        match child_behind(way, door, child) {
            // Its end is there before the hello.
            Some(child) => child.exit(0),
            None => door.backend.take().end(),
        }
        let client = door.client.as_mut().unwrap();
        if shakes_hands {
            client.secure(tls_client()).unwrap();
            client.get(b"421 4.3.0 Mail server not available\r\n").unwrap();
            assert_eq!(client.get_end(), Ok(End::Clean));
        } else {
            // That it says nothing is not the reason.
            assert_eq!(client.rest().unwrap().0, b"");
        }
        let line = format!(": way {way}, client handshake failed: the backend closed\n");
        assert!(wait_until(PATIENCE, || door.said().contains("end=")), "{way}");
        assert_eq!(door.said().matches(&line).count(), 1, "{}", door.said());
        assert_eq!(standing.close(), 111);
    });
}
