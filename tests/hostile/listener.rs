//! The program as a listener (`--listen`): its clients get what a UCSPI server's would, it keeps its limits, and it comes to an end.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::child::Child;
use crate::door::{Door, Shape, Start};
use crate::stream::wait_until;
use crate::supervised::children;
use crate::wire::PATIENCE;

const LISTENS: Start<'_> = Start { shape: Shape::Listener, ..Start::USUAL };

/// A session's greeting.
fn greet(door: &mut Door, child: &mut Child) {
    child.send(b"220 mail.example ESMTP\r\n");
    door.client.as_mut().unwrap().get(b"220 mail.example ESMTP\r\n").unwrap();
}

/// The client's own address.
fn address(door: &mut Door) -> SocketAddr {
    let client = door.client.as_mut().unwrap().stream();
    rustix::net::getsockname(client.input()).unwrap().try_into().unwrap()
}

/// The spawner.
fn spawner(door: &Door) -> Pid {
    let [spawner] = children(door.pid(), "spawner")[..] else { panic!("one spawner") };
    spawner
}

#[test]
fn prog_is_told_who_the_client_is_and_nothing_of_an_older_one() {
    let stale = ["TCPREMOTEHOST", "TCPREMOTEINFO", "TCPLOCALHOST", "TCPREMOTEIP"].map(|name| (name, "stale"));
    let environment = [&stale[..], &[("RELAYCLIENT", "yes"), ("CERTFILE", "/nowhere")]].concat();
    let mut door = Door::open(&Start { environment: &environment, ..LISTENS });
    let child = Child::accept(&door.puppets).unwrap();
    let (client, local) = (address(&mut door), door.address.unwrap());
    let said = &child.report.environment;
    for (name, value) in [
        ("PROTO", "TCP".to_owned()),
        ("TCPREMOTEIP", client.ip().to_string()),
        ("TCPREMOTEPORT", client.port().to_string()),
        ("TCPLOCALIP", local.ip().to_string()),
        ("TCPLOCALPORT", local.port().to_string()),
        ("RELAYCLIENT", "yes".to_owned()),
    ] {
        assert!(said.contains(&format!("{name}={value}")), "{name}={value}: {said:?}");
    }
    assert!(!said.iter().any(|line| line.contains("stale") || line.contains("CERTFILE")), "{said:?}");
    assert_eq!(child.report.fds, "0 1 2");
}

/// PROTO is that of the transport, and the same for both families: servers put it before the names of the other variables.
#[test]
fn prog_is_told_of_a_client_by_ipv6_in_the_same_variables() {
    let at = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, crate::door::free_address().port()));
    let door = Door::start(&Start { options: &["--listen", &at.to_string()], ..LISTENS });
    assert!(wait_until(PATIENCE, || door.said().contains("listening on ")), "{}", door.said());
    let client = TcpStream::connect(at).unwrap();
    let child = Child::accept(&door.puppets).unwrap();
    for (name, value) in [
        ("PROTO", "TCP".to_owned()),
        ("TCPREMOTEIP", "::1".to_owned()),
        ("TCPREMOTEPORT", client.local_addr().unwrap().port().to_string()),
        ("TCPLOCALIP", "::1".to_owned()),
        ("TCPLOCALPORT", at.port().to_string()),
    ] {
        let said = &child.report.environment;
        assert!(said.contains(&format!("{name}={value}")), "{name}={value}: {said:?}");
    }
}

/// The two wildcards stand side by side, and nobody's IPv4 address is told as one of IPv6.
#[test]
fn all_addresses_of_both_families_are_listened_on_at_one_port() {
    let port = crate::door::free_address().port();
    let [all, all_six] = [format!("0.0.0.0:{port}"), format!("[::]:{port}")];
    let door = Door::start(&Start { options: &["--listen", &all, "--listen", &all_six], ..LISTENS });
    assert!(wait_until(PATIENCE, || door.said().contains("listening on ")), "{}", door.said());
    for from in ["127.0.0.1", "::1"] {
        let _client = TcpStream::connect((from, port)).unwrap();
        let child = Child::accept(&door.puppets).unwrap();
        let said = &child.report.environment;
        assert!(said.contains(&format!("TCPREMOTEIP={from}")), "{from}: {said:?}");
    }
}

#[test]
fn one_session_too_many_hears_421_and_the_next_after_an_end_does_not() {
    let mut door = Door::open(&Start { options: &["--max-sessions", "1"], ..LISTENS });
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    let first = door.client.take().unwrap();
    door.connect();
    door.client.as_mut().unwrap().get(b"421 4.7.0 Too many sessions, try again later\r\n").unwrap();
    door.client.as_mut().unwrap().get_end().unwrap();
    drop(first);
    child.get_end().unwrap();
    child.exit(0);
    let is_taken = wait_until(PATIENCE, || {
        door.connect();
        let client = door.client.as_mut().unwrap();
        client.listen_for(Duration::from_millis(100));
        !client.has_received()
    });
    assert!(is_taken, "{}", door.said());
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
}

#[test]
fn sigterm_without_a_drain_ends_every_session_with_421_and_nobody_is_left() {
    let mut door = Door::open(&Start { options: &["--drain", "0"], ..LISTENS });
    let mut children = Vec::new();
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut child = Child::accept(&door.puppets).unwrap();
        greet(&mut door, &mut child);
        children.push(child);
        clients.extend(door.client.take());
        if clients.len() < 3 {
            door.connect();
        }
    }
    let spawner = spawner(&door);
    door.kill(Signal::TERM);
    for client in &mut clients {
        client.get(b"421 4.3.2 Service shutting down\r\n").unwrap();
        client.get_end().unwrap();
    }
    for child in &mut children {
        child.exit(0);
    }
    assert_eq!(door.code(), 0);
    for child in &children {
        assert!(child.is_gone(PATIENCE));
    }
    assert!(wait_until(PATIENCE, || rustix::process::test_kill_process(spawner).is_err()), "the spawner is left");
}

/// The limits of open descriptors that a process has: the soft one, and the hard one (proc(5)).
fn descriptors(pid: u32) -> Vec<String> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    line.split_whitespace().take(2).map(str::to_owned).collect()
}

#[test]
fn descriptors_are_as_many_as_may_be_and_prog_has_the_limit_of_the_start() {
    let door = Door::open(&Start { through: &["/usr/bin/prlimit", "--nofile=64:200"], ..LISTENS });
    let child = Child::accept(&door.puppets).unwrap();
    assert_eq!(descriptors(door.program.id()), ["200", "200"]);
    assert_eq!(descriptors(child.report.pid), ["64", "200"]);
    let told = "at most 9 sessions, not 10000: 200 descriptors may be open";
    assert!(door.said().contains(told), "{}", door.said());
}

#[test]
fn a_spawner_that_dies_brings_all_to_an_end_that_the_supervisor_sees() {
    let mut door = Door::open(&LISTENS);
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    kill_process(spawner(&door), Signal::KILL).unwrap();
    door.client.as_mut().unwrap().get(b"421 4.3.2 Service shutting down\r\n").unwrap();
    assert_eq!(door.code(), 111);
    assert!(door.said().contains("spawner"), "{}", door.said());
}

#[test]
fn a_prog_that_can_t_be_started_is_a_421_and_others_go_on() {
    let mut door = Door::open(&Start { program: Some(&["/no/such/program"]), ..LISTENS });
    for _ in 0..2 {
        door.client.as_mut().unwrap().get(b"421 4.3.0 Mail server not available\r\n").unwrap();
        door.client.as_mut().unwrap().get_end().unwrap();
        door.connect();
    }
    assert!(door.said().contains("/no/such/program: "), "{}", door.said());
}

#[test]
fn a_killed_prog_is_known_for_one() {
    let mut door = Door::open(&LISTENS);
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    door.client.as_mut().unwrap().send(b"MAIL FROM:<a@b.example>\r\n");
    child.get(b"MAIL FROM:<a@b.example>\r\n").unwrap();
    kill_process(Pid::from_raw(child.report.pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
    // The rig has copies of its pipes.
    drop(child);
    assert!(wait_until(PATIENCE, || door.said().contains("killed by signal 9")), "{}", door.said());
}

/// A user that exists on no machine.
const NOBODY: u32 = 64020;

#[test]
fn a_spawner_that_can_t_take_on_its_ids_is_exit_111_and_one_line() {
    let uid = rustix::process::geteuid().is_root().then_some(NOBODY);
    let environment = [("UID", "64021")];
    let mut door = Door::start(&Start { environment: &environment, uid, ..LISTENS });
    assert_eq!(door.code(), 111, "{}", door.said());
    let said = door.said();
    assert!(said.contains("can't start the spawner: Operation not permitted"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn who_hears_strangers_as_root_is_said_and_nothing_where_nobody_does() {
    let (ours, progs) = ("it faces the network as root (TLS_UID, TLS_GID)", " runs as root (UID, GID)");
    let (tls, own) = (("TLS_UID", "64020"), ("UID", "64021"));
    let is_root = rustix::process::geteuid().is_root();
    let plain: (&[&str], Option<&[&str]>) = (&["--plain", "127.0.0.1:9"], Some(&[]));
    for (environment, (options, program), uid, warned) in [
        (&[][..], (&[][..], None), None, [true, true]),
        (&[own], (&[], None), None, [true, false]),
        (&[tls], (&[], None), None, [false, true]),
        (&[tls, own], (&[], None), None, [false; 2]),
        (&[], plain, None, [true, false]),
        (&[], (&[], None), Some(NOBODY), [false; 2]),
    ] {
        if !is_root && (uid.is_some() || !environment.is_empty()) {
            continue;
        }
        let door = Door::start(&Start { environment, options, program, uid, ..LISTENS });
        assert!(wait_until(PATIENCE, || door.said().contains("listening on ")), "{}", door.said());
        let said = door.said();
        let is_warned = [ours, progs].map(|words| said.matches(words).count());
        assert_eq!(
            is_warned,
            warned.map(|is| usize::from(is && is_root)),
            "{environment:?} {options:?} {uid:?}: {said}"
        );
    }
}

/// Once, and only of a server that somebody may be led to.
#[test]
fn servers_on_loopback_are_warned_of_at_the_start_unless_that_is_meant() {
    let (host, daemon) =
        ("HOST takes every client in TLS for this host", "the server of --plain takes every client for");
    let plain: (&[&str], Option<&[&str]>) = (&["--plain", "127.0.0.1:9"], Some(&[]));
    for ((options, program), certificate, trusted, warned) in [
        ((&[][..], None), true, false, [1, 0]),
        ((&[], None), true, true, [0, 0]),
        ((&[], None), false, false, [0, 0]),
        (plain, true, false, [1, 1]),
        (plain, true, true, [0, 0]),
        (plain, false, false, [0, 1]),
    ] {
        let mut door = Door::start(&Start { options, program, certificate, trusted, ..LISTENS });
        door.connect();
        let said = door.said();
        let times = [host, daemon].map(|words| said.matches(words).count());
        assert_eq!(times, warned, "{options:?} {certificate} {trusted}: {said}");
    }
}

#[test]
fn what_can_t_be_is_said_before_anybody_is_served() {
    let program = env!("CARGO_BIN_EXE_starttls-wrapper");
    for (words, code, said) in [
        ("--listen 192.0.2.1:25 --way keep p", 111, "can't listen on 192.0.2.1:25"),
        ("--listen 127.0.0.1 --way keep p", 100, "--listen wants ADDR:PORT"),
        ("--listen 127.0.0.1:0 --way keep p", 100, "--listen wants ADDR:PORT"),
        ("--listen 127.0.0.1:25 --way respawn p", 100, "can't be had together"),
        ("--workers 2 --way keep p", 100, "--listen is missing"),
        ("--listen 127.0.0.1:25 --workers 0 --way keep p", 100, "--workers takes a number from 1"),
        ("--listen 127.0.0.1:25 --max-sessions 0 --way keep p", 100, "--max-sessions must be at least 1"),
    ] {
        let out = Command::new(program).args(words.split(' ')).env_clear().output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{words}: {stderr}");
        assert!(stderr.contains(said), "{words}: {stderr}");
    }
}
