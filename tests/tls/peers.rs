//! Certificates, configurations and a wire in memory.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};
use starttls_wrapper::tls::{
    CertificateDer, Identity, Leg, Roots, ServerName, TlsError, Trust, UnixTime, client_setup, server_name,
    server_setup,
};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const HOST: &str = "mx.example";

/// A certificate authority and what it issues.
pub(crate) struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        let mut request = CertificateParams::default();
        request.distinguished_name.push(rcgen::DnType::CommonName, name);
        request.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(request, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn der(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    pub(crate) fn issue(&self, edit: impl FnOnce(&mut CertificateParams)) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut request = CertificateParams::new([HOST.to_owned()]).unwrap();
        edit(&mut request);
        identity(request.signed_by(&key, &self.0).unwrap().der(), &key)
    }
}

pub(crate) fn self_signed(edit: impl FnOnce(&mut CertificateParams)) -> Identity {
    let key = KeyPair::generate().unwrap();
    let mut request = CertificateParams::new([HOST.to_owned()]).unwrap();
    edit(&mut request);
    identity(request.self_signed(&key).unwrap().der(), &key)
}

/// Our identity, whatever the certificate's dates: 2030 is within all that the tests want accepted here.
fn identity(certificate: &CertificateDer<'_>, key: &KeyPair) -> Identity {
    let certificate = pem("CERTIFICATE", certificate);
    let key = pem("PRIVATE KEY", key.serialized_der());
    let within = [1_893_456_000, 1_577_836_800].map(|seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds)));
    within.iter().find_map(|now| Identity::from_pem(certificate.as_bytes(), key.as_bytes(), *now).ok()).unwrap()
}

pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for group in der.chunks(3) {
        let bits = group.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let sextet = bits >> (18 - 6 * digit) & 63;
            text.push(if digit > group.len() { '=' } else { char::from(ALPHABET[sextet as usize]) });
        }
    }
    text + "\n-----END " + label + "-----\n"
}

pub(crate) fn name() -> ServerName<'static> {
    server_name(HOST).unwrap()
}

pub(crate) fn trust(own_leaf: Option<CertificateDer<'static>>, roots: Roots) -> Trust {
    Trust { own_leaf, roots, name: name(), insecure: false }
}

/// A rustls client configuration that is not ours, for one identity.
pub(crate) fn foreign_config(identity: &Identity, versions: &[&'static SupportedProtocolVersion]) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(identity.leaf().clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.enable_secret_extraction = true;
    config
}

pub(crate) fn foreign_client(config: ClientConfig) -> ClientConnection {
    ClientConnection::new(Arc::new(config), name()).unwrap()
}

/// A leg and what came out of it.
pub(crate) struct End {
    pub(crate) leg: Leg,
    pub(crate) received: Vec<u8>,
}

impl End {
    pub(crate) fn new(leg: Leg) -> Self {
        Self { leg, received: Vec::new() }
    }

    pub(crate) fn server(identity: &Identity) -> Self {
        Self::new(Leg::accept(&server_setup(identity, None).unwrap()).unwrap())
    }

    /// A client that believes `identity` because it is its own.
    pub(crate) fn client(identity: &Identity) -> Self {
        let config = client_setup(trust(Some(identity.leaf().clone()), Roots::default())).unwrap();
        Self::new(Leg::connect(&config, name()).unwrap())
    }

    /// Takes `bytes` in reads of at most `split` octets.
    pub(crate) fn take(&mut self, mut bytes: &[u8], split: usize) -> Result<(), TlsError> {
        while !bytes.is_empty() {
            let room = self.leg.room();
            let n = room.len().min(bytes.len()).min(split);
            assert!(n > 0, "no room and no error");
            room[..n].copy_from_slice(&bytes[..n]);
            self.leg.filled(n);
            bytes = &bytes[n..];
            self.handle()?;
        }
        Ok(())
    }

    pub(crate) fn handle(&mut self) -> Result<(), TlsError> {
        let received = &mut self.received;
        self.leg.handle_records(&mut |plaintext| received.extend_from_slice(plaintext))
    }

    pub(crate) fn take_outgoing(&mut self) -> Vec<u8> {
        let bytes = self.leg.outgoing().to_vec();
        self.leg.sent(bytes.len());
        bytes
    }
}

/// Carries bytes both ways, `split` at a time, until both are quiet.
pub(crate) fn exchange(a: &mut End, b: &mut End, split: usize) -> Result<(), TlsError> {
    while a.leg.wants_write() || b.leg.wants_write() {
        let bytes = a.take_outgoing();
        b.take(&bytes, split)?;
        let bytes = b.take_outgoing();
        a.take(&bytes, split)?;
    }
    Ok(())
}

/// Two legs after their handshake.
pub(crate) fn connected() -> (End, End) {
    let identity = self_signed(|_| {});
    let (mut client, mut server) = (End::client(&identity), End::server(&identity));
    exchange(&mut client, &mut server, usize::MAX).unwrap();
    (client, server)
}

/// Everything that a foreign connection wants to write.
pub(crate) fn flight(connection: &mut ClientConnection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes).unwrap();
    }
    bytes
}

/// Shows `bytes` to a foreign connection.
pub(crate) fn feed(connection: &mut ClientConnection, mut bytes: &[u8]) -> Result<(), rustls::Error> {
    while !bytes.is_empty() {
        connection.read_tls(&mut bytes).unwrap();
        connection.process_new_packets()?;
    }
    Ok(())
}

/// Carries bytes between a foreign client and a leg until both are quiet.
pub(crate) fn exchange_foreign(client: &mut ClientConnection, server: &mut End) -> Result<(), TlsError> {
    while client.wants_write() || server.leg.wants_write() {
        server.take(&flight(client), usize::MAX)?;
        feed(client, &server.take_outgoing()).map_err(TlsError::Protocol)?;
    }
    Ok(())
}
