//! A listener (`--listen`) between real programs: as whom PROG runs, whom systemd starts, and what it does under them.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use starttls_wrapper::cli::{LISTENER_VARIABLES, OWN_VARIABLES};

use crate::backends::stunnel;
use crate::clients::{Mode, swaks};
use crate::front::{Identity, wrapper};
use crate::letter::{Queue, letter};
use crate::privileges::QmailHome;
use crate::stage::{PATIENCE, Stage, needs_root};

/// Users that exist on no machine.
const SMTPD: u32 = 64020;
const SMTPD_GROUP: u32 = 64023;
const TLS: u32 = 64022;

/// A listener at this address, under root, with each program under the ids that it is to have.
fn listen(stage: &Stage, identity: &Identity, home: &QmailHome, server: SocketAddrV4, at: SocketAddrV4) {
    fs::set_permissions(&identity.key, fs::Permissions::from_mode(0o600)).expect("chmod");
    let options = ["-v", "--listen", &at.to_string()];
    let mut command = stage.command(wrapper(identity, &options, server, &["mailfront", "smtp", "qmail", "accept"]));
    drops(command.env("QMAILHOME", home.folder()));
    stage.start_until("front", &mut command, "listen", || {
        stage.log("front").contains("is started when a client needs it")
    });
}

fn drops(command: &mut Command) {
    for (name, id) in [("UID", SMTPD), ("GID", SMTPD_GROUP), ("TLS_UID", TLS), ("TLS_GID", TLS)] {
        command.env(name, id.to_string());
    }
}

#[test]
fn prog_delivers_through_a_setuid_program_as_uid_and_the_listener_as_nobody() {
    let stage = Stage::new();
    let (identity, home, backend) =
        (Identity::self_signed(&stage, "own"), QmailHome::new(&stage), Queue::new(&stage, "backend"));
    let server = stunnel(&stage, &identity, "TLSv1.3", &backend);
    let at = stage.unused_port();
    listen(&stage, &identity, &home, server, at);
    let text = letter("listener");
    swaks(&stage, at, Mode::Clear, &identity, &text);
    home.holds(&text);
    swaks(&stage, at, Mode::Tls13, &identity, &text);
    backend.holds(&text);
}

/// What /proc says of all four processes once PROG has been heard.
#[test]
fn uid_and_gid_are_progs_and_nothing_of_ours_is() {
    needs_root();
    let stage = Stage::new();
    let (identity, home) = (Identity::self_signed(&stage, "own"), QmailHome::new(&stage));
    let at = stage.unused_port();
    listen(&stage, &identity, &home, stage.unused_port(), at);
    let mut client = TcpStream::connect(at).expect("connect");
    client.set_read_timeout(Some(PATIENCE)).expect("time-out");
    client.write_all(b"EHLO a\r\nMAIL FROM:<a@b.example>\r\n").expect("write");
    let mut replies = Vec::new();
    // The greeting, EHLO's last line, and MAIL's reply: PROG's own.
    while String::from_utf8_lossy(&replies).lines().filter(|line| line.as_bytes().get(3) == Some(&b' ')).count() < 3 {
        let mut octets = [0; 256];
        let count = client.read(&mut octets).expect("a reply");
        assert!(count > 0, "{}", String::from_utf8_lossy(&replies));
        replies.extend_from_slice(&octets[..count]);
    }
    let one = |name: &str| match stage.processes_named(name)[..] {
        [pid] => pid,
        _ => panic!("one {name}"),
    };
    let field = |name: &str, field: &str| {
        let status = fs::read_to_string(format!("/proc/{}/status", one(name))).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let four = |id: u32| vec![id.to_string(); 4];
    for (name, uid, gid, gains) in [
        ("mailfront", SMTPD, SMTPD_GROUP, "0"),
        ("spawner", SMTPD, SMTPD_GROUP, "0"),
        ("opener", 0, 0, "0"),
        ("starttls-wrapp", TLS, TLS, "1"),
    ] {
        assert_eq!((field(name, "Uid:"), field(name, "Gid:")), (four(uid), four(gid)), "{name}");
        assert_eq!(field(name, "NoNewPrivs:"), [gains], "{name}");
        if name != "opener" {
            assert!(field(name, "Groups:").iter().all(|group| *group == gid.to_string()), "{name}: root's groups");
        }
    }
    let prog = one("mailfront");
    let signals = |name: &str| u64::from_str_radix(&field("mailfront", name).concat(), 16).expect("a mask");
    // Signals 32 and 33 are the C library's own.
    assert_eq!((signals("SigBlk:"), signals("SigIgn:") & !0x1_8000_0000), (0, 0));
    let environment = fs::read(format!("/proc/{prog}/environ")).expect("environment");
    let has =
        |name: &str| environment.split(|&octet| octet == 0).any(|line| line.starts_with(format!("{name}=").as_bytes()));
    assert!(has("TCPREMOTEIP") && has("QMAILHOME"));
    assert!(!OWN_VARIABLES.iter().chain(&LISTENER_VARIABLES).any(|name| has(name)));
    let mut open: Vec<_> =
        fs::read_dir(format!("/proc/{prog}/fd")).expect("fds").map(|fd| fd.expect("fd").file_name()).collect();
    open.sort();
    assert_eq!(open, ["0", "1", "2"]);
}

/// systemd-socket-activate starts its program with the first client, and then stands aside.
#[test]
fn systemds_socket_is_served_with_letters() {
    let stage = Stage::new();
    let (identity, home, backend) =
        (Identity::self_signed(&stage, "own"), QmailHome::new(&stage), Queue::new(&stage, "backend"));
    let server = stunnel(&stage, &identity, "TLSv1.3", &backend);
    let at = stage.unused_port();
    let argv = wrapper(&identity, &["--listen", "systemd"], server, &["mailfront", "smtp", "qmail", "accept"]);
    let mut command = stage.command(["systemd-socket-activate"]);
    for (name, id) in [("UID", SMTPD), ("GID", SMTPD_GROUP), ("TLS_UID", TLS), ("TLS_GID", TLS)] {
        command.arg(format!("--setenv={name}={id}"));
    }
    command.arg(format!("--setenv=QMAILHOME={}", home.folder().display())).arg("--setenv=PATH");
    command.arg(format!("--listen={}:{}", at.ip(), at.port())).args(argv);
    stage.start("front", &mut command, at);
    let text = letter("activated");
    swaks(&stage, at, Mode::Clear, &identity, &text);
    home.holds(&text);
    swaks(&stage, at, Mode::Tls13, &identity, &text);
    backend.holds(&text);
    assert!(stage.log("front").contains("listening on fd:3="), "{}", stage.log("front"));
}
