//! Clients that cut their TLS into octets, send garbage where TLS is due, never read, or hammer.

use std::time::Duration;

use rustls::Connection;

use crate::door::{Door, Start, tls_client};
use crate::steps::{At, Standing, all_of};
use crate::wire::{End, PATIENCE};

/// What the client's TLS wants to send, each record of the handshake in clear as records of one octet.
fn in_records_of_one_octet(tls: &mut Connection) -> Vec<u8> {
    let mut hello = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut hello).unwrap();
    }
    assert_eq!(hello[0], 22);
    let payload = &hello[5..];
    payload.iter().flat_map(|&octet| [22, 3, 1, 0, 1, octet]).collect()
}

#[test]
fn a_client_hello_in_records_of_one_octet_is_served_or_ended_by_an_alert() {
    all_of(&[true, false], |&at_once| {
        let mut standing = Standing::at(At::ClientHandshake, &Start::default());
        let memory = standing.door.memory("VmHWM");
        let client = standing.door.client.as_mut().unwrap();
        let mut tls = tls_client();
        let records = in_records_of_one_octet(&mut tls);
        if at_once {
            client.send(&records);
        } else {
            records.chunks(6).for_each(|record| client.send(record));
        }
        // Served: the rest of the handshake follows. An alert and the end would be in order too.
        match client.secure(tls) {
            Ok(()) => {
                client.send(b"NOOP\r\n");
                standing.door.backend.wire().unwrap().get(b"NOOP\r\n").unwrap();
            }
            Err(why) => assert!(why.contains("alert"), "{why}"),
        }
        let grown = standing.door.memory("VmHWM") - memory;
        assert!(grown < 3072, "{grown} KiB more");
        standing.close();
    });
}

#[test]
fn a_client_hello_octet_by_octet_is_served() {
    let mut standing = Standing::at(At::ClientHandshake, &Start::default());
    let client = standing.door.client.as_mut().unwrap();
    let mut tls = tls_client();
    let mut hello = Vec::new();
    tls.write_tls(&mut hello).unwrap();
    hello.iter().for_each(|octet| client.send(&[*octet]));
    client.secure(tls).unwrap();
    standing.close();
}

#[test]
fn garbage_where_tls_is_due_ends_the_session_with_98_and_never_in_clear() {
    let cases: [&[u8]; 8] = [
        b"EHLO client.example\r\n",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\x00",
        b"\x17\x03\x03\x00\x01a",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10",
        &[0xFF; 4096],
    ];
    all_of(&cases, |octets| {
        let mut standing = Standing::at(At::ClientHandshake, &Start::default());
        let client = standing.door.client.as_mut().unwrap();
        client.send(octets);
        client.listen_for(Duration::from_millis(200));
        client.cut();
        let (said, end) = client.rest().unwrap();
        assert!(said.is_empty() || said[0] == 21, "{}", said.escape_ascii());
        assert_eq!(end, End::Clean);
        let code = standing.close();
        assert!(code == 98 || code == 1, "{code}: {}", octets.escape_ascii());
    });
}

#[test]
fn garbage_inside_tls_ends_the_session_and_is_no_clean_end_for_the_backend() {
    all_of(&[At::Gate, At::RelayTls], |&at| {
        let mut standing = Standing::at(at, &Start::default());
        let client = standing.door.client.as_mut().unwrap();
        std::io::Write::write_all(client.stream(), b"\x17\x03\x03\x00\x20aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa").unwrap();
        let (said, end) = standing.door.backend.wire().unwrap().rest().unwrap();
        assert!(said.is_empty());
        assert_ne!(end, End::Clean);
        assert_eq!(standing.close(), 1);
    });
}

#[test]
fn garbage_in_the_dialogue_is_answered_or_ended_and_nothing_of_it_hangs() {
    let cases: [Vec<u8>; 6] = [
        (0..=255).collect(),
        vec![0; 100_000],
        vec![b'\n'; 10_000],
        b"\r".repeat(10_000),
        vec![0x16, 0x03, 0x01, 0x02, 0x00, 0x01],
        b"\xff\xfe\r\n".repeat(5_000),
    ];
    all_of(&cases, |octets| {
        let mut door =
            Door::open(&Start { program: Some(&["/bin/sh", "-c", "echo 220 hello; exec cat"]), ..Start::default() });
        let client = door.client.as_mut().unwrap();
        let mut twin = client.twin();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                twin.send(octets);
                twin.end();
            });
            client.rest().unwrap();
        });
        door.client = None;
        door.wait().unwrap();
    });
}

#[test]
fn a_client_that_never_reads_its_replies_stops_being_read() {
    let options = ["--snoop-timeout", "2"];
    let mut standing = Standing::at(At::Snoop, &Start { options: &options, ..Start::default() });
    let memory = standing.door.memory("VmHWM");
    let client = standing.door.client.as_mut().unwrap();
    // Our own replies: the child has no part in it.
    let refused = b"XCLIENT NAME=x\r\n".repeat(4_000);
    let mut sent = 0;
    loop {
        let taken = client.send_some(&refused);
        sent += taken;
        assert!(sent < 64 << 20, "the flood never stops");
        if taken == 0 && !client.stream().wait(false, true, std::time::Instant::now() + Duration::from_millis(300)) {
            break;
        }
    }
    let grown = standing.door.memory("VmHWM") - memory;
    assert!(grown < 2048, "{grown} KiB more");
    let (said, _) = standing.door.client.as_mut().unwrap().rest().unwrap();
    assert!(said.starts_with(b"550 5.7.0 Not for clients\r\n"));
    assert_eq!(standing.close(), 99);
}

#[test]
fn a_client_that_closes_at_once_leaves_nothing() {
    all_of(&[true, false], |&reset| {
        for _ in 0..10 {
            let mut door = Door::open(&Start::default());
            let client = door.client.take().unwrap();
            if reset {
                client.reset();
            } else {
                drop(client);
            }
            let mut child = crate::child::Child::accept(&door.puppets).unwrap();
            let _ = child.rest();
            child.exit(0);
            let code = door.code();
            assert!(code == 1 || code == 111, "{code}: {}", door.said());
            assert!(child.is_gone(PATIENCE));
        }
    });
}
