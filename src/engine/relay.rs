//! The two relays. In plaintext the kernel moves the octets, between the client's descriptors and the child's pipes. In TLS
//! each record of one leg is encrypted into the other leg's queue from the place where rustls has put its plaintext.

use std::io;
use std::time::Instant;

use log::warn;
use mio::Interest;

use crate::session::{BackendEnd, ChildEnd, ClientEnd, EndReason, HandoverFailure, Phase, Session, Way};
use crate::sys::child;
use crate::sys::end::{End, Registry};

use super::backend::Backend;
use super::bridge::{self, Received, Trouble};
use super::conn::Conn;
use super::pump::{Relay, Run};
use super::secure::{Whose, tls_trouble};
use super::tokens::CHILD_EXIT;

/// Reads of one direction before the other has its turn; each takes up to 256 KiB.
pub(super) const READS: usize = 8;

impl Conn {
    /// Client and backend, in no TLS of ours: the kernel moves these octets too. What was queued for the backend leaves first.
    fn relay_clear(&mut self, registry: &Registry, now: Instant) -> bool {
        let is_ready = |backend: &mut Backend| self.session.to_backend.is_empty() && backend.takes_more();
        if let Some(backend) = self.backend.take_if(is_ready) {
            let is_deaf = backend.is_deaf;
            let halves = backend.into_halves(registry).and_then(|halves| {
                let (mut from, to) = halves.ok_or(std::io::ErrorKind::InvalidInput)?;
                from.watch(registry, Interest::READABLE)?;
                Ok((from, to.filter(|_| !is_deaf)))
            });
            match halves {
                Ok((from, to)) => (self.child_out, self.child_in) = (Some(from), to),
                Err(error) => self.session.handle_end(EndReason::System(format!("can't watch: {error}")), now),
            }
        }
        self.backend.is_none() && self.relay_plain(registry, now)
    }

    /// Client and child. What was queued before the cutoff leaves first, in either direction.
    pub(super) fn relay_plain(&mut self, registry: &Registry, now: Instant) -> bool {
        self.release_holder(registry, now);
        self.release_tls_server(registry, now);
        let mode = self.mode;
        let Some(client) = &mut self.client else { return false };
        let relay = match &mut self.relay {
            Some(relay) => relay,
            none => {
                // From here on either end of a direction wakes its pump.
                let ends = [Some(client.ends.output()), self.child_in.as_mut()];
                for end in ends.into_iter().flatten() {
                    if let Err(error) = end.watch(registry, Interest::WRITABLE) {
                        self.session.handle_end(EndReason::System(format!("can't watch: {error}")), now);
                        return true;
                    }
                }
                none.insert(Box::new(Relay::new(mode)))
            }
        };
        let (before_in, before_out) = (relay.to_server.moved, relay.to_client.moved);
        let mut again = false;
        if client.is_over && self.session.to_child.is_empty() {
            end_input(&mut self.child_in);
        } else if let Some(sink) = self.child_in.as_mut().filter(|_| self.session.to_child.is_empty())
            && relay.to_server.is_awake
        {
            match relay.to_server.run(&mut client.ends.input, sink) {
                Run::Wait => {}
                Run::Again => again = true,
                Run::Ended => {
                    client.is_over = true;
                    again = true;
                }
                // It reads no more; what it still says is passed on.
                Run::SinkGone => end_input(&mut self.child_in),
                Run::SinkBroke => {
                    relay.is_server_broken = true;
                    end_input(&mut self.child_in);
                }
                Run::SourceBroke => {
                    client.is_over = true;
                    self.session.handle_end(EndReason::Client(ClientEnd::BrokeOff), now);
                    again = true;
                }
                Run::Failed(error) => {
                    self.session.handle_end(cannot_relay(&error), now);
                    again = true;
                }
            }
        }
        if let Some(source) = self.child_out.as_mut().filter(|_| self.session.to_client.is_empty())
            && relay.to_client.is_awake
        {
            let run = match relay.to_client.run(source, client.ends.output()) {
                Run::Ended if relay.is_server_broken => Run::SourceBroke,
                run => run,
            };
            // By the way `raw` that HOST goes without a word is all that is ever seen of a header that it did not take, or of TLS that
            // it could not begin.
            let is_wordless = || {
                let is_open = !client.is_over && !client.is_lost;
                is_open
                    && relay.to_client.moved == 0
                    && self.policy.way == Way::Raw
                    && self.session.phase() == Phase::RelayTls
            };
            match run {
                Run::Wait => {}
                Run::Again => again = true,
                Run::Ended | Run::SourceBroke if is_wordless() => {
                    let how = if matches!(run, Run::Ended) { "closed" } else { "broke off" };
                    let why = format!("the backend {how} without a word");
                    let failure = HandoverFailure { way: Way::Raw, step: Phase::RelayTls, why };
                    self.session.handle_end(EndReason::Handover(failure), now);
                    again = true;
                }
                Run::SourceBroke if self.child.is_none() => {
                    let reason = match self.session.phase() {
                        Phase::RelayPlain => EndReason::Child(ChildEnd::BrokeOff),
                        _ => EndReason::Backend(BackendEnd::BrokeOff),
                    };
                    self.session.handle_end(reason, now);
                    again = true;
                }
                Run::Ended | Run::SourceBroke => {
                    self.child_out = None;
                    client.ends.output().shut_down();
                    self.session.handle_server_finished(now);
                }
                Run::SinkGone | Run::SinkBroke => {
                    client.is_deaf = true;
                    self.session.handle_end(EndReason::Client(ClientEnd::BrokeOff), now);
                    again = true;
                }
                Run::Failed(error) => {
                    self.session.handle_end(cannot_relay(&error), now);
                    again = true;
                }
            }
        }
        let (moved_in, moved_out) = (relay.to_server.moved - before_in, relay.to_client.moved - before_out);
        if client.is_over || self.child_out.is_none() {
            self.batch.end(&client.ends.input);
        } else {
            self.batch.note(&client.ends.input, moved_in, moved_out, now);
        }
        self.tally.received += moved_in;
        self.tally.sent += moved_out;
        if moved_in + moved_out > 0 {
            self.session.handle_relayed(now);
        }
        again || self.await_child(registry, now)
    }

    /// The child has said its last: when it has ended too, the session is over. A server's end closes the connection.
    fn await_child(&mut self, registry: &Registry, now: Instant) -> bool {
        if self.child_out.is_some() {
            return false;
        }
        let Some(child) = &mut self.child else {
            // It was HOST's connection that ended; the client's may have ended before.
            let is_over = self.client.as_ref().is_none_or(|client| client.is_over);
            if is_over {
                self.session.handle_end(EndReason::Over, now);
            }
            return is_over;
        };
        let looked = self.exit.is_some();
        if self.exit.as_mut().is_some_and(|exit| !core::mem::take(&mut exit.readable)) {
            return false;
        }
        match child.try_reap() {
            Ok(Some(status)) => {
                self.child = None;
                let reason = match child::killed_by(status) {
                    Some(signal) => EndReason::Child(ChildEnd::Killed(signal)),
                    None => EndReason::Over,
                };
                self.session.handle_end(reason, now);
                true
            }
            Ok(None) if looked => false,
            Ok(None) => {
                match child.exit_event().map(|fd| End::event(fd, CHILD_EXIT)) {
                    Ok(mut exit) => match exit.watch(registry, Interest::READABLE) {
                        Ok(()) => self.exit = Some(exit),
                        Err(error) => warn!("can't watch the child: {error}"),
                    },
                    Err(error) => warn!("can't watch the child: {error}"),
                }
                false
            }
            Err(error) => {
                self.child = None;
                self.session.handle_end(EndReason::System(format!("can't reap the child: {error}")), now);
                true
            }
        }
    }

    /// Client and backend.
    pub(super) fn relay_tls(&mut self, registry: &Registry, now: Instant) -> bool {
        if self.client.as_ref().is_some_and(|client| client.leg.is_none()) {
            return self.relay_clear(registry, now);
        }
        let (received, sent) = (self.tally.received, self.tally.sent);
        let moved = self.relay_to_backend(now) | self.relay_to_client(now);
        if let Some(client) = &self.client {
            if client.is_over || client.close_sent {
                self.batch.end(&client.ends.input);
            } else {
                self.batch.note(&client.ends.input, self.tally.received - received, self.tally.sent - sent, now);
            }
        }
        if received != self.tally.received || sent != self.tally.sent {
            self.session.handle_relayed(now);
        }
        let is_finished = self.backend.as_ref().is_some_and(|backend| backend.is_child() && backend.is_over);
        moved || (is_finished && self.await_child(registry, now))
    }

    fn relay_to_backend(&mut self, now: Instant) -> bool {
        let (Some(client), Some(backend)) = (&mut self.client, &mut self.backend) else { return false };
        let Some(leg) = &mut client.leg else { return false };
        if !self.session.to_backend.is_empty() {
            // It came before what is read here.
            return false;
        }
        let mut moved = false;
        let mut reads = READS;
        while reads > 0 && client.ends.input.readable && !client.is_over && !leg.peer_closed() && backend.takes_more() {
            reads -= 1;
            let mut refused = None;
            let received = bridge::receive(&mut client.ends.input, leg, &mut |octets| {
                refused = backend.send(octets).err().or(refused.take());
            });
            moved |= !matches!(received, Ok(Received::Nothing));
            match received {
                Ok(Received::Nothing) => break,
                Ok(Received::Octets(count)) => self.tally.received += count as u64,
                // A reset too: a client that closes before it has read our close_notify causes one.
                Ok(Received::End) | Err(Trouble::Broken(_)) => {
                    client.is_over = true;
                    if !leg.peer_closed() && !client.close_sent {
                        // Not a clean end: the backend must not take it for one.
                        self.session.handle_client_broke_off(now);
                    }
                }
                Err(Trouble::Tls(error, count)) => {
                    self.tally.received += count as u64;
                    tls_trouble(&mut self.session, Whose::Client, error, now);
                    return true;
                }
            }
            if let Some(error) = refused {
                tls_trouble(&mut self.session, Whose::Backend, error, now);
                return true;
            }
            backend.transmit();
        }
        if (leg.peer_closed() || (client.is_over && client.close_sent)) && backend.close() {
            moved = true;
        }
        let is_told = client.close_sent && !leg.wants_write();
        moved | finished(&mut self.session, is_told, backend, now)
    }

    fn relay_to_client(&mut self, now: Instant) -> bool {
        let (Some(client), Some(backend)) = (&mut self.client, &mut self.backend) else { return false };
        let Some(leg) = &mut client.leg else { return false };
        let mut moved = false;
        if backend.is_over && !backend.has_ended_cleanly() {
            // Its end came together with the reply that opened the gate.
            self.session.handle_end(EndReason::Backend(backend.broken_end()), now);
            return true;
        }
        let mut reads = READS;
        while reads > 0
            && backend.input().readable
            && !backend.is_over
            && !backend.has_ended_cleanly()
            && !leg.wants_write()
        {
            reads -= 1;
            let mut refused = None;
            let received = backend.receive(&mut |octets| {
                refused = leg.send(octets).err().or(refused.take());
            });
            moved |= !matches!(received, Ok(Received::Nothing));
            match received {
                Ok(Received::Nothing) => break,
                Ok(Received::Octets(_)) => {}
                Ok(Received::End) | Err(Trouble::Broken(_)) => {
                    backend.is_over = true;
                    if !backend.has_ended_cleanly() {
                        // What came before still leaves; the end that follows it is no clean one.
                        let was_first = !client.is_over || leg.peer_closed();
                        let reason = if was_first {
                            EndReason::Backend(backend.broken_end())
                        } else {
                            EndReason::Client(ClientEnd::BrokeOff)
                        };
                        self.session.handle_end(reason, now);
                        return true;
                    }
                    if backend.is_child() {
                        // Whether that was the end or an abort, its exit says.
                        self.session.handle_server_finished(now);
                    }
                }
                Err(Trouble::Tls(error, _)) => {
                    tls_trouble(&mut self.session, Whose::Backend, error, now);
                    return true;
                }
            }
            if let Some(error) = refused {
                tls_trouble(&mut self.session, Whose::Client, error, now);
                return true;
            }
            match bridge::transmit(client.ends.output(), leg) {
                Ok(count) => self.tally.sent += count as u64,
                // The next write finds it too, and says so.
                Err(_) => break,
            }
        }
        if backend.has_ended_cleanly() && !backend.is_child() && !client.close_sent {
            client.close_sent = true;
            leg.send_close();
            moved = true;
            self.session.handle_server_finished(now);
        }
        if client.close_sent && !client.is_shut && !leg.wants_write() {
            client.is_shut = true;
            client.ends.output().shut_down();
        }
        moved | finished(&mut self.session, client.close_sent && !leg.wants_write(), backend, now)
    }
}

fn cannot_relay(error: &io::Error) -> EndReason {
    EndReason::System(format!("can't relay: {error}"))
}

/// No more will come: a child sees the end of its input, a socket's server that of our side.
pub(super) fn end_input(end: &mut Option<End>) {
    if let Some(mut end) = end.take().filter(End::is_socket) {
        end.shut_down();
    }
}

/// Both directions have ended cleanly: the session is over.
fn finished(session: &mut Session, to_client_closed: bool, backend: &Backend, now: Instant) -> bool {
    let over = to_client_closed && (backend.close_sent || backend.is_deaf);
    if over {
        session.handle_end(EndReason::Over, now);
    }
    over
}
