//! `--mute`: PROG behind somebody's TLS, for a client that a wrapper has greeted: no second greeting, the replay of what is told,
//! the gate, and the relay.

use std::io::Write;
use std::process::{Command, Stdio};

use starttls_wrapper::session::Way;

use crate::bulk::{ENOUGH, both_ways};
use crate::child::Child;
use crate::door::{Door, Shape, Start};
use crate::steps::all_of;
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

const MUTE: Start<'_> = Start { certificate: false, shape: Shape::Pipes, host: "", way: Way::Mute, ..Start::USUAL };

fn open(start: &Start<'_>) -> (Door, Child) {
    let door = Door::open(start);
    let child = Child::accept(&door.puppets).unwrap_or_else(|why| panic!("{why}: {}", door.said()));
    (door, child)
}

#[test]
fn the_greeting_is_swallowed_and_the_gate_holds_until_ehlo() {
    for shape in [Shape::Pipes, Shape::Tcp, Shape::Pair] {
        let (mut door, mut child) = open(&Start { shape, ..MUTE });
        let client = door.client.as_mut().unwrap();
        // It does not wait: its first commands are there before the greeting.
        client.send(b"MAIL FROM:<>\r\nEHLO client.example\r\n");
        child.send(b"220 mail.example ESMTP\r\n");
        client.get(b"503 5.5.1 Send EHLO first\r\n").unwrap();
        child.get(b"EHLO client.example\r\n").unwrap();
        child.send(b"250-mail.example\r\n250 SIZE\r\n");
        client.get(b"250-mail.example\r\n250 SIZE\r\n").unwrap();
        both_ways(client, &mut child.wire(), ENOUGH);
        client.end();
        assert_eq!(child.rest().unwrap(), b"");
        child.exit(0);
        let client = door.client.as_mut().unwrap();
        assert_eq!(client.get_end(), Ok(End::Clean));
        assert_eq!(door.code(), 0);
        assert!(wait_until(PATIENCE, || door.said().contains("mode=mute")), "{}", door.said());
        assert!(child.is_gone(PATIENCE));
    }
}

#[test]
fn what_it_is_told_is_replayed_and_swallowed() {
    let told = [("STARTTLS_REPLAY", "EHLO client.example\r\nNOOP\nVRFY someone\n")];
    let (mut door, mut child) = open(&Start { environment: &told, ..MUTE });
    child.send(b"220 mail.example ESMTP\r\n");
    for command in ["EHLO client.example\r\n", "NOOP\r\n", "VRFY someone\r\n"] {
        child.get(command.as_bytes()).unwrap();
        child.send(b"252 As you say\r\n");
    }
    let client = door.client.as_mut().unwrap();
    client.send(b"HELO client.example\r\n");
    child.get(b"HELO client.example\r\n").unwrap();
    child.send(b"250 mail.example\r\n");
    client.get(b"250 mail.example\r\n").unwrap();
    assert!(!child.report.environment.iter().any(|variable| variable.starts_with("STARTTLS_REPLAY")));
    client.end();
    let _ = child.rest();
    child.exit(0);
    assert_eq!(door.code(), 0);
}

#[test]
fn nothing_of_a_mail_is_ever_replayed() {
    for told in
        ["MAIL FROM:<>", "EHLO a\nAUTH PLAIN x", "NOOP\rMAIL FROM:<>", " EHLO a", "QUIT", "XCLIENT ADDR=1.2.3.4"]
    {
        let mut door = Door::open(&Start { environment: &[("STARTTLS_REPLAY", told)], ..MUTE });
        assert_eq!(door.code(), 100, "{told}: {}", door.said());
    }
}

#[test]
fn a_prog_that_gives_no_service_is_a_421_and_told() {
    all_of(&["554 5.3.2 No service\r\n", "", "hello\r\n"], |greeting| {
        let (mut door, mut child) = open(&MUTE);
        child.send(greeting.as_bytes());
        if greeting.is_empty() {
            child.exit(0);
        }
        let client = door.client.as_mut().unwrap();
        client.get(b"421 4.3.0 Mail server not available\r\n").unwrap();
        assert_eq!(client.get_end(), Ok(End::Clean));
        child.exit(0);
        assert_eq!(door.code(), 111);
        assert!(door.said().contains("way mute, backend greeting failed"), "{}", door.said());
    });
}

/// Whether a client is muted, by the port that it has dialled: a wrapper's or that of implicit TLS.
#[test]
fn only_who_comes_from_a_wrapper_is_muted() {
    let cases = [
        ("--mute", Some("25"), true),
        ("--mute", Some("587"), true),
        ("--mute", Some("465"), false),
        ("--mute", Some("smtp"), false),
        ("--mute", None, false),
        ("--mute=2525,25", Some("2525"), true),
        ("--mute=2525", Some("25"), false),
        ("--mute=always", None, true),
    ];
    for (option, port, is_muted) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_starttls-wrapper"));
        command.arg(option).args(["/bin/sh", "-c", "echo 220 hello; read x; echo 250 $x"]);
        command.env_remove("TCPLOCALPORT").envs(port.map(|port| ("TCPLOCALPORT", port)));
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = pipes.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"EHLO a\r\n").unwrap();
        let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap().replace('\r', "");
        assert_eq!(said, if is_muted { "250 EHLO a\n" } else { "220 hello\n250 EHLO a\n" }, "{option} {port:?}");
    }
}

#[test]
fn a_prog_that_says_more_than_it_was_asked_is_given_up_and_none_of_it_comes_through() {
    let cases: [(&[u8], &[u8]); 4] = [
        (b"220 mail.example\r\n250 injected\r\n", b""),
        (b"220 mail.example\r\n", b"250 mail.example\r\n250 injected\r\n"),
        (b"220 mail.example\r\n", b"354 injected\r\n"),
        (b"220 mail.example\r\n", b"250-mail.example\r\n250 STARTTLS\r\n"),
    ];
    all_of(&cases, |(greeting, answer)| {
        let (mut door, mut child) = open(&Start { environment: &[("STARTTLS_REPLAY", "EHLO a")], ..MUTE });
        child.send(greeting);
        if !answer.is_empty() {
            child.get(b"EHLO a\r\n").unwrap();
            child.send(answer);
        }
        let client = door.client.as_mut().unwrap();
        assert_eq!(client.rest().unwrap().0, b"421 4.3.0 Mail server not available\r\n");
        child.exit(0);
        assert_eq!(door.code(), 111, "{}", door.said());
    });
}

#[test]
fn a_replay_beyond_all_measure_is_a_421() {
    let told = "NOOP 0123456789012345678901234567890123456789\n".repeat(2000);
    let (mut door, mut child) = open(&Start { environment: &[("STARTTLS_REPLAY", &told)], ..MUTE });
    let client = door.client.as_mut().unwrap();
    assert_eq!(client.rest().unwrap().0, b"421 4.3.0 Mail server not available\r\n");
    child.exit(0);
    assert_eq!(door.code(), 111);
}

/// The client may say what it likes before PROG greets: it waits in the kernel, not with us.
#[test]
fn a_flood_before_the_greeting_is_not_remembered() {
    let (mut door, mut child) = open(&Start { shape: Shape::Tcp, options: &["--greeting-timeout", "2"], ..MUTE });
    let before = door.memory("VmHWM");
    let client = door.client.as_mut().unwrap();
    client.send(&b"NOOP\r\n".repeat(1 << 20));
    let (said, _) = client.rest().unwrap();
    assert!(said.is_empty() || said == b"421 4.3.0 Mail server not available\r\n", "{}", said.escape_ascii());
    let grown = door.memory("VmHWM") - before;
    // Of 6 MiB; the rest is code that is paged in at the end.
    assert!(grown < 1024, "{grown} KiB more");
    child.exit(0);
    assert_eq!(door.code(), 111);
}
