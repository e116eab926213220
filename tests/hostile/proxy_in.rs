//! A listener behind a load balancer (`--proxy-protocol`): the header's word is the client's address everywhere, however it comes, and
//! who has none to show is closed without a word.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use starttls_wrapper::proxy::{Header, Version};

use crate::door::Start;
use crate::lazy::{LAZY, Stage};
use crate::limits::client_from;
use crate::scripted::GREETING;
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE, Wire};

const FOUR: &[u8] = b"PROXY TCP4 192.0.2.77 198.51.100.5 4711 25\r\n";
const REFUSED: &[u8] = b"421 4.7.0 Too many sessions from your address, try again later\r\n";

fn stage(options: &[&str]) -> Stage {
    let options = [&["--lazy", "--proxy-protocol"][..], options].concat();
    let mut stage = Stage::new(GREETING, &Start { options: &options, ..LAZY });
    stage.says("listening on ");
    drop(stage.door.client.take());
    stage
}

fn connect(stage: &Stage, from: &str) -> Wire {
    let client = client_from(from, stage.door.address.unwrap());
    let mut client = client;
    rustix::net::sockopt::set_tcp_nodelay(client.stream().input(), true).unwrap();
    client
}

fn binary(client: &str, local: &str) -> Vec<u8> {
    let [client, local]: [SocketAddr; 2] = [client, local].map(|end| end.parse().unwrap());
    Header { version: Version::V2, client, local, tls: true }.octets(None)
}

/// An end without a word. What is unread at a close resets the connection.
fn is_closed(mut client: Wire) {
    let (octets, end) = client.rest().unwrap();
    assert_eq!((octets.escape_ascii().to_string().as_str(), end == End::Clean || end == End::Reset), ("", true));
}

/// The server of the stage says its client's address in the answer to EHLO.
fn greets(mut client: Wire, address: &str) -> Wire {
    let reply = format!("220 mx\r\n250-mx hello c.example [{address}]\r\n250-STARTTLS\r\n250 SIZE 9\r\n");
    client.get(reply.as_bytes()).unwrap();
    client
}

#[test]
fn the_header_is_the_clients_address_for_the_dialogue_the_log_and_prog() {
    let stage = stage(&["--proxy-from", "192.0.2.0/24,127.0.0.1"]);
    let six = binary("[2001:db8::7]:4711", "[2001:db8::25]:25");
    for (header, address, ends) in [
        (FOUR, "192.0.2.77", "client=192.0.2.77:4711 "),
        (&six, "2001:db8::7", "client=[2001:db8::7]:4711 "),
        (&b"PROXY UNKNOWN\r\n"[..], "127.0.0.1", "client=127.0.0.1:"),
        (b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", "127.0.0.1", "client=127.0.0.1:"),
    ] {
        let mut client = connect(&stage, "127.0.0.1");
        client.send(&[header, b"EHLO c.example\r\n"].concat());
        let mut client = greets(client, address);
        client.send(b"MAIL FROM:<a@b>\r\n");
        client.get(b"250 MAIL FROM:<a@b>\r\n").unwrap();
        assert_eq!(stage.lines("started").last().map(String::as_str), Some(address));
        client.send(b"QUIT\r\n");
        client.get(b"221 bye\r\n").unwrap();
        client.get_end().unwrap();
        stage.says(ends);
    }
}

#[test]
fn a_header_may_come_in_pieces_and_what_follows_it_is_the_clients() {
    let stage = stage(&["--proxy-from", "127.0.0.0/8"]);
    for header in [FOUR.to_vec(), binary("192.0.2.77:4711", "198.51.100.5:25")] {
        let whole = [&header[..], b"EHLO c.example\r\n"].concat();
        let mut pieces: Vec<Vec<&[u8]>> = (1..whole.len()).map(|at| vec![&whole[..at], &whole[at..]]).collect();
        pieces.push(whole.chunks(1).collect());
        for pieces in pieces {
            let mut client = connect(&stage, "127.0.0.1");
            for piece in pieces {
                client.send(piece);
                client.flush();
            }
            drop(greets(client, "192.0.2.77"));
        }
    }
}

#[test]
fn who_may_send_none_is_closed_whatever_it_sends() {
    let stage = stage(&["--proxy-from", "127.0.0.2,::1"]);
    let mut client = connect(&stage, "127.0.0.1");
    client.send(FOUR);
    is_closed(client);
    stage.says("--proxy-from does not have it");
    let mut client = connect(&stage, "127.0.0.2");
    client.send(&[FOUR, b"EHLO c.example\r\n"].concat());
    drop(greets(client, "192.0.2.77"));
    assert!(!stage.door.said().contains("client=192.0.2.77:4711: "), "{}", stage.door.said());
}

#[test]
fn what_is_no_header_is_closed_at_once_and_the_log_says_what_it_was() {
    for (octets, why) in [
        (&b"EHLO c.example\r\n"[..], "no PROXY header"),
        (b"E", "no PROXY header"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\nEHLO c\r\n", "a line whose addresses are none"),
        (&[b'P'; 2], "no PROXY header"),
        (&[&b"PROXY UNKNOWN "[..], &[b'x'; 100]].concat(), "a line that does not end"),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\xd8", "a client that is not of TCP"),
        (b"\r\n\r\n\0\r\nQUIT\n\x20\0\xff\xff", "a header that is too long"),
    ] {
        // One line a second, and the first may be of the client that the rig connects.
        let stage = stage(&["--proxy-from", "127.0.0.1"]);
        let is_said = wait_until(PATIENCE, || {
            let begin = Instant::now();
            let mut client = connect(&stage, "127.0.0.1");
            client.send(octets);
            is_closed(client);
            assert!(begin.elapsed() < Duration::from_secs(4), "{why}: at once");
            stage.door.said().contains(why)
        });
        assert!(is_said, "{why}: {}", stage.door.said());
    }
}

#[test]
fn a_header_that_ends_early_or_comes_late_is_closed_and_its_place_is_free_again() {
    let stage = stage(&["--proxy-from", "127.0.0.1", "--max-sessions", "1"]);
    let free = || {
        let mut client = connect(&stage, "127.0.0.1");
        client.send(&[FOUR, b"EHLO c.example\r\n"].concat());
        let said = client.piece().unwrap_or_default();
        said.starts_with(b"220 ")
    };
    // One that sends this and is not turned away.
    let wait_with = |octets: &[u8]| {
        let mut waiting = None;
        let is_waiting = wait_until(PATIENCE, || {
            let mut client = connect(&stage, "127.0.0.1");
            client.send(octets);
            client.listen_for(Duration::from_millis(200));
            if client.has_received() {
                return false;
            }
            waiting = Some(client);
            true
        });
        assert!(is_waiting, "{}", stage.door.said());
        waiting.unwrap()
    };
    // One line a second: it may be another's.
    let is_said = wait_until(PATIENCE, || {
        // The one place may still be that of the client that the rig connects.
        let mut ended = wait_with(&FOUR[..20]);
        let begin = Instant::now();
        ended.end();
        is_closed(ended);
        assert!(begin.elapsed() < Duration::from_secs(4), "at once");
        stage.door.said().contains("it closed before its PROXY header was whole")
    });
    assert!(is_said, "{}", stage.door.said());
    assert!(wait_until(PATIENCE, free), "{}", stage.door.said());

    let begin = Instant::now();
    let late = wait_with(&FOUR[..20]);
    assert!(!free(), "who waits has a place: {}", stage.door.said());
    is_closed(late);
    assert!(begin.elapsed() >= Duration::from_millis(4900), "{:?}", begin.elapsed());
    stage.says("did not come in time");
    assert!(wait_until(PATIENCE, free), "{}", stage.door.said());
}

#[test]
fn limits_count_the_clients_and_not_the_load_balancers_sessions() {
    let stage = stage(&["--proxy-from", "127.0.0.1", "--max-per-ip", "1"]);
    let from = |address: &str| {
        let mut client = connect(&stage, "127.0.0.1");
        client.send(&binary(address, "[2001:db8::25]:25"));
        client.send(b"EHLO c.example\r\n");
        client
    };
    let first = greets(from("[2001:db8:1:1::1]:1"), "2001:db8:1:1::1");
    let other = greets(from("[2001:db8:1:2::1]:1"), "2001:db8:1:2::1");
    let mut neighbour = from("[2001:db8:1:1:ffff::2]:2");
    neighbour.get(REFUSED).unwrap();
    drop((first, other));
}

#[test]
fn the_server_behind_tls_is_told_what_the_header_said() {
    let mut stage = stage(&["--proxy-from", "127.0.0.1", "--send-proxy", "v2"]);
    stage.door.backend.listen();
    let mut client = connect(&stage, "127.0.0.1");
    client.send(&[FOUR, b"EHLO c.example\r\n"].concat());
    let mut client = greets(client, "192.0.2.77");
    client.send(b"STARTTLS\r\n");
    stage.door.backend.accept_only().unwrap();
    let told = binary("192.0.2.77:4711", "198.51.100.5:25");
    assert_eq!(stage.door.backend.held().proxy_header().unwrap(), told);
}
