//! What stands at HOST PORT: stunnel, Postfix, Exim, OpenSMTPD, tlswrapper; how they are trusted; and what becomes of the session when they
//! are not there.

use std::net::SocketAddrV4;

use crate::clients::{Mode, swaks, swaks_if_tls};
use crate::front::{Identity, MAILFRONT, sessions_ended_well, tcpserver, tcpserver_with, wrapper};
use crate::jail;
use crate::letter::{Queue, letter, maildir_holds};
use crate::stage::Stage;

/// stunnel speaking TLS up to `newest` before a mailfront that it starts for each connection.
#[track_caller]
pub(crate) fn stunnel(stage: &Stage, identity: &Identity, newest: &str, queue: &Queue) -> SocketAddrV4 {
    let [prog, arguments @ ..] = MAILFRONT;
    stunnel_before(
        stage,
        identity,
        newest,
        &format!("exec = /usr/sbin/{prog}\nexecArgs = {prog} {}", arguments.join(" ")),
        queue,
    )
}

#[track_caller]
pub(crate) fn stunnel_before(
    stage: &Stage,
    identity: &Identity,
    newest: &str,
    server: &str,
    queue: &Queue,
) -> SocketAddrV4 {
    let at = stage.unused_port();
    let configuration = format!(
        "foreground = yes\npid =\nsyslog = no\ndebug = 6\n[smtps]\naccept = {at}\ncert = {}\nkey = {}\nsslVersionMax = {newest}\n{server}\n",
        identity.certificate.display(),
        identity.key.display()
    );
    let file = stage.write("stunnel.conf", configuration);
    let mut command = stage.command(["stunnel4"]);
    stage.start("stunnel", command.arg(file).env("QUEUEDIR", queue.folder()), at);
    at
}

#[track_caller]
fn takes_a_letter(stage: &Stage, identity: &Identity, backend: SocketAddrV4, arrived: impl FnOnce(&[u8])) {
    takes_a_letter_with(stage, identity, backend, &[], arrived);
}

/// Delivers one letter through STARTTLS to this backend, and in clear to the child; `arrived` looks for the first.
#[track_caller]
fn takes_a_letter_with(
    stage: &Stage,
    identity: &Identity,
    backend: SocketAddrV4,
    options: &[&str],
    arrived: impl FnOnce(&[u8]),
) {
    let child = Queue::new(stage, "child");
    let at = tcpserver(stage, "front", &wrapper(identity, options, backend, &MAILFRONT), &child);
    let (secret, clear) = (letter("through-tls"), letter("in-clear"));
    swaks(stage, at, Mode::Tls13, identity, &secret);
    arrived(&secret);
    child.is_empty();
    swaks(stage, at, Mode::Clear, identity, &clear);
    child.holds(&clear);
    sessions_ended_well(stage);
}

#[test]
fn stunnel_takes_a_letter_by_tls_1_2() {
    let stage = Stage::new();
    let (identity, queue) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "backend"));
    let backend = stunnel(&stage, &identity, "TLSv1.2", &queue);
    takes_a_letter(&stage, &identity, backend, |letter| queue.holds(letter));
    assert!(stage.log("stunnel").contains("TLSv1.2"), "{}", stage.log("stunnel"));
}

#[test]
fn stunnel_takes_a_letter_by_tls_1_3() {
    let stage = Stage::new();
    let (identity, queue) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "backend"));
    let backend = stunnel(&stage, &identity, "TLSv1.3", &queue);
    takes_a_letter(&stage, &identity, backend, |letter| queue.holds(letter));
    assert!(stage.log("stunnel").contains("TLSv1.3"), "{}", stage.log("stunnel"));
}

#[test]
fn postfix_takes_a_letter_by_tls_1_2() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let (backend, maildir) = jail::postfix(&stage, &identity, "TLSv1.2");
    takes_a_letter(&stage, &identity, backend, |letter| maildir_holds(maildir, letter));
}

#[test]
fn postfix_takes_a_letter_by_tls_1_3() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let (backend, maildir) = jail::postfix(&stage, &identity, "TLSv1.3");
    takes_a_letter(&stage, &identity, backend, |letter| maildir_holds(maildir, letter));
}

#[test]
fn exim_takes_a_letter_by_tls_1_2() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let (backend, maildir) = jail::exim(&stage, &identity, "NORMAL:-VERS-ALL:+VERS-TLS1.2");
    takes_a_letter(&stage, &identity, backend, |letter| maildir_holds(maildir, letter));
}

#[test]
fn exim_takes_a_letter_by_tls_1_3() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let (backend, maildir) = jail::exim(&stage, &identity, "NORMAL:-VERS-ALL:+VERS-TLS1.3");
    takes_a_letter(&stage, &identity, backend, |letter| maildir_holds(maildir, letter));
}

/// OpenSMTPD answers a second EHLO with 503 ("Already identified", against RFC 5321 4.1.4), so it must not be replayed one.
#[test]
fn opensmtpd_behind_stunnel_takes_a_letter_without_replay() {
    let stage = Stage::new();
    let (identity, unused) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "unused"));
    let (server, maildir) = jail::opensmtpd(&stage);
    let backend = stunnel_before(&stage, &identity, "TLSv1.3", &format!("connect = {server}"), &unused);
    takes_a_letter_with(&stage, &identity, backend, &["--replay", "none"], |letter| maildir_holds(maildir, letter));
}

#[test]
fn tlswrapper_takes_a_letter() {
    let stage = Stage::new();
    let (identity, queue) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "backend"));
    let backend = tlswrapper(&stage, &identity, &MAILFRONT, &queue);
    takes_a_letter(&stage, &identity, backend, |letter| queue.holds(letter));
}

/// tlswrapper before a server that it starts for each connection.
#[track_caller]
pub(crate) fn tlswrapper(stage: &Stage, identity: &Identity, server: &[&str], queue: &Queue) -> SocketAddrV4 {
    let mut both = std::fs::read(&identity.key).expect("key");
    both.extend(std::fs::read(&identity.certificate).expect("certificate"));
    let both = stage.write("both.pem", both);
    let mut argv = vec!["tlswrapper".into(), "-f".into(), both.into()];
    argv.extend(server.iter().map(Into::into));
    tcpserver(stage, "tlswrapper", &argv, queue)
}

#[test]
fn a_backend_is_trusted_by_its_authority_and_name() {
    let stage = Stage::new();
    let (identity, queue) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "backend"));
    let authority = Identity::self_signed(&stage, "authority");
    let other = Identity::signed(&stage, "other", "mx.example", &authority);
    let backend = stunnel(&stage, &other, "TLSv1.3", &queue);
    let child = Queue::new(&stage, "child");
    let ca = authority.certificate.to_string_lossy();
    let options = ["--backend-ca", &ca, "--backend-name", "mx.example"];
    let at = tcpserver(&stage, "front", &wrapper(&identity, &options, backend, &MAILFRONT), &child);
    swaks(&stage, at, Mode::Tls13, &identity, &letter("trusted"));
    queue.holds(&letter("trusted"));
    child.is_empty();

    let wrong_name = ["--backend-ca", &ca, "--backend-name", "mx2.example"];
    let at = tcpserver(&stage, "wrong-name", &wrapper(&identity, &wrong_name, backend, &MAILFRONT), &child);
    refuses_starttls_and_serves_in_clear(&stage, at, &child);
    let no_authority = ["--backend-name", "mx.example"];
    let at = tcpserver(&stage, "no-authority", &wrapper(&identity, &no_authority, backend, &MAILFRONT), &child);
    refuses_starttls_and_serves_in_clear(&stage, at, &child);
    assert_eq!(queue.entries().len(), 1, "nothing went to a backend that is not trusted");
}

/// Roots in a folder are read in the sandbox, when the client asks for TLS; those of a file were opened before.
#[test]
fn a_backend_is_trusted_by_roots_that_a_variable_names() {
    let stage = Stage::new();
    let (identity, child) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "child"));
    for variable in ["CAFILE", "CADIR", "SSL_CERT_FILE", "SSL_CERT_DIR"] {
        let authority = Identity::self_signed(&stage, &format!("{variable}-authority"));
        let other = Identity::signed(&stage, &format!("{variable}-other"), "mx.example", &authority);
        let queue = Queue::new(&stage, &format!("{variable}-backend"));
        let backend = stunnel(&stage, &other, "TLSv1.3", &queue);
        let folder = stage.path(&format!("{variable}-roots"));
        std::fs::create_dir(&folder).expect("a folder");
        std::fs::copy(&authority.certificate, folder.join("ca.pem")).expect("a copy");
        let roots = if variable.ends_with("DIR") { &folder } else { &authority.certificate };
        let argv = wrapper(&identity, &["--backend-name", "mx.example"], backend, &MAILFRONT);
        let front = |name: &str, roots: Option<&std::path::Path>| {
            tcpserver_with(&stage, &format!("{variable}-{name}"), &[], &argv, |command| {
                command.env("QUEUEDIR", child.folder()).envs(roots.map(|roots| (variable, roots)));
            })
        };
        swaks(&stage, front("with", Some(roots)), Mode::Tls13, &identity, &letter(variable));
        queue.holds(&letter(variable));
        refuses_starttls_and_serves_in_clear(&stage, front("without", None), &child);
        assert_eq!(queue.entries().len(), 1, "nothing went to a backend that is not trusted");
    }
}

#[test]
fn a_backend_that_is_not_there_costs_a_454_and_not_the_session() {
    let stage = Stage::new();
    let (identity, child) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "child"));
    let nobody = stage.unused_port();
    let at = tcpserver(&stage, "front", &wrapper(&identity, &[], nobody, &MAILFRONT), &child);
    refuses_starttls_and_serves_in_clear(&stage, at, &child);
    sessions_ended_well(&stage);
}

#[test]
fn a_backend_without_tls_costs_a_454_and_not_the_session() {
    let stage = Stage::new();
    let (identity, child, queue) =
        (Identity::self_signed(&stage, "own"), Queue::new(&stage, "child"), Queue::new(&stage, "backend"));
    let clear = tcpserver(&stage, "clear", &MAILFRONT.map(Into::into), &queue);
    let at = tcpserver(&stage, "front", &wrapper(&identity, &[], clear, &MAILFRONT), &child);
    refuses_starttls_and_serves_in_clear(&stage, at, &child);
    queue.is_empty();
}

/// swaks asks for TLS if it can be had (`-tlso`), hears 454, and delivers in the same session.
#[track_caller]
fn refuses_starttls_and_serves_in_clear(stage: &Stage, at: SocketAddrV4, child: &Queue) {
    let before = child.entries().len();
    let output = swaks_if_tls(stage, at, &letter("in-clear"));
    assert!(output.contains("454 4.7.0 TLS not available"), "{output}");
    assert_eq!(child.entries().len(), before + 1, "{output}");
}
