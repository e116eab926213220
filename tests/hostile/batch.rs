//! A long letter comes in large pieces (src/engine/batch.rs), of which the last octets must not wait for more that never comes.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::bulk::strace;
use crate::door::Start;
use crate::octets::Octets;
use crate::steps::{At, Standing};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE, Wire};

/// Far more than what makes a letter long, and no multiple of a piece.
const LETTER: u64 = (8 << 20) + 777;

/// One way only: the server says nothing meanwhile, and the client stays when it has sent all.
fn letter(client: &mut Wire, there: &mut Wire, seed: u64) {
    std::thread::scope(|scope| {
        let server = scope.spawn(move || there.exchange(&mut Octets::none(), &mut Octets::new(seed, LETTER), PATIENCE));
        client.exchange(&mut Octets::new(seed, LETTER), &mut Octets::none(), PATIENCE).unwrap();
        server.join().unwrap().unwrap_or_else(|why| panic!("server: {why}"));
    });
}

#[test]
fn the_last_octets_of_a_long_letter_do_not_wait_for_more() {
    let Standing { mut door, mut child, .. } = Standing::at(At::RelayPlain, &Start::default());
    letter(door.client.as_mut().unwrap(), &mut child.wire(), 1);
    let client = door.client.as_mut().unwrap();
    // Nor does what follows, a single octet at a time, with and without an answer between.
    for octet in b"QUIT\r\n" {
        client.send(&[*octet]);
        child.get(&[*octet]).unwrap();
    }
    child.send(b"221 Bye\r\n");
    client.get(b"221 Bye\r\n").unwrap();
    letter(door.client.as_mut().unwrap(), &mut child.wire(), 2);
    child.send(b"250 Ok\r\n");
    let client = door.client.as_mut().unwrap();
    client.get(b"250 Ok\r\n").unwrap();
    client.send(b"NOOP\r\n");
    child.get(b"NOOP\r\n").unwrap();
    client.end();
    child.get_end().unwrap();
    child.exit(0);
    assert_eq!(door.code(), 0);
}

#[test]
fn nor_do_they_through_tls() {
    let Standing { mut door, .. } = Standing::at(At::RelayTls, &Start::default());
    letter(door.client.as_mut().unwrap(), door.backend.wire().unwrap(), 4);
    let (client, backend) = (door.client.as_mut().unwrap(), door.backend.wire().unwrap());
    for octet in b"QUIT\r\n" {
        client.send(&[*octet]);
        backend.get(&[*octet]).unwrap();
    }
    backend.send(b"221 Bye\r\n");
    client.get(b"221 Bye\r\n").unwrap();
    client.end();
    assert_eq!(backend.get_end(), Ok(End::Clean));
    backend.end();
    assert_eq!(client.get_end(), Ok(End::Clean));
    assert_eq!(door.code(), 0);
}

#[test]
fn pieces_are_asked_for_in_a_long_letter_only_and_taken_back_after_it() {
    let log = strace(&["-e", "trace=setsockopt"], |standing| {
        let Standing { door, child, .. } = standing;
        let client = door.client.as_mut().unwrap();
        client.send(b"NOOP\r\n");
        child.get(b"NOOP\r\n").unwrap();
        letter(door.client.as_mut().unwrap(), &mut child.wire(), 3);
        child.send(b"250 Ok\r\n");
        let client = door.client.as_mut().unwrap();
        client.get(b"250 Ok\r\n").unwrap();
        client.end();
        child.get_end().unwrap();
        child.exit(0);
        assert_eq!(client.get_end(), Ok(End::Clean));
    });
    let asked: Vec<&str> = log.lines().filter(|line| line.contains("SO_RCVLOWAT")).collect();
    assert!(asked.first().is_some_and(|first| first.contains("[524288]")), "{log}");
    assert!(asked.last().is_some_and(|last| last.contains("[1]")), "{log}");
}

#[test]
fn a_session_that_ends_amid_a_long_letter_does_not_spin() {
    let options = ["--farewell-timeout", "2"];
    let Standing { mut door, mut child, .. } =
        Standing::at(At::RelayPlain, &Start { options: &options, ..Start::default() });
    let (mut client, mut there) = (door.client.take().unwrap(), child.wire());
    std::thread::scope(|scope| {
        // As fast as they can, or it is no bulk; until they are cut off.
        const BLOCK: &[u8] = &[b'x'; 256 << 10];
        scope.spawn(move || {
            let soon = || Instant::now() + Duration::from_secs(1);
            while client.send_some(BLOCK) > 0
                || client.stream().wait(false, true, soon()) && client.send_some(BLOCK) > 0
            {}
        });
        scope.spawn(move || while there.get(BLOCK).is_ok() {});
        let before = door.processor_time();
        assert!(wait_until(PATIENCE, || door.processor_time() > before + Duration::from_millis(20)));
        door.kill(Signal::TERM);
    });
    let before = door.processor_time();
    std::thread::park_timeout(Duration::from_secs(1));
    let spent = door.processor_time() - before;
    assert!(spent <= Duration::from_millis(20), "{spent:?} while a child does not end");
    child.exit(0);
    assert_eq!(door.code(), 0);
}
