//! Command injection into STARTTLS (CVE-2011-0411 and its many successors), by the method of the USENIX Security 2021 study: send
//! `STARTTLS` and a command in one segment; if the server still starts TLS, whatever it says there unasked was injected.

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};

use crate::front::Front;
use crate::stage::{PATIENCE, Stage};
use crate::ways::{self, WAYS};

const REFUSAL: &str = "421 4.7.0 Bytes after STARTTLS, closing connection\r\n";

const COMMAND: &[u8] = b"EHLO commandinjectiontester\r\n";
const TRANSACTION: &[u8] =
    b"MAIL FROM:<injected@evil.example>\r\nRCPT TO:<injected@localhost>\r\nDATA\r\ninjected@\r\n.\r\n";
const CLIENT_HELLO: &[u8] = b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00";
const OCTET: &[u8] = b"\n";

fn connect(at: SocketAddrV4) -> TcpStream {
    let client = TcpStream::connect(at).expect("connect");
    client.set_read_timeout(Some(PATIENCE)).expect("time-out");
    client.set_nodelay(true).expect("no delay");
    client
}

/// Reads up to the end of a reply.
fn reply(client: &mut TcpStream) -> String {
    let mut text = String::new();
    loop {
        let mut octet = [0];
        client.read_exact(&mut octet).expect("a reply");
        text.push(octet[0] as char);
        let last = text.lines().last().unwrap_or_default();
        if text.ends_with('\n') && last.as_bytes().get(3) == Some(&b' ') {
            return text;
        }
    }
}

#[track_caller]
fn is_refused(behind: &[u8]) {
    let front = Front::new(&[]);
    is_refused_by(&front.stage, front.at, behind);
    assert!(!front.stage.log("stunnel").contains("injected@"), "{}", front.stage.log("stunnel"));
}

#[track_caller]
fn is_refused_by(stage: &Stage, at: SocketAddrV4, behind: &[u8]) {
    let mut client = connect(at);
    assert!(reply(&mut client).starts_with("220"));
    client.write_all(b"EHLO c\r\n").expect("write");
    assert!(reply(&mut client).contains("STARTTLS"));
    client.write_all(&[b"STARTTLS\r\n", behind].concat()).expect("write");
    let mut rest = String::new();
    client.read_to_string(&mut rest).expect("the end");
    assert_eq!(rest, REFUSAL);
    drop(client);
    stage.wait_until_childless("front");
    // Neither server saw the command: mailfront logs every envelope, and stunnel every connection.
    let log = stage.log("front");
    assert!(log.contains("127.0.0.1") || log.contains(&at.ip().to_string()), "the warning names the client:\n{log}");
    assert!(!log.contains("injected@"), "{log}");
}

#[test]
fn a_command_behind_starttls_is_refused() {
    is_refused(COMMAND);
}

#[test]
fn a_transaction_behind_starttls_is_refused() {
    is_refused(TRANSACTION);
}

#[test]
fn a_client_hello_behind_starttls_is_refused() {
    is_refused(CLIENT_HELLO);
}

#[test]
fn a_single_octet_behind_starttls_is_refused() {
    is_refused(OCTET);
}

#[test]
fn each_other_way_refuses_all_of_it_and_no_server_sees_any() {
    for way in &WAYS {
        let stage = Stage::new();
        let (_identity, at, behind, child) = ways::front(&stage, way);
        for injected in [COMMAND, TRANSACTION, CLIENT_HELLO, OCTET] {
            is_refused_by(&stage, at, injected);
        }
        behind.queue.is_empty();
        if let Some(child) = child {
            child.is_empty();
        }
        for server in ["backend", "stunnel", "tlswrapper"] {
            assert!(!stage.log(server).contains("injected@"), "{}: {}", way.name, stage.log(server));
        }
    }
}

/// The study's sanity run: the same dialogue without the injected line does start TLS, and nothing is said there unasked.
#[test]
fn nothing_is_said_inside_tls_before_the_client_speaks() {
    let front = Front::new(&[]);
    let mut command = front.stage.command(["/usr/bin/python3", "-I"]);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/real/silent_tls.py"));
    command.arg(front.at.ip().to_string()).arg(front.at.port().to_string());
    front.stage.run(&mut command, b"").succeeded("silent_tls.py");
}
