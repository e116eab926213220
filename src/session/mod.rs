//! The session: one dialogue and its state, without a file descriptor, a clock or a logger.
//!
//! Contract. Octets, events and the time come in by `handle_*`; the owner then writes out [`Session::to_client`],
//! [`Session::to_child`] and [`Session::to_backend`], looks at [`Session::phase`] and does what that phase needs:
//!
//! | phase | the owner |
//! |---|---|
//! | `Snoop` | reads client and child while `*_room` says so; closes the child's stdin when [`Session::wants_child_eof`] |
//! | `Dial` | connects: `handle_dialled` or `handle_handover_failed`; still reads the client, never the child |
//! | `SecureBackend` | TLS with the backend: `handle_backend_secured` or `handle_handover_failed` |
//! | `Greeting`, `Replay` | `handle_backend` with what TLS delivers |
//! | `Commit` | when nothing is unsent: reads the client once more; nothing there: `handle_quiet` |
//! | `Announce` | writes; when all is out: `handle_announced`; reads no one |
//! | `SecureClient` | dismisses the child; TLS with the client: `handle_client_secured` or `handle_end` |
//! | `Gate` | `handle_client` and `handle_backend` with what TLS delivers |
//! | `RelayPlain`, `RelayTls` | writes out what is queued, then moves octets itself; `handle_relayed` for the timer |
//! | `Close` | writes out, lingers, closes; [`Session::end`] says why |
//!
//! No call blocks, allocates per octet, or asks the time; `deadline` says when `handle_timeout` is due. After `Close`
//! nothing moves the session again.

mod commands;
mod dialogue;
mod end;
pub mod limits;
mod phase;
pub mod policy;
mod replay;
mod snoop;
mod timers;
pub mod transcript;

use std::sync::Arc;
use std::time::Instant;

pub use end::{BackendEnd, ChildEnd, ClientEnd, EndReason, HandoverFailure, PolicyEnd};
pub use phase::{Cause, Phase};
pub use policy::Policy;

use crate::buffer::Buffer;
use crate::smtp::ehlo::Edit;
use crate::smtp::reply::Ours;

use dialogue::Dialogue;
use replay::Progress;
use snoop::Snooper;
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
    timers: Timers,
    notes: Vec<Note>,
    noted: Vec<Note>,
    failed_handovers: u32,
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
        let transcript = Transcript::new(policy.replay);
        Self {
            policy,
            phase: Phase::Snoop,
            end: None,
            ended_in: Phase::Snoop,
            dialogue: Dialogue::with_greeting(),
            snooper: Snooper::default(),
            transcript,
            replay: None,
            timers: Timers::new(now),
            notes: Vec::new(),
            noted: Vec::new(),
            failed_handovers: 0,
            client_eof: false,
            quit_seen: false,
            to_client: Buffer::default(),
            to_child: Buffer::default(),
            to_backend: Buffer::default(),
        }
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

    /// How many octets of the client may be handed over now; 0: do not read it (backpressure).
    #[must_use]
    pub fn client_room(&self) -> usize {
        match self.phase {
            Phase::Snoop if self.to_child.len() > limits::TO_SERVER || self.to_client.len() > limits::TO_CLIENT => 0,
            Phase::Gate if self.to_backend.len() > limits::TO_SERVER || self.to_client.len() > limits::TO_CLIENT => 0,
            Phase::Snoop | Phase::Gate => self.dialogue.lines.room(),
            // One octet is one too many here, and all that is wanted.
            Phase::Dial | Phase::SecureBackend | Phase::Greeting | Phase::Replay | Phase::Commit => 1,
            Phase::Announce | Phase::SecureClient | Phase::RelayPlain | Phase::RelayTls | Phase::Close => 0,
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
        self.phase == Phase::Snoop && self.to_client.len() <= limits::TO_CLIENT
    }

    /// Whether the backend's plaintext may be handed over now.
    #[must_use]
    pub fn wants_backend(&self) -> bool {
        match self.phase {
            Phase::Greeting | Phase::Replay => true,
            Phase::Gate => self.to_client.len() <= limits::TO_CLIENT,
            Phase::Snoop
            | Phase::Dial
            | Phase::SecureBackend
            | Phase::Commit
            | Phase::Announce
            | Phase::SecureClient
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

    /// The client sent `octets`, at most [`Session::client_room`].
    pub fn handle_client(&mut self, octets: &[u8], now: Instant) {
        match self.phase {
            Phase::Snoop | Phase::Gate => {
                self.dialogue.lines.push(octets);
                self.take_commands(now);
            }
            Phase::Dial | Phase::SecureBackend | Phase::Greeting | Phase::Replay | Phase::Commit => {
                self.finish(EndReason::Client(ClientEnd::BytesAfterStarttls), now);
            }
            Phase::Announce | Phase::SecureClient | Phase::RelayPlain | Phase::RelayTls => {
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
            Phase::Dial
            | Phase::SecureBackend
            | Phase::Greeting
            | Phase::Replay
            | Phase::Commit
            | Phase::Announce
            | Phase::SecureClient => self.finish(EndReason::Client(ClientEnd::Gone), now),
            Phase::RelayPlain | Phase::RelayTls | Phase::Close => {}
        }
    }

    /// The child said `octets`. Only in `Snoop`.
    pub fn handle_child(&mut self, octets: &[u8], now: Instant) {
        let edit = Edit { offer_starttls: self.policy.offer_tls, hide_auth: self.policy.require_tls };
        self.hear(octets, Some(edit), now);
    }

    /// The child closed its stdout. Only in `Snoop`.
    pub fn handle_child_eof(&mut self, now: Instant) {
        let announced = self.dialogue.last_code().is_some_and(|c| c.is(b"221") || c.is(b"421"));
        let reason = if !self.dialogue.may_speak() {
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

    /// The backend's plaintext. Only in `Greeting`, `Replay` and `Gate`; elsewhere before the 220 it is a failure.
    pub fn handle_backend(&mut self, octets: &[u8], now: Instant) {
        match self.phase {
            Phase::Greeting | Phase::Replay => match &mut self.replay {
                Some(run) => match run.hear(octets, &mut self.to_backend) {
                    Ok(Progress::Waiting) => {}
                    Ok(Progress::Greeted) => self.step(Cause::Greeted, now),
                    Ok(Progress::Done) => self.step(Cause::Replayed, now),
                    Err(why) => self.handle_handover_failed(why, now),
                },
                None => self.finish(EndReason::Bug("no replay".to_owned()), now),
            },
            Phase::SecureBackend | Phase::Commit => {
                self.handle_handover_failed("the backend spoke unasked".to_owned(), now);
            }
            Phase::Gate => self.hear(octets, None, now),
            Phase::Snoop
            | Phase::Dial
            | Phase::Announce
            | Phase::SecureClient
            | Phase::RelayPlain
            | Phase::RelayTls
            | Phase::Close => {}
        }
    }

    /// The backend closed. `clean`: with close_notify.
    pub fn handle_backend_eof(&mut self, clean: bool, now: Instant) {
        if self.phase.is_handover() {
            self.handle_handover_failed("the backend closed".to_owned(), now);
        } else if self.phase == Phase::Gate {
            let said_bye = self.dialogue.last_code().is_some_and(|c| c.is(b"221") || c.is(b"421"));
            let reason = match (clean, said_bye) {
                (true, true) => EndReason::Over,
                (true, false) => EndReason::Backend(BackendEnd::Gone),
                (false, _) => EndReason::Backend(BackendEnd::Truncated),
            };
            self.finish(reason, now);
        } else if matches!(self.phase, Phase::Announce | Phase::SecureClient) {
            self.finish(EndReason::Backend(BackendEnd::Gone), now);
        }
    }

    /// The backend's TCP connection stands.
    pub fn handle_dialled(&mut self, now: Instant) {
        self.step(Cause::Dialled, now);
    }

    /// The backend's TLS stands and is trusted.
    pub fn handle_backend_secured(&mut self, now: Instant) {
        self.replay = Some(replay::Run::new(self.transcript.steps()));
        self.step(Cause::BackendSecured, now);
        if self.policy.replay == policy::Replay::All && self.transcript.is_full() {
            self.handle_handover_failed("the record is too long to be replayed".to_owned(), now);
        }
    }

    /// A step of the hand-over failed: `why` in words, remote octets escaped. The client gets a 454 and goes on with the
    /// child.
    pub fn handle_handover_failed(&mut self, why: String, now: Instant) {
        let failure = HandoverFailure { step: self.phase, why };
        self.step(Cause::HandoverFailed, now);
        if self.phase == Phase::Snoop {
            self.timers.touch(now);
            self.failed_handovers += 1;
            self.notes.push(Note::HandoverFailed(failure));
            self.replay = None;
            self.to_backend.clear();
            self.dialogue.answer(Ours::TLS_NOT_AVAILABLE);
            self.take_commands(now);
        }
    }

    /// In `Commit`: everything is written, and a fresh look at the client found nothing.
    pub fn handle_quiet(&mut self, now: Instant) {
        if !self.dialogue.may_speak() {
            return self.handle_handover_failed("the child is inside a reply that nobody asked for".to_owned(), now);
        }
        self.step(Cause::Quiet, now);
        if self.phase == Phase::Announce {
            self.to_client.push(Ours::READY.octets());
        }
    }

    /// In `Announce`: the 220 is on the wire. The plaintext dialogue ends here, and nothing of it is kept.
    pub fn handle_announced(&mut self, now: Instant) {
        self.step(Cause::Announced, now);
        self.dialogue = Dialogue::only_when_asked();
        self.snooper = Snooper::default();
        self.replay = None;
        self.to_child.clear();
    }

    /// The client's TLS stands.
    pub fn handle_client_secured(&mut self, now: Instant) {
        self.timers.restart(now);
        self.step(Cause::ClientSecured, now);
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

    /// When [`Session::handle_timeout`] is due; `None` in `Close`.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let unknown_held = self.dialogue.awaits_unknown() && !self.dialogue.lines.is_empty();
        let time_cutoff = self.policy.cutoff.after.filter(|_| !self.snooper.is_time_up());
        self.timers.deadline(self.phase, &self.policy.timeouts, unknown_held, time_cutoff)
    }

    /// The time is `now`: acts if the deadline has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        if self.phase == Phase::Snoop {
            if self.policy.cutoff.after.is_some_and(|after| self.timers.is_cutoff(after, now))
                && !self.snooper.is_time_up()
            {
                self.snooper.time_is_up();
                if self.policy.require_tls {
                    return self.finish(EndReason::Policy(PolicyEnd::TlsRequired), now);
                }
                return self.take_commands(now);
            }
            let unknown_held = self.dialogue.awaits_unknown() && !self.dialogue.lines.is_empty();
            if unknown_held && self.timers.is_unknown_over(now) {
                return self.cut_off(now);
            }
        }
        match self.phase {
            phase if phase.is_handover() && phase != Phase::Commit => {
                self.handle_handover_failed("time-out".to_owned(), now);
            }
            phase @ (Phase::RelayPlain | Phase::RelayTls) => {
                let reason = match self.timers.relay_end() {
                    RelayEnd::Open => EndReason::Timeout(phase),
                    // The client was given its time: nothing is missing.
                    RelayEnd::Server => EndReason::Over,
                    RelayEnd::Client => EndReason::Client(ClientEnd::BrokeOff),
                };
                self.finish(reason, now);
            }
            phase => self.finish(EndReason::Timeout(phase), now),
        }
    }

    fn client_gone(&self) -> EndReason {
        if self.quit_seen { EndReason::Over } else { EndReason::Client(ClientEnd::Gone) }
    }

    fn step(&mut self, cause: Cause, now: Instant) {
        match self.phase.after(cause) {
            Some(next) => {
                self.phase = next;
                self.timers.entered(now);
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
        let between = match self.phase {
            Phase::Snoop
            | Phase::Dial
            | Phase::SecureBackend
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
