//! A listener's plaintext server that is put off (`--lazy`), or is a daemon (`--plain`): who starts one and who does not, what a
//! client hears when it is not what was learned, and that octets go through it whole.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::thread;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::door::{Door, Shape, Start, tls_client};
use crate::scripted::{GREETING, SERVER, lines};
use crate::steps::all_of;
use crate::stream::wait_until;
use crate::trace::Trace;
use crate::wire::{End, PATIENCE};

pub(crate) const CERTAIN: &str = "is started when a client needs it";

/// A listener with [`SERVER`], and its folder.
pub(crate) struct Stage {
    pub(crate) door: Door,
    folder: TempDir,
}

impl Stage {
    pub(crate) fn new(greeting: &str, start: &Start<'_>) -> Self {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("greeting"), greeting).unwrap();
        let place = folder.path().to_str().unwrap();
        let program = ["/bin/sh", "-c", SERVER, "server", place];
        let environment = [("PATH", "/usr/bin:/bin")];
        let start = Start { program: Some(&program), environment: &environment, shape: Shape::Listener, ..*start };
        Self { door: Door::open(&start), folder }
    }

    /// What it greets with from now on.
    pub(crate) fn greets(&self, greeting: &str) {
        fs::write(self.folder.path().join("greeting"), greeting).unwrap();
    }

    pub(crate) fn lines(&self, name: &str) -> Vec<String> {
        lines(self.folder.path(), name)
    }

    pub(crate) fn says(&self, words: &str) {
        assert!(
            wait_until(PATIENCE, || self.door.said().contains(words)),
            "{words:?} is not said: {}",
            self.door.said()
        );
    }

    pub(crate) fn talk(&mut self, talk: &[(&str, &str)]) {
        let client = self.door.client.as_mut().unwrap();
        for (line, reply) in talk {
            client.send(line.as_bytes());
            client.get(reply.as_bytes()).unwrap();
        }
    }
}

pub(crate) const LAZY: Start<'_> = Start { options: &["--lazy"], ..Start::USUAL };
pub(crate) const EHLO: (&str, &str) =
    ("EHLO c.example\r\n", "250-mx hello c.example [127.0.0.1]\r\n250-STARTTLS\r\n250 SIZE 9\r\n");

#[test]
fn who_wants_no_mail_starts_no_server() {
    let mut stage = Stage::new(GREETING, &LAZY);
    stage.says(CERTAIN);
    for _ in 0..5 {
        stage.door.connect();
        stage.talk(&[
            ("", "220 mx\r\n"),
            EHLO,
            ("NOOP\r\nRSET\r\n", "250 NOOP\r\n250 RSET\r\n"),
            ("QUIT\r\n", "221 bye\r\n"),
        ]);
        assert_eq!(stage.door.client.as_mut().unwrap().get_end(), Ok(End::Clean));
    }
    assert_eq!(stage.lines("started"), ["192.0.2.25", "198.51.100.25"], "the probes");
    stage.door.connect();
    stage.talk(&[("", "220 mx\r\n"), EHLO, ("MAIL FROM:<a@b>\r\n", "250 MAIL FROM:<a@b>\r\n")]);
    assert_eq!(stage.lines("started")[2..], ["127.0.0.1"]);
    let heard = stage.lines("heard");
    assert!(heard.ends_with(&["EHLO c.example".to_owned(), "MAIL FROM:<a@b>".to_owned()]), "{heard:?}");
}

#[test]
fn a_quit_is_answered_and_closed_in_one_segment_and_who_says_more_is_heard_out() {
    let trace = Trace::of(&["-f", "-e", "trace=sendto,shutdown,close"]);
    let mut stage = Stage::new(GREETING, &Start { through: &trace.through(), ..LAZY });
    stage.says(CERTAIN);
    for farewell in ["QUIT\r\n", "QUIT\r\nNOOP\r\n"] {
        stage.door.connect();
        stage.talk(&[("", "220 mx\r\n"), EHLO, (farewell, "221 bye\r\n")]);
        assert_eq!(stage.door.client.take().unwrap().get_end(), Ok(End::Clean), "{farewell:?}");
    }
    stage.door.kill(Signal::TERM);
    assert_eq!(stage.door.code(), 0);
    let log = trace.log();
    let mut calls = log.lines().filter_map(|line| line.split_once(' ')).map(|(_, call)| call.trim_start());
    let mut next = || {
        let said = calls.by_ref().find(|call| call.starts_with("sendto(")).expect(&log);
        assert!(said.contains(r#""221 bye\r\n", 9, MSG_NOSIGNAL|MSG_MORE"#), "{said}");
        let socket = said[7..].split(',').next().unwrap().to_owned();
        let of_it = |call: &&str| call.contains(&format!("({socket}")) && !call.starts_with("sendto(");
        calls.by_ref().find(of_it).expect(&log).to_owned()
    };
    let (first, second) = (next(), next());
    assert!(first.starts_with("close("), "{first}");
    assert!(second.starts_with("shutdown(") && second.contains("SHUT_WR"), "{second}");
}

#[test]
fn starttls_starts_no_server_but_where_it_goes_on_behind() {
    let mut stage = Stage::new(GREETING, &LAZY);
    stage.says(CERTAIN);
    stage.door.backend.listen();
    stage.talk(&[("", "220 mx\r\n"), EHLO]);
    stage.door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
    stage.door.backend.wire().unwrap().send(b"220 b\r\n");
    stage.door.backend.wire().unwrap().get(b"EHLO c.example\r\n").unwrap();
    stage.door.backend.wire().unwrap().send(b"250 b\r\n");
    stage.talk(&[("", "220 2.0.0 Ready to start TLS\r\n")]);
    stage.door.client.as_mut().unwrap().secure(tls_client()).unwrap();
    assert_eq!(stage.lines("started").len(), 2);

    let mut stage = Stage::new(GREETING, &Start { way: starttls_wrapper::session::Way::Keep, ..LAZY });
    stage.says(CERTAIN);
    stage.talk(&[("", "220 mx\r\n"), EHLO, ("STARTTLS\r\n", "220 2.0.0 Ready to start TLS\r\n")]);
    stage.door.client.as_mut().unwrap().secure(tls_client()).unwrap();
    stage.talk(&[("EHLO c\r\n", "250-mx hello c [127.0.0.1]\r\n250 SIZE 9\r\n"), ("QUIT\r\n", "221 bye\r\n")]);
    assert_eq!(stage.lines("heard")[10..], ["EHLO c.example", "RSET", "EHLO c", "QUIT"]);
}

#[test]
fn a_reply_that_is_never_the_same_is_the_servers_own_to_say() {
    let greeting = "printf '220 mx %s\\r\\n' \"$(date +%s)\"";
    let ehlo = "printf '220 mx\\r\\n'; while read line; do printf '250 session %s\\r\\n' $$; done";
    all_of(&[("greeting", greeting), ("ehlo", ehlo)], |(which, server)| {
        let mut stage = Stage::new(server, &LAZY);
        stage.says(&format!("its reply to {which} is not always the same: every client gets one of its own"));
        stage.door.connect();
        assert!(wait_until(PATIENCE, || stage.lines("started").len() == 3), "{:?}", stage.lines("started"));
    });
}

/// By itself, five seconds later, and not given up for one that tells the time.
#[test]
fn a_server_that_refuses_the_second_probe_is_probed_again() {
    let once = "[ $(wc -l < \"$1/started\") = 2 ] && { printf '421 later\\r\\n'; exit; }; ";
    let stage = Stage::new(&[once, GREETING].concat(), &LAZY);
    stage.says("it greeted with 421: who needs it hears 421");
    stage.says(CERTAIN);
    assert_eq!(stage.lines("started").len(), 3);
}

#[test]
fn a_server_that_is_not_what_was_learned_is_421_and_learned_anew() {
    let mut stage = Stage::new(GREETING, &LAZY);
    stage.says(CERTAIN);
    stage.greets("printf '554 no\\r\\n'; exit");
    stage.talk(&[("", "220 mx\r\n"), EHLO, ("MAIL FROM:<a@b>\r\n", "421 4.3.0 Mail server not available\r\n")]);
    stage.says("child is not what was learned of it: it greeted with 554");
    stage.says("it greeted with 554: who needs it hears 421");
    stage.greets("printf '220 another\\r\\n'");
    stage.door.connect();
    stage.talk(&[("", "220 mx\r\n"), ("MAIL FROM:<a@b>\r\n", "250 MAIL FROM:<a@b>\r\n")]);
    stage.says("has changed: learned anew");
    stage.door.connect();
    stage.talk(&[("", "220 another\r\n"), EHLO]);
}

#[test]
fn nothing_is_served_where_nothing_can_be_learned() {
    let program = env!("CARGO_BIN_EXE_starttls-wrapper");
    let base = ["--greeting-timeout", "1", "--listen", "127.87.0.1:2525", "--trusted-loopback", "127.0.0.1", "1"];
    for (prog, why) in [
        (&["/bin/sh", "-c", "printf '554 no\\r\\n'; read x"][..], "/bin/sh: it greeted with 554"),
        (&["/bin/true"], "/bin/true: it closed"),
        (&["/bin/sleep", "60"], "/bin/sleep: no answer in time"),
        (&["/bin/sh", "-c", "exec 0<&-; printf '220 deaf\\r\\n'; exec sleep 60"], "/bin/sh: it takes nothing more"),
        (&["/no/such/program"], "/no/such/program: "),
    ] {
        let out = Command::new(program).args(base).args(prog).env_clear().output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(111), "{prog:?}: {stderr}");
        assert!(stderr.contains("can't learn what the server says") && stderr.contains(why), "{prog:?}: {stderr}");
        assert!(!stderr.contains("listening"), "{prog:?}: {stderr}");
    }
}

/// A daemon that answers each command with itself, and behind DATA each octet, until the client closes. Returns what all have said.
pub(crate) fn serve(mut client: impl Read + Write, is_relay: bool) -> Vec<u8> {
    client.write_all(b"220 daemon\r\n").unwrap();
    let (mut heard, mut line) = (Vec::new(), Vec::new());
    let mut octets = [0; 65536];
    while let Ok(count @ 1..) = client.read(&mut octets) {
        heard.extend_from_slice(&octets[..count]);
        if is_relay && heard.starts_with(b"DATA") {
            if client.write_all(&octets[..count]).is_err() {
                break;
            }
            continue;
        }
        for octet in &octets[..count] {
            line.push(*octet);
            if *octet == b'\n' {
                let reply = if line.starts_with(b"QUIT") { &b"221 bye\r\n"[..] } else { b"250 daemon\r\n" };
                client.write_all(reply).unwrap();
                if line.starts_with(b"QUIT") {
                    return heard;
                }
                line.clear();
            }
        }
    }
    heard
}

fn plain(place: &str, lazy: &str) -> Door {
    let option = ["--plain", place, lazy];
    Door::open(&Start { options: &option, program: Some(&[]), shape: Shape::Listener, ..Start::USUAL })
}

/// 8 MiB there and back, while both sides talk, then the client's end.
fn pass_through(door: &mut Door, before: &[u8]) {
    let client = door.client.as_mut().unwrap();
    client.get(before).unwrap();
    let data: Vec<u8> = b"DATA\r\n".iter().copied().chain((0..8_u32 << 18).flat_map(u32::to_le_bytes)).collect();
    let sent = data.clone();
    let mut twin = client.twin();
    let sender = thread::spawn(move || {
        twin.send(&sent);
        twin.end();
    });
    let (back, end) = client.rest().unwrap();
    sender.join().unwrap();
    assert!(back == data, "{} of {} octets", back.len(), data.len());
    assert_eq!(end, End::Clean);
}

/// Between two looks at all others, by whatever is there to be moved: each octet is seen twice, into our pipe and out of it.
#[test]
fn a_relay_at_full_speed_leaves_its_loop_to_others_after_every_few_mebibytes() {
    const MUCH: usize = 48 << 20;
    let trace = Trace::of(&["-f", "-e", "trace=splice,epoll_wait,epoll_pwait"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let options = ["--plain", &listener.local_addr().unwrap().to_string(), "--lazy=no"];
    let start = Start { options: &options, program: Some(&[]), shape: Shape::Listener, ..Start::USUAL };
    let mut door = Door::open(&Start { through: &trace.through(), ..start });
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"220 daemon\r\n").unwrap();
    let client = door.client.as_mut().unwrap();
    client.get(b"220 daemon\r\n").unwrap();
    let reader = thread::spawn(move || {
        let (mut octets, mut count) = (vec![0; 1 << 20], 0);
        while let Ok(more @ 1..) = server.read(&mut octets) {
            count += more;
        }
        count
    });
    client.send(&[b"DATA\r\n", &vec![b'x'; MUCH][..]].concat());
    client.end();
    assert_eq!(reader.join().unwrap(), MUCH + 6);
    door.kill(Signal::TERM);
    assert_eq!(door.code(), 0, "{}", door.said());
    let (mut turn, mut longest, mut moved) = (0, 0, 0);
    for line in trace.log().lines() {
        let count = || line.rsplit_once("= ").and_then(|(_, count)| count.parse::<usize>().ok()).unwrap_or_default();
        match line {
            _ if line.contains("splice") => turn += count(),
            _ if line.contains("epoll_") => (moved, longest, turn) = (moved + turn, longest.max(turn), 0),
            _ => {}
        }
    }
    assert!(moved > 2 * MUCH - MUCH / 8 && longest < 8 << 20, "{longest} octets in a turn, of {moved}");
}

#[test]
fn a_daemon_takes_the_place_of_prog() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut door = plain(&format!("unix:{}", path.display()), "--lazy=no");
    let server = thread::spawn(move || serve(listener.accept().unwrap().0, true));
    pass_through(&mut door, b"220 daemon\r\n");
    assert!(server.join().unwrap().starts_with(b"DATA"));
    assert!(wait_until(PATIENCE, || door.said().contains(" end=\"over\" mode=plain")), "{}", door.said());
    door.kill(Signal::TERM);
    assert_eq!(door.code(), 0);
}

#[test]
fn a_daemon_is_come_to_late_by_tcp_too_and_told_the_hello() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || -> Vec<Vec<u8>> {
        (0..4).map(|number| serve(listener.accept().unwrap().0, number > 1)).collect()
    });
    let mut door = plain(&place, "--lazy");
    assert!(wait_until(PATIENCE, || door.said().contains(CERTAIN)), "{}", door.said());
    pass_through(&mut door, b"220 daemon\r\n");
    door.connect();
    let client = door.client.as_mut().unwrap();
    client.send(b"EHLO c\r\nMAIL FROM:<a@b>\r\n");
    client.get(b"220 daemon\r\n250-daemon\r\n250 STARTTLS\r\n250 daemon\r\n").unwrap();
    client.send(b"QUIT\r\n");
    client.get(b"221 bye\r\n").unwrap();
    assert_eq!(client.get_end(), Ok(End::Clean));
    let heard = server.join().unwrap();
    assert_eq!(heard[3], b"EHLO c\r\nMAIL FROM:<a@b>\r\nQUIT\r\n");
}

#[test]
fn a_daemon_that_is_gone_is_421_for_who_needs_it() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || (0..2).for_each(|_| drop(serve(listener.accept().unwrap().0, false))));
    let mut door = plain(&format!("unix:{}", path.display()), "--lazy");
    assert!(wait_until(PATIENCE, || door.said().contains(CERTAIN)), "{}", door.said());
    server.join().unwrap();
    // Another test's fork may hold the listener until its exec.
    assert!(wait_until(PATIENCE, || UnixStream::connect(&path).is_err()));
    let client = door.client.as_mut().unwrap();
    client.send(b"NOOP\r\nMAIL FROM:<>\r\n");
    client.get(b"220 daemon\r\n250 daemon\r\n421 4.3.0 Mail server not available\r\n").unwrap();
    let count = |door: &Door, words: &str| door.said().lines().filter(|line| line.contains(words)).count();
    assert!(wait_until(PATIENCE, || count(&door, "who needs it hears 421") == 1), "probed at once: {}", door.said());
    for _ in 0..9 {
        door.connect();
        let client = door.client.as_mut().unwrap();
        client.send(b"MAIL FROM:<>\r\n");
        client.get(b"220 daemon\r\n421 4.3.0 Mail server not available\r\n").unwrap();
    }
    let ends = " end=\"child not started: ";
    assert!(wait_until(PATIENCE, || count(&door, ends) == 10), "a summary each: {}", door.said());
    assert_eq!(count(&door, ": child not started: "), 1, "a warning a minute: {}", door.said());
    let listener = {
        fs::remove_file(&path).unwrap();
        UnixListener::bind(&path).unwrap()
    };
    // A probe may come before the client, and another behind it.
    thread::spawn(move || listener.incoming().for_each(|client| drop(serve(client.unwrap(), false))));
    door.connect();
    let client = door.client.as_mut().unwrap();
    client.send(b"MAIL FROM:<>\r\nQUIT\r\n");
    client.get(b"220 daemon\r\n250 daemon\r\n221 bye\r\n").unwrap();
}

/// Ten clients of a server that fails each of them: a 421 and a summary for each, and one warning.
fn is_a_line_a_minute(door: &mut Door, line: &[u8], end: &str) {
    for _ in 0..10 {
        door.connect();
        let client = door.client.as_mut().unwrap();
        client.send(line);
        let (said, _) = client.rest().unwrap();
        assert!(said.ends_with(b"421 4.3.0 Mail server not available\r\n"), "{end}: {}", said.escape_ascii());
    }
    let count = |words: &str| door.said().matches(words).count();
    assert!(wait_until(PATIENCE, || count(&format!(" end=\"{end}\" ")) == 10), "a summary each: {}", door.said());
    assert_eq!(count("]: warning: client="), 1, "a warning a minute: {}", door.said());
    assert_eq!(count(&format!(": {end}\n")), 1, "{}", door.said());
}

#[test]
fn a_server_that_fails_everybody_is_a_line_a_minute_however_it_does() {
    for (lazy, line, word, end) in [
        ("--lazy", &b"MAIL FROM:<>\r\n"[..], &b""[..], "child is not what was learned of it: it closed"),
        ("--lazy", b"MAIL FROM:<>\r\n", b"554 no\r\n", "child is not what was learned of it: it greeted with 554"),
        ("--lazy=no", b"", b"", "child closed"),
        ("--lazy=no", b"", b"451 later\r\n", "child closed"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = listener.local_addr().unwrap().to_string();
        thread::spawn(move || {
            let probes = if lazy == "--lazy" { 2 } else { 0 };
            (0..probes).for_each(|_| drop(serve(listener.accept().unwrap().0, false)));
            listener.incoming().for_each(|client| drop(client.unwrap().write_all(word)));
        });
        let options = ["--plain", &place, lazy];
        let start = Start { options: &options, program: Some(&[]), shape: Shape::Listener, ..Start::USUAL };
        let mut door = Door::start(&start);
        let begun = if lazy == "--lazy" { CERTAIN } else { "listening on " };
        assert!(wait_until(PATIENCE, || door.said().contains(begun)), "{}", door.said());
        is_a_line_a_minute(&mut door, line, end);
    }
    let start = Start { program: Some(&["/bin/true"]), shape: Shape::Listener, ..Start::USUAL };
    is_a_line_a_minute(&mut Door::start(&start), b"", "child closed");
}

#[test]
fn what_can_t_be_meant_is_refused() {
    let program = env!("CARGO_BIN_EXE_starttls-wrapper");
    for (words, said) in [
        ("--plain unix:/s --way keep", "--plain is a listener's"),
        ("--lazy --way keep p", "--lazy is a listener's"),
        ("--listen 127.0.0.1:25 --plain unix:/s --way keep p", "--plain stands for PROG"),
        ("--listen 127.0.0.1:25 --plain unix: --way keep", "unix: wants a path"),
        ("--listen 127.0.0.1:25 --plain ::1:25 --way keep", "--plain wants HOST:PORT"),
        ("--listen 127.0.0.1:25 --plain h:0 --way keep", "--plain wants HOST:PORT"),
        ("--listen 127.0.0.1:25 --plain :25 --way keep", "--plain wants HOST:PORT"),
        ("--listen 127.0.0.1:25 --lazy=maybe --way keep p", "--lazy takes nothing, =yes or =no"),
    ] {
        let out = Command::new(program).args(words.split(' ')).env_clear().output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(100), "{words}: {stderr}");
        assert!(stderr.contains(said), "{words}: {stderr}");
    }
}
