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
    /// HOST PORT, to which the client's TLS goes untouched.
    Raw,
    /// As `Tls`, but HOST is only connected to before the 220; all that is said to it, from the PROXY header on, is said behind
    /// the client's handshake, so that it can be told of the client's TLS.
    TlsLate,
    /// As `Plain`, likewise.
    PlainLate,
    /// As `Keep`, the client's TLS being that of the UCSPI-TLS server that we run under.
    UcspiTls,
    /// As `Respawn`, likewise.
    UcspiRespawn,
    /// No way of a command line's `--way`: `--mute`, which stands behind the TLS that `Raw` leads to. The client has said STARTTLS
    /// elsewhere, and is at the gate once the child has greeted.
    Mute,
}

impl Way {
    /// All that need no UCSPI-TLS server, as the manual lists them, and the late ones.
    pub const ALL: [Self; 7] =
        [Self::Tls, Self::Plain, Self::Keep, Self::Respawn, Self::Raw, Self::TlsLate, Self::PlainLate];

    /// Every one.
    pub const EVERY: [Self; 10] = [
        Self::Tls,
        Self::Plain,
        Self::Keep,
        Self::Respawn,
        Self::Raw,
        Self::TlsLate,
        Self::PlainLate,
        Self::UcspiTls,
        Self::UcspiRespawn,
        Self::Mute,
    ];

    /// All that have a word on the command line.
    pub const NAMED: [Self; 7] =
        [Self::Tls, Self::Plain, Self::Keep, Self::Respawn, Self::Raw, Self::UcspiTls, Self::UcspiRespawn];

    /// Its word on the command line, where it has one, and in the log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Plain => "plain",
            Self::Keep => "keep",
            Self::Respawn => "respawn",
            Self::Raw => "raw",
            Self::TlsLate => "tls-late",
            Self::PlainLate => "plain-late",
            Self::UcspiTls => "ucspi-tls",
            Self::UcspiRespawn => "ucspi-tls-respawn",
            Self::Mute => "mute",
        }
    }

    /// Whether HOST PORT is dialled, so that it stands on the command line.
    #[must_use]
    pub fn dials(self) -> bool {
        match self {
            Self::Tls | Self::Plain | Self::Raw | Self::TlsLate | Self::PlainLate => true,
            Self::Keep | Self::Respawn | Self::UcspiTls | Self::UcspiRespawn | Self::Mute => false,
        }
    }

    /// This way with HOST being told what is known of the client's TLS, where there is one (`--proxy-facts late`).
    #[must_use]
    pub fn late(self) -> Option<Self> {
        match self {
            Self::Tls => Some(Self::TlsLate),
            Self::Plain => Some(Self::PlainLate),
            _ => None,
        }
    }

    /// Whether HOST is told what is known of the client's TLS.
    #[must_use]
    pub fn is_late(self) -> bool {
        matches!(self, Self::TlsLate | Self::PlainLate)
    }

    /// Whether HOST is spoken to in TLS of ours.
    #[must_use]
    pub fn secures_host(self) -> bool {
        matches!(self, Self::Tls | Self::TlsLate)
    }

    /// Whether HOST is told in the clear what the client says in TLS, so that it must be on this host.
    #[must_use]
    pub fn is_clear(self) -> bool {
        matches!(self, Self::Plain | Self::PlainLate)
    }

    /// Whether the child goes on behind TLS.
    #[must_use]
    pub fn keeps(self) -> bool {
        matches!(self, Self::Keep | Self::UcspiTls)
    }

    /// Whether a fresh child does.
    #[must_use]
    pub fn respawns(self) -> bool {
        matches!(self, Self::Respawn | Self::UcspiRespawn)
    }

    /// Whether the client's TLS is a UCSPI-TLS server's.
    #[must_use]
    pub fn is_ucspi_tls(self) -> bool {
        matches!(self, Self::UcspiTls | Self::UcspiRespawn)
    }

    /// Whether the client's TLS is ours, for which there is a certificate.
    #[must_use]
    pub fn ends_tls(self) -> bool {
        match self {
            Self::Tls | Self::Plain | Self::Keep | Self::Respawn | Self::TlsLate | Self::PlainLate => true,
            Self::Raw | Self::UcspiTls | Self::UcspiRespawn | Self::Mute => false,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each is, in a word where it is.
    const TABLE: [(&str, &str); 10] = [
        ("tls", "dials secures ends"),
        ("plain", "dials clear ends"),
        ("keep", "keeps ends"),
        ("respawn", "respawns ends"),
        ("raw", "dials"),
        ("tls-late", "dials late secures ends"),
        ("plain-late", "dials late clear ends"),
        ("ucspi-tls", "keeps ucspi"),
        ("ucspi-tls-respawn", "respawns ucspi"),
        ("mute", ""),
    ];

    #[test]
    fn each_way_is_what_its_line_says() {
        for (way, (name, expected)) in Way::EVERY.into_iter().zip(TABLE) {
            let words = [
                (way.dials(), "dials"),
                (way.is_late(), "late"),
                (way.secures_host(), "secures"),
                (way.is_clear(), "clear"),
                (way.keeps(), "keeps"),
                (way.respawns(), "respawns"),
                (way.is_ucspi_tls(), "ucspi"),
                (way.ends_tls(), "ends"),
            ];
            let is: Vec<&str> = words.into_iter().filter_map(|(is, word)| is.then_some(word)).collect();
            assert_eq!((way.to_string().as_str(), is.join(" ").as_str()), (name, expected));
            let late = Way::EVERY.into_iter().find(|late| late.name() == format!("{name}-late"));
            assert_eq!(way.late(), late);
        }
    }
}
