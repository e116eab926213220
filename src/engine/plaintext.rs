//! The dialogue in plaintext: child and client are read as far as the session wants to hear them.

use std::time::Instant;

use crate::session::{ClientEnd, EndReason};

use super::conn::{Conn, SCRATCH};
use super::relay::{READS, end_input};

impl Conn {
    pub(super) fn snoop(&mut self, now: Instant) -> bool {
        // Nothing of a hand-over that failed is used again.
        self.drop_backend();
        self.dial = None;
        let moved = self.read_child(now) | self.read_client(now);
        if self.session.wants_child_eof() && self.session.to_child.is_empty() {
            end_input(&mut self.child_in);
        }
        moved
    }

    pub(super) fn read_child(&mut self, now: Instant) -> bool {
        if self.child_out.is_none() {
            return false;
        }
        let (mut moved, mut scratch) = (false, [0; SCRATCH]);
        while self.session.wants_child() {
            let Some(out) = self.child_out.as_mut().filter(|out| out.readable) else { break };
            match out.read(&mut scratch) {
                Ok(None) => break,
                Ok(Some(count)) if count > 0 => self.session.handle_child(&scratch[..count], now),
                Ok(Some(_)) | Err(_) => {
                    self.child_out = None;
                    self.session.handle_child_eof(now);
                }
            }
            moved = true;
        }
        moved
    }

    /// Reads the client as far as the session wants it.
    pub(super) fn read_client(&mut self, now: Instant) -> bool {
        let is_tls = self.client.as_ref().is_some_and(|client| client.leg.is_some());
        if is_tls && self.session.is_inside() {
            return self.read_client_tls(now);
        }
        if self.client.as_ref().is_none_or(|client| !client.ends.input.readable) {
            return false;
        }
        let (mut moved, mut scratch) = (false, [0; SCRATCH]);
        // Not until nothing is left: timers and signals have their turn under a flood too.
        for _ in 0..READS {
            let Some(client) = self.client.as_mut().filter(|client| client.ends.input.readable && !client.is_over)
            else {
                break;
            };
            let room = self.session.client_room().min(SCRATCH);
            if room == 0 {
                break;
            }
            match client.ends.input.read(&mut scratch[..room]) {
                Ok(None) => break,
                Ok(Some(0)) => {
                    client.is_over = true;
                    self.session.handle_client_eof(now);
                }
                Ok(Some(count)) => {
                    self.tally.received += count as u64;
                    self.session.handle_client(&scratch[..count], now);
                }
                Err(_) => {
                    client.is_over = true;
                    self.session.handle_end(EndReason::Client(ClientEnd::BrokeOff), now);
                }
            }
            moved = true;
        }
        moved
    }
}
