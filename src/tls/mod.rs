//! TLS without file descriptors: rustls' unbuffered connections over byte buffers. Knows no SMTP.
//!
//! Contract: ciphertext goes in ([`Leg::room`], [`Leg::filled`]), plaintext comes out by reference ([`Leg::handle_records`]); plaintext
//! goes in ([`Leg::send`]), ciphertext comes out ([`Leg::outgoing`], [`Leg::sent`]). Nothing here reads a clock, a socket or the
//! environment, and nothing logs: reasons come out as [`TlsError`] and [`IdentityError`]. The one exception is stated at
//! [`Roots`]: files of trusted roots are opened when it is made, and read when a backend's certificate has to be checked against them.
//!
//! Everything of rustls stays in this folder. The unbuffered interface lives in rustls 0.23 only; its successor asks for `leg.rs`
//! and `setup.rs` to be rewritten, nothing else. Its traps, all handled in `leg.rs`:
//! - held bytes must be shown again in full as long as rustls keeps offsets into them: an empty slice panics;
//! - an alert is queued when an error is returned, and must be fetched without showing the bad bytes again;
//! - a key update, or its answer, may have to be encoded before the next record is encrypted;
//! - the end of the TCP stream is invisible: see [`Leg::peer_closed`].

mod agreed;
mod buffer;
mod certificate;
mod error;
mod identity;
mod leg;
mod pem;
mod provider;
mod roots;
mod setup;
mod tickets;
mod trust;

pub use agreed::{Agreed, GROUPS, KINDS, SUITES, VERSIONS};
pub use certificate::{bears_name, check_chain, names, validity};
pub use error::TlsError;
pub use identity::{Identity, IdentityError, certificates};
pub use leg::{Facts, Leg};
pub use provider::server_name;
pub use roots::Roots;
pub use setup::{client_setup, server_setup};
pub use tickets::{LIFETIME, Tickets};
pub use trust::Trust;

pub use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
pub use rustls::{ClientConfig, ServerConfig};
