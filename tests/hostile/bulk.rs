//! Much, in both directions: every octet arrives, splice is what moves it, memory stays flat, a slow side slows the other,
//! and an urgent mark (RFC 9293 3.8.5) wedges nobody.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::SendFlags;

use starttls_wrapper::session::Way;

use crate::child::Child;
use crate::door::{Door, Start, tls_client};
use crate::octets::Octets;
use crate::steps::{At, Standing, all_of, ask_child, child_behind, greet};
use crate::stream::wait_until;
use crate::trace::Trace;
use crate::wire::{End, PATIENCE, Wire};

/// Each way.
pub(crate) const MUCH: u64 = 64 << 20;

/// Enough to fill every buffer of a pipe, a socket and this program many times over.
pub(crate) const ENOUGH: u64 = 16 << 20;

/// Both ways at once between `client` and `there`.
pub(crate) fn both_ways(client: &mut Wire, there: &mut Wire, total: u64) {
    std::thread::scope(|scope| {
        let (seed, other) = (total + 1, total + 2);
        let server = scope
            .spawn(move || there.exchange(&mut Octets::new(other, total), &mut Octets::new(seed, total), PATIENCE));
        let done = client.exchange(&mut Octets::new(seed, total), &mut Octets::new(other, total), PATIENCE);
        server.join().unwrap().unwrap_or_else(|why| panic!("server: {why}"));
        done.unwrap_or_else(|why| panic!("client: {why}"));
    });
}

fn plain_relay(relay: &str, total: u64) {
    let standing = Standing::at(At::RelayPlain, &Start { options: &["--relay", relay], ..Start::default() });
    let Standing { mut door, mut child, .. } = standing;
    let before = door.memory("VmHWM");
    both_ways(door.client.as_mut().unwrap(), &mut child.wire(), total);
    let grown = door.memory("VmHWM") - before;
    assert!(grown < 512, "{grown} KiB more");
    let client = door.client.as_mut().unwrap();
    client.end();
    child.get_end().unwrap();
    child.exit(0);
    assert_eq!(client.get_end(), Ok(End::Clean));
    assert_eq!(door.code(), 0);
}

#[test]
fn every_octet_passes_the_splicing_relay_and_memory_stays_flat() {
    plain_relay("splice", MUCH);
}

#[test]
fn every_octet_passes_the_copying_relay_and_memory_stays_flat() {
    plain_relay("copy", MUCH);
}

#[test]
fn every_octet_passes_the_tls_relay_of_each_way_and_memory_stays_flat() {
    // What is behind TLS by the way `raw` is no business of ours: see raw.rs.
    for way in Way::EVERY.into_iter().filter(|way| *way != Way::Raw) {
        let Standing { mut door, mut child, .. } = Standing::at(At::RelayTls, &Start::by(way));
        let before = door.memory("VmHWM");
        let mut kept = child_behind(way, &mut door, &mut child).map(|child| child.wire());
        let behind = kept.as_mut().unwrap_or_else(|| door.backend.wire().unwrap());
        both_ways(door.client.as_mut().unwrap(), behind, MUCH);
        let grown = door.memory("VmHWM") - before;
        // The thread's five spare buffers, code that is paged in, and what the kernel counts late: nothing that grows with the mail.
        assert!(grown < 3072, "{way}: {grown} KiB more");
        door.client.as_mut().unwrap().end();
        let behind = kept.as_mut().unwrap_or_else(|| door.backend.wire().unwrap());
        assert_eq!(behind.get_end(), Ok(End::Clean), "{way}");
        behind.end();
        if let Some(child) = child_behind(way, &mut door, &mut child) {
            child.exit(0);
        }
        assert_eq!(door.client.as_mut().unwrap().get_end(), Ok(End::Clean), "{way}");
        assert_eq!(door.code(), 0, "{way}");
    }
}

/// A relay under strace(1) with `arguments`, that passes `total` octets each way; what strace has written of it.
fn traced(arguments: &[&str], total: u64) -> String {
    strace(arguments, |Standing { door, child, .. }| {
        both_ways(door.client.as_mut().unwrap(), &mut child.wire(), total);
        let client = door.client.as_mut().unwrap();
        client.end();
        child.get_end().unwrap();
        child.exit(0);
        assert_eq!(client.get_end(), Ok(End::Clean));
    })
}

/// A plaintext relay under strace(1) with `arguments`, that is over after `session`; what strace has written of it.
pub(crate) fn strace(arguments: &[&str], session: impl FnOnce(&mut Standing)) -> String {
    let trace = Trace::of(arguments);
    let mut standing = Standing::at(At::RelayPlain, &Start { through: &trace.through(), ..Start::default() });
    session(&mut standing);
    assert_eq!(standing.door.code(), 0);
    let log = trace.log();
    assert!(log.contains("exited with 0"), "{log}");
    log
}

/// What Linux lets the two pipes of the child hold.
fn pipe_sizes(child: &Child) -> [usize; 2] {
    child.fds().map(|fd| rustix::pipe::fcntl_getpipe_size(fd).unwrap())
}

#[test]
fn bulk_grows_the_pipes_and_a_small_letter_does_not() {
    let standing = Standing::at(At::RelayPlain, &Start::default());
    let Standing { mut door, mut child, .. } = standing;
    let (fresh, _other_end) = rustix::pipe::pipe().unwrap();
    let usual = rustix::pipe::fcntl_getpipe_size(&fresh).unwrap();
    let letter = "Subject: small\r\n\r\nas most are\r\n".repeat(200);
    for _ in 0..10 {
        ask_child(&mut door, &mut child, &letter, "250 Ok\r\n").unwrap();
    }
    assert_eq!(pipe_sizes(&child), [usual; 2]);
    both_ways(door.client.as_mut().unwrap(), &mut child.wire(), ENOUGH);
    let grown = pipe_sizes(&child);
    assert!(grown.iter().all(|&size| size > usual && size <= 1 << 20), "{grown:?}");
}

#[test]
fn a_pipe_that_may_not_grow_relays_all_the_same() {
    let resizing = |log: &str| {
        let calls: Vec<String> = log.lines().filter(|line| line.starts_with("fcntl")).map(str::to_owned).collect();
        let which = calls.iter().position(|line| line.contains("F_SETPIPE_SZ"));
        (which, calls)
    };
    let (first, calls) = resizing(&traced(&["-e", "trace=fcntl"], ENOUGH));
    let first = first.unwrap_or_else(|| panic!("no pipe is ever grown: {calls:?}"));
    // What a user gets who has more pipes than pipe-user-pages-soft allows (pipe(7)).
    let refusal = format!("inject=fcntl:error=EPERM:when={}+", first + 1);
    let (_, calls) = resizing(&traced(&["-e", "trace=fcntl", "-e", &refusal], ENOUGH));
    let asked: Vec<_> = calls.iter().filter(|line| line.contains("F_SETPIPE_SZ")).collect();
    assert!(!asked.is_empty() && asked.iter().all(|line| line.contains("EPERM")), "{asked:?}");
    // Once for each pipe.
    assert!(asked.len() <= 2, "{asked:?}");
}

#[test]
fn payload_is_spliced_and_never_read_or_written_after_the_cutoff() {
    let log = traced(&["-e", "trace=splice,read,readv,recvfrom,recvmsg,write,writev,sendto,sendmsg"], ENOUGH);
    let (mut moved, mut calls) = (0, 0);
    let mut relaying = false;
    for line in log.lines() {
        if line.starts_with("splice(") {
            relaying = true;
            if let Some(count) = line.rsplit_once("= ").and_then(|(_, count)| count.parse::<u64>().ok()) {
                moved += count;
                calls += u64::from(count > 0);
            }
        } else if relaying && ["read(0", "write(1", "read(1", "write(0"].iter().any(|call| line.starts_with(call)) {
            panic!("after the cutoff: {line}");
        }
    }
    // MAIL itself went by write, its reply by splice.
    assert_eq!(moved, 2 * ENOUGH + "250 2.1.0 Ok\r\n".len() as u64);
    assert!(calls < moved / 4096, "{calls} calls for {moved} octets");
    let copied: u64 = log.lines().filter(|line| line.starts_with("write(")).filter_map(count).sum();
    assert!(copied < 4096, "{copied} octets copied");
}

fn count(line: &str) -> Option<u64> {
    line.rsplit_once("= ")?.1.parse().ok()
}

#[test]
fn where_splice_is_refused_the_relay_copies_and_does_not_ask_again() {
    for error in ["EINVAL", "ENOSYS"] {
        let inject = format!("inject=splice:error={error}");
        let log = traced(&["-e", "trace=splice", "-e", &inject], 4 << 20);
        assert_eq!(log.lines().filter(|line| line.starts_with("splice(")).count(), 2, "one for each way: {log}");
    }
}

#[test]
fn a_splice_that_is_refused_in_the_midst_loses_nothing() {
    let log = traced(&["-e", "trace=splice", "-e", "inject=splice:error=EINVAL:when=20"], 4 << 20);
    assert!(log.contains("EINVAL"));
}

/// The first is from the client to PROG, the second from PROG to the client.
#[test]
fn a_splice_without_memory_is_the_systems_failure_and_nobodys_end() {
    for inject in ["inject=splice:error=ENOMEM:when=1+", "inject=splice:error=ENOMEM:when=2+"] {
        let trace = Trace::of(&["-e", "trace=splice", "-e", inject]);
        let through = &trace.through()[..];
        let mut standing = Standing::at(At::Snoop, &Start { through, ..Start::default() });
        let (client, child) = (standing.door.client.as_mut().unwrap(), &mut standing.child);
        client.send(b"MAIL FROM:<a@client.example>\r\n");
        child.get(b"MAIL FROM:<a@client.example>\r\n").unwrap();
        child.send(b"250 2.1.0 Ok\r\n");
        assert_eq!(client.rest().unwrap().0, b"");
        child.exit(0);
        assert_eq!(standing.door.code(), 111);
        let said = standing.door.said();
        assert!(said.contains("can't relay: ") && trace.log().contains("(INJECTED"), "{said}");
    }
}

#[test]
fn interrupted_system_calls_lose_nothing() {
    let inject = ["-e", "inject=splice,epoll_wait:error=EINTR:when=3+3", "-e", "inject=write:error=EINTR:when=2+2"];
    let log = traced(&[&["-e", "trace=splice,write,epoll_wait"][..], &inject].concat(), 1 << 20);
    assert!(log.contains("EINTR"));
}

#[test]
fn half_closes_pass_the_plain_relay_either_way() {
    all_of(&["splice", "copy"], |relay| {
        for client_first in [true, false] {
            let standing = Standing::at(At::RelayPlain, &Start { options: &["--relay", relay], ..Start::default() });
            let Standing { mut door, mut child, .. } = standing;
            let client = door.client.as_mut().unwrap();
            if client_first {
                client.send(b"QUIT\r\n");
                client.end();
                child.get(b"QUIT\r\n").unwrap();
                child.get_end().unwrap();
                child.send(b"221 Bye\r\n");
                client.get(b"221 Bye\r\n").unwrap();
            } else {
                child.send(b"221 Bye\r\n");
                child.close_stdout();
                client.get(b"221 Bye\r\n").unwrap();
                assert_eq!(client.get_end(), Ok(End::Clean));
                client.send(b"still there\r\n");
                child.get(b"still there\r\n").unwrap();
                client.end();
                child.get_end().unwrap();
            }
            child.exit(0);
            assert_eq!(door.code(), 0);
        }
    });
}

#[test]
fn half_closes_pass_the_tls_relay_either_way() {
    // A child's end is its exit, after which it takes nothing.
    for (way, client_first) in [(Way::Tls, true), (Way::Tls, false), (Way::Plain, true), (Way::Plain, false)] {
        let Standing { mut door, .. } = Standing::at(At::RelayTls, &Start { way, ..Start::default() });
        let (client, backend) = (door.client.as_mut().unwrap(), door.backend.wire().unwrap());
        let (first, second) = if client_first { (client, backend) } else { (backend, client) };
        first.send(b"last words\r\n");
        first.end();
        second.get(b"last words\r\n").unwrap();
        assert_eq!(second.get_end(), Ok(End::Clean));
        second.send(b"more\r\n");
        first.get(b"more\r\n").unwrap();
        second.end();
        assert_eq!(first.get_end(), Ok(End::Clean));
        assert_eq!(door.code(), 0);
    }
}

#[test]
fn a_child_that_never_reads_stops_a_flooding_client_in_the_dialogue_and_in_the_relay() {
    all_of(&[At::Snoop, At::RelayPlain], |&at| {
        let mut standing =
            Standing::at(at, &Start { options: &["--snoop-timeout", "3", "--relay-timeout", "3"], ..Start::default() });
        let memory = standing.door.memory("VmHWM");
        let client = standing.door.client.as_mut().unwrap();
        let noops = b"NOOP\r\n".repeat(10_000);
        let mut sent = 0;
        loop {
            let taken = client.send_some(&noops);
            sent += taken;
            assert!(sent < 64 << 20, "the flood never stops");
            if taken == 0 && !client.stream().wait(false, true, std::time::Instant::now() + Duration::from_millis(300))
            {
                break;
            }
        }
        let grown = standing.door.memory("VmHWM") - memory;
        assert!(grown < 512, "{grown} KiB more for {sent} octets");
        // Nothing moves, and nothing spins.
        let busy = standing.door.processor_time();
        std::thread::park_timeout(Duration::from_secs(1));
        let spent = standing.door.processor_time() - busy;
        assert!(spent <= Duration::from_millis(100), "{spent:?} while nothing moves");
        let (_, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
        assert!(matches!(end, End::Clean | End::Reset), "{end:?}");
        assert_eq!(standing.close(), 99);
    });
}

#[test]
fn a_client_that_never_reads_stops_a_flooding_child_in_the_dialogue_and_in_the_relay() {
    all_of(&[At::Owed, At::RelayPlain], |&at| {
        let mut standing =
            Standing::at(at, &Start { options: &["--snoop-timeout", "3", "--relay-timeout", "3"], ..Start::default() });
        let memory = standing.door.memory("VmHWM");
        let mut there = standing.child.wire();
        let replies = b"250-this reply never ends\r\n".repeat(5_000);
        let mut sent = 0;
        loop {
            let taken = there.send_some(&replies);
            sent += taken;
            assert!(sent < 64 << 20, "the flood never stops");
            if taken == 0 && !there.stream().wait(false, true, std::time::Instant::now() + Duration::from_millis(300)) {
                break;
            }
        }
        let grown = standing.door.memory("VmHWM") - memory;
        assert!(grown < 512, "{grown} KiB more for {sent} octets");
        let busy = standing.door.processor_time();
        std::thread::park_timeout(Duration::from_secs(1));
        let spent = standing.door.processor_time() - busy;
        assert!(spent <= Duration::from_millis(100), "{spent:?} while nothing moves");
        drop(there);
        let heard = standing.child.rest().unwrap();
        assert!(heard.is_empty() || heard == b"QUIT\r\n");
        standing.child.exit(0);
        assert_eq!(standing.door.code(), 99, "{}", standing.door.said());
        standing.must_be_gone();
    });
}

#[test]
fn sides_of_the_tls_relay_that_never_read_stop_the_other_and_memory_stays_flat() {
    let ways = Way::EVERY.into_iter().filter(|way| *way != Way::Raw);
    let cases: Vec<_> = ways.flat_map(|way| [(way, true), (way, false)]).collect();
    all_of(&cases, |&(way, client_floods)| {
        let start = Start { options: &["--relay-timeout", "3"], ..Start::by(way) };
        let Standing { mut door, mut child, .. } = Standing::at(At::RelayTls, &start);
        let memory = door.memory("VmHWM");
        let mut kept = child_behind(way, &mut door, &mut child).map(|child| child.wire());
        let flooder = match (client_floods, &mut kept) {
            (true, _) => door.client.as_mut().unwrap(),
            (false, Some(kept)) => kept,
            (false, None) => door.backend.wire().unwrap(),
        };
        // More than all buffers of both connections hold: it can't succeed.
        let why = flooder.exchange(&mut Octets::new(1, MUCH), &mut Octets::none(), Duration::from_millis(500));
        assert!(why.is_err_and(|why| why.contains("nothing moves")));
        let grown = door.memory("VmHWM") - memory;
        assert!(grown < 2048, "{grown} KiB more");
        let busy = door.processor_time();
        std::thread::park_timeout(Duration::from_secs(1));
        let spent = door.processor_time() - busy;
        assert!(spent <= Duration::from_millis(100), "{spent:?} while nothing moves");
        if kept.take().is_some() {
            // Its exit would end the session before the timer does.
            let _ = door.client.as_mut().unwrap().rest();
            child_behind(way, &mut door, &mut child).unwrap().exit(0);
        }
        assert_eq!(door.code(), 99);
    });
}

#[test]
fn a_hundred_thousand_pipelined_noops_are_answered_in_order() {
    const NOOPS: usize = 100_000;
    let Standing { mut door, child, .. } = Standing::at(At::Snoop, &Start::default());
    let memory = door.memory("VmHWM");
    let mut there = child.wire();
    let client = door.client.as_mut().unwrap();
    let replies = |first: usize| (first..first + 100).map(|n| format!("250 {n}\r\n")).collect::<String>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for hundred in 0..NOOPS / 100 {
                there.get(&b"NOOP\r\n".repeat(100)).unwrap();
                there.send(replies(100 * hundred).as_bytes());
            }
        });
        let mut sending = client.twin();
        scope.spawn(move || sending.send(&b"NOOP\r\n".repeat(NOOPS)));
        for hundred in 0..NOOPS / 100 {
            client.get(replies(100 * hundred).as_bytes()).unwrap();
        }
    });
    let grown = door.memory("VmHWM") - memory;
    assert!(grown < 512, "{grown} KiB more");
}

/// Sends one octet out of band.
pub(crate) fn send_urgent(wire: &mut Wire) {
    rustix::net::send(wire.stream().input().as_fd(), b"!", SendFlags::OOB).unwrap();
}

/// Stops the program while `deed` is done, so that it finds everything at once.
pub(crate) fn while_stopped(door: &mut Door, deed: impl FnOnce(&mut Wire)) {
    use rustix::process::Signal;
    door.kill(Signal::STOP);
    assert!(wait_until(PATIENCE, || door.state() == 'T'));
    deed(door.client.as_mut().unwrap());
    // Until the octets are in the program's socket: a loopback delivers in order, at once.
    door.kill(Signal::CONT);
}

#[test]
fn an_urgent_octet_in_the_dialogue_hides_nothing_that_follows_it() {
    let mut door = Door::open(&Start::default());
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child).unwrap();
    while_stopped(&mut door, |client| {
        client.send(b"NOOP\r\n");
        send_urgent(client);
        client.send(b"RSET\r\n");
    });
    child.get(b"NOOP\r\n").unwrap();
    child.get(b"RSET\r\n").unwrap_or_else(|why| panic!("what came behind the urgent octet: {why}"));
    child.send(b"250 Ok\r\n250 Ok\r\n");
    door.client.as_mut().unwrap().get(b"250 Ok\r\n250 Ok\r\n").unwrap();
    ask_child(&mut door, &mut child, "NOOP\r\n", "250 Ok\r\n").unwrap();
}

#[test]
fn an_urgent_octet_inside_tls_hides_nothing_that_follows_it() {
    all_of(&[At::Gate, At::RelayTls], |&at| {
        let mut standing = Standing::at(at, &Start::default());
        while_stopped(&mut standing.door, |client| {
            client.send(b"NOOP\r\n");
            send_urgent(client);
            client.send(b"RSET\r\n");
        });
        let backend = standing.door.backend.wire().unwrap();
        backend.get(b"NOOP\r\nRSET\r\n").unwrap_or_else(|why| panic!("what came behind the urgent octet: {why}"));
    });
}

#[test]
fn an_urgent_octet_before_the_client_hello_hides_nothing_that_follows_it() {
    let mut standing = Standing::at(At::ClientHandshake, &Start::default());
    send_urgent(standing.door.client.as_mut().unwrap());
    standing.door.client.as_mut().unwrap().secure(tls_client()).unwrap();
}

#[test]
fn an_urgent_octet_wedges_no_relay() {
    all_of(&["splice", "copy"], |relay| {
        let standing = Standing::at(At::RelayPlain, &Start { options: &["--relay", relay], ..Start::default() });
        let Standing { mut door, mut child, .. } = standing;
        for stopped in [true, false] {
            let deed = |client: &mut Wire| {
                client.send(b"before\r\n");
                send_urgent(client);
                client.send(b"behind\r\n");
            };
            if stopped {
                while_stopped(&mut door, deed);
            } else {
                deed(door.client.as_mut().unwrap());
            }
            child.get(b"before\r\nbehind\r\n").unwrap_or_else(|why| panic!("stopped: {stopped}: {why}"));
            ask_child(&mut door, &mut child, "more\r\n", "250 Ok\r\n").unwrap();
        }
        both_ways(door.client.as_mut().unwrap(), &mut child.wire(), 1 << 20);
        send_urgent(door.client.as_mut().unwrap());
        ask_child(&mut door, &mut child, "more\r\n", "250 Ok\r\n").unwrap();
        let before = door.processor_time();
        std::thread::park_timeout(Duration::from_secs(1));
        let spent = door.processor_time() - before;
        assert!(spent <= Duration::from_millis(100), "{spent:?} with an urgent mark and nothing to do");
    });
}

#[test]
fn a_slow_reader_gets_every_octet() {
    all_of(&[At::RelayPlain, At::RelayTls], |&at| {
        let mut standing = Standing::at(at, &Start::default());
        let memory = standing.door.memory("VmHWM");
        let Standing { door, child, .. } = &mut standing;
        let mut of_child = (at == At::RelayPlain).then(|| child.wire());
        let client = door.client.as_mut().unwrap();
        rustix::net::sockopt::set_socket_recv_buffer_size(client.stream().input(), 4096).unwrap();
        let there = of_child.as_mut().unwrap_or_else(|| door.backend.wire().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(move || there.exchange(&mut Octets::new(5, 1 << 20), &mut Octets::none(), PATIENCE).unwrap());
            client.exchange(&mut Octets::none(), &mut Octets::new(5, 1 << 20), PATIENCE).unwrap();
        });
        let grown = door.memory("VmHWM") - memory;
        assert!(grown < 1024, "{grown} KiB more");
    });
}
