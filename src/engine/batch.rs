//! Bulk from the client in fewer, larger pieces: while a long letter comes, the kernel is asked to wake us for [`PIECE`] octets
//! (SO_RCVLOWAT, socket(7)) and not for each segment, in plaintext and in TLS. A wake-up of ours is one of the server's too.
//!
//! Invariant: what came is never kept back for longer than [`PATIENCE`], and nothing at all once the server has answered. An
//! end or a reset of the client wakes as ever. Rejected: larger pipes alone (a piece is what the socket held when we woke), and
//! a sleep between pieces (it delays a slow client's octets as well).

use std::time::{Duration, Instant};

use crate::sys::end::End;
use crate::sys::splice;

/// What we are woken for: as much as the server's pipe holds. Half of it takes twice the wake-ups and half as much time again.
const PIECE: usize = splice::BULK;

/// So much without a word of the server in between is a long letter, of which the rest may come in pieces.
const LONG: u64 = 1 << 20;

/// How long the last octets of a piece may wait for more.
const PATIENCE: Duration = Duration::from_millis(1);

/// Whether pieces are asked for at present.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Octets since the server's last word.
    run: u64,
    until: Option<Instant>,
}

impl Batch {
    /// When what has come must be looked at, however little it is.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.until
    }

    /// So much came from `client`, and so much from the server, since the last call.
    pub(super) fn note(&mut self, client: &End, from_client: u64, from_server: u64, now: Instant) {
        let is_late = self.until.is_some_and(|until| now >= until) && from_client == 0;
        if from_server > 0 || is_late {
            self.end(client);
        } else if from_client > 0 {
            self.run += from_client;
            if self.run >= LONG {
                if self.until.is_none() {
                    client.wake_for(PIECE);
                }
                self.until = Some(now + PATIENCE);
            }
        }
    }

    /// Every octet wakes again. If some are there already, that is an event.
    pub(super) fn end(&mut self, client: &End) {
        self.run = 0;
        if self.until.take().is_some() {
            client.wake_for(1);
        }
    }
}
