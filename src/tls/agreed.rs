//! What a handshake came to, to be counted: each figure is a place in a short list of names, whose last stands for all others.

use rustls::{CipherSuite, HandshakeKind, NamedGroup, ProtocolVersion};

use super::leg::Leg;

/// Versions.
pub const VERSIONS: [&str; 3] = ["TLSv1.2", "TLSv1.3", "other"];

/// Cipher suites, by their IANA names: all that the provider has.
pub const SUITES: [&str; 10] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
    "other",
];

/// Key exchange groups: all that the provider has.
pub const GROUPS: [&str; 5] = ["X25519MLKEM768", "X25519", "secp256r1", "secp384r1", "other"];

/// Whether it was a whole handshake, one with a HelloRetryRequest, or the resumption of an earlier one.
pub const KINDS: [&str; 3] = ["full", "hello_retry", "resumed"];

/// Places in the lists above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// In [`VERSIONS`].
    pub version: usize,
    /// In [`SUITES`].
    pub suite: usize,
    /// In [`GROUPS`]; `None`: no key was exchanged.
    pub group: Option<usize>,
    /// In [`KINDS`].
    pub kind: usize,
}

impl Leg {
    /// What was negotiated, once it is. Unlike [`Leg::facts`] it costs nothing.
    pub fn agreed(&self) -> Agreed {
        let common = self.common();
        Agreed {
            version: match common.protocol_version() {
                Some(ProtocolVersion::TLSv1_2) => 0,
                Some(ProtocolVersion::TLSv1_3) => 1,
                _ => VERSIONS.len() - 1,
            },
            suite: common.negotiated_cipher_suite().map_or(SUITES.len() - 1, |chosen| suite(chosen.suite())),
            group: common.negotiated_key_exchange_group().map(|chosen| group(chosen.name())),
            kind: match common.handshake_kind() {
                Some(HandshakeKind::FullWithHelloRetryRequest) => 1,
                Some(HandshakeKind::Resumed) => 2,
                Some(HandshakeKind::Full) | None => 0,
            },
        }
    }
}

fn suite(suite: CipherSuite) -> usize {
    match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => 0,
        CipherSuite::TLS13_AES_256_GCM_SHA384 => 1,
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => 2,
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 => 3,
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 => 4,
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 => 5,
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => 6,
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => 7,
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => 8,
        _ => SUITES.len() - 1,
    }
}

fn group(group: NamedGroup) -> usize {
    match group {
        NamedGroup::X25519MLKEM768 => 0,
        NamedGroup::X25519 => 1,
        NamedGroup::secp256r1 => 2,
        NamedGroup::secp384r1 => 3,
        _ => GROUPS.len() - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::provider::provider;

    #[test]
    fn every_suite_and_group_of_the_provider_is_listed_by_its_name_in_the_log() {
        let mut seen = Vec::new();
        for chosen in provider().cipher_suites.iter().map(rustls::SupportedCipherSuite::suite) {
            assert_eq!(SUITES[suite(chosen)], format!("{chosen:?}").replacen("TLS13_", "TLS_", 1));
            seen.push(suite(chosen));
        }
        assert_eq!(seen.len(), SUITES.len() - 1, "{seen:?}");
        let groups: Vec<_> = provider().kx_groups.iter().map(|group| group.name()).collect();
        assert_eq!(groups.len(), GROUPS.len() - 1, "{groups:?}");
        for chosen in groups {
            assert_eq!(GROUPS[group(chosen)], format!("{chosen:?}"));
        }
    }
}
