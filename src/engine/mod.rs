//! The loop: waits, tells a connection what became ready, has it driven, until it is over.
//!
//! [`Conn::drive`] is the one function that decides what to read and write next; this file only waits. An idle session is
//! one `epoll_wait` without anything else: no tick, no polling.

mod backend;
mod batch;
mod bridge;
mod closing;
mod conn;
mod crowd;
mod dismissal;
mod handover;
mod labels;
mod linger;
pub mod meter;
mod notice;
mod plaintext;
mod pump;
mod relay;
mod report;
mod secure;
mod summon;
pub(crate) mod talk;
mod tell;
mod through;
mod tokens;
mod ucspi_tls;
mod write;

use std::io;
use std::time::{Duration, Instant};

use mio::{Events, Poll};

pub use backend::Backend;
pub use bridge::{Received, Trouble};
pub use conn::{Conn, Driven, Ends, Parts};
pub use crowd::{Asking, Crowd, OTHERS};
pub use handover::{Peer, Secrets, Setups};
pub use labels::{REASONS, state};
pub use summon::{Front, Source};
pub use tell::tell;
pub use through::SPARE_PIPES;
pub use tokens::{CLIENT_IN, CLIENT_OUT, SIGNALS, TLS_SERVER};
pub use ucspi_tls::TlsServer;

use crate::buffer::spare;
use crate::error::exit;
use crate::session::EndReason;
use crate::sys::end::Registry;

/// A connection that has been silent for so long gives the large buffers back as well.
const IDLE: Duration = Duration::from_secs(1);

/// What the loop can be told at once; more waits in the kernel.
const EVENTS: usize = 16;

/// Runs one connection to its end. Returns the exit code of its session.
///
/// # Errors
/// The loop itself can't wait any more, not even for the session's farewell, which the first such failure begins.
pub fn run(poll: &mut Poll, conn: &mut Conn) -> io::Result<u8> {
    let mut events = Events::with_capacity(EVENTS);
    let mut has_failed = false;
    loop {
        let now = Instant::now();
        let timeout = match conn.drive(&Registry::new(poll.registry(), 0), now) {
            Driven::Over => return Ok(conn.end().map_or(exit::BUG, |reason| reason.exit_code())),
            Driven::Again => Some(core::time::Duration::ZERO),
            Driven::Wait => {
                let due = conn.deadline().map(|due| due.saturating_duration_since(now));
                spare::are_kept().then_some(IDLE).into_iter().chain(due).min()
            }
        };
        match poll.poll(&mut events, timeout) {
            Ok(()) if events.is_empty() && now.elapsed() >= IDLE => spare::drop_all(),
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if has_failed => return Err(error),
            Err(error) => {
                has_failed = true;
                conn.end_with(EndReason::System(format!("can't wait for events: {error}")));
                continue;
            }
        }
        for event in &events {
            conn.note(event.token(), event);
        }
    }
}
