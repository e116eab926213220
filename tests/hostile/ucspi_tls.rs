//! The ways `ucspi-tls` and `ucspi-tls-respawn` under a server that follows UCSPI-TLS to the letter (`ucspi_tls_server.py`), and
//! under one that is gone.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use starttls_wrapper::session::Way;

use crate::child::Child;
use crate::door::{Door, Start, tls_client};
use crate::steps::{At, Standing, all_of, greet};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

/// The program under the server in this mode, its child, and the process of the server.
fn under_server(mode: &str, way: Way) -> (Door, Child, Option<String>) {
    with_options(mode, way, &[])
}

fn with_options(mode: &str, way: Way, options: &[&str]) -> (Door, Child, Option<String>) {
    let door = Door::open(&Start { way, options, tls_server: Some(mode), ..Start::default() });
    let child = Child::accept(&door.puppets).unwrap_or_else(|why| panic!("{why}: {}", door.said()));
    let pid = door.pid().as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let of_server = |child: &&str| fs::read_to_string(format!("/proc/{child}/comm")).unwrap().starts_with("python");
    let server = children.split_whitespace().find(of_server).map(str::to_owned);
    (door, child, server)
}

fn is_gone(pid: &str) -> bool {
    wait_until(PATIENCE, || !Path::new(&format!("/proc/{pid}")).exists())
}

/// Up to the 220 of the way that keeps the child.
fn promise(door: &mut Door, child: &mut Child) {
    greet(door, child).unwrap();
    let client = door.client.as_mut().unwrap();
    client.send(b"STARTTLS\r\n");
    child.get(b"RSET\r\n").unwrap();
    child.send(b"250 Ok\r\n");
    client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
}

#[test]
fn the_child_goes_on_behind_the_servers_tls() {
    let (mut door, mut child, server) = under_server("serve", Way::UcspiTls);
    assert_eq!(child.report.fds, "0 1 2");
    assert!(!child.report.environment.iter().any(|variable| variable.starts_with("SSL")), "{:?}", child.report);
    promise(&mut door, &mut child);
    let client = door.client.as_mut().unwrap();
    client.secure(tls_client()).unwrap();
    // The gate is ours all the same.
    client.send(b"MAIL FROM:<>\r\nEHLO client.example\r\nMAIL FROM:<>\r\n");
    client.get(b"503 5.5.1 Send EHLO first\r\n").unwrap();
    child.get(b"EHLO client.example\r\nMAIL FROM:<>\r\n").unwrap();
    child.send(b"250 mail.example\r\n250 Ok\r\n");
    client.get(b"250 mail.example\r\n250 Ok\r\n").unwrap();
    client.end();
    assert_eq!(child.rest().unwrap(), b"");
    child.exit(0);
    assert_eq!(client.get_end(), Ok(End::Clean));
    assert_eq!(door.code(), 0);
    let is_told = |what| door.said().contains(what);
    assert!(wait_until(PATIENCE, || is_told("mode=tls tls=TLSv1.3 suite=TLS_AES_")), "{}", door.said());
    assert!(is_told(" sni=localhost "), "{}", door.said());
    assert!(is_gone(&server.unwrap()));
}

#[test]
fn a_fresh_child_is_told_what_the_server_tells() {
    let (mut door, mut child, server) = under_server("serve", Way::UcspiRespawn);
    greet(&mut door, &mut child).unwrap();
    let client = door.client.as_mut().unwrap();
    client.send(b"STARTTLS\r\n");
    client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
    child.get(b"QUIT\r\n").unwrap();
    child.exit(0);
    client.secure(tls_client()).unwrap();
    let fresh = door.fresh().unwrap();
    let told: Vec<&str> =
        fresh.report.environment.iter().filter_map(|variable| variable.strip_prefix("SSL_")).collect();
    assert!(told.contains(&"PROTOCOL=TLSv1.3") && told.contains(&"TLS_SNI_SERVERNAME=localhost"), "{told:?}");
    assert_eq!((told.len(), fresh.report.fds.as_str()), (3, "0 1 2"));
    fresh.send(b"220 mail.example ESMTP\r\n");
    fresh.get(b"EHLO client.example\r\n").unwrap();
    fresh.send(b"250 mail.example\r\n");
    door.client.as_mut().unwrap().send(b"QUIT\r\n");
    let fresh = door.fresh().unwrap();
    fresh.get(b"QUIT\r\n").unwrap();
    fresh.send(b"221 Bye\r\n");
    fresh.exit(0);
    let client = door.client.as_mut().unwrap();
    client.get(b"221 Bye\r\n").unwrap();
    assert_eq!(client.get_end(), Ok(End::Clean));
    client.end();
    assert_eq!(door.code(), 0);
    assert!(is_gone(&server.unwrap()));
}

/// smtpd-starttls-proxy-io leaves a zombie in every such session.
#[test]
fn a_server_that_is_not_needed_ends_and_is_reaped_while_the_session_goes_on() {
    for way in [Way::UcspiTls, Way::UcspiRespawn] {
        let (mut door, mut child, server) = under_server("serve", way);
        greet(&mut door, &mut child).unwrap();
        let client = door.client.as_mut().unwrap();
        client.send(b"MAIL FROM:<>\r\n");
        child.get(b"MAIL FROM:<>\r\n").unwrap();
        assert!(is_gone(&server.unwrap()));
        child.send(b"250 Ok\r\n");
        client.get(b"250 Ok\r\n").unwrap();
        client.end();
        let _ = child.rest();
        child.exit(0);
        assert_eq!(door.code(), 0);
    }
}

#[test]
fn a_server_that_is_gone_before_the_220_is_a_454() {
    for way in [Way::UcspiTls, Way::UcspiRespawn] {
        let (mut door, mut child, _) = under_server("dead", way);
        greet(&mut door, &mut child).unwrap();
        let client = door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\nNOOP\r\n");
        // Octets behind STARTTLS are what they always are.
        client.get(b"421 4.7.0").unwrap();
        let _ = client.rest();
        child.exit(0);
        assert_eq!(door.code(), 1);

        let (mut door, mut child, _) = under_server("dead", way);
        greet(&mut door, &mut child).unwrap();
        let client = door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\n");
        client.get(b"454 4.7.0 TLS not available\r\n").unwrap();
        assert!(
            door.said().contains(&format!("way {way}, dial failed: the UCSPI-TLS server is gone")),
            "{}",
            door.said()
        );
        crate::steps::ask_child(&mut door, &mut child, "NOOP\r\n", "250 Ok\r\n").unwrap();
        door.client.as_mut().unwrap().end();
        child.exit(0);
        door.code();
    }
}

/// PROG may think about RSET for longer than that server lives.
#[test]
fn a_server_that_dies_while_prog_is_asked_is_a_454() {
    let (mut door, mut child, server) = under_server("serve", Way::UcspiTls);
    greet(&mut door, &mut child).unwrap();
    let client = door.client.as_mut().unwrap();
    client.send(b"STARTTLS\r\n");
    child.get(b"RSET\r\n").unwrap();
    let server = server.unwrap();
    signal(&server, Signal::KILL);
    // Reaped when the session goes on without TLS, and not before.
    let is_zombie = || fs::read_to_string(format!("/proc/{server}/stat")).unwrap().contains(") Z ");
    assert!(wait_until(PATIENCE, is_zombie));
    child.send(b"250 Ok\r\n");
    client.get(b"454 4.7.0 TLS not available\r\n").unwrap();
    let told = "STARTTLS answered 454: way ucspi-tls, commit failed: the UCSPI-TLS server is gone";
    assert!(door.said().contains(told), "{}", door.said());
    crate::steps::ask_child(&mut door, &mut child, "NOOP\r\n", "250 Ok\r\n").unwrap();
    door.client.as_mut().unwrap().end();
    // Were the child gone before the client's end is seen, that would be what ended the session.
    let _ = child.rest();
    child.exit(0);
    assert_eq!(door.code(), 1);
    assert!(is_gone(&server));
}

#[test]
fn a_server_that_gives_up_behind_the_220_is_98_and_nothing_in_clear() {
    let (mut door, mut child, server) = under_server("gives-up", Way::UcspiTls);
    promise(&mut door, &mut child);
    let client = door.client.as_mut().unwrap();
    assert_eq!(client.rest().unwrap().0, b"");
    assert_eq!(child.rest().unwrap(), b"");
    child.exit(0);
    assert_eq!(door.code(), 98);
    // No warning, as of a handshake of ours: any stranger could fill the log. The summary names way and step.
    let said = door.said();
    let end = "end=\"way ucspi-tls, client handshake failed: the UCSPI-TLS server gave up";
    assert!(said.contains(end) && !said.contains("warning"), "{said}");
    assert!(is_gone(&server.unwrap()));
}

/// There is no way back, and the TLS is sound: the client hears inside it that there is no service.
#[test]
fn a_fresh_child_that_gives_up_behind_the_220_is_a_421_inside_the_servers_tls() {
    all_of(&["", "421 4.3.2 Busy\r\n", "554 5.3.2 No\r\n"], |greeting| {
        let mut standing = Standing::at(At::Greeting, &Start::by(Way::UcspiRespawn));
        let fresh = standing.door.fresh.as_mut().unwrap();
        if greeting.is_empty() {
            fresh.exit(0);
        } else {
            fresh.send(greeting.as_bytes());
            assert!(!fresh.rest().unwrap().starts_with(b"EHLO"));
            fresh.exit(0);
        }
        let (said, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
        assert_eq!((said.as_slice(), end), (&b"421 4.3.0 Mail server not available\r\n"[..], End::Clean));
        drop(standing.door.client.take());
        assert_eq!(standing.door.code(), 111);
        let said = standing.door.said();
        let warnings: Vec<&str> = said.lines().filter(|line| line.contains("]: warning: ")).collect();
        let told = "way ucspi-tls-respawn, backend greeting failed: ";
        assert!(warnings.len() == 1 && warnings[0].contains(told), "{said}");
        standing.must_be_gone();
    });
}

/// The server has no time-out of its own, holds the client's connection, and is nobody whom we could end.
#[test]
fn a_client_silent_behind_the_220_is_cut_off() {
    all_of(&["time-out", "SIGTERM"], |&how| {
        let options = ["--handshake-timeout", if how == "SIGTERM" { "1000" } else { "1" }];
        let (mut door, mut child, server) = with_options("apart", Way::UcspiTls, &options);
        assert_eq!(server, None);
        promise(&mut door, &mut child);
        if how == "SIGTERM" {
            door.kill(Signal::TERM);
        }
        let client = door.client.as_mut().unwrap();
        assert_eq!(client.rest().unwrap().0, b"");
        assert_eq!(child.rest().unwrap(), b"");
        child.exit(0);
        assert_eq!(door.code(), if how == "SIGTERM" { 0 } else { 99 });
    });
}

/// Inside TLS, behind EHLO.
fn relay(options: &[&str]) -> (Door, Child, String) {
    let (mut door, mut child, server) = with_options("serve", Way::UcspiTls, options);
    promise(&mut door, &mut child);
    let client = door.client.as_mut().unwrap();
    client.secure(tls_client()).unwrap();
    client.send(b"EHLO client.example\r\n");
    child.get(b"EHLO client.example\r\n").unwrap();
    child.send(b"250 mail.example\r\n");
    client.get(b"250 mail.example\r\n").unwrap();
    (door, child, server.unwrap())
}

fn signal(pid: &str, signal: Signal) {
    kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), signal).unwrap();
}

/// As it is while a client reads slowly: the child's farewell has nothing to do with it.
#[test]
fn a_server_that_takes_its_time_may_say_what_is_owed() {
    let (mut door, mut child, server) = relay(&["--farewell-timeout", "1"]);
    signal(&server, Signal::STOP);
    child.send(b"221 Bye\r\n");
    child.exit(0);
    assert!(wait_until(PATIENCE, || door.said().contains("end=\"over\"")), "{}", door.said());
    assert!(!wait_until(Duration::from_secs(2), || !Path::new(&format!("/proc/{server}")).exists()));
    signal(&server, Signal::CONT);
    let client = door.client.as_mut().unwrap();
    client.get(b"221 Bye\r\n").unwrap();
    assert_eq!(client.get_end(), Ok(End::Clean));
    client.end();
    assert_eq!(door.code(), 0);
    assert!(is_gone(&server));
}

/// It waits for a close_notify that never comes.
#[test]
fn a_server_whose_client_never_closes_is_not_left_behind() {
    let (mut door, mut child, server) = relay(&["--relay-timeout", "1"]);
    assert_eq!(child.rest().unwrap(), b"");
    child.exit(0);
    assert_eq!(door.code(), 99);
    assert!(is_gone(&server));
}

#[test]
fn a_server_that_tells_nothing_has_done_tls_all_the_same() {
    let (mut door, mut child, _) = under_server("secretive", Way::UcspiTls);
    promise(&mut door, &mut child);
    let client = door.client.as_mut().unwrap();
    client.secure(tls_client()).unwrap();
    client.end();
    child.exit(0);
    door.code();
    assert!(wait_until(PATIENCE, || door.said().contains("mode=tls tls=- suite=- sni=- ")), "{}", door.said());
}

#[test]
fn what_a_lying_server_tells_gives_a_fresh_child_no_orders() {
    let (mut door, mut child, _) = under_server("liar", Way::UcspiRespawn);
    greet(&mut door, &mut child).unwrap();
    let client = door.client.as_mut().unwrap();
    client.send(b"STARTTLS\r\n");
    client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
    child.exit(0);
    client.secure(tls_client()).unwrap();
    let environment = door.fresh().unwrap().report.environment.clone();
    let told: Vec<&String> = environment.iter().filter(|variable| variable.starts_with("SSL_")).collect();
    assert!(!environment.iter().any(|variable| variable.to_lowercase().contains("poisoned")), "{told:?}");
    assert!(told.iter().any(|variable| *variable == "SSL_PROTOCOL=TLSv1.3"), "{told:?}");
    assert!(!told.iter().any(|variable| variable.starts_with("SSL_LONG")), "{told:?}");
    assert!(told.iter().map(|variable| variable.len() + 1).sum::<usize>() < 4096, "{}", told.len());
    door.fresh().unwrap().exit(0);
    door.code();
}

#[test]
fn a_server_that_never_stops_telling_is_98_and_not_remembered() {
    let (mut door, mut child, _) = under_server("flooder", Way::UcspiTls);
    let before = door.memory("VmHWM");
    promise(&mut door, &mut child);
    let client = door.client.as_mut().unwrap();
    client.secure(tls_client()).unwrap();
    assert_eq!(client.rest().unwrap().0, b"");
    let grown = door.memory("VmHWM") - before;
    child.exit(0);
    assert_eq!(door.code(), 98);
    assert!(grown < 2048, "{grown} KiB more");
}

/// Half a variable is none: neither PROG nor the log has it.
#[test]
fn a_server_that_dies_telling_is_98_and_what_it_told_nobody_gets() {
    let (mut door, mut child, server) = under_server("dies-telling", Way::UcspiTls);
    promise(&mut door, &mut child);
    let client = door.client.as_mut().unwrap();
    // Its half of the handshake may have come to its end.
    let _ = client.secure(tls_client());
    assert_eq!(client.rest().unwrap().0, b"");
    assert_eq!(child.rest().unwrap(), b"");
    child.exit(0);
    assert_eq!(door.code(), 98);
    assert!(door.said().contains("the UCSPI-TLS server gave up"), "{}", door.said());
    assert!(!door.said().contains("suite=TLS_"), "{}", door.said());
    assert!(is_gone(&server.unwrap()));
}

#[test]
fn garbage_where_tls_is_due_is_98() {
    let (mut door, mut child, server) = under_server("serve", Way::UcspiTls);
    promise(&mut door, &mut child);
    let client = door.client.as_mut().unwrap();
    client.send(b"EHLO client.example\r\n");
    let _ = client.rest();
    assert_eq!(child.rest().unwrap(), b"");
    child.exit(0);
    assert_eq!(door.code(), 98);
    assert!(is_gone(&server.unwrap()));
}

#[test]
fn without_a_server_it_is_a_usage_error() {
    let descriptor_of_nobody = [("SSLCTLFD", "999"), ("SSLREADFD", "998"), ("SSLWRITEFD", "997")];
    let twice = [("SSLCTLFD", "2"), ("SSLREADFD", "2"), ("SSLWRITEFD", "2")];
    for environment in [&[][..], &descriptor_of_nobody, &twice] {
        let mut door = Door::open(&Start { way: Way::UcspiTls, environment, ..Start::default() });
        assert_eq!(door.code(), 100, "{}", door.said());
    }
}

/// `smtpd-starttls-proxy-io [--] PROG ARGS...`: what stands behind that name may stand behind ours, and is PROG's own.
#[test]
fn the_arguments_of_smtpd_starttls_proxy_io_are_taken_as_they_are() {
    let script = "printf '220 %s\\r\\n' \"$*\"; read -r end";
    let prog = ["--", "/bin/sh", "-c", script, "smtpd", "-v", "--way", "keep", "--", "mx.example", "25"];
    for way in [Way::UcspiTls, Way::UcspiRespawn] {
        for program in [&prog[..], &prog[1..]] {
            let mut door = Door::open(&Start { program: Some(program), ..Start::by(way) });
            let client = door.client.as_mut().unwrap();
            client
                .get(b"220 -v --way keep -- mx.example 25\r\n")
                .unwrap_or_else(|why| panic!("{why}: {}", door.said()));
            door.client.as_mut().unwrap().end();
            door.code();
        }
    }
    // Its own usage errors are ours.
    for program in [&[][..], &["-x", "/bin/true"], &["--"]] {
        let mut door = Door::open(&Start { program: Some(program), ..Start::by(Way::UcspiTls) });
        assert_eq!(door.code(), 100, "{program:?}: {}", door.said());
    }
}

/// TLS_UID and TLS_GID are then the server's own: whoever starts us behind it as another user has us drop nothing.
#[test]
fn the_ids_of_the_servers_are_taken_on_by_who_is_still_root_and_nobody_else() {
    let environment = [("TLS_UID", "65533"), ("TLS_GID", "65532")];
    let [uid, gid] = [rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw()];
    let cases =
        if uid == 0 { vec![(None, [65533, 65532]), (Some(65534), [65534, 65534])] } else { vec![(None, [uid, gid])] };
    for (way, (uid, ids)) in
        [Way::UcspiTls, Way::UcspiRespawn].iter().flat_map(|&way| cases.iter().map(move |&case| (way, case)))
    {
        let prog = ["/bin/sh", "-c", "printf '220 h\\r\\n'; read -r end"];
        let start = Start { environment: &environment, program: Some(&prog), uid, ..Start::by(way) };
        let mut door = Door::open(&start);
        let greeted = door.client.as_mut().unwrap().get(b"220 h\r\n");
        greeted.unwrap_or_else(|why| panic!("{why}: {}", door.said()));
        let status = fs::read_to_string(format!("/proc/{}/status", door.program.id())).unwrap();
        for (field, id) in ["Uid", "Gid"].iter().zip(ids) {
            let line = format!("{field}:\t{id}\t{id}\t{id}\t{id}\n");
            assert!(status.contains(&line), "{way}: {line:?}: {status}");
        }
        door.client.as_mut().unwrap().end();
        assert_eq!(door.code(), 1, "{}", door.said());
        assert!(!door.said().contains("privileges"), "{}", door.said());
    }
}

#[test]
fn a_client_that_resets_behind_the_220_leaves_nothing_behind() {
    let (mut door, mut child, server) = under_server("serve", Way::UcspiTls);
    promise(&mut door, &mut child);
    door.client.take().unwrap().reset();
    assert_eq!(child.rest().unwrap(), b"");
    child.exit(0);
    assert_eq!(door.code(), 98);
    assert!(is_gone(&server.unwrap()));
}
