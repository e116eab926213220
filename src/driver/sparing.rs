//! Log lines that a flood of clients brings about: one a second, or a minute, for each loop and kind; the others are counted.

use std::time::{Duration, Instant};

use log::warn;

const SECOND: Duration = Duration::from_secs(1);

/// What one loop says of connections that it refuses, of one kind.
#[derive(Debug)]
pub(super) struct Sparing {
    every: Duration,
    next: Option<Instant>,
    left_out: u64,
    /// The last of those.
    last: String,
}

impl Default for Sparing {
    fn default() -> Self {
        Self::every(SECOND)
    }
}

impl Sparing {
    /// One line in this time.
    pub(super) fn every(every: Duration) -> Self {
        Self { every, next: None, left_out: 0, last: String::new() }
    }

    /// Says that one was refused, or not begun, and why; if it may not now, it is counted.
    pub(super) fn say(&mut self, why: &str, now: Instant) {
        self.left_out += 1;
        why.clone_into(&mut self.last);
        if self.next.is_none_or(|next| now >= next) {
            self.speak(now);
        }
    }

    /// Says what was counted, when its time is over.
    pub(super) fn tend(&mut self, now: Instant) {
        if self.deadline().is_some_and(|due| now >= due) {
            self.speak(now);
        }
    }

    fn speak(&mut self, now: Instant) {
        self.next = Some(now + self.every);
        let last = core::mem::take(&mut self.last);
        match core::mem::take(&mut self.left_out) {
            0 | 1 => warn!("{last}"),
            count => warn!("{last}; {} others like it before it", count - 1),
        }
    }

    /// When that is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.next.filter(|_| self.left_out > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_nobody_is_forgotten() {
        let (mut sparing, begin) = (Sparing::default(), Instant::now());
        let at = |milliseconds| begin + Duration::from_millis(milliseconds);
        let mut say = |time: u64| {
            sparing.say(&time.to_string(), at(time));
            (sparing.left_out, sparing.last.clone(), sparing.deadline())
        };
        assert_eq!(say(0), (0, String::new(), None), "said, and nobody waits for nothing");
        assert_eq!(say(1), (1, "1".to_owned(), Some(at(1000))));
        assert_eq!(say(999), (2, "999".to_owned(), Some(at(1000))));
        let mut tend = |time: u64| {
            sparing.tend(at(time));
            sparing.left_out
        };
        assert_eq!([999, 1000].map(&mut tend), [2, 0]);
        sparing.say("", at(1500));
        assert_eq!((sparing.left_out, sparing.deadline()), (1, Some(at(2000))), "that was this second's line");
        sparing.say("", at(2000));
        assert_eq!((sparing.left_out, sparing.deadline()), (0, None));
    }
}
