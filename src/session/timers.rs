//! The session's timers: they belong to the session, not to a read, and go on through every hand-over.

use std::time::{Duration, Instant};

use super::limits;
use super::phase::Phase;
use super::policy::Timeouts;

/// When things last happened.
#[derive(Debug)]
pub(super) struct Timers {
    /// The dialogue began: in plaintext, then again inside TLS.
    started: Instant,
    /// The last command or whole reply; in a relay the last octet.
    active: Instant,
    /// The present phase began.
    entered: Instant,
    /// The last unknown verb was sent.
    unknown: Instant,
    closing: RelayEnd,
}

/// How far a relay has come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RelayEnd {
    /// Both sides talk.
    Open,
    /// The server's side has ended.
    Server,
    /// The client is gone without having said so.
    Client,
}

impl Timers {
    pub(super) fn new(now: Instant) -> Self {
        Self { started: now, active: now, entered: now, unknown: now, closing: RelayEnd::Open }
    }

    /// A new dialogue begins.
    pub(super) fn restart(&mut self, now: Instant) {
        self.started = now;
        self.active = now;
    }

    /// A command was taken, a reply was whole, octets were relayed.
    pub(super) fn touch(&mut self, now: Instant) {
        self.active = now;
    }

    pub(super) fn entered(&mut self, now: Instant) {
        self.entered = now;
    }

    pub(super) fn sent_unknown(&mut self, now: Instant) {
        self.unknown = now;
    }

    /// One side of a relay has ended; the other gets a little time.
    pub(super) fn relay_ends(&mut self, how: RelayEnd, now: Instant) {
        self.closing = how;
        self.active = now;
    }

    pub(super) fn relay_end(&self) -> RelayEnd {
        self.closing
    }

    pub(super) fn is_unknown_over(&self, now: Instant) -> bool {
        now >= self.unknown + limits::UNKNOWN_VERB
    }

    pub(super) fn is_cutoff(&self, after: Duration, now: Instant) -> bool {
        now >= self.started + after
    }

    /// The earliest thing that is due. `unknown_held`: an unknown verb is unanswered and more has come.
    pub(super) fn deadline(
        &self,
        phase: Phase,
        timeouts: &Timeouts,
        unknown_held: bool,
        cutoff: Option<Duration>,
    ) -> Option<Instant> {
        let dialogue = (self.active + timeouts.snoop).min(self.started + timeouts.snoop_total);
        Some(match phase {
            Phase::Snoop => {
                let unknown = unknown_held.then(|| self.unknown + limits::UNKNOWN_VERB);
                let cutoff = cutoff.map(|after| self.started + after);
                [unknown, cutoff].into_iter().flatten().fold(dialogue, Instant::min)
            }
            Phase::Dial | Phase::Start => self.entered + timeouts.dial,
            Phase::SecureBackend => self.entered + timeouts.backend_handshake,
            Phase::Greeting => self.entered + timeouts.greeting,
            Phase::Replay => self.entered + timeouts.replay,
            Phase::Commit | Phase::Announce | Phase::SecureClient => self.entered + timeouts.handshake,
            Phase::Gate => dialogue,
            Phase::RelayPlain | Phase::RelayTls => {
                self.active
                    + match self.closing {
                        RelayEnd::Open => timeouts.relay,
                        RelayEnd::Server => timeouts.relay.min(limits::HALF_CLOSED),
                        RelayEnd::Client => timeouts.relay.min(limits::LINGER),
                    }
            }
            Phase::Close => return None,
        })
    }
}
