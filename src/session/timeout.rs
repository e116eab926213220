//! Deadlines: when the session wants to be called though nothing happens, and what it does then.

use std::time::Instant;

use super::Session;
use super::end::{ChildEnd, ClientEnd, EndReason, PolicyEnd};
use super::phase::Phase;
use super::timers::RelayEnd;

impl Session {
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
            Phase::Summon => self.finish(EndReason::Child(ChildEnd::NotStarted("time-out".to_owned())), now),
            Phase::Brief => self.finish(EndReason::Child(ChildEnd::Differs("time-out".to_owned())), now),
            phase if phase.is_reaching() => self.handle_handover_failed("time-out".to_owned(), now),
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
}
