//! What the administrator decided: immutable once a session has begun.

use core::time::Duration;

use crate::smtp::command::Verb;

use super::limits;
use super::way::Way;

/// What a session does with what it sees. Made by `cli`, read by the session, never changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether STARTTLS is offered: there is a certificate and a key that fit. Where it is false, STARTTLS gets a 454.
    pub offer_tls: bool,
    /// The secure option: without TLS no service.
    pub require_tls: bool,
    /// With `require_tls`: how many commands get a 530 before the 421.
    pub refusals: u32,
    /// How many commands may be answered 5yz, by us or by the server while we follow it, before the 421; `None`: any number.
    pub max_errors: Option<u32>,
    /// How many STARTTLS may be answered 454 before the 421; `None`: any number.
    pub max_starttls: Option<u32>,
    /// When snooping ends.
    pub cutoff: Cutoff,
    /// How the server behind TLS is reached.
    pub way: Way,
    /// What of the recorded dialogue the backend is told.
    pub replay: Replay,
    /// What it is told before that, each with the verb it begins with: commands that somebody else has recorded.
    pub told: Vec<(Verb, Vec<u8>)>,
    /// How long each wait may last.
    pub timeouts: Timeouts,
}

/// The "some point" by which STARTTLS must have come (protocol.md, Snoop 6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cutoff {
    /// Verbs that end the snooping.
    pub verbs: Vec<Verb>,
    /// After so many command lines the next one ends it.
    pub commands: Option<u32>,
    /// After so long the next line ends it.
    pub after: Option<Duration>,
}

impl Default for Cutoff {
    fn default() -> Self {
        Self { verbs: Verb::default_cutoffs().collect(), commands: None, after: None }
    }
}

/// What of the recorded dialogue the backend is told before the client speaks to it (protocol.md, STARTTLS 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Replay {
    /// The last EHLO or HELO, as a probe: RFC 3207 4.2 has the server forget what it knew.
    #[default]
    Hello,
    /// Every recorded command.
    All,
    /// Nothing: the greeting alone is awaited.
    None,
}

/// How opaque octets move between client and child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RelayMode {
    /// In the kernel, from socket to pipe and from pipe to socket.
    #[default]
    Splice,
    /// By read and write, for comparison.
    Copy,
}

/// How long each wait may last. Defaults are protocol.md's, Time-outs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Between two commands (RFC 5321 4.5.3.2.7: at least five minutes).
    pub snoop: Duration,
    /// All of the snooping together, so that a client that dribbles ends too.
    pub snoop_total: Duration,
    /// Until the backend's TCP connection stands, all its addresses together; or PROG is started, where it is when it is needed.
    pub dial: Duration,
    /// The TLS handshake with the backend.
    pub backend_handshake: Duration,
    /// The backend's greeting; or PROG's, and its reply to the hello, where it is started when it is needed.
    pub greeting: Duration,
    /// The replay, all of it.
    pub replay: Duration,
    /// The TLS handshake with the client (CVE-2011-1947: never without a limit).
    pub handshake: Duration,
    /// Silence in both directions once bytes are relayed (qmail-smtpd's own limit, 1200 s).
    pub relay: Duration,
    /// What a dismissed child gets before SIGTERM, and again before SIGKILL.
    pub farewell: Duration,
}

impl Timeouts {
    /// The same where places are scarce: no wait for the client is longer than [`limits`] says. What a server is waited
    /// for stays, or its slowness would be the client's loss.
    #[must_use]
    pub fn under_stress(self) -> Self {
        Self {
            snoop: self.snoop.min(limits::STRESSED_SNOOP),
            snoop_total: self.snoop_total.min(limits::STRESSED_SNOOP_TOTAL),
            handshake: self.handshake.min(limits::STRESSED_HANDSHAKE),
            relay: self.relay.min(limits::STRESSED_RELAY),
            ..self
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            snoop: seconds(300),
            snoop_total: seconds(600),
            dial: seconds(10),
            backend_handshake: seconds(10),
            greeting: seconds(30),
            replay: seconds(30),
            handshake: seconds(30),
            relay: seconds(1200),
            farewell: seconds(5),
        }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            offer_tls: true,
            require_tls: false,
            refusals: 1,
            max_errors: None,
            max_starttls: None,
            cutoff: Cutoff::default(),
            way: Way::default(),
            replay: Replay::default(),
            told: Vec::new(),
            timeouts: Timeouts::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stress_shortens_what_a_client_is_waited_for_and_never_lengthens_it() {
        let (usual, stressed) = (Timeouts::default(), Timeouts::default().under_stress());
        assert_eq!((stressed.snoop, stressed.handshake), (limits::STRESSED_SNOOP, limits::STRESSED_HANDSHAKE));
        assert_eq!((stressed.snoop_total, stressed.relay), (limits::STRESSED_SNOOP_TOTAL, limits::STRESSED_RELAY));
        let servers =
            |times: Timeouts| (times.dial, times.backend_handshake, times.greeting, times.replay, times.farewell);
        assert_eq!(servers(stressed), servers(usual));
        let second = Duration::from_secs(1);
        let short = Timeouts { snoop: second, snoop_total: second, handshake: second, relay: second, ..usual };
        assert_eq!(short.under_stress(), short);
    }
}
