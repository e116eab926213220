//! The session: one dialogue and its state, without a file descriptor, a clock or a logger.
//!
//! Contract. Octets, events and the time come in by `handle_*`; the owner then writes out [`Session::to_client`],
//! [`Session::to_child`] and [`Session::to_backend`], looks at [`Session::phase`] and does what that phase needs:
//!
//! | phase | the owner |
//! |---|---|
//! | `Snoop` | reads client and child, where there is one, while `*_room` says so; closes the child's stdin when [`Session::wants_child_eof`] |
//! | `Summon` | starts or reaches the plaintext server: `handle_summoned` or `handle_end`; still reads the client |
//! | `Brief` | reads the child (`handle_child`) and the client |
//! | `Dial` | reaches the backend: `handle_dialled` or `handle_handover_failed`; still reads the client, never the child |
//! | `SecureBackend` | TLS with the backend: `handle_backend_secured` or `handle_handover_failed` |
//! | `Start` | starts a fresh child: `handle_started` or `handle_handover_failed` |
//! | `Tell` | tells the backend of the client and its TLS: `handle_told` or `handle_handover_failed` |
//! | `Greeting`, `Replay` | `handle_backend` with what the backend says |
//! | `Commit` | when nothing is unsent: reads the client once more; nothing there: `handle_quiet` |
//! | `Announce` | writes; when all is out: `handle_announced`; reads no one |
//! | `SecureClient` | dismisses the child; TLS with the client: `handle_client_secured` or `handle_end`; still reads the backend |
//! | `Gate` | `handle_client` and `handle_backend` with what TLS delivers |
//! | `RelayPlain`, `RelayTls` | writes out what is queued, then moves octets itself; `handle_relayed` for the timer |
//! | `Close` | writes out, lingers, closes; [`Session::end`] says why |
//!
//! The backend is whatever goes on behind TLS: which of these phases lead to it, and in which order, is the [`Way`]'s. In
//! the way `keep` it is the child itself, from `handle_dialled` on until a hand-over fails.
//!
//! No call blocks, allocates per octet, or asks the time; `deadline` says when `handle_timeout` is due. After `Close`
//! nothing moves the session again.

mod commands;
mod dialogue;
mod end;
mod handover;
pub mod learned;
pub mod limits;
mod phase;
pub mod policy;
pub mod replay;
mod snoop;
mod stand_in;
mod timeout;
mod timers;
pub mod transcript;
pub mod way;

use std::sync::Arc;
use std::time::Instant;

pub use end::{BackendEnd, ChildEnd, ClientEnd, EndReason, HandoverFailure, PolicyEnd};
pub use phase::{Cause, Phase};
pub use policy::Policy;
pub use way::Way;

use crate::buffer::Buffer;
use crate::smtp::ehlo::Edit;

use dialogue::Dialogue;
use snoop::Snooper;
pub use stand_in::StandIn;
use timers::{RelayEnd, Timers};
use transcript::Transcript;

/// Something the operator should read that ends nothing. Made here, said by the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// The child offers STARTTLS itself; its offer was replaced by ours.
    ChildOffersStarttls,
    /// The child said something that is no SMTP, or asked for data where none was announced; snooping stopped.
    ChildNotSmtp,
    /// STARTTLS was answered 454.
    HandoverFailed(HandoverFailure),
    /// STARTTLS was asked for, and there is no certificate.
    NoCertificate,
    /// STARTTLS has failed [`limits::HANDOVERS`] times in this session; the backend is not dialled for it again.
    TooManyHandovers,
}

/// What has become of STARTTLS in a session, besides its notes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Starttls {
    /// The client has seen it offered.
    pub is_offered: bool,
    /// How often it was said and had its turn.
    pub asked: u32,
    /// How often it was then answered 454 at once: there is no certificate, or it has failed too often.
    pub refused: u32,
}

/// One session. See the module's contract.
#[derive(Debug)]
pub struct Session {
    policy: Arc<Policy>,
    phase: Phase,
    end: Option<EndReason>,
    ended_in: Phase,
    dialogue: Dialogue,
    snooper: Snooper,
    transcript: Transcript,
    replay: Option<replay::Run>,
    stand_in: Option<StandIn>,
    /// The server behind TLS was lost while the client shook hands.
    lost: Option<HandoverFailure>,
    timers: Timers,
    notes: Vec<Note>,
    noted: Vec<Note>,
    failed_handovers: u32,
    /// STARTTLS that were answered 454, for whatever reason.
    failed_starttls: u32,
    /// Commands that were answered 5yz, in plaintext and inside TLS.
    errors: u32,
    starttls: Starttls,
    client_eof: bool,
    quit_seen: bool,
    /// Octets for the client; inside TLS once `Gate` is reached.
    pub to_client: Buffer,
    /// Octets for the child's stdin.
    pub to_child: Buffer,
    /// Octets for the backend, to be encrypted.
    pub to_backend: Buffer,
}

impl Session {
    /// A session that begins now: the child has been started and its greeting is awaited.
    #[must_use]
    pub fn new(policy: Arc<Policy>, now: Instant) -> Self {
        let phase = Phase::first(policy.way);
        Self::in_phase(phase, policy, now)
    }

    /// A session that begins now, its plaintext server not there yet: the first thing is to summon it.
    #[must_use]
    pub fn summoning(policy: Arc<Policy>, now: Instant) -> Self {
        let mut session = Self::in_phase(Phase::Summon, policy, now);
        session.dialogue = Dialogue::with_greeting();
        session
    }

    /// A session that begins now, its plaintext server being put off until it is needed.
    #[must_use]
    pub fn lazily(policy: Arc<Policy>, mut stand_in: StandIn, now: Instant) -> Self {
        let mut session = Self::in_phase(Phase::Snoop, policy, now);
        session.dialogue = Dialogue::default();
        stand_in.greet(&mut session.to_client);
        session.stand_in = Some(stand_in);
        session
    }

    fn in_phase(phase: Phase, policy: Arc<Policy>, now: Instant) -> Self {
        let transcript = Transcript::told(policy.replay, &policy.told);
        let dialogue = if phase == Phase::Snoop { Dialogue::with_greeting() } else { Dialogue::only_when_asked() };
        let mut session = Self {
            policy,
            phase,
            end: None,
            ended_in: phase,
            dialogue,
            snooper: Snooper::default(),
            transcript,
            replay: None,
            stand_in: None,
            lost: None,
            timers: Timers::new(now),
            notes: Vec::new(),
            noted: Vec::new(),
            failed_handovers: 0,
            failed_starttls: 0,
            errors: 0,
            starttls: Starttls::default(),
            client_eof: false,
            quit_seen: false,
            to_client: Buffer::default(),
            to_child: Buffer::default(),
            to_backend: Buffer::default(),
        };
        session.begin(now);
        session
    }

    /// What the session is doing.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Why the session ended; `Some` in `Close` and only there.
    #[must_use]
    pub fn end(&self) -> Option<&EndReason> {
        self.end.as_ref()
    }

    /// The phase that the end came in; before the end meaningless.
    #[must_use]
    pub fn ended_in(&self) -> Phase {
        self.ended_in
    }

    /// The oldest note not yet said.
    pub fn poll_note(&mut self) -> Option<Note> {
        if self.notes.is_empty() { None } else { Some(self.notes.remove(0)) }
    }

    /// How many commands the snooper recorded.
    #[must_use]
    pub fn recorded(&self) -> u32 {
        self.transcript.recorded()
    }

    /// What has become of STARTTLS.
    #[must_use]
    pub fn starttls_so_far(&self) -> Starttls {
        self.starttls
    }

    /// Whether there is a certificate, or somebody else's TLS.
    #[must_use]
    pub fn offers_tls(&self) -> bool {
        self.policy.offer_tls
    }

    /// How many octets of the client may be handed over now; 0: do not read it (backpressure).
    #[must_use]
    pub fn client_room(&self) -> usize {
        match self.phase {
            Phase::Snoop if self.to_child.len() > limits::TO_SERVER || self.to_client.len() > limits::TO_CLIENT => 0,
            Phase::Gate if self.to_backend.len() > limits::TO_SERVER || self.to_client.len() > limits::TO_CLIENT => 0,
            Phase::Snoop | Phase::Summon | Phase::Brief | Phase::Gate => self.dialogue.lines.room(),
            // One octet is one too many here, and all that is wanted.
            _ if self.is_handover() => 1,
            _ if self.is_inside() => self.dialogue.lines.room(),
            Phase::Dial
            | Phase::SecureBackend
            | Phase::Start
            | Phase::Tell
            | Phase::Greeting
            | Phase::Replay
            | Phase::Commit
            | Phase::Announce
            | Phase::SecureClient
            | Phase::RelayPlain
            | Phase::RelayTls
            | Phase::Close => 0,
        }
    }

    /// Whether a further command of the client could be taken, or too many replies are owed.
    #[must_use]
    pub fn may_take(&self) -> bool {
        self.dialogue.may_take()
    }

    /// Whether the child may be read now.
    #[must_use]
    pub fn wants_child(&self) -> bool {
        matches!(self.phase, Phase::Snoop | Phase::Brief) && self.to_client.len() <= limits::TO_CLIENT
    }

    /// Whether the backend's plaintext may be handed over now.
    #[must_use]
    pub fn wants_backend(&self) -> bool {
        match self.phase {
            Phase::Greeting | Phase::Replay => true,
            // Late, what it does before its header is a failure of that step, which finds it.
            Phase::SecureClient => self.lost.is_none() && !self.policy.way.is_late(),
            Phase::Gate => self.to_client.len() <= limits::TO_CLIENT,
            Phase::Snoop
            | Phase::Summon
            | Phase::Brief
            | Phase::Dial
            | Phase::SecureBackend
            | Phase::Start
            | Phase::Tell
            | Phase::Commit
            | Phase::Announce
            | Phase::RelayPlain
            | Phase::RelayTls
            | Phase::Close => false,
        }
    }

    /// Whether the child's stdin is to be closed once `to_child` is written: the client has closed and all its commands
    /// are on their way.
    #[must_use]
    pub fn wants_child_eof(&mut self) -> bool {
        self.phase == Phase::Snoop && self.client_eof && self.dialogue.is_taken()
    }

    /// The client sent `octets`, at most [`Session::client_room`]; inside TLS a record may be more.
    pub fn handle_client(&mut self, octets: &[u8], now: Instant) {
        match self.phase {
            Phase::Snoop | Phase::Gate => {
                self.dialogue.lines.push(octets);
                self.take_commands(now);
            }
            _ if self.is_handover() => {
                self.finish(EndReason::Client(ClientEnd::BytesAfterStarttls), now);
            }
            // It need not wait for the server.
            Phase::Summon | Phase::Brief => self.dialogue.lines.push(octets),
            _ if self.is_inside() => self.dialogue.lines.push(octets),
            Phase::Dial
            | Phase::SecureBackend
            | Phase::Start
            | Phase::Tell
            | Phase::Greeting
            | Phase::Replay
            | Phase::Commit
            | Phase::Announce
            | Phase::SecureClient
            | Phase::RelayPlain
            | Phase::RelayTls => {
                self.finish(EndReason::Bug(format!("client octets handed over in {:?}", self.phase)), now);
            }
            Phase::Close => {}
        }
    }

    /// The client closed its side (half-close: it may still read).
    pub fn handle_client_eof(&mut self, now: Instant) {
        self.client_eof = true;
        match self.phase {
            Phase::Snoop | Phase::Gate => self.take_commands(now),
            // What it has said is answered first.
            Phase::Summon | Phase::Brief => {}
            _ if self.is_inside() => {}
            Phase::Dial
            | Phase::SecureBackend
            | Phase::Start
            | Phase::Tell
            | Phase::Greeting
            | Phase::Replay
            | Phase::Commit
            | Phase::Announce
            | Phase::SecureClient => self.finish(EndReason::Client(ClientEnd::Gone), now),
            Phase::RelayPlain | Phase::RelayTls | Phase::Close => {}
        }
    }

    /// The child said `octets`. Only in `Snoop` and `Brief`.
    pub fn handle_child(&mut self, octets: &[u8], now: Instant) {
        if self.phase == Phase::Brief {
            return self.brief(octets, now);
        }
        let edit = Edit { offer_starttls: self.policy.offer_tls, hide_auth: self.policy.require_tls };
        self.hear(octets, Some(edit), now);
    }

    /// The child closed its stdout. Only in `Snoop` and `Brief`.
    pub fn handle_child_eof(&mut self, now: Instant) {
        let announced = self.dialogue.last_code().is_some_and(|c| c.is(b"221") || c.is(b"421"));
        let reason = if self.phase == Phase::Brief {
            EndReason::Child(ChildEnd::Differs("it closed".to_owned()))
        } else if !self.dialogue.may_speak() {
            EndReason::Child(ChildEnd::InsideReply)
        } else if announced {
            EndReason::Over
        } else if self.client_eof && !self.dialogue.is_ungreeted() {
            self.client_gone()
        } else {
            EndReason::Child(ChildEnd::Gone)
        };
        self.finish(reason, now);
    }

    /// Something queued was written: commands that waited for room are taken.
    pub fn handle_written(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Snoop | Phase::Gate) {
            self.take_commands(now);
        }
    }

    /// Octets went through a relay in either direction.
    pub fn handle_relayed(&mut self, now: Instant) {
        self.timers.touch(now);
    }

    /// The server's side of a relay is finished; the client's gets [`limits::HALF_CLOSED`].
    pub fn handle_server_finished(&mut self, now: Instant) {
        self.timers.relay_ends(RelayEnd::Server, now);
    }

    /// In a relay: the client has reset its connection, or in TLS ended it without close_notify. Many clients do that after QUIT: where the
    /// backend ends cleanly within [`limits::LINGER`] by itself, the session is over; else it was broken off.
    pub fn handle_client_broke_off(&mut self, now: Instant) {
        self.timers.relay_ends(RelayEnd::Client, now);
    }

    /// SIGTERM.
    pub fn handle_terminate(&mut self, now: Instant) {
        self.finish(EndReason::Terminated, now);
    }

    /// Gives back what memory holds nothing: until the next event there may be minutes.
    pub fn give_back(&mut self) {
        [&mut self.to_client, &mut self.to_child, &mut self.to_backend].into_iter().for_each(Buffer::give_back);
        self.dialogue.give_back();
    }

    /// The owner found that the session is over, for this reason.
    pub fn handle_end(&mut self, reason: EndReason, now: Instant) {
        self.finish(reason, now);
    }

    /// In `Close`: what was owed to the client has not left in time, so this was no good end.
    pub fn handle_unsent(&mut self) {
        if self.end == Some(EndReason::Over) {
            self.end = Some(EndReason::Timeout(Phase::Close));
        }
    }

    /// Whether the client has said QUIT in clear, nothing behind it, and the session is over by that.
    #[must_use]
    pub fn is_parted(&self) -> bool {
        self.quit_seen
            && self.end == Some(EndReason::Over)
            && self.ended_in == Phase::Snoop
            && self.dialogue.lines.is_empty()
    }

    fn client_gone(&self) -> EndReason {
        if self.quit_seen { EndReason::Over } else { EndReason::Client(ClientEnd::Gone) }
    }

    fn step(&mut self, cause: Cause, now: Instant) {
        match self.phase.after(cause, self.policy.way) {
            Some(next) => {
                self.phase = next;
                self.timers.entered(now);
                self.begin(now);
            }
            None => {
                let bug = format!("{cause:?} in {:?}", self.phase);
                self.finish(EndReason::Bug(bug), now);
            }
        }
    }

    /// Ends the session, with a farewell where the client is between two replies. The first reason stays.
    fn finish(&mut self, reason: EndReason, now: Instant) {
        if self.phase == Phase::Close {
            return;
        }
        let reason = match self.lost.take() {
            // Whoever gives up now, that came first.
            Some(lost) if !reason.is_warning() => EndReason::Handover(lost),
            Some(_) | None => reason,
        };
        let between = match self.phase {
            Phase::Snoop
            | Phase::Summon
            | Phase::Brief
            | Phase::Dial
            | Phase::SecureBackend
            | Phase::Start
            | Phase::Tell
            | Phase::Greeting
            | Phase::Replay
            | Phase::Commit
            | Phase::Gate => self.dialogue.may_speak(),
            Phase::Announce | Phase::SecureClient | Phase::RelayPlain | Phase::RelayTls | Phase::Close => false,
        };
        if let Some(farewell) = reason.farewell().filter(|_| between) {
            self.to_client.push(farewell.octets());
        }
        self.end = Some(reason);
        self.ended_in = self.phase;
        self.step(Cause::Ended, now);
    }
}

#[cfg(test)]
mod contract_tests;
