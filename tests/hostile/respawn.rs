//! The process that waits to become the fresh PROG, and that PROG: what each is told and holds, how each can die, and that
//! nothing of either is left.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};
use starttls_wrapper::session::Way;

use crate::child::{Child, Report};
use crate::door::{Door, Shape, Start, certificate, tls_client};
use crate::steps::{At, Standing, all_of};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

const RESPAWN: Start<'_> = Start { way: Way::Respawn, ..Start::USUAL };

/// The children of the program but this one.
fn others(door: &Door, child: &Child) -> Vec<Pid> {
    let pid = door.pid().as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let pids = children.split_whitespace().map(|pid| pid.parse::<i32>().unwrap());
    pids.filter(|pid| *pid != child.report.pid as i32).filter_map(Pid::from_raw).collect()
}

fn holder(standing: &Standing) -> Pid {
    let [holder] = others(&standing.door, &standing.child)[..] else { panic!("one process waits") };
    holder
}

fn is_gone(pid: Pid) -> bool {
    wait_until(PATIENCE, || !fs::exists(format!("/proc/{}", pid.as_raw_nonzero())).unwrap())
}

fn state(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default()
}

fn of_environment(report: &Report, name: &str) -> Option<String> {
    report.environment.iter().find_map(|variable| Some(variable.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
}

#[test]
fn the_fresh_child_is_told_of_the_clients_tls_and_has_all_that_the_first_had() {
    let environment = [("CERTFILE", "/x"), ("SSL_CIPHER", "stale"), ("SSL_TLS_SNI_SERVERNAME", "stale"), ("LANG", "C")];
    let start = Start { environment: &environment, ..RESPAWN };
    let standing = Standing::at(At::Gate, &start);
    let (first, fresh) = (&standing.child.report, &standing.door.fresh.as_ref().unwrap().report);
    assert!(!first.environment.iter().any(|variable| variable.starts_with("SSL_")), "{first:?}");
    assert_eq!(of_environment(fresh, "SSL_PROTOCOL").as_deref(), Some("TLSv1.3"));
    assert!(of_environment(fresh, "SSL_CIPHER").is_some_and(|suite| suite.starts_with("TLS_AES_")), "{fresh:?}");
    assert_eq!(of_environment(fresh, "SSL_TLS_SNI_SERVERNAME").as_deref(), Some("localhost"));
    let rest = |report: &Report| {
        let mut rest = report.environment.clone();
        rest.retain(|variable| !variable.starts_with("SSL_"));
        rest.sort();
        rest
    };
    assert_eq!(rest(first), rest(fresh));
    assert!(of_environment(fresh, "TCPREMOTEIP").is_some() && of_environment(fresh, "CERTFILE").is_none());
    assert_eq!((&fresh.fds, &fresh.signals, &fresh.folder), (&first.fds, &first.signals, &first.folder));
    assert_eq!(fresh.arguments, first.arguments);
    standing.close();
}

/// Whoever starts us may itself have been started behind TLS. What `--mute` finds is said of its own client.
#[test]
fn a_prog_that_speaks_in_the_clear_is_told_of_no_tls_by_any_way() {
    let stale = ["SSL_PROTOCOL", "SSL_CIPHER", "SSL_TLS_SNI_SERVERNAME"].map(|name| (name, "stale"));
    let shapes = Way::EVERY.map(|way| (way, Shape::Tcp)).into_iter().chain([(Way::Tls, Shape::Listener)]);
    for (way, shape) in shapes {
        let mut door = Door::open(&Start { environment: &stale, shape, ..Start::by(way) });
        let mut child = Child::accept(&door.puppets).unwrap_or_else(|why| panic!("{way}: {why}: {}", door.said()));
        let told = child.report.environment.iter().filter(|variable| variable.starts_with("SSL_")).count();
        assert_eq!(told, if way == Way::Mute { stale.len() } else { 0 }, "{way}: {:?}", child.report);
        drop(door.client.take());
        child.exit(0);
    }
}

/// It holds neither the client nor the first child open, and not the key.
#[test]
fn what_waits_holds_three_pipes_and_no_key() {
    for options in [&[][..], &["--require-tls"]] {
        let standing = Standing::at(At::Snoop, &Start { options, ..RESPAWN });
        let holder = holder(&standing).as_raw_nonzero();
        let fds = fs::read_dir(format!("/proc/{holder}/fd")).unwrap().map(|fd| fd.unwrap().path());
        let mut fds: Vec<_> = fds.map(|fd| (fd.file_name().unwrap().to_owned(), fs::read_link(fd).unwrap())).collect();
        fds.sort();
        let numbers: Vec<_> = fds.iter().map(|(number, _)| number.to_str().unwrap()).collect();
        assert!(numbers.len() == 4 && numbers.starts_with(&["0", "1", "2"]), "{numbers:?}");
        assert!(
            fds.iter().filter(|(number, _)| number != "2").all(|(_, to)| to.to_string_lossy().starts_with("pipe:")),
            "{fds:?}"
        );
        if rustix::process::getuid().is_root() {
            let certificate = certificate();
            let key = certificate.key_der();
            let text = certificate.key_pem.lines().nth(1).unwrap().as_bytes();
            let memory = crate::memory::of(Pid::from_raw(holder.get()).unwrap());
            let holds =
                |wanted: &[u8]| memory.iter().any(|piece| piece.windows(wanted.len()).any(|part| part == wanted));
            assert!(holds(b"--cert"), "it can't be seen");
            assert!(!holds(key) && !holds(text), "the key is in the process that waits");
        }
        standing.close();
    }
}

#[test]
fn a_session_without_tls_releases_what_waits_and_leaves_no_zombie() {
    let standing = Standing::at(At::RelayPlain, &RESPAWN);
    assert!(wait_until(PATIENCE, || others(&standing.door, &standing.child).is_empty()));
    assert_eq!(standing.close(), 0);
    let start = Start { certificate: false, ..RESPAWN };
    let mut door = Door::open(&start);
    let child = Child::accept(&door.puppets).unwrap();
    assert_eq!(others(&door, &child), [], "without a certificate nothing waits");
    drop((child, door.client.take()));
    door.code();
}

#[test]
fn what_waits_and_dies_before_starttls_is_a_454() {
    let mut standing = Standing::at(At::Snoop, &RESPAWN);
    let holder = holder(&standing);
    kill_process(holder, Signal::KILL).unwrap();
    assert!(wait_until(PATIENCE, || state(holder).contains(") Z ")));
    let client = standing.door.client.as_mut().unwrap();
    client.send(b"STARTTLS\r\n");
    client.get(b"454 4.7.0 TLS not available\r\n").unwrap();
    client.send(b"NOOP\r\n");
    standing.child.get(b"NOOP\r\n").unwrap();
    standing.child.send(b"250 Ok\r\n");
    client.get(b"250 Ok\r\n").unwrap();
    assert!(standing.door.said().contains("way respawn, dial failed"), "{}", standing.door.said());
    assert_eq!(standing.close(), 1);
}

#[test]
fn what_waits_and_dies_behind_the_220_is_a_421_inside_tls() {
    let mut standing = Standing::at(At::ClientHandshake, &RESPAWN);
    let holder = holder(&standing);
    kill_process(holder, Signal::KILL).unwrap();
    let client = standing.door.client.as_mut().unwrap();
    client.secure(tls_client()).unwrap();
    client.get(b"421 4.3.0 Mail server not available\r\n").unwrap();
    assert_eq!(client.get_end(), Ok(End::Clean));
    let is_said = |what| standing.door.said().contains(what);
    let steps = ["way respawn, start failed", "way respawn, backend greeting failed"];
    assert!(wait_until(PATIENCE, || steps.into_iter().any(is_said)), "{}", standing.door.said());
    assert_eq!(standing.close(), 111);
    assert!(is_gone(holder));
}

#[test]
fn a_fresh_child_killed_in_any_step_is_no_clean_end_and_leaves_nothing() {
    all_of(&[At::Greeting, At::Replay, At::Gate, At::RelayTls], |&at| {
        let mut standing = Standing::at(at, &RESPAWN);
        let fresh = standing.door.fresh.as_mut().unwrap();
        kill_process(Pid::from_raw(fresh.report.pid as i32).unwrap(), Signal::KILL).unwrap();
        // Our copies of its pipes.
        fresh.exit(0);
        let client = standing.door.client.as_mut().unwrap();
        let (said, end) = client.rest().unwrap();
        if at == At::RelayTls {
            assert_eq!((said.as_slice(), end == End::Clean), (&b""[..], false));
        } else {
            assert_eq!((said.as_slice(), end), (&b"421 4.3.0 Mail server not available\r\n"[..], End::Clean));
        }
        assert_eq!(standing.close(), 111);
    });
}

#[test]
fn a_prog_that_is_gone_meanwhile_is_a_421_inside_tls_and_said() {
    let folder = tempfile::TempDir::new().unwrap();
    let prog = folder.path().join("prog");
    std::os::unix::fs::symlink(crate::child::puppet(), &prog).unwrap();
    let sockets = folder.path().join("puppets");
    let puppets = std::os::unix::net::UnixListener::bind(&sockets).unwrap();
    let words = [prog.to_str().unwrap(), sockets.to_str().unwrap()];
    let mut door = Door::open(&Start { program: Some(&words), ..RESPAWN });
    let mut child = Child::accept(&puppets).unwrap();
    crate::steps::greet(&mut door, &mut child).unwrap();
    fs::remove_file(&prog).unwrap();
    let client = door.client.as_mut().unwrap();
    client.send(b"STARTTLS\r\n");
    client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
    client.secure(tls_client()).unwrap();
    client.get(b"421 4.3.0 Mail server not available\r\n").unwrap();
    child.exit(0);
    assert_eq!(door.code(), 111);
    assert!(door.said().contains("prog: No such file"), "{}", door.said());
}

#[test]
fn a_killed_wrapper_leaves_nobody_waiting() {
    all_of(&[At::Ungreeted, At::Snoop, At::ClientHandshake], |&at| {
        let mut standing = Standing::at(at, &RESPAWN);
        let holder = holder(&standing);
        standing.door.kill(Signal::KILL);
        standing.door.wait().unwrap();
        // Somebody else reaps it; where nobody does, it is a zombie, which waits for nothing.
        let state = || state(holder);
        assert!(wait_until(PATIENCE, || state().is_empty() || state().contains(") Z ")), "{}", state());
        standing.child.exit(0);
    });
}

/// The client is held by us alone: when we close, it sees the end although the fresh child lives on.
#[test]
fn a_fresh_child_that_stays_is_ended_like_any_other() {
    let options = ["--farewell-timeout", "1", "--relay-timeout", "1"];
    let mut standing = Standing::at(At::RelayTls, &Start { options: &options, mode: "ignore-term", ..RESPAWN });
    standing.door.client.as_mut().unwrap().end();
    let fresh = standing.door.fresh.as_mut().unwrap();
    assert_eq!(fresh.rest().unwrap(), b"");
    assert_eq!(standing.door.code(), 99, "{}", standing.door.said());
    let fresh = standing.door.fresh.as_ref().unwrap();
    assert!(fresh.is_gone(PATIENCE));
}

/// Response injection by the second greeting: nothing of it comes through.
#[test]
fn a_fresh_child_that_says_more_than_its_greeting_is_given_up() {
    let greetings: [&[u8]; 5] = [
        b"220 mail.example\r\n250 injected\r\n",
        b"220 mail.example\r\n250-injected\r\n",
        b"220-mail.example\r\n250 injected\r\n220 mail.example\r\n",
        b"\0\0\0\r\n220 injected\r\n",
        b"injected",
    ];
    all_of(&greetings, |greeting| {
        let options = ["--greeting-timeout", "2"];
        let mut standing = Standing::at(At::Greeting, &Start { options: &options, ..RESPAWN });
        let fresh = standing.door.fresh.as_mut().unwrap();
        fresh.send(greeting);
        let client = standing.door.client.as_mut().unwrap();
        let (said, end) = client.rest().unwrap();
        assert_eq!((said.as_slice(), end), (&b"421 4.3.0 Mail server not available\r\n"[..], End::Clean));
        let fresh = standing.door.fresh.as_mut().unwrap();
        assert!(!fresh.rest().unwrap().starts_with(b"EHLO"));
        fresh.exit(0);
        assert_eq!(standing.close(), 111);
    });
}
