//! The cryptography and the names that everything in this folder shares.

use rustls::CipherSuite;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::ServerName;
use std::sync::{Arc, OnceLock};

use super::error::TlsError;

/// The one provider of the process: aws-lc's defaults, the hybrid post-quantum group first, and AES-128 before AES-256.
///
/// AES-128-GCM moves a tenth more per second, and its SHA-256 has instructions of its own where SHA-384 has none.
pub(super) fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        start_cryptography();
        let mut provider = aws_lc_rs::default_provider();
        let first = CipherSuite::TLS13_AES_128_GCM_SHA256;
        // A stable sort: the rest stays in its order.
        provider.cipher_suites.sort_by_key(|suite| suite.suite() != first);
        Arc::new(provider)
    })
}

/// Has aws-lc look what the processor can, once. To be called before anything is computed: .cargo/config.toml builds it without
/// the constructor that would do this in every process, and without it AES and SHA are computed without their instructions.
pub(super) fn start_cryptography() {
    ::aws_lc_rs::init();
}

/// Reads a DNS name or a literal IP address, as the command line has it. Errors: [`TlsError::Name`].
pub fn server_name(text: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(text.to_owned()).map_err(|_| TlsError::Name(text.to_owned()))
}
