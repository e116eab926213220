//! starttls-wrapper puts STARTTLS before an SMTP server that knows none, and gets out of the way.
//!
//! # The house
//!
//! ```text
//!            client (fds 0 and 1 under a UCSPI server, or accepted: driver::listen, engine::Crowd)
//!               |
//!        [ engine::Conn: one session and its ends, on the mio loop ]
//!               |                         \
//!   child (PROG, plaintext SMTP,           backend (what goes on behind TLS: HOST PORT, or the
//!   over two pipes)                        child itself: session::Way)
//! ```
//!
//! Layers; what is above knows what is below, never the reverse:
//!
//! | layer | modules | what is true of it |
//! |---|---|---|
//! | 4 | [`cli`], [`driver`], [`check`] | what was typed; the door through which connections come; the whole set-up tried without one |
//! | 3 | [`engine`], [`sys`] | the loop and the only code that touches descriptors; `unsafe` in `sys/raw.rs` alone |
//! | 2 | [`session`], [`tls`] | no descriptor, no clock, no log: octets, events and the time come in, octets and reasons go out |
//! | 1 | [`smtp`], [`proxy`] | pure grammar |
//! | 0 | [`buffer`], [`client_info`], [`error`], [`logging`], [`variables`] | |
//!
//! The states of a session and their transitions are drawn and defined in one place, [`session::Phase`]; why a session
//! ended, what the client hears then, and the exit code in another, [`session::EndReason`].

pub mod buffer;
pub mod check;
pub mod cli;
pub mod client_info;
pub mod driver;
pub mod engine;
pub mod error;
pub mod logging;
pub mod proxy;
pub mod session;
pub mod smtp;
pub mod sys;
pub mod tls;
pub mod variables;
