//! The ways to the server that goes on behind TLS (`--way`). Which phases each takes: [`super::Phase::steps`].

use core::fmt;

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
    /// A fresh child, which is told of the client's TLS.
    Respawn,
}

impl Way {
    /// All of them, as the manual lists them.
    pub const ALL: [Self; 4] = [Self::Tls, Self::Plain, Self::Keep, Self::Respawn];

    /// Its word on the command line and in the log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Plain => "plain",
            Self::Keep => "keep",
            Self::Respawn => "respawn",
        }
    }

    /// Whether HOST PORT is dialled, so that it stands on the command line.
    #[must_use]
    pub fn dials(self) -> bool {
        match self {
            Self::Tls | Self::Plain => true,
            Self::Keep | Self::Respawn => false,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
