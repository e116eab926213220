//! The same blow in every phase: reset, half-close, SIGTERM, SIGINT, SIGKILL, SIGSTOP.

use rustix::process::Signal;

use crate::door::{Start, tls_client};
use crate::steps::{At, Standing, all_of, ask_child, child_behind};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

#[test]
fn a_reset_ends_the_session_in_every_phase() {
    all_of(&At::everywhere(), |&(way, at)| {
        let mut standing = Standing::at(at, &Start::by(way));
        standing.door.client.take().unwrap().reset();
        let _ = standing.child.rest();
        standing.backend_sees_an_abort(at);
        let code = match at {
            // Of a reset the UCSPI-TLS server alone knows.
            At::ClientHandshake if way.is_ucspi_tls() => 98,
            At::RelayTls if way.is_ucspi_tls() => 0,
            // There is a server yet to come, which might answer what was said; here it comes to nothing.
            _ if at.is_late(way) && way.is_ucspi_tls() => 111,
            _ => 1,
        };
        assert_eq!(standing.close(), code);
    });
}

#[test]
fn a_half_close_ends_the_session_in_every_phase() {
    all_of(&At::everywhere(), |&(way, at)| {
        let mut standing = Standing::at(at, &Start::by(way));
        let is_dismissed = standing.is_dismissed(at);
        let client = standing.door.client.as_mut().unwrap();
        client.cut();
        // What was said before is answered first.
        let is_waited_for = at.is_late(way) && at.is_in_their_tls(way);
        if is_waited_for {
            child_behind(way, &mut standing.door, &mut standing.child).unwrap().exit(0);
        } else if at == At::RelayTls && at.is_in_their_tls(way) {
            let behind = child_behind(way, &mut standing.door, &mut standing.child).unwrap();
            assert_eq!(behind.rest().unwrap(), b"");
            behind.exit(0);
        } else if !is_dismissed {
            // A QUIT of ours may come before the end; nothing of the client's.
            let heard = standing.child.rest().unwrap();
            assert!(heard.is_empty() || heard == b"QUIT\r\n", "{}", heard.escape_ascii());
            match at {
                At::Ungreeted => standing.child.send(b"220 mail.example ESMTP\r\n"),
                At::Owed => standing.child.send(b"250 Ok\r\n"),
                _ => {}
            }
            standing.child.exit(0);
        }
        let (said, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
        match at {
            _ if is_waited_for => assert_eq!(said, b"421 4.3.0 Mail server not available\r\n"),
            At::Ungreeted => assert_eq!(said, b"220 mail.example ESMTP\r\n"),
            At::Owed => assert_eq!(said, b"250 Ok\r\n"),
            At::ClientHandshake => {}
            _ => assert_eq!((said.as_slice(), end == End::Reset), (&b""[..], false)),
        }
        if at.is_secure(way) {
            standing.backend_sees_an_abort(at);
        }
        let code = match at {
            At::ClientHandshake if way.is_ucspi_tls() => 98,
            At::RelayPlain => 0,
            At::RelayTls if at.is_in_their_tls(way) => 0,
            _ if is_waited_for => 111,
            _ => 1,
        };
        assert_eq!(standing.close(), code);
    });
}

#[test]
fn sigterm_and_sigint_end_the_session_in_every_phase() {
    all_of(&At::everywhere(), |&(way, at)| {
        for signal in [Signal::TERM, Signal::INT] {
            let mut standing = Standing::at(at, &Start::by(way));
            standing.door.kill(signal);
            let client = standing.door.client.as_mut().unwrap();
            let (said, end) = client.rest().unwrap();
            let silent = matches!(at, At::ClientHandshake | At::RelayPlain | At::RelayTls);
            if silent {
                assert!(!said.starts_with(b"4"), "{}", said.escape_ascii());
            } else {
                assert_eq!(said.escape_ascii().to_string(), "421 4.3.2 Service shutting down\\r\\n");
            }
            match at {
                At::RelayTls if way.ends_tls() => assert_ne!(end, End::Clean),
                At::ClientHandshake => {}
                _ => assert_eq!(end, End::Clean),
            }
            if at == At::RelayTls {
                standing.backend_sees_an_abort(at);
            }
            assert_eq!(standing.close(), 0);
        }
    });
}

#[test]
fn sigkill_is_the_end_for_child_backend_and_client_in_every_phase() {
    all_of(&At::everywhere(), |&(way, at)| {
        let mut standing = Standing::at(at, &Start::by(way));
        standing.door.kill(Signal::KILL);
        if !standing.is_dismissed(at) {
            let heard = standing.child.rest().unwrap();
            assert!(heard.is_empty(), "{}", heard.escape_ascii());
            standing.child.exit(0);
        }
        if at == At::ClientHandshake && way.is_ucspi_tls() {
            // The client is the UCSPI-TLS server's, whose time-out it is now.
            standing.door.wait().unwrap();
            return;
        }
        let (_, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
        assert!(!at.is_secure(way) || !way.ends_tls() || end != End::Clean);
        standing.backend_sees_an_abort(at);
        standing.door.wait().unwrap();
        // Its parent is now somebody else, who reaps it, or nobody here: only its pipes are ours to look at.
    });
}

#[test]
fn a_session_that_was_stopped_goes_on_where_it_was() {
    let at_rest = [At::Snoop, At::HalfLine, At::ClientHandshake, At::Gate, At::RelayPlain, At::RelayTls];
    let cases: Vec<_> = At::everywhere().into_iter().filter(|(_, at)| at_rest.contains(at)).collect();
    all_of(&cases, |&(way, at)| {
        let mut standing = Standing::at(at, &Start::by(way));
        standing.door.kill(Signal::STOP);
        assert!(wait_until(PATIENCE, || standing.door.state() == 'T'));
        let pid = standing.door.pid();
        let go_on = move || rustix::process::kill_process(pid, Signal::CONT).unwrap();
        let client = standing.door.client.as_mut().unwrap();
        match at {
            At::ClientHandshake => {
                std::thread::scope(|scope| {
                    let handshake = scope.spawn(|| client.secure(tls_client()));
                    go_on();
                    handshake.join().unwrap().unwrap();
                });
                standing.go_on_behind_the_220(At::Gate).unwrap();
            }
            At::Gate | At::RelayTls => {
                client.send(b"NOOP\r\n");
                go_on();
                standing.behind_gets(b"NOOP\r\n").unwrap();
                standing.behind_says(b"250 Ok\r\n").unwrap();
                standing.door.client.as_mut().unwrap().get(b"250 Ok\r\n").unwrap();
                standing.ask_behind("RSET\r\n", "250 Ok\r\n").unwrap();
            }
            _ => {
                client.send(if at == At::HalfLine { b"P\r\n" } else { b"NOOP\r\n" });
                go_on();
                let (door, child) = (&mut standing.door, &mut standing.child);
                child.get(b"NOOP\r\n").unwrap();
                child.send(b"250 Ok\r\n");
                door.client.as_mut().unwrap().get(b"250 Ok\r\n").unwrap();
                ask_child(door, child, "RSET\r\n", "250 Ok\r\n").unwrap();
            }
        }
        standing.close();
    });
}
