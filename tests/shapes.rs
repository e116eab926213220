//! The client's descriptors in every shape that a UCSPI server, an inetd, a shell or a supervisor gives them, and what else
//! a process inherits: the flags of shared open files, signals, further descriptors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod support;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::process::Signal;

use child::Child;
use door::{Door, Shape, Start};
use octets::Octets;
use steps::{At, Standing, all_of, ask_child};
use support::*;
use wire::{End, PATIENCE};

/// Every shape that is a stream.
const STREAMS: [Shape; 4] = [Shape::Tcp, Shape::Inetd, Shape::Pair, Shape::Pipes];

#[test]
fn starttls_works_through_every_shape_of_stream() {
    all_of(&STREAMS, |&shape| {
        let Standing { mut door, child, .. } = Standing::at(At::RelayTls, &Start { shape, ..Start::default() });
        let client = door.client.as_mut().unwrap();
        client.send(b"QUIT\r\n");
        let backend = door.backend.wire().unwrap();
        backend.get(b"QUIT\r\n").unwrap();
        backend.send(b"221 2.0.0 Bye\r\n");
        backend.end();
        client.get(b"221 2.0.0 Bye\r\n").unwrap();
        assert_eq!(client.get_end(), Ok(End::Clean));
        client.end();
        assert_eq!(door.code(), 0, "{}", door.said());
        assert!(child.is_gone(PATIENCE));
    });
}

#[test]
fn plain_mail_goes_through_every_shape_of_stream() {
    all_of(&STREAMS, |&shape| {
        for relay in ["splice", "copy"] {
            let start = Start { shape, options: &["--relay", relay], ..Start::default() };
            let Standing { mut door, mut child, .. } = Standing::at(At::RelayPlain, &start);
            let (client, there) = (door.client.as_mut().unwrap(), child.wire());
            let (to, from) = (|| Octets::new(1, 1 << 20), || Octets::new(2, 1 << 20));
            std::thread::scope(|scope| {
                let mut there = there;
                let child_side = scope.spawn(move || there.exchange(&mut from(), &mut to(), PATIENCE));
                client.exchange(&mut to(), &mut from(), PATIENCE).unwrap_or_else(|why| panic!("{relay}: {why}"));
                child_side.join().unwrap().unwrap_or_else(|why| panic!("{relay}: child: {why}"));
            });
            client.end();
            child.get_end().unwrap();
            child.exit(0);
            assert_eq!(client.get_end(), Ok(End::Clean));
            assert_eq!(door.code(), 0, "{}", door.said());
        }
    });
}

#[test]
fn the_edited_ehlo_reply_and_the_220_leave_in_one_write_each() {
    let mut door = Door::open(&Start { shape: Shape::Packets, ..Start::default() });
    door.backend.listen();
    let mut child = Child::accept(&door.puppets).unwrap();
    child.send(b"220 mail.example ESMTP\r\n");
    let client = door.client.as_mut().unwrap();
    assert_eq!(client.piece().unwrap(), b"220 mail.example ESMTP\r\n");
    client.send(b"EHLO client.example\r\n");
    child.get(b"EHLO client.example\r\n").unwrap();
    for octet in b"250-mail.example\r\n250-PIPELINING\r\n250 8BITMIME\r\n" {
        child.send(&[*octet]);
    }
    let edited = client.piece().unwrap();
    assert_eq!(edited, b"250-mail.example\r\n250-STARTTLS\r\n250-PIPELINING\r\n250 8BITMIME\r\n");
    client.send(b"STARTTLS\r\n");
    let backend = door.backend.wire().unwrap();
    backend.send(b"220 secure.example ESMTP\r\n");
    backend.get(b"EHLO client.example\r\n").unwrap();
    // What the child says late must not come behind the 220.
    child.send(b"421 4.4.2 Late\r\n");
    backend.send(b"250 secure.example\r\n");
    let ready = client.piece().unwrap();
    assert_eq!(ready, b"220 2.0.0 Ready to start TLS\r\n");
    child.get(b"QUIT\r\n").unwrap();
    child.exit(0);
}

/// The program with whatever a shell makes of its descriptors; its output where that is a file of ours.
fn shell(words: &str, door_words: &[&str]) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", words, "sh", env!("CARGO_BIN_EXE_starttls-wrapper"), "127.0.0.1", "9"]).args(door_words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn a_client_that_is_dev_null_is_greeted_and_gone() {
    let output = shell("exec \"$@\" </dev/null", &["/bin/sh", "-c", "echo 220 hello; exec cat"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "220 hello\n");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn a_file_of_commands_is_served_and_relayed() {
    let folder = tempfile::TempDir::new().unwrap();
    let commands = folder.path().join("commands");
    let mail = format!("EHLO c\r\nMAIL FROM:<>\r\n{}", "relayed\r\n".repeat(20_000));
    fs::write(&commands, &mail).unwrap();
    let mut command = shell("exec \"$@\"", &["/bin/sh", "-c", "echo 220 hello; echo 250 hello; exec cat"]);
    let output = command.stdin(File::open(&commands).unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.starts_with("220 hello\n250 hello\n"), "{}", &said[..said.len().min(200)]);
    assert!(said.ends_with(&mail["EHLO c\r\n".len()..]), "{} octets of {}", said.len(), mail.len());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn closed_descriptors_0_and_1_end_the_session_at_once() {
    for words in ["exec \"$@\" <&-", "exec \"$@\" >&-", "exec \"$@\" <&- >&-"] {
        let output = shell(words, &["/bin/sh", "-c", "echo 220 hello; cat"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{words}: {output:?}");
    }
}

#[test]
fn a_closed_descriptor_2_harms_nobody() {
    for relay in ["splice", "copy"] {
        let options = ["-vv", "--relay", relay];
        let through = ["/bin/sh", "-c", "exec \"$@\" 2>&-", "sh"];
        let start = Start { through: &through, options: &options, ..Start::default() };
        let Standing { mut door, mut child, .. } = Standing::at(At::RelayPlain, &start);
        assert_eq!(child.report.fds, "0 1 2");
        ask_child(&mut door, &mut child, "DATA\r\n", "354 Go\r\n").unwrap();
        let client = door.client.as_mut().unwrap();
        client.end();
        child.get_end().unwrap();
        child.exit(0);
        assert_eq!(client.get_end(), Ok(End::Clean));
        assert_eq!(door.code(), 0);
    }
}

#[test]
fn the_log_never_reaches_a_client_that_is_descriptor_2() {
    let program = ["/bin/sh", "-c", "echo complaint >&2; echo 220 hello; read line; echo 221 bye; echo complaint >&2"];
    let start = Start { shape: Shape::Inetd, options: &["-vv"], program: Some(&program), ..Start::default() };
    let mut door = Door::open(&start);
    let client = door.client.as_mut().unwrap();
    client.send(b"QUIT\r\n");
    assert_eq!(client.rest().unwrap(), (b"220 hello\n221 bye\n".to_vec(), End::Clean));
    assert_eq!(door.code(), 0);
}

#[test]
fn the_log_never_reaches_a_client_whose_socket_is_descriptors_1_and_2_alone() {
    let mut door = Door::open(&Start {
        shape: Shape::Inetd,
        through: &["/bin/sh", "-c", "exec \"$@\" </dev/null", "sh"],
        program: Some(&["/bin/sh", "-c", "echo 220 hello; exec cat"]),
        ..Start::default()
    });
    assert_eq!(door.client.as_mut().unwrap().rest().unwrap(), (b"220 hello\n".to_vec(), End::Clean));
    assert_eq!(door.code(), 1);
}

#[test]
fn flags_of_a_shared_open_file_are_as_before_at_every_end() {
    let is_blocking = |fd: &OwnedFd| !fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK);
    let cases: Vec<_> =
        STREAMS.iter().flat_map(|&shape| [(shape, At::Snoop), (shape, At::RelayPlain), (shape, At::Gate)]).collect();
    all_of(&cases, |&(shape, at)| {
        for ended in [true, false] {
            let standing = Standing::at(at, &Start { shape, keep: true, ..Start::default() });
            let kept = standing.door.kept.as_ref().unwrap().try_clone().unwrap();
            if !ended {
                standing.door.kill(Signal::TERM);
            }
            standing.close();
            assert!(is_blocking(&kept), "ended by the client: {ended}");
        }
    });
}

#[test]
fn flags_of_a_pipe_are_as_before_when_the_child_ends_first() {
    let mut standing = Standing::at(At::RelayPlain, &Start { shape: Shape::Pipes, keep: true, ..Start::default() });
    let kept = standing.door.kept.as_ref().unwrap().try_clone().unwrap();
    standing.child.exit(0);
    assert!(standing.child.is_gone(PATIENCE));
    standing.close();
    assert!(!fcntl_getfl(&kept).unwrap().contains(OFlags::NONBLOCK));
}

#[test]
fn a_client_that_is_stderr_too_never_hears_what_is_wrong_with_the_command_line() {
    use std::io::Read;
    for (words, variable, code) in
        [(&["--bogus", "h", "1", "true"][..], "", 100), (&["h", "1", "/bin/true"], "a=b=c", 111)]
    {
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let end = || OwnedFd::from(theirs.try_clone().unwrap());
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_starttls-wrapper"));
        command.args(words).env("RUST_LOG", variable).stdin(end()).stdout(end()).stderr(end());
        let mut program = command.spawn().unwrap();
        drop(command);
        drop(theirs);
        assert_eq!(program.wait().unwrap().code(), Some(code), "{words:?}");
        let mut heard = String::new();
        ours.read_to_string(&mut heard).unwrap();
        assert!(
            !heard.contains("usage") && !heard.contains("invalid") && !heard.contains("starttls-wrapper"),
            "{heard}"
        );
    }
}

#[test]
fn a_wrong_command_line_is_one_line_on_stderr_and_100() {
    let cases = [
        &[][..],
        &["--bogus", "h", "1", "true"],
        &["h", "1"],
        &["h", "nonsense", "true"],
        &["--way", "nonsense", "h", "1", "true"],
        &["--cert"],
    ];
    all_of(&cases, |words| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_starttls-wrapper"));
        let output = command.args(*words).env_clear().stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.starts_with("starttls-wrapper: ") && said.ends_with('\n') && said.lines().count() == 1, "{said}");
        assert_eq!((output.status.code(), &*output.stdout), (Some(100), &b""[..]), "{said}");
    });
}

#[test]
fn a_non_blocking_open_file_stays_so() {
    let standing = Standing::at(At::Ungreeted, &Start { keep: true, ..Start::default() });
    let kept = standing.door.kept.as_ref().unwrap().try_clone().unwrap();
    standing.close();
    rustix::fs::fcntl_setfl(&kept, fcntl_getfl(&kept).unwrap() | OFlags::NONBLOCK).unwrap();
    let output = shell("exec \"$@\"", &["/bin/echo", "220 hello"]).stdin(kept.try_clone().unwrap()).output().unwrap();
    assert!(fcntl_getfl(&kept).unwrap().contains(OFlags::NONBLOCK), "{output:?}");
}

#[test]
fn the_childs_pipes_are_blocking() {
    let standing = Standing::at(At::Snoop, &Start::default());
    for fd in standing.child.fds() {
        assert!(!fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
    }
    assert_eq!(standing.close(), 1);
}

#[test]
fn inherited_blocked_and_ignored_signals_do_not_disturb() {
    let through = ["/usr/bin/env", "--ignore-signal=CHLD,TERM,INT,PIPE", "--block-signal=TERM,INT,CHLD,ALRM"];
    all_of(&[At::Snoop, At::RelayPlain, At::Gate], |&at| {
        let standing = Standing::at(at, &Start { through: &through, ..Start::default() });
        let signals = &standing.child.report.signals;
        assert!(signals.contains("SigBlk:\t0000000000000000"), "{signals}");
        standing.door.kill(Signal::TERM);
        assert_eq!(standing.close(), 0);
    });
}

#[test]
fn further_inherited_descriptors_are_not_the_childs() {
    let through = ["/bin/sh", "-c", "exec 3</dev/null 7>/dev/null 9<>/dev/null; exec \"$@\"", "sh"];
    let standing = Standing::at(At::Snoop, &Start { through: &through, ..Start::default() });
    assert_eq!(standing.child.report.fds, "0 1 2");
    standing.close();
}

#[test]
fn a_child_that_ends_closes_the_clients_pipe() {
    let mut door = Door::open(&Start { shape: Shape::Pipes, ..Start::default() });
    let mut child = Child::accept(&door.puppets).unwrap();
    steps::greet(&mut door, &mut child).unwrap();
    ask_child(&mut door, &mut child, "MAIL FROM:<>\r\n", "421 4.3.0 Sorry\r\n").unwrap();
    child.exit(0);
    assert_eq!(door.client.as_mut().unwrap().get_end(), Ok(End::Clean));
    assert_eq!(door.code(), 0);
}

#[test]
fn tls_bulk_goes_through_pipes() {
    let start = Start { shape: Shape::Pipes, ..Start::default() };
    let Standing { mut door, .. } = Standing::at(At::RelayTls, &start);
    let (client, backend) = (door.client.as_mut().unwrap(), door.backend.wire().unwrap());
    let (to, from) = (|| Octets::new(1, 1 << 20), || Octets::new(2, 1 << 20));
    std::thread::scope(|scope| {
        let there = scope.spawn(move || backend.exchange(&mut from(), &mut to(), PATIENCE));
        client.exchange(&mut to(), &mut from(), PATIENCE).unwrap();
        there.join().unwrap().unwrap();
    });
}
