//! Whether a backend's certificate is believed: protocol.md STARTTLS 8, in that order.
//!
//! Contract: a certificate passes if it is our own leaf (name and dates do not matter then), or if it bears the demanded name and
//! is signed by, or is itself one of, the roots given; without any given, if the system's roots sign it. In every case, `insecure`
//! included, the handshake's signature proves that the peer holds the certificate's key. No revocation.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, OtherError, SignatureScheme};
use std::fmt;
use std::sync::{Arc, OnceLock};

use super::identity::check_dates;
use super::roots::{ReadRoots, Roots};

/// Whom we believe to be the backend.
#[derive(Clone, Debug)]
pub struct Trust {
    /// Our own leaf: a backend that shows exactly this one is believed, provided it signs with its key.
    pub own_leaf: Option<CertificateDer<'static>>,
    /// Who else may vouch for it.
    pub roots: Roots,
    /// The name that its certificate must bear then.
    pub name: ServerName<'static>,
    /// Believe every certificate. The caller sees to it that the address is a loopback one.
    pub insecure: bool,
}

/// Applies a [`Trust`] for rustls.
pub(super) struct Verifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
    loaded: OnceLock<ReadRoots>,
}

impl Verifier {
    pub(super) fn new(trust: Trust, provider: Arc<CryptoProvider>) -> Self {
        Self { trust, provider, loaded: OnceLock::new() }
    }

    fn check_against_roots(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let loaded = self.loaded.get_or_init(|| self.trust.roots.read());
        if loaded.store.is_empty() && loaded.listed.is_empty() {
            return Err(other(NoRoots(loaded.trouble.clone())));
        }
        let parsed = ParsedCertificate::try_from(leaf)?;
        if loaded.listed.iter().any(|listed| listed == leaf) {
            check_dates(leaf, now)?;
        } else {
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&parsed, &loaded.store, intermediates, now, algorithms)?;
        }
        verify_server_name(&parsed, &self.trust.name)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _asked_for: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let is_our_own = self.trust.own_leaf.as_ref().is_some_and(|own| own == end_entity);
        if !is_our_own && !self.trust.insecure {
            self.check_against_roots(end_entity, intermediates, now)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("trust", &self.trust).finish_non_exhaustive()
    }
}

/// There is nobody to vouch for a certificate that is not our own; with the reason if one is known.
#[derive(Debug)]
struct NoRoots(Option<String>);

impl fmt::Display for NoRoots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is not our own, and there are no roots to check it against")?;
        match &self.0 {
            Some(reason) => write!(f, " ({reason})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for NoRoots {}

fn other(error: NoRoots) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::identity::Identity;
    use super::super::provider::{provider, server_name};
    use super::*;

    #[test]
    fn our_own_leaf_never_costs_the_reading_of_roots() {
        let own = Identity::self_signed("mx.example").unwrap();
        let stranger = Identity::self_signed("mx.example").unwrap();
        let name = server_name("mx.example").unwrap();
        let own_leaf = Some(own.leaf().clone());
        let trust = Trust { own_leaf, roots: Roots::system(|_| None), name: name.clone(), insecure: false };
        let verifier = Verifier::new(trust, provider().clone());
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1_893_456_000));
        let verdict = |leaf: &Identity| verifier.verify_server_cert(leaf.leaf(), &[], &name, &[], now);
        assert!(verdict(&own).is_ok());
        assert!(verifier.loaded.get().is_none());
        assert!(verdict(&stranger).is_err());
        assert!(verifier.loaded.get().is_some());
    }
}
