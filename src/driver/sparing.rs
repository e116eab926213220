//! Log lines that a flood of clients brings about: one a second for each loop, the others are counted.

use std::time::{Duration, Instant};

use log::warn;

const SECOND: Duration = Duration::from_secs(1);

/// What one loop says of connections that it refuses.
#[derive(Debug, Default)]
pub(super) struct Sparing {
    next: Option<Instant>,
    left_out: u64,
}

impl Sparing {
    /// Says that one was refused, and why; if it may not now, it is counted.
    pub(super) fn say(&mut self, why: &str, now: Instant) {
        match self.turn(now) {
            Some(0) => warn!("{why}"),
            Some(others) => warn!("{why}; {others} others were refused before it"),
            None => {}
        }
    }

    /// Says how many were counted, when their second is over.
    pub(super) fn tend(&mut self, now: Instant) {
        if self.deadline().is_some_and(|due| now >= due) {
            let left_out = core::mem::take(&mut self.left_out);
            warn!("{left_out} more connections were refused");
            self.next = Some(now + SECOND);
        }
    }

    /// When that is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.next.filter(|_| self.left_out > 0)
    }

    /// How many were left out before this one, if it may be said.
    fn turn(&mut self, now: Instant) -> Option<u64> {
        if self.next.is_some_and(|next| now < next) {
            self.left_out += 1;
            return None;
        }
        self.next = Some(now + SECOND);
        Some(core::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_nobody_is_forgotten() {
        let (mut sparing, begin) = (Sparing::default(), Instant::now());
        let at = |milliseconds| begin + Duration::from_millis(milliseconds);
        assert_eq!(sparing.turn(at(0)), Some(0));
        assert_eq!(sparing.deadline(), None, "nobody waits for nothing");
        assert_eq!([at(1), at(999)].map(|now| sparing.turn(now)), [None, None]);
        assert_eq!(sparing.deadline(), Some(at(1000)));
        sparing.tend(at(999));
        assert_eq!(sparing.left_out, 2);
        sparing.tend(at(1000));
        assert_eq!((sparing.left_out, sparing.deadline()), (0, None));
        assert_eq!(sparing.turn(at(1500)), None, "that was this second's line");
        assert_eq!(sparing.turn(at(2000)), Some(1));
    }
}
