//! Session tickets for clients (RFC 5077; RFC 8446 4.6.1): the state of a session, sealed with a key of ours and kept by the client, so
//! that its next one needs no signature of us, and we need no memory of it.
//!
//! Contract: rustls resumes where cipher suite (and with it the version), server name and extended master secret are those of the ticket, and
//! agrees on an application protocol anew. The rest is held here: the certificate that the client believed must be the one that it would
//! be shown now, so that who shares keys shares no more than that; and a session ends [`LIFETIME`] after its full handshake,
//! however often it was resumed (rustls holds tickets against no time at all, and in TLS 1.2 each has the secret of the first). A ticket
//! that is too old, another's or damaged is as good as none: a full handshake follows.
//!
//! Keys are random and this process's own ([`Tickets::in_memory`]), or those of a file that others have too ([`Tickets::from_keys`]).
//! The latter seal by AES-256-GCM-SIV: nonces are random, and many processes that know nothing of each other draw them.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use ::aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, Nonce, RandomizedNonceKey};
use ::aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::pki_types::CertificateDer;
use rustls::server::ProducesTickets;
use rustls::time_provider::TimeProvider;
use zeroize::Zeroizing;

use super::error::TlsError;
use super::pem::base64;
use super::provider::start_cryptography;

/// How long after its full handshake a session may be resumed, in seconds: twelve hours, as the keys of [`Tickets::in_memory`] last.
/// (RFC 8446 4.6.1 allows seven days.)
pub const LIFETIME: u32 = 12 * 60 * 60;

/// Most keys that a file may have: who rotates daily keeps a week. Each costs a handshake a look.
const MOST_KEYS: usize = 8;

/// A key by which it is found, which each ticket shows, and one that seals.
const NAME: usize = 16;
const SECRET: usize = 32;
const NONCE: usize = 12;

/// The longest ticket that is looked at: ours, with the longest server name, have 420 octets.
const MOST: usize = 512;

/// Where tickets come from.
#[derive(Clone)]
pub struct Tickets(Keys);

#[derive(Clone)]
enum Keys {
    Memory(Arc<dyn ProducesTickets>),
    /// Not touched before TLS begins.
    Octets(Arc<Vec<Zeroizing<Vec<u8>>>>),
}

impl Tickets {
    /// Random keys, shared by whoever has a clone, a new one every six hours.
    ///
    /// # Errors
    /// [`TlsError::Engine`]: there are no random octets.
    pub fn in_memory() -> Result<Self, TlsError> {
        start_cryptography();
        Ticketer::new().map(|keys| Self(Keys::Memory(keys))).map_err(TlsError::Engine)
    }

    /// The keys of a text: 48 octets of base64 a line, the first of which seals and all of which open; lines of `#` and empty ones
    /// say nothing. Wiping the text is the caller's part.
    ///
    /// # Errors
    /// What is wrong, and in which line; nothing of the text.
    pub fn from_keys(text: &[u8]) -> Result<Self, String> {
        let mut keys: Vec<Zeroizing<Vec<u8>>> = Vec::with_capacity(MOST_KEYS);
        for (number, line) in text.split(|octet| *octet == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let wrong = |what: &str| format!("line {}: {what}", number + 1);
            let key = base64(line).filter(|key| key.len() == NAME + SECRET);
            let key = key.ok_or_else(|| wrong("not 48 octets of base64 (openssl rand -base64 48)"))?;
            if keys.iter().any(|other| other[..NAME] == key[..NAME]) {
                return Err(wrong("this key is there already"));
            }
            if keys.len() == MOST_KEYS {
                return Err(wrong(&format!("more than {MOST_KEYS} keys")));
            }
            keys.push(key);
        }
        if keys.is_empty() { Err("no key in it".to_owned()) } else { Ok(Self(Keys::Octets(Arc::new(keys)))) }
    }

    /// What rustls asks for tickets, for sessions in which this certificate is shown.
    pub(super) fn ticketer(
        &self,
        leaf: &CertificateDer<'_>,
        time: Arc<dyn TimeProvider>,
    ) -> Result<Arc<dyn ProducesTickets>, rustls::Error> {
        start_cryptography();
        let sealer: Arc<dyn ProducesTickets> = match &self.0 {
            Keys::Memory(keys) => keys.clone(),
            Keys::Octets(keys) => {
                let keys = keys.iter().map(|octets| Key::new(octets)).collect::<Option<Vec<_>>>();
                Arc::new(FileKeys(keys.ok_or_else(|| rustls::Error::General("unusable ticket keys".to_owned()))?))
            }
        };
        let mut certificate = [0; SHA256_OUTPUT_LEN];
        certificate.copy_from_slice(digest(&SHA256, leaf).as_ref());
        Ok(Arc::new(Bounded { sealer, certificate, time }))
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets")
    }
}

thread_local! {
    /// When the session whose handshake this thread looks at began, if a ticket says so: seconds since 1970. See [`handshake`].
    static BEGAN: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Runs a part of one connection's handshake. `began` is what an earlier part has returned; whoever makes and opens tickets is not told
/// which connection it serves.
pub(super) fn handshake<T>(began: &mut Option<u64>, part: impl FnOnce() -> T) -> T {
    BEGAN.set(*began);
    let outcome = part();
    *began = BEGAN.take();
    outcome
}

/// Tickets that are good for one certificate and [`LIFETIME`].
struct Bounded {
    sealer: Arc<dyn ProducesTickets>,
    certificate: [u8; SHA256_OUTPUT_LEN],
    time: Arc<dyn TimeProvider>,
}

impl Bounded {
    fn now(&self) -> Option<u64> {
        self.time.current_time().map(|time| time.as_secs())
    }
}

impl ProducesTickets for Bounded {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME
    }

    fn encrypt(&self, state: &[u8]) -> Option<Vec<u8>> {
        let began = BEGAN.get().or_else(|| self.now())?;
        let bounded = Zeroizing::new([&began.to_be_bytes()[..], &self.certificate, state].concat());
        self.sealer.encrypt(&bounded)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        if ticket.len() > MOST {
            return None;
        }
        let bounded = Zeroizing::new(self.sealer.decrypt(ticket)?);
        let (began, rest) = bounded.split_first_chunk()?;
        let (certificate, state) = rest.split_first_chunk::<SHA256_OUTPUT_LEN>()?;
        let began = u64::from_be_bytes(*began);
        // Either way: clocks of two machines differ a little, and one that was set right differs much.
        if *certificate != self.certificate || self.now()?.abs_diff(began) >= LIFETIME.into() {
            return None;
        }
        // A client may offer several; the oldest counts.
        BEGAN.set(Some(BEGAN.get().map_or(began, |other| other.min(began))));
        Some(state.to_vec())
    }
}

impl fmt::Debug for Bounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bounded")
    }
}

/// A ticket: name of the key, nonce, what is sealed, tag.
struct Key {
    name: [u8; NAME],
    sealing: RandomizedNonceKey,
}

impl Key {
    fn new(octets: &[u8]) -> Option<Self> {
        let (name, secret) = octets.split_first_chunk()?;
        Some(Self { name: *name, sealing: RandomizedNonceKey::new(&AES_256_GCM_SIV, secret).ok()? })
    }
}

struct FileKeys(Vec<Key>);

impl ProducesTickets for FileKeys {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME
    }

    fn encrypt(&self, state: &[u8]) -> Option<Vec<u8>> {
        let key = self.0.first()?;
        let mut sealed = state.to_vec();
        let nonce = key.sealing.seal_in_place_append_tag(Aad::from(&key.name), &mut sealed).ok()?;
        Some([&key.name[..], nonce.as_ref(), &sealed].concat())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_first_chunk::<NAME>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE>()?;
        let key = self.0.iter().find(|key| key.name == *name)?;
        let mut state = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let length = key.sealing.open_in_place(nonce, Aad::from(name), &mut state).ok()?.len();
        state.truncate(length);
        Some(state)
    }
}

impl fmt::Debug for FileKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FileKeys")
    }
}

#[cfg(test)]
#[path = "tickets_tests.rs"]
mod tests;
