//! An SMTP client that waits for each reply, in plaintext, by STARTTLS, or in TLS from the first octet.

use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use crate::cipher::Cipher;
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, CommonState, HandshakeKind, RootCertStore, StreamOwned};

/// Octets asked for in one read; rustls would ask for 4 KiB.
const BLOCK: usize = 256 * 1024;

/// When TLS begins.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tls {
    Never,
    ByCommand,
    /// Never, though STARTTLS is said: to see what a relay that reads nothing costs without it.
    Promised,
    /// The same, a cipher's work being done over all that is said and read.
    Paced,
    AtOnce,
}

/// Where to connect to and how; shared by all sessions of a run.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) port: u16,
    pub(crate) tls: Tls,
    pub(crate) patience: Duration,
    pub(crate) config: Option<Arc<ClientConfig>>,
}

impl Server {
    /// `ca` holds what the server's certificate is checked against. With `resume`, tickets are kept between sessions.
    pub(crate) fn new(port: u16, tls: Tls, ca: Option<&str>, resume: bool, patience: Duration) -> io::Result<Self> {
        let config = ca.map(|ca| config(ca, resume)).transpose()?;
        if tls != Tls::Never && config.is_none() {
            return Err(io::Error::other("TLS needs --ca"));
        }
        Ok(Self { port, tls, patience, config })
    }

    /// Connects; the greeting is not read yet.
    pub(crate) fn connect(&self) -> io::Result<Client> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let socket = TcpStream::connect_timeout(&address, self.patience)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(self.patience))?;
        socket.set_write_timeout(Some(self.patience))?;
        let ends = Ends(BufReader::with_capacity(BLOCK, socket), None);
        let mut client = Client { wire: Wire::Plain(ends), held: Vec::new() };
        if self.tls == Tls::AtOnce {
            client.secure(self)?;
        }
        Ok(client)
    }

    /// A session whose EHLO is answered, inside TLS if there is to be any.
    pub(crate) fn open(&self) -> io::Result<Client> {
        let mut client = self.connect()?;
        client.expect(220)?;
        client.hello(self)?;
        Ok(client)
    }
}

fn config(ca: &str, resume: bool) -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(io::Error::other)? {
        roots.add(certificate.map_err(io::Error::other)?).map_err(io::Error::other)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    if !resume {
        config.resumption = Resumption::disabled();
    }
    Ok(Arc::new(config))
}

/// One session, as the client sees it.
pub(crate) struct Client {
    wire: Wire,
    held: Vec<u8>,
}

impl Client {
    /// EHLO, and STARTTLS and EHLO again where that is the server's way.
    pub(crate) fn hello(&mut self, server: &Server) -> io::Result<()> {
        self.ask("EHLO client.example", 250)?;
        if matches!(server.tls, Tls::ByCommand | Tls::Promised | Tls::Paced) {
            self.ask("STARTTLS", 220)?;
            if server.tls == Tls::ByCommand {
                self.secure(server)?;
            } else if server.tls == Tls::Paced
                && let Wire::Plain(ends) = &mut self.wire
            {
                ends.1 = Some(Cipher::new()?);
            }
            self.ask("EHLO client.example", 250)?;
        }
        Ok(())
    }

    pub(crate) fn secure(&mut self, server: &Server) -> io::Result<()> {
        let Wire::Plain(ends) = std::mem::replace(&mut self.wire, Wire::Gone) else {
            return Err(io::Error::other("TLS inside TLS"));
        };
        if !self.held.is_empty() || !ends.0.buffer().is_empty() {
            return Err(io::Error::other("plaintext behind the reply to STARTTLS"));
        }
        let config = server.config.clone().ok_or_else(|| io::Error::other("no TLS configuration"))?;
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(connection, ends);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        self.wire = Wire::Secure(Box::new(stream));
        Ok(())
    }

    /// What was negotiated, and whether the session was resumed; nothing in plaintext.
    pub(crate) fn negotiated(&self) -> Option<(String, bool)> {
        let Wire::Secure(stream) = &self.wire else { return None };
        let resumed = stream.conn.handshake_kind() == Some(HandshakeKind::Resumed);
        Some((agreed(&stream.conn)?, resumed))
    }

    pub(crate) fn ask(&mut self, command: &str, code: u16) -> io::Result<()> {
        self.send(format!("{command}\r\n").as_bytes())?;
        self.expect(code).map_err(|error| io::Error::new(error.kind(), format!("{command}: {error}")))
    }

    pub(crate) fn send(&mut self, octets: &[u8]) -> io::Result<()> {
        self.wire.write_all(octets)?;
        self.wire.flush()
    }

    /// Reads to the final line of a reply, which must be all that came, and bear this code.
    pub(crate) fn expect(&mut self, code: u16) -> io::Result<()> {
        loop {
            let mut from = 0;
            while let Some(length) = self.held[from..].iter().position(|octet| *octet == b'\n') {
                let line = &self.held[from..from + length];
                from += length + 1;
                if line.get(3) != Some(&b'-') {
                    let said = String::from_utf8_lossy(line).trim().to_owned();
                    self.held.drain(..from);
                    let right = said.starts_with(&code.to_string());
                    return if right {
                        Ok(())
                    } else {
                        Err(io::Error::other(format!("expected {code}, got {said:?}")))
                    };
                }
            }
            self.held.drain(..from);
            let mut block = [0; 4096];
            match self.wire.read(&mut block)? {
                0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("closed, expected {code}"))),
                count => self.held.extend_from_slice(&block[..count]),
            }
        }
    }

    /// Reads a reply of 250 that is so many octets long, in large blocks; returns the last ones.
    pub(crate) fn drain(&mut self, octets: usize) -> io::Result<Vec<u8>> {
        let mut block = vec![0; BLOCK];
        let (mut left, mut last) = (octets, Vec::new());
        while left > 0 {
            let room = left.min(BLOCK);
            match self.wire.read(&mut block[..room])? {
                0 => {
                    let got = octets - left;
                    return Err(io::Error::other(format!("closed after {got} of {octets} octets of a reply")));
                }
                count if left == octets && !block[..count].starts_with(b"250-") => {
                    let said = String::from_utf8_lossy(&block[..count.min(64)]).trim().to_owned();
                    return Err(io::Error::other(format!("expected a long reply, got {said:?}")));
                }
                count => {
                    left -= count;
                    last.extend_from_slice(&block[count.saturating_sub(64)..count]);
                    last.drain(..last.len().saturating_sub(64));
                }
            }
        }
        Ok(last)
    }

    pub(crate) fn envelope(&mut self) -> io::Result<()> {
        self.ask("MAIL FROM:<alice@client.example>", 250)?;
        self.ask("RCPT TO:<bob@localhost>", 250)
    }

    /// A mail of this text, which ends in CR LF.
    pub(crate) fn letter(&mut self, text: &[u8]) -> io::Result<()> {
        self.envelope()?;
        self.ask("DATA", 354)?;
        self.wire.write_all(text)?;
        self.send(b".\r\n")?;
        self.expect(250)
    }

    /// QUIT; then the connection is read to its end, so that the server is not cut short.
    pub(crate) fn quit(&mut self) -> io::Result<()> {
        self.ask("QUIT", 221)
    }

    /// After `quit`: waits for the server to close. How it does so is not judged.
    pub(crate) fn leave(mut self) {
        if let Wire::Secure(stream) = &mut self.wire {
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
        let mut block = [0; 4096];
        while matches!(self.wire.read(&mut block), Ok(1..)) {}
        if let Some(socket) = self.wire.socket() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// The socket, read through a large buffer, and what is done over each octet at TLS' pace.
struct Ends(BufReader<TcpStream>, Option<Cipher>);

impl Read for Ends {
    fn read(&mut self, block: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(block)?;
        self.1.as_mut().map_or(Ok(()), |cipher| cipher.work_over(&block[..count]))?;
        Ok(count)
    }
}

impl Write for Ends {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        match &mut self.1 {
            Some(cipher) => cipher.write(self.0.get_mut(), octets),
            None => self.0.get_mut().write(octets),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Wire {
    Plain(Ends),
    Secure(Box<StreamOwned<ClientConnection, Ends>>),
    /// A handshake failed.
    Gone,
}

impl Wire {
    fn socket(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(ends) => Some(ends.0.get_ref()),
            Self::Secure(stream) => Some(stream.sock.0.get_ref()),
            Self::Gone => None,
        }
    }
}

impl Read for Wire {
    fn read(&mut self, block: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(ends) => ends.read(block),
            Self::Secure(stream) => stream.read(block),
            Self::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(ends) => ends.write(octets),
            Self::Secure(stream) => stream.write(octets),
            Self::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Secure(stream) => stream.flush(),
            Self::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// Version, suite and group of a handshake that is done.
pub(crate) fn agreed(side: &CommonState) -> Option<String> {
    let (version, suite) = (side.protocol_version()?, side.negotiated_cipher_suite()?.suite());
    Some(format!("{version:?} {suite:?} {:?}", side.negotiated_key_exchange_group()?.name()))
}
