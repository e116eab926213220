//! From STARTTLS to the gate: what the owner reports of each step, and what a failed one leaves behind. Which steps there
//! are, and in which order, is the way's ([`Phase::steps`]).

use std::time::Instant;

use crate::smtp::reply::Ours;

use super::dialogue::Dialogue;
use super::end::{BackendEnd, ChildEnd, EndReason, HandoverFailure};
use super::phase::{Cause, Phase};
use super::policy::Replay;
use super::replay::{Progress, Run};
use super::snoop::Snooper;
use super::{Note, Session};

impl Session {
    /// The backend's plaintext. Only in `Greeting`, `Replay` and `Gate`; elsewhere before the gate it is a failure.
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
            Phase::SecureBackend | Phase::Commit | Phase::Tell | Phase::SecureClient => {
                if let Some(run) = &mut self.replay {
                    run.lose_step();
                }
                self.handle_handover_failed("the backend spoke unasked".to_owned(), now);
            }
            Phase::Gate => self.hear(octets, None, now),
            Phase::Snoop
            | Phase::Summon
            | Phase::Brief
            | Phase::Dial
            | Phase::Start
            | Phase::Announce
            | Phase::RelayPlain
            | Phase::RelayTls
            | Phase::Close => {}
        }
    }

    /// The backend closed. `clean`: as its connection knows a clean end, in TLS with close_notify.
    pub fn handle_backend_eof(&mut self, clean: bool, now: Instant) {
        if self.is_handover() || self.phase.is_reaching() || self.phase == Phase::SecureClient {
            self.handle_handover_failed("the backend closed".to_owned(), now);
        } else if self.phase == Phase::Gate {
            let said_bye = self.dialogue.last_code().is_some_and(|c| c.is(b"221") || c.is(b"421"));
            let reason = match (clean, said_bye) {
                (true, true) => EndReason::Over,
                (true, false) => EndReason::Backend(BackendEnd::Gone),
                // In the clear there is no close_notify that could be missing.
                (false, _) if self.policy.way.is_clear() => EndReason::Backend(BackendEnd::BrokeOff),
                (false, _) => EndReason::Backend(BackendEnd::Truncated),
            };
            self.finish(reason, now);
        } else if self.phase == Phase::Announce {
            let why = "the backend closed".to_owned();
            let failure = HandoverFailure { way: self.policy.way, step: self.phase, why };
            self.finish(EndReason::Handover(failure), now);
        }
    }

    /// The backend is reached.
    pub fn handle_dialled(&mut self, now: Instant) {
        self.step(Cause::Dialled, now);
    }

    /// The backend's TLS stands and is trusted.
    pub fn handle_backend_secured(&mut self, now: Instant) {
        self.step(Cause::BackendSecured, now);
    }

    /// The fresh child runs.
    pub fn handle_started(&mut self, now: Instant) {
        self.step(Cause::Started, now);
    }

    /// The backend has been told of the client.
    pub fn handle_told(&mut self, now: Instant) {
        self.step(Cause::Told, now);
    }

    /// A step of the hand-over failed: `why` in words, remote octets escaped. The client gets a 454 and goes on with the
    /// child; behind the 220 there is no way back, and it gets a 421 as soon as its TLS stands.
    ///
    /// Rejected: to end at once where it still shakes hands. To the client that is TLS that failed, and many deliver in clear then.
    pub fn handle_handover_failed(&mut self, why: String, now: Instant) {
        let failure = HandoverFailure { way: self.policy.way, step: self.phase, why };
        if self.phase == Phase::SecureClient {
            self.lost.get_or_insert(failure);
            return;
        }
        if self.is_inside() && self.phase.is_reaching() {
            return self.finish(EndReason::Handover(failure), now);
        }
        self.step(Cause::HandoverFailed, now);
        if self.phase == Phase::Snoop {
            self.timers.touch(now);
            self.failed_handovers += 1;
            self.notes.push(Note::HandoverFailed(failure));
            let replay = self.replay.take();
            self.to_backend.clear();
            self.refuse_tls();
            if self.policy.way.keeps() && replay.is_some_and(|run| !run.is_in_step()) {
                // The late answer would pass for the one to the client's next command.
                self.dialogue.end_in_turn(EndReason::Child(ChildEnd::LostStep));
            }
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
        self.stand_in = None;
        self.to_child.clear();
    }

    /// The UCSPI-TLS server did not come to the end of the client's handshake: why.
    pub fn handle_tls_server_failed(&mut self, why: &str, now: Instant) {
        let failure = HandoverFailure { way: self.policy.way, step: self.phase, why: why.to_owned() };
        self.finish(EndReason::TlsServer(failure), now);
    }

    /// The client's TLS stands.
    pub fn handle_client_secured(&mut self, now: Instant) {
        self.step(Cause::ClientSecured, now);
        if let Some(lost) = self.lost.take() {
            self.finish(EndReason::Handover(lost), now);
        }
    }

    /// Whether STARTTLS was said and the 220 was not: a failure is a 454.
    #[must_use]
    pub fn is_handover(&self) -> bool {
        self.phase.is_handover(self.policy.way)
    }

    /// Whether the client's TLS stands, and no relay has begun.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        self.phase.is_inside(self.policy.way)
    }

    /// What the present phase begins with.
    pub(super) fn begin(&mut self, now: Instant) {
        match self.phase {
            Phase::Greeting => {
                self.replay = Some(Run::new(self.transcript.steps()));
                if self.policy.replay == Replay::All && self.transcript.is_full() {
                    self.handle_handover_failed("the record is too long to be replayed".to_owned(), now);
                }
            }
            // No greeting came before it: the child is kept.
            Phase::Replay if self.replay.is_none() => match self.why_not_kept() {
                Some(why) => self.handle_handover_failed(why.to_owned(), now),
                None => self.replay = Some(Run::reset(&mut self.to_backend)),
            },
            // What the client did not wait to say has its turn.
            Phase::Gate => {
                self.timers.restart(now);
                self.take_commands(now);
            }
            Phase::Brief => self.begin_briefing(now),
            Phase::Dial
            | Phase::SecureBackend
            | Phase::Start
            | Phase::Tell
            | Phase::Replay
            | Phase::Snoop
            | Phase::Summon
            | Phase::Commit
            | Phase::Announce
            | Phase::SecureClient
            | Phase::RelayPlain
            | Phase::RelayTls
            | Phase::Close => {}
        }
    }

    /// What is wrong with the child before it is asked.
    fn why_not_kept(&self) -> Option<&'static str> {
        if !self.dialogue.is_between_replies() {
            Some("the child is inside a reply that nobody asked for")
        } else if self.noted.contains(&Note::ChildOffersStarttls) {
            // As of any other server that would: seen in its plaintext EHLO reply, the one inside TLS being the client's own.
            Some("it offers STARTTLS inside TLS")
        } else {
            None
        }
    }
}
