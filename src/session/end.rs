//! Why a session ended, grouped by who is to blame; one total match each for what the client hears and for the exit code.

use core::fmt;

use crate::error::exit;
use crate::smtp::reply::Ours;

use super::phase::Phase;
use super::way::Way;

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// Said and done: QUIT and its reply, or both sides closed.
    Over,
    /// SIGTERM.
    Terminated,
    /// The client's doing.
    Client(ClientEnd),
    /// The child's doing.
    Child(ChildEnd),
    /// The backend's doing, after the 220.
    Backend(BackendEnd),
    /// A step towards the server behind TLS failed, after the 220.
    Handover(HandoverFailure),
    /// The administrator's rules.
    Policy(PolicyEnd),
    /// A wait was too long: what was being done.
    Timeout(Phase),
    /// The TLS handshake with the client failed: why.
    Handshake(String),
    /// The UCSPI-TLS server did not come to the end of the handshake, by its own fault or the client's.
    TlsServer(HandoverFailure),
    /// TLS with the client failed after the handshake: why.
    Tls(String),
    /// The TLS engine could not do its work: why.
    Engine(String),
    /// A system call failed.
    System(String),
    /// A bug of ours: the transition that is not in the diagram.
    Bug(String),
}

/// How a client ended a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientEnd {
    /// Closed without QUIT.
    Gone,
    /// Reset, or closed inside TLS without close_notify.
    BrokeOff,
    /// Sent something behind STARTTLS.
    BytesAfterStarttls,
    /// Sent too many bad lines.
    BadLines,
    /// Got more 5yz than `--max-errors`.
    Errors,
    /// Said STARTTLS again after `--max-starttls` of them had failed.
    Starttls,
    /// Spoke another protocol.
    NotSmtp,
}

/// How a child ended a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildEnd {
    /// Could not be started: why.
    NotStarted(String),
    /// Is not what it was when others learned to answer for it: how.
    Differs(String),
    /// Reset its connection in a relay.
    BrokeOff,
    /// Closed without a word, or with a word that announced no end.
    Gone,
    /// Closed inside a reply.
    InsideReply,
    /// Spoke no SMTP where TLS is required, so that it can't be served.
    NotSmtp,
    /// Was killed by this signal while relaying.
    Killed(i32),
    /// Gave no whole answer to the RSET by which it was to be kept: what it says next answers nobody knows what.
    LostStep,
}

/// How a backend ended a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendEnd {
    /// Closed without close_notify: what it said last may be cut.
    Truncated,
    /// Closed before the client's EHLO was sent.
    Gone,
    /// Spoke unasked before the client's EHLO.
    Unasked,
    /// Reset its connection.
    BrokeOff,
    /// Its TLS failed: why.
    Tls(String),
}

/// Which rule ended a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyEnd {
    /// `--require-tls` and no TLS.
    TlsRequired,
    /// `--require-tls` and no usable certificate.
    NoCertificate,
}

impl EndReason {
    /// What the client hears, where the dialogue still allows it.
    #[must_use]
    pub fn farewell(&self) -> Option<Ours> {
        match self {
            Self::Terminated => Some(Ours::SHUTTING_DOWN),
            Self::Client(ClientEnd::BytesAfterStarttls) => Some(Ours::BYTES_AFTER_STARTTLS),
            Self::Client(ClientEnd::BadLines) => Some(Ours::TOO_MANY_BAD_LINES),
            Self::Client(ClientEnd::Errors) => Some(Ours::TOO_MANY_ERRORS),
            Self::Client(ClientEnd::Starttls) => Some(Ours::TOO_MANY_STARTTLS),
            Self::Client(ClientEnd::NotSmtp) => Some(Ours::NOT_SMTP),
            Self::Child(
                ChildEnd::NotStarted(_)
                | ChildEnd::Differs(_)
                | ChildEnd::Gone
                | ChildEnd::NotSmtp
                | ChildEnd::LostStep,
            )
            | Self::System(_) => Some(Ours::NOT_AVAILABLE),
            Self::Backend(BackendEnd::Gone | BackendEnd::Unasked | BackendEnd::Tls(_)) | Self::Handover(_) => {
                Some(Ours::NOT_AVAILABLE)
            }
            Self::Policy(PolicyEnd::TlsRequired) => Some(Ours::TLS_REQUIRED),
            Self::Policy(PolicyEnd::NoCertificate) => Some(Ours::NOT_AVAILABLE),
            Self::Timeout(_) => Some(Ours::TIMEOUT),
            Self::Over
            | Self::Client(ClientEnd::Gone | ClientEnd::BrokeOff)
            | Self::Child(ChildEnd::InsideReply | ChildEnd::BrokeOff | ChildEnd::Killed(_))
            | Self::Backend(BackendEnd::Truncated | BackendEnd::BrokeOff)
            | Self::Handshake(_)
            | Self::TlsServer(_)
            | Self::Tls(_)
            | Self::Engine(_)
            | Self::Bug(_) => None,
        }
    }

    /// What the supervisor is told (protocol.md, Signals and exits).
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Over | Self::Terminated => exit::OVER,
            Self::Client(_) | Self::Policy(PolicyEnd::TlsRequired) | Self::Tls(_) => exit::CLIENT,
            Self::Policy(PolicyEnd::NoCertificate) => exit::TLS_CONFIGURATION,
            Self::Engine(_) => exit::TLS_ENGINE,
            Self::Handshake(_) | Self::TlsServer(_) => exit::HANDSHAKE,
            Self::Timeout(_) => exit::TIMEOUT,
            Self::Bug(_) => exit::BUG,
            Self::Child(_) | Self::Backend(_) | Self::Handover(_) | Self::System(_) => exit::SYSTEM,
        }
    }

    /// Whether the operator should see it without asking: somebody's fault that he may want to mend or block.
    #[must_use]
    pub fn is_warning(&self) -> bool {
        match self {
            // HOST ends a stranger's silence so, too.
            Self::Handover(HandoverFailure { way: Way::Raw, step: Phase::RelayTls, .. }) => false,
            Self::Client(ClientEnd::BytesAfterStarttls)
            | Self::Child(_)
            | Self::Backend(_)
            | Self::Handover(_)
            | Self::Policy(PolicyEnd::NoCertificate)
            | Self::Engine(_)
            | Self::System(_)
            | Self::Bug(_) => true,
            Self::Over
            | Self::Terminated
            | Self::Client(
                ClientEnd::Gone
                | ClientEnd::BrokeOff
                | ClientEnd::BadLines
                | ClientEnd::Errors
                | ClientEnd::Starttls
                | ClientEnd::NotSmtp,
            )
            | Self::Policy(PolicyEnd::TlsRequired)
            | Self::Timeout(_)
            | Self::Handshake(_)
            // Strangers bring it about at will; where it is the server's own fault that server has a log.
            | Self::TlsServer(_)
            | Self::Tls(_) => false,
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Over => f.write_str("over"),
            Self::Terminated => f.write_str("terminated"),
            Self::Client(ClientEnd::Gone) => f.write_str("client closed"),
            Self::Client(ClientEnd::BrokeOff) => f.write_str("client broke off"),
            Self::Client(ClientEnd::BytesAfterStarttls) => f.write_str("client sent bytes after STARTTLS"),
            Self::Client(ClientEnd::BadLines) => f.write_str("client sent too many bad lines"),
            Self::Client(ClientEnd::Errors) => f.write_str("client made too many errors"),
            Self::Client(ClientEnd::Starttls) => f.write_str("client asked again for TLS that had failed too often"),
            Self::Client(ClientEnd::NotSmtp) => f.write_str("client spoke no SMTP"),
            Self::Child(ChildEnd::NotStarted(why)) => write!(f, "child not started: {why}"),
            Self::Child(ChildEnd::Differs(how)) => write!(f, "child is not what was learned of it: {how}"),
            Self::Child(ChildEnd::BrokeOff) => f.write_str("child broke off"),
            Self::Child(ChildEnd::Gone) => f.write_str("child closed"),
            Self::Child(ChildEnd::InsideReply) => f.write_str("child closed inside a reply"),
            Self::Child(ChildEnd::NotSmtp) => f.write_str("child spoke no SMTP"),
            Self::Child(ChildEnd::LostStep) => f.write_str("child gave no whole answer to RSET"),
            Self::Child(ChildEnd::Killed(signal)) => write!(f, "child killed by signal {signal}"),
            Self::Backend(BackendEnd::Truncated) => f.write_str("backend closed without close_notify"),
            Self::Backend(BackendEnd::Gone) => f.write_str("backend closed"),
            Self::Backend(BackendEnd::Unasked) => f.write_str("backend spoke unasked"),
            Self::Backend(BackendEnd::BrokeOff) => f.write_str("backend broke off"),
            Self::Backend(BackendEnd::Tls(why)) => write!(f, "TLS with the backend failed: {why}"),
            Self::Handover(failure) | Self::TlsServer(failure) => failure.fmt(f),
            Self::Policy(PolicyEnd::TlsRequired) => f.write_str("TLS required"),
            Self::Policy(PolicyEnd::NoCertificate) => f.write_str("TLS required, no usable certificate"),
            Self::Timeout(phase) => write!(f, "time-out ({})", phase.name()),
            Self::Handshake(why) => write!(f, "handshake failed: {why}"),
            Self::Tls(why) => write!(f, "TLS with the client failed: {why}"),
            Self::Engine(why) => write!(f, "TLS engine failed: {why}"),
            Self::System(why) => write!(f, "system: {why}"),
            Self::Bug(why) => write!(f, "bug: {why}"),
        }
    }
}

/// Which step of a hand-over failed, so that the client got a 454, or behind the 220 a 421.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandoverFailure {
    /// The way.
    pub way: Way,
    /// The step.
    pub step: Phase,
    /// Why, in words for the log; remote octets in it are escaped already.
    pub why: String,
}

impl fmt::Display for HandoverFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "way {}, {} failed: {}", self.way, self.step.name(), self.why)
    }
}
