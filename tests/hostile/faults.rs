//! Bugs of ours. There is no back door to a panic: here the kernel lies (strace's injections), and the program believes it.

use std::net::TcpListener;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::child::Child;
use crate::door::{Door, Shape, Start, free_address};
use crate::lazy::{CERTAIN, serve};
use crate::page::status;
use crate::steps::{At, Standing, ask_child};
use crate::stream::wait_until;
use crate::trace::Trace;
use crate::wire::{End, PATIENCE, Wire};

/// Reads of a session's start that tell the truth.
const TRUE_READS: usize = 10;

#[test]
fn a_panic_is_exit_101_and_one_line_and_nobody_hears_a_word() {
    // More octets than the room that was offered.
    let lie = format!("inject=read:retval=100000:when={}+", TRUE_READS + 1);
    let trace = Trace::of(&["-e", "trace=read", "-e", &lie]);
    let start = Start { through: &trace.through(), ..Start::default() };
    let mut standing = Standing::at(At::Snoop, &start);
    let asked = (0..=TRUE_READS)
        .take_while(|_| ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").is_ok());
    assert!(asked.count() <= TRUE_READS, "it does not believe the kernel");
    let (said, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
    assert!(matches!(end, End::Clean | End::Reset), "{end:?}");
    assert!(!said.windows(4).any(|part| part == b"421 "), "{}", said.escape_ascii());
    // The child hears the end of its input, as when its client goes.
    let _ = standing.child.rest().unwrap();
    standing.child.exit(0);
    assert_eq!(standing.door.code(), 101, "{}", standing.door.said());
    let log = standing.door.said();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("]: error: bug: panicked at src/"), "{log}");
    assert!(trace.log().contains("(INJECTED)"));
}

/// One lie alone, which meets whichever session reads just then: one of two that stand. A third comes behind it.
#[test]
fn a_panic_in_one_session_of_a_listener_ends_that_one_and_no_other() {
    let lie = format!("inject=read:retval=100000:when={}", 4 * TRUE_READS);
    let trace = Trace::of(&["-f", "-e", "trace=read", "-e", &lie]);
    let mut door = Door::open(&Start { through: &trace.through(), shape: Shape::Listener, ..Start::USUAL });
    let begin = |door: &mut Door| -> (Wire, Child) {
        let mut child = Child::accept(&door.puppets).unwrap();
        child.send(b"220 mx\r\n");
        let mut client = door.client.take().unwrap();
        client.get(b"220 mx\r\n").unwrap();
        (client, child)
    };
    let ask = |(client, child): &mut (Wire, Child)| {
        client.send(b"NOOP\r\n");
        child.get(b"NOOP\r\n")?;
        child.send(b"250 ok\r\n");
        client.get(b"250 ok\r\n")
    };
    let mut other = begin(&mut door);
    door.connect();
    let mut one = begin(&mut door);
    let asked = (0..4 * TRUE_READS).take_while(|_| ask(&mut one).is_ok()).count();
    assert!(asked < 4 * TRUE_READS, "it does not believe the kernel");
    let told = "a bug of ours has ended this session";
    assert!(wait_until(PATIENCE, || door.said().contains(told)), "{}", door.said());
    assert!(matches!(one.0.rest().unwrap().1, End::Clean | End::Reset));
    one.1.exit(0);
    ask(&mut other).unwrap();
    door.connect();
    ask(&mut begin(&mut door)).unwrap();
    let said = door.said();
    assert!(said.contains("]: error: bug: panicked at src/") && said.matches(told).count() == 1, "{said}");
    assert!(!said.contains("a bug of ours has ended a loop"), "{said}");
}

#[test]
fn a_panic_of_who_answers_for_metrics_is_told_and_he_answers_again() {
    let lie = format!("inject=read:retval=100000:when={}", 6 * TRUE_READS);
    let trace = Trace::of(&["-f", "-e", "trace=read", "-e", &lie]);
    let address = free_address();
    let options = ["--metrics", &address.to_string()];
    let start = Start { options: &options, through: &trace.through(), shape: Shape::Listener, ..Start::USUAL };
    let door = Door::open(&start);
    let is_well = || status(address, "GET /healthz HTTP/1.0\r\n\r\n") == "HTTP/1.1 200 OK";
    let asked = (0..6 * TRUE_READS).take_while(|_| is_well()).count();
    assert!(asked < 6 * TRUE_READS, "it does not believe the kernel");
    assert!(is_well(), "{}", door.said());
    let told = "a bug of ours has ended who answers for metrics: it is begun again";
    assert_eq!(door.said().matches(told).count(), 1, "{}", door.said());
}

/// Without a certificate only the prober reads much when it is told to probe anew.
#[test]
fn a_panic_of_who_probes_is_told_and_he_probes_again() {
    // Some of its reads are of an eventfd, of which it believes nothing.
    let lie = format!("inject=read:retval=100000:when={}..{}", 8 * TRUE_READS, 8 * TRUE_READS + 3);
    let trace = Trace::of(&["-f", "-e", "trace=read", "-e", &lie]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let options = ["--lazy", "--plain", &listener.local_addr().unwrap().to_string()];
    let (served, probes) = channel();
    thread::spawn(move || {
        for client in listener.incoming() {
            let served = served.clone();
            thread::spawn(move || served.send(serve(client.unwrap(), false)));
        }
    });
    let start = Start { options: &options, certificate: false, program: Some(&[]), ..Start::USUAL };
    let door = Door::open(&Start { through: &trace.through(), shape: Shape::Listener, ..start });
    assert!(wait_until(PATIENCE, || door.said().contains(CERTAIN)), "{}", door.said());
    let told = "a bug of ours has ended the probes of ";
    for _ in 0..8 * TRUE_READS {
        door.kill(Signal::HUP);
        // One that meets the lie is not served to its end.
        let is_over = || probes.try_recv().is_ok() || door.said().contains(told);
        assert!(wait_until(PATIENCE, is_over), "{}", door.said());
        if door.said().contains(told) {
            break;
        }
    }
    assert!(door.said().contains(told), "it does not believe the kernel: {}", door.said());
    probes.try_iter().for_each(drop);
    // It may meet what is left of the lie first.
    let is_probed = || {
        door.kill(Signal::HUP);
        probes.recv_timeout(Duration::from_millis(200)).is_ok_and(|probe| probe.ends_with(b"QUIT\r\n"))
    };
    assert!(wait_until(PATIENCE, is_probed), "{}", door.said());
}
