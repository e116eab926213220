//! Command injection into STARTTLS (CVE-2011-0411 and its many successors), by the method of the USENIX Security 2021 study: send
//! `STARTTLS` and a command in one segment; if the server still starts TLS, whatever it says there unasked was injected.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::front::Front;
use crate::stage::PATIENCE;

const REFUSAL: &str = "421 4.7.0 Bytes after STARTTLS, closing connection\r\n";

fn connect(front: &Front) -> TcpStream {
    let client = TcpStream::connect(front.at).expect("connect");
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
    let mut client = connect(&front);
    assert!(reply(&mut client).starts_with("220"));
    client.write_all(b"EHLO c\r\n").expect("write");
    assert!(reply(&mut client).contains("STARTTLS"));
    client.write_all(&[b"STARTTLS\r\n", behind].concat()).expect("write");
    let mut rest = String::new();
    client.read_to_string(&mut rest).expect("the end");
    assert_eq!(rest, REFUSAL);
    front.stage.wait_until_childless("front");
    // Neither server saw the command: mailfront logs every envelope, and stunnel every connection.
    let log = front.stage.log("front");
    assert!(
        log.contains("127.0.0.1") || log.contains(&front.at.ip().to_string()),
        "the warning names the client:\n{log}"
    );
    assert!(!log.contains("injected@") && !front.stage.log("stunnel").contains("injected@"), "{log}");
}

#[test]
fn a_command_behind_starttls_is_refused() {
    is_refused(b"EHLO commandinjectiontester\r\n");
}

#[test]
fn a_transaction_behind_starttls_is_refused() {
    is_refused(b"MAIL FROM:<injected@evil.example>\r\nRCPT TO:<injected@localhost>\r\nDATA\r\ninjected@\r\n.\r\n");
}

#[test]
fn a_client_hello_behind_starttls_is_refused() {
    is_refused(b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00");
}

#[test]
fn a_single_octet_behind_starttls_is_refused() {
    is_refused(b"\n");
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
