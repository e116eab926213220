//! Which tickets count, and for how long.

use std::sync::Mutex;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{ServerName, UnixTime};
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
};

use super::*;
use crate::tls::{Identity, Leg, server_setup};

/// A key file's line: this octet 48 times.
fn key(octet: u8) -> String {
    use std::fmt::Write;
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = u32::from_be_bytes([0, octet, octet, octet]);
    let mut group = String::new();
    for shift in [18, 12, 6, 0] {
        write!(group, "{}", char::from(DIGITS[(bits >> shift & 63) as usize])).unwrap();
    }
    group.repeat(16) + "\n"
}

/// A clock that is set.
#[derive(Debug)]
struct Clock(Mutex<u64>);

/// What this one shows at first.
const NOON: u64 = 1_800_000_000;

impl Clock {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(NOON)))
    }

    fn set(&self, seconds: u64) {
        *self.0.lock().unwrap() = seconds;
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(*self.0.lock().unwrap())))
    }
}

fn ticketer(keys: &str, leaf: &[u8], clock: &Arc<Clock>) -> Arc<dyn ProducesTickets> {
    let leaf = CertificateDer::from(leaf.to_vec());
    Tickets::from_keys(keys.as_bytes()).unwrap().ticketer(&leaf, clock.clone()).unwrap()
}

#[test]
fn a_file_has_one_to_eight_keys_and_says_what_is_wrong() {
    let all: String = (1..=8).map(key).collect();
    for good in [key(1), format!("# of today\r\n\n  {}\r\n", key(2).trim()), key(3).trim().to_owned(), all.clone()] {
        assert!(Tickets::from_keys(good.as_bytes()).is_ok(), "{good}");
    }
    for (text, why) in [
        (String::new(), "no key in it"),
        ("# nothing\n\n".to_owned(), "no key in it"),
        (all + &key(9), "line 9: more than 8 keys"),
        (format!("{}{}{}", key(1), key(2), key(1)), "line 3: this key is there already"),
        (format!("{}secret\n", key(1)), "line 2: not 48 octets of base64 (openssl rand -base64 48)"),
        (key(1).trim()[4..].to_owned(), "line 1: not 48 octets of base64 (openssl rand -base64 48)"),
        (key(1).trim().to_owned() + "AAAA", "line 1: not 48 octets of base64 (openssl rand -base64 48)"),
        (format!("{} {}", key(1).trim(), key(2)), "line 1: not 48 octets of base64 (openssl rand -base64 48)"),
    ] {
        assert_eq!(Tickets::from_keys(text.as_bytes()).err().as_deref(), Some(why), "{text:?}");
    }
}

#[test]
fn whoever_has_the_key_opens_what_it_sealed_and_nobody_else() {
    let clock = Clock::new();
    let today = ticketer(&key(1), b"mx", &clock);
    let ticket = today.encrypt(b"state").unwrap();
    let rotated = ticketer(&(key(2) + &key(1)), b"mx", &clock);
    assert_eq!(rotated.decrypt(&ticket).as_deref(), Some(&b"state"[..]));
    assert_eq!(today.decrypt(&rotated.encrypt(b"state").unwrap()), None, "the first key seals");
    assert_eq!(ticketer(&key(2), b"mx", &clock).decrypt(&ticket), None);
    assert_ne!(today.encrypt(b"state").unwrap(), ticket, "a nonce again");
    assert!(!ticket.windows(5).any(|part| part == b"state"));
}

#[test]
fn a_ticket_counts_for_one_certificate() {
    let clock = Clock::new();
    let memory = Tickets::in_memory().unwrap();
    let kept = |leaf: &[u8]| memory.ticketer(&CertificateDer::from(leaf.to_vec()), clock.clone()).unwrap();
    for (one, again, other) in [
        (kept(b"mx"), kept(b"mx"), kept(b"other")),
        (ticketer(&key(1), b"mx", &clock), ticketer(&key(1), b"mx", &clock), ticketer(&key(1), b"other", &clock)),
    ] {
        let ticket = one.encrypt(b"state").unwrap();
        assert_eq!(again.decrypt(&ticket).as_deref(), Some(&b"state"[..]));
        assert_eq!(other.decrypt(&ticket), None);
    }
}

#[test]
fn a_ticket_that_is_cut_changed_or_too_long_is_none() {
    let ticketer = ticketer(&key(1), b"mx", &Clock::new());
    let ticket = ticketer.encrypt(b"state").unwrap();
    for length in 0..ticket.len() {
        assert_eq!(ticketer.decrypt(&ticket[..length]), None, "{length}");
    }
    for at in 0..ticket.len() {
        let mut changed = ticket.clone();
        changed[at] ^= 1;
        assert_eq!(ticketer.decrypt(&changed), None, "{at}");
    }
    let long = |length: usize| ticketer.decrypt(&ticketer.encrypt(&vec![7; length]).unwrap()).is_some();
    let overhead = NAME + NONCE + 8 + SHA256_OUTPUT_LEN + 16;
    assert_eq!((long(MOST - overhead), long(MOST - overhead + 1)), (true, false));
}

#[test]
fn a_ticket_lasts_half_a_day_by_whatever_clock() {
    let clock = Clock::new();
    let ticketer = ticketer(&key(1), b"mx", &clock);
    let ticket = ticketer.encrypt(b"state").unwrap();
    let half_a_day = u64::from(LIFETIME);
    for (at, counts) in [(NOON, true), (NOON - 60, true), (NOON + half_a_day - 1, true), (NOON + half_a_day, false)] {
        clock.set(at);
        assert_eq!(ticketer.decrypt(&ticket).is_some(), counts, "{at}");
    }
    clock.set(NOON - half_a_day);
    assert_eq!(ticketer.decrypt(&ticket), None, "a clock that was far ahead, and is set right");
}

#[test]
fn one_who_offers_several_is_as_old_as_the_oldest() {
    let clock = Clock::new();
    let ticketer = ticketer(&key(1), b"mx", &clock);
    let old = ticketer.encrypt(b"old").unwrap();
    clock.set(NOON + 100);
    let new = ticketer.encrypt(b"new").unwrap();
    for offered in [[&old, &new], [&new, &old]] {
        let mut began = None;
        handshake(&mut began, || offered.map(|ticket| ticketer.decrypt(ticket).unwrap()));
        assert_eq!(began, Some(NOON));
    }
    let mut other = None;
    handshake(&mut other, || {});
    assert_eq!(other, None, "another connection's");
}

/// Believes everybody: whose certificate it is, is not the question here.
#[derive(Debug)]
struct Everybody;

impl ServerCertVerifier for Everybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        crate::tls::provider::provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Both sides of sessions, by one clock.
struct Pair {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    clock: Arc<Clock>,
}

impl Pair {
    fn new(version: &'static SupportedProtocolVersion) -> Self {
        let clock = Clock::new();
        let identity = Identity::self_signed("mx.example").unwrap();
        let tickets = Tickets::from_keys(key(1).as_bytes()).unwrap();
        let mut server = (*server_setup(&identity, Some(&tickets)).unwrap()).clone();
        server.ticketer = tickets.ticketer(identity.leaf(), clock.clone()).unwrap();
        server.time_provider = clock.clone();
        let mut client = ClientConfig::builder_with_provider(crate::tls::provider::provider().clone())
            .with_protocol_versions(&[version])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Everybody))
            .with_no_client_auth();
        // It keeps tickets for good.
        client.time_provider = Arc::new(Clock(Mutex::new(NOON)));
        Self { server: Arc::new(server), client: Arc::new(client), clock }
    }

    /// One session at this time: whether it was resumed.
    fn resumes_at(&self, time: u64) -> bool {
        self.clock.set(time);
        let name = ServerName::try_from("mx.example").unwrap();
        let mut client = ClientConnection::new(self.client.clone(), name).unwrap();
        let mut server = Leg::accept(&self.server).unwrap();
        for _ in 0..8 {
            let mut flight = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut flight).unwrap();
            }
            if !flight.is_empty() {
                server.room()[..flight.len()].copy_from_slice(&flight);
                server.filled(flight.len());
                server.handle_records(&mut |_| {}).unwrap();
            }
            if !server.is_handshaking() {
                server.send(b"250 ok\r\n").unwrap();
            }
            let out = server.outgoing().to_vec();
            server.sent(out.len());
            let mut rest = &out[..];
            while !rest.is_empty() {
                client.read_tls(&mut rest).unwrap();
                client.process_new_packets().unwrap();
            }
        }
        assert_eq!(client.handshake_kind() == Some(HandshakeKind::Resumed), server.facts().resumed);
        server.facts().resumed
    }
}

#[test]
fn a_session_ends_half_a_day_after_its_full_handshake_however_often_it_is_resumed() {
    let hour = 60 * 60;
    for version in [&TLS12, &TLS13] {
        let pair = Pair::new(version);
        assert!(!pair.resumes_at(NOON));
        assert!(pair.resumes_at(NOON + 5 * hour));
        assert!(pair.resumes_at(NOON + 10 * hour));
        assert!(!pair.resumes_at(NOON + 12 * hour), "{version:?}");
        assert!(pair.resumes_at(NOON + 23 * hour), "{version:?}");
        assert!(!pair.resumes_at(NOON + 24 * hour), "{version:?}");
    }
}
