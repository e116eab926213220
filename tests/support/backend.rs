//! The backend as a test plays it: a port of 127.0.0.1 that can be closed, and a server behind it that speaks TLS as a
//! script has it or fails as a script has it.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{Connection, ServerConfig, ServerConnection};
use starttls_wrapper::session::Way;

use crate::dialogue::Backend;
use crate::stream::wait_readable;
use crate::wire::{PATIENCE, Wire};

/// A certificate and its key, made now.
pub(crate) struct Certificate {
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
    leaf: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

/// Of which kind a key is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    P256,
    Rsa,
}

impl Certificate {
    /// A self-signed one for `localhost` and 127.0.0.1.
    pub(crate) fn new() -> Self {
        Self::of(Kind::P256)
    }

    /// One whose validity is over.
    pub(crate) fn expired() -> Self {
        Self::made(Kind::P256, |request| request.not_after = rcgen::date_time_ymd(2021, 1, 1))
    }

    /// One for this name alone.
    pub(crate) fn named(name: &str) -> Self {
        Self::made(Kind::P256, |request| {
            request.subject_alt_names = rcgen::CertificateParams::new([name.to_owned()]).unwrap().subject_alt_names;
        })
    }

    /// The same with such a key.
    pub(crate) fn of(kind: Kind) -> Self {
        Self::made(kind, |_| ())
    }

    fn made(kind: Kind, change: impl FnOnce(&mut rcgen::CertificateParams)) -> Self {
        let algorithm = match kind {
            Kind::P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            Kind::Rsa => &rcgen::PKCS_RSA_SHA256,
        };
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut request = rcgen::CertificateParams::new(names).unwrap();
        change(&mut request);
        let leaf = request.self_signed(&key).unwrap().der().clone();
        Self {
            certificate_pem: pem("CERTIFICATE", &leaf),
            key_pem: pem("PRIVATE KEY", key.serialized_der()),
            leaf,
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        }
    }

    /// The key as its file has it, PKCS #8.
    pub(crate) fn key_der(&self) -> &[u8] {
        self.key.secret_der()
    }

    /// The certificate as it goes over the wire.
    pub(crate) fn leaf(&self) -> &CertificateDer<'static> {
        &self.leaf
    }

    /// Its side of a handshake.
    pub(crate) fn server(&self) -> Connection {
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![self.leaf.clone()], self.key.clone_key());
        Connection::Server(ServerConnection::new(Arc::new(config.unwrap())).unwrap())
    }
}

/// PEM (RFC 7468) of `der`; rcgen's own needs a dependency more.
fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----");
    for (at, three) in der.chunks(3).enumerate() {
        if at % 16 == 0 {
            text.push('\n');
        }
        let bits = three.iter().enumerate().fold(0u32, |bits, (i, &octet)| bits | u32::from(octet) << (16 - 8 * i));
        for i in 0..4 {
            let digit = ALPHABET[(bits >> (18 - 6 * i)) as usize & 63];
            text.push(if i <= three.len() { char::from(digit) } else { '=' });
        }
    }
    format!("{text}\n-----END {label}-----\n")
}

/// The port, what happens there, and the connection that speaks now.
pub(crate) struct Server {
    certificate: Arc<Certificate>,
    /// How the wrapper comes.
    way: Way,
    listener: Listener,
    port: u16,
    wire: Option<Wire>,
}

enum Listener {
    /// Bound, not listening: a dial is refused.
    Closed(std::os::fd::OwnedFd),
    Open(TcpListener),
}

impl Server {
    /// A free port of 127.0.0.1, nobody listening yet.
    pub(crate) fn new(certificate: Arc<Certificate>, way: Way) -> Self {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
        let fd = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        bind(&fd, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let listener = TcpListener::from(fd);
        let port = listener.local_addr().unwrap().port();
        Self { certificate, way, listener: Listener::Closed(listener.into()), port, wire: None }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Lets dials succeed from now on.
    pub(crate) fn listen(&mut self) {
        if let Listener::Closed(fd) = &self.listener {
            rustix::net::listen(fd, 128).unwrap();
            self.listener = Listener::Open(TcpListener::from(fd.try_clone().unwrap()));
        }
    }

    /// Listens with the shortest queue and fills it: from now on a dial is neither accepted nor refused. To be held.
    pub(crate) fn listen_but_never_accept(&mut self) -> Vec<TcpStream> {
        if let Listener::Closed(fd) = &self.listener {
            rustix::net::listen(fd, 0).unwrap();
            self.listener = Listener::Open(TcpListener::from(fd.try_clone().unwrap()));
        }
        crate::steps::fill(std::net::SocketAddr::from(([127, 0, 0, 1], self.port)))
    }

    /// The connection that the wrapper dials, nothing done with it.
    pub(crate) fn accept_only(&mut self) -> Result<(), String> {
        self.listen();
        self.wire = Some(Wire::new(self.accept()?));
        Ok(())
    }

    /// Whether somebody has dialled and was not accepted.
    pub(crate) fn is_dialled(&self) -> bool {
        matches!(&self.listener, Listener::Open(listener) if wait_readable(listener, Instant::now()).is_ok())
    }

    /// The connection as it is: after [`Server::accept_only`] without TLS.
    pub(crate) fn held(&mut self) -> &mut Wire {
        self.wire.as_mut().unwrap()
    }

    /// From where the connection was dialled.
    pub(crate) fn dialled_from(&mut self) -> std::net::IpAddr {
        let peer = rustix::net::getpeername(self.held().stream().input()).unwrap().unwrap();
        std::net::SocketAddr::try_from(peer).unwrap().ip()
    }

    /// Does the handshake on the connection that was only accepted.
    pub(crate) fn secure(&mut self) -> Result<(), String> {
        let tls = self.certificate.server();
        self.held().secure(tls)
    }

    /// Takes the header that comes behind the client's handshake, on the connection that was only accepted, and goes on as
    /// the way has it.
    pub(crate) fn be_told(&mut self) -> Result<(), String> {
        if self.way.is_late() {
            self.held().proxy_header().map_err(|e| format!("backend: {e}"))?;
        }
        if self.way.secures_host() { self.secure().map_err(|e| format!("backend: {e}")) } else { Ok(()) }
    }

    /// The connection goes, as it is: closed, or reset where its end was made so.
    pub(crate) fn take(&mut self) -> Wire {
        self.wire.take().unwrap()
    }

    /// What the next dial meets. `Accepts` is played by the script through `wire`; the others by a thread that ends with
    /// its connection.
    pub(crate) fn play(&mut self, what: Backend) {
        if what == Backend::Refused {
            return;
        }
        self.listen();
        let Listener::Open(listener) = &self.listener else { return };
        if what == Backend::Accepts {
            return;
        }
        let (listener, certificate) = (listener.try_clone().unwrap(), Arc::clone(&self.certificate));
        let is_late = self.way.is_late();
        thread::spawn(move || {
            if wait_readable(&listener, Instant::now() + PATIENCE).is_err() {
                return;
            }
            let Ok((socket, _)) = listener.accept() else { return };
            let mut wire = Wire::new(socket);
            if is_late && wire.proxy_header().is_err() {
                return;
            }
            match what {
                Backend::Accepts | Backend::Refused => {}
                Backend::Plaintext => wire.send(b"220 plain.example ESMTP\r\n"),
                Backend::NoHandshake => {}
                Backend::Untrusted => return drop(wire.secure(Certificate::new().server())),
                Backend::Silent => {
                    let _ = wire.secure(certificate.server()).and_then(|()| wire.rest());
                    return;
                }
            }
            let _ = wire.rest();
        });
    }

    /// The connection that the wrapper dials, its TLS done if it has one; waits for it where there is none yet.
    pub(crate) fn wire(&mut self) -> Result<&mut Wire, String> {
        if self.wire.is_none() {
            self.accept_only()?;
            self.be_told()?;
        }
        self.wire.as_mut().ok_or_else(|| "backend: no connection".to_owned())
    }

    /// The connection of a hand-over that failed is looked at no more; what it had got unasked.
    pub(crate) fn forget(&mut self) -> Vec<u8> {
        self.wire.take().map_or_else(Vec::new, |mut wire| wire.left_over())
    }

    fn accept(&self) -> Result<TcpStream, String> {
        let Listener::Open(listener) = &self.listener else { return Err("backend: closed".to_owned()) };
        wait_readable(listener, Instant::now() + PATIENCE).map_err(|e| format!("the backend was not dialled: {e}"))?;
        listener.accept().map(|(socket, _)| socket).map_err(|e| e.to_string())
    }
}
