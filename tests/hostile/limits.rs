//! A listener's limits by address, in number and in time; that a place is given back however a session ends; and stress.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::door::{Start, tls_client};
use crate::lazy::{EHLO, LAZY, Stage};
use crate::scripted::GREETING;
use crate::stream::{Stream, wait_until};
use crate::wire::{End, PATIENCE, Wire};

const TOO_MANY: &[u8] = b"421 4.7.0 Too many sessions from your address, try again later\r\n";
const TOO_FAST: &[u8] = b"421 4.7.0 Too many new sessions from your address, try again later\r\n";

/// A client that connects from this address.
pub(crate) fn client_from(source: &str, to: SocketAddr) -> Wire {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddr::new(source.parse::<IpAddr>().unwrap(), 0)).unwrap();
    connect(&socket, &to).unwrap();
    Wire::over(Stream::socket(socket))
}

/// A listener with a server of few words, and these options.
fn stage(options: &[&str]) -> Stage {
    let stage = Stage::new(GREETING, &Start { options: &[&["--lazy"][..], options].concat(), ..LAZY });
    stage.says("listening on ");
    stage
}

/// Which of these it hears first.
fn is_served(mut client: Wire, otherwise: &[u8]) -> Option<Wire> {
    let said = client.piece().unwrap();
    if said == b"220 mx\r\n" {
        return Some(client);
    }
    assert_eq!(said.escape_ascii().to_string(), otherwise.escape_ascii().to_string());
    client.get_end().unwrap();
    None
}

#[test]
fn an_address_has_so_many_sessions_and_one_more_hears_421() {
    let mut stage = stage(&["--max-per-ip", "2"]);
    let to = stage.door.address.unwrap();
    let first = stage.door.client.take().unwrap();
    let first = is_served(first, TOO_MANY).unwrap();
    let from = |source| is_served(client_from(source, to), TOO_MANY);
    let second = from("127.0.0.1");
    assert!(second.is_some() && from("127.0.0.1").is_none() && from("127.0.0.1").is_none());
    let other = from("127.0.0.2");
    assert!(other.is_some(), "another address has nothing to do with it");
    drop(first);
    assert!(wait_until(PATIENCE, || from("127.0.0.1").is_some()), "{}", stage.door.said());
    assert!(stage.door.said().contains("client=127.0.0.1:"), "{}", stage.door.said());
    assert!(stage.door.said().contains("too many sessions of its address"), "{}", stage.door.said());
}

#[test]
fn an_address_of_ipv6_is_counted_too() {
    let to: SocketAddr = format!("[::1]:{}", 10_000 + std::process::id() % 20_000).parse().unwrap();
    let stage = stage(&["--max-per-ip", "1", "--listen", &to.to_string()]);
    let first = is_served(client_from("::1", to), TOO_MANY);
    assert!(first.is_some() && is_served(client_from("::1", to), TOO_MANY).is_none());
    drop(first);
    assert!(wait_until(PATIENCE, || is_served(client_from("::1", to), TOO_MANY).is_some()), "{}", stage.door.said());
}

/// What is done with a greeted client to end its session.
type Ending = (&'static str, fn(&mut Stage));

const ENDINGS: [Ending; 8] = [
    ("QUIT", |stage| {
        stage.talk(&[("QUIT\r\n", "221 bye\r\n")]);
        stage.door.client.as_mut().unwrap().get_end().unwrap();
    }),
    ("close", |stage| drop(stage.door.client.take())),
    ("reset", |stage| stage.door.client.take().unwrap().reset()),
    ("errors", |stage| {
        for _ in 0..20 {
            stage.talk(&[("XCLIENT x\r\n", "550 5.7.0 Not for clients\r\n")]);
        }
        stage.talk(&[("XCLIENT x\r\n", "421 4.7.0 Too many errors, closing connection\r\n")]);
        stage.door.client.as_mut().unwrap().get_end().unwrap();
    }),
    ("time-out", |stage| {
        stage.talk(&[("", "421 4.4.2 Timeout, closing connection\r\n")]);
        stage.door.client.as_mut().unwrap().get_end().unwrap();
    }),
    ("relay", |stage| {
        stage.talk(&[("MAIL FROM:<>\r\n", "250 MAIL FROM:<>\r\n"), ("QUIT\r\n", "221 bye\r\n")]);
        stage.door.client.as_mut().unwrap().get_end().unwrap();
    }),
    ("454", |stage| {
        // A backend that closes at once.
        stage.door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
        stage.door.backend.accept_only().unwrap();
        drop(stage.door.backend.take());
        stage.talk(&[("", "454 4.7.0 TLS not available\r\n")]);
        drop(stage.door.client.take());
    }),
    ("TLS", |stage| {
        stage.door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
        stage.door.backend.wire().unwrap().send(b"220 b\r\n");
        stage.talk(&[("", "220 2.0.0 Ready to start TLS\r\n")]);
        stage.door.client.as_mut().unwrap().secure(tls_client()).unwrap();
        stage.door.client.as_mut().unwrap().end();
        stage.door.backend.wire().unwrap().get_end().unwrap();
        stage.door.backend.wire().unwrap().end();
        drop(stage.door.client.take());
    }),
];

#[test]
fn a_place_is_given_back_however_the_session_ends() {
    let mut stage = stage(&["--max-per-ip", "1", "--max-sessions", "2", "--snoop-timeout", "3", "--replay", "none"]);
    stage.door.backend.listen();
    drop(stage.door.client.take());
    for (name, end) in ENDINGS {
        let is_free = wait_until(PATIENCE, || {
            let client = client_from("127.0.0.1", stage.door.address.unwrap());
            stage.door.client = is_served(client, TOO_MANY);
            stage.door.client.is_some()
        });
        assert!(is_free, "before {name}: {}", stage.door.said());
        end(&mut stage);
        drop(stage.door.backend.forget());
    }
    let is_free = || is_served(client_from("127.0.0.1", stage.door.address.unwrap()), TOO_MANY).is_some();
    assert!(wait_until(PATIENCE, is_free), "{}", stage.door.said());
}

/// Nobody listens at HOST.
#[test]
fn a_session_has_so_many_starttls_that_fail_and_one_more_is_a_421() {
    for (options, most) in [(&[][..], 10), (&["--max-starttls", "2"], 2)] {
        let mut stage = stage(options);
        stage.talk(&[("", "220 mx\r\n"), EHLO]);
        for _ in 0..most {
            stage.talk(&[("STARTTLS\r\n", "454 4.7.0 TLS not available\r\n")]);
        }
        stage.talk(&[("STARTTLS\r\n", "421 4.7.0 Too many failed STARTTLS, closing connection\r\n")]);
        stage.door.client.as_mut().unwrap().get_end().unwrap();
    }
}

/// How many sessions a second's line says were refused, and how many lines there are.
fn refused(said: &str) -> (usize, usize) {
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("]: warning: client=")).collect();
    let number = |text: &str| text.trim().parse::<usize>().unwrap();
    let of = |line: &str| match line.split_once(" others like it before it") {
        Some((before, _)) => 1 + number(before.rsplit_once("; ").unwrap().1),
        None => 1,
    };
    (lines.iter().map(|line| of(line)).sum(), lines.len())
}

#[test]
fn an_address_begins_so_many_sessions_a_second_and_a_flood_is_a_line_a_second() {
    let mut stage = stage(&["--rate-per-ip", "2"]);
    let to = stage.door.address.unwrap();
    drop(stage.door.client.take());
    let begin = Instant::now();
    let served = (0..200).filter(|_| is_served(client_from("127.0.0.3", to), TOO_FAST).is_some()).count();
    assert!(is_served(client_from("127.0.0.4", to), TOO_FAST).is_some(), "another address");
    let seconds = begin.elapsed().as_secs_f64();
    // Two at once, and two each second.
    assert!(served >= 2 && served as f64 <= 2.0 + 2.0 * seconds, "{served} in {seconds} s");
    let is_counted = wait_until(PATIENCE, || refused(&stage.door.said()).0 == 200 - served);
    assert!(is_counted, "{served} served, {:?}: {}", refused(&stage.door.said()), stage.door.said());
    let lines = refused(&stage.door.said()).1;
    assert!(lines as f64 <= 2.0 + begin.elapsed().as_secs_f64(), "{lines} lines: {}", stage.door.said());
    let again = || is_served(client_from("127.0.0.3", to), TOO_FAST).is_some();
    assert!(wait_until(PATIENCE, again), "{}", stage.door.said());
}

#[test]
fn who_comes_when_places_are_scarce_has_little_time_and_who_was_there_has_the_usual() {
    let mut stage = stage(&["--max-sessions", "10"]);
    let to = stage.door.address.unwrap();
    let connect = || is_served(client_from("127.0.0.1", to), TOO_MANY).unwrap();
    let mut early = vec![is_served(stage.door.client.take().unwrap(), TOO_MANY).unwrap()];
    early.extend((1..8).map(|_| connect()));
    assert!(!stage.door.said().contains("over 80%"), "{}", stage.door.said());
    let begin = Instant::now();
    let mut late = connect();
    stage.says("over 80% of 10 sessions");
    let is_ended = wait_until(2 * PATIENCE, || {
        late.listen_for(Duration::from_millis(100));
        late.has_received()
    });
    assert!(is_ended && begin.elapsed() >= Duration::from_millis(9900), "after {:?}", begin.elapsed());
    late.get(b"421 4.4.2 Timeout, closing connection\r\n").unwrap();
    assert_eq!(late.get_end(), Ok(End::Clean));
    for client in &mut early {
        client.send(b"NOOP\r\n");
        client.get(b"250 NOOP\r\n").unwrap();
    }
    stage.says("below 80% of 10 sessions again");
    let usual = connect();
    drop(usual);
    assert_eq!(stage.door.said().matches("over 80%").count(), 1, "once a minute at most: {}", stage.door.said());
    stage.door.client = early.pop();
    stage.talk(&[EHLO]);
}
