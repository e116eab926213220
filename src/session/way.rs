//! The ways to the server that goes on behind TLS (`--way`): which steps a STARTTLS takes, and in which order.
//!
//! A way is a list of phases and nothing else: the transitions of [`Phase`] follow it, and what stands before `Announce` is
//! the hand-over, in which a failure is still a 454. What a step is done *with* (a socket, the child's pipes, a fresh PROG)
//! is the engine's. A new way is a new list; a step that must come later (because its facts come later) moves behind
//! `SecureClient` in it.
//!
//! Rejected: questions about the way in each phase. Each of them would be a place where two ways can be confused.

use core::fmt;

use super::phase::Phase;

/// How the server behind TLS is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Way {
    /// HOST PORT, in TLS of its own.
    #[default]
    Tls,
    /// HOST PORT or a UNIX socket, in the clear.
    Plain,
    /// The child itself: told RSET, it goes on.
    Keep,
}

impl Way {
    /// All of them, as the manual lists them.
    pub const ALL: [Self; 3] = [Self::Tls, Self::Plain, Self::Keep];

    /// Its word on the command line and in the log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Plain => "plain",
            Self::Keep => "keep",
        }
    }

    /// Whether HOST PORT is dialled, so that it stands on the command line.
    #[must_use]
    pub fn dials(self) -> bool {
        match self {
            Self::Tls | Self::Plain => true,
            Self::Keep => false,
        }
    }

    /// The phases from STARTTLS to the gate, in order.
    #[must_use]
    pub fn steps(self) -> &'static [Phase] {
        use Phase::{Announce, Commit, Dial, Gate, Greeting, Replay, SecureBackend, SecureClient};
        match self {
            Self::Tls => &[Dial, SecureBackend, Greeting, Replay, Commit, Announce, SecureClient, Gate],
            Self::Plain => &[Dial, Greeting, Replay, Commit, Announce, SecureClient, Gate],
            Self::Keep => &[Dial, Replay, Commit, Announce, SecureClient, Gate],
        }
    }

    /// The phase behind `phase`.
    pub(super) fn behind(self, phase: Phase) -> Option<Phase> {
        let mut steps = self.steps().iter().skip_while(|step| **step != phase);
        steps.nth(1).copied()
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
