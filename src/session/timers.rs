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
            Phase::Summon | Phase::Dial | Phase::Start | Phase::Tell => self.entered + timeouts.dial,
            Phase::SecureBackend => self.entered + timeouts.backend_handshake,
            Phase::Brief | Phase::Greeting => self.entered + timeouts.greeting,
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

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_unknown_verb_is_over_when_its_time_is_and_counts_only_while_more_waits() {
        let start = Instant::now();
        let mut timers = Timers::new(start);
        let sent = start + 7 * SECOND;
        timers.sent_unknown(sent);
        let over = sent + limits::UNKNOWN_VERB;
        assert!(!timers.is_unknown_over(over - SECOND) && timers.is_unknown_over(over));
        let due = |held| timers.deadline(Phase::Snoop, &Timeouts::default(), held, None);
        assert_eq!(due(true), Some(over));
        assert_eq!(due(false), Some(start + Timeouts::default().snoop));
    }

    #[test]
    fn the_cutoff_counts_from_the_beginning_of_the_dialogue() {
        let start = Instant::now();
        let mut timers = Timers::new(start);
        timers.touch(start + 5 * SECOND);
        let after = 9 * SECOND;
        assert!(!timers.is_cutoff(after, start + 8 * SECOND) && timers.is_cutoff(after, start + after));
        let due = |phase| timers.deadline(phase, &Timeouts::default(), false, Some(after));
        assert_eq!(due(Phase::Snoop), Some(start + after));
        assert_eq!(due(Phase::Gate), Some(start + 5 * SECOND + Timeouts::default().snoop), "none inside TLS");
    }

    #[test]
    fn each_phase_of_a_hand_over_has_its_own_time_from_its_own_beginning() {
        let start = Instant::now();
        let mut timers = Timers::new(start);
        let entered = start + 100 * SECOND;
        timers.entered(entered);
        let own = Timeouts {
            dial: SECOND,
            backend_handshake: 2 * SECOND,
            greeting: 3 * SECOND,
            replay: 4 * SECOND,
            handshake: 5 * SECOND,
            ..Timeouts::default()
        };
        let phases = [
            (Phase::Summon, own.dial),
            (Phase::Brief, own.greeting),
            (Phase::Dial, own.dial),
            (Phase::Start, own.dial),
            (Phase::Tell, own.dial),
            (Phase::SecureBackend, own.backend_handshake),
            (Phase::Greeting, own.greeting),
            (Phase::Replay, own.replay),
            (Phase::Commit, own.handshake),
            (Phase::Announce, own.handshake),
            (Phase::SecureClient, own.handshake),
        ];
        for (phase, time) in phases {
            assert_eq!(timers.deadline(phase, &own, false, None), Some(entered + time), "{phase:?}");
        }
        assert_eq!(timers.deadline(Phase::Close, &own, false, None), None);
    }
}
