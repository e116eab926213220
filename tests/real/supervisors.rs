//! The servers that start one wrapper per connection, tcpserver and s6-tcpserver aside (all other tests run under these): inetd, systemd,
//! and anything else that hands over one socket; and s6, which supervises a listener.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use crate::backends::stunnel;
use crate::clients::{Mode, swaks};
use crate::front::{Identity, MAILFRONT, wrapper};
use crate::letter::{Queue, letter};
use crate::privileges::QmailHome;
use crate::readme::{block_behind, with};
use crate::stage::{PATIENCE, Stage, needs_root, wait_for};

/// A front that something else than tcpserver starts: the wrapper as a shell script, since inetd takes neither environment nor long lines.
struct Supervised {
    stage: Stage,
    identity: Identity,
    child: Queue,
    backend: Queue,
    script: String,
}

impl Supervised {
    fn new() -> Self {
        let stage = Stage::new();
        let identity = Identity::self_signed(&stage, "own");
        let (child, backend) = (Queue::new(&stage, "child"), Queue::new(&stage, "backend"));
        let server = stunnel(&stage, &identity, "TLSv1.3", &backend);
        let words: Vec<String> = wrapper(&identity, &["-v"], server, &MAILFRONT)
            .iter()
            .map(|word| format!("'{}'", word.display()))
            .collect();
        let text = format!(
            "#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/bin QUEUEDIR='{}' exec {}\n",
            child.folder().display(),
            words.join(" ")
        );
        let script = stage.write("wrapped", text);
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
        let script = script.to_string_lossy().into_owned();
        Self { stage, identity, child, backend, script }
    }

    #[track_caller]
    fn delivers_both_ways(&self, at: std::net::SocketAddrV4) {
        let (clear, secret) = (letter("in-clear"), letter("through-tls"));
        swaks(&self.stage, at, Mode::Clear, &self.identity, &clear);
        self.child.holds(&clear);
        swaks(&self.stage, at, Mode::Tls13, &self.identity, &secret);
        self.backend.holds(&secret);
    }
}

#[test]
fn inetd_starts_it() {
    let front = Supervised::new();
    let at = front.stage.unused_port();
    // In debugging mode it stays in the foreground; fds 0, 1 and 2 of the service are the socket.
    let line = format!("{}:{} stream tcp nowait root {} wrapped\n", at.ip(), at.port(), front.script);
    let configuration = front.stage.write("inetd.conf", line);
    let inetd = concat!(env!("CARGO_MANIFEST_DIR"), "/target/mta/root/usr/sbin/inetd");
    crate::stage::needs_root();
    front.stage.start("inetd", front.stage.command([inetd, "-d"]).arg(configuration), at);
    front.delivers_both_ways(at);
}

#[test]
fn systemd_starts_it() {
    let front = Supervised::new();
    let at = front.stage.unused_port();
    let mut command = front.stage.command(["systemd-socket-activate", "--accept", "--inetd"]);
    command.arg(format!("--listen={}:{}", at.ip(), at.port())).arg(&front.script);
    front.stage.start("systemd", &mut command, at);
    front.delivers_both_ways(at);
}

/// inetd makes fd 2 the client's connection as well. What we have to say must not get into the dialogue.
#[test]
fn a_log_on_the_clients_own_socket_is_not_written() {
    let front = Supervised::new();
    let (mut client, server) = connected();
    let copy = |fd: &TcpStream| OwnedFd::from(fd.try_clone().expect("dup"));
    let mut command = front.stage.command([&front.script]);
    command.stdin(copy(&server)).stdout(copy(&server)).stderr(copy(&server));
    let mut session = command.spawn().expect("the wrapper");
    drop((command, server));
    // A second attempt at TLS and an injection: things that the log has something to say about.
    client.write_all(b"EHLO a\r\nSTARTTLS x\r\nNOOP\0\r\nSTARTTLS\r\nNOOP\r\n").expect("write");
    let mut dialogue = String::new();
    client.read_to_string(&mut dialogue).expect("replies");
    let status = wait_for("the session to end", || session.try_wait().expect("wait"));
    for line in dialogue.lines() {
        let code_and_separator = line
            .as_bytes()
            .get(..4)
            .is_some_and(|code| code[..3].iter().all(u8::is_ascii_digit) && b" -".contains(&code[3]));
        assert!(code_and_separator, "no reply: {line:?} in\n{dialogue}");
    }
    assert!(dialogue.ends_with("421 4.7.0 Bytes after STARTTLS, closing connection\r\n"), "{dialogue}");
    assert_eq!(status.code(), Some(1), "the client broke the rules");
}

/// The README's script, to the letter but for names: the socket is the fd holder's, so that who connects during a restart waits.
#[test]
fn s6_supervises_a_listener_and_its_fd_holder_keeps_the_socket() {
    needs_root();
    let stage = Stage::new();
    let (identity, home, backend) =
        (Identity::self_signed(&stage, "own"), QmailHome::new(&stage), Queue::new(&stage, "backend"));
    let server = stunnel(&stage, &identity, "TLSv1.3", &backend);
    for name in ["STORE", "RETRIEVE"] {
        stage.write(&format!("rules/uid/0/env/S6_FDHOLDER_{name}_REGEX"), "^smtp$\n");
    }
    stage.write("rules/uid/0/allow", "");
    let [holder, rules] = ["s", "rules"].map(|name| stage.path(name));
    let mut daemon = stage.command(["s6-fdholder-daemon", "-i"]);
    stage.start_until("holder", daemon.arg(rules).arg(&holder), "listen", || holder.exists());
    let socket = TcpListener::bind((stage.unused_port().ip().to_owned(), 0)).expect("bind");
    let std::net::SocketAddr::V4(at) = socket.local_addr().expect("address") else { panic!("no IPv4") };
    let mut store = stage.command(["s6-fdholder-store"]);
    let stored = store.arg(&holder).arg("smtp").stdin(OwnedFd::from(socket)).status().expect("s6-fdholder-store");
    assert!(stored.success(), "{stored}");

    let words = [
        ("/etc/ssl/mx.crt", identity.certificate.to_str().expect("a path")),
        ("/etc/ssl/mx.key", identity.key.to_str().expect("a path")),
        ("/service/fdholder/s", holder.to_str().expect("a path")),
        ("  starttls-wrapper", &format!("  '{}' -v", env!("CARGO_BIN_EXE_starttls-wrapper"))),
        ("127.0.0.1 465", &format!("{} {}", server.ip(), server.port())),
        ("/var/qmail/bin/qmail-smtpd", "mailfront smtp qmail accept"),
    ];
    let text = block_behind("`s6-fdholder-daemon` in a service of its own holds the socket, under the name `smtp`:");
    let run = stage.write("smtp/run", with(text, &words));
    std::fs::set_permissions(&run, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    stage.write("smtp/notification-fd", "4\n");
    let service = stage.path("smtp");
    let asked = |argv: &[&str]| stage.run(stage.command(argv).arg(&service), b"").succeeded(argv[0]);
    let mut supervise = stage.command(["s6-supervise"]);
    stage.start_until("smtp", supervise.arg(&service).env("QMAILHOME", home.folder()), "be ready", || {
        service.join("supervise/status").exists() && asked(&["s6-svstat", "-o", "ready"]) == "true\n"
    });
    let text = letter("in-clear");
    swaks(&stage, at, Mode::Clear, &identity, &text);
    home.holds(&text);

    asked(&["s6-svc", "-h"]);
    wait_for("SIGHUP to be heard", || {
        stage.log("smtp").contains("SIGHUP: certificate, keys and roots were read again").then_some(())
    });
    let pid = || asked(&["s6-svstat", "-o", "pid"]);
    let before = pid();
    // While one session keeps the old process, who connects waits for the new one.
    let mut old = TcpStream::connect(at).expect("connect");
    let mut greeting = [0; 4];
    old.read_exact(&mut greeting).expect("a greeting");
    asked(&["s6-svc", "-r"]);
    wait_for("SIGTERM to be heard", || stage.log("smtp").contains("nobody new is served").then_some(()));
    let mut new = TcpStream::connect(at).expect("connect");
    old.write_all(b"QUIT\r\n").expect("write");
    // A loop of the old one that was about to accept may still have taken it, and serves it.
    wait_for("the new one's greeting", || {
        new.set_read_timeout(Some(PATIENCE)).expect("time-out");
        new.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting, b"220 ");
        let is_new = pid() != before;
        if !is_new {
            new = TcpStream::connect(at).expect("connect");
        }
        is_new.then_some(())
    });
    drop((old, new));
    let text = letter("by-the-new-one");
    swaks(&stage, at, Mode::Tls13, &identity, &text);
    backend.holds(&text);
}

/// A UCSPI server may hand over two pipes instead of a socket.
#[test]
fn two_pipes_serve_as_well_as_a_socket() {
    let front = Supervised::new();
    let (child_reads, mut to_wrapper) = std::io::pipe().expect("pipe");
    let (mut from_wrapper, child_writes) = std::io::pipe().expect("pipe");
    let log = File::create(front.stage.path("front.log")).expect("a log");
    let mut command = front.stage.command([&front.script]);
    command.stdin(child_reads).stdout(child_writes).stderr(log);
    let mut session = command.spawn().expect("the wrapper");
    drop(command);
    let text = letter("pipes");
    to_wrapper.write_all(&crate::letter::pipelined_session(&text)).expect("write");
    let mut replies = String::new();
    from_wrapper.read_to_string(&mut replies).expect("replies");
    let status = wait_for("the session to end", || session.try_wait().expect("wait"));
    assert!(replies.contains("STARTTLS") && replies.ends_with("221 2.0.0 Good bye.\r\n"), "{replies}");
    assert_eq!(status.code(), Some(0), "{}", front.stage.log("front"));
    front.child.holds(&text);
}

/// Both ends of a connection.
fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    client.set_read_timeout(Some(PATIENCE)).expect("time-out");
    (client, listener.accept().expect("accept").0)
}
