//! A close that the client can read: what is owed leaves, writing is shut down, the client's last octets are drained for a
//! little. A plain close with unread input resets the connection and eats the last reply (RFC 1122 4.2.2.13).

use std::time::Instant;

use mio::Registry;

use crate::session::{ClientEnd, EndReason, Phase, limits};
use crate::sys::end::End;

use super::bridge;
use super::conn::Conn;
use super::dismissal::Dismissal;
use super::report;

/// The end of a client's connection.
#[derive(Debug)]
pub(super) struct Closing {
    due: Instant,
    is_shut: bool,
    drained: usize,
}

impl Closing {
    pub(super) fn begin(now: Instant) -> Self {
        Self { due: now + limits::LINGER, is_shut: false, drained: 0 }
    }

    pub(super) fn deadline(&self) -> Instant {
        self.due
    }

    /// Goes on. `is_flushed`: nothing is left to be written. True: the descriptors may be closed.
    pub(super) fn poll(&mut self, input: &mut End, output: &End, is_flushed: bool, now: Instant) -> bool {
        if now >= self.due {
            return true;
        }
        if !is_flushed {
            return false;
        }
        if !self.is_shut {
            self.is_shut = true;
            output.shut_down();
        }
        // Only a socket is reset by unread input.
        !input.is_socket() || self.drain(input)
    }

    fn drain(&mut self, input: &mut End) -> bool {
        let mut scratch = [0; 4096];
        while input.readable {
            match input.read(&mut scratch) {
                Ok(None) => return false,
                Ok(Some(0)) | Err(_) => return true,
                Ok(Some(count)) => self.drained += count,
            }
            if self.drained >= limits::DRAIN {
                return true;
            }
        }
        false
    }
}

impl Conn {
    /// The phase `Close`: client, backend and child each come to their end. True: all have.
    pub(super) fn close(&mut self, registry: &Registry, now: Instant) -> bool {
        let clean = self.ends_cleanly();
        self.dial = None;
        if let Some(mut backend) = self.backend.take() {
            if clean && !backend.leg.is_handshaking() {
                backend.leg.send_close();
            }
            // Best effort: without it the backend sees an abort.
            let _ = bridge::transmit(&mut backend.end, &mut backend.leg);
        }
        self.dismiss(registry, now);
        self.close_client(clean, now);
        self.tend_dismissal(now);
        self.dismissal.is_none() && self.client.is_none()
    }

    /// Goes on with the child's farewell; it is over when the child is reaped.
    pub(super) fn tend_dismissal(&mut self, now: Instant) {
        if self.dismissal.as_mut().is_some_and(|dismissal| dismissal.poll(now)) {
            self.dismissal = None;
        }
    }

    fn close_client(&mut self, clean: bool, now: Instant) {
        let Some(client) = &mut self.client else { return };
        let closing = self.closing.get_or_insert_with(|| Closing::begin(now));
        let mut is_flushed = client.is_deaf || self.session.to_client.is_empty();
        if let Some(leg) = &mut client.leg {
            if clean && !client.close_sent && !leg.is_handshaking() && self.session.to_client.is_empty() {
                client.close_sent = true;
                leg.send_close();
            }
            if bridge::transmit(&mut client.output, leg).is_err() {
                client.is_deaf = true;
            }
            is_flushed = client.is_deaf || (is_flushed && !leg.wants_write());
        }
        if client.is_over && is_flushed || closing.poll(&mut client.input, &client.output, is_flushed, now) {
            let facts = client.leg.as_ref().filter(|leg| !leg.is_handshaking()).map(|leg| leg.facts());
            if let Some(reason) = self.session.end() {
                report::end(&self.info, reason, facts.as_ref(), self.tally, self.session.recorded(), self.started);
            }
            self.client = None;
        }
    }

    /// Whether the other side may take the end of TLS for a clean one.
    fn ends_cleanly(&self) -> bool {
        match self.session.end() {
            Some(EndReason::Over | EndReason::Client(ClientEnd::Gone)) => true,
            Some(reason) => reason.farewell().is_some() && self.session.ended_in() == Phase::Gate,
            None => false,
        }
    }

    /// Begins the child's farewell, once.
    pub(super) fn dismiss(&mut self, registry: &Registry, now: Instant) {
        let Some(child) = self.child.take() else { return };
        let between = !matches!(self.session.ended_in(), Phase::RelayPlain) && self.session.to_child.is_empty();
        let (stdin, stdout) = (self.child_in.take(), self.child_out.take());
        let patience = self.policy.timeouts.farewell;
        self.exit = None;
        self.dismissal = Some(Dismissal::begin(child, stdin, stdout, between, patience, registry, now));
    }
}
