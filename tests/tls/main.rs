//! The TLS legs from outside: leg against leg, and leg against rustls' buffered connections as an independent peer. All in memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod hostile;
mod peers;
mod tickets;
mod traffic;
mod trust;
