//! What the session promises its owner beyond the octets that a dialogue shows: when it may be given more, when it wants to be
//! called, and what the operator is told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{BackendEnd, ClientEnd, EndReason, Note, Phase, Policy, Session, Way, limits};

/// A session that has come so far, with nothing unwritten.
fn at(phase: Phase, way: Way, now: Instant) -> Session {
    let mut session = Session::new(Arc::new(Policy { way, ..Policy::default() }), now);
    session.handle_child(b"220 h\r\n", now);
    if phase == Phase::RelayPlain {
        session.handle_client(b"MAIL FROM:<>\r\n", now);
    } else if phase != Phase::Snoop {
        session.handle_client(b"EHLO c\r\n", now);
        session.handle_child(b"250 h\r\n", now);
        session.handle_client(b"STARTTLS\r\n", now);
    }
    for _ in Phase::ALL {
        written(&mut session, now);
        if session.phase() == phase {
            return session;
        }
        match session.phase() {
            Phase::Dial => session.handle_dialled(now),
            Phase::SecureBackend => session.handle_backend_secured(now),
            Phase::Greeting => session.handle_backend(b"220 b\r\n", now),
            Phase::Replay => session.handle_backend(b"250 b\r\n", now),
            Phase::Commit => session.handle_quiet(now),
            Phase::Announce => session.handle_announced(now),
            Phase::SecureClient => session.handle_client_secured(now),
            Phase::Gate => session.handle_client(b"EHLO c\r\n", now),
            other => panic!("{other:?} on the way to {phase:?}"),
        }
    }
    panic!("{phase:?} is not reached by {way}");
}

/// All that was queued has been written.
fn written(session: &mut Session, now: Instant) {
    session.to_client.clear();
    session.to_child.clear();
    session.to_backend.clear();
    session.handle_written(now);
}

fn notes(session: &mut Session) -> Vec<Note> {
    std::iter::from_fn(|| session.poll_note()).collect()
}

#[test]
fn the_client_is_read_until_a_queue_is_over_its_limit() {
    let now = Instant::now();
    for (phase, other) in [(Phase::Snoop, Phase::Gate), (Phase::Gate, Phase::Snoop)] {
        for (octets, is_read) in [(limits::TO_SERVER, true), (limits::TO_SERVER + 1, false)] {
            let mut session = at(phase, Way::Tls, now);
            let queue = if phase == Phase::Gate { &mut session.to_backend } else { &mut session.to_child };
            queue.push(&vec![b'a'; octets]);
            assert_eq!(session.client_room() > 0, is_read, "{phase:?}: {octets} for the server");
        }
        for (octets, is_read) in [(limits::TO_CLIENT, true), (limits::TO_CLIENT + 1, false)] {
            let mut session = at(phase, Way::Tls, now);
            session.to_client.push(&vec![b'a'; octets]);
            assert_eq!(session.client_room() > 0, is_read, "{phase:?}: {octets} for the client");
        }
        let mut session = at(phase, Way::Tls, now);
        let queue = if other == Phase::Gate { &mut session.to_backend } else { &mut session.to_child };
        queue.push(&vec![b'a'; limits::TO_SERVER + 1]);
        assert!(session.client_room() > 0, "{phase:?}: the other server's queue is none of it");
    }
}

#[test]
fn one_octet_is_read_where_it_would_be_one_too_many_and_none_where_it_is_not_for_us() {
    let now = Instant::now();
    for phase in Phase::steps(Way::Tls) {
        let expected = match phase {
            Phase::Announce | Phase::SecureClient => 0,
            Phase::Gate => 2 * crate::smtp::line::LIMIT,
            _ => 1,
        };
        assert_eq!(at(*phase, Way::Tls, now).client_room(), expected, "{phase:?}");
    }
    assert_eq!(at(Phase::RelayPlain, Way::Tls, now).client_room(), 0);
}

#[test]
fn commands_are_taken_until_a_queue_is_over_its_limit() {
    let now = Instant::now();
    for (phase, line) in [(Phase::Snoop, &b"NOOP\r\n"[..]), (Phase::Gate, b"NOOP\r\n")] {
        for (over, is_taken) in [(0, true), (1, false)] {
            let mut session = at(phase, Way::Tls, now);
            let queue = if phase == Phase::Gate { &mut session.to_backend } else { &mut session.to_child };
            queue.push(&vec![b'a'; limits::TO_SERVER + over]);
            let before = session.to_child.len() + session.to_backend.len();
            session.handle_client(line, now);
            let after = session.to_child.len() + session.to_backend.len();
            assert_eq!(after > before, is_taken, "{phase:?}: {over} over for the server");

            let mut session = at(phase, Way::Tls, now);
            session.to_client.push(&vec![b'a'; limits::TO_CLIENT + over]);
            session.handle_client(line, now);
            let taken = session.to_child.len() + session.to_backend.len() > 0;
            assert_eq!(taken, is_taken, "{phase:?}: {over} over for the client");
        }
    }
}

#[test]
fn a_server_is_read_in_its_phases_until_the_client_has_enough_before_it() {
    let now = Instant::now();
    for way in [Way::Tls, Way::Plain, Way::Keep] {
        for phase in Phase::steps(way).iter().chain(&[Phase::Snoop, Phase::RelayPlain, Phase::RelayTls]) {
            let mut session = at(*phase, way, now);
            assert_eq!(session.wants_child(), *phase == Phase::Snoop, "{way}, {phase:?}");
            let wants_backend = matches!(phase, Phase::Greeting | Phase::Replay | Phase::Gate);
            assert_eq!(session.wants_backend(), wants_backend, "{way}, {phase:?}");
            session.to_client.push(&[b'a'; limits::TO_CLIENT]);
            assert_eq!((session.wants_child(), session.wants_backend()), (*phase == Phase::Snoop, wants_backend));
            session.to_client.push(b"a");
            assert!(!session.wants_child(), "{way}, {phase:?}");
            assert_eq!(session.wants_backend(), wants_backend && *phase != Phase::Gate, "{way}, {phase:?}");
        }
    }
}

#[test]
fn it_says_when_too_many_replies_are_owed() {
    let now = Instant::now();
    let mut session = at(Phase::Snoop, Way::Tls, now);
    for _ in 0..limits::REPLIES_OWED {
        assert!(session.may_take());
        session.handle_client(b"NOOP\r\n", now);
    }
    assert!(!session.may_take());
}

#[test]
fn the_commands_recorded_are_counted() {
    let now = Instant::now();
    let mut session = at(Phase::Snoop, Way::Tls, now);
    assert_eq!(session.recorded(), 0);
    session.handle_client(b"EHLO a\r\nNOOP\r\nNO\0OP\r\nRSET\r\n", now);
    assert_eq!(session.recorded(), 3);
}

#[test]
fn a_relay_ends_when_nothing_has_moved_for_its_time() {
    for phase in [Phase::RelayPlain, Phase::RelayTls] {
        let (start, silence) = (Instant::now(), Policy::default().timeouts.relay);
        let mut session = at(phase, Way::Tls, start);
        assert_eq!(session.deadline(), Some(start + silence));
        let later = start + silence - Duration::from_secs(1);
        session.handle_relayed(later);
        session.handle_timeout(start + silence);
        assert_eq!((session.end(), session.deadline()), (None, Some(later + silence)), "{phase:?}");
        session.handle_timeout(later + silence);
        assert_eq!(session.end(), Some(&EndReason::Timeout(phase)));
    }
}

#[test]
fn a_relay_with_one_end_gone_has_a_little_time_and_its_own_verdict() {
    type Ends = fn(&mut Session, Instant);
    let over = EndReason::Over;
    let broken = EndReason::Client(ClientEnd::BrokeOff);
    let cases: [(Ends, Duration, EndReason); 2] = [
        (Session::handle_server_finished, limits::HALF_CLOSED, over),
        (Session::handle_client_broke_off, limits::LINGER, broken),
    ];
    for (ends, time, reason) in cases {
        let start = Instant::now();
        let mut session = at(Phase::RelayTls, Way::Tls, start);
        let then = start + Duration::from_secs(100);
        ends(&mut session, then);
        assert_eq!(session.deadline(), Some(then + time), "{reason}");
        session.handle_timeout(then + time);
        assert_eq!(session.end(), Some(&reason));
    }
}

#[test]
fn what_the_client_never_took_makes_no_good_end() {
    let now = Instant::now();
    for (reason, unsent) in [
        (EndReason::Over, EndReason::Timeout(Phase::Close)),
        (EndReason::Terminated, EndReason::Terminated),
        (EndReason::Backend(BackendEnd::Gone), EndReason::Backend(BackendEnd::Gone)),
    ] {
        let mut session = at(Phase::RelayTls, Way::Tls, now);
        session.handle_end(reason, now);
        session.handle_unsent();
        assert_eq!((session.end(), session.ended_in()), (Some(&unsent), Phase::RelayTls));
    }
}

#[test]
fn the_operator_hears_once_of_what_a_client_can_bring_about_at_will() {
    let now = Instant::now();
    let without = Policy { offer_tls: false, ..Policy::default() };
    let mut session = Session::new(Arc::new(without), now);
    session.handle_child(b"220 h\r\n", now);
    session.handle_client(b"STARTTLS\r\n", now);
    session.handle_client(b"STARTTLS\r\n", now);
    assert_eq!(notes(&mut session), [Note::NoCertificate]);

    let mut session = at(Phase::Snoop, Way::Tls, now);
    for _ in 0..2 {
        session.handle_client(b"EHLO c\r\n", now);
        session.handle_child(b"250-h\r\n250 STARTTLS\r\n", now);
    }
    assert_eq!(notes(&mut session), [Note::ChildOffersStarttls]);
}

#[test]
fn so_many_hand_overs_may_fail_and_each_is_noted() {
    let now = Instant::now();
    let mut session = at(Phase::Snoop, Way::Tls, now);
    for number in 1..=limits::HANDOVERS + 2 {
        session.handle_client(b"STARTTLS\r\n", now);
        let dials = number <= limits::HANDOVERS;
        assert_eq!(session.phase() == Phase::Dial, dials, "{number}");
        if dials {
            session.handle_handover_failed("nobody there".to_owned(), now);
        }
        assert!(session.to_client.as_slice().starts_with(b"454 "));
        written(&mut session, now);
    }
    let notes = notes(&mut session);
    let failed = notes.iter().filter(|note| matches!(note, Note::HandoverFailed(_))).count();
    assert_eq!((failed, notes.len()), (limits::HANDOVERS as usize, failed + 1), "{notes:?}");
    assert_eq!(notes.last(), Some(&Note::TooManyHandovers));
}
