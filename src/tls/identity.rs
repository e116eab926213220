//! Our own certificate and key.
//!
//! Contract: [`Identity::from_pem`] runs at the start of every connection and finds what can be wrong with the files in 20 us
//! (P-256) to 35 us (RSA-2048). Loading the key for signing costs 90 to 300 us more and is left to [`super::server_setup`], which
//! is needed only when STARTTLS has come. That key and certificate belong together is seen from the public key, whose octets
//! nearly every key file repeats; where it does not (an EC key without its public half, Ed25519), the key is loaded at once.

use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer, UnixTime,
};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{InconsistentKeys, RootCertStore};
use std::fmt;
use std::mem;
use std::sync::Arc;
use zeroize::Zeroizing;

use super::pem;
use super::provider::start_cryptography;

/// Our certificate chain, leaf first, and its key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<PrivateKeyDer<'static>>,
}

impl Identity {
    /// Reads a certificate chain (leaf first) and a private key from PEM text; both may be the same text, other sections are skipped.
    ///
    /// `now` is what the leaf's dates are held against. The DER of the key is wiped when the identity is dropped; wiping both texts
    /// is the caller's part. Errors: each variant of [`IdentityError`] but `Name`.
    pub fn from_pem(cert_pem: &[u8], key_pem: &[u8], now: UnixTime) -> Result<Self, IdentityError> {
        let chain = certificates(cert_pem)?;
        let leaf = chain.first().ok_or(IdentityError::NoCertificate)?;
        check_dates(leaf, now).map_err(IdentityError::from_leaf)?;
        let key = private_key(key_pem)?;
        let parsed = ParsedCertificate::try_from(leaf).map_err(IdentityError::Certificate)?;
        let spki = parsed.subject_public_key_info();
        let same_key = public_key_octets(&spki).is_some_and(|public| contains(key.secret_der(), public));
        let identity = Self { chain, key };
        if !same_key {
            identity.certified_key().map_err(IdentityError::from_key)?;
        }
        Ok(identity)
    }

    /// Makes a throw-away certificate for a DNS name or an IP address, with a new P-256 key, in memory.
    /// Errors: [`IdentityError::Name`] if no certificate can bear the name.
    pub fn self_signed(name: &str) -> Result<Self, IdentityError> {
        let refused = |error: rcgen::Error| IdentityError::Name(format!("{name:?}: {error}"));
        if super::provider::server_name(name).is_err() {
            return Err(IdentityError::Name(format!("{name:?}: neither a DNS name nor an IP address")));
        }
        let mut request = rcgen::CertificateParams::new([name.to_owned()]).map_err(refused)?;
        start_cryptography();
        request.distinguished_name = rcgen::DistinguishedName::new();
        request.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().map_err(refused)?;
        let certificate = request.self_signed(&key).map_err(refused)?;
        Ok(Self {
            chain: vec![certificate.der().clone()],
            key: Zeroizing::new(PrivatePkcs8KeyDer::from(key.serialize_der()).into()),
        })
    }

    /// Our leaf certificate, for [`super::Trust::own_leaf`].
    pub fn leaf(&self) -> &CertificateDer<'static> {
        &self.chain[0]
    }

    /// Loads the key for signing and compares it with the leaf.
    pub(super) fn certified_key(&self) -> Result<Arc<CertifiedKey>, rustls::Error> {
        start_cryptography();
        // By reference: a copy of the key would not be wiped.
        let certified = CertifiedKey::new(self.chain.clone(), any_supported_type(&self.key)?);
        match certified.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(Arc::new(certified)),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("certificates", &self.chain.len()).finish_non_exhaustive()
    }
}

/// Why a certificate and a key cannot be our identity. `Display` is one phrase for the log; nothing of the key is in it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum IdentityError {
    /// The certificate text is damaged PEM; says how.
    CertificatePem(&'static str),
    /// The certificate text has no certificate in it.
    NoCertificate,
    /// The leaf is no X.509 certificate.
    Certificate(rustls::Error),
    /// The leaf's validity is over.
    Expired,
    /// The leaf's validity has not begun.
    NotYetValid,
    /// The key text is damaged PEM; says how.
    KeyPem(&'static str),
    /// The key text has no private key in it.
    NoKey,
    /// The key is protected by a passphrase, for which there is nobody to ask.
    KeyEncrypted,
    /// The key is of a kind that rustls does not know, or is damaged.
    Key(rustls::Error),
    /// The key is another certificate's.
    KeyMismatch,
    /// No certificate can be made for this name; says why.
    Name(String),
}

impl IdentityError {
    fn from_leaf(error: rustls::Error) -> Self {
        use rustls::CertificateError as C;
        match error {
            rustls::Error::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => Self::Expired,
            rustls::Error::InvalidCertificate(C::NotValidYet | C::NotValidYetContext { .. }) => Self::NotYetValid,
            other => Self::Certificate(other),
        }
    }

    fn from_key(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => Self::KeyMismatch,
            other => Self::Key(other),
        }
    }
}

impl fmt::Display for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CertificatePem(fault) => write!(f, "certificate: {fault}"),
            Self::NoCertificate => f.write_str("no certificate in it (PEM is expected)"),
            Self::Certificate(error) => write!(f, "unreadable certificate: {error}"),
            Self::Expired => f.write_str("the certificate has expired"),
            Self::NotYetValid => f.write_str("the certificate is not valid yet"),
            Self::KeyPem(fault) => write!(f, "key: {fault}"),
            Self::NoKey => f.write_str("no private key in it (PEM is expected)"),
            Self::KeyEncrypted => f.write_str("the private key is protected by a passphrase"),
            Self::Key(error) => write!(f, "unusable private key: {error}"),
            Self::KeyMismatch => f.write_str("the private key does not belong to the certificate"),
            Self::Name(reason) => write!(f, "no certificate can be made for {reason}"),
        }
    }
}

impl std::error::Error for IdentityError {}

/// The certificates of a PEM text, other sections skipped. Errors: [`IdentityError::CertificatePem`].
pub fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    pem::sections(pem)
        .filter(|section| section.as_ref().map_or(true, |section| section.label == b"CERTIFICATE"))
        .map(|section| Ok(CertificateDer::from(mem::take(&mut *section?.decode()?))))
        .collect::<Result<Vec<_>, _>>()
        .map_err(IdentityError::CertificatePem)
}

/// Holds the dates of a certificate against `now`; any error is a `rustls::Error::InvalidCertificate`.
///
/// webpki looks at the dates before anything that depends on an issuer or a signature, so with no issuer and no algorithm at all every
/// other outcome means that the dates are good. (The tests pin that order.)
pub(super) fn check_dates(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), rustls::Error> {
    use rustls::CertificateError as C;
    let parsed = ParsedCertificate::try_from(certificate)?;
    match verify_server_cert_signed_by_trust_anchor(&parsed, &RootCertStore::empty(), &[], now, &[]) {
        Err(rustls::Error::InvalidCertificate(
            reason @ (C::Expired
            | C::ExpiredContext { .. }
            | C::NotValidYet
            | C::NotValidYetContext { .. }
            | C::BadEncoding),
        )) => Err(reason.into()),
        _ => Ok(()),
    }
}

/// The first private key of a PEM text, in memory that is wiped; none of it is anywhere else.
fn private_key(text: &[u8]) -> Result<Zeroizing<PrivateKeyDer<'static>>, IdentityError> {
    let mut is_encrypted = false;
    for section in pem::sections(text) {
        let section = section.map_err(IdentityError::KeyPem)?;
        if section.is_encrypted() {
            is_encrypted = true;
            continue;
        }
        let make: fn(Vec<u8>) -> PrivateKeyDer<'static> = match section.label {
            b"PRIVATE KEY" => |der| PrivatePkcs8KeyDer::from(der).into(),
            b"RSA PRIVATE KEY" => |der| PrivatePkcs1KeyDer::from(der).into(),
            b"EC PRIVATE KEY" => |der| PrivateSec1KeyDer::from(der).into(),
            _ => continue,
        };
        let mut der = section.decode().map_err(IdentityError::KeyPem)?;
        return Ok(Zeroizing::new(make(mem::take(&mut *der))));
    }
    Err(if is_encrypted { IdentityError::KeyEncrypted } else { IdentityError::NoKey })
}

/// What a private key file repeats of the public key: for RSA modulus and exponent (RFC 8017 A.1.2), else the whole point.
/// None if `spki` is not a SubjectPublicKeyInfo (RFC 5280 4.1).
fn public_key_octets(spki: &[u8]) -> Option<&[u8]> {
    const SEQUENCE: u8 = 0x30;
    const BIT_STRING: u8 = 0x03;
    let (outer, info, _) = element(spki)?;
    let (algorithm, _, rest) = element(info)?;
    let (key, bits, _) = element(rest)?;
    if (outer, algorithm, key) != (SEQUENCE, SEQUENCE, BIT_STRING) {
        return None;
    }
    let (_unused_bits, octets) = bits.split_first()?;
    match element(octets) {
        Some((SEQUENCE, inner, [])) => Some(inner),
        _ => Some(octets),
    }
}

/// The first DER element: its tag, its content, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
        if digits.len() > 4 {
            return None;
        }
        (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

/// Whether `needle`, which is not empty, occurs in `haystack`.
fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty() && haystack.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, PKCS_ED25519, PKCS_RSA_SHA256, SignatureAlgorithm, date_time_ymd};
    use std::time::Duration;

    /// 2030-01-01, inside the validity of every certificate here that says nothing else.
    const NOW: UnixTime = UnixTime::since_unix_epoch(Duration::from_secs(1_893_456_000));

    fn pem_text(label: &str, der: &[u8]) -> Vec<u8> {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = format!("-----BEGIN {label}-----\n").into_bytes();
        for (index, group) in der.chunks(3).enumerate() {
            let bits = group.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
            for digit in 0..4 {
                let sextet = bits >> (18 - 6 * digit) & 63;
                text.push(if digit > group.len() { b'=' } else { ALPHABET[sextet as usize] });
            }
            if index % 16 == 15 {
                text.push(b'\n');
            }
        }
        text.extend_from_slice(format!("\n-----END {label}-----\n").as_bytes());
        text
    }

    fn pair(algorithm: &'static SignatureAlgorithm, edit: impl FnOnce(&mut CertificateParams)) -> (Vec<u8>, Vec<u8>) {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut request = CertificateParams::new(["mx.example".to_owned()]).unwrap();
        edit(&mut request);
        let certificate = request.self_signed(&key).unwrap();
        (pem_text("CERTIFICATE", certificate.der()), pem_text("PRIVATE KEY", &key.serialize_der()))
    }

    fn p256() -> (Vec<u8>, Vec<u8>) {
        pair(&rcgen::PKCS_ECDSA_P256_SHA256, |_| {})
    }

    #[test]
    fn accepts_p256_rsa_and_ed25519_keys() {
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &PKCS_RSA_SHA256, &PKCS_ED25519] {
            let (certificate, key) = pair(algorithm, |_| {});
            let identity = Identity::from_pem(&certificate, &key, NOW).unwrap();
            assert!(identity.certified_key().is_ok());
        }
    }

    #[test]
    fn compares_a_key_without_its_public_half_all_the_same() {
        // RFC 8410 7: version 0, the algorithm, the seed. rcgen writes version 1, with the public key after the seed.
        let without_public_half = |key: &KeyPair| {
            let head = [&[0x30, 0x2e, 2, 1, 0][..], &key.serialized_der()[5..12]].concat();
            pem_text("PRIVATE KEY", &[&head, &key.serialized_der()[12..48]].concat())
        };
        let [key, other] = [&PKCS_ED25519, &PKCS_ED25519].map(|algorithm| KeyPair::generate_for(algorithm).unwrap());
        let certificate = CertificateParams::default().self_signed(&key).unwrap();
        let certificate = pem_text("CERTIFICATE", certificate.der());
        assert!(Identity::from_pem(&certificate, &without_public_half(&key), NOW).is_ok());
        let error = Identity::from_pem(&certificate, &without_public_half(&other), NOW).unwrap_err();
        assert!(matches!(error, IdentityError::KeyMismatch), "{error}");
    }

    #[test]
    fn accepts_one_text_with_key_and_certificate() {
        let (certificate, key) = p256();
        let both = [key, certificate].concat();
        assert!(Identity::from_pem(&both, &both, NOW).is_ok());
    }

    #[test]
    fn sees_the_public_key_of_rsa_and_p256_in_the_key_file() {
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &PKCS_RSA_SHA256] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let certificate = CertificateParams::default().self_signed(&key).unwrap();
            let spki = ParsedCertificate::try_from(certificate.der()).unwrap().subject_public_key_info();
            let public = public_key_octets(&spki).unwrap();
            assert!(public.len() >= 64);
            assert!(contains(key.serialized_der(), public));
            assert!(!contains(KeyPair::generate_for(algorithm).unwrap().serialized_der(), public));
        }
    }

    #[test]
    fn refuses_the_key_of_another_certificate() {
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &PKCS_ED25519] {
            let (certificate, _) = pair(algorithm, |_| {});
            let (_, other_key) = pair(algorithm, |_| {});
            let error = Identity::from_pem(&certificate, &other_key, NOW).unwrap_err();
            assert!(matches!(error, IdentityError::KeyMismatch), "{error}");
        }
    }

    #[test]
    fn refuses_expired_and_not_yet_valid_certificates_although_nobody_signed_them() {
        let (certificate, key) =
            pair(&rcgen::PKCS_ECDSA_P256_SHA256, |request| request.not_after = date_time_ymd(2029, 12, 31));
        assert!(matches!(Identity::from_pem(&certificate, &key, NOW), Err(IdentityError::Expired)));
        let (certificate, key) =
            pair(&rcgen::PKCS_ECDSA_P256_SHA256, |request| request.not_before = date_time_ymd(2030, 1, 2));
        assert!(matches!(Identity::from_pem(&certificate, &key, NOW), Err(IdentityError::NotYetValid)));
        let (certificate, key) = pair(&rcgen::PKCS_ECDSA_P256_SHA256, |request| {
            request.not_before = date_time_ymd(2029, 12, 31);
            request.not_after = date_time_ymd(2030, 1, 2);
        });
        assert!(Identity::from_pem(&certificate, &key, NOW).is_ok());
    }

    #[test]
    fn names_what_is_missing_or_damaged() {
        let (certificate, key) = p256();
        let fault = |certificate: &[u8], key: &[u8]| Identity::from_pem(certificate, key, NOW).unwrap_err();
        assert!(matches!(fault(b"", &key), IdentityError::NoCertificate));
        assert!(matches!(fault(&key, &key), IdentityError::NoCertificate));
        assert!(matches!(fault(&certificate, b"hello"), IdentityError::NoKey));
        assert!(matches!(fault(&certificate, &certificate), IdentityError::NoKey));
        assert!(matches!(fault(&certificate[..200], &key), IdentityError::CertificatePem(_)));
        assert!(matches!(fault(&certificate, &key[..100]), IdentityError::KeyPem(_)));
        assert!(matches!(fault(&pem_text("CERTIFICATE", b"no DER"), &key), IdentityError::Certificate(_)));
        assert!(matches!(fault(&certificate, &pem_text("PRIVATE KEY", b"no DER")), IdentityError::Key(_)));
        assert!(matches!(fault(&certificate, &pem_text("ENCRYPTED PRIVATE KEY", b"x")), IdentityError::KeyEncrypted));
        let older = b"-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\neA==\n-----END EC PRIVATE KEY-----\n";
        assert!(matches!(fault(&certificate, older), IdentityError::KeyEncrypted));
    }

    #[test]
    fn errors_and_debug_never_quote_the_key() {
        let (certificate, key) = p256();
        let mut damaged = key.clone();
        damaged[60] = b'!';
        let text = Identity::from_pem(&certificate, &damaged, NOW).unwrap_err().to_string();
        assert_eq!(text, "key: damaged base64 in a PEM section");
        assert_eq!(
            format!("{:?}", Identity::from_pem(&certificate, &key, NOW).unwrap()),
            "Identity { certificates: 1, .. }"
        );
    }

    #[test]
    fn self_signed_bears_the_name_and_has_a_fitting_key() {
        for name in ["mx.example", "127.0.0.1", "::1"] {
            let identity = Identity::self_signed(name).unwrap();
            assert!(identity.certified_key().is_ok());
            assert!(check_dates(identity.leaf(), NOW).is_ok());
            let parsed = ParsedCertificate::try_from(identity.leaf()).unwrap();
            rustls::client::verify_server_name(&parsed, &super::super::server_name(name).unwrap()).unwrap();
        }
        assert!(matches!(Identity::self_signed("no name\n"), Err(IdentityError::Name(_))));
    }

    #[test]
    fn der_reader_stops_at_the_end_of_damaged_input() {
        let (certificate, _) = p256();
        let mut section = pem::sections(&certificate);
        let der = CertificateDer::from(section.next().unwrap().unwrap().decode().unwrap().to_vec());
        let spki = ParsedCertificate::try_from(&der).unwrap().subject_public_key_info();
        for cut in 0..spki.len() {
            assert_eq!(public_key_octets(&spki[..cut]), None);
        }
        assert_eq!(element(&[0x30, 0x85, 1, 1, 1, 1, 1]), None);
    }
}
