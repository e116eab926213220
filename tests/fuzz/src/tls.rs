//! Target: the TLS legs. The first octet chooses who faces whom; the rest is octets for a leg, or a list of damages to a real
//! conversation: four octets each, see [`Damage`].
//!
//! A conversation is a handshake and then lines both ways. Undamaged, however it is cut, it succeeds and every octet arrives.
//! Damaged, a leg may fail, but what it delivers is a prefix of what the other sent, and a clean end is reported only where
//! one was sent. Always: a leg's buffers hold no more than their cap, and all else of it [`BEYOND`]; an error stays, and every run ends.

use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use rustls::crypto::aws_lc_rs::default_provider;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConnection, RootCertStore};
use starttls_wrapper::tls::{
    ClientConfig, Identity, Leg, Roots, ServerConfig, Tickets, TlsError, Trust, client_setup, server_name, server_setup,
};

use super::memory;

const HOST: &str = "mx.example";
/// What src/tls/buffer.rs allows to be held before and after the handshake.
const HANDSHAKE: usize = 64 * 1024;
const TRAFFIC: usize = 256 * 1024;
/// What a leg may hold besides its buffers: rustls' connection, and the certificates that it was shown.
const BEYOND: isize = 128 * 1024;
/// rustls 0.23.46, and with debug assertions alone: a damaged record behind our own close_notify. `CommonState::send_fatal_alert`
/// asserts that no alert was sent, and counts close_notify as one. As shipped, the alert is queued behind the close_notify, and the
/// error is the record's.
const ALERT_BEHIND_CLOSE: &str = "assertion failed: !self.sent_fatal_alert";

/// Made once: our two sides, and clients that are not ours, of either version.
struct Setups {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    foreign: [Arc<ClientConfig>; 2],
}

fn setups() -> &'static Setups {
    static SETUPS: OnceLock<Setups> = OnceLock::new();
    SETUPS.get_or_init(|| {
        let identity = Identity::self_signed(HOST).expect("a certificate");
        let name = server_name(HOST).expect("a name");
        let own_leaf = Some(identity.leaf().clone());
        let trust = Trust { own_leaf, roots: Roots::default(), name, insecure: false };
        let foreign = [&TLS12, &TLS13].map(|version| {
            let mut roots = RootCertStore::empty();
            roots.add(identity.leaf().clone()).expect("a root");
            let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
                .with_protocol_versions(&[version])
                .expect("a version")
                .with_root_certificates(roots)
                .with_no_client_auth();
            Arc::new(config)
        });
        let server = server_setup(&identity, Some(&Tickets::in_memory().expect("keys"))).expect("a server");
        Setups { server, client: client_setup(trust).expect("a client"), foreign }
    })
}

/// One change to what flies: in flight `flight`, at `at` of 256 parts of it (or that octet, in the first and last 64).
#[derive(Clone, Copy, Debug)]
struct Damage {
    flight: u8,
    kind: u8,
    at: u8,
    with: u8,
}

impl Damage {
    fn apply(self, flight: &mut Vec<u8>) {
        let length = flight.len();
        let at = match usize::from(self.at) {
            at @ 0..64 => at.min(length.saturating_sub(1)),
            at @ 192.. => length.saturating_sub(256 - at),
            at => length * (at - 64) / 128,
        };
        if length == 0 {
            return;
        }
        match self.kind % 6 {
            0 => flight[at] ^= self.with | 1,
            1 => flight[at] = self.with,
            2 => flight.truncate(at),
            3 => drop(flight.splice(at..at, vec![self.with; usize::from(self.with) + 1])),
            4 => drop(flight.drain(at..(at + usize::from(self.with) + 1).min(length))),
            _ => flight.extend_from_within(at..),
        }
    }
}

/// A leg, and what was seen of it.
struct Watched {
    leg: Leg,
    received: Vec<u8>,
    /// The most that waited in it: its buffer is not given back while it is used.
    most_queued: usize,
    /// What it has allocated and not freed.
    held: isize,
}

impl Watched {
    fn new(make: impl FnOnce() -> Leg) -> Self {
        let held = memory::held();
        let leg = make();
        Self { leg, received: Vec::new(), most_queued: 0, held: memory::held() - held }
    }

    /// One call, for whose memory the leg answers.
    fn call<R>(&mut self, call: impl FnOnce(&mut Leg, &mut Vec<u8>) -> R) -> R {
        let own = |received: &Vec<u8>| memory::held() - isize::try_from(received.capacity()).expect("a capacity");
        let held = own(&self.received);
        let result = call(&mut self.leg, &mut self.received);
        self.held += own(&self.received) - held;
        result
    }

    fn take_outgoing(&mut self) -> Vec<u8> {
        let octets = self.leg.outgoing().to_vec();
        self.most_queued = octets.len().max(self.most_queued);
        self.call(|leg, _| leg.sent(octets.len()));
        octets
    }

    /// Gives octets to it as a reader of a socket would, and checks what holds for every leg.
    fn give(&mut self, mut octets: &[u8], piece: usize) -> Result<(), TlsError> {
        while !octets.is_empty() {
            let room = self.call(|leg, _| leg.room().len());
            if room == 0 {
                assert!(self.leg.is_failed() || self.leg.peer_closed(), "no room, and no reason");
                return Ok(());
            }
            let (taken, rest) = octets.split_at(room.min(octets.len()).min(piece));
            octets = rest;
            let cap = if self.leg.is_handshaking() { HANDSHAKE } else { TRAFFIC };
            let handled = self.call(|leg, received| {
                leg.room()[..taken.len()].copy_from_slice(taken);
                leg.filled(taken.len());
                leg.handle_records(&mut |plaintext| received.extend_from_slice(plaintext))
            });
            let queued = self.leg.outgoing().len().max(self.most_queued);
            // As the engine does before it waits: what was borrowed may be larger than what this one may hold.
            self.call(|leg, _| leg.give_back());
            let footprint = self.leg.footprint();
            assert!(footprint <= 2 * (cap + queued) + 32 * 1024, "{footprint} octets of {cap}");
            let beyond = self.held - isize::try_from(footprint).expect("a footprint");
            // A panic that is caught may have had its backtrace printed, which takes memory for good.
            let has_panicked = matches!(handled, Err(TlsError::Panicked(_)));
            assert!(beyond <= BEYOND || has_panicked, "{beyond} octets besides its buffers");
            if let Err(error) = handled {
                assert!(self.leg.is_failed() && self.leg.room().is_empty());
                let again = self.leg.handle_records(&mut |_| panic!("plaintext behind an error"));
                assert_eq!(again.map_err(|e| e.to_string()), Err(error.to_string()), "the error has changed");
                assert!(self.leg.send(b"x").is_err());
                let is_ours = matches!(&error, TlsError::Panicked(why) if why != ALERT_BEHIND_CLOSE);
                assert!(!is_ours && !matches!(error, TlsError::Unexpected(_)), "{error}");
                return Err(error);
            }
            assert!(!self.leg.is_failed());
        }
        Ok(())
    }
}

/// Either side of a conversation.
enum End {
    Leg(Box<Watched>),
    Foreign(Box<ClientConnection>, Vec<u8>),
}

impl End {
    fn received(&self) -> &[u8] {
        match self {
            Self::Leg(watched) => &watched.received,
            Self::Foreign(_, received) => received,
        }
    }

    fn send(&mut self, octets: &[u8], close: bool) {
        match self {
            Self::Leg(watched) => watched.call(|leg, _| {
                drop(leg.send(octets));
                if close {
                    leg.send_close();
                }
            }),
            Self::Foreign(foreign, _) => {
                drop(foreign.writer().write_all(octets));
                if close {
                    foreign.send_close_notify();
                }
            }
        }
    }

    fn take_outgoing(&mut self) -> Vec<u8> {
        match self {
            Self::Leg(watched) => watched.take_outgoing(),
            Self::Foreign(foreign, _) => {
                let mut octets = Vec::new();
                while foreign.wants_write() {
                    drop(foreign.write_tls(&mut octets));
                }
                octets
            }
        }
    }

    /// Receives, in pieces; the error, if it is over.
    fn receive(&mut self, octets: &[u8], piece: usize) -> Result<(), String> {
        match self {
            Self::Leg(watched) => watched.give(octets, piece).map_err(|error| error.to_string()),
            Self::Foreign(foreign, received) => {
                for mut piece in octets.chunks(piece) {
                    while !piece.is_empty() {
                        let taken = foreign.read_tls(&mut piece).map_err(|error| error.to_string())?;
                        // It may panic as told at ALERT_BEHIND_CLOSE; that is its own business.
                        let processed = catch_unwind(AssertUnwindSafe(|| foreign.process_new_packets().map(drop)));
                        processed.map_err(|_| ALERT_BEHIND_CLOSE.to_owned())?.map_err(|error| error.to_string())?;
                        drop(foreign.reader().read_to_end(received));
                        if taken == 0 {
                            return Ok(());
                        }
                    }
                }
                Ok(())
            }
        }
    }

    fn is_closed(&self) -> bool {
        matches!(self, Self::Leg(watched) if watched.leg.peer_closed())
    }

    fn is_open(&self) -> bool {
        match self {
            Self::Leg(watched) => !watched.leg.is_handshaking() && !watched.leg.is_failed(),
            Self::Foreign(foreign, _) => !foreign.is_handshaking(),
        }
    }
}

/// One input.
pub fn run(octets: &[u8]) {
    let Some((&choice, rest)) = octets.split_first() else { return };
    let setups = setups();
    let server = Watched::new(|| Leg::accept(&setups.server).expect("a server"));
    let client =
        || Watched::new(|| Leg::connect(&setups.client, server_name(HOST).expect("a name")).expect("a client"));
    match choice % 8 {
        0 => raw(server, rest),
        1 => raw(client(), rest),
        2 | 3 => {
            let name = server_name(HOST).expect("a name");
            let foreign = ClientConnection::new(setups.foreign[usize::from(choice % 2)].clone(), name);
            converse(End::Foreign(Box::new(foreign.expect("a client")), Vec::new()), server, rest);
        }
        _ => converse(End::Leg(Box::new(client())), server, rest),
    }
}

/// Octets that nobody encrypted, in pieces of the size that the first one says.
fn raw(mut watched: Watched, octets: &[u8]) {
    let Some((&piece, octets)) = octets.split_first() else { return };
    let taken = watched.give(octets, usize::from(piece) + 1);
    let Watched { mut leg, received, .. } = watched;
    assert!(received.is_empty() && leg.is_handshaking() && !leg.peer_closed());
    if taken.is_ok() {
        assert!(matches!(leg.send(b"x"), Err(TlsError::NotReady)));
        leg.send_close();
    }
}

fn converse(client: End, server: Watched, input: &[u8]) {
    let [piece, bulk, input @ ..] = input else { return };
    let pieces =
        [[usize::MAX, 1, 2, 5, 17, 1000, 1448, 16_401][usize::from(piece & 7)], usize::from(piece >> 3) * 40 + 1];
    let damages: Vec<Damage> =
        input.chunks_exact(4).take(8).map(|d| Damage { flight: d[0] % 12, kind: d[1], at: d[2], with: d[3] }).collect();
    let damage_at = |flight: usize| damages.iter().filter(move |d| usize::from(d.flight) == flight);
    let mut ends = [client, End::Leg(Box::new(server))];
    let (mut sent, mut closed, mut harmed, mut error) = ([Vec::new(), Vec::new()], [false; 2], false, None);
    let mut said = [0; 2];
    for flight in 0..60 {
        let (from, to) = (flight % 2, 1 - flight % 2);
        if ends[from].is_open() && said[from] < 3 {
            said[from] += 1;
            let length = usize::from(*bulk) * usize::from(*bulk) / said[from];
            let octets: Vec<u8> = (0..length).map(|n| (n * 7 + said[from]) as u8).collect();
            closed[from] = said[from] == 3;
            ends[from].send(&octets, closed[from]);
            sent[from].extend_from_slice(&octets);
        }
        let mut octets = ends[from].take_outgoing();
        let before = octets.clone();
        damage_at(flight).for_each(|damage| damage.apply(&mut octets));
        harmed |= before != octets;
        if let Err(why) = ends[to].receive(&octets, pieces[to]) {
            error = Some(why);
        }
        let (received, sent) = (ends[to].received(), &sent[from]);
        assert!(sent.starts_with(received), "{} octets arrived that nobody sent", received.len());
        assert!(!ends[to].is_closed() || closed[from] && received.len() == sent.len(), "a clean end too early");
    }
    if !harmed {
        assert_eq!(error, None, "pieces of {pieces:?}");
        for side in [0, 1] {
            assert!(said[side] == 3 && ends[1 - side].received() == sent[side], "undamaged, and not all arrived");
        }
        assert!(ends[1].is_closed());
    }
}
