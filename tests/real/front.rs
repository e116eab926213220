//! The wrapper in its usual place: under tcpserver, in front of mailfront, with stunnel and another mailfront as its backend.
//!
//! scripts/s6-tcpserver runs the same tests with s6-tcpserver in tcpserver's place.

use std::ffi::OsString;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::Command;

use crate::letter::Queue;
use crate::stage::{Stage, wait_for};

pub(crate) const MAILFRONT: [&str; 4] = ["mailfront", "smtp", "queuedir", "accept"];

/// A certificate and its key, made by openssl.
pub(crate) struct Identity {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Identity {
    /// Self-signed, for `localhost` and the stage's own address.
    pub(crate) fn self_signed(stage: &Stage, name: &str) -> Self {
        let alternatives = format!("subjectAltName=DNS:localhost,IP:{}", stage.unused_port().ip());
        Self::made_by_openssl(stage, name, &["-subj", "/CN=localhost", "-addext", &alternatives])
    }

    /// For one DNS name, signed by `authority`.
    pub(crate) fn signed(stage: &Stage, name: &str, dns: &str, authority: &Self) -> Self {
        let alternatives = format!("subjectAltName=DNS:{dns}");
        let (ca, ca_key) = (authority.certificate.to_string_lossy(), authority.key.to_string_lossy());
        let constraints = ["-addext", "basicConstraints=critical,CA:FALSE"];
        let options = [
            "-subj",
            "/CN=backend",
            "-addext",
            &alternatives,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            constraints[0],
            constraints[1],
        ];
        Self::made_by_openssl(stage, name, &options)
    }

    fn made_by_openssl(stage: &Stage, name: &str, options: &[&str]) -> Self {
        let made =
            Self { certificate: stage.path(&format!("{name}-cert.pem")), key: stage.path(&format!("{name}-key.pem")) };
        let mut command = stage.command([
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]);
        command.args(options).arg("-keyout").arg(&made.key).arg("-out").arg(&made.certificate);
        stage.run(&mut command, b"").succeeded("openssl req");
        made
    }
}

/// Every session of the front is over and left no process behind, neither a wrapper nor its child. All exit codes are 0, but that of a TLS
/// session may be 1: swaks and smtplib close without close_notify, which is breaking off, though they had said QUIT.
#[track_caller]
pub(crate) fn sessions_ended_well(stage: &Stage) {
    stage.wait_until_childless("front");
    wait_for("the last child to end", || {
        let left = [stage.processes_named("starttls-wrapp"), stage.processes_named("mailfront")].concat();
        left.is_empty().then_some(())
    });
    // A server reaps a session before it tells its end.
    let begins = |line: &&str| line.starts_with("tcpserver: pid ") || line.starts_with("s6-tcpserverd: info: accept ");
    let (log, ends) = wait_for("the server to tell each session's end", || {
        let log = stage.log("front");
        let ends: Vec<Option<i32>> = log.lines().filter_map(exit_code).collect();
        (!ends.is_empty() && ends.len() == log.lines().filter(begins).count()).then_some((log, ends))
    });
    let ended = |code: i32| ends.iter().filter(|&&end| end == Some(code)).count();
    let broken_off =
        log.lines().filter(|line| line.contains("client broke off") && !line.contains("mode=plain")).count();
    assert!(ended(1) == broken_off && ends.len() == ended(0) + broken_off, "{ends:?}\n{log}");
}

/// The exit code of the session whose end this line of a server's log tells; the inner `None` is a signal.
fn exit_code(line: &str) -> Option<Option<i32>> {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["tcpserver:", "end", _pid, "status", status] => {
            let status: i32 = status.parse().expect(line); // as wait(2) tells it
            Some((status & 0x7f == 0).then_some(status >> 8))
        }
        ["s6-tcpserverd:", "info:", "end", "pid", _pid, how, number, ..] => {
            let number = number.parse().expect(line);
            Some((how == "exitcode").then_some(number))
        }
        _ => None,
    }
}

/// `starttls-wrapper --cert C --key K --trusted-loopback OPTIONS... HOST PORT PROG...`
pub(crate) fn wrapper(identity: &Identity, options: &[&str], backend: SocketAddrV4, prog: &[&str]) -> Vec<OsString> {
    let mut argv: Vec<OsString> = vec![env!("CARGO_BIN_EXE_starttls-wrapper").into()];
    argv.extend(["--cert".into(), identity.certificate.clone().into(), "--key".into(), identity.key.clone().into()]);
    argv.push("--trusted-loopback".into());
    argv.extend(options.iter().map(OsString::from));
    argv.extend([backend.ip().to_string().into(), backend.port().to_string().into()]);
    argv.extend(prog.iter().map(OsString::from));
    argv
}

/// `starttls-wrapper --cert C --key K --way WAY --trusted-loopback SERVER... PROG...`
pub(crate) fn wrapper_by(identity: &Identity, way: &str, server: &[String], prog: &[&str]) -> Vec<OsString> {
    let mut argv: Vec<OsString> = vec![env!("CARGO_BIN_EXE_starttls-wrapper").into()];
    if !["raw", "ucspi-tls", "ucspi-tls-respawn"].contains(&way) {
        argv.extend(["--cert".into(), identity.certificate.clone().into()]);
        argv.extend(["--key".into(), identity.key.clone().into()]);
    }
    argv.extend(["--way".into(), way.into()]);
    if !server.is_empty() {
        argv.push("--trusted-loopback".into());
    }
    argv.extend(server.iter().map(OsString::from));
    argv.extend(prog.iter().map(OsString::from));
    argv
}

/// The folder with the programs of s6 and s6-networking, where tests are to run under these: scripts/s6-tcpserver sets the variable.
pub(crate) fn s6() -> Option<PathBuf> {
    std::env::var_os("S6").map(PathBuf::from)
}

/// tcpserver, or s6-tcpserver, with this command for every connection; its log, and all that its sessions write to stderr, is `NAME.log`.
#[track_caller]
pub(crate) fn tcpserver(stage: &Stage, name: &str, argv: &[OsString], queue: &Queue) -> SocketAddrV4 {
    tcpserver_with(stage, name, &[], argv, |command| {
        command.env("QUEUEDIR", queue.folder());
    })
}

/// The same with options (that both servers know) and whatever else `prepare` does to the command.
#[track_caller]
pub(crate) fn tcpserver_with(
    stage: &Stage,
    name: &str,
    options: &[&str],
    argv: &[OsString],
    prepare: impl FnOnce(&mut Command),
) -> SocketAddrV4 {
    let at = stage.unused_port();
    let mut command = match s6() {
        Some(folder) => stage.command([folder.join("s6-tcpserver"), "-v".into()]),
        None => stage.command(["tcpserver", "-v", "-H", "-R", "-l", "front.example"]),
    };
    command.args(options).arg(at.ip().to_string()).arg(at.port().to_string()).args(argv);
    prepare(&mut command);
    stage.start(name, &mut command, at);
    at
}

/// The usual place, whole: what most tests need.
pub(crate) struct Front {
    pub(crate) stage: Stage,
    pub(crate) identity: Identity,
    /// Where clients connect.
    pub(crate) at: SocketAddrV4,
    /// What went to the plaintext child.
    pub(crate) child: Queue,
    /// What went through TLS to the backend.
    pub(crate) backend: Queue,
}

impl Front {
    pub(crate) fn new(options: &[&str]) -> Self {
        let stage = Stage::new();
        let identity = Identity::self_signed(&stage, "own");
        let (child, backend) = (Queue::new(&stage, "child"), Queue::new(&stage, "backend"));
        let server = crate::backends::stunnel(&stage, &identity, "TLSv1.3", &backend);
        let argv = wrapper(&identity, options, server, &MAILFRONT);
        let at = tcpserver(&stage, "front", &argv, &child);
        Self { stage, identity, at, child, backend }
    }

    /// The letter arrived, the right way; every session is over and left nothing behind.
    #[track_caller]
    pub(crate) fn delivered(&self, through_tls: bool, letter: &[u8]) {
        let (there, not_there) = if through_tls { (&self.backend, &self.child) } else { (&self.child, &self.backend) };
        there.holds(letter);
        not_there.is_empty();
        sessions_ended_well(&self.stage);
    }
}
