//! The hand-over: a HOST that has to be looked up, a backend that changes its mind just before the 220, no certificate.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::backend::Certificate;
use crate::child::Child;
use crate::dialogue::Backend;
use crate::door::{Door, Start};
use crate::steps::{At, Standing, all_of, ask_child};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

const NOT_AVAILABLE: &[u8] = b"454 4.7.0 TLS not available\r\n";

/// No literal for us and none but a literal for the system's resolver (inet_aton(3)): it is asked as for a name, answers
/// as for a name, and needs no line in a file of this system.
const NAME: &str = "127.1";

/// HOST is a name; what the backend's certificate bears is something else.
const NAMED: Start<'_> = Start { options: &["--backend-name", "localhost"], host: NAME, ..Start::USUAL };

#[test]
fn a_backend_with_a_name_is_found_every_time() {
    all_of(&[1, 2, 3, 4, 5], |_| {
        for _ in 0..10 {
            let started = Instant::now();
            let standing = Standing::at(At::ClientHandshake, &NAMED);
            let took = started.elapsed();
            assert!(took < Duration::from_secs(5), "{took:?}: {}", standing.door.said());
        }
    });
}

#[test]
fn a_name_is_looked_up_again_after_a_refused_dial() {
    // Nobody listens yet.
    let mut standing = Standing::at(At::Snoop, &NAMED);
    let client = standing.door.client.as_mut().unwrap();
    for _ in 0..2 {
        client.send(b"STARTTLS\r\n");
        client.get(NOT_AVAILABLE).unwrap();
    }
    standing.door.backend.listen();
    client.send(b"STARTTLS\r\n");
    let backend = standing.door.backend.wire().unwrap();
    backend.send(b"220 secure.example ESMTP\r\n");
    backend.get(b"EHLO client.example\r\n").unwrap();
    backend.send(b"250 secure.example\r\n");
    client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
    assert_eq!(standing.close(), 1);
}

/// While the program is stopped the backend replies to the replayed EHLO and does `more`: both are there at once.
fn replies_and(more: impl Fn(&mut crate::wire::Wire)) {
    let mut standing = Standing::at(At::Replay, &Start::default());
    standing.door.kill(Signal::STOP);
    assert!(wait_until(PATIENCE, || standing.door.state() == 'T'));
    let backend = standing.door.backend.held();
    // Nagle's algorithm would keep the second segment.
    rustix::net::sockopt::set_tcp_nodelay(backend.stream().input(), true).unwrap();
    backend.send(b"250 secure.example\r\n");
    more(backend);
    standing.door.kill(Signal::CONT);
    let client = standing.door.client.as_mut().unwrap();
    client.get(NOT_AVAILABLE).unwrap_or_else(|why| panic!("{why}\n{}", standing.door.said()));
    ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").unwrap();
    assert_eq!(standing.close(), 1);
}

#[test]
fn a_backend_that_closes_behind_its_ehlo_reply_is_a_454() {
    replies_and(|backend| backend.end());
}

#[test]
fn a_backend_that_is_cut_off_behind_its_ehlo_reply_is_a_454() {
    replies_and(|backend| backend.cut());
}

#[test]
fn a_backend_with_one_reply_more_behind_its_ehlo_reply_is_a_454() {
    replies_and(|backend| backend.send(b"250 stale.example\r\n"));
}

#[test]
fn what_a_backend_says_while_the_client_shakes_hands_never_reaches_it() {
    let mut standing = Standing::at(At::ClientHandshake, &Start::default());
    let backend = standing.door.backend.held();
    // Nagle's algorithm would keep it until the client's NOOP is there.
    rustix::net::sockopt::set_tcp_nodelay(backend.stream().input(), true).unwrap();
    backend.send(b"250-stale.example\r\n250 AUTH PLAIN\r\n");
    let client = standing.door.client.as_mut().unwrap();
    client.secure(crate::door::tls_client()).unwrap();
    client.send(b"NOOP\r\n");
    let (said, _) = client.rest().unwrap();
    assert_eq!(said.escape_ascii().to_string(), "421 4.3.0 Mail server not available\\r\\n");
    assert_eq!(standing.close(), 111);
}

#[test]
fn tls_required_without_a_usable_certificate_is_a_421_and_96() {
    let cases = [
        &["--require-tls"][..],
        &["--require-tls", "--cert", "/nonexistent/cert.pem"],
        &["--require-tls", "--cert", "/dev/null"],
    ];
    all_of(&cases, |options| {
        let mut door = Door::open(&Start { options, certificate: false, ..Start::default() });
        let mut client = door.client.take().unwrap();
        client.get(b"421 4.3.0 Mail server not available\r\n").unwrap();
        assert_eq!(client.get_end(), Ok(End::Clean));
        drop(client);
        assert_eq!(door.code(), 96, "{}", door.said());
    });
}

/// Said once, at the start; a client hears of it by the missing keyword alone, and with TLS required before any greeting.
#[test]
fn an_unusable_certificate_is_named_and_no_tls_is_offered() {
    let folder = tempfile::TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let (good, expired, other) = (Certificate::new(), Certificate::expired(), Certificate::new());
    let (cert, key) = (write("cert.pem", &good.certificate_pem), write("key.pem", &good.key_pem));
    let (old_cert, old_key) = (write("old.pem", &expired.certificate_pem), write("old-key.pem", &expired.key_pem));
    let other_key = write("other-key.pem", &other.key_pem);
    // Not even root can read a folder.
    let unreadable = folder.path().to_str().unwrap();
    let of_both = |cert: &str, key: &str, what: &str| format!("certificate {cert}, key {key}: {what}");
    let cases = [
        (unreadable, &*key, format!("can't read {unreadable}: ")),
        (&*cert, unreadable, format!("can't read {unreadable}: ")),
        (&*old_cert, &*old_key, of_both(&old_cert, &old_key, "the certificate has expired")),
        (&*cert, &*other_key, of_both(&cert, &other_key, "the private key does not belong to the certificate")),
    ];
    let named = |door: &Door, what: &str| {
        let said = door.said();
        let lines: Vec<_> = said.lines().filter(|line| line.contains("not offered")).collect();
        let [line] = lines[..] else { panic!("not one line: {said}") };
        assert!(line.contains(&format!("STARTTLS is not offered: {what}")), "{line}");
    };
    all_of(&cases, |(cert, key, what)| {
        let options = ["--cert", cert, "--key", key];
        let mut door = Door::open(&Start { options: &options, certificate: false, ..Start::default() });
        let mut child = Child::accept(&door.puppets).unwrap_or_else(|why| panic!("{why}: {}", door.said()));
        child.send(b"220 mail.example ESMTP\r\n");
        door.client.as_mut().unwrap().get(b"220 mail.example ESMTP\r\n").unwrap();
        named(&door, what);
        ask_child(&mut door, &mut child, "EHLO client.example\r\n", "250-mail.example\r\n250 SIZE\r\n").unwrap();
        let client = door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\n");
        client.get(NOT_AVAILABLE).unwrap();
        ask_child(&mut door, &mut child, "NOOP\r\n", "250 Ok\r\n").unwrap();
        ask_child(&mut door, &mut child, "QUIT\r\n", "221 Bye\r\n").unwrap();
        child.exit(0);
        drop(door.client.take());
        assert_eq!(door.code(), 0, "{}", door.said());
        named(&door, what);

        let options = [&options[..], &["--require-tls"]].concat();
        let mut door = Door::open(&Start { options: &options, certificate: false, ..Start::default() });
        let mut client = door.client.take().unwrap();
        client.get(b"421 4.3.0 Mail server not available\r\n").unwrap();
        assert_eq!(client.get_end(), Ok(End::Clean));
        drop(client);
        assert_eq!(door.code(), 96, "{}", door.said());
        named(&door, what);
    });
}

#[test]
fn an_unreadable_file_of_roots_is_a_454_that_names_it() {
    let file = "/nonexistent/roots.pem";
    let by_option = Start { options: &["--backend-ca", file], ..Start::default() };
    let by_variable = Start { environment: &[("CAFILE", file)], ..Start::default() };
    for start in [by_option, by_variable] {
        let mut standing = Standing::at(At::Snoop, &start);
        // Our own certificate would be believed without any roots.
        standing.door.backend.play(Backend::Untrusted);
        let client = standing.door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\n");
        client.get(NOT_AVAILABLE).unwrap();
        ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").unwrap();
        assert!(standing.door.said().contains(file), "{}", standing.door.said());
        assert_eq!(standing.close(), 1);
    }
}
