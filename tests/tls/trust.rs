//! Whom the client leg believes, and what it says of those it does not.

use crate::peers::{
    Ca, End, HOST, exchange, exchange_foreign, feed, foreign_client, foreign_config, name, pem, self_signed, trust,
};
use rcgen::{BasicConstraints, IsCa, SanType, date_time_ymd};
use rustls::version::{TLS12, TLS13};
use starttls_wrapper::tls::{CertificateDer, Identity, Leg, Roots, TlsError, Trust, client_setup, server_name};
use std::path::Path;

/// The handshake of a client with this trust and a server with this identity: the client's verdict, and what the server heard.
fn verdict(trust: Trust, identity: &Identity) -> (Result<(), String>, Option<String>) {
    let (mut client, mut server) =
        (End::new(Leg::connect(&client_setup(trust).unwrap(), name()).unwrap()), End::server(identity));
    let result = exchange(&mut client, &mut server, usize::MAX).map_err(|error| {
        assert!(matches!(error, TlsError::Untrusted(_)), "{error}");
        error.to_string()
    });
    assert_eq!(client.leg.is_failed(), result.is_err());
    if result.is_ok() {
        assert!(!client.leg.is_handshaking() && !server.leg.is_handshaking());
    }
    let alert = client.take_outgoing();
    let heard = server.take(&alert, usize::MAX).err().map(|error| error.to_string());
    (result, heard)
}

fn accepted(trust: Trust, identity: &Identity) {
    assert_eq!(verdict(trust, identity), (Ok(()), None));
}

fn refused(trust: Trust, identity: &Identity, reason: &str, alert: &str) {
    let (result, heard) = verdict(trust, identity);
    let text = result.unwrap_err();
    assert!(text.starts_with("certificate not trusted: ") && text.contains(reason), "{text}");
    assert_eq!(heard.as_deref(), Some(format!("the peer sent the alert {alert}").as_str()));
}

fn listed(certificates: &[&CertificateDer<'static>]) -> Roots {
    // Opened when `Roots` are made: the file may be gone when they are read.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cafile.pem");
    std::fs::write(&file, certificates.iter().map(|certificate| pem("CERTIFICATE", certificate)).collect::<String>())
        .unwrap();
    Roots::listed(Some(&file), None)
}

#[test]
fn believes_its_own_leaf_whatever_name_and_dates() {
    let own = self_signed(|request| {
        request.subject_alt_names = vec![SanType::DnsName("elsewhere.example".try_into().unwrap())];
        request.not_before = date_time_ymd(2019, 1, 1);
        request.not_after = date_time_ymd(2021, 1, 1);
    });
    accepted(trust(Some(own.leaf().clone()), Roots::default()), &own);
}

#[test]
fn does_not_believe_its_own_leaf_without_the_key() {
    let own = self_signed(|_| {});
    // The client expects `own`, and a thief shows it with a key of his own: here, a server config with mismatched parts.
    let thief = rcgen::KeyPair::generate().unwrap();
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(thief.serialize_der());
    let key = provider.key_provider.load_private_key(key.into()).unwrap();
    let stolen = std::sync::Arc::new(rustls::sign::CertifiedKey::new(vec![own.leaf().clone()], key));
    for insecure in [false, true] {
        for version in [&TLS12, &TLS13] {
            let config = rustls::ServerConfig::builder_with_provider(std::sync::Arc::new(provider.clone()))
                .with_protocol_versions(&[version])
                .unwrap()
                .with_no_client_auth()
                .with_cert_resolver(std::sync::Arc::new(rustls::sign::SingleCertAndKey::from(stolen.clone())));
            let mut server = End::new(Leg::accept(&std::sync::Arc::new(config)).unwrap());
            let trust = Trust { insecure, ..trust(Some(own.leaf().clone()), Roots::default()) };
            let mut client = End::new(Leg::connect(&client_setup(trust).unwrap(), name()).unwrap());
            let error = exchange(&mut client, &mut server, usize::MAX).unwrap_err();
            assert!(matches!(error, TlsError::Untrusted(rustls::CertificateError::BadSignature)), "{error}");
        }
    }
}

#[test]
fn believes_a_given_ca_for_the_demanded_name_only() {
    let (ca, other_ca) = (Ca::new("ours"), Ca::new("theirs"));
    let identity = ca.issue(|_| {});
    let own = self_signed(|_| {});
    accepted(trust(Some(own.leaf().clone()), listed(&[&ca.der()])), &identity);
    accepted(trust(None, listed(&[&other_ca.der(), &ca.der()])), &identity);
    refused(trust(None, listed(&[&other_ca.der()])), &identity, "UnknownIssuer", "UnknownCA");
    let misnamed = Trust { name: server_name("other.example").unwrap(), ..trust(None, listed(&[&ca.der()])) };
    refused(misnamed, &identity, "not valid for name \"other.example\"", "BadCertificate");
    let by_address = ca.issue(|request| request.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())]);
    let wants_address = Trust { name: server_name("127.0.0.1").unwrap(), ..trust(None, listed(&[&ca.der()])) };
    accepted(wants_address, &by_address);
}

#[test]
fn refuses_a_wrong_ca_of_the_same_name() {
    let (ca, namesake) = (Ca::new("ours"), Ca::new("ours"));
    refused(trust(None, listed(&[&ca.der()])), &namesake.issue(|_| {}), "BadSignature", "DecryptError");
}

#[test]
fn refuses_expired_and_not_yet_valid_certificates_of_a_good_ca() {
    let ca = Ca::new("ours");
    let old = ca.issue(|request| request.not_after = date_time_ymd(2020, 6, 1));
    refused(trust(None, listed(&[&ca.der()])), &old, "expired", "CertificateExpired");
    let early = ca.issue(|request| request.not_before = date_time_ymd(2029, 6, 1));
    refused(trust(None, listed(&[&ca.der()])), &early, "not valid yet", "CertificateExpired");
}

#[test]
fn refuses_a_stranger_when_nobody_can_vouch() {
    let (own, stranger) = (self_signed(|_| {}), self_signed(|_| {}));
    refused(
        trust(Some(own.leaf().clone()), Roots::default()),
        &stranger,
        "not our own, and there are no roots",
        "CertificateUnknown",
    );
    refused(
        trust(None, Roots::system(|_| None)),
        &stranger,
        "",
        if system_has_roots() { "UnknownCA" } else { "CertificateUnknown" },
    );
    let ca = Ca::new("ours");
    refused(trust(Some(own.leaf().clone()), listed(&[&ca.der()])), &stranger, "UnknownIssuer", "UnknownCA");
}

fn system_has_roots() -> bool {
    !rustls_native_certs::load_native_certs().certs.is_empty()
}

#[test]
fn believes_a_listed_self_signed_certificate_even_one_that_calls_itself_a_ca() {
    for is_ca in [IsCa::NoCa, IsCa::ExplicitNoCa, IsCa::Ca(BasicConstraints::Unconstrained)] {
        let identity = self_signed(|request| request.is_ca = is_ca);
        accepted(trust(None, listed(&[identity.leaf()])), &identity);
        let misnamed = Trust { name: server_name("other.example").unwrap(), ..trust(None, listed(&[identity.leaf()])) };
        refused(misnamed, &identity, "not valid for name", "BadCertificate");
    }
    let old = self_signed(|request| request.not_after = date_time_ymd(2020, 6, 1));
    refused(trust(None, listed(&[old.leaf()])), &old, "expired", "CertificateExpired");
}

#[test]
fn reads_cafile_and_cadir_only_when_it_must() {
    let folder = tempfile::tempdir().unwrap();
    let (in_file, in_folder) = (Ca::new("file"), Ca::new("folder"));
    let file = folder.path().join("cafile.pem");
    let cadir = folder.path().join("cadir");
    std::fs::create_dir(&cadir).unwrap();
    let missing = Roots::listed(Some(&file), Some(&cadir));
    // Not there yet: whoever shows our own leaf is believed all the same.
    let own = self_signed(|_| {});
    accepted(trust(Some(own.leaf().clone()), missing.clone()), &own);
    refused(trust(None, missing), &in_file.issue(|_| {}), "cafile.pem", "CertificateUnknown");

    write(&file, &in_file);
    let roots = Roots::listed(Some(&file), Some(&cadir));
    write(&cadir.join("0a1b2c3d.0"), &in_folder);
    // The file is opened once, and can be read more than once.
    accepted(trust(None, roots.clone()), &in_file.issue(|_| {}));
    accepted(trust(None, roots.clone()), &in_file.issue(|_| {}));
    accepted(trust(None, roots.clone()), &in_folder.issue(|_| {}));
    refused(trust(None, roots), &Ca::new("none").issue(|_| {}), "UnknownIssuer", "UnknownCA");
}

#[test]
fn the_system_s_roots_are_what_the_variables_name_or_else_its_bundle() {
    let folder = tempfile::tempdir().unwrap();
    let (in_file, in_folder) = (Ca::new("file"), Ca::new("folder"));
    let file = folder.path().join("bundle.pem");
    let cadir = folder.path().join("cadir");
    std::fs::create_dir(&cadir).unwrap();
    write(&file, &in_file);
    write(&cadir.join("0a1b2c3d.0"), &in_folder);
    let named = |name: &str| match name {
        "SSL_CERT_FILE" => Some(file.clone().into()),
        "SSL_CERT_DIR" => Some(cadir.clone().into()),
        _ => None,
    };
    let both = Roots::system(named);
    assert_eq!(both.folders().to_vec(), vec![cadir.clone()]);
    accepted(trust(None, both.clone()), &in_file.issue(|_| {}));
    accepted(trust(None, both.clone()), &in_folder.issue(|_| {}));
    // Listed among the system's roots is not listed by the administrator: it must sign.
    let itself = self_signed(|request| request.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    std::fs::write(&file, pem("CERTIFICATE", itself.leaf())).unwrap();
    let (result, _) = verdict(trust(None, Roots::system(named)), &itself);
    assert!(result.unwrap_err().starts_with("certificate not trusted: "));
    let only_file = Roots::system(|name| named(name).filter(|_| name == "SSL_CERT_FILE"));
    assert!(only_file.folders().is_empty());
    // A system with a bundle needs no folder opened later.
    let has_bundle = Path::new("/etc/ssl/certs/ca-certificates.crt").exists();
    assert_eq!(Roots::system(|_| None).folders().is_empty(), has_bundle);
}

fn write(path: &Path, ca: &Ca) {
    std::fs::write(path, pem("CERTIFICATE", &ca.der())).unwrap();
}

#[test]
fn insecure_believes_everyone() {
    let stranger = self_signed(|request| {
        request.subject_alt_names = vec![SanType::DnsName("elsewhere.example".try_into().unwrap())];
        request.not_after = date_time_ymd(2020, 6, 1);
        request.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    });
    accepted(Trust { insecure: true, ..trust(None, Roots::default()) }, &stranger);
}

/// The server's verdict on a client that offers these protocols, and what was agreed.
fn alpn(offered: &[&str]) -> Result<Option<Vec<u8>>, TlsError> {
    let identity = self_signed(|_| {});
    let mut config = foreign_config(&identity, &[&TLS12, &TLS13]);
    config.alpn_protocols = offered.iter().map(|name| name.as_bytes().to_vec()).collect();
    let (mut client, mut server) = (foreign_client(config), End::server(&identity));
    let result = exchange_foreign(&mut client, &mut server);
    if result.is_err() {
        let heard = feed(&mut client, &server.take_outgoing());
        let alert = rustls::AlertDescription::NoApplicationProtocol;
        assert_eq!(heard, Err(rustls::Error::AlertReceived(alert)));
    }
    assert_eq!(server.leg.facts().sni.as_deref(), Some(HOST));
    result.map(|()| server.leg.facts().alpn)
}

#[test]
fn agrees_on_smtp_and_esmtp_and_refuses_those_who_want_only_others() {
    assert_eq!(alpn(&[]).unwrap(), None);
    assert_eq!(alpn(&["smtp"]).unwrap().as_deref(), Some(&b"smtp"[..]));
    assert_eq!(alpn(&["h2", "esmtp"]).unwrap().as_deref(), Some(&b"esmtp"[..]));
    for strangers in [&["h2", "http/1.1"][..], &["ftp"], &["smtps"]] {
        assert!(matches!(alpn(strangers), Err(TlsError::NoProtocolOverlap)));
    }
}

#[test]
fn our_client_names_no_protocol() {
    let identity = self_signed(|_| {});
    let (mut client, mut server) = (End::client(&identity), End::server(&identity));
    let hello = client.leg.outgoing().to_vec();
    assert!(!hello.windows(4).any(|window| window == b"smtp"));
    exchange(&mut client, &mut server, usize::MAX).unwrap();
    assert_eq!(client.leg.facts().alpn, None);
}
