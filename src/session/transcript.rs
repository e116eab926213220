//! What was recorded of the plaintext dialogue, and how the child took it: all that the replay may say.
//!
//! Only commands that change nothing but who the client says it is come here; a mail transaction or AUTH never does,
//! because those are cutoffs. Bounded by [`limits::TRANSCRIPT`].

use std::collections::VecDeque;

use crate::smtp::command::Verb;

use super::limits;
use super::policy::Replay;

/// The number of no entry.
pub const NONE: u32 = 0;

/// One recorded command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The line, with CRLF.
    pub line: Vec<u8>,
    /// EHLO, whose reply is looked at for STARTTLS.
    pub is_ehlo: bool,
    /// RSET of ours, to a child that is kept: it must say 2yz.
    pub is_reset: bool,
    /// The child said 2yz; the backend must not say 4yz or 5yz then.
    pub accepted: bool,
    number: u32,
    is_hello: bool,
}

impl Entry {
    /// What no client said.
    #[must_use]
    pub fn reset() -> Self {
        Self {
            line: b"RSET\r\n".to_vec(),
            is_ehlo: false,
            is_reset: true,
            accepted: false,
            number: NONE,
            is_hello: false,
        }
    }

    /// A line, with CRLF, that somebody else has answered with 2yz.
    #[must_use]
    pub fn answered_elsewhere(line: Vec<u8>) -> Self {
        Self { line, is_ehlo: false, is_reset: false, accepted: true, number: NONE, is_hello: true }
    }
}

/// The record. Entries get their number when the command is sent and their outcome when the child answers.
#[derive(Debug)]
pub struct Transcript {
    keep: Replay,
    entries: VecDeque<Entry>,
    octets: usize,
    recorded: u32,
    is_full: bool,
}

impl Transcript {
    /// An empty record that keeps what `keep` will need.
    #[must_use]
    pub fn new(keep: Replay) -> Self {
        Self { keep, entries: VecDeque::new(), octets: 0, recorded: 0, is_full: false }
    }

    /// One that begins with what was recorded, and accepted, elsewhere.
    #[must_use]
    pub fn told(keep: Replay, commands: &[(Verb, Vec<u8>)]) -> Self {
        let mut transcript = Self::new(keep);
        for (verb, line) in commands {
            let number = transcript.record(*verb, line);
            transcript.answered(number, b'2');
        }
        transcript
    }

    /// Records a command line (without its line end) that goes to the child. Returns its number.
    pub fn record(&mut self, verb: Verb, line: &[u8]) -> u32 {
        self.recorded = self.recorded.wrapping_add(1);
        let is_hello = matches!(verb, Verb::Ehlo | Verb::Helo);
        let wanted = match self.keep {
            Replay::Hello => is_hello,
            Replay::All => verb != Verb::Quit,
            Replay::None => false,
        };
        if wanted && self.octets + line.len() > limits::TRANSCRIPT {
            self.is_full = true;
        } else if wanted {
            let line = [line, b"\r\n"].concat();
            self.octets += line.len();
            let is_ehlo = verb == Verb::Ehlo;
            let number = self.recorded;
            self.entries.push_back(Entry { line, is_ehlo, is_reset: false, accepted: false, number, is_hello });
        }
        self.recorded
    }

    /// Nothing of it will be said any more; how much there was is still known.
    pub(super) fn forget(&mut self) {
        self.entries = VecDeque::new();
    }

    /// The child answered command `number` with a reply of this class.
    pub fn answered(&mut self, number: u32, class: u8) {
        let accepted = class == b'2';
        let mut is_hello = false;
        for entry in self.entries.iter_mut().filter(|e| e.number == number) {
            entry.accepted = accepted;
            is_hello = entry.is_hello;
        }
        if self.keep == Replay::Hello && is_hello {
            // The last accepted hello is the only one that will be said again.
            self.entries.retain(|e| if accepted { e.number >= number } else { e.number != number });
            self.octets = self.entries.iter().map(|e| e.line.len()).sum();
        }
    }

    /// What the backend is to be told, in order.
    #[must_use]
    pub fn steps(&self) -> VecDeque<Entry> {
        self.entries.iter().filter(|e| e.accepted || self.keep == Replay::All).cloned().collect()
    }

    /// How many commands were recorded, kept or not.
    #[must_use]
    pub fn recorded(&self) -> u32 {
        self.recorded
    }

    /// Whether something that should be replayed no longer fitted: a replay would lie.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.is_full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(transcript: &Transcript) -> Vec<String> {
        transcript.steps().iter().map(|e| String::from_utf8_lossy(&e.line).into_owned()).collect()
    }

    #[test]
    fn the_last_accepted_hello_is_what_is_said_again() {
        let mut transcript = Transcript::new(Replay::Hello);
        let a = transcript.record(Verb::Ehlo, b"EHLO a");
        let b = transcript.record(Verb::Helo, b"HELO b");
        let c = transcript.record(Verb::Ehlo, b"EHLO c");
        transcript.record(Verb::Noop, b"NOOP");
        transcript.answered(a, b'2');
        transcript.answered(b, b'2');
        transcript.answered(c, b'5');
        assert_eq!(lines(&transcript), ["HELO b\r\n"]);
    }

    #[test]
    fn all_is_said_in_order() {
        let mut transcript = Transcript::new(Replay::All);
        let a = transcript.record(Verb::Ehlo, b"EHLO a");
        transcript.record(Verb::Noop, b"NOOP x");
        transcript.answered(a, b'2');
        assert_eq!(lines(&transcript), ["EHLO a\r\n", "NOOP x\r\n"]);
    }

    #[test]
    fn a_million_hellos_take_no_room() {
        let mut transcript = Transcript::new(Replay::Hello);
        for _ in 0..100_000 {
            let number = transcript.record(Verb::Ehlo, &[b'a'; 1000]);
            transcript.answered(number, b'2');
        }
        assert!(transcript.entries.len() == 1 && !transcript.is_full());
    }

    #[test]
    fn a_full_transcript_says_so() {
        let mut transcript = Transcript::new(Replay::All);
        for _ in 0..100 {
            transcript.record(Verb::Noop, &[b'a'; 1000]);
        }
        assert!(transcript.is_full() && transcript.octets <= limits::TRANSCRIPT + 200);
    }
}
