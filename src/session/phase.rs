//! The phases of a session and every transition between them: this file is the diagram.
//!
//! ```text
//! Snoop --cutoff--> RelayPlain ------------------------------------------------.
//!   | ^                                                                        |
//!   | '--454-- any step below, up to Commit                                    |
//!   '-STARTTLS-> Dial -> SecureBackend -> Greeting -> Replay -> Commit         |
//!                                             |                 ^  |           |
//!                                             '-----none--------'  220         |
//!                                                                  v           v
//!            RelayTls <-EHLO- Gate <-handshake- SecureClient <- Announce    Close
//!               '----------------------- any phase: limit, time-out, end -----^
//! ```
//!
//! Drawn is the way `tls`. Every other takes some of these steps, in the order of its list ([`Phase::steps`]): a way is that
//! list and nothing else here. What stands in it before `Announce` is the hand-over, in which a failure is a 454; what stands
//! behind `SecureClient` is done inside the client's TLS, where a failure is a 421 (or nothing, if the client has heard more) and
//! the end. What a step is done with (a socket, the child's pipes) is the engine's.
//! A plaintext server that is not there from the start is come to by a detour, the same for all ways:
//!
//! ```text
//! Snoop --what nobody else can answer--> Summon --> Brief --> Snoop (the same line again)
//! ```
//!
//! Rejected: questions about the way in each phase. Each would be a place where two ways can be confused.
//!
//! A phase says what is being done; what it is done with lives beside it in the session. `after` takes the old phase by
//! value and is total: a pair that the diagram does not have is a bug of ours and closes the session.

use super::way::Way;

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Client and child talk through us; we look for STARTTLS.
    Snoop,
    /// The plaintext server is being started, or connected to. The client may talk on, unanswered.
    Summon,
    /// A plaintext server that others have answered for so far greets us, and is told what they were told.
    Brief,
    /// The server behind TLS is being reached: its connection is made, or the child is taken over. The child waits unread.
    Dial,
    /// The TLS handshake with the backend.
    SecureBackend,
    /// A fresh child is being started, now that the client's TLS is known.
    Start,
    /// HOST is told who the client is, and what its TLS is.
    Tell,
    /// The backend's greeting is awaited.
    Greeting,
    /// The backend is told what was recorded.
    Replay,
    /// All is ready but the 220: earlier replies leave, and the client must have sent nothing more.
    Commit,
    /// The 220 is leaving, alone.
    Announce,
    /// The TLS handshake with the client.
    SecureClient,
    /// Inside TLS, until the client has said EHLO.
    Gate,
    /// Client and child, octet for octet.
    RelayPlain,
    /// Client and backend, octet for octet; in the way `raw` the octets of their TLS.
    RelayTls,
    /// Over: what is owed leaves, then the ends are closed.
    Close,
}

/// What moves a session on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The plaintext server itself is needed.
    Wanted,
    /// It runs, or its connection stands.
    Summoned,
    /// It knows what it must.
    Briefed,
    /// The point by which STARTTLS must have come.
    Cutoff,
    /// STARTTLS in its turn, with nothing behind it.
    Starttls,
    /// The server behind TLS is reached: its connection stands, or it is the child.
    Dialled,
    /// The backend's TLS stands and its certificate is trusted.
    BackendSecured,
    /// The fresh child runs.
    Started,
    /// HOST has its PROXY header.
    Told,
    /// The backend's greeting was 220, and there is something to replay.
    Greeted,
    /// Everything that was to be replayed is answered as expected.
    Replayed,
    /// A step of the hand-over failed before the 220.
    HandoverFailed,
    /// Nothing unsent, nothing unread: the 220 is queued.
    Quiet,
    /// The 220 is on the wire.
    Announced,
    /// The client's TLS stands.
    ClientSecured,
    /// EHLO or HELO inside TLS.
    Opened,
    /// The session ends, for a reason that is kept beside.
    Ended,
}

impl Phase {
    /// All phases, in the order of a session that uses TLS.
    pub const ALL: [Self; 16] = [
        Self::Snoop,
        Self::Summon,
        Self::Brief,
        Self::Dial,
        Self::SecureBackend,
        Self::Start,
        Self::Tell,
        Self::Greeting,
        Self::Replay,
        Self::Commit,
        Self::Announce,
        Self::SecureClient,
        Self::Gate,
        Self::RelayPlain,
        Self::RelayTls,
        Self::Close,
    ];

    /// The phases from STARTTLS to the gate, in order.
    #[must_use]
    pub fn steps(way: Way) -> &'static [Self] {
        use Phase::{Announce, Commit, Dial, Gate, Greeting, Replay, SecureBackend, SecureClient, Start, Tell};
        match way {
            Way::Tls => &[Dial, SecureBackend, Greeting, Replay, Commit, Announce, SecureClient, Gate],
            Way::Plain => &[Dial, Greeting, Replay, Commit, Announce, SecureClient, Gate],
            Way::Keep | Way::UcspiTls => &[Dial, Replay, Commit, Announce, SecureClient, Gate],
            Way::Respawn | Way::UcspiRespawn => &[Dial, Commit, Announce, SecureClient, Start, Greeting, Replay, Gate],
            Way::Raw => &[Dial, Commit, Announce],
            Way::TlsLate => &[Dial, Commit, Announce, SecureClient, Tell, SecureBackend, Greeting, Replay, Gate],
            Way::PlainLate => &[Dial, Commit, Announce, SecureClient, Tell, Greeting, Replay, Gate],
            Way::Mute => &[Greeting, Replay, Gate],
        }
    }

    /// What a session begins with.
    #[must_use]
    pub fn first(way: Way) -> Self {
        match Self::steps(way) {
            [first, ..] if !Self::steps(way).contains(&Self::Announce) => *first,
            _ => Self::Snoop,
        }
    }

    /// What follows this step: the next one, or behind the last the relay.
    fn next(self, way: Way) -> Option<Self> {
        let mut behind = Self::steps(way).iter().skip_while(|step| **step != self);
        behind.next().map(|_| behind.next().copied().unwrap_or(Self::RelayTls))
    }

    /// The phase that follows, or `None` where the diagram has no such arrow.
    #[must_use]
    pub fn after(self, cause: Cause, way: Way) -> Option<Self> {
        let done = |step: Self| if self == step { step.next(way) } else { None };
        match cause {
            Cause::Ended => Some(Self::Close),
            Cause::Cutoff | Cause::Starttls | Cause::Wanted
                if self != Self::Snoop || Self::first(way) != Self::Snoop =>
            {
                None
            }
            Cause::Wanted => Some(Self::Summon),
            Cause::Summoned => (self == Self::Summon).then_some(Self::Brief),
            Cause::Briefed => (self == Self::Brief).then_some(Self::Snoop),
            Cause::Cutoff => Some(Self::RelayPlain),
            Cause::Starttls => Self::steps(way).first().copied(),
            Cause::Dialled => done(Self::Dial),
            Cause::BackendSecured => done(Self::SecureBackend),
            Cause::Started => done(Self::Start),
            Cause::Told => done(Self::Tell),
            Cause::Greeted => done(Self::Greeting),
            // A greeting with nothing to replay behind it.
            Cause::Replayed if self == Self::Greeting => done(Self::Greeting).and_then(|replay| replay.next(way)),
            Cause::Replayed => done(Self::Replay),
            Cause::HandoverFailed => self.is_handover(way).then_some(Self::Snoop),
            Cause::Quiet => done(Self::Commit),
            Cause::Announced => done(Self::Announce),
            Cause::ClientSecured => done(Self::SecureClient),
            Cause::Opened => done(Self::Gate),
        }
    }

    /// STARTTLS was said and the 220 was not: a failure here is a 454, and an octet of the client an attack.
    #[must_use]
    pub fn is_handover(self, way: Way) -> bool {
        let steps = Self::steps(way);
        let announced = steps.iter().position(|step| *step == Self::Announce).unwrap_or(0);
        steps[..announced].contains(&self)
    }

    /// The server behind TLS is on its way: what fails is a step of it, before the 220 or behind.
    #[must_use]
    pub fn is_reaching(self) -> bool {
        matches!(self, Self::Dial | Self::SecureBackend | Self::Start | Self::Tell | Self::Greeting | Self::Replay)
    }

    /// The client's TLS stands, and no relay has begun: what the client says is kept for the gate, and what we say is for it.
    #[must_use]
    pub fn is_inside(self, way: Way) -> bool {
        let steps = Self::steps(way);
        let begin = steps.iter().rposition(|step| matches!(step, Self::Announce | Self::SecureClient));
        steps[begin.map_or(0, |before| before + 1)..].contains(&self)
    }

    /// The name in the log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Snoop => "snoop",
            Self::Summon => "summon",
            Self::Brief => "brief",
            Self::Dial => "dial",
            Self::SecureBackend => "backend handshake",
            Self::Start => "start",
            Self::Tell => "PROXY header",
            Self::Greeting => "backend greeting",
            Self::Replay => "replay",
            Self::Commit => "commit",
            Self::Announce => "announce",
            Self::SecureClient => "client handshake",
            Self::Gate => "gate",
            Self::RelayPlain | Self::RelayTls => "relay",
            Self::Close => "close",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAUSES: [Cause; 17] = [
        Cause::Wanted,
        Cause::Summoned,
        Cause::Briefed,
        Cause::Cutoff,
        Cause::Starttls,
        Cause::Dialled,
        Cause::BackendSecured,
        Cause::Started,
        Cause::Told,
        Cause::Greeted,
        Cause::Replayed,
        Cause::HandoverFailed,
        Cause::Quiet,
        Cause::Announced,
        Cause::ClientSecured,
        Cause::Opened,
        Cause::Ended,
    ];

    /// The diagram above, arrow by arrow, but for the ones into `Close`, which start everywhere.
    const ARROWS: [(Phase, Cause, Phase); 20] = [
        (Phase::Snoop, Cause::Wanted, Phase::Summon),
        (Phase::Summon, Cause::Summoned, Phase::Brief),
        (Phase::Brief, Cause::Briefed, Phase::Snoop),
        (Phase::Snoop, Cause::Cutoff, Phase::RelayPlain),
        (Phase::Snoop, Cause::Starttls, Phase::Dial),
        (Phase::Dial, Cause::Dialled, Phase::SecureBackend),
        (Phase::SecureBackend, Cause::BackendSecured, Phase::Greeting),
        (Phase::Greeting, Cause::Greeted, Phase::Replay),
        (Phase::Greeting, Cause::Replayed, Phase::Commit),
        (Phase::Replay, Cause::Replayed, Phase::Commit),
        (Phase::Commit, Cause::Quiet, Phase::Announce),
        (Phase::Announce, Cause::Announced, Phase::SecureClient),
        (Phase::SecureClient, Cause::ClientSecured, Phase::Gate),
        (Phase::Gate, Cause::Opened, Phase::RelayTls),
        (Phase::Dial, Cause::HandoverFailed, Phase::Snoop),
        (Phase::SecureBackend, Cause::HandoverFailed, Phase::Snoop),
        (Phase::Greeting, Cause::HandoverFailed, Phase::Snoop),
        (Phase::Replay, Cause::HandoverFailed, Phase::Snoop),
        (Phase::Commit, Cause::HandoverFailed, Phase::Snoop),
        (Phase::Close, Cause::Ended, Phase::Close),
    ];

    #[test]
    fn the_transitions_are_the_diagram_and_nothing_else() {
        for phase in Phase::ALL {
            for cause in CAUSES {
                let drawn = ARROWS.iter().find(|(from, by, _)| (*from, *by) == (phase, cause)).map(|&(_, _, to)| to);
                let expected = if cause == Cause::Ended { Some(Phase::Close) } else { drawn };
                assert_eq!(phase.after(cause, Way::Tls), expected, "{phase:?} after {cause:?}");
            }
        }
    }

    type Arrow = (Phase, Cause, Option<Phase>);

    /// Those of the diagram's arrows that a way has otherwise; it has no others.
    const OTHERWISE: [(Way, &[Arrow]); 7] = [
        (
            Way::Plain,
            &[
                (Phase::Dial, Cause::Dialled, Some(Phase::Greeting)),
                (Phase::SecureBackend, Cause::BackendSecured, None),
                (Phase::SecureBackend, Cause::HandoverFailed, None),
            ],
        ),
        (
            Way::Keep,
            &[
                (Phase::Dial, Cause::Dialled, Some(Phase::Replay)),
                (Phase::SecureBackend, Cause::BackendSecured, None),
                (Phase::SecureBackend, Cause::HandoverFailed, None),
                (Phase::Greeting, Cause::Greeted, None),
                (Phase::Greeting, Cause::Replayed, None),
                (Phase::Greeting, Cause::HandoverFailed, None),
            ],
        ),
        (
            Way::Respawn,
            &[
                (Phase::Dial, Cause::Dialled, Some(Phase::Commit)),
                (Phase::SecureBackend, Cause::BackendSecured, None),
                (Phase::SecureBackend, Cause::HandoverFailed, None),
                (Phase::SecureClient, Cause::ClientSecured, Some(Phase::Start)),
                (Phase::Start, Cause::Started, Some(Phase::Greeting)),
                (Phase::Greeting, Cause::Replayed, Some(Phase::Gate)),
                (Phase::Greeting, Cause::HandoverFailed, None),
                (Phase::Replay, Cause::Replayed, Some(Phase::Gate)),
                (Phase::Replay, Cause::HandoverFailed, None),
            ],
        ),
        (
            Way::Raw,
            &[
                (Phase::Dial, Cause::Dialled, Some(Phase::Commit)),
                (Phase::SecureBackend, Cause::BackendSecured, None),
                (Phase::SecureBackend, Cause::HandoverFailed, None),
                (Phase::Greeting, Cause::Greeted, None),
                (Phase::Greeting, Cause::Replayed, None),
                (Phase::Greeting, Cause::HandoverFailed, None),
                (Phase::Replay, Cause::Replayed, None),
                (Phase::Replay, Cause::HandoverFailed, None),
                (Phase::Announce, Cause::Announced, Some(Phase::RelayTls)),
                (Phase::SecureClient, Cause::ClientSecured, None),
                (Phase::Gate, Cause::Opened, None),
            ],
        ),
        (
            Way::TlsLate,
            &[
                (Phase::Dial, Cause::Dialled, Some(Phase::Commit)),
                (Phase::SecureClient, Cause::ClientSecured, Some(Phase::Tell)),
                (Phase::Tell, Cause::Told, Some(Phase::SecureBackend)),
                (Phase::SecureBackend, Cause::HandoverFailed, None),
                (Phase::Greeting, Cause::Replayed, Some(Phase::Gate)),
                (Phase::Greeting, Cause::HandoverFailed, None),
                (Phase::Replay, Cause::Replayed, Some(Phase::Gate)),
                (Phase::Replay, Cause::HandoverFailed, None),
            ],
        ),
        (
            Way::PlainLate,
            &[
                (Phase::Dial, Cause::Dialled, Some(Phase::Commit)),
                (Phase::SecureClient, Cause::ClientSecured, Some(Phase::Tell)),
                (Phase::Tell, Cause::Told, Some(Phase::Greeting)),
                (Phase::SecureBackend, Cause::BackendSecured, None),
                (Phase::SecureBackend, Cause::HandoverFailed, None),
                (Phase::Greeting, Cause::Replayed, Some(Phase::Gate)),
                (Phase::Greeting, Cause::HandoverFailed, None),
                (Phase::Replay, Cause::Replayed, Some(Phase::Gate)),
                (Phase::Replay, Cause::HandoverFailed, None),
            ],
        ),
        (
            Way::Mute,
            &[
                (Phase::Snoop, Cause::Wanted, None),
                (Phase::Snoop, Cause::Cutoff, None),
                (Phase::Snoop, Cause::Starttls, None),
                (Phase::Dial, Cause::Dialled, None),
                (Phase::Dial, Cause::HandoverFailed, None),
                (Phase::SecureBackend, Cause::BackendSecured, None),
                (Phase::SecureBackend, Cause::HandoverFailed, None),
                (Phase::Greeting, Cause::Replayed, Some(Phase::Gate)),
                (Phase::Greeting, Cause::HandoverFailed, None),
                (Phase::Replay, Cause::Replayed, Some(Phase::Gate)),
                (Phase::Replay, Cause::HandoverFailed, None),
                (Phase::Commit, Cause::Quiet, None),
                (Phase::Commit, Cause::HandoverFailed, None),
                (Phase::Announce, Cause::Announced, None),
                (Phase::SecureClient, Cause::ClientSecured, None),
            ],
        ),
    ];

    #[test]
    fn the_other_ways_differ_from_the_diagram_where_they_say() {
        for (way, arrows) in OTHERWISE {
            for phase in Phase::ALL {
                for cause in CAUSES {
                    let otherwise = arrows.iter().find(|(from, by, _)| (*from, *by) == (phase, cause));
                    let expected = otherwise.map_or_else(|| phase.after(cause, Way::Tls), |&(_, _, to)| to);
                    assert_eq!(phase.after(cause, way), expected, "{way}: {phase:?} after {cause:?}");
                }
            }
        }
    }

    #[test]
    fn whose_tls_it_is_changes_no_step() {
        assert_eq!(Phase::steps(Way::UcspiTls), Phase::steps(Way::Keep));
        assert_eq!(Phase::steps(Way::UcspiRespawn), Phase::steps(Way::Respawn));
    }

    #[test]
    fn nothing_leads_back_to_plaintext_once_the_220_is_queued() {
        for way in Way::ALL {
            let mut reached = vec![Phase::Announce];
            while let Some(more) = reached
                .iter()
                .flat_map(|p| CAUSES.iter().filter_map(|c| p.after(*c, way)))
                .find(|p| !reached.contains(p))
            {
                reached.push(more);
            }
            assert!(!reached.contains(&Phase::Snoop) && !reached.contains(&Phase::RelayPlain), "{way}: {reached:?}");
            assert!(reached.contains(&Phase::RelayTls), "{way}: {reached:?}");
        }
    }
}
