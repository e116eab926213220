//! Ends: of a relay, of a client, of a child; told in time, told truthfully, and with everything that came before.

use std::time::{Duration, Instant};

use rustix::net::sockopt;
use rustix::process::Signal;

use crate::door::{Shape, Start};
use crate::octets::Octets;
use crate::steps::{At, Standing, all_of};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

/// How soon an end is noticed that nobody has to wait for.
const SOON: Duration = Duration::from_secs(2);

/// The last words of the backend: one record, and more than what lies between the program and the client.
const LAST: u64 = 15_000;

/// More than two connections and the program between them hold.
const FLOOD: u64 = 64 << 20;

/// How long the program used to wait for a client that reads slowly.
const LINGER: Duration = Duration::from_secs(2);

/// A client to which few octets go before it reads: of a pair of UNIX sockets the sender's buffer counts alone.
fn narrow(at: At, options: &[&str]) -> Standing {
    let start = Start { options, shape: Shape::Pair, keep: true, ..Start::default() };
    let mut standing = Standing::at(at, &start);
    // Dropped: the program's socket must not outlive the program.
    let theirs = standing.door.kept.take().unwrap();
    sockopt::set_socket_send_buffer_size(theirs, 2048).unwrap();
    standing
}

/// A TLS relay whose client has ended, and whose backend says [`LAST`] octets and ends, all in one.
fn unread_end(options: &[&str]) -> Standing {
    let mut standing = narrow(At::RelayTls, options);
    standing.door.client.as_mut().unwrap().end();
    assert_eq!(standing.door.backend.held().get_end(), Ok(End::Clean));
    standing.door.kill(Signal::STOP);
    assert!(wait_until(PATIENCE, || standing.door.state() == 'T'));
    let backend = standing.door.backend.held();
    backend.send(&Octets::new(5, LAST).take(LAST as usize));
    backend.end();
    standing.door.kill(Signal::CONT);
    standing
}

#[test]
fn a_client_that_reads_slowly_gets_all_of_a_tls_relays_end() {
    let mut standing = unread_end(&[]);
    std::thread::park_timeout(LINGER + Duration::from_secs(1));
    let (said, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
    Octets::new(5, LAST).check(&said).unwrap();
    assert_eq!((said.len() as u64, end), (LAST, End::Clean));
    assert_eq!(standing.close(), 0);
}

#[test]
fn a_client_that_never_reads_a_tls_relays_end_is_no_good_end() {
    let mut standing = unread_end(&["--relay-timeout", "1"]);
    // The half minute that a client has for what a server said before it closed.
    let patience = Duration::from_secs(45);
    assert!(wait_until(patience, || standing.door.said().contains("end=")), "{}", standing.door.said());
    assert!(standing.door.said().contains("end=\"time-out"), "{}", standing.door.said());
    assert_eq!(standing.door.code(), 99);
}

#[test]
fn commands_and_close_notify_in_one_flight_at_the_gate_are_answered() {
    let cases: [&[&str]; 3] =
        [&["QUIT\r\n"], &["NOOP\r\n", "QUIT\r\n"], &["NOOP\r\n", "EHLO client.example\r\n", "QUIT\r\n"]];
    all_of(&cases, |commands| {
        let mut standing = Standing::at(At::Gate, &Start::default());
        standing.door.kill(Signal::STOP);
        assert!(wait_until(PATIENCE, || standing.door.state() == 'T'));
        let client = standing.door.client.as_mut().unwrap();
        client.send(commands.concat().as_bytes());
        client.end();
        standing.door.kill(Signal::CONT);
        let backend = standing.door.backend.held();
        let replies: Vec<String> = (0..commands.len()).map(|at| format!("250 {at}\r\n")).collect();
        for (command, reply) in commands.iter().zip(&replies) {
            backend.get(command.as_bytes()).unwrap();
            backend.send(reply.as_bytes());
        }
        if commands.len() == 3 {
            // The client's end is passed on, after what it said.
            assert_eq!(backend.get_end(), Ok(End::Clean));
        }
        backend.end();
        let client = standing.door.client.as_mut().unwrap();
        client.get(replies.concat().as_bytes()).unwrap();
        client.get_end().unwrap();
        standing.close();
    });
}

#[test]
fn a_backend_whose_records_do_not_decrypt_is_named_and_111() {
    all_of(&[At::Gate, At::RelayTls], |&at| {
        let mut standing = Standing::at(at, &Start::default());
        let raw = standing.door.backend.held().stream();
        std::io::Write::write_all(raw, b"\x17\x03\x03\x00\x20aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa").unwrap();
        let (said, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
        if at == At::RelayTls {
            assert_eq!((said.len(), end == End::Clean), (0, false));
        } else {
            assert!(said.is_empty() || said.starts_with(b"421 4.3.0"), "{}", said.escape_ascii());
        }
        drop(standing.door.client.take());
        assert!(wait_until(PATIENCE, || standing.door.said().contains("end=")));
        let log = standing.door.said();
        assert!(log.contains("warning: ") && log.contains("TLS with the backend failed"), "{log}");
        assert_eq!(standing.close(), 111);
    });
}

#[test]
fn a_reset_is_noticed_while_all_replies_are_owed() {
    let mut standing = Standing::at(At::Snoop, &Start::default());
    let client = standing.door.client.as_mut().unwrap();
    let noops = b"NOOP\r\n".repeat(10_000);
    // Until it reads no more.
    while client.send_some(&noops) > 0 || client.stream().wait(false, true, Instant::now() + SOON / 4) {}
    standing.door.client.take().unwrap().reset();
    let reset = Instant::now();
    assert!(wait_until(SOON, || standing.door.said().contains("end=")), "after {:?}", reset.elapsed());
    assert_eq!(standing.close(), 1);
}

#[test]
fn a_reset_is_noticed_when_the_child_reads_no_more() {
    all_of(&["splice", "copy"], |relay| {
        let mut standing = Standing::at(At::RelayPlain, &Start { options: &["--relay", relay], ..Start::default() });
        standing.child.close_stdin();
        let client = standing.door.client.as_mut().unwrap();
        client.send(b"more\r\n");
        // That goes nowhere: the child's words still come.
        standing.child.send(b"250 Ok\r\n");
        client.get(b"250 Ok\r\n").unwrap();
        standing.door.client.take().unwrap().reset();
        assert!(wait_until(SOON, || standing.door.said().contains("end=")), "{}", standing.door.said());
        assert_eq!(standing.close(), 1);
    });
}

#[test]
fn a_reset_is_noticed_while_a_relay_stands_still() {
    // Longer than the two seconds that what was sent before gets to go on.
    let patience = Duration::from_secs(5);
    all_of(&[(At::RelayPlain, "splice"), (At::RelayPlain, "copy")], |&(at, relay)| {
        let mut standing = Standing::at(at, &Start { options: &["--relay", relay], ..Start::default() });
        let client = standing.door.client.as_mut().unwrap();
        let flood = [b'x'; 64 * 1024];
        // The child does not read: until nothing more is taken.
        while client.send_some(&flood) > 0 || client.stream().wait(false, true, Instant::now() + SOON / 4) {}
        standing.door.client.take().unwrap().reset();
        let reset = Instant::now();
        assert!(wait_until(patience, || standing.door.said().contains("end=")), "after {:?}", reset.elapsed());
        assert_eq!(standing.close(), 1);
    });
}

#[test]
fn a_reset_is_noticed_while_a_tls_relay_stands_still() {
    let mut standing = Standing::at(At::RelayTls, &Start::default());
    let client = standing.door.client.as_mut().unwrap();
    // The backend does not read: until nothing more is taken.
    let why = client.exchange(&mut Octets::new(1, FLOOD), &mut Octets::none(), SOON / 4);
    assert!(why.is_err_and(|why| why.contains("nothing moves")), "more than the buffers of two connections hold");
    standing.door.client.take().unwrap().reset();
    let reset = Instant::now();
    // Longer than the two seconds that what was sent before gets to go on.
    assert!(
        wait_until(Duration::from_secs(5), || standing.door.said().contains("end=")),
        "after {:?}",
        reset.elapsed()
    );
    let log = standing.door.said();
    assert!(log.contains("end=\"client broke off\" mode=tls"), "{log}");
    assert_eq!(standing.door.code(), 1);
    // What the client sent before still comes; its end is no clean one.
    let mut backend = standing.door.backend.take();
    backend.listen_for(PATIENCE);
    let (_, end) = backend.rest().unwrap();
    assert_ne!(end, End::Clean);
    standing.must_be_gone();
}

#[test]
fn on_two_pipes_the_client_sees_at_once_that_the_child_says_no_more() {
    all_of(&["splice", "copy"], |relay| {
        let options = ["--relay", relay];
        let mut standing =
            Standing::at(At::RelayPlain, &Start { options: &options, shape: Shape::Pipes, ..Start::default() });
        standing.child.close_stdout();
        let closed = Instant::now();
        let client = standing.door.client.as_mut().unwrap();
        assert_eq!(client.get_end(), Ok(End::Clean));
        assert!(closed.elapsed() < SOON, "{:?}", closed.elapsed());
        assert!(!standing.child.is_gone(Duration::ZERO));
        standing.close();
    });
}

#[test]
fn further_sigterms_hasten_the_childs_farewell() {
    all_of(&["plain", "ignore-term"], |mode| {
        let mut standing = Standing::at(At::Snoop, &Start { mode, ..Start::default() });
        standing.door.kill(Signal::TERM);
        let client = standing.door.client.as_mut().unwrap();
        client.get(b"421 4.3.2 Service shutting down\r\n").unwrap();
        drop(standing.door.client.take());
        let asked = Instant::now();
        let is_gone = wait_until(SOON, || {
            // One may be taken together with the one before.
            standing.door.kill(Signal::TERM);
            standing.child.is_gone(Duration::ZERO)
        });
        assert!(is_gone, "the child {} is there after {:?}", standing.child.report.pid, asked.elapsed());
        assert_eq!(standing.close(), 0);
    });
}

#[test]
fn a_client_that_reads_slowly_gets_all_that_a_child_said() {
    let mut standing = narrow(At::Snoop, &[]);
    let client = standing.door.client.as_mut().unwrap();
    client.send(b"HELP\r\nQUIT\r\n");
    standing.child.get(b"HELP\r\nQUIT\r\n").unwrap();
    let line = b"214-all there is to know about this server\r\n";
    let said = [&line.repeat(40_000 / line.len())[..], b"214 end\r\n221 2.0.0 Bye\r\n"].concat();
    standing.child.send(&said);
    standing.child.exit(0);
    std::thread::park_timeout(LINGER + Duration::from_secs(1));
    let (heard, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
    assert_eq!((heard.len(), end), (said.len(), End::Clean));
    assert_eq!(standing.close(), 0);
}
