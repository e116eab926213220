//! The phase `Close`: client, backend and child each come to their end, side by side.

use std::time::{Duration, Instant};

use crate::session::{ClientEnd, EndReason, Phase, Way, limits};
use crate::sys::end::Registry;

use super::backend::Backend;
use super::bridge;
use super::conn::Conn;
use super::dismissal::Dismissal;
use super::linger::Linger;
use super::relay::end_input;
use super::report::{self, Mode};
use super::summon::Source;

/// How long what is owed may take to leave: a client that reads slowly still gets the end of what a server said before it
/// closed; one that is thrown out gets its farewell or does not.
pub(super) fn patience(reason: Option<&EndReason>) -> Duration {
    match reason {
        Some(EndReason::Over | EndReason::Backend(_) | EndReason::Child(_)) => limits::FLUSH,
        Some(_) | None => limits::LINGER,
    }
}

impl Conn {
    /// The phase `Close`: client, backend and child each come to their end. True: all have.
    pub(super) fn close(&mut self, registry: &Registry, now: Instant) -> bool {
        let clean = self.ends_cleanly();
        self.dial = None;
        if let Some(client) = &self.client {
            self.batch.end(&client.ends.input);
        }
        if let Some(backend) = &mut self.backend {
            // Best effort: without it a backend in TLS sees an abort.
            if clean {
                backend.send_close();
            }
            backend.transmit();
        }
        let was_behind_tls = self.drop_backend();
        self.dismiss(!was_behind_tls, registry, now);
        self.release_holder(registry, now);
        self.close_client(clean, now);
        self.end_tls_handshake();
        self.release_tls_server(registry, now);
        self.tend_dismissals(now);
        self.dismissals.is_empty() && self.client.is_none()
    }

    /// The backend is needed no more. True: it was the child, whose pipes are back.
    pub(super) fn drop_backend(&mut self) -> bool {
        let pipes = self.backend.take().and_then(Backend::into_pipes);
        let was_child = pipes.is_some();
        if let Some((from, to)) = pipes {
            (self.child_out, self.child_in) = (Some(from), to);
        }
        was_child
    }

    /// Goes on with each farewell; it is over when the child is reaped.
    pub(super) fn tend_dismissals(&mut self, now: Instant) {
        self.dismissals.retain_mut(|dismissal| !dismissal.poll(now));
    }

    fn close_client(&mut self, clean: bool, now: Instant) {
        let Some(client) = &mut self.client else { return };
        let patience = patience(self.session.end());
        let linger = self.linger.get_or_insert_with(|| Linger::begin(patience, now));
        let mut is_flushed = client.is_deaf || self.session.to_client.is_empty();
        if let Some(leg) = &mut client.leg {
            if clean && !client.close_sent && !leg.is_handshaking() && self.session.to_client.is_empty() {
                client.close_sent = true;
                leg.send_close();
            }
            match bridge::transmit(client.ends.output(), leg) {
                Ok(count) => self.tally.sent += count as u64,
                Err(_) => client.is_deaf = true,
            }
            is_flushed = client.is_deaf || (is_flushed && !leg.wants_write());
        }
        // Who has said QUIT has nothing more to say (RFC 2920 3.1: it is the last of a group), and what it has sent is read: only one that
        // goes on all the same can be reset.
        let is_parted = client.leg.is_none() && self.session.is_parted() && client.ends.is_drained();
        if (client.is_over || is_parted) && is_flushed || linger.poll(&mut client.ends, is_flushed, now) {
            if !is_flushed {
                self.session.handle_unsent();
            }
            let facts = client.leg.as_ref().map(|leg| leg.facts());
            let mode = match (self.policy.way, &facts, &self.told) {
                (_, Some(facts), _) => Mode::Tls(facts),
                (_, None, Some(told)) => Mode::Told(told),
                (Way::Mute, None, None) => Mode::Mute,
                (Way::Raw, None, None) if self.session.ended_in() == Phase::RelayTls => Mode::Raw,
                (_, None, None) => Mode::Plain,
            };
            if let Some(reason) = self.session.end() {
                if let Some(metered) = &mut self.metered {
                    metered.ended(reason);
                }
                // In a crowd many meet the same server: its owner says it.
                let is_ours = !(self.metered.is_some() && matches!(reason, EndReason::Child(_)));
                report::end(&self.info, reason, &mode, self.tally, self.session.recorded(), self.started, is_ours);
            }
            self.count_octets();
            self.client = None;
        }
    }

    /// Whether the other side may take the end of TLS for a clean one.
    fn ends_cleanly(&self) -> bool {
        match self.session.end() {
            Some(EndReason::Over | EndReason::Client(ClientEnd::Gone)) => true,
            Some(reason) => reason.farewell().is_some() && self.session.ended_in().is_inside(self.policy.way),
            None => false,
        }
    }

    /// Begins the child's farewell, once. `knows_us`: what it is told is ours, and not the client's inside TLS.
    pub(super) fn dismiss(&mut self, knows_us: bool, registry: &Registry, now: Instant) {
        let relayed = matches!(self.session.ended_in(), Phase::RelayPlain | Phase::RelayTls);
        let between = knows_us && !relayed && self.session.to_child.is_empty();
        let (mut stdin, stdout) = (self.child_in.take(), self.child_out.take());
        let patience = self.policy.timeouts.farewell;
        if let Some(Source::Held(holder)) = self.source.take() {
            self.dismissals.push(Dismissal::begin(holder.release(), None, None, false, patience, registry, now));
        }
        let Some(child) = self.child.take() else {
            if let (Some(socket), true) = (&mut stdin, between) {
                // A daemon: the end of the connection that follows it will not miss.
                let _ = socket.write(b"QUIT\r\n");
            }
            return end_input(&mut stdin);
        };
        if let Some(mut exit) = self.exit.take() {
            // Of a leash it is a copy, whose number the next copy gets: epoll would still know that.
            exit.unwatch(registry);
        }
        self.dismissals.push(Dismissal::begin(child, stdin, stdout, between, patience, registry, now));
    }

    /// There will be no fresh PROG: the process that waits for one ends by itself.
    pub(super) fn release_holder(&mut self, registry: &Registry, now: Instant) {
        if let Some(holder) = self.holder.take() {
            let patience = self.policy.timeouts.farewell;
            self.dismissals.push(Dismissal::begin(holder.release(), None, None, false, patience, registry, now));
        }
    }
}
