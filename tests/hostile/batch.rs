//! A long letter comes in large pieces (src/engine/batch.rs), of which the last octets must not wait for more that never comes.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use starttls_wrapper::session::Way;

use crate::bulk::strace;
use crate::door::{Door, Start};
use crate::octets::Octets;
use crate::steps::{At, Standing};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE, Wire};

/// Far more than what makes a letter long, and no multiple of a piece.
const LETTER: u64 = (8 << 20) + 777;

/// What is waited for in a long letter.
const PIECE: u32 = 512 << 10;

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

/// A letter without an end, as fast as both can, and SIGTERM amid it; then nothing moves any more.
fn end_amid_a_letter(door: &mut Door, mut client: Wire, mut there: Wire) {
    let seed = 5;
    std::thread::scope(|scope| {
        scope.spawn(move || client.exchange(&mut Octets::new(seed, u64::MAX), &mut Octets::none(), PATIENCE));
        scope.spawn(move || there.exchange(&mut Octets::none(), &mut Octets::new(seed, u64::MAX), PATIENCE));
        // Stopped while a piece is asked for: it finds both the signal and the letter when it goes on.
        let is_amid = wait_until(PATIENCE, || {
            door.kill(Signal::STOP);
            let is_amid = wait_until(PATIENCE, || door.state() == 'T') && low_water(door) == PIECE;
            if !is_amid {
                door.kill(Signal::CONT);
            }
            is_amid
        });
        assert!(is_amid, "the letter is not long");
        door.kill(Signal::TERM);
        door.kill(Signal::CONT);
    });
}

/// What makes the client's socket readable (SO_RCVLOWAT, socket(7)). By python3: rustix and nix leave it out.
fn low_water(door: &Door) -> u32 {
    let script = "import socket as s; print(s.socket(fileno=0).getsockopt(s.SOL_SOCKET, s.SO_RCVLOWAT))";
    let socket = door.kept.as_ref().unwrap().try_clone().unwrap();
    let said = Command::new("/usr/bin/python3").args(["-I", "-c", script]).stdin(socket).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    said.trim_end().parse().unwrap_or_else(|_| panic!("{said:?}"))
}

/// The session ends, and a child does not.
fn does_not_spin(at: At, way: Way) {
    let options = ["--farewell-timeout", "5"];
    let start = Start { options: &options, keep: true, way, ..Start::default() };
    let Standing { mut door, mut child, .. } = Standing::at(at, &start);
    let client = door.client.take().unwrap();
    end_amid_a_letter(&mut door, client, child.wire());
    let before = door.processor_time();
    std::thread::park_timeout(Duration::from_secs(1));
    let spent = door.processor_time() - before;
    assert_eq!(low_water(&door), 1);
    assert!(spent <= Duration::from_millis(100), "{spent:?} while a child does not end");
    child.exit(0);
    assert_eq!(door.code(), 0);
}

#[test]
fn a_session_that_ends_amid_a_long_letter_does_not_spin() {
    does_not_spin(At::RelayPlain, Way::Tls);
}

#[test]
fn nor_does_one_that_ends_amid_it_inside_tls() {
    does_not_spin(At::RelayTls, Way::Keep);
}
