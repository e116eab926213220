//! One connection: a session and its ends. [`Conn::drive`] is the one place that decides what is read and written next.
//!
//! After every event, in this order: deadlines, writes, what the phase needs (TLS, reads, actions), until nothing moves. What
//! the loop watches follows from what would have blocked.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::{Interest, Registry, Token};

use crate::client_info::ClientInfo;
use crate::logging::escape;
use crate::session::policy::RelayMode;
use crate::session::{ChildEnd, ClientEnd, EndReason, Phase, Policy, Session};
use crate::sys::child::Child;
use crate::sys::dial::Target;
use crate::sys::end::End;
use crate::tls::{Leg, TlsError};

use super::bridge::{self, Received, Trouble};
use super::closing::Closing;
use super::dismissal::Dismissal;
use super::handover::{Backend, Dial, Dialled, Secrets, Setups};
use super::relay::Relay;
use super::report::{self, Tally};

/// What the client sends.
pub const CLIENT_IN: Token = Token(0);
/// What the client is sent.
pub const CLIENT_OUT: Token = Token(1);
const CHILD_OUT: Token = Token(2);
const CHILD_IN: Token = Token(3);
/// The backend's socket.
pub(super) const BACKEND: Token = Token(4);
/// The child's pidfd.
pub(super) const CHILD_EXIT: Token = Token(5);
/// The resolver's thread.
pub(super) const RESOLVED: Token = Token(6);
/// SIGTERM.
pub const SIGNALS: Token = Token(7);

/// What the dialogue is read into; larger replies of a child come in several reads.
const SCRATCH: usize = 8 * 1024;

/// Rounds of one `drive` before the loop looks at everything else.
const ROUNDS: usize = 64;

/// The longest error text that is logged.
const ERROR_TEXT: usize = 300;

/// Buffers that have been idle for so long are given back.
pub(super) const IDLE: Duration = Duration::from_secs(1);

/// What a connection is made of.
#[derive(Debug)]
pub struct Parts {
    /// What the client sends and what it is sent: one socket twice, or two pipes.
    pub client: (End, End),
    /// PROG, or why it could not be started.
    pub child: Result<Child, String>,
    /// Who the client is, for the log.
    pub info: ClientInfo,
    /// What the session decides by.
    pub policy: Arc<Policy>,
    /// Where the backend is.
    pub target: Target,
    /// What TLS is made from.
    pub secrets: Secrets,
    /// How relayed plaintext moves.
    pub relay: RelayMode,
    /// Readable when the session is to end.
    pub terminations: Option<End>,
    /// When the connection began.
    pub started: Instant,
}

/// What a drive came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driven {
    /// Wait for an event or the deadline.
    Wait,
    /// More can be done at once.
    Again,
    /// Everything is closed and reaped.
    Over,
}

/// The client's side.
pub(super) struct Client {
    pub(super) input: End,
    pub(super) output: End,
    /// TLS, from the 220 on.
    pub(super) leg: Option<Leg>,
    /// It has closed its side, or is broken: nothing more is to be read.
    pub(super) is_over: bool,
    /// Writing to it fails.
    pub(super) is_deaf: bool,
    /// Our close_notify is queued.
    pub(super) close_sent: bool,
    /// Writing is shut down.
    pub(super) is_shut: bool,
}

/// One connection.
pub struct Conn {
    pub(super) session: Session,
    pub(super) client: Option<Client>,
    pub(super) child: Option<Child>,
    pub(super) child_in: Option<End>,
    pub(super) child_out: Option<End>,
    pub(super) exit: Option<End>,
    pub(super) dial: Option<Dial>,
    pub(super) setups: Option<Setups>,
    pub(super) backend: Option<Backend>,
    pub(super) relay: Option<Relay>,
    pub(super) dismissal: Option<Dismissal>,
    pub(super) closing: Option<Closing>,
    pub(super) terminations: Option<End>,
    pub(super) info: ClientInfo,
    pub(super) policy: Arc<Policy>,
    pub(super) target: Target,
    pub(super) secrets: Secrets,
    pub(super) mode: RelayMode,
    pub(super) tally: Tally,
    pub(super) started: Instant,
    pub(super) trim: Option<Instant>,
    pub(super) scratch: Box<[u8; SCRATCH]>,
}

impl Conn {
    /// Puts a connection together and has the loop watch it.
    ///
    /// # Errors
    /// The loop can't watch its ends.
    pub fn new(parts: Parts, registry: &Registry) -> io::Result<Self> {
        let (mut input, output) = parts.client;
        input.watch(registry, Interest::READABLE | Interest::PRIORITY)?;
        let mut session = Session::new(parts.policy.clone(), parts.started);
        let (mut child, mut child_in, mut child_out) = (None, None, None);
        match parts.child {
            Ok(mut started) => {
                child_in = started.stdin.take().map(|fd| End::pipe(fd, CHILD_IN)).transpose()?;
                let mut out = started.stdout.take().map(|fd| End::pipe(fd, CHILD_OUT)).transpose()?;
                if let Some(out) = &mut out {
                    out.watch(registry, Interest::READABLE)?;
                }
                child_out = out;
                child = Some(started);
            }
            Err(why) => session.handle_end(EndReason::Child(ChildEnd::NotStarted(why)), parts.started),
        }
        let mut terminations = parts.terminations;
        if let Some(end) = &mut terminations {
            end.watch(registry, Interest::READABLE)?;
        }
        let client =
            Client { input, output, leg: None, is_over: false, is_deaf: false, close_sent: false, is_shut: false };
        Ok(Self {
            session,
            client: Some(client),
            child,
            child_in,
            child_out,
            exit: None,
            dial: None,
            setups: None,
            backend: None,
            relay: None,
            dismissal: None,
            closing: None,
            terminations,
            info: parts.info,
            policy: parts.policy,
            target: parts.target,
            secrets: parts.secrets,
            mode: parts.relay,
            tally: Tally::default(),
            started: parts.started,
            trim: None,
            scratch: Box::new([0; SCRATCH]),
        })
    }

    /// Ends the session from outside, before or while it runs.
    pub fn end_with(&mut self, reason: EndReason) {
        self.session.handle_end(reason, Instant::now());
    }

    /// Why the session ended, once it has.
    #[must_use]
    pub fn end(&self) -> Option<&EndReason> {
        self.session.end()
    }

    /// Takes down what an event says; acting on it is [`Conn::drive`]'s.
    pub fn note(&mut self, event: &Event) {
        let token = event.token();
        let end = match token {
            CLIENT_IN => self.client.as_mut().map(|client| &mut client.input),
            CLIENT_OUT => self.client.as_mut().map(|client| &mut client.output),
            CHILD_OUT => self.child_out.as_mut(),
            CHILD_IN => self.child_in.as_mut(),
            BACKEND => match (&mut self.backend, &mut self.dial) {
                (Some(backend), _) => Some(&mut backend.end),
                (None, Some(dial)) => dial.end(),
                (None, None) => None,
            },
            CHILD_EXIT => match (&mut self.exit, &mut self.dismissal) {
                (Some(exit), _) => Some(exit),
                (None, Some(dismissal)) => dismissal.exit_end(),
                (None, None) => None,
            },
            SIGNALS => self.terminations.as_mut(),
            // RESOLVED only wakes.
            _ => None,
        };
        if let Some(end) = end {
            end.note(event);
        }
        if let Some(relay) = &mut self.relay {
            relay.to_server.is_awake |= matches!(token, CLIENT_IN | CHILD_IN);
            relay.to_client.is_awake |= matches!(token, CHILD_OUT | CLIENT_OUT);
        }
    }

    /// When [`Conn::drive`] is due though nothing happened.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let session = self.session.deadline();
        let dial = self.dial.as_ref().and_then(Dial::deadline);
        let closing = self.client.as_ref().and(self.closing.as_ref()).map(Closing::deadline);
        let dismissal = self.dismissal.as_ref().and_then(Dismissal::deadline);
        [session, dial, closing, dismissal, self.trim].into_iter().flatten().min()
    }

    /// Does all that can be done now.
    pub fn drive(&mut self, registry: &Registry, now: Instant) -> Driven {
        self.session.handle_timeout(now);
        if self.terminations.as_mut().is_some_and(|end| core::mem::take(&mut end.readable)) {
            self.session.handle_terminate(now);
        }
        self.tend_dismissal(now);
        self.trim(now);
        let mut rounds = 0;
        loop {
            let phase = self.session.phase();
            let mut moved = self.write_out(now);
            moved |= match phase {
                Phase::Snoop => self.snoop(now),
                Phase::Dial => self.read_client(now) | self.dial(registry, now),
                Phase::SecureBackend | Phase::Greeting | Phase::Replay => {
                    self.read_client(now) | self.read_backend(now)
                }
                Phase::Commit => self.commit(now),
                Phase::Announce => self.announce(registry, now),
                Phase::SecureClient => self.secure_client(now),
                Phase::Gate => self.read_client_tls(now) | self.read_backend(now),
                Phase::RelayPlain => self.relay_plain(registry, now),
                Phase::RelayTls => self.relay_tls(now),
                Phase::Close => {
                    if self.close(registry, now) {
                        return Driven::Over;
                    }
                    false
                }
            };
            while let Some(note) = self.session.poll_note() {
                report::note(&self.info, &note);
            }
            if !moved && phase == self.session.phase() {
                break;
            }
            rounds += 1;
            if rounds > ROUNDS {
                return Driven::Again;
            }
        }
        if let Err(error) = self.watch_writes(registry) {
            self.session.handle_end(EndReason::System(format!("can't watch: {error}")), now);
            return Driven::Again;
        }
        Driven::Wait
    }

    /// Where a write would have blocked, the loop is to say when it would not.
    fn watch_writes(&mut self, registry: &Registry) -> io::Result<()> {
        let client = self.client.as_mut().map(|client| &mut client.output);
        let backend = self.backend.as_mut().map(|backend| &mut backend.end);
        for end in [client, self.child_in.as_mut(), backend].into_iter().flatten().filter(|end| !end.writable) {
            end.watch(registry, Interest::WRITABLE)?;
        }
        Ok(())
    }

    /// Big buffers of a connection that has been idle are given back.
    fn trim(&mut self, now: Instant) {
        if self.trim.is_some_and(|due| now >= due) {
            self.trim = None;
            let client = self.client.as_mut().and_then(|client| client.leg.as_mut());
            let backend = self.backend.as_mut().map(|backend| &mut backend.leg);
            [client, backend].into_iter().flatten().for_each(Leg::give_back);
        }
    }

    // --- writes ------------------------------------------------------------------------------------------------------

    /// Writes what waits, as far as it is taken. True: something left.
    fn write_out(&mut self, now: Instant) -> bool {
        let moved = self.write_client(now) | self.write_child() | self.write_backend(now);
        if moved {
            self.session.handle_written(now);
        }
        moved
    }

    fn write_client(&mut self, now: Instant) -> bool {
        let Some(client) = &mut self.client else { return false };
        if client.is_deaf {
            self.session.to_client.clear();
            return false;
        }
        let written = match &mut client.leg {
            None => {
                let mut written = Ok(0);
                while !self.session.to_client.is_empty() && client.output.writable {
                    match client.output.write(self.session.to_client.as_slice()) {
                        Ok(Some(count)) => {
                            self.session.to_client.consume(count);
                            written = written.map(|sum| sum + count);
                        }
                        Ok(None) => break,
                        Err(error) => {
                            written = Err(error);
                            break;
                        }
                    }
                }
                written
            }
            Some(leg) => {
                if !self.session.to_client.is_empty() && !leg.is_handshaking() {
                    // A leg that has failed takes nothing; its alert is what leaves.
                    let _ = leg.send(self.session.to_client.as_slice());
                    self.session.to_client.clear();
                }
                bridge::transmit(&mut client.output, leg)
            }
        };
        match written {
            Ok(count) => {
                self.tally.sent += count as u64;
                count > 0
            }
            Err(_) => {
                client.is_deaf = true;
                self.session.to_client.clear();
                // After the close_notify nothing was left to say.
                let reason = if client.close_sent { EndReason::Over } else { EndReason::Client(ClientEnd::BrokeOff) };
                self.session.handle_end(reason, now);
                true
            }
        }
    }

    fn write_child(&mut self) -> bool {
        let Some(end) = &mut self.child_in else {
            self.session.to_child.clear();
            return false;
        };
        let mut moved = false;
        while !self.session.to_child.is_empty() && end.writable {
            match end.write(self.session.to_child.as_slice()) {
                Ok(Some(count)) => self.session.to_child.consume(count),
                Ok(None) => break,
                // It no longer reads; what it still says is heard until it closes.
                Err(_) => {
                    self.child_in = None;
                    return true;
                }
            }
            moved = true;
        }
        moved
    }

    fn write_backend(&mut self, now: Instant) -> bool {
        let Some(backend) = &mut self.backend else {
            self.session.to_backend.clear();
            return false;
        };
        if backend.is_deaf {
            self.session.to_backend.clear();
            return false;
        }
        if !self.session.to_backend.is_empty() && !backend.leg.is_handshaking() {
            if let Err(error) = backend.leg.send(self.session.to_backend.as_slice()) {
                tls_trouble(&mut self.session, "backend", error, now);
            }
            self.session.to_backend.clear();
        }
        match bridge::transmit(&mut backend.end, &mut backend.leg) {
            Ok(count) => count > 0,
            // What it said before is read until its end.
            Err(_) => {
                backend.is_deaf = true;
                true
            }
        }
    }

    // --- snoop and hand-over -----------------------------------------------------------------------------------------

    fn snoop(&mut self, now: Instant) -> bool {
        // Nothing of a hand-over that failed is used again.
        (self.backend, self.dial) = (None, None);
        let moved = self.read_child(now) | self.read_client(now);
        if self.session.wants_child_eof() && self.session.to_child.is_empty() {
            self.child_in = None;
        }
        moved
    }

    fn read_child(&mut self, now: Instant) -> bool {
        let mut moved = false;
        while self.session.wants_child() {
            let Some(out) = self.child_out.as_mut().filter(|out| out.readable) else { break };
            match out.read(&mut self.scratch[..]) {
                Ok(None) => break,
                Ok(Some(count)) if count > 0 => self.session.handle_child(&self.scratch[..count], now),
                Ok(Some(_)) | Err(_) => {
                    self.child_out = None;
                    self.session.handle_child_eof(now);
                }
            }
            moved = true;
        }
        moved
    }

    /// Reads the client's plaintext as far as the session wants it.
    fn read_client(&mut self, now: Instant) -> bool {
        let mut moved = false;
        while let Some(client) = self.client.as_mut().filter(|client| client.input.readable && !client.is_over) {
            let room = self.session.client_room().min(SCRATCH);
            if room == 0 {
                break;
            }
            match client.input.read(&mut self.scratch[..room]) {
                Ok(None) => break,
                Ok(Some(0)) => {
                    client.is_over = true;
                    self.session.handle_client_eof(now);
                }
                Ok(Some(count)) => {
                    self.tally.received += count as u64;
                    self.session.handle_client(&self.scratch[..count], now);
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

    fn dial(&mut self, registry: &Registry, now: Instant) -> bool {
        if self.session.phase() != Phase::Dial {
            self.dial = None;
            return true;
        }
        let dialled = match self.begin_dial(registry, now) {
            Ok(dial) => dial.poll(registry, now),
            Err(why) => Dialled::Failed(why),
        };
        let done = match dialled {
            Dialled::Wait => return false,
            Dialled::Failed(why) => Err(why),
            Dialled::Done(end) => match &self.setups {
                Some(setups) => Backend::new(end, setups).map_err(|error| error.to_string()),
                None => Err("no TLS configuration".to_owned()),
            },
        };
        self.dial = None;
        match done {
            Ok(backend) => {
                self.backend = Some(backend);
                self.session.handle_dialled(now);
            }
            Err(why) => self.session.handle_handover_failed(why, now),
        }
        true
    }

    fn begin_dial(&mut self, registry: &Registry, now: Instant) -> Result<&mut Dial, String> {
        if self.setups.is_none() {
            let identity = self.secrets.identity.as_ref().ok_or("there is no certificate")?;
            self.setups = Some(self.secrets.set_up(identity).map_err(|error| error.to_string())?);
        }
        match &mut self.dial {
            Some(dial) => Ok(dial),
            none => {
                let patience = self.policy.timeouts.dial;
                let begun = Dial::begin(&self.target, registry, patience, now).map_err(|error| error.to_string())?;
                Ok(none.insert(begun))
            }
        }
    }

    /// Everything that the backend's TLS needs and brings, up to the gate.
    fn read_backend(&mut self, now: Instant) -> bool {
        let mut moved = false;
        loop {
            let phase = self.session.phase();
            if phase == Phase::Snoop {
                return true;
            }
            let wanted = phase == Phase::SecureBackend || self.session.wants_backend();
            let Some(backend) = self.backend.as_mut().filter(|b| wanted && b.end.readable && !b.is_over) else { break };
            let mut plaintext = Vec::new();
            let received =
                bridge::receive(&mut backend.end, &mut backend.leg, &mut |octets| plaintext.extend_from_slice(octets));
            let (is_secure, is_clean) = (!backend.leg.is_handshaking(), backend.leg.peer_closed());
            match received {
                Ok(Received::Nothing) => break,
                Ok(Received::Octets(_)) => {}
                Ok(Received::End) => backend.is_over = true,
                Err(trouble) => {
                    backend.is_over = true;
                    let why = describe(&trouble);
                    // The alert says why to the backend.
                    let _ = bridge::transmit(&mut backend.end, &mut backend.leg);
                    if phase.is_handover() {
                        self.session.handle_handover_failed(why, now);
                        moved = true;
                        continue;
                    }
                }
            }
            moved = true;
            if phase == Phase::SecureBackend && is_secure {
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
        }
        moved
    }

    /// Nothing unsent, and a fresh look at the client, whatever readiness is remembered: then the 220.
    fn commit(&mut self, now: Instant) -> bool {
        if !self.session.to_client.is_empty() {
            return self.read_client(now);
        }
        let Some(client) = &mut self.client else { return false };
        client.input.readable = true;
        let found = self.read_client(now);
        if !found && self.session.phase() == Phase::Commit {
            self.session.handle_quiet(now);
            return true;
        }
        found
    }

    fn announce(&mut self, registry: &Registry, now: Instant) -> bool {
        let Some(client) = self.client.as_mut().filter(|_| self.session.to_client.is_empty()) else { return false };
        let leg = self.setups.as_ref().map(|setups| Leg::accept(&setups.server));
        match leg {
            Some(Ok(leg)) => client.leg = Some(leg),
            Some(Err(error)) => self.session.handle_end(EndReason::Engine(error.to_string()), now),
            None => self.session.handle_end(EndReason::Bug("no TLS configuration".to_owned()), now),
        }
        if self.session.phase() == Phase::Announce {
            self.session.handle_announced(now);
            self.dismiss(registry, now);
        }
        true
    }

    fn secure_client(&mut self, now: Instant) -> bool {
        let Some(client) = self.client.as_mut().filter(|client| client.input.readable) else { return false };
        let Some(leg) = &mut client.leg else { return false };
        let mut early = Vec::new();
        match bridge::receive(&mut client.input, leg, &mut |octets| early.extend_from_slice(octets)) {
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
            Err(Trouble::Tls(error)) => {
                let reason = match error {
                    TlsError::Panicked(_) | TlsError::Unexpected(_) => EndReason::Engine(said(&error)),
                    _ => EndReason::Handshake(said(&error)),
                };
                self.session.handle_end(reason, now);
                return true;
            }
        }
        if !leg.is_handshaking() {
            self.session.handle_client_secured(now);
            self.hand_plaintext(&early, now);
        }
        true
    }

    /// The client's TLS at the gate.
    fn read_client_tls(&mut self, now: Instant) -> bool {
        let mut moved = false;
        while self.session.phase() == Phase::Gate && self.session.client_room() > 0 {
            let Some(client) = self.client.as_mut().filter(|c| c.input.readable && !c.is_over) else { break };
            let Some(leg) = &mut client.leg else { break };
            let mut plaintext = Vec::new();
            match bridge::receive(&mut client.input, leg, &mut |octets| plaintext.extend_from_slice(octets)) {
                Ok(Received::Nothing) => break,
                Ok(Received::Octets(count)) => {
                    self.tally.received += count as u64;
                    let closed = leg.peer_closed();
                    self.hand_plaintext(&plaintext, now);
                    if closed && self.session.phase() == Phase::Gate {
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
                Err(Trouble::Tls(error)) => tls_trouble(&mut self.session, "client", error, now),
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

/// TLS failed after the handshake: whose leg, and why.
pub(super) fn tls_trouble(session: &mut Session, leg: &str, error: TlsError, now: Instant) {
    let reason = match error {
        TlsError::Panicked(_) | TlsError::Unexpected(_) | TlsError::NotReady | TlsError::AfterClose => {
            EndReason::Engine(format!("{leg}: {}", said(&error)))
        }
        _ => EndReason::Tls(format!("{leg}: {}", said(&error))),
    };
    session.handle_end(reason, now);
}

fn describe(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Broken(error) => error.to_string(),
        Trouble::Tls(error) => said(error),
    }
}
