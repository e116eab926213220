//! What a peer may try, and what it gets.

use crate::peers::{
    End, connected, exchange, exchange_foreign, feed, flight, foreign_client, foreign_config, self_signed,
};
use rustls::crypto::cipher::{MessageEncrypter, OutboundChunks, OutboundPlainMessage};
use rustls::version::TLS13;
use rustls::{ConnectionTrafficSecrets, ContentType, ProtocolVersion, SupportedCipherSuite};
use starttls_wrapper::tls::TlsError;

const DECODE_ERROR: [u8; 7] = [21, 3, 3, 0, 2, 2, 50];

#[test]
fn garbage_instead_of_a_client_hello_gets_an_alert_once_and_is_called_not_tls() {
    for garbage in [
        &b"EHLO client.example\r\n"[..],
        b"MAIL FROM:<>\r\n",
        b"GET / HTTP/1.1\r\n",
        b"\x80\x2e\x01\x03\x01\x00",
        &[0; 40],
    ] {
        for split in [usize::MAX, 1] {
            let mut server = End::server(&self_signed(|_| {}));
            let error = server.take(garbage, split).unwrap_err();
            assert!(matches!(error, TlsError::NotTls(_)), "{error}");
            assert!(error.to_string().starts_with("the peer does not speak TLS"), "{error}");
            assert!(server.leg.is_failed() && server.leg.room().is_empty());
            assert_eq!(server.take_outgoing(), DECODE_ERROR);
            assert!(matches!(server.handle(), Err(TlsError::NotTls(_))));
            assert!(matches!(server.leg.send(b"x"), Err(TlsError::NotTls(_))));
            server.leg.send_close();
            assert!(!server.leg.wants_write() && server.received.is_empty());
        }
    }
}

#[test]
fn a_backend_that_greets_in_the_clear_is_called_not_tls() {
    let mut client = End::client(&self_signed(|_| {}));
    let error = client.take(b"220 mx.example ESMTP\r\n", usize::MAX).unwrap_err();
    assert!(matches!(error, TlsError::NotTls(_)), "{error}");
}

#[test]
fn plaintext_in_the_middle_of_a_session_is_a_violation_not_a_stranger() {
    let (_, mut server) = connected();
    let error = server.take(b"RSET\r\n", usize::MAX).unwrap_err();
    assert!(matches!(error, TlsError::Protocol(_)), "{error}");
    assert!(server.leg.wants_write());
}

/// The handshake message of one plaintext record, cut into records of `size` octets.
fn in_fragments(record: &[u8], size: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for fragment in record[5..].chunks(size) {
        bytes.extend_from_slice(&[22, 3, 1, 0, fragment.len() as u8]);
        bytes.extend_from_slice(fragment);
    }
    bytes
}

#[test]
fn a_client_hello_in_one_byte_records_is_read_although_we_try_to_write_in_between() {
    let identity = self_signed(|_| {});
    for (fragment, split) in [(1, 1), (1, usize::MAX), (3, 2), (100, 7)] {
        let mut client = foreign_client(foreign_config(&identity, &[&TLS13]));
        let mut server = End::server(&identity);
        for piece in in_fragments(&flight(&mut client), fragment).chunks(split.min(100_000)) {
            server.take(piece, usize::MAX).unwrap();
            // An empty slice shown to rustls here is a panic.
            if !server.leg.wants_write() {
                assert!(matches!(server.leg.send(b"220\r\n"), Err(TlsError::NotReady)));
            }
        }
        feed(&mut client, &server.take_outgoing()).unwrap();
        exchange_foreign(&mut client, &mut server).unwrap();
        assert!(!server.leg.is_handshaking() && !client.is_handshaking());
    }
}

#[test]
fn an_endless_client_hello_is_held_up_to_64_kib_and_no_further() {
    for (fragment, split) in [(1, 1000), (1, 65_536), (10, 3), (16_384, 4096)] {
        let mut server = End::server(&self_signed(|_| {}));
        let mut message = vec![1, 0, 0xff, 0];
        message.resize(4 + 0xff00 - 1, 0);
        let mut flood = Vec::new();
        for piece in message.chunks(fragment) {
            flood.extend_from_slice(&[22, 3, 1, (piece.len() >> 8) as u8, piece.len() as u8]);
            flood.extend_from_slice(piece);
        }
        // Long enough records reach the end of the message first, and only the garbage in it ends the matter.
        flood.resize(flood.len() + 65_536, 0);
        let error = server.take(&flood, split).unwrap_err();
        match fragment {
            16_384 => assert!(matches!(error, TlsError::Protocol(_) | TlsError::NotTls(_)), "{error}"),
            _ => assert!(matches!(error, TlsError::HandshakeTooLarge), "{error}"),
        }
        assert!(server.leg.footprint() <= 64 * 1024 + 4096, "{}", server.leg.footprint());
    }
}

/// A client whose keys we hold after an honest handshake, so that it can say anything.
struct Forger {
    keys: Box<dyn MessageEncrypter>,
    sequence: u64,
}

impl Forger {
    fn connect() -> (Self, End) {
        let identity = self_signed(|_| {});
        let mut client = foreign_client(foreign_config(&identity, &[&TLS13]));
        let mut server = End::server(&identity);
        exchange_foreign(&mut client, &mut server).unwrap();
        let Some(SupportedCipherSuite::Tls13(suite)) = client.negotiated_cipher_suite() else { panic!("TLS 1.3") };
        let (sequence, secrets) = client.dangerous_extract_secrets().unwrap().tx;
        let ConnectionTrafficSecrets::Aes128Gcm { key, iv } = secrets else { panic!("AES-128") };
        (Self { keys: suite.aead_alg.encrypter(key, iv), sequence }, server)
    }

    fn record(&mut self, typ: ContentType, payload: &[u8]) -> Vec<u8> {
        let message =
            OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload: OutboundChunks::Single(payload) };
        let record = self.keys.encrypt(message, self.sequence).unwrap();
        self.sequence += 1;
        record.encode()
    }
}

#[test]
fn a_key_update_split_over_two_records_does_not_panic_when_we_write_in_between() {
    let (mut forger, mut server) = Forger::connect();
    // key_update, length 1, update_not_requested: RFC 8446 4.6.3.
    let first = forger.record(ContentType::Handshake, &[24, 0, 0]);
    server.take(&first, usize::MAX).unwrap();
    server.leg.send(b"250 ok\r\n").unwrap();
    server.leg.give_back();
    server.leg.send(b"250 ok\r\n").unwrap();
    let second = forger.record(ContentType::Handshake, &[1, 0]);
    server.take(&second, 4).unwrap();
    server.leg.send(b"250 ok\r\n").unwrap();
    assert_eq!(server.leg.outgoing().len(), 3 * 30);
    assert!(!server.leg.is_failed());
    // The keys have changed: a record under the old ones is refused.
    let stale = forger.record(ContentType::ApplicationData, b"NOOP\r\n");
    assert!(matches!(server.take(&stale, usize::MAX), Err(TlsError::BadRecord)));
}

#[test]
fn a_close_in_the_middle_of_a_split_key_update_does_not_panic() {
    let (mut forger, mut server) = Forger::connect();
    let first = forger.record(ContentType::Handshake, &[24, 0, 0]);
    server.take(&first, usize::MAX).unwrap();
    server.leg.send_close();
    assert_eq!(server.leg.outgoing().len(), 24);
    // Data inside a handshake message: RFC 8446 5.1.
    let data = forger.record(ContentType::ApplicationData, b"NOOP\r\n");
    assert!(matches!(server.take(&data, usize::MAX), Err(TlsError::Protocol(_))));
    assert!(server.received.is_empty());
}

#[test]
fn an_endless_message_after_the_handshake_is_held_up_to_256_kib_and_no_further() {
    let (mut forger, mut server) = Forger::connect();
    let mut flood = forger.record(ContentType::Handshake, &[24, 0, 0xff, 0]);
    while flood.len() < 300_000 {
        flood.extend(forger.record(ContentType::Handshake, &[0]));
    }
    let error = server.take(&flood, 16_384).unwrap_err();
    assert!(matches!(error, TlsError::HandshakeTooLarge), "{error}");
    assert!(server.leg.footprint() <= 256 * 1024 + 16 * 1024, "{}", server.leg.footprint());
}

#[test]
fn records_before_a_damaged_one_are_delivered_and_the_alert_is_queued() {
    let (mut client, mut server) = connected();
    client.leg.send(b"one").unwrap();
    client.leg.send(b"two").unwrap();
    client.leg.send(b"three").unwrap();
    let mut bytes = client.take_outgoing();
    bytes[30] ^= 1;
    let error = server.take(&bytes, usize::MAX).unwrap_err();
    assert!(matches!(error, TlsError::BadRecord), "{error}");
    assert_eq!(server.received, b"one");
    let alert = server.take_outgoing();
    assert_eq!(alert.len(), 24);
    let error = client.take(&alert, usize::MAX).unwrap_err();
    assert_eq!(error.to_string(), "the peer sent the alert BadRecordMac");
}

#[test]
fn a_client_of_tls_1_1_is_refused_with_an_alert() {
    // With and without the extension signature_algorithms, which is younger than TLS 1.1.
    let signature_algorithms = [0, 8, 0, 13, 0, 4, 0, 2, 4, 3];
    for (extensions, alert) in [(&signature_algorithms[..], 70), (&[], 40)] {
        let mut hello = vec![3, 2];
        hello.extend_from_slice(&[7; 32]);
        // No session, TLS_RSA_WITH_AES_128_CBC_SHA, no compression.
        hello.extend_from_slice(&[0, 0, 2, 0, 0x2f, 1, 0]);
        hello.extend_from_slice(extensions);
        let mut record = vec![22, 3, 1, 0, hello.len() as u8 + 4];
        record.extend_from_slice(&[1, 0, 0, hello.len() as u8]);
        record.extend_from_slice(&hello);
        let mut server = End::server(&self_signed(|_| {}));
        let error = server.take(&record, usize::MAX).unwrap_err();
        match alert {
            70 => assert!(matches!(error, TlsError::Version(_)), "{error}"),
            _ => assert!(matches!(error, TlsError::Incompatible(_)), "{error}"),
        }
        assert_eq!(server.take_outgoing(), [21, 3, 3, 0, 2, 2, alert]);
    }
}

#[test]
fn a_fatal_alert_of_the_peer_is_told_from_our_own_errors() {
    let mut server = End::server(&self_signed(|_| {}));
    let error = server.take(&[21, 3, 1, 0, 2, 2, 40], usize::MAX).unwrap_err();
    assert_eq!(error.to_string(), "the peer sent the alert HandshakeFailure");
}

#[test]
fn a_panic_ends_the_leg_alone() {
    let (mut client, mut server) = connected();
    client.leg.send(b"boom").unwrap();
    let bytes = client.take_outgoing();
    server.leg.send(b"queued before").unwrap();
    let room = server.leg.room();
    room[..bytes.len()].copy_from_slice(&bytes);
    server.leg.filled(bytes.len());
    let error = server.leg.handle_records(&mut |_| panic!("inside the engine")).unwrap_err();
    assert!(matches!(&error, TlsError::Panicked(message) if message == "inside the engine"), "{error}");
    assert!(server.leg.is_failed() && server.leg.room().is_empty());
    assert!(matches!(server.leg.send(b"x"), Err(TlsError::Panicked(_))));
    let rest = server.take_outgoing();
    client.take(&rest, usize::MAX).unwrap();
    assert_eq!(client.received, b"queued before");
}

#[test]
fn no_bytes_at_all_are_no_error() {
    let mut server = End::server(&self_signed(|_| {}));
    for _ in 0..3 {
        server.handle().unwrap();
        server.leg.filled(0);
    }
    let mut client = End::client(&self_signed(|_| {}));
    client.handle().unwrap();
    assert!(client.leg.wants_write());
    let (mut client, mut server) = connected();
    server.handle().unwrap();
    exchange(&mut client, &mut server, 1).unwrap();
}
