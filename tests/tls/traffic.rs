//! What two well-behaved sides see.

use crate::peers::{
    End, HOST, connected, exchange, exchange_foreign, feed, flight, foreign_client, foreign_config, name, self_signed,
};
use proptest::prelude::*;
use rustls::version::{TLS12, TLS13};
use starttls_wrapper::tls::{Identity, Leg, TlsError, server_setup};
use std::io::{Read, Write};
use std::sync::Arc;

fn tls12_client(identity: &Identity) -> End {
    End::new(Leg::connect(&Arc::new(foreign_config(identity, &[&TLS12])), name()).unwrap())
}

/// Octets without a period that a lost or doubled record could hide behind.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_be_bytes()[..7]);
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn handshakes_in_tls13_with_the_hybrid_group_whole_and_byte_by_byte() {
    let identity = self_signed(|_| {});
    for split in [usize::MAX, 1, 7] {
        let (mut client, mut server) = (End::client(&identity), End::server(&identity));
        assert!(client.leg.is_handshaking() && client.leg.wants_write());
        assert_eq!(client.leg.facts().version, "none");
        exchange(&mut client, &mut server, split).unwrap();
        assert!(!client.leg.is_handshaking() && !server.leg.is_handshaking());
        let facts = server.leg.facts();
        assert_eq!((facts.version, facts.group.as_deref()), ("TLSv1.3", Some("X25519MLKEM768")));
        assert_eq!(facts.suite, "TLS_AES_128_GCM_SHA256");
        assert_eq!((facts.alpn, facts.sni.as_deref()), (None, Some(HOST)));
        assert_eq!(client.leg.facts().sni, None);
    }
}

#[test]
fn handshakes_in_tls12_whole_and_byte_by_byte() {
    let identity = self_signed(|_| {});
    for split in [usize::MAX, 1, 7] {
        let (mut client, mut server) = (tls12_client(&identity), End::server(&identity));
        exchange(&mut client, &mut server, split).unwrap();
        for facts in [client.leg.facts(), server.leg.facts()] {
            assert_eq!((facts.version, facts.group.as_deref()), ("TLSv1.2", Some("X25519")));
            assert_eq!(facts.suite, "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384");
        }
    }
}

#[test]
fn offers_no_resumption() {
    let identity = self_signed(|_| {});
    for version in [&TLS12, &TLS13] {
        // One configuration each, so that a ticket or a session number given at first would be redeemed the second time.
        let client_config = Arc::new(foreign_config(&identity, &[version]));
        let server_config = server_setup(&identity, None).unwrap();
        for _ in 0..2 {
            let mut client = rustls::ClientConnection::new(client_config.clone(), name()).unwrap();
            let mut server = End::new(Leg::accept(&server_config).unwrap());
            exchange_foreign(&mut client, &mut server).unwrap();
            assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
            assert_eq!(client.tls13_tickets_received(), 0);
        }
    }
}

#[test]
fn names_seen_on_one_thread_do_not_mix() {
    let identity = self_signed(|_| {});
    let mut first = End::server(&identity);
    let mut second = End::server(&identity);
    let mut named = foreign_client(foreign_config(&identity, &[&TLS13]));
    let mut config = foreign_config(&identity, &[&TLS13]);
    config.enable_sni = false;
    let mut nameless = foreign_client(config);
    first.take(&flight(&mut named), usize::MAX).unwrap();
    second.take(&flight(&mut nameless), usize::MAX).unwrap();
    assert_eq!(first.leg.facts().sni.as_deref(), Some(HOST));
    assert_eq!(second.leg.facts().sni, None);
    feed(&mut named, &first.take_outgoing()).unwrap();
    first.take(&flight(&mut named), usize::MAX).unwrap();
    assert_eq!(first.leg.facts().sni.as_deref(), Some(HOST));
}

#[test]
fn carries_8_mib_both_ways_unchanged() {
    let payload = noise(8 << 20);
    for tls12 in [false, true] {
        let identity = self_signed(|_| {});
        let mut client = if tls12 { tls12_client(&identity) } else { End::client(&identity) };
        let mut server = End::server(&identity);
        exchange(&mut client, &mut server, usize::MAX).unwrap();
        // Sends of any size, also larger than a record; one transfer of the queue per few sends, as a busy socket would.
        let mut pieces = payload.chunks(70_001);
        while let Some(piece) = pieces.next() {
            client.leg.send(piece).unwrap();
            server.leg.send(piece).unwrap();
            if let Some(piece) = pieces.next() {
                client.leg.send(piece).unwrap();
                server.leg.send(piece).unwrap();
            }
            exchange(&mut client, &mut server, 100_000).unwrap();
        }
        assert!(client.received == payload && server.received == payload);
    }
}

#[test]
fn an_independent_peer_reads_and_writes_the_same_bytes() {
    let identity = self_signed(|_| {});
    for version in [&TLS12, &TLS13] {
        let mut client = foreign_client(foreign_config(&identity, &[version]));
        let mut server = End::server(&identity);
        exchange_foreign(&mut client, &mut server).unwrap();
        client.writer().write_all(b"EHLO client.example\r\n").unwrap();
        server.leg.send(b"250 mx.").unwrap();
        server.leg.send(b"example\r\n").unwrap();
        exchange_foreign(&mut client, &mut server).unwrap();
        assert_eq!(server.received, b"EHLO client.example\r\n");
        let mut reply = [0; 16];
        client.reader().read_exact(&mut reply).unwrap();
        assert_eq!(&reply, b"250 mx.example\r\n");
    }
}

#[test]
fn half_close_delivers_the_last_bytes_and_leaves_the_other_way_open() {
    let (mut client, mut server) = connected();
    client.leg.send(b"QUIT\r\n").unwrap();
    client.leg.send_close();
    client.leg.send_close();
    assert!(matches!(client.leg.send(b"more"), Err(TlsError::AfterClose)));
    let bytes = client.take_outgoing();
    assert_eq!(bytes.len(), 28 + 24, "one close_notify");
    server.take(&bytes, usize::MAX).unwrap();
    assert_eq!(server.received, b"QUIT\r\n");
    assert!(server.leg.peer_closed() && !client.leg.peer_closed());
    assert!(server.leg.room().is_empty() && !server.leg.is_failed());

    server.leg.send(b"221 bye\r\n").unwrap();
    exchange(&mut client, &mut server, usize::MAX).unwrap();
    assert_eq!(client.received, b"221 bye\r\n");
    server.leg.send_close();
    exchange(&mut client, &mut server, usize::MAX).unwrap();
    assert!(client.leg.peer_closed());
    assert!(matches!(server.leg.send(b"more"), Err(TlsError::AfterClose)));
    assert!(!client.leg.is_failed() && !server.leg.is_failed());
}

#[test]
fn tls12_ends_in_order_from_either_side() {
    let identity = self_signed(|_| {});
    for server_first in [false, true] {
        let (mut client, mut server) = (tls12_client(&identity), End::server(&identity));
        exchange(&mut client, &mut server, usize::MAX).unwrap();
        let (first, second) = if server_first { (&mut server, &mut client) } else { (&mut client, &mut server) };
        first.leg.send(b"last words").unwrap();
        first.leg.send_close();
        exchange(first, second, 3).unwrap();
        assert!(second.leg.peer_closed() && second.received == b"last words");
        second.leg.send(b"answer").unwrap();
        second.leg.send_close();
        exchange(first, second, 3).unwrap();
        assert!(first.leg.peer_closed() && first.received == b"answer");
        assert!(!first.leg.is_failed() && !second.leg.is_failed());
    }
}

#[test]
fn bytes_after_the_peers_close_notify_are_ignored() {
    let (mut client, mut server) = connected();
    client.leg.send_close();
    let mut bytes = client.take_outgoing();
    bytes.extend_from_slice(b"RSET\r\n in the clear");
    server.take(&bytes, usize::MAX).unwrap();
    assert!(server.leg.peer_closed() && server.received.is_empty());
    server.leg.give_back();
    assert_eq!(server.leg.footprint(), 0);
    server.leg.send(b"221\r\n").unwrap();
}

#[test]
fn truncation_is_told_from_a_close() {
    let (mut client, mut server) = connected();
    client.leg.send(b"half a mess").unwrap();
    client.leg.send_close();
    let bytes = client.take_outgoing();
    for cut in [10, 33, 34, bytes.len() - 1] {
        let (mut client, mut server) = connected();
        client.leg.send(b"half a mess").unwrap();
        client.leg.send_close();
        server.take(&client.take_outgoing()[..cut], usize::MAX).unwrap();
        assert!(!server.leg.peer_closed(), "cut at {cut}");
    }
    server.take(&bytes, usize::MAX).unwrap();
    assert!(server.leg.peer_closed());
}

#[test]
fn a_close_during_the_handshake_means_nothing_from_either_side() {
    let identity = self_signed(|_| {});
    let mut server = End::server(&identity);
    server.leg.send_close();
    assert!(!server.leg.wants_write());
    assert!(matches!(server.leg.send(b"220 too early\r\n"), Err(TlsError::NotReady)));
    server.take(&[21, 3, 3, 0, 2, 1, 0], usize::MAX).unwrap();
    // Nobody signed it.
    assert!(!server.leg.peer_closed() && !server.leg.is_failed());
    assert!(matches!(server.leg.send(b"220\r\n"), Err(TlsError::NotReady)));
}

#[test]
fn idle_buffers_are_given_back_and_leftovers_kept() {
    let (mut client, mut server) = connected();
    client.leg.send(&noise(300_000)).unwrap();
    let bytes = client.take_outgoing();
    server.take(&bytes[..200_000], usize::MAX).unwrap();
    assert!(server.leg.footprint() > 64 * 1024);
    server.leg.give_back();
    assert!(server.leg.footprint() < 18_500, "{}", server.leg.footprint());
    server.take(&bytes[200_000..], usize::MAX).unwrap();
    assert_eq!(server.received, noise(300_000));
    server.leg.give_back();
    client.leg.give_back();
    assert_eq!((server.leg.footprint(), client.leg.footprint()), (0, 0));
    server.leg.send(b"still here").unwrap();
    exchange(&mut client, &mut server, usize::MAX).unwrap();
    assert_eq!(client.received, b"still here");
}

#[test]
fn bytes_read_but_not_handled_do_not_get_lost_in_a_send() {
    let (mut client, mut server) = connected();
    client.leg.send(b"one").unwrap();
    client.leg.send(b"two").unwrap();
    let bytes = client.take_outgoing();
    server.take(&bytes[..30], usize::MAX).unwrap();
    let room = server.leg.room();
    room[..bytes.len() - 30].copy_from_slice(&bytes[30..]);
    server.leg.filled(bytes.len() - 30);
    server.leg.send(b"reply").unwrap();
    server.handle().unwrap();
    assert_eq!(server.received, b"onetwo");
    exchange(&mut client, &mut server, usize::MAX).unwrap();
    assert_eq!(client.received, b"reply");
}

#[test]
fn sends_of_nothing_queue_nothing() {
    let (mut client, _server) = connected();
    client.leg.send(b"").unwrap();
    assert!(!client.leg.wants_write());
}

#[test]
fn key_updates_of_the_peer_are_followed_and_answered_before_our_data() {
    let identity = self_signed(|_| {});
    let mut client = foreign_client(foreign_config(&identity, &[&TLS13]));
    let mut server = End::server(&identity);
    exchange_foreign(&mut client, &mut server).unwrap();
    for round in 0..3 {
        client.refresh_traffic_keys().unwrap();
        client.writer().write_all(b"NOOP\r\n").unwrap();
        server.take(&flight(&mut client), 5).unwrap();
        server.leg.send(b"250 ok\r\n").unwrap();
        let bytes = server.take_outgoing();
        assert_eq!(bytes.len(), 27 + 30, "round {round}: key update, then data");
        feed(&mut client, &bytes).unwrap();
        let mut reply = [0; 20];
        assert_eq!(client.reader().read(&mut reply).unwrap(), 8);
    }
    assert_eq!(server.received, b"NOOP\r\nNOOP\r\nNOOP\r\n");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_splits_carry_the_same_bytes(
        steps in proptest::collection::vec((any::<bool>(), 0_usize..40_000, 1_usize..30_000, any::<bool>()), 1..24),
        tls12 in any::<bool>(),
    ) {
        let identity = self_signed(|_| {});
        let mut client = if tls12 { tls12_client(&identity) } else { End::client(&identity) };
        let mut server = End::server(&identity);
        exchange(&mut client, &mut server, 100).unwrap();
        let source = noise(40_000);
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        for (up, length, split, idle) in steps {
            let (from, to, sent) = if up { (&mut client, &mut server, &mut to_server) } else { (&mut server, &mut client, &mut to_client) };
            from.leg.send(&source[..length]).unwrap();
            sent.extend_from_slice(&source[..length]);
            // A short write: the rest stays queued for the next step.
            let n = from.leg.outgoing().len().min(split * 2);
            let bytes = from.leg.outgoing()[..n].to_vec();
            from.leg.sent(n);
            to.take(&bytes, split).unwrap();
            if idle {
                from.leg.give_back();
                to.leg.give_back();
            }
        }
        exchange(&mut client, &mut server, 20_000).unwrap();
        prop_assert!(server.received == to_server && client.received == to_client);
    }
}
