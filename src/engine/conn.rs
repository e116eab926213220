//! One connection: a session and its ends. [`Conn::drive`] is the one place that decides what is read and written next.
//!
//! After every event, in this order: deadlines, writes, what the phase needs (TLS, reads, actions), until nothing moves. What
//! the loop watches follows from what would have blocked.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use mio::event::Event;
use mio::{Interest, Token};
use rustix::process::Pid;

use crate::client_info::ClientInfo;
use crate::proxy::Header;
use crate::session::policy::RelayMode;
use crate::session::{ClientEnd, EndReason, Phase, Policy, Session, Way};
use crate::sys::child::Child;
use crate::sys::dial::{Resolver, Target};
use crate::sys::end::{End, Registry};
use crate::sys::holder::Holder;
use crate::tls::Leg;
use crate::variables::Variable;

use super::backend::Backend;
use super::batch::Batch;
use super::dismissal::Dismissal;
use super::handover::{Dial, Secrets, Setups};
use super::linger::Linger;
use super::meter::{Meter, Metered};
use super::pump::Relay;
use super::report::Tally;
use super::summon::{Front, Source};
use super::tokens::{BACKEND, CHILD_EXIT, CHILD_IN, CHILD_OUT, CLIENT_IN, CLIENT_OUT, RESOLVED, SIGNALS, TLS_SERVER};
use super::ucspi_tls::{TlsHandshake, TlsServer};

/// What the dialogue is read into; larger replies of a child come in several reads.
pub(super) const SCRATCH: usize = 8 * 1024;

/// Rounds of one `drive` before the loop looks at everything else.
const ROUNDS: usize = 16;

/// And octets, after which it does: about a millisecond's worth. A neighbour that sends all it can is not to delay others' greetings.
const TURN: u64 = 1 << 20;

/// What a connection is made of.
#[derive(Debug)]
pub struct Parts {
    /// What the client sends and what it is sent.
    pub client: Ends,
    /// The plaintext server.
    pub front: Front,
    /// The place of a fresh PROG, where the way has one.
    pub holder: Option<Holder>,
    /// The UCSPI-TLS server that we run under, where its TLS is the client's.
    pub tls_server: Option<TlsServer>,
    /// Who the client is, for the log.
    pub info: ClientInfo,
    /// What the session decides by.
    pub policy: Arc<Policy>,
    /// Where the backend is, where it is dialled.
    pub target: Option<Arc<Target>>,
    /// What HOST is told of the client before anything else; the inner `None`: nobody knows who it is.
    pub proxy: Option<Option<Header>>,
    /// What TLS is made from, where that is not done yet.
    pub secrets: Option<Secrets>,
    /// The TLS configurations, where many sessions share them; `None`: made from `secrets` when they are needed.
    pub setups: Option<Setups>,
    /// How relayed plaintext moves.
    pub relay: RelayMode,
    /// Readable when the session is to end.
    pub terminations: Option<End>,
    /// When the connection began.
    pub started: Instant,
    /// Where it is counted.
    pub meter: Option<Arc<Meter>>,
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

/// The client's descriptors: what it sends and what it is sent, or, where both are one socket of ours, that alone.
#[derive(Debug)]
pub struct Ends {
    pub(super) input: End,
    output: Option<End>,
}

impl Ends {
    /// One socket of ours.
    #[must_use]
    pub fn one(socket: End) -> Self {
        Self { input: socket, output: None }
    }

    /// Two descriptors, which may lead to the same.
    #[must_use]
    pub fn two(input: End, output: End) -> Self {
        Self { input, output: Some(output) }
    }

    /// Whether this is a socket of ours from which all has been read that had come.
    pub(super) fn is_drained(&self) -> bool {
        self.output.is_none() && self.input.is_socket() && !self.input.readable
    }

    /// What the client is sent.
    pub(super) fn output(&mut self) -> &mut End {
        self.output.as_mut().unwrap_or(&mut self.input)
    }
}

/// The client's side.
pub(super) struct Client {
    pub(super) ends: Ends,
    /// TLS, from the 220 on.
    pub(super) leg: Option<Box<Leg>>,
    /// It has closed its side, or is broken: nothing more is to be read.
    pub(super) is_over: bool,
    /// It has reset its connection.
    pub(super) is_lost: bool,
    /// Writing to it fails.
    pub(super) is_deaf: bool,
    /// Our close_notify is queued.
    pub(super) close_sent: bool,
    /// Writing is shut down.
    pub(super) is_shut: bool,
}

impl Client {
    pub(super) fn new(ends: Ends) -> Self {
        Self { ends, leg: None, is_over: false, is_lost: false, is_deaf: false, close_sent: false, is_shut: false }
    }
}

/// One connection.
pub struct Conn {
    pub(super) session: Session,
    pub(super) client: Option<Client>,
    pub(super) child: Option<Child>,
    pub(super) child_in: Option<End>,
    pub(super) child_out: Option<End>,
    /// Where the plaintext server comes from, as long as it has not been asked for.
    pub(super) source: Option<Source>,
    pub(super) holder: Option<Box<Holder>>,
    pub(super) tls_server: Option<Box<TlsServer>>,
    pub(super) tls_handshake: Option<Box<TlsHandshake>>,
    pub(super) tls_pid: Option<Pid>,
    /// What the UCSPI-TLS server has told of its TLS, once that stands.
    pub(super) told: Option<Vec<Variable>>,
    pub(super) exit: Option<End>,
    pub(super) dial: Option<Box<Dial>>,
    pub(super) resolver: Resolver,
    pub(super) setups: Option<Setups>,
    pub(super) backend: Option<Backend>,
    pub(super) relay: Option<Box<Relay>>,
    pub(super) batch: Batch,
    /// One of each process that was started: PROG and, in the way `respawn`, its successor.
    pub(super) dismissals: Vec<Dismissal>,
    pub(super) linger: Option<Linger>,
    pub(super) terminations: Option<End>,
    pub(super) info: ClientInfo,
    pub(super) policy: Arc<Policy>,
    pub(super) target: Option<Arc<Target>>,
    pub(super) proxy: Option<Option<Header>>,
    pub(super) secrets: Option<Box<Secrets>>,
    pub(super) mode: RelayMode,
    pub(super) tally: Tally,
    pub(super) started: Instant,
    pub(super) metered: Option<Metered>,
    /// The phase that was told of last.
    pub(super) noticed: Phase,
}

impl Conn {
    /// Puts a connection together and has the loop watch it. What can't be watched ends the session.
    #[must_use]
    pub fn new(parts: Parts, registry: &Registry) -> Self {
        let mut client = Client::new(parts.client);
        let mut watched = client.ends.input.watch(registry, Interest::READABLE | Interest::PRIORITY);
        let (policy, now) = (parts.policy.clone(), parts.started);
        let (mut child, mut child_in, mut child_out, mut source) = (None, None, None, None);
        let mut session = match parts.front {
            Front::Child(mut started) => {
                child_in = end_of_pipe(started.stdin.take(), CHILD_IN, &mut watched);
                child_out = end_of_pipe(started.stdout.take(), CHILD_OUT, &mut watched);
                if let (Some(out), true) = (&mut child_out, watched.is_ok()) {
                    watched = out.watch(registry, Interest::READABLE);
                }
                child = Some(started);
                Session::new(policy, now)
            }
            Front::Failed(reason) => {
                let mut session = Session::new(policy, now);
                session.handle_end(reason, now);
                session
            }
            Front::Later(from, stand_in) => {
                source = Some(from);
                match stand_in {
                    Some(stand_in) => Session::lazily(policy, stand_in, now),
                    None => Session::summoning(policy, now),
                }
            }
        };
        let mut terminations = parts.terminations;
        if let (Some(end), true) = (&mut terminations, watched.is_ok()) {
            watched = end.watch(registry, Interest::READABLE);
        }
        let mut tls_server = parts.tls_server;
        if let (Some(server), true) = (&mut tls_server, watched.is_ok()) {
            watched = server.control.watch(registry, Interest::READABLE);
        }
        if let Err(error) = watched {
            session.handle_end(EndReason::System(format!("can't watch: {error}")), parts.started);
        }
        // Behind TLS from the start.
        let from_child = if parts.policy.way == Way::Mute { child_out.take() } else { None };
        let backend = from_child.map(|from| Backend::child(from, child_in.take()));
        let metered = parts.meter.map(|meter| Metered::begin(meter, &session, parts.started));
        Self {
            noticed: session.phase(),
            metered,
            session,
            client: Some(client),
            child,
            child_in,
            child_out,
            source,
            holder: parts.holder.map(Box::new),
            tls_server: tls_server.map(Box::new),
            tls_handshake: None,
            tls_pid: None,
            told: None,
            exit: None,
            dial: None,
            resolver: Resolver::default(),
            setups: parts.setups,
            backend,
            relay: None,
            batch: Batch::default(),
            dismissals: Vec::new(),
            linger: None,
            terminations,
            info: parts.info,
            policy: parts.policy,
            target: parts.target,
            proxy: parts.proxy,
            secrets: parts.secrets.map(Box::new),
            mode: parts.relay,
            tally: Tally::default(),
            started: parts.started,
        }
    }

    /// Ends the session from outside, before or while it runs.
    pub fn end_with(&mut self, reason: EndReason) {
        self.session.handle_end(reason, Instant::now());
    }

    /// The operator wants an end: the session says so where it can, and nobody who is on the way out is waited for any longer.
    pub fn terminate(&mut self, now: Instant) {
        self.session.handle_terminate(now);
        self.dismissals.iter_mut().for_each(|dismissal| dismissal.hurry(now));
    }

    /// Who the client is, for the log.
    #[must_use]
    pub fn client(&self) -> &ClientInfo {
        &self.info
    }

    /// Why the session ended, once it has.
    #[must_use]
    pub fn end(&self) -> Option<&EndReason> {
        self.session.end()
    }

    /// Takes down what an event says of the descriptor so called; acting on it is [`Conn::drive`]'s.
    pub fn note(&mut self, token: Token, event: &Event) {
        // A child that is kept is the backend, its pipes still called as they were.
        let backend = self.backend.as_mut().and_then(|backend| backend.end_called(token));
        let end = match token {
            _ if backend.is_some() => backend,
            CLIENT_IN => self.client.as_mut().map(|client| &mut client.ends.input),
            CLIENT_OUT => self.client.as_mut().map(|client| client.ends.output()),
            CHILD_OUT => self.child_out.as_mut(),
            CHILD_IN => self.child_in.as_mut(),
            BACKEND => self.dial.as_mut().and_then(|dial| dial.end()),
            CHILD_EXIT => {
                // Which of them, they find out.
                self.dismissals.iter_mut().filter_map(Dismissal::exit_end).for_each(|exit| exit.note(event));
                self.exit.as_mut()
            }
            TLS_SERVER => match (&mut self.tls_server, &mut self.tls_handshake) {
                (Some(server), _) => Some(&mut server.control),
                (None, Some(handshake)) => Some(&mut handshake.control),
                (None, None) => None,
            },
            SIGNALS => self.terminations.as_mut(),
            RESOLVED => self.resolver.end(),
            _ => None,
        };
        if let Some(end) = end {
            end.note(event);
        }
        if let Some(relay) = &mut self.relay {
            relay.to_server.is_awake |= matches!(token, CLIENT_IN | CHILD_IN);
            relay.to_client.is_awake |=
                matches!(token, CHILD_OUT | CLIENT_OUT) || (token == CLIENT_IN && is_room(event));
        }
    }

    /// When [`Conn::drive`] is due though nothing happened.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let session = self.session.deadline();
        let dial = self.dial.as_ref().and_then(|dial| dial.deadline());
        let linger = self.client.as_ref().and(self.linger.as_ref()).map(Linger::deadline);
        let dismissal = self.dismissals.iter().filter_map(Dismissal::deadline).min();
        [session, dial, linger, dismissal, self.batch.deadline()].into_iter().flatten().min()
    }

    /// Does all that can be done now.
    pub fn drive(&mut self, registry: &Registry, now: Instant) -> Driven {
        let driven = self.advance(registry, now);
        self.notice();
        self.count_octets();
        driven
    }

    fn advance(&mut self, registry: &Registry, now: Instant) -> Driven {
        self.session.handle_timeout(now);
        if let Some(end) = self.terminations.as_mut().filter(|end| end.readable) {
            // Read, or a second one would wake nobody: a signal that is pending is not raised again (signal(7)).
            let _ = end.read(&mut [0; 256]);
            end.readable = false;
            self.terminate(now);
        }
        self.tend_dismissals(now);
        let (mut rounds, before) = (0, self.tally.received + self.tally.sent);
        loop {
            let phase = self.session.phase();
            let mut moved = self.write_out(now);
            moved |= match phase {
                Phase::Snoop => self.snoop(now),
                Phase::Summon => self.summon(registry, now),
                Phase::Brief => self.read_child(now) | self.read_client(now),
                Phase::Dial => self.read_client(now) | self.dial(registry, now),
                Phase::SecureBackend | Phase::Greeting | Phase::Replay => {
                    self.read_client(now) | self.read_backend(now)
                }
                Phase::Commit => self.commit(now),
                Phase::Announce => self.announce(registry, now),
                // The client first: where its TLS stands by now, what the backend does is done in the gate.
                Phase::SecureClient => self.secure_client(now) | self.read_backend(now),
                Phase::Start => self.start_fresh(registry, now),
                Phase::Tell => self.tell_host(now),
                Phase::Gate => self.read_backend(now) | self.read_client(now),
                Phase::RelayPlain => self.relay_plain(registry, now),
                Phase::RelayTls => self.relay_tls(registry, now),
                Phase::Close => {
                    if self.close(registry, now) {
                        return Driven::Over;
                    }
                    false
                }
            };
            self.notice();
            if !moved && phase == self.session.phase() {
                break;
            }
            rounds += 1;
            if rounds > ROUNDS || self.tally.received + self.tally.sent - before > TURN {
                return Driven::Again;
            }
        }
        if self.is_client_lost() {
            self.session.handle_end(EndReason::Client(ClientEnd::BrokeOff), now);
            return Driven::Again;
        }
        self.notice_reset(now);
        if let Err(error) = self.watch_writes(registry) {
            self.session.handle_end(EndReason::System(format!("can't watch: {error}")), now);
            return Driven::Again;
        }
        self.give_back();
        Driven::Wait
    }

    /// Whether the client has reset its connection while nobody reads it, so that no read will ever say so.
    fn is_client_lost(&self) -> bool {
        let is_unread = match self.session.phase() {
            Phase::RelayPlain => self.child_in.is_none(),
            Phase::RelayTls => self.relay.is_some() && self.child_in.is_none(),
            Phase::Snoop | Phase::Gate => self.session.client_room() == 0 || !self.session.may_take(),
            _ if self.session.is_inside() => self.session.client_room() == 0,
            Phase::Summon | Phase::Brief => self.session.client_room() == 0,
            Phase::Dial
            | Phase::SecureBackend
            | Phase::Start
            | Phase::Tell
            | Phase::Greeting
            | Phase::Replay
            | Phase::Commit
            | Phase::Announce
            | Phase::SecureClient
            | Phase::Close => false,
        };
        is_unread && self.client.as_ref().is_some_and(|client| client.ends.input.is_broken && !client.is_over)
    }

    /// A client that has reset a relay while the server takes nothing: what it sent before gets a little time to go on.
    fn notice_reset(&mut self, now: Instant) {
        let relays = matches!(self.session.phase(), Phase::RelayPlain | Phase::RelayTls);
        let Some(client) = self.client.as_mut().filter(|client| relays && client.ends.input.is_broken) else { return };
        if !client.is_over && !client.is_lost {
            client.is_lost = true;
            self.session.handle_client_broke_off(now);
        }
    }

    /// Where a write would have blocked, the loop is to say when it would not.
    fn watch_writes(&mut self, registry: &Registry) -> io::Result<()> {
        let client = self.client.as_mut().map(|client| client.ends.output());
        for end in [client, self.child_in.as_mut()].into_iter().flatten().filter(|end| !end.writable) {
            end.watch(registry, Interest::WRITABLE)?;
        }
        self.backend.as_mut().map_or(Ok(()), |backend| backend.watch_writes(registry))
    }

    /// It may be silent from here on for minutes: what holds nothing has no memory.
    fn give_back(&mut self) {
        self.session.give_back();
        if let Some(leg) = self.client.as_mut().and_then(|client| client.leg.as_mut()) {
            leg.give_back();
        }
        if let Some(backend) = &mut self.backend {
            backend.give_back();
        }
    }
}

/// Whether this event may mean that more can be written, where one descriptor stands for both.
fn is_room(event: &Event) -> bool {
    event.is_writable() || event.is_write_closed() || event.is_error()
}

/// Our end of a pipe to the child; `outcome` takes down why there is none.
pub(super) fn end_of_pipe(fd: Option<OwnedFd>, token: Token, outcome: &mut io::Result<()>) -> Option<End> {
    End::pipe(fd?, token).map_err(|error| *outcome = Err(error)).ok()
}
