//! The program as a UCSPI child: every dialogue through the real door, and what a dialogue can't say: the child's
//! surroundings, its end, and a client that is faster than a person.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod support;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use child::Child;
use dialogue::{Dialogue, Doors};
use door::{Door, Shape, Start, tls_client};
use starttls_wrapper::cli::OWN_VARIABLES;
use starttls_wrapper::session::Way;
use steps::{At, Standing};
use stream::wait_until;
use support::*;
use trace::Trace;
use wire::PATIENCE;

/// Dialogues at once: most of their time is waiting.
const AT_ONCE: usize = 8;

#[test]
fn every_dialogue_holds_through_the_program() {
    every_dialogue_holds(Shape::Tcp);
}

/// But for those in which a fresh PROG is told of the client's TLS, or that TLS is another's: a listener has none.
#[test]
fn every_dialogue_holds_through_a_listener() {
    every_dialogue_holds(Shape::Listener);
}

/// Those in which it can be learned what the child says: it is put off, and the client hears the same.
#[test]
fn every_dialogue_that_can_be_learned_holds_through_a_stand_in() {
    let played = every_dialogue(|dialogue| listens(dialogue.way), lazily::play);
    assert!(played >= 200, "only {played} could be learned");
}

fn every_dialogue_holds(shape: Shape) {
    every_dialogue(
        |dialogue| shape != Shape::Listener || listens(dialogue.way),
        |dialogue| Some(playing::play(dialogue, shape)),
    );
}

fn listens(way: Way) -> bool {
    !way.respawns() && !way.is_ucspi_tls() && way != Way::Mute
}

/// Has `play` play those dialogues; how many it was that it did not pass over.
fn every_dialogue(
    is_meant: impl Fn(&Dialogue) -> bool,
    play: impl Fn(&Dialogue) -> Option<Result<(), String>> + Sync + std::panic::RefUnwindSafe,
) -> usize {
    let dialogues = dialogue::all().unwrap_or_else(|why| panic!("{why}"));
    let dialogues: Vec<_> = dialogues.into_iter().filter(|d| d.doors != Doors::Pure).collect();
    let (mut dialogues, count) = ways::all(&dialogues);
    dialogues.retain(is_meant);
    let passed_over = AtomicUsize::new(0);
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(dialogue) = dialogues.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let played = std::panic::catch_unwind(|| play(dialogue));
                    let panicked = || Some(Err(format!("{}: the rig panicked", dialogue.path.display())));
                    match played.unwrap_or_else(|_| panicked()) {
                        Some(Ok(())) => {}
                        Some(Err(why)) => failures.lock().unwrap().push(why),
                        None => drop(passed_over.fetch_add(1, Ordering::Relaxed)),
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    let played = dialogues.len() - passed_over.into_inner();
    println!("{played} of {} dialogues through the program ({count}), {} failed", dialogues.len(), failures.len());
    assert!(failures.is_empty(), "{} of {played} failed:\n\n{}", failures.len(), failures.join("\n\n"));
    played
}

/// The start of a session: greeting and EHLO.
fn greet(door: &mut Door, child: &mut Child) {
    door.backend.listen();
    child.send(b"220 mail.example ESMTP\r\n");
    let client = door.client.as_mut().unwrap();
    client.get(b"220 mail.example ESMTP\r\n").unwrap();
    client.send(b"EHLO client.example\r\n");
    child.get(b"EHLO client.example\r\n").unwrap();
    child.send(b"250 mail.example\r\n");
    client.get(b"250-mail.example\r\n250 STARTTLS\r\n").unwrap();
}

/// STARTTLS up to the 220.
fn starttls(door: &mut Door) {
    door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
    let backend = door.backend.wire().unwrap();
    backend.send(b"220 secure.example ESMTP\r\n");
    backend.get(b"EHLO client.example\r\n").unwrap();
    backend.send(b"250 secure.example\r\n");
    door.client.as_mut().unwrap().get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
}

#[test]
fn child_has_the_environment_it_would_have_had_without_us() {
    // Only root can become somebody else; anybody can stay who he is.
    let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
    let id = |own: u32| if uid.is_root() { "65534".to_owned() } else { own.to_string() };
    let (uid, gid) = (id(uid.as_raw()), id(gid.as_raw()));
    let value = |name| match name {
        "TLS_UID" => &*uid,
        "TLS_GID" => &*gid,
        _ => "/nonexistent",
    };
    let ours = OWN_VARIABLES.map(|name| (name, value(name)));
    let environment = [&ours[..], &[("RELAYCLIENT", ""), ("LANG", "C")]].concat();
    let mut door = Door::open(&Start { environment: &environment, ..Start::default() });
    let child = Child::accept(&door.puppets).unwrap_or_else(|why| panic!("{why}: {}", door.said()));
    let names: Vec<&str> =
        child.report.environment.iter().map(|line| line.split_once('=').map_or(line.as_str(), |(n, _)| n)).collect();
    for name in ["PROTO", "TCPREMOTEIP", "TCPREMOTEPORT", "TCPLOCALIP", "RELAYCLIENT", "LANG"] {
        assert!(names.contains(&name), "{name} is missing: {names:?}");
    }
    for name in OWN_VARIABLES {
        assert!(!names.contains(&name), "{name} is ours: {names:?}");
    }
    assert_eq!(child.report.arguments, "plain");
    assert_eq!(child.report.folder, std::env::current_dir().unwrap().to_string_lossy());
    door.client = None;
}

#[test]
fn child_has_fds_0_to_2_and_an_empty_signal_mask() {
    let door = Door::open(&Start::default());
    let child = Child::accept(&door.puppets).unwrap_or_else(|why| panic!("{why}: {}", door.said()));
    assert_eq!(child.report.fds, "0 1 2");
    assert!(child.report.signals.contains("SigBlk:\t0000000000000000"), "{}", child.report.signals);
}

#[test]
fn child_has_default_signal_dispositions() {
    // Not by the puppet: Rust's start-up ignores SIGPIPE there.
    let program = ["/bin/sh", "-c", "exec grep SigIgn /proc/self/status"];
    // A supervisor, or nohup(1), ignores some; env(1) all that it can. SIGBUS is left out: std's runtime looks after it.
    let through = ["env", "--ignore-signal", "--default-signal=BUS"];
    let mut door = Door::open(&Start { program: Some(&program), through: &through, ..Start::default() });
    let (said, _) = door.client.as_mut().unwrap().rest().unwrap();
    let said = String::from_utf8(said).unwrap();
    let ignored = said.trim_end().strip_prefix("SigIgn:\t").and_then(|hex| u64::from_str_radix(hex, 16).ok());
    // Signals 32 and up are not in question: 32 and 33 are the C library's own, and nobody can reset them.
    assert_eq!(ignored.map(|bits| bits & 0x7FFF_FFFF), Some(0), "{said}");
}

#[test]
fn the_backend_is_dialled_from_its_source() {
    for (options, source) in [(&[][..], "127.0.0.1"), (&["--backend-source", "127.0.0.9"], "127.0.0.9")] {
        let mut standing = Standing::at(At::Gate, &Start { options, ..Start::default() });
        assert_eq!(standing.door.backend.dialled_from().to_string(), source);
    }
}

/// Behind the header the session is as without it: with `tls` its ClientHello, with `plain` the greeting awaited.
#[test]
fn the_proxy_header_comes_before_anything_else_on_the_backends_connection() {
    let client =
        [("TCPREMOTEIP", "192.0.2.7"), ("TCPREMOTEPORT", "4711"), ("TCPLOCALIP", "192.0.2.25"), ("TCPLOCALPORT", "25")];
    let line = b"PROXY TCP4 192.0.2.7 192.0.2.25 4711 25\r\n";
    let binary =
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x14\xc0\0\x02\x07\xc0\0\x02\x19\x12\x67\0\x19\x20\0\x05\x01\0\0\0\x01";
    for way in [Way::Tls, Way::Plain] {
        for (version, header) in [("v1", &line[..]), ("v2", &binary[..])] {
            let start = Start { options: &["--send-proxy", version], environment: &client, way, ..Start::default() };
            let mut door = Door::open(&start);
            let mut child = Child::accept(&door.puppets).unwrap();
            greet(&mut door, &mut child);
            door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
            door.backend.accept_only().unwrap();
            door.backend.held().get(header).unwrap_or_else(|why| panic!("{way} {version}: {why}"));
            if way == Way::Tls {
                door.backend.held().get(&[0x16, 3]).unwrap();
                continue;
            }
            let backend = door.backend.held();
            backend.send(b"220 secure.example ESMTP\r\n");
            backend.get(b"EHLO client.example\r\n").unwrap();
            backend.send(b"250 secure.example\r\n");
            door.client.as_mut().unwrap().get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
        }
    }
}

/// Behind the client's handshake, with what was agreed in it: the client of these tests asks for `localhost`, and for no protocol.
#[test]
fn a_late_proxy_header_has_the_facts_of_the_clients_tls() {
    for way in [Way::TlsLate, Way::PlainLate] {
        let client = [("TCPREMOTEIP", "192.0.2.7"), ("TCPREMOTEPORT", "4711"), ("TCPLOCALPORT", "25")];
        let start = Start { environment: &client, way, ..Start::default() };
        let mut standing = Standing::at(At::ClientHandshake, &start);
        let client = standing.door.client.as_mut().unwrap();
        client.secure(tls_client()).unwrap();
        let suite = client.tls().unwrap().negotiated_cipher_suite().unwrap().suite();
        let suite = format!("{suite:?}").replace("TLS13_", "TLS_");
        let header = standing.door.backend.held().proxy_header().unwrap();
        let ends = [&[192, 0, 2, 7, 127, 0, 0, 1][..], &4711_u16.to_be_bytes(), &[0, 25]].concat();
        assert_eq!((header[13], &header[16..28]), (0x11, &ends[..]), "{way}");
        let facts = b"\x02\0\x09localhost\x20\0\x28\x01\0\0\0\x01\x21\0\x07TLSv1.3\x23\0\x16";
        let facts = [&facts[..], suite.as_bytes()].concat();
        assert_eq!(header[28..].escape_ascii().to_string(), facts.escape_ascii().to_string(), "{way}");
        let begins: &[u8] = if way == Way::TlsLate { &[0x16, 3] } else { b"" };
        standing.door.backend.held().get(begins).unwrap();
    }
}

/// Where STARTTLS is offered, so that a client may be led there.
#[test]
fn a_host_on_loopback_is_warned_of_once_a_session_unless_that_is_meant() {
    let warned = "]: warning: HOST takes every client in TLS for this host: an open relay, if it relays for loopback";
    let source = ["--backend-source", "127.0.0.53"];
    for (options, certificate, trusted, times) in
        [(&[][..], true, false, 1), (&[][..], true, true, 0), (&source, true, false, 0), (&[], false, false, 0)]
    {
        let mut door = Door::open(&Start { options, certificate, trusted, ..Start::default() });
        let mut child = Child::accept(&door.puppets).unwrap();
        child.send(b"220 mail.example ESMTP\r\n");
        door.client.as_mut().unwrap().get(b"220 mail.example ESMTP\r\n").unwrap();
        let said = door.said();
        assert_eq!(said.matches(warned).count(), times, "{options:?}, {certificate}, {trusted}: {said}");
    }
}

/// All that the program asked of the kernel in a session that came there, but not the child; a line is a call.
fn traced(at: At, environment: &[(&str, &str)]) -> Vec<String> {
    let trace = Trace::of(&[]);
    let standing = Standing::at(at, &Start { environment, through: &trace.through(), ..Start::default() });
    standing.close();
    trace.log().lines().map(str::to_owned).collect()
}

#[test]
fn the_child_is_started_first_and_the_client_is_read_last_from_within_the_sandbox() {
    // Only root can become somebody else.
    let is_root = rustix::process::getuid().is_root();
    let ids = [("TLS_UID", "65534"), ("TLS_GID", "65534")];
    let calls = traced(At::Snoop, if is_root { &ids } else { &[] });
    let first = |what: &str, is_it: &dyn Fn(&str) -> bool| {
        calls.iter().position(|call| is_it(call)).unwrap_or_else(|| panic!("no {what}: {calls:#?}"))
    };
    let begins = |names: &'static [&str]| move |call: &str| names.iter().any(|name| call.starts_with(name));
    let opens = |file: &'static str| move |call: &str| call.starts_with("open") && call.contains(file);
    let mut order = vec![
        ("child", first("child", &begins(&["clone(", "clone3(", "fork(", "vfork("]))),
        ("certificate", first("certificate", &opens("/cert.pem\""))),
        ("key", first("key", &|call| call.starts_with("read(") && call.contains("BEGIN PRIVATE KEY"))),
        ("hardening", first("hardening", &|call| call.starts_with("prctl(PR_SET_NO_NEW_PRIVS, 1"))),
        ("Landlock", first("Landlock", &|call| call.starts_with("landlock_restrict_self(") && call.ends_with("= 0"))),
        (
            "seccomp",
            first("seccomp", &|call| call.starts_with("seccomp(SECCOMP_SET_MODE_FILTER") && call.ends_with("= 0")),
        ),
        ("client", first("client", &begins(&["read(0,", "readv(0,", "recvfrom(0,", "recvmsg(0,", "splice(0,"]))),
    ];
    if is_root {
        let dropped = ["setgroups(1, [65534])", "setgid(65534)", "setuid(65534)"];
        let dropped = dropped.map(|call| (call, first(call, &|line| line.starts_with(call) && line.ends_with("= 0"))));
        order.splice(3..3, dropped);
    }
    assert!(order.is_sorted_by_key(|(_, line)| *line), "{order:?}: {calls:#?}");
}

#[test]
fn a_program_that_cannot_be_started_is_a_421() {
    for program in ["/nonexistent/smtpd", "/dev/null"] {
        let mut door = Door::open(&Start { program: Some(&[program]), ..Start::default() });
        let mut client = door.client.take().unwrap();
        client.get(b"421 4.3.0 Mail server not available\r\n").unwrap();
        assert_eq!(client.get_end(), Ok(wire::End::Clean));
        drop(client);
        assert_eq!(door.wait().unwrap().code(), Some(111), "{}", door.said());
        assert!(door.said().contains(program), "stderr names the program: {}", door.said());
    }
}

#[test]
fn a_child_that_ignores_eof_and_sigterm_is_killed_and_delays_nobody() {
    let mut door = Door::open(&Start { mode: "ignore-term", ..Start::default() });
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    starttls(&mut door);
    let client = door.client.as_mut().unwrap();
    client.secure(tls_client()).unwrap();
    client.send(b"EHLO client.example\r\n");
    door.backend.wire().unwrap().get(b"EHLO client.example\r\n").unwrap();
    door.backend.wire().unwrap().send(b"250 secure.example\r\n");
    client.get(b"250 secure.example\r\n").unwrap();
    // Neither end of the child's pipes is closed by the child: only SIGKILL ends it, 5 + 5 seconds after the dismissal.
    assert!(child.is_gone(Duration::from_secs(15)), "{}", door.said());
    // The session has not noticed.
    client.send(b"NOOP\r\n");
    door.backend.wire().unwrap().get(b"NOOP\r\n").unwrap();
}

#[test]
fn a_dismissed_child_is_reaped_at_once_and_an_idle_session_costs_nothing() {
    let mut door = Door::open(&Start::default());
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    starttls(&mut door);
    let client = door.client.as_mut().unwrap();
    client.secure(tls_client()).unwrap();
    client.send(b"EHLO client.example\r\n");
    door.backend.wire().unwrap().get(b"EHLO client.example\r\n").unwrap();
    child.get(b"QUIT\r\n").unwrap();
    child.exit(0);
    assert!(child.is_gone(PATIENCE), "the child stays a zombie: {}", door.said());
    // Past the farewell's 5 seconds: a deadline that nobody looks after would spin.
    let before = door.processor_time();
    let is_busy = wait_until(Duration::from_secs(6), || door.processor_time() - before >= Duration::from_millis(100));
    assert!(!is_busy, "an idle session uses the processor: {:?}", door.processor_time() - before);
}

#[test]
fn a_client_that_hurries_never_loses_its_client_hello() {
    for _ in 0..100 {
        let mut door = Door::open(&Start::default());
        let mut child = Child::accept(&door.puppets).unwrap();
        greet(&mut door, &mut child);
        starttls(&mut door);
        let client = door.client.as_mut().unwrap();
        client.secure(tls_client()).unwrap();
        client.send(b"QUIT\r\n");
        door.backend.wire().unwrap().get(b"QUIT\r\n").unwrap();
        child.exit(0);
    }
}
