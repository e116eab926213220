//! Why a TLS leg failed, or could not be set up: reasons for the log, grouped by who is to blame.

use rustls::{AlertDescription, CertificateError, InvalidMessage, OtherError, PeerIncompatible};
use std::fmt;

use super::buffer::HANDSHAKE_CAP;

/// Why a leg failed. `Display` is one phrase for the log, without a full stop. Text that a peer could choose (names in its
/// certificate) is inside: escape it before it is logged.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TlsError {
    /// The first bytes were no TLS record at all: a plaintext SMTP server, or a client that went on in the clear.
    NotTls(rustls::Error),
    /// The peer ended the connection with this fatal alert.
    PeerAlert(AlertDescription),
    /// The peer's certificate was refused by our [`super::Trust`].
    Untrusted(CertificateError),
    /// The client offered application protocols, and neither `smtp` nor `esmtp` among them.
    NoProtocolOverlap,
    /// The peer has neither TLS 1.2 nor TLS 1.3.
    Version(PeerIncompatible),
    /// No cipher suite, group or signature scheme in common, or a needed extension is missing.
    Incompatible(PeerIncompatible),
    /// A record did not decrypt: damaged, replayed or reordered on the way.
    BadRecord,
    /// Anything else that the peer did against the protocol.
    Protocol(rustls::Error),
    /// The peer made us hold a whole buffer of one unfinished handshake message (RFC 8446 4 allows 64 KiB, we hold as much).
    /// No alert is sent for it.
    HandshakeTooLarge,
    /// The TLS 1.2 keys have encrypted as much as they safely can. TLS 1.3 legs renew theirs and never come here.
    KeysExhausted,
    /// A panic inside rustls or inside the caller's sink, with its message. A bug; the leg is dead, nothing is sent.
    Panicked(String),
    /// rustls was in a state that its documentation excludes here. A bug.
    Unexpected(&'static str),
    /// rustls could not do its own part: no random octets, no time, no signature.
    Engine(rustls::Error),
    /// The caller sends before the handshake allows it. The leg itself goes on.
    NotReady,
    /// The caller sends after its own `send_close`. The leg itself goes on.
    AfterClose,
    /// A configuration that rustls refuses. Only from the functions that set up.
    Setup(rustls::Error),
    /// A name that is neither a DNS name nor an IP address. Only from [`super::server_name`].
    Name(String),
}

impl TlsError {
    /// Sorts an error of rustls. `started`: the peer has already shown that it speaks TLS.
    pub(super) fn from_rustls(error: rustls::Error, started: bool) -> Self {
        use rustls::Error as E;
        match error {
            E::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion)
                if !started =>
            {
                Self::NotTls(error)
            }
            E::AlertReceived(alert) => Self::PeerAlert(alert),
            E::InvalidCertificate(reason) => Self::Untrusted(reason),
            E::NoApplicationProtocol => Self::NoProtocolOverlap,
            E::DecryptError => Self::BadRecord,
            E::PeerIncompatible(
                reason @ (PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled),
            ) => Self::Version(reason),
            E::PeerIncompatible(reason) => Self::Incompatible(reason),
            E::FailedToGetRandomBytes | E::FailedToGetCurrentTime | E::EncryptError | E::General(_) => {
                Self::Engine(error)
            }
            other => Self::Protocol(other),
        }
    }
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotTls(error) => write!(f, "the peer does not speak TLS ({error})"),
            Self::PeerAlert(alert) => write!(f, "the peer sent the alert {alert:?}"),
            Self::Untrusted(CertificateError::Other(OtherError(reason))) => {
                write!(f, "certificate not trusted: {reason}")
            }
            Self::Untrusted(reason) => write!(f, "certificate not trusted: {reason}"),
            Self::NoProtocolOverlap => f.write_str("the peer wants another protocol than SMTP (ALPN)"),
            Self::Version(reason) => write!(f, "neither TLS 1.2 nor 1.3 in common ({reason:?})"),
            Self::Incompatible(reason) => {
                write!(f, "nothing in common to encrypt with ({reason:?})")
            }
            Self::BadRecord => f.write_str("a record does not decrypt"),
            Self::Protocol(error) => write!(f, "protocol violation: {error}"),
            Self::HandshakeTooLarge => {
                write!(f, "an unfinished handshake message filled the buffer (at least {HANDSHAKE_CAP} octets)")
            }
            Self::KeysExhausted => f.write_str("the TLS 1.2 keys are used up"),
            Self::Panicked(message) => write!(f, "bug: the TLS engine panicked: {message}"),
            Self::Unexpected(state) => {
                write!(f, "bug: unexpected state of the TLS engine: {state}")
            }
            Self::Engine(error) => write!(f, "the TLS engine failed: {error}"),
            Self::NotReady => f.write_str("the handshake is not far enough to send data"),
            Self::AfterClose => f.write_str("data sent after our close_notify"),
            Self::Setup(error) => write!(f, "TLS configuration: {error}"),
            Self::Name(name) => write!(f, "{name:?} is neither a DNS name nor an IP address"),
        }
    }
}

impl std::error::Error for TlsError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_engine_could_not_do_is_not_the_peers_fault() {
        let ours = [
            rustls::Error::FailedToGetRandomBytes,
            rustls::Error::FailedToGetCurrentTime,
            rustls::Error::EncryptError,
            rustls::Error::General("signing failed".to_owned()),
        ];
        for error in ours {
            assert!(matches!(TlsError::from_rustls(error, true), TlsError::Engine(_)));
        }
        assert!(matches!(TlsError::from_rustls(rustls::Error::DecryptError, true), TlsError::BadRecord));
        assert!(matches!(TlsError::from_rustls(rustls::Error::BadMaxFragmentSize, true), TlsError::Protocol(_)));
    }
}
