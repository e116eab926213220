//! What is special to s6-tcpserver: the run script of the README, and clients that come over IPv6.
//!
//! Debian has no s6-networking, so these are ignored until scripts/s6-tcpserver, which builds it, asks for them.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::backends::stunnel;
use crate::clients::{Mode, openssl_to, swaks};
use crate::front::{Identity, MAILFRONT, s6, sessions_ended_well, tcpserver_with, wrapper};
use crate::letter::{Queue, letter, pipelined_session};
use crate::mute::mutes_who_dialled_25;
use crate::privileges::QmailHome;
use crate::readme;
use crate::stage::{PATIENCE, Stage};

fn programs() -> PathBuf {
    s6().expect("S6 is not set; scripts/s6-tcpserver runs this test")
}

/// As root, to the letter but for names: TLS_UID and TLS_GID are those of the account that s6-setuidgid gives to PROG, and only root may
/// read the key.
#[test]
#[ignore = "s6-tcpserver is not in Debian: scripts/s6-tcpserver"]
fn the_readmes_run_script_delivers_both_ways() {
    let stage = Stage::new();
    let (identity, home, backend) =
        (Identity::self_signed(&stage, "own"), QmailHome::new(&stage), Queue::new(&stage, "backend"));
    fs::set_permissions(&identity.key, fs::Permissions::from_mode(0o600)).expect("chmod");
    let server = stunnel(&stage, &identity, "TLSv1.3", &backend);
    let at = stage.unused_port();
    let words = [
        ("/etc/ssl/mx.crt", identity.certificate.to_str().expect("a path")),
        ("/etc/ssl/mx.key", identity.key.to_str().expect("a path")),
        ("qmaild", "nobody"),
        ("s6-tcpserver 0.0.0.0 25", &format!("s6-tcpserver -v {} {}", at.ip(), at.port())),
        ("  starttls-wrapper", &format!("  '{}' -v", env!("CARGO_BIN_EXE_starttls-wrapper"))),
        ("127.0.0.1 465", &format!("{} {}", server.ip(), server.port())),
        ("/var/qmail/bin/qmail-smtpd", "mailfront smtp qmail accept"),
    ];
    let run = stage.write("run", readme::with(readme::block_behind("### s6\n"), &words));
    fs::set_permissions(&run, fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut command = stage.command([run]);
    command.env("QMAILHOME", home.folder()).env("PATH", format!("{}:/usr/sbin:/usr/bin", programs().display()));
    stage.start("front", &mut command, at);

    let mut client = TcpStream::connect(at).expect("connect");
    client.set_read_timeout(Some(PATIENCE)).expect("time-out");
    client.write_all(b"HELP\r\n").expect("write");
    let mut greeting_and_reply = BufReader::new(&client).lines();
    assert!(greeting_and_reply.by_ref().take(2).all(|line| line.is_ok()), "the client was heard");
    let [wrapper] = stage.processes_named("starttls-wrapp")[..] else { panic!("one wrapper") };
    let status = fs::read_to_string(format!("/proc/{wrapper}/status")).expect("status");
    let nobody = ["65534"; 4].join("\t");
    assert!(status.contains(&format!("\nUid:\t{nobody}\n")), "{status}");
    drop(client);

    let text = letter("by-the-readme");
    swaks(&stage, at, Mode::Clear, &identity, &text);
    home.holds(&text);
    swaks(&stage, at, Mode::Tls13, &identity, &text);
    backend.holds(&text);
}

#[test]
#[ignore = "s6-tcpserver is not in Debian: scripts/s6-tcpserver"]
fn a_client_over_ipv6_is_served_in_clear_and_through_tls() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let (child, backend) = (Queue::new(&stage, "child"), Queue::new(&stage, "backend"));
    let server = stunnel(&stage, &identity, "TLSv1.3", &backend);
    let mut command =
        stage.command([programs().join("s6-tcpserver").as_os_str(), "-v".as_ref(), "::1".as_ref(), "0".as_ref()]);
    command.args(wrapper(&identity, &[], server, &MAILFRONT)).env("QUEUEDIR", child.folder());
    let port = || {
        let log = stage.log("front");
        let (_, port) = log.lines().next()?.split_once("bound to ip ::1 port ")?;
        port.parse::<u16>().ok()
    };
    stage.start_until("front", &mut command, "listen on ::1", || port().is_some());
    let port = port().expect("a port");
    let (clear, secret) = (letter("in-clear"), letter("through-tls"));

    let mut client = TcpStream::connect(("::1", port)).expect("connect");
    client.set_read_timeout(Some(PATIENCE)).expect("time-out");
    client.write_all(&pipelined_session(&clear)).expect("write");
    let mut replies = String::new();
    client.read_to_string(&mut replies).expect("replies");
    assert!(replies.contains("\n221 "), "{replies}");
    child.holds(&clear);

    openssl_to(&stage, &format!("[::1]:{port}"), Mode::Tls13, &identity, &secret);
    backend.holds(&secret);
    sessions_ended_well(&stage);
    let log = stage.log("front");
    assert_eq!(log.matches("client=[::1]:").count(), 2, "{log}");
}

/// It reads the header before tlswrapper ends the client's TLS, and knows both versions.
#[test]
#[ignore = "proxy-server is not in Debian: scripts/s6-tcpserver"]
fn proxy_server_reads_the_header_and_the_greeting_is_swallowed() {
    for version in ["v1", "v2"] {
        mutes_who_dialled_25(version, &[programs().join("proxy-server").into()], &[]);
    }
}

/// The server that the way is made for, in the place and with the arguments of smtpd-starttls-proxy-io.
#[test]
#[ignore = "s6-ucspitlsd is not in Debian: scripts/s6-tcpserver, with libbearssl-dev"]
fn s6_ucspitlsd_does_the_tls_of_both_its_ways() {
    for way in ["ucspi-tls", "ucspi-tls-respawn"] {
        for mode in [Mode::Clear, Mode::Tls12] {
            let stage = Stage::new();
            let (identity, queue) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "child"));
            let mut argv = vec![programs().join("s6-ucspitlsd").into(), "-K30000".into(), "--".into()];
            argv.extend([env!("CARGO_BIN_EXE_starttls-wrapper"), "--way", way, "--"].map(OsString::from));
            argv.extend(MAILFRONT.map(OsString::from));
            let at = tcpserver_with(&stage, "front", &[], &argv, |command| {
                command.env("QUEUEDIR", queue.folder());
                command.env("CERTFILE", &identity.certificate).env("KEYFILE", &identity.key);
            });
            let text = letter(way);
            swaks(&stage, at, mode, &identity, &text);
            queue.holds(&text);
            sessions_ended_well(&stage);
            let log = stage.log("front");
            let told = if mode == Mode::Clear { " mode=plain " } else { " mode=tls tls=TLSv1.2 suite=ECDHE-" };
            assert!(log.contains(told), "{log}");
        }
    }
}
