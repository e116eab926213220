//! The way `raw`: behind the 220 every octet goes to HOST and back as it is, by splice, and each side's end with it.

use std::time::Duration;

use rustix::process::Signal;
use starttls_wrapper::session::Way;

use crate::bulk::{ENOUGH, MUCH, both_ways, send_urgent, while_stopped};
use crate::door::{Door, Start, tls_client};
use crate::steps::{At, Standing, all_of};
use crate::stream::wait_until;
use crate::trace::Trace;
use crate::wire::{End, PATIENCE, Wire};

/// A session whose 220 is out, its HOST connected and silent.
fn untouched(options: &[&str]) -> Standing {
    started(&Start { options, way: Way::Raw, ..Start::default() })
}

fn started(start: &Start<'_>) -> Standing {
    let mut standing = Standing::at(At::Snoop, start);
    standing.door.backend.listen();
    let client = standing.door.client.as_mut().unwrap();
    client.send(b"STARTTLS\r\n");
    client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
    standing.door.backend.wire().unwrap();
    standing.child.get(b"QUIT\r\n").unwrap();
    standing.child.exit(0);
    standing
}

fn says(door: &Door, what: &str) {
    assert!(wait_until(PATIENCE, || door.said().contains(what)), "no {what}: {}", door.said());
}

#[test]
fn every_octet_passes_untouched_and_memory_stays_flat() {
    for relay in ["splice", "copy"] {
        let Standing { mut door, .. } = untouched(&["--relay", relay]);
        let before = door.memory("VmHWM");
        both_ways(door.client.as_mut().unwrap(), door.backend.wire().unwrap(), MUCH);
        let grown = door.memory("VmHWM") - before;
        assert!(grown < 512, "{relay}: {grown} KiB more");
        door.client.as_mut().unwrap().end();
        let backend = door.backend.wire().unwrap();
        assert_eq!(backend.get_end(), Ok(End::Clean));
        // Half-closed: what HOST still says arrives.
        backend.send(b"its last words");
        backend.end();
        let client = door.client.as_mut().unwrap();
        client.get(b"its last words").unwrap();
        assert_eq!(client.get_end(), Ok(End::Clean));
        assert_eq!(door.code(), 0);
        says(&door, "mode=raw");
    }
}

/// TLS from end to end, as the kernel saw it: behind the 220 no octet of it is read or written here, from the handshake on.
#[test]
fn the_ciphertext_is_spliced_and_never_read_or_written() {
    let trace = Trace::of(&["-e", "trace=splice,read,readv,recvfrom,recvmsg,write,writev,sendto,sendmsg"]);
    let through = trace.through();
    let Standing { mut door, .. } = started(&Start { through: &through, way: Way::Raw, ..Start::default() });
    let client = door.client.as_mut().unwrap();
    std::thread::scope(|scope| {
        let shakes_hands = scope.spawn(|| client.secure(tls_client()));
        door.backend.secure().unwrap();
        shakes_hands.join().unwrap().unwrap();
    });
    both_ways(door.client.as_mut().unwrap(), door.backend.wire().unwrap(), ENOUGH);
    door.client.as_mut().unwrap().end();
    let backend = door.backend.wire().unwrap();
    assert_eq!(backend.get_end(), Ok(End::Clean));
    backend.end();
    assert_eq!(door.client.as_mut().unwrap().get_end(), Ok(End::Clean));
    assert_eq!(door.code(), 0);
    let log = trace.log();
    let (mut spliced, mut copied) = (0, 0);
    for call in log.lines().skip_while(|call| !call.contains("220 2.0.0 Ready")).skip(1) {
        let count = call.rsplit_once("= ").and_then(|(_, count)| count.parse::<u64>().ok()).unwrap_or(0);
        *if call.starts_with("splice(") { &mut spliced } else { &mut copied } += count;
        let is_clients = ["read(0,", "read(1,", "write(0,", "write(1,"].iter().any(|begin| call.starts_with(begin));
        assert!(!is_clients || count == 0, "{call}");
    }
    // Each octet by two of them: into our pipe, and out of it. The records' own octets come on top.
    assert!(spliced > 4 * ENOUGH && spliced < 5 * ENOUGH, "{spliced} octets spliced");
    // PROG's farewell, and a line in the log.
    assert!(copied < 1024, "{copied} octets copied");
}

/// The mark itself is no octet of TLS, and is not passed on.
#[test]
fn an_urgent_octet_wedges_nothing_and_hides_nothing_that_follows_it() {
    all_of(&["splice", "copy"], |relay| {
        let Standing { mut door, .. } = untouched(&["--relay", relay]);
        let deed = |client: &mut Wire| {
            client.send(b"before");
            send_urgent(client);
            client.send(b"behind");
        };
        for stopped in [true, false] {
            if stopped {
                while_stopped(&mut door, deed);
            } else {
                deed(door.client.as_mut().unwrap());
            }
            let backend = door.backend.wire().unwrap();
            backend.get(b"beforebehind").unwrap_or_else(|why| panic!("stopped: {stopped}: {why}"));
            backend.send(b"heard");
            door.client.as_mut().unwrap().get(b"heard").unwrap();
        }
        both_ways(door.client.as_mut().unwrap(), door.backend.wire().unwrap(), 1 << 20);
        send_urgent(door.client.as_mut().unwrap());
        let before = door.processor_time();
        std::thread::park_timeout(Duration::from_secs(1));
        let spent = door.processor_time() - before;
        assert!(spent <= Duration::from_millis(100), "{spent:?} with an urgent mark and nothing to do");
    });
}

#[test]
fn the_end_of_host_is_passed_on() {
    let Standing { mut door, .. } = untouched(&[]);
    door.backend.wire().unwrap().send(b"bye");
    door.backend.wire().unwrap().end();
    let client = door.client.as_mut().unwrap();
    client.get(b"bye").unwrap();
    assert_eq!(client.get_end(), Ok(End::Clean));
    client.end();
    assert_eq!(door.code(), 0);
}

#[test]
fn a_reset_of_either_side_ends_the_session_and_is_told() {
    let Standing { mut door, .. } = untouched(&[]);
    door.client.take().unwrap().reset();
    let _ = door.backend.wire().unwrap().rest();
    assert_eq!(door.code(), 1);
    let Standing { mut door, .. } = untouched(&[]);
    door.backend.wire().unwrap().send(b"TLS");
    door.client.as_mut().unwrap().get(b"TLS").unwrap();
    door.backend.take().reset();
    let _ = door.client.as_mut().unwrap().rest();
    assert_eq!(door.code(), 111);
    says(&door, "backend broke off");
}

/// Our write meets the reset first, and the read behind it finds an end.
#[test]
fn a_reset_of_a_host_that_takes_nothing_more_is_no_end() {
    all_of(&["splice", "copy"], |relay| {
        let Standing { mut door, .. } = untouched(&["--relay", relay]);
        door.backend.wire().unwrap().send(b"TLS");
        let client = door.client.as_mut().unwrap();
        client.get(b"TLS").unwrap();
        // All that is between them is full.
        let mut refusals = 0;
        while refusals < 10 {
            if client.send_some(&[b'y'; 65_536]) == 0 {
                refusals += 1;
                std::thread::park_timeout(Duration::from_millis(20));
            }
        }
        door.backend.take().reset();
        let _ = client.rest();
        assert_eq!(door.code(), 111, "{}", door.said());
        says(&door, "end=\"backend broke off\"");
    });
}

#[test]
fn nothing_of_ours_is_ever_said_behind_the_220() {
    all_of(&["SIGTERM", "time-out"], |&how| {
        let Standing { mut door, .. } = untouched(&["--relay-timeout", if how == "SIGTERM" { "1000" } else { "1" }]);
        if how == "SIGTERM" {
            door.kill(Signal::TERM);
        }
        assert_eq!(door.client.as_mut().unwrap().rest().unwrap().0, b"");
        assert_eq!(door.backend.wire().unwrap().rest().unwrap().0, b"");
        assert_eq!(door.code(), if how == "SIGTERM" { 0 } else { 99 });
    });
}

/// No certificate is needed, and one in the environment is not looked at.
#[test]
fn no_certificate_is_needed() {
    let environment = [("CERTFILE", "/nonexistent")];
    for options in [&[][..], &["--require-tls"]] {
        let start = Start { options, environment: &environment, way: Way::Raw, ..Start::default() };
        let mut standing = Standing::at(At::Snoop, &start);
        standing.door.backend.listen();
        let client = standing.door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\n");
        client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
        standing.door.backend.wire().unwrap();
        drop(standing.door.backend.take());
        standing.close();
    }
}

/// A client that goes on in clear behind the 220 speaks to HOST's TLS, and to nobody else.
#[test]
fn what_is_said_in_clear_behind_the_220_never_reaches_prog() {
    let mut standing = Standing::at(At::Snoop, &Start { way: Way::Raw, ..Start::default() });
    standing.door.backend.listen();
    let client = standing.door.client.as_mut().unwrap();
    client.send(b"STARTTLS\r\n");
    client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
    let injected = b"EHLO injected.example\r\nMAIL FROM:<injected@evil.example>\r\n";
    client.send(injected);
    standing.door.backend.wire().unwrap().get(injected).unwrap();
    standing.child.get(b"QUIT\r\n").unwrap();
    assert_eq!(standing.child.rest().unwrap(), b"");
    drop(standing.door.backend.take());
    standing.close();
}
