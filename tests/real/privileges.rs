//! Privileges: PROG keeps the right to gain some (qmail-queue is setuid), and the wrapper gives its own up.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use starttls_wrapper::cli::OWN_VARIABLES;

use crate::backends::stunnel;
use crate::clients::{Mode, swaks};
use crate::front::{Identity, tcpserver_with, wrapper, wrapper_by};
use crate::letter::{Queue, RECIPIENT, SENDER, assert_same, letter};
use crate::stage::{Stage, needs_root, wait_for};

/// Users that exist on no machine; numbers are all that is needed.
const SMTPD: u32 = 64020;
const QUEUE: u32 = 64021;
const TLS: u32 = 64022;

/// A qmail home whose bin/qmail-queue is setuid to [`QUEUE`] and writes where [`SMTPD`] may not.
pub(crate) struct QmailHome(PathBuf);

impl QmailHome {
    #[track_caller]
    pub(crate) fn new(stage: &Stage) -> Self {
        needs_root();
        let home = stage.path("qmail");
        for part in ["bin", "queue"] {
            fs::create_dir_all(home.join(part)).expect("a qmail home");
        }
        let (program, queue) = (home.join("bin/qmail-queue"), home.join("queue"));
        let mut compile = stage.command(["gcc", "-Wall", "-Werror", "-O", "-o"]);
        compile.arg(&program).arg(format!("-DFOLDER=\"{}\"", queue.display()));
        compile.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/real/qmail_queue.c"));
        stage.run(&mut compile, b"").succeeded("gcc");
        chown(&queue, Some(QUEUE), Some(QUEUE)).expect("chown");
        fs::set_permissions(&queue, fs::Permissions::from_mode(0o755)).expect("chmod");
        chown(&program, Some(QUEUE), Some(QUEUE)).expect("chown");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).expect("chmod");
        Self(home)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.0
    }

    #[track_caller]
    pub(crate) fn holds(&self, letter: &[u8]) {
        let envelope = wait_for("an envelope", || {
            fs::read(self.0.join("queue/envelope")).ok().filter(|text| text.ends_with(b"\0\0"))
        });
        assert_same(&envelope, format!("F{SENDER}\0T{RECIPIENT}\0\0").as_bytes());
        assert_same(&fs::read(self.0.join("queue/letter")).expect("a letter"), letter);
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(self.0.join("queue/letter")).expect("a letter"));
        assert_eq!(owner, QUEUE, "the letter's owner is the setuid program's");
    }
}

/// The file system honours setuid bits, and without the bit the same program fails: what the tests below rest on.
#[test]
fn the_setuid_program_of_these_tests_needs_its_bit() {
    let stage = Stage::new();
    let home = QmailHome::new(&stage);
    let program = home.0.join("bin/qmail-queue");
    let run = |through: &[&str]| {
        let mut command = stage.command(through);
        let output = stage.run(command.arg(&program).env("PATH", "/usr/bin:/bin"), b"x");
        output.status.code()
    };
    let as_smtpd = ["setpriv", "--reuid=64020", "--regid=64020", "--clear-groups"];
    let without_gain = [&as_smtpd[..], &["--no-new-privs"]].concat();
    assert_eq!(run(&without_gain), Some(120), "no_new_privs takes the bit's effect away");
    assert_eq!(run(&as_smtpd), Some(0), "{} must be on a file system without nosuid", program.display());
}

/// tcpserver -u, the usual way to run qmail-smtpd: the wrapper has no privileges from the start.
#[test]
fn a_child_delivers_through_a_setuid_program_under_tcpserver_u() {
    let stage = Stage::new();
    let (identity, home, backend) =
        (Identity::self_signed(&stage, "own"), QmailHome::new(&stage), Queue::new(&stage, "backend"));
    chown(&identity.key, Some(SMTPD), Some(SMTPD)).expect("chown");
    let server = stunnel(&stage, &identity, "TLSv1.3", &backend);
    let argv = wrapper(&identity, &[], server, &["mailfront", "smtp", "qmail", "accept"]);
    let at = tcpserver_with(&stage, "front", &["-u", "64020", "-g", "64020"], &argv, |command| {
        command.env("QMAILHOME", &home.0);
    });
    let text = letter("setuid");
    swaks(&stage, at, Mode::Clear, &identity, &text);
    home.holds(&text);
    swaks(&stage, at, Mode::Tls13, &identity, &text);
    backend.holds(&text);
}

/// TLS_UID and TLS_GID: the wrapper reads the key as root and is [`TLS`] when the client is first heard; PROG has what it had.
#[test]
fn a_child_delivers_through_a_setuid_program_while_the_wrapper_has_dropped_its_ids() {
    let stage = Stage::new();
    let (identity, home, backend) =
        (Identity::self_signed(&stage, "own"), QmailHome::new(&stage), Queue::new(&stage, "backend"));
    let server = stunnel(&stage, &identity, "TLSv1.3", &backend);
    fs::set_permissions(&identity.key, fs::Permissions::from_mode(0o600)).expect("chmod");
    let smtpd = ["setpriv", "--reuid=64020", "--regid=64020", "--clear-groups", "mailfront", "smtp", "qmail", "accept"];
    let argv = wrapper(&identity, &[], server, &smtpd);
    let at = tcpserver_with(&stage, "front", &[], &argv, |command| {
        command.env("QMAILHOME", &home.0).env("TLS_UID", TLS.to_string()).env("TLS_GID", TLS.to_string());
    });
    let text = letter("dropped");
    swaks(&stage, at, Mode::Clear, &identity, &text);
    home.holds(&text);
    swaks(&stage, at, Mode::Tls13, &identity, &text);
    backend.holds(&text);
}

/// The same where a fresh PROG goes on behind TLS: it is no child of the process that has given all up.
#[test]
fn a_fresh_child_delivers_through_a_setuid_program_while_the_wrapper_has_dropped_its_ids() {
    let stage = Stage::new();
    let (identity, home) = (Identity::self_signed(&stage, "own"), QmailHome::new(&stage));
    fs::set_permissions(&identity.key, fs::Permissions::from_mode(0o600)).expect("chmod");
    let smtpd = ["setpriv", "--reuid=64020", "--regid=64020", "--clear-groups", "mailfront", "smtp", "qmail", "accept"];
    let argv = wrapper_by(&identity, "respawn", &[], &smtpd);
    let at = tcpserver_with(&stage, "front", &[], &argv, |command| {
        command.env("QMAILHOME", &home.0).env("TLS_UID", TLS.to_string()).env("TLS_GID", TLS.to_string());
    });
    let text = letter("respawned");
    swaks(&stage, at, Mode::Tls13, &identity, &text);
    home.holds(&text);
    // The summary is the session's last word, behind its letter's.
    stage.wait_until_childless("front");
    assert!(stage.log("front").contains(" mode=tls "), "{}", stage.log("front"));
}

/// What /proc says of the two processes once the greeting is out.
#[test]
fn the_wrapper_gives_up_what_the_child_keeps() {
    use std::io::Read;
    needs_root();
    let stage = Stage::new();
    let (identity, nobody) = (Identity::self_signed(&stage, "own"), stage.unused_port());
    fs::set_permissions(&identity.key, fs::Permissions::from_mode(0o600)).expect("chmod");
    // Signals that supervisors and shells leave ignored.
    let mut argv: Vec<OsString> = vec!["env".into(), "--ignore-signal=HUP,USR1,USR2,TSTP".into()];
    argv.extend(wrapper(&identity, &[], nobody, &["mailfront", "smtp", "echo", "accept"]));
    let at = tcpserver_with(&stage, "front", &[], &argv, |command| {
        command.envs(OWN_VARIABLES.map(|name| (name, "/nonexistent")));
        command.env("TLS_UID", TLS.to_string()).env("TLS_GID", TLS.to_string()).env("CAFILE", &identity.certificate);
    });
    let mut client = std::net::TcpStream::connect(at).expect("connect");
    client.set_read_timeout(Some(crate::stage::PATIENCE)).expect("time-out");
    // The reply to EHLO, not the greeting, shows that the client has been read, and so that the ids are dropped.
    std::io::Write::write_all(&mut client, b"EHLO a\r\n").expect("write");
    let mut reply = Vec::new();
    while !String::from_utf8_lossy(&reply).lines().any(|line| line.starts_with("250 ")) {
        let mut octet = [0];
        client.read_exact(&mut octet).expect("a reply");
        reply.push(octet[0]);
    }
    let [wrapper] = stage.processes_named("starttls-wrapp")[..] else { panic!("one wrapper") };
    let [child] = stage.processes_named("mailfront")[..] else { panic!("one child") };
    let field = |pid: i32, name: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let ids = vec![TLS.to_string(); 4];
    assert_eq!((field(wrapper, "Uid:"), field(wrapper, "Gid:")), (ids.clone(), ids));
    assert!(field(wrapper, "Groups:").iter().all(|group| *group == TLS.to_string()), "root's groups are gone");
    assert_eq!(field(wrapper, "NoNewPrivs:"), ["1"]);
    assert_eq!((field(child, "Uid:"), field(child, "NoNewPrivs:")), (vec!["0".to_owned(); 4], vec!["0".to_owned()]));
    let signals = |name: &str| u64::from_str_radix(&field(child, name).concat(), 16).expect("a mask");
    // Signals 32 and 33 are glibc's own; its posix_spawn leaves them ignored in every program.
    assert_eq!((signals("SigBlk:"), signals("SigIgn:") & !0x1_8000_0000), (0, 0));
    let environment = fs::read(format!("/proc/{child}/environ")).expect("environment");
    for taken in OWN_VARIABLES {
        let start = format!("{taken}=");
        assert!(
            !environment.split(|&octet| octet == 0).any(|variable| variable.starts_with(start.as_bytes())),
            "{taken} reached PROG"
        );
    }
    assert!(
        environment.split(|&octet| octet == 0).any(|variable| variable.starts_with(b"TCPREMOTEIP=")),
        "PROG needs the client's address"
    );
    let mut open: Vec<String> = fs::read_dir(format!("/proc/{child}/fd"))
        .expect("fds")
        .map(|fd| fd.expect("fd").file_name().into_string().expect("a number"))
        .collect();
    open.sort();
    assert_eq!(open, ["0", "1", "2"]);
}
