//! What we offer: one configuration per role, made when it is first needed and shared by all sessions of the process.
//!
//! Contract: protocol.md STARTTLS 9. TLS 1.2 and 1.3, the hybrid post-quantum group first, no early data. Clients get tickets only where
//! somebody could redeem them: one process that serves one connection has none but those of `--ticket-keys`. No session is kept in memory.

use rustls::client::Resumption;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig};
use std::cell::RefCell;
use std::sync::Arc;

use super::error::TlsError;
use super::identity::Identity;
use super::provider::provider;
use super::tickets::Tickets;
use super::trust::{Trust, Verifier};

/// The application protocols that a client may name (RFC 7301; `smtp` and `esmtp` are what Exim accepts). Against
/// cross-protocol attacks (ALPACA) a client that names only others is refused by rustls.
const PROTOCOLS: [&[u8]; 2] = [b"smtp", b"esmtp"];

/// The configuration towards clients. This is where the key is loaded: 90 us for P-256, 190 to 300 us for RSA-2048.
///
/// Every client gets the one certificate whatever name it asks for; the name is kept for [`super::Facts`]. Without `tickets` none is
/// given, and none is taken.
/// Errors: [`TlsError::Setup`] for a key that rustls cannot use or that does not fit the certificate.
pub fn server_setup(identity: &Identity, tickets: Option<&Tickets>) -> Result<Arc<ServerConfig>, TlsError> {
    let certificate = OneCertificate(identity.certified_key().map_err(TlsError::Setup)?);
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(TlsError::Setup)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(certificate));
    config.ignore_client_order = true;
    config.alpn_protocols = PROTOCOLS.iter().map(|name| name.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    if let Some(tickets) = tickets {
        let ticketer = tickets.ticketer(identity.leaf(), config.time_provider.clone());
        config.ticketer = ticketer.map_err(TlsError::Setup)?;
        // One: mail comes one connection after the other, and each brings the next.
        config.send_tls13_tickets = 1;
    }
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// The configuration towards the backend, believing what `trust` says. No application protocol is offered: all servers
/// accept that, and some refuse names they do not know.
///
/// Errors: [`TlsError::Setup`], which only a broken build can cause.
pub fn client_setup(trust: Trust) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(TlsError::Setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier::new(trust, provider().clone())))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

thread_local! {
    /// The name in the ClientHello that this thread looked at last. A resolver is not told which connection it serves, but it is
    /// called within that connection's `process_tls_records`: the leg clears this before and takes it after.
    static SERVER_NAME_SEEN: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Takes the name that a ClientHello brought since the last call on this thread.
pub(super) fn take_server_name_seen() -> Option<String> {
    SERVER_NAME_SEEN.with_borrow_mut(Option::take)
}

/// Answers every ClientHello with the same certificate and notes the name it asked for.
#[derive(Debug)]
struct OneCertificate(Arc<CertifiedKey>);

impl ResolvesServerCert for OneCertificate {
    fn resolve(&self, client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = client_hello.server_name().map(str::to_owned);
        SERVER_NAME_SEEN.with_borrow_mut(|seen| *seen = name);
        Some(self.0.clone())
    }
}
