//! What a certificate says of itself, and whether strangers would believe it: for whoever looks at a set-up, never in a session.
//!
//! Contract: all of it is webpki's own verdict, told by the context of its refusals, so that what is said here is what the handshake
//! will hold. Rejected: a parser of X.509 as a dependency, which would read the same octets by other rules.

use rustls::CertificateError as C;
use rustls::RootCertStore;
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::error::TlsError;
use super::identity::check_dates;
use super::provider::provider;
use super::roots::Roots;

/// Years 1970 and 10000, in seconds: before and behind all that a certificate can say (RFC 5280 4.1.2.5).
const FIRST: u64 = 0;
const LAST: u64 = 253_402_300_800;

/// From when to when it is valid, in seconds since 1970. Errors: [`TlsError::Untrusted`] for what is no certificate.
pub fn validity(certificate: &CertificateDer<'_>) -> Result<RangeInclusive<u64>, TlsError> {
    let verdict = |at: u64| match check_dates(certificate, UnixTime::since_unix_epoch(Duration::from_secs(at))) {
        Err(rustls::Error::InvalidCertificate(reason)) => Some(reason),
        Ok(()) | Err(_) => None,
    };
    let begin = match verdict(FIRST) {
        None => FIRST,
        Some(C::NotValidYetContext { not_before, .. }) => not_before.as_secs(),
        Some(reason) => return Err(TlsError::Untrusted(reason)),
    };
    match verdict(LAST) {
        Some(C::ExpiredContext { not_after, .. }) => Ok(begin..=not_after.as_secs()),
        None => Ok(begin..=LAST),
        Some(reason) => Err(TlsError::Untrusted(reason)),
    }
}

/// The names that it bears, DNS names and addresses. Whoever made it chose them: escape them.
#[must_use]
pub fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    // Nobody bears this one (RFC 6761 6.4).
    let nobody = ServerName::try_from("nobody.invalid");
    let (Ok(parsed), Ok(nobody)) = (ParsedCertificate::try_from(certificate), nobody) else { return Vec::new() };
    match verify_server_name(&parsed, &nobody) {
        Err(rustls::Error::InvalidCertificate(C::NotValidForNameContext { presented, .. })) => {
            presented.into_iter().map(bare).collect()
        }
        _ => Vec::new(),
    }
}

/// `mx.example` of `DnsName("mx.example")`, `192.0.2.1` of `IpAddress(192.0.2.1)`; what looks otherwise stays as it is.
fn bare(presented: String) -> String {
    let dns = presented.strip_prefix("DnsName(\"").and_then(|rest| rest.strip_suffix("\")"));
    let address = presented.strip_prefix("IpAddress(").and_then(|rest| rest.strip_suffix(")"));
    dns.or(address).map_or_else(|| presented.clone(), str::to_owned)
}

/// Whether it bears this name.
#[must_use]
pub fn bears_name(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    ParsedCertificate::try_from(certificate).is_ok_and(|parsed| verify_server_name(&parsed, name).is_ok())
}

/// Whether a chain, leaf first, leads to one of these roots, who may be read for it. Errors: [`TlsError::Untrusted`], and
/// [`TlsError::Setup`] where there are none.
pub fn check_chain(chain: &[CertificateDer<'_>], roots: &Roots, now: UnixTime) -> Result<(), TlsError> {
    let store = roots.read().store;
    if store.is_empty() {
        return Err(TlsError::Setup(rustls::Error::General("there are no roots on this system".to_owned())));
    }
    leads_to(chain, &store, now)
}

fn leads_to(chain: &[CertificateDer<'_>], store: &RootCertStore, now: UnixTime) -> Result<(), TlsError> {
    let refused = |error| match error {
        rustls::Error::InvalidCertificate(reason) => TlsError::Untrusted(reason),
        other => TlsError::Setup(other),
    };
    let (leaf, others) = chain.split_first().ok_or(TlsError::Untrusted(C::BadEncoding))?;
    let parsed = ParsedCertificate::try_from(leaf).map_err(refused)?;
    let algorithms = provider().signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&parsed, store, others, now, algorithms).map_err(refused)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, Issuer, KeyPair, date_time_ymd};

    fn request(names: &[&str]) -> CertificateParams {
        let mut request = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        (request.not_before, request.not_after) = (date_time_ymd(2026, 1, 2), date_time_ymd(2040, 3, 4));
        request
    }

    fn made(request: &CertificateParams) -> CertificateDer<'static> {
        request.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn dates_are_the_certificates_own_whatever_else_it_is() {
        let mut authority = request(&["mx.example"]);
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        for certificate in [made(&request(&["mx.example"])), made(&authority)] {
            // 2026-01-02 and 2040-03-04.
            assert_eq!(validity(&certificate).unwrap(), 1_767_312_000..=2_214_432_000);
        }
        assert!(validity(&CertificateDer::from(b"no DER".to_vec())).is_err());
    }

    #[test]
    fn names_are_shown_bare() {
        let certificate = made(&request(&["mx.example", "*.mx.example", "192.0.2.1", "2001:db8::1"]));
        assert_eq!(names(&certificate), ["mx.example", "*.mx.example", "192.0.2.1", "2001:db8::1"]);
        assert_eq!(names(&made(&request(&[]))), [""; 0]);
        assert_eq!(names(&CertificateDer::from(b"no DER".to_vec())), [""; 0]);
    }

    #[test]
    fn a_name_is_borne_or_not() {
        let certificate = made(&request(&["mx.example", "192.0.2.1"]));
        let bears = |name: &str| bears_name(&certificate, &ServerName::try_from(name).unwrap());
        assert!(bears("mx.example") && bears("MX.example") && bears("192.0.2.1"));
        assert!(!bears("mx2.example") && !bears("192.0.2.2"));
    }

    #[test]
    fn a_chain_leads_to_a_root_or_lacks_a_link() {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(1_893_456_000));
        let authority = |issuer: Option<&Issuer<'_, KeyPair>>, name: &str| {
            let mut request = request(&[]);
            request.distinguished_name.push(rcgen::DnType::CommonName, name);
            request.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            match issuer {
                None => CertifiedIssuer::self_signed(request, key).unwrap(),
                Some(issuer) => CertifiedIssuer::signed_by(request, key, issuer).unwrap(),
            }
        };
        let root = authority(None, "root");
        let between = authority(Some(&root), "between");
        let leaf = request(&["mx.example"]).signed_by(&KeyPair::generate().unwrap(), &between).unwrap();
        let mut store = RootCertStore::empty();
        store.add(root.der().clone()).unwrap();
        let (leaf, between) = (leaf.der().clone(), between.der().clone());
        assert!(leads_to(&[leaf.clone(), between.clone()], &store, now).is_ok());
        assert!(matches!(
            leads_to(std::slice::from_ref(&leaf), &store, now),
            Err(TlsError::Untrusted(C::UnknownIssuer))
        ));
        let later = UnixTime::since_unix_epoch(Duration::from_secs(2_300_000_000));
        assert!(leads_to(&[leaf.clone(), between], &store, later).is_err());
        assert!(leads_to(&[], &store, now).is_err());
        assert!(matches!(check_chain(&[leaf], &Roots::default(), now), Err(TlsError::Setup(_))));
    }
}
