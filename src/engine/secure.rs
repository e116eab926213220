//! From STARTTLS to the open gate: the backend is dialled, secured and replayed to; the client hears its 220; its TLS stands.
//!
//! Plaintext is collected here before it reaches the session: these are dialogues of a few hundred octets. In the relay
//! nothing is.

use std::time::Instant;

use mio::Interest;

use crate::logging::escape;
use crate::session::{BackendEnd, ClientEnd, EndReason, Phase, Session, Way};
use crate::sys::end::Registry;
use crate::tls::{Leg, TlsError};
use crate::variables;

use super::backend::Backend;
use super::bridge::{self, Received, Trouble};
use super::conn::{Conn, end_of_pipe};
use super::handover::{Dial, Dialled};
use super::meter::Side;
use super::relay::READS;
use super::tell::tell;
use super::tokens::{CHILD_IN, CHILD_OUT};

/// The longest error text that is logged.
const ERROR_TEXT: usize = 300;

impl Conn {
    pub(super) fn dial(&mut self, registry: &Registry, now: Instant) -> bool {
        if self.session.phase() != Phase::Dial {
            self.dial = None;
            return true;
        }
        let set_up = if self.policy.way.ends_tls() { self.set_up() } else { Ok(()) };
        match set_up.and_then(|()| self.reach(registry, now)) {
            Ok(false) => return false,
            Ok(true) => self.session.handle_dialled(now),
            Err(why) => self.session.handle_handover_failed(why, now),
        }
        self.dial = None;
        true
    }

    /// True: the server is reached, as far as it is before the 220.
    fn reach(&mut self, registry: &Registry, now: Instant) -> Result<bool, String> {
        if self.policy.way.is_ucspi_tls() {
            self.look_at_tls_server()?;
        }
        let backend = match self.policy.way {
            Way::Tls | Way::Plain | Way::Raw | Way::TlsLate | Way::PlainLate => self.connect(registry, now)?,
            Way::Keep | Way::UcspiTls | Way::Mute => Some(self.take_child_over()?),
            Way::Respawn | Way::UcspiRespawn => {
                let waits = self.holder.as_mut().is_some_and(|holder| holder.waits());
                return if waits { Ok(true) } else { Err("the process that was to become PROG is gone".to_owned()) };
            }
        };
        self.backend = backend;
        Ok(self.backend.is_some())
    }

    /// Makes what TLS needs, once, and before the 220.
    fn set_up(&mut self) -> Result<(), String> {
        if self.setups.is_none() {
            let secrets = self.secrets.as_ref().ok_or("there is no certificate")?;
            let identity = secrets.identity.as_ref().ok_or("there is no certificate")?;
            self.setups = Some(secrets.set_up(identity).map_err(|error| error.to_string())?);
            // The keys are loaded: the octets of their files are wiped.
            self.secrets = None;
        }
        Ok(())
    }

    /// Goes on with the dial that is under way, or begins one. `None`: not yet.
    fn connect(&mut self, registry: &Registry, now: Instant) -> Result<Option<Backend>, String> {
        let target = self.target.as_ref().ok_or("there is no HOST")?;
        let header = match &self.proxy {
            Some(None) => return Err("the client's address is unknown, no PROXY header can be sent".to_owned()),
            Some(Some(header)) if !self.policy.way.is_late() => Some(header.octets(None)),
            Some(Some(_)) | None => None,
        };
        let dial = self.dial.get_or_insert_with(|| {
            self.resolver.begin();
            Box::new(Dial::begin(target.clone(), self.policy.timeouts.dial, now))
        });
        let mut end = match dial.poll(&mut self.resolver, registry, now) {
            Dialled::Wait => return Ok(None),
            Dialled::Failed(why) => return Err(why),
            Dialled::Done(end) => end,
        };
        if let Some(header) = header {
            tell(&mut end, &header)?;
        }
        // By the way alone, so that nothing forgotten elsewhere makes a connection a clear one.
        match self.policy.way {
            // The late ones are told nothing yet, in no TLS.
            Way::Plain | Way::Raw | Way::TlsLate | Way::PlainLate => Ok(Some(Backend::socket(end))),
            Way::Tls | Way::Keep | Way::Respawn | Way::UcspiTls | Way::UcspiRespawn | Way::Mute => {
                let setups = self.setups.as_ref().ok_or("TLS is not set up")?;
                setups.connect(end).map(Some).map_err(|error| error.to_string())
            }
        }
    }

    /// The child is to be the backend: from here on it is read and written as one.
    fn take_child_over(&mut self) -> Result<Backend, String> {
        if self.child_in.is_none() {
            return Err("the child takes nothing more".to_owned());
        }
        let from = self.child_out.take().ok_or("the child is gone")?;
        Ok(Backend::child(from, self.child_in.take()))
    }

    /// The client's TLS stands: a fresh child is started, and told of it.
    pub(super) fn start_fresh(&mut self, registry: &Registry, now: Instant) -> bool {
        let Some(holder) = self.holder.take() else {
            self.session.handle_end(EndReason::Bug("nothing to start a child from".to_owned()), now);
            return true;
        };
        let facts = self.client.as_ref().and_then(|client| client.leg.as_ref()).map(|leg| leg.facts());
        let (mut child, told) = holder.tell(&match facts {
            Some(facts) => {
                let known = [Some(facts.version), Some(&facts.suite), facts.sni.as_deref()];
                let known = variables::NAMES.into_iter().zip(known);
                variables::encode(known.filter_map(|(name, value)| Some((name, value?.as_bytes()))))
            }
            None => self.told_octets(),
        });
        let mut outcome = told;
        let to = end_of_pipe(child.stdin.take(), CHILD_IN, &mut outcome);
        let from = end_of_pipe(child.stdout.take(), CHILD_OUT, &mut outcome);
        self.child = Some(child);
        if let (Some(mut from), Ok(())) = (from, &outcome) {
            outcome = from.watch(registry, Interest::READABLE);
            self.backend = Some(Backend::child(from, to));
        }
        match outcome {
            Ok(()) => self.session.handle_started(now),
            Err(error) => self.session.handle_handover_failed(error.to_string(), now),
        }
        true
    }

    /// Everything that the backend's TLS needs and brings, up to the gate.
    pub(super) fn read_backend(&mut self, now: Instant) -> bool {
        let mut moved = false;
        for _ in 0..READS {
            let phase = self.session.phase();
            if phase == Phase::Snoop {
                return true;
            }
            let wanted =
                matches!(phase, Phase::SecureBackend | Phase::Commit | Phase::Tell) || self.session.wants_backend();
            let Some(backend) = self.backend.as_mut().filter(|backend| wanted && !backend.is_over) else { break };
            if !backend.input().readable {
                break;
            }
            let mut plaintext = Vec::new();
            let received = backend.receive(&mut |octets| plaintext.extend_from_slice(octets));
            let (is_secure, is_clean) = (backend.is_secure(), backend.has_ended_cleanly());
            match received {
                Ok(Received::Nothing) => break,
                Ok(Received::Octets(_)) => {}
                Ok(Received::End) => backend.is_over = true,
                Err(trouble) => {
                    backend.is_over = true;
                    let why = describe(&trouble);
                    // The alert says why to the backend.
                    backend.transmit();
                    if self.session.is_handover() || phase.is_reaching() || phase == Phase::SecureClient {
                        self.session.handle_handover_failed(why, now);
                        moved = true;
                        continue;
                    }
                    if let Trouble::Tls(error, _) = trouble {
                        tls_trouble(&mut self.session, Whose::Backend, error, now);
                        return true;
                    }
                }
            }
            moved = true;
            if phase == Phase::SecureBackend && is_secure {
                if let (Some(metered), Some(agreed)) = (&self.metered, self.backend.as_ref().and_then(Backend::agreed))
                {
                    metered.secured(Side::Backend, agreed);
                }
                self.session.handle_backend_secured(now);
            }
            if !plaintext.is_empty() {
                self.session.handle_backend(&plaintext, now);
            }
            let over = self.backend.as_ref().is_some_and(|backend| backend.is_over) || is_clean;
            if over {
                self.session.handle_backend_eof(is_clean, now);
            }
            if self.session.phase() == Phase::Close {
                break;
            }
            self.write_backend(now);
            self.notice();
        }
        moved
    }

    /// Nothing unsent, and a fresh look at whoever does TLS, backend and client, whatever readiness is remembered: then the 220.
    pub(super) fn commit(&mut self, now: Instant) -> bool {
        if !self.session.to_client.is_empty() {
            return self.read_client(now);
        }
        // PROG may have thought about RSET for a while.
        if self.policy.way.is_ucspi_tls()
            && let Err(why) = self.look_at_tls_server()
        {
            self.session.handle_handover_failed(why, now);
            return true;
        }
        if let Some(backend) = &mut self.backend {
            backend.input().readable = true;
        }
        if self.read_backend(now) && self.session.phase() != Phase::Commit {
            return true;
        }
        let Some(client) = &mut self.client else { return false };
        client.ends.input.readable = true;
        let found = self.read_client(now);
        if !found && self.session.phase() == Phase::Commit {
            self.session.handle_quiet(now);
            return true;
        }
        found
    }

    pub(super) fn announce(&mut self, registry: &Registry, now: Instant) -> bool {
        self.count_octets();
        let Some(client) = self.client.as_mut().filter(|_| self.session.to_client.is_empty()) else { return false };
        let leg = self.setups.as_ref().map(|setups| Leg::accept(&setups.server));
        match leg {
            Some(Ok(leg)) => client.leg = Some(Box::new(leg)),
            Some(Err(error)) => self.session.handle_end(EndReason::Engine(error.to_string()), now),
            None if !self.policy.way.ends_tls() => {}
            None => self.session.handle_end(EndReason::Bug("no TLS configuration".to_owned()), now),
        }
        if self.session.phase() == Phase::Announce {
            self.session.handle_announced(now);
            if !self.policy.way.keeps() {
                self.dismiss(true, registry, now);
            }
            self.start_tls_server(registry, now);
        }
        true
    }

    pub(super) fn secure_client(&mut self, now: Instant) -> bool {
        if self.tls_handshake.is_some() {
            // What it tells may be long behind the handshake: the child is looked at first.
            return self.read_backend(now) | self.await_tls_server(now);
        }
        let Some(client) = self.client.as_mut().filter(|client| client.ends.input.readable) else { return false };
        let Some(leg) = &mut client.leg else { return false };
        let mut early = Vec::new();
        match bridge::receive(&mut client.ends.input, leg, &mut |octets| early.extend_from_slice(octets)) {
            Ok(Received::Nothing) => return false,
            Ok(Received::Octets(count)) => self.tally.received += count as u64,
            Ok(Received::End) => {
                client.is_over = true;
                self.session.handle_client_eof(now);
                return true;
            }
            Err(Trouble::Broken(_)) => {
                client.is_over = true;
                self.session.handle_end(EndReason::Client(ClientEnd::BrokeOff), now);
                return true;
            }
            Err(Trouble::Tls(error, count)) => {
                self.tally.received += count as u64;
                tls_trouble(&mut self.session, Whose::Client, error, now);
                return true;
            }
        }
        if !leg.is_handshaking() {
            let closed = leg.peer_closed();
            if let Some(metered) = &self.metered {
                metered.secured(Side::Client, leg.agreed());
            }
            self.session.handle_client_secured(now);
            self.notice();
            // What it has said until now nobody asked for; later it would pass for a reply.
            self.read_backend(now);
            self.hand_plaintext(&early, now);
            if closed && self.session.is_inside() {
                self.session.handle_client_eof(now);
            }
        }
        true
    }

    /// The client's TLS, up to the open gate.
    pub(super) fn read_client_tls(&mut self, now: Instant) -> bool {
        let mut moved = false;
        for _ in 0..READS {
            if !self.session.is_inside() || self.session.client_room() == 0 {
                break;
            }
            let Some(client) = self.client.as_mut().filter(|c| c.ends.input.readable && !c.is_over) else { break };
            let Some(leg) = &mut client.leg else { break };
            let mut plaintext = Vec::new();
            match bridge::receive(&mut client.ends.input, leg, &mut |octets| plaintext.extend_from_slice(octets)) {
                Ok(Received::Nothing) => break,
                Ok(Received::Octets(count)) => {
                    self.tally.received += count as u64;
                    let closed = leg.peer_closed();
                    self.hand_plaintext(&plaintext, now);
                    if closed && self.session.is_inside() {
                        self.session.handle_client_eof(now);
                    }
                }
                Ok(Received::End) => {
                    client.is_over = true;
                    self.session.handle_end(EndReason::Client(ClientEnd::BrokeOff), now);
                }
                Err(Trouble::Broken(_)) => {
                    client.is_over = true;
                    self.session.handle_end(EndReason::Client(ClientEnd::BrokeOff), now);
                }
                Err(Trouble::Tls(error, count)) => {
                    self.tally.received += count as u64;
                    tls_trouble(&mut self.session, Whose::Client, error, now);
                }
            }
            moved = true;
        }
        moved
    }

    fn hand_plaintext(&mut self, octets: &[u8], now: Instant) {
        if !octets.is_empty() {
            self.session.handle_client(octets, now);
        }
    }
}

/// What a TLS error says, for the log: names in certificates and alerts come from the peer.
fn said(error: &TlsError) -> String {
    escape(error.to_string().as_bytes(), ERROR_TEXT).to_string()
}

/// Whose TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    Client,
    Backend,
}

/// TLS with the client, or after the 220 with the backend, failed.
pub(super) fn tls_trouble(session: &mut Session, whose: Whose, error: TlsError, now: Instant) {
    let why = said(&error);
    let reason = match (error, whose) {
        (
            TlsError::Panicked(_)
            | TlsError::Unexpected(_)
            | TlsError::Engine(_)
            | TlsError::NotReady
            | TlsError::AfterClose,
            _,
        ) => EndReason::Engine(format!("{whose:?}: {why}")),
        (_, Whose::Client) if session.phase() == Phase::SecureClient => EndReason::Handshake(why),
        (_, Whose::Client) => EndReason::Tls(why),
        (_, Whose::Backend) => EndReason::Backend(BackendEnd::Tls(why)),
    };
    session.handle_end(reason, now);
}

fn describe(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Broken(error) => error.to_string(),
        Trouble::Tls(error, _) => said(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::error::exit;
    use crate::session::Policy;

    /// What a session comes to in which TLS fails so, as far as no handshake is under way.
    fn end(whose: Whose, error: TlsError) -> (u8, bool) {
        let now = Instant::now();
        let mut session = Session::new(Arc::new(Policy::default()), now);
        tls_trouble(&mut session, whose, error, now);
        let reason = session.end().unwrap();
        assert!(session.to_client.is_empty(), "nothing is said: {reason}");
        (reason.exit_code(), reason.is_warning())
    }

    #[test]
    fn a_failing_engine_is_97_and_told_whomever_it_served() {
        for whose in [Whose::Client, Whose::Backend] {
            let of_engine = [
                TlsError::Panicked("index out of bounds".to_owned()),
                TlsError::Unexpected("a state"),
                TlsError::NotReady,
                TlsError::AfterClose,
            ];
            for error in of_engine {
                assert_eq!(end(whose, error), (exit::TLS_ENGINE, true));
            }
        }
        assert_eq!(end(Whose::Client, TlsError::BadRecord), (exit::CLIENT, false));
    }
}
