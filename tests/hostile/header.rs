//! The PROXY header on the wire, by each way that sends one: what it says, that nothing comes before it, and that it is one write. And a
//! client of whom nothing true can be said, for whom there is none.

use std::os::unix::net::UnixListener;
use std::time::Instant;

use starttls_wrapper::session::Way;
use tempfile::TempDir;

use crate::door::{Shape, Start};
use crate::steps::{At, Standing, all_of, ask_child};
use crate::stream::{Stream, wait_readable};
use crate::trace::Trace;
use crate::wire::{PATIENCE, Wire};

/// The ways that send one. The late ones know version 2 alone.
const WAYS: [Way; 5] = [Way::Tls, Way::Plain, Way::Raw, Way::TlsLate, Way::PlainLate];

const CLIENT: [(&str, &str); 4] =
    [("TCPREMOTEIP", "192.0.2.7"), ("TCPREMOTEPORT", "4711"), ("TCPLOCALIP", "192.0.2.25"), ("TCPLOCALPORT", "25")];

const LINE: &[u8] = b"PROXY TCP4 192.0.2.7 192.0.2.25 4711 25\r\n";

/// Version 2 with the same ends, and no word more.
const BINARY: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\xc0\0\x02\x19\x12\x67\0\x19";

/// What the client says inside its TLS has nothing to do with us: HOST is told of its address, and no word of TLS.
#[test]
fn by_raw_the_header_has_no_tlv_and_the_clients_octets_follow_it() {
    all_of(&[("v1", LINE), ("v2", BINARY)], |&(version, header)| {
        let options = ["--send-proxy", version];
        let start = Start { options: &options, environment: &CLIENT, way: Way::Raw, ..Start::default() };
        let mut standing = Standing::at(At::Snoop, &start);
        standing.door.backend.listen();
        let client = standing.door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\n");
        // It is there before the client hears anything.
        standing.door.backend.accept_only().unwrap();
        standing.door.backend.held().get(header).unwrap();
        client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
        client.send(b"a ClientHello");
        standing.door.backend.held().get(b"a ClientHello").unwrap();
        drop(standing.door.backend.take());
        standing.close();
    });
}

#[test]
fn on_a_unix_socket_the_header_comes_before_all_else() {
    let binary_with_tls = [&BINARY[..15], b"\x14", &BINARY[16..], b"\x20\0\x05\x01\0\0\0\x01"].concat();
    all_of(&[("v1", LINE), ("v2", &binary_with_tls)], |&(version, header)| {
        let folder = TempDir::new().unwrap();
        let listener = UnixListener::bind(folder.path().join("smtp")).unwrap();
        let host = format!("unix:{}/smtp", folder.path().display());
        let options = ["--send-proxy", version];
        let start = Start { options: &options, environment: &CLIENT, way: Way::Plain, host: &host, ..Start::default() };
        let mut standing = Standing::at(At::Snoop, &start);
        standing.door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
        wait_readable(&listener, Instant::now() + PATIENCE).unwrap();
        let mut backend = Wire::over(Stream::socket(listener.accept().unwrap().0));
        backend.get(header).unwrap();
        backend.send(b"220 secure.example ESMTP\r\n");
        backend.get(b"EHLO client.example\r\n").unwrap();
        backend.send(b"250 secure.example\r\n");
        standing.door.client.as_mut().unwrap().get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
        drop(backend);
        standing.close();
    });
}

/// A server may take what comes in two for no header. As the kernel saw it.
#[test]
fn the_header_is_one_write_and_the_first_on_its_connection() {
    let versions = |way: Way| if way.is_late() { &["v2"][..] } else { &["v1", "v2"] };
    let cases: Vec<_> = WAYS.iter().flat_map(|&way| versions(way).iter().map(move |version| (way, *version))).collect();
    all_of(&cases, |&(way, version)| {
        let trace = Trace::of(&["-s", "128", "-e", "trace=connect,write,writev,sendto,sendmsg,splice"]);
        let options = ["--send-proxy", version];
        let options = if way.is_late() { &[][..] } else { &options };
        let through = trace.through();
        let start = Start { options, environment: &CLIENT, through: &through, way, ..Start::default() };
        let mut standing = Standing::at(At::Snoop, &start);
        standing.door.backend.listen();
        let client = standing.door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\n");
        standing.door.backend.accept_only().unwrap();
        if way.is_late() {
            client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
            client.secure(crate::door::tls_client()).unwrap();
        }
        let backend = standing.door.backend.held();
        let length = match version {
            "v1" => backend.get(LINE).map(|()| LINE.len()),
            _ => backend.proxy_header().map(|header| header.len()),
        };
        let length = length.unwrap();
        let port = standing.door.backend.port();
        drop(standing.door.backend.take());
        standing.close();
        let log = trace.log();
        let mut calls = log.lines().skip_while(|call| !call.contains(&format!("htons({port})")));
        let dial = calls.next().unwrap_or_else(|| panic!("no dial: {log}"));
        let fd = dial.strip_prefix("connect(").and_then(|rest| rest.split(',').next()).unwrap();
        // A splice names its sink third.
        let writes = |call: &&str| call.contains(&format!("({fd}, ")) || call.contains(&format!(", NULL, {fd}, "));
        let first = calls.find(writes).unwrap_or_else(|| panic!("nothing is written: {log}"));
        let begins = if version == "v1" {
            format!("write({fd}, \"PROXY TCP4 ")
        } else {
            format!("write({fd}, \"\\r\\n\\r\\n\\0\\r\\nQUIT\\n!")
        };
        assert!(first.starts_with(&begins) && first.ends_with(&format!(", {length}) = {length}")), "{first}");
    });
}

/// Neither what is no address, nor what would be a second line of the header or a command behind it.
#[test]
fn who_has_no_true_address_gets_a_454_by_each_way_and_host_is_not_even_dialled() {
    // On a socket its other end would be loopback's: a lie, where the UCSPI server has named somebody else.
    const OURS: &str = "192.0.2.25";
    let sockets = [
        ("1.2.3.4\r\nXCLIENT", "4711", OURS),
        ("1.2.3.4 5.6.7.8 1 2\r\n", "4711", OURS),
        ("203.0.113.9", "0", OURS),
        ("203.0.113.9", "", OURS),
        // The header names our end too.
        ("203.0.113.9", "4711", "192.0.2.25\r\nXCLIENT"),
        ("203.0.113.9", "4711", "192.0.2.25 4711 25\r\nMAIL FROM:<>\r\n"),
        ("203.0.113.9", "4711", "mx.example"),
    ];
    let pipes = ["1.2.3.4\r\nXCLIENT", "unknown", ""].map(|ip| (ip, "4711", OURS, Shape::Pipes));
    let ends: Vec<_> =
        sockets.into_iter().map(|(ip, port, local)| (ip, port, local, Shape::Tcp)).chain(pipes).collect();
    let cases: Vec<_> = WAYS.iter().flat_map(|&way| ends.iter().map(move |&end| (way, end))).collect();
    all_of(&cases, |&(way, (ip, port, local, shape))| {
        let environment = [("TCPREMOTEIP", ip), ("TCPREMOTEPORT", port), ("TCPLOCALIP", local), ("TCPLOCALPORT", "25")];
        let options = if way.is_late() { &[][..] } else { &["--send-proxy", "v1"] };
        let start = Start { options, environment: &environment, shape, way, ..Start::default() };
        let mut standing = Standing::at(At::Snoop, &start);
        standing.door.backend.listen();
        let client = standing.door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\n");
        client.get(b"454 4.7.0 TLS not available\r\n").unwrap();
        assert!(!standing.door.backend.is_dialled(), "{ip} {local}");
        ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").unwrap();
        let said = standing.door.said();
        let told = format!("STARTTLS answered 454: way {way}, dial failed: the client's address is unknown");
        assert_eq!(said.matches(&told).count(), 1, "{said}");
        assert!(said.lines().all(|line| line.starts_with("starttls-wrapper[")), "{said}");
        standing.close();
    });
}
