//! `--check` among parts that do their worst: each fault is one row of the table, with its verdict; nothing is ever mailed, and
//! nothing is left behind.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use crate::backend::Certificate;
use crate::stream::{Stream, wait_readable};
use crate::table::Table;
use crate::trace::Trace;
use crate::wire::{PATIENCE, Wire};

/// What a server says: first its greeting, then to each command that begins so.
type Script = Vec<(&'static str, &'static str)>;

const GOOD: [(&str, &str); 7] = [
    ("", "220 mx.example ESMTP\r\n"),
    ("EHLO", "250-mx.example\r\n250-SIZE 1000\r\n250 8BITMIME\r\n"),
    ("MAIL", "250 2.1.0 Ok\r\n"),
    ("RCPT", "554 5.7.1 Relay access denied\r\n"),
    ("RSET", "250 2.0.0 Ok\r\n"),
    ("QUIT", "221 2.0.0 Bye\r\n"),
    ("HELO", "250 mx.example\r\n"),
];

/// The good script with other words in some places.
fn but(changes: &[(&'static str, &'static str)]) -> Script {
    let other = |verb: &str| changes.iter().find(|(changed, _)| *changed == verb).map(|(_, reply)| *reply);
    GOOD.iter().map(|(verb, reply)| (*verb, other(verb).unwrap_or(reply))).collect()
}

/// PROG of that script, and what it does last.
fn prog(script: &Script, at_last: &str) -> Vec<String> {
    let said = |reply: &str| reply.replace('\r', "\\r").replace('\n', "\\n").replace('%', "%%");
    let mut text = format!("printf '{}'\nwhile IFS= read -r line; do case $line in\n", said(script[0].1));
    for (verb, reply) in &script[1..] {
        let goes = if *verb == "QUIT" || reply.is_empty() { "break" } else { ":" };
        text.push_str(&format!("{verb}*) printf '{}'; {goes};;\n", said(reply)));
    }
    text.push_str(&format!("*) printf '502 5.5.2 What?\\r\\n';; esac; done\n{at_last}\n"));
    ["/bin/sh".to_owned(), "-c".to_owned(), text].into()
}

/// A server of that script, for as many connections as come; where there is no certificate, in the clear. An empty reply is an end.
struct Server {
    port: u16,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(certificate: Option<&Arc<Certificate>>, script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, heard) = (listener.local_addr().unwrap().port(), Arc::default());
        let (certificate, noted): (_, Arc<Mutex<Vec<String>>>) = (certificate.cloned(), Arc::clone(&heard));
        thread::spawn(move || {
            while wait_readable(&listener, Instant::now() + 2 * PATIENCE).is_ok() {
                let Ok((socket, _)) = listener.accept() else { return };
                let mut wire = Wire::new(socket);
                if certificate.as_ref().is_none_or(|certificate| wire.secure(certificate.server()).is_ok()) {
                    serve(&mut wire, &script, &noted);
                }
            }
        });
        Self { port, heard }
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }
}

fn serve(wire: &mut Wire, script: &Script, noted: &Mutex<Vec<String>>) {
    wire.send(script[0].1.as_bytes());
    let mut octets = Vec::new();
    loop {
        wire.listen_for_line();
        octets.extend(wire.left_over());
        while let Some(at) = octets.iter().position(|octet| *octet == b'\n') {
            let line = String::from_utf8_lossy(&octets.drain(..=at).collect::<Vec<u8>>()).trim_end().to_owned();
            if line.starts_with("PROXY ") {
                noted.lock().unwrap().push(line);
                continue;
            }
            let known = script[1..].iter().find(|(verb, _)| line.starts_with(verb));
            let reply = known.map_or("502 5.5.2 What?\r\n", |(_, reply)| reply);
            let is_over = reply.is_empty() || line == "QUIT";
            noted.lock().unwrap().push(line);
            wire.send(reply.as_bytes());
            if is_over {
                return wire.end();
            }
        }
        if !wire.is_open() {
            return;
        }
    }
}

/// A certificate, and its files.
struct Files {
    certificate: Arc<Certificate>,
    folder: tempfile::TempDir,
}

impl Files {
    fn of(certificate: Certificate) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cert.pem"), &certificate.certificate_pem).unwrap();
        std::fs::write(folder.path().join("key.pem"), &certificate.key_pem).unwrap();
        Self { certificate: Arc::new(certificate), folder }
    }

    fn cert(&self) -> PathBuf {
        self.folder.path().join("cert.pem")
    }

    fn key(&self) -> PathBuf {
        self.folder.path().join("key.pem")
    }
}

/// `starttls-wrapper --check ... PROG`.
fn check(cert: &Path, key: &Path, options: &[&str], host: &[String], prog: &[String]) -> Table {
    let mut command = bare();
    command.arg("--cert").arg(cert).arg("--key").arg(key).args(options).args(host).args(prog);
    Table::of(&mut command)
}

fn bare() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_starttls-wrapper"));
    command.arg("--check").env_clear().env("PATH", "/usr/bin:/bin").stderr(Stdio::null());
    command
}

fn at(port: u16) -> [String; 2] {
    ["127.0.0.1".to_owned(), port.to_string()]
}

/// All short, so that who says nothing holds nobody up.
const SOON: [&str; 8] =
    ["--greeting-timeout", "1", "--replay-timeout", "1", "--dial-timeout", "1", "--farewell-timeout", "1"];

#[test]
fn a_good_set_up_has_no_problem_and_nothing_is_mailed() {
    let files = Files::of(Certificate::new());
    let server = Server::new(Some(&files.certificate), but(&[]));
    let table = check(&files.cert(), &files.key(), &[], &at(server.port), &prog(&but(&[]), ""));
    assert_eq!(table.code, Some(0), "{}", table.text);
    table.has("ok", "PROG greets", "\"220 mx.example ESMTP\"");
    table.has("ok", "PROG takes EHLO", "SIZE 1000, 8BITMIME");
    table.has("ok", "PROG: open relay", "not for the outside client 192.0.2.25: \"554 5.7.1 Relay access denied\"");
    table.has("ok", "PROG: no client", "no relay");
    table.has("ok", "PROG ends", "on QUIT: \"221 2.0.0 Bye\"");
    table.has("ok", "certificate", &files.cert().display().to_string());
    table.has("warning", "names", "localhost, 127.0.0.1; PROG greets as mx.example");
    table.has("ok", "days left", "");
    table.has("warning", "chain", "1 certificate, under no root");
    table.has("ok", "HOST is reached", &format!("127.0.0.1:{}", server.port));
    table.has("ok", "HOST's TLS", "TLSv1.3 TLS_AES_128_GCM_SHA256, by our own certificate");
    table.has("ok", "HOST greets", "\"220 mx.example ESMTP\"");
    table.has("ok", "HOST takes EHLO", "SIZE 1000, 8BITMIME");
    table.has("ok", "HOST: open relay", "not for this host (as each client): \"554 5.7.1");
    let dialogue = [
        "EHLO example.net",
        "EHLO example.net",
        "MAIL FROM:<>",
        "RCPT TO:<starttls-wrapper-check@example.com>",
        "RSET",
        "MAIL FROM:<postmaster@example.net>",
        "RCPT TO:<starttls-wrapper-check@example.com>",
        "RSET",
        "QUIT",
    ];
    assert_eq!(server.heard(), dialogue);
}

/// As Postfix does by default: what is wrong with the sender is not said before RCPT.
#[test]
fn a_relay_that_wants_a_sender_is_found_all_the_same() {
    let files = Files::of(Certificate::new());
    let run = |others: &str| {
        let [shell, c, text] = <[String; 3]>::try_from(prog(&but(&[]), "")).unwrap();
        let by_sender = format!(
            "MAIL*) from=$line; printf '250 2.1.0 Ok\\r\\n';;\n\
             RCPT*) case $from in *'<>'*) printf '554 5.7.1 <>: Sender address rejected\\r\\n';; *) printf '{others}\\r\\n';; esac;;\n\
             EHLO*)"
        );
        let prog = [shell, c, text.replacen("EHLO*)", &by_sender, 1)];
        check(&files.cert(), &files.key(), &["--way", "respawn"], &[], &prog)
    };
    run("250 2.1.5 Ok").has("problem", "PROG: open relay", "the outside client 192.0.2.25 may mail to starttls");
    let refusal = "554 5.7.1 Relay access denied";
    run(refusal).has("ok", "PROG: open relay", &format!("not for the outside client 192.0.2.25: \"{refusal}\""));
    run("451 4.7.1 Greylisted").has("untried", "PROG: open relay", "it answered \"451 4.7.1 Greylisted\" to RCPT");
}

#[test]
fn a_prog_that_is_no_good_is_named() {
    let files = Files::of(Certificate::new());
    let keep = |options: &[&str], script: Script, at_last: &str| {
        check(
            &files.cert(),
            &files.key(),
            &[&["--way", "keep"], &SOON[6..], options].concat(),
            &[],
            &prog(&script, at_last),
        )
    };
    let table = keep(&[], but(&[]), "");
    assert_eq!(table.code, Some(0), "{}", table.text);
    table.has("ok", "PROG is kept", "it takes RSET, and EHLO a second time");

    for (script, row, found) in [
        (but(&[("", "554 5.3.2 No\r\n")]), "PROG greets", "it greeted with 554: \"554 5.3.2 No\""),
        (but(&[("", "hello\r\n")]), "PROG greets", "it speaks no SMTP"),
        (but(&[("", "220-a\r\n220 b\r\n250 c\r\n")]), "PROG greets", "more octets behind its 220 reply"),
        (but(&[("EHLO", "")]), "PROG takes EHLO", "it closed"),
        (but(&[("EHLO", "250-a\r\n250 STARTTLS\r\n")]), "PROG's STARTTLS", "it offers STARTTLS itself"),
        (but(&[("EHLO", "250-a\r\n250 XCLIENT ADDR\r\n")]), "PROG's XCLIENT", "it offers XCLIENT to 192.0.2.25"),
        (but(&[("RSET", "502 5.5.1 No\r\n")]), "PROG is kept", "it answers \"502 5.5.1 No\" to RSET"),
        (but(&[("RSET", "")]), "PROG is kept", "RSET: it closed"),
        (but(&[("RCPT", "250 Ok\r\n")]), "PROG: open relay", "the outside client 192.0.2.25 may mail to starttls"),
        (but(&[("RCPT", "251 Ok\r\n")]), "PROG: open relay", "the outside client 192.0.2.25 may mail to starttls"),
    ] {
        keep(&[], script, "").has("problem", row, found);
    }
    for (script, row, found) in [
        (but(&[("EHLO", "502 5.5.1 No\r\n")]), "PROG takes EHLO", "\"502 5.5.1 No\""),
        (but(&[("EHLO", "250-a\r\n250 AUTH PLAIN\r\n")]), "PROG's AUTH", "it offers AUTH before TLS"),
    ] {
        keep(&[], script, "").has("warning", row, found);
    }
    for (script, found) in [
        (but(&[("MAIL", "451 4.3.0 Later\r\n")]), "it answered \"451 4.3.0 Later\" to MAIL"),
        (but(&[("RCPT", "451 4.7.1 Greylisted\r\n")]), "it answered \"451 4.7.1 Greylisted\" to RCPT"),
        (but(&[("RCPT", "450 4.1.2 No such domain\r\n")]), "it answered \"450 4.1.2 No such domain\" to RCPT"),
        (but(&[("RCPT", "550 5.1.10 Null MX\r\n")]), "it answered \"550 5.1.10 Null MX\" to RCPT"),
    ] {
        keep(&[], script, "").has("untried", "PROG: open relay", found);
    }
    keep(&[], but(&[("RCPT", "454 4.7.1 Relay access denied\r\n")]), "").has("ok", "PROG: open relay", "not for");
}

#[test]
fn a_prog_that_says_nothing_or_stays_is_told_so_and_leaves_nothing_behind() {
    let files = Files::of(Certificate::new());
    let pid = files.folder.path().join("pid");
    let note = format!("echo $$ >>{}", pid.display());
    let run = |text: &str| {
        let prog = ["/bin/sh", "-c", &format!("{note}\n{text}")].map(str::to_owned);
        let table =
            check(&files.cert(), &files.key(), &[&["--way", "respawn"], &SOON[..2], &SOON[6..]].concat(), &[], &prog);
        for pid in std::fs::read_to_string(&pid).unwrap().lines() {
            assert!(!Path::new("/proc").join(pid).exists(), "{pid}\n{}", table.text);
        }
        std::fs::remove_file(&pid).unwrap();
        table
    };
    run("exit 7").has("problem", "PROG greets", "it closed (exit status: 7)");
    run("exec sleep 60").has("problem", "PROG greets", "no answer in time");
    run("printf '220-half a greeti'; exec sleep 60").has("problem", "PROG greets", "no answer in time");
    let stays = prog(&but(&[]), "trap '' TERM; for i in 1 2 3 4 5 6 7 8 9 10; do sleep 1 & wait; done")[2].clone();
    run(&stays).has("warning", "PROG ends", "1 s after QUIT it took SIGKILL");
    let stays = prog(&but(&[]), "exec sleep 60")[2].clone();
    run(&stays).has("warning", "PROG ends", "1 s after QUIT it took SIGTERM");
    let table = Table::of(bare().args(["--way", "respawn", "--self-signed", "mx.example", "/no/such/prog"]));
    table.has("problem", "PROG greets", "it can't be started: /no/such/prog: No such file");
}

#[test]
fn the_fresh_prog_is_told_of_tls_and_must_take_the_replay() {
    let files = Files::of(Certificate::new());
    let run = |script: &str| {
        let prog = ["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()];
        check(&files.cert(), &files.key(), &["--way", "respawn"], &[], &prog)
    };
    let good = prog(&but(&[]), "")[2].clone();
    run(&good).has("ok", "fresh PROG", "it starts with SSL_* set");
    let fails = run(&format!("[ -z \"$SSL_PROTOCOL\" ] || exit 3\n{good}"));
    fails.has("ok", "PROG greets", "");
    fails.has("problem", "fresh PROG", "it closed");
    let refuses = prog(&but(&[("EHLO", "550 5.7.0 Not inside TLS\r\n")]), "")[2].clone();
    let refuses = run(&format!("if [ \"$SSL_PROTOCOL\" ]; then\n{refuses}\nelse\n{good}\nfi"));
    refuses.has("problem", "fresh PROG", "it answered 550 where the child had said 250");
}

#[test]
fn a_host_that_is_no_good_is_named() {
    let files = Files::of(Certificate::new());
    let tls = |script: Script| {
        let server = Server::new(Some(&files.certificate), script);
        check(&files.cert(), &files.key(), &SOON, &at(server.port), &prog(&but(&[]), ""))
    };
    for (script, row, found) in [
        (but(&[("", "554 5.3.2 No\r\n")]), "HOST greets", "it greeted with 554: \"554 5.3.2 No\""),
        (but(&[("", "")]), "HOST greets", "no answer in time"),
        (but(&[("", "ESMTP\r\n")]), "HOST greets", "it speaks no SMTP"),
        (but(&[("EHLO", "")]), "HOST takes EHLO", "it closed"),
        (
            but(&[("EHLO", "550 5.7.0 \x1b[2JNo\r\n")]),
            "HOST takes EHLO",
            "it answered 550 where the child had said 250: \"550 5.7.0 \\x1b[2JNo\"",
        ),
        (but(&[("EHLO", "250-a\r\n250 STARTTLS\r\n")]), "HOST takes EHLO", "it offers STARTTLS inside TLS"),
        (
            but(&[("EHLO", "250-a\r\n250 XCLIENT ADDR\r\n")]),
            "HOST's XCLIENT",
            "it offers XCLIENT to what comes through us",
        ),
        (but(&[("EHLO", "250-a\r\n250 XFORWARD ADDR\r\n")]), "HOST's XFORWARD", "it offers XFORWARD"),
        (but(&[("RCPT", "250 Ok\r\n")]), "HOST: open relay", "this host (as each client) may mail to starttls"),
        (but(&[("RCPT", "250 Ok\r\n"), ("RSET", "")]), "HOST: open relay", "this host (as each client) may mail to"),
    ] {
        tls(script).has("problem", row, found);
    }
    tls(but(&[("EHLO", "250-a\r\n250 AUTH PLAIN\r\n")])).has("warning", "HOST's AUTH", "it offers AUTH inside TLS");
    tls(but(&[("", "554 No\r\n")])).has("untried", "HOST: open relay", "HOST can't be spoken to");
    tls(but(&[("RCPT", "")])).has("untried", "HOST: open relay", "it closed");
    // It may refuse the sender, and never have thought of the recipient.
    let refuses = |mail| tls(but(&[("MAIL", mail), ("RCPT", "250 Ok\r\n")]));
    for mail in ["550 5.7.1 Sender denied\r\n", "550 No\r\n", "454 4.7.1 Not you\r\n", "550 5.1.8 No such domain\r\n"] {
        refuses(mail).has("untried", "HOST: open relay", &format!("it answered \"{}\" to MAIL", mail.trim_end()));
    }
    refuses("530 5.7.0 Authentication required\r\n").has("ok", "HOST: open relay", "not for this host");
}

#[test]
fn a_host_that_is_not_there_or_not_believed_is_named() {
    let (files, other) = (Files::of(Certificate::new()), Files::of(Certificate::new()));
    let run = |options: &[&str], host: [String; 2]| {
        let table = check(&files.cert(), &files.key(), &[&SOON, options].concat(), &host, &prog(&but(&[]), ""));
        table.has("untried", "HOST: open relay", "HOST can't be spoken to");
        table
    };
    // Bound, and nobody listens.
    let silent = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&silent, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let nobody = std::net::SocketAddr::try_from(rustix::net::getsockname(&silent).unwrap()).unwrap().port();
    run(&[], at(nobody)).has("problem", "HOST is reached", &format!("127.0.0.1:{nobody}: Connection refused"));
    let in_clear = Server::new(None, but(&[]));
    run(&[], at(in_clear.port)).has("problem", "HOST's TLS", "the peer does not speak TLS");
    let stranger = Server::new(Some(&other.certificate), but(&[]));
    run(&[], at(stranger.port)).has("problem", "HOST's TLS", "certificate not trusted");
    let ca = other.cert().display().to_string();
    let named = run(&["--backend-ca", &ca, "--backend-name", "mx2.example"], at(stranger.port));
    named.has("problem", "HOST's TLS", "certificate not trusted: certificate not valid for name \"mx2.example\"");
    let expired = Files::of(Certificate::expired());
    let server = Server::new(Some(&expired.certificate), but(&[]));
    let ca = expired.cert().display().to_string();
    run(&["--backend-ca", &ca], at(server.port)).has(
        "problem",
        "HOST's TLS",
        "certificate not trusted: certificate expired",
    );
    assert_eq!((stranger.heard(), server.heard()), (Vec::new(), Vec::new()), "said to one that is not believed");
}

/// No literal for us, and one for the system's resolver (inet_aton(3)): it is asked as for a name.
const NAME: &str = "127.1";

#[test]
fn a_host_that_is_a_name_or_a_unix_socket_is_reached_as_well() {
    let files = Files::of(Certificate::new());
    let prog = prog(&but(&[]), "");
    let server = Server::new(Some(&files.certificate), but(&[]));
    let host = [NAME.to_owned(), server.port.to_string()];
    let table = check(&files.cert(), &files.key(), &["--backend-name", "localhost"], &host, &prog);
    assert_eq!(table.code, Some(0), "{}", table.text);
    table.has("ok", "HOST is reached", &format!("127.0.0.1:{}", server.port));
    table.has("ok", "HOST: open relay", "not for this host");

    let path = files.folder.path().join("smtp");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        serve(&mut Wire::over(Stream::socket(socket)), &but(&[]), &Mutex::default());
    });
    let host = [format!("unix:{}", path.display())];
    let table = check(&files.cert(), &files.key(), &["--way", "plain"], &host, &prog);
    assert_eq!(table.code, Some(0), "{}", table.text);
    table.has("ok", "HOST is reached", &path.display().to_string());
    table.has("ok", "HOST: open relay", "not for this host");
}

#[test]
fn a_wait_for_host_that_is_interrupted_goes_on() {
    let files = Files::of(Certificate::new());
    let server = Server::new(None, but(&[]));
    // One of them meets that wait.
    for turn in ["1+2", "2+2"] {
        let trace =
            Trace::of(&["-e", "trace=?poll,ppoll", "-e", &format!("inject=?poll,ppoll:error=EINTR:when={turn}")]);
        let through = trace.through();
        let mut command = Command::new(through[0]);
        command.args(&through[1..]).arg(env!("CARGO_BIN_EXE_starttls-wrapper")).args(["--check", "--way", "plain"]);
        command.arg("--cert").arg(files.cert()).arg("--key").arg(files.key());
        command.args(at(server.port)).args(prog(&but(&[]), "")).stderr(Stdio::null());
        let table = Table::of(&mut command);
        table.has("ok", "HOST is reached", &format!("127.0.0.1:{}", server.port));
        assert!(trace.log().contains("(INJECTED)"), "{turn}");
    }
}

#[test]
fn how_a_host_is_believed_is_told() {
    let (files, other) = (Files::of(Certificate::new()), Files::of(Certificate::new()));
    let server = Server::new(Some(&other.certificate), but(&[]));
    let run = |options: &[&str]| check(&files.cert(), &files.key(), options, &at(server.port), &prog(&but(&[]), ""));
    let ca = other.cert().display().to_string();
    let table = run(&["--backend-ca", &ca]);
    table.has(
        "ok",
        "HOST's TLS",
        "TLSv1.3 TLS_AES_128_GCM_SHA256, by a certificate that is believed: localhost, 127.0.0.1",
    );
    table.has("ok", "HOST's days left", "");
    let table = run(&["--backend-insecure"]);
    table.has("warning", "HOST's TLS", "TLSv1.3 TLS_AES_128_GCM_SHA256, by a certificate that nobody checks");
    let source = run(&["--backend-insecure", "--backend-source", "127.0.0.53"]);
    source.has("ok", "HOST: open relay", "not for 127.0.0.53 (as each client)");
}

#[test]
fn our_own_certificate_is_read_as_a_session_reads_it() {
    let (files, other) = (Files::of(Certificate::new()), Files::of(Certificate::new()));
    let prog = prog(&but(&[]), "");
    let keep = |cert: &Path, key: &Path| check(cert, key, &["--way", "keep"], &[], &prog);
    keep(&files.cert(), &other.key()).has("problem", "certificate", &format!("certificate {}", files.cert().display()));
    assert!(keep(&files.cert(), &other.key()).row("certificate").found.ends_with("does not belong to the certificate"));
    keep(Path::new("/no/cert"), &files.key()).has("problem", "certificate", "can't read /no/cert: No such file");
    keep(&files.cert(), &files.cert()).has("problem", "certificate", "certificate ");
    let expired = Files::of(Certificate::expired());
    let table = keep(&expired.cert(), &expired.key());
    assert!(table.row("certificate").found.ends_with("the certificate has expired"), "{}", table.text);
    table.has("problem", "days left", "none: it expired on 2021-01-01");
    let named = Files::of(Certificate::named("mx.example"));
    let table = keep(&named.cert(), &named.key());
    table.has("ok", "names", "mx.example");
    assert_eq!(table.code, Some(0));

    let table = Table::of(bare().args(["--way", "keep"]).args(&prog));
    table.has("problem", "certificate", "there is none: STARTTLS is not offered");
    let table = Table::of(bare().args(["--way", "keep", "--self-signed", "mx.example"]).args(&prog));
    table.has("warning", "certificate", "a throw-away one for mx.example");
}

#[test]
fn ticket_keys_are_read_as_a_session_reads_them() {
    let files = Files::of(Certificate::new());
    let path = files.folder.path().join("ticket.keys");
    let run = |keys: &str, mode: u32| {
        std::fs::write(&path, keys).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let options = ["--way", "keep", "--ticket-keys", path.to_str().unwrap()];
        check(&files.cert(), &files.key(), &options, &[], &prog(&but(&[]), ""))
    };
    let key = format!("{}\n", "QUJD".repeat(16));
    let table = run(&key, 0o600);
    table.has("ok", "ticket keys", "in order");
    assert_eq!(table.code, Some(0));
    run(&key, 0o644).has("problem", "ticket keys", &format!("ticket keys {}: others may use it", path.display()));
    run("no key\n", 0o600).has("problem", "ticket keys", &format!("ticket keys {}: ", path.display()));
    std::fs::remove_file(&path).unwrap();
    let options = ["--way", "keep", "--ticket-keys", path.to_str().unwrap()];
    let table = check(&files.cert(), &files.key(), &options, &[], &prog(&but(&[]), ""));
    assert!(table.row("ticket keys").found.ends_with("can't read it: No such file or directory (os error 2)"));
    let without = check(&files.cert(), &files.key(), &options[..2], &[], &prog(&but(&[]), ""));
    assert!(!without.text.contains("ticket keys"), "{}", without.text);
}

/// What `--probe` has written is true as long as PROG says the same.
#[test]
fn the_file_of_greeting_is_held_against_what_prog_says() {
    let files = Files::of(Certificate::new());
    let path = files.folder.path().join("paper");
    let probe = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_starttls-wrapper"));
        command.args(["--probe"]).args(prog(&but(&[]), "")).stdin(Stdio::null()).output().unwrap().stdout
    };
    let run = |script: Script, way: &[&str]| {
        let options = [way, &["--greeting", path.to_str().unwrap()]].concat();
        check(&files.cert(), &files.key(), &options, &[], &prog(&script, ""))
    };
    run(but(&[]), &["--way", "keep"]).has("warning", "--greeting", &format!("greeting {}: can't", path.display()));
    std::fs::write(&path, probe()).unwrap();
    for way in ["keep", "respawn"] {
        let table = run(but(&[]), &["--way", way]);
        table.has("ok", "--greeting", &format!("{}: PROG says so", path.display()));
        assert_eq!(table.code, Some(0), "{}", table.text);
    }
    let found = |why: &str| format!("{} is not what PROG says: its reply to {why} is another", path.display());
    let other = run(but(&[("", "220 other.example ESMTP\r\n")]), &["--way", "keep"]);
    other.has("problem", "--greeting", &found("greeting"));
    let other = run(but(&[("EHLO", "250-mx.example\r\n250 SIZE 2000\r\n")]), &["--way", "keep"]);
    other.has("problem", "--greeting", &found("ehlo"));
    std::fs::write(&path, "greeting 554 no\n").unwrap();
    run(but(&[]), &["--way", "keep"]).has("warning", "--greeting", &format!("greeting {}: ", path.display()));
}

/// And once more for a client of this host, in a session of its own.
#[test]
fn a_header_says_that_the_check_is_an_outside_client() {
    let files = Files::of(Certificate::new());
    let server = Server::new(None, but(&[]));
    let options = ["--way", "plain", "--send-proxy", "v1"];
    let table = check(&files.cert(), &files.key(), &options, &at(server.port), &prog(&but(&[]), ""));
    assert_eq!(table.code, Some(0), "{}", table.text);
    table.has("ok", "HOST is reached", &format!("127.0.0.1:{}, with a PROXY header V1 for 192.0.2.25", server.port));
    table.has("ok", "HOST: open relay", "not for the outside client 192.0.2.25: \"554 5.7.1");
    table.has("ok", "HOST: local client", "127.0.0.1 in the header may not relay either: \"554 5.7.1");
    let told = server.heard();
    let headers: Vec<&String> = told.iter().filter(|line| line.starts_with("PROXY")).collect();
    assert_eq!(headers, ["PROXY TCP4 192.0.2.25 127.0.0.1 40025 25", "PROXY TCP4 127.0.0.1 127.0.0.1 40025 25"]);
    assert_eq!(told[0], *headers[0], "nothing is said before it");
}

/// What completes no reply, without end, is no reason to wait longer.
#[test]
fn who_never_comes_to_an_end_is_late_all_the_same() {
    let files = Files::of(Certificate::new());
    let words = format!("while printf {}; do :; done", "220-".repeat(1000));
    let prog = ["/bin/sh", "-c", &words].map(str::to_owned);
    let table =
        check(&files.cert(), &files.key(), &[&["--way", "respawn"], &SOON[..2], &SOON[6..]].concat(), &[], &prog);
    table.has("problem", "PROG greets", "a reply of over 65536 octets");
    let prog = ["/bin/sh", "-c", "while printf '220-a\r\n'; do sleep 0.1; done"].map(str::to_owned);
    let table =
        check(&files.cert(), &files.key(), &[&["--way", "respawn"], &SOON[..2], &SOON[6..]].concat(), &[], &prog);
    table.has("problem", "PROG greets", "no answer in time");
}

#[test]
fn the_ways_without_tls_of_ours_and_the_clear_one() {
    let (files, other) = (Files::of(Certificate::new()), Files::of(Certificate::new()));
    let prog = prog(&but(&[]), "");
    let clear = Server::new(None, but(&[]));
    let table = check(&files.cert(), &files.key(), &["--way", "plain"], &at(clear.port), &prog);
    assert_eq!(table.code, Some(0), "{}", table.text);
    table.has("ok", "HOST greets", "\"220 mx.example ESMTP\"");
    table.has("ok", "HOST: open relay", "not for this host");
    assert!(!table.text.contains("HOST's TLS"));

    let greets = Server::new(Some(&other.certificate), but(&[]));
    let table = Table::of(bare().args(["--way", "raw"]).args(at(greets.port)).args(&prog));
    table.has(
        "ok",
        "HOST's TLS",
        "TLSv1.3 TLS_AES_128_GCM_SHA256, whose certificate is for clients to judge: localhost, 127.0.0.1",
    );
    table.has("problem", "HOST is muted", "it greets inside TLS: \"220 mx.example ESMTP\"");
    let muted = Server::new(Some(&other.certificate), but(&[("", "")]));
    // Whether HOST's name can be one of TLS is no business of ours.
    for host in ["127.0.0.1", NAME] {
        let table = Table::of(bare().args(["--way", "raw", host]).arg(muted.port.to_string()).args(&prog));
        assert_eq!(table.code, Some(0), "{}", table.text);
        table.has("ok", "HOST is muted", "no greeting inside TLS");
        table.has("ok", "HOST: open relay", "not for this host");
    }

    let table = Table::of(bare().args(["--way", "ucspi-tls-respawn"]).args(&prog));
    table.has("untried", "TLS", "it is the UCSPI-TLS server's");
    table.has("ok", "fresh PROG", "it starts");
    let table = Table::of(bare().args(["--mute", "--"]).args(&prog).env("STARTTLS_REPLAY", "EHLO a"));
    table.has("ok", "greeting", "swallowed, of those whose TCPLOCALPORT is 25 or 587");
    table.has("ok", "PROG greets", "\"220 mx.example ESMTP\"");
    let refuses = super::check::prog(&but(&[("HELO", "550 5.5.0 No\r\n")]), "");
    let table = Table::of(bare().args(["--mute=always", "--"]).args(&refuses).env("STARTTLS_REPLAY", "HELO a"));
    table.has("problem", "PROG greets", "it answered 550 where the child had said 250");
}

#[test]
fn what_can_not_be_right_is_a_usage_error_as_ever() {
    for words in [
        &["--check"][..],
        &["--check=yes", "--way", "keep", "/bin/true"],
        &["--check", "--way", "keep", "465", "/bin/true"],
        // A listener's PROG has other rights, and --plain has none.
        &["--check", "--way", "keep", "--self-signed", "mx.example", "--listen", "127.0.0.1:2525", "/bin/true"],
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_starttls-wrapper")).args(words).output().unwrap();
        assert_eq!((out.status.code(), out.stdout.len()), (Some(100), 0), "{words:?}");
    }
}
