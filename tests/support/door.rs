//! The program as a UCSPI child: started with one TCP socket as fds 0 and 1, as tcpserver does, or with another shape of
//! client; a puppet as PROG and a backend on 127.0.0.1.

use std::ffi::OsString;
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, SignatureScheme, SupportedProtocolVersion,
};
use starttls_wrapper::session::Way;
use tempfile::TempDir;

use crate::backend::{Certificate, Server};
use crate::child::{Child, puppet};
use crate::policy::way_options;
use crate::stream::{Stream, wait_until};
use crate::wire::{PATIENCE, Wire};

/// The certificate of this test run: the wrapper's and the backend's.
pub(crate) fn certificate() -> Arc<Certificate> {
    static CERTIFICATE: OnceLock<Arc<Certificate>> = OnceLock::new();
    Arc::clone(CERTIFICATE.get_or_init(|| Arc::new(Certificate::new())))
}

/// The program, running; killed when this goes.
pub(crate) struct Door {
    pub(crate) client: Option<Wire>,
    pub(crate) backend: Server,
    pub(crate) puppets: UnixListener,
    /// The fresh child of the way `respawn`.
    pub(crate) fresh: Option<Child>,
    /// The program's own fd 0, where [`Start::keep`] asked for it.
    pub(crate) kept: Option<OwnedFd>,
    /// Where a program that listens does so.
    pub(crate) address: Option<SocketAddr>,
    pub(crate) program: std::process::Child,
    folder: TempDir,
}

/// What the client is to the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One TCP socket as fds 0 and 1: tcpserver.
    Tcp,
    /// One TCP socket as fds 0, 1 and 2: inetd.
    Inetd,
    /// One of a pair of UNIX stream sockets.
    Pair,
    /// One of a pair of UNIX sockets that keep the bounds of each write.
    Packets,
    /// Two pipes.
    Pipes,
    /// A connection to the program, which listens.
    Listener,
}

/// How the program is started.
pub(crate) struct Start<'a> {
    /// Its options.
    pub(crate) options: &'a [&'a str],
    /// Whether it gets `--cert` and `--key`.
    pub(crate) certificate: bool,
    /// More of its environment.
    pub(crate) environment: &'a [(&'a str, &'a str)],
    /// PROG and its arguments instead of the puppet.
    pub(crate) program: Option<&'a [&'a str]>,
    /// The puppet's second argument.
    pub(crate) mode: &'a str,
    /// The descriptors of the client.
    pub(crate) shape: Shape,
    /// The program that executes ours, and its arguments: `prlimit`, `env`, a shell.
    pub(crate) through: &'a [&'a str],
    /// Whether the program's fd 0 stays open here too, so that its open file can be looked at.
    pub(crate) keep: bool,
    /// Whom the program runs as, where that is somebody else.
    pub(crate) uid: Option<u32>,
    /// HOST: the backend listens on 127.0.0.1. `unix:PATH` is the test's own.
    pub(crate) host: &'a str,
    /// `--way`.
    pub(crate) way: Way,
    /// The UCSPI-TLS server that it runs under, in this mode (`tests/hostile/ucspi_tls_server.py`).
    pub(crate) tls_server: Option<&'a str>,
    /// Whether it gets `--trusted-loopback`, where it can: HOST is on loopback, of which it would warn.
    pub(crate) trusted: bool,
}

impl Start<'_> {
    /// What [`Default`] is, for constants.
    pub(crate) const USUAL: Self = Self {
        options: &[],
        certificate: true,
        environment: &[],
        program: None,
        mode: "plain",
        shape: Shape::Tcp,
        through: &[],
        keep: false,
        uid: None,
        host: "127.0.0.1",
        way: Way::Tls,
        tls_server: None,
        trusted: true,
    };

    /// What the way needs to be played: the UCSPI-TLS server, or what `--mute` is to replay.
    pub(crate) fn by(way: Way) -> Self {
        let environment: &[(&str, &str)] = match way {
            Way::Mute => &[("STARTTLS_REPLAY", "EHLO client.example")],
            _ => &[],
        };
        Self { way, tls_server: way.is_ucspi_tls().then_some("serve"), environment, ..Self::USUAL }
    }
}

impl Default for Start<'_> {
    fn default() -> Self {
        Self::USUAL
    }
}

impl Door {
    /// Starts the program and connects a client to it.
    pub(crate) fn open(start: &Start<'_>) -> Self {
        let mut door = Self::start(start);
        if door.address.is_some() {
            door.connect();
        }
        door
    }

    /// Starts the program; one that listens has no client yet.
    pub(crate) fn start(start: &Start<'_>) -> Self {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        let certificate = certificate();
        let backend = Server::new(Arc::clone(&certificate), start.way);
        let puppets = UnixListener::bind(path("puppets")).unwrap();
        let address = (start.shape == Shape::Listener).then(free_address);
        let (client, input, output, port) = descriptors(start.shape);

        let mut program = PathBuf::from(env!("CARGO_BIN_EXE_starttls-wrapper"));
        if start.uid.is_some() {
            // Where the program was built somebody else may not enter.
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
            // By a process of its own: what a fork of another test has open for writing can't be executed.
            assert!(Command::new("cp").arg(&program).arg(path("program")).status().unwrap().success());
            program = path("program");
        }
        if start.certificate && (start.way.ends_tls() || start.tls_server.is_some()) {
            fs::write(path("cert.pem"), &certificate.certificate_pem).unwrap();
            fs::write(path("key.pem"), &certificate.key_pem).unwrap();
        }
        let mut words: Vec<OsString> = start.through.iter().map(Into::into).collect();
        if let Some(mode) = start.tls_server {
            const SERVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hostile/ucspi_tls_server.py");
            words.extend(["/usr/bin/python3", "-I", SERVER, mode].map(Into::into));
            words.extend([path("cert.pem").into(), path("key.pem").into()]);
        }
        words.push(program.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        if let Some(uid) = start.uid {
            command.uid(uid).gid(uid);
        }
        command.args(start.options);
        if let Some(address) = &address {
            if !start.options.contains(&"--workers") {
                command.args(["--workers", "1"]);
            }
            command.args(["--listen", &address.to_string()]);
            if !start.options.iter().any(|option| option.starts_with("--lazy")) {
                // A puppet says nothing by itself.
                command.arg("--lazy=no");
            }
        }
        if start.certificate && start.way.ends_tls() {
            command.arg("--cert").arg(path("cert.pem")).arg("--key").arg(path("key.pem"));
        }
        command.args(way_options(start.way));
        if start.trusted && start.way.dials() {
            command.arg("--trusted-loopback");
        }
        if start.way.dials() {
            command.arg(start.host);
        }
        if start.way.dials() && !start.host.starts_with("unix:") {
            command.arg(backend.port().to_string());
        }
        match start.program {
            Some(program) => command.args(program),
            None => command.arg(puppet()).arg(path("puppets")).arg(start.mode),
        };
        command.env_clear().env("PROTO", "TCP").env("TCPREMOTEIP", "127.0.0.1");
        command.env("TCPREMOTEPORT", port.to_string()).env("TCPLOCALIP", "127.0.0.1");
        command.env("RUST_LOG", "info").envs(start.environment.iter().copied());
        let kept = start.keep.then(|| input.try_clone().unwrap());
        if start.shape == Shape::Inetd {
            command.stderr(output.try_clone().unwrap());
        } else {
            command.stderr(fs::File::create(path("stderr")).unwrap());
        }
        command.stdin(input).stdout(output);
        let program = command.spawn().unwrap();
        // `command` still holds our copies of the program's socket: while it lives the client sees no end.
        drop(command);
        let client = Some(Wire::over(client));
        Self { client, backend, puppets, fresh: None, kept, address, program, folder }
    }

    /// No puppet is waited for any more.
    pub(crate) fn forget_puppets(&self) {
        rustix::net::shutdown(&self.puppets, rustix::net::Shutdown::Both).unwrap();
    }

    /// A new client of a program that listens, once it does.
    pub(crate) fn connect(&mut self) {
        let address = self.address.unwrap();
        let listens = wait_until(PATIENCE, || self.said().contains("listening on "));
        assert!(listens, "it does not listen: {}", self.said());
        let client = TcpStream::connect(address).unwrap();
        client.set_nodelay(true).unwrap();
        self.client = Some(Wire::over(Stream::socket(client)));
    }

    /// The fresh child, which greets inside TLS; waits for it where there is none yet.
    pub(crate) fn fresh(&mut self) -> Result<&mut Child, String> {
        if self.fresh.is_none() {
            self.fresh = Some(Child::accept(&self.puppets)?);
        }
        self.fresh.as_mut().ok_or_else(|| "no fresh child".to_owned())
    }

    /// The program's pid.
    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.program)
    }

    /// What the program has used of a processor, in user and system mode (proc(5): stat, fields 14 and 15, in ticks of
    /// 10 ms, which Linux shows to programs everywhere).
    pub(crate) fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.program.id())).unwrap();
        let behind_name = stat.rsplit_once(')').unwrap().1;
        let ticks: u64 =
            behind_name.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(10 * ticks)
    }

    /// Waits for the program's end.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus, String> {
        let mut ended = None;
        wait_until(PATIENCE, || {
            ended = self.program.try_wait().unwrap();
            ended.is_some()
        });
        ended.ok_or_else(|| format!("the program does not end; stderr: {}", self.said()))
    }

    /// Its exit code; no other end than an exit, and this within the patience.
    pub(crate) fn code(&mut self) -> i32 {
        let status = self.wait().unwrap_or_else(|why| panic!("{why}"));
        status.code().unwrap_or_else(|| panic!("{status}; stderr: {}", self.said()))
    }

    /// Sends a signal to the program.
    pub(crate) fn kill(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// A field of the program's status, in KiB (proc(5)): VmHWM is the most memory that it ever had resident.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let line = self.status(field);
        line.strip_suffix(" kB").and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{field}: {line}"))
    }

    /// Whether SIGINT and SIGTERM are something that the program reads by now. While it starts its child all signals are
    /// blocked for a moment, which is something else.
    pub(crate) fn reads_signals(&self) -> bool {
        u64::from_str_radix(&self.status("SigBlk"), 16).is_ok_and(|bits| bits == 1 << 1 | 1 << 14)
    }

    fn status(&self, field: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.program.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {field}: {status}")).trim().to_owned()
    }

    /// The state letter of the program (proc(5)): S sleeps, T is stopped, Z is dead and not reaped.
    pub(crate) fn state(&self) -> char {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.program.id())).unwrap();
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap()
    }

    /// A file of this door's own folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What the program has said on stderr.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.path().join("stderr")).unwrap_or_default()).into_owned()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// Our side of the client, the program's fds 0 and 1, and the port that goes into its environment.
fn descriptors(shape: Shape) -> (Stream, OwnedFd, OwnedFd, u16) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let pair = |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let one = |ours: OwnedFd, theirs: OwnedFd, port| (Stream::socket(ours), theirs.try_clone().unwrap(), theirs, port);
    match shape {
        Shape::Tcp | Shape::Inetd => {
            let (client, server) = connect();
            let port = client.local_addr().unwrap().port();
            one(client.into(), server.into(), port)
        }
        Shape::Pair | Shape::Packets => {
            let kind = if shape == Shape::Pair { SocketType::STREAM } else { SocketType::SEQPACKET };
            let (ours, theirs) = pair(kind);
            one(ours, theirs, 0)
        }
        // The client comes later.
        Shape::Listener => {
            let (ours, theirs) = pair(SocketType::STREAM);
            one(ours, theirs, 0)
        }
        Shape::Pipes => {
            let ((theirs_in, ours_out), (ours_in, theirs_out)) = (pipe(), pipe());
            (Stream::pipes(ours_in, ours_out), theirs_in, theirs_out, 0)
        }
    }
}

/// One that nobody else listens on. Not the kernel's choice: a listener's sockets share their port with whoever asks (SO_REUSEPORT),
/// and it may choose one twice.
pub(crate) fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let port = 10_000 + std::process::id() % 20_000;
    SocketAddr::from(([127, 80 + high, low, 1], port.try_into().unwrap()))
}

/// A connection over loopback, both of its ends.
fn connect() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_nodelay(true).unwrap();
    let (server, _) = listener.accept().unwrap();
    (client, server)
}

/// A TLS client that trusts the certificate of this test run and no other.
pub(crate) fn tls_client() -> Connection {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    tls_client_by(CONFIG.get_or_init(|| Arc::new(trusting(Some(&certificate()), rustls::DEFAULT_VERSIONS))))
}

/// One that trusts this certificate alone.
pub(crate) fn tls_client_of(certificate: &Certificate) -> Connection {
    tls_client_by(&Arc::new(trusting(Some(certificate), rustls::DEFAULT_VERSIONS)))
}

/// One that trusts anybody.
pub(crate) fn credulous_tls_client() -> Connection {
    tls_client_by(&Arc::new(trusting(None, rustls::DEFAULT_VERSIONS)))
}

fn tls_client_by(config: &Arc<ClientConfig>) -> Connection {
    let name = ServerName::try_from("localhost").unwrap();
    Connection::Client(ClientConnection::new(Arc::clone(config), name).unwrap())
}

/// What such a client is made from.
pub(crate) fn trusting(
    certificate: Option<&Certificate>,
    versions: &[&'static SupportedProtocolVersion],
) -> ClientConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let only = Arc::new(OnlyOurs { provider, leaf: certificate.map(|one| one.leaf().clone()) });
    let builder = ClientConfig::builder_with_protocol_versions(versions);
    builder.dangerous().with_custom_certificate_verifier(only).with_no_client_auth()
}

#[derive(Debug)]
struct OnlyOurs {
    provider: Arc<CryptoProvider>,
    leaf: Option<CertificateDer<'static>>,
}

impl ServerCertVerifier for OnlyOurs {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.leaf.as_ref().is_none_or(|leaf| leaf == end_entity) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::General("not the certificate of this test run".to_owned()))
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
