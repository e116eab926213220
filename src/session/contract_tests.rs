//! What the session promises its owner beyond the octets that a dialogue shows: when it may be given more, when it wants to be
//! called, and what the operator is told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::policy::Replay;
use super::{BackendEnd, ChildEnd, ClientEnd, EndReason, Note, Phase, Policy, Session, Starttls, Way, limits};
use crate::smtp::command::Verb;
use crate::smtp::line::LIMIT;

/// All phases that a session comes to by this way, but for the last.
fn phases(way: Way) -> Vec<Phase> {
    let clear: &[Phase] = if way == Way::Mute { &[] } else { &[Phase::Snoop, Phase::RelayPlain] };
    [clear, Phase::steps(way), &[Phase::RelayTls]].concat()
}

/// A session that has come so far, with nothing unwritten.
fn at(phase: Phase, way: Way, now: Instant) -> Session {
    // By --mute the child is told what else a client would have said, and been heard.
    let told = if way == Way::Mute { vec![(Verb::Ehlo, b"EHLO c".to_vec())] } else { Vec::new() };
    let replay = if way == Way::Mute { Replay::All } else { Replay::Hello };
    let mut session = Session::new(Arc::new(Policy { way, told, replay, ..Policy::default() }), now);
    if way != Way::Mute {
        session.handle_child(b"220 h\r\n", now);
    }
    if phase == Phase::RelayPlain {
        session.handle_client(b"MAIL FROM:<>\r\n", now);
    } else if phase != Phase::Snoop && way != Way::Mute {
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
            Phase::Start => session.handle_started(now),
            Phase::Tell => session.handle_told(now),
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
    for way in Way::EVERY {
        let announced = Phase::steps(way).iter().position(|phase| *phase == Phase::Announce);
        for phase in phases(way) {
            let place = Phase::steps(way).iter().position(|step| *step == phase);
            let expected = match phase {
                Phase::Announce | Phase::SecureClient | Phase::RelayPlain | Phase::RelayTls => 0,
                Phase::Snoop => 2 * LIMIT,
                _ if place < announced => 1,
                _ => 2 * LIMIT,
            };
            assert_eq!(at(phase, way, now).client_room(), expected, "{way}, {phase:?}");
        }
    }
}

#[test]
fn octets_of_the_client_that_nobody_reads_are_a_bug_and_those_between_starttls_and_its_220_an_attack() {
    let now = Instant::now();
    for way in Way::EVERY {
        for phase in phases(way) {
            let mut session = at(phase, way, now);
            let (room, before) = (session.client_room(), session.to_backend.len());
            session.handle_client(b"N", now);
            match (session.end(), room) {
                (Some(EndReason::Bug(_)), 0) | (None, LIMIT..) => {}
                (Some(EndReason::Client(ClientEnd::BytesAfterStarttls)), 1) => {}
                (end, room) => panic!("{way}, {phase:?}, room for {room}: {end:?}"),
            }
            assert_eq!(session.to_backend.len(), before, "{way}, {phase:?}");
        }
    }
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
    for way in Way::EVERY {
        for phase in phases(way) {
            let mut session = at(phase, way, now);
            assert_eq!(session.wants_child(), phase == Phase::Snoop, "{way}, {phase:?}");
            let wants_backend = match phase {
                Phase::SecureClient => !way.is_late(),
                _ => matches!(phase, Phase::Greeting | Phase::Replay | Phase::Gate),
            };
            assert_eq!(session.wants_backend(), wants_backend, "{way}, {phase:?}");
            session.to_client.push(&[b'a'; limits::TO_CLIENT]);
            assert_eq!((session.wants_child(), session.wants_backend()), (phase == Phase::Snoop, wants_backend));
            session.to_client.push(b"a");
            assert!(!session.wants_child(), "{way}, {phase:?}");
            assert_eq!(session.wants_backend(), wants_backend && phase != Phase::Gate, "{way}, {phase:?}");
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
fn what_becomes_of_starttls_is_counted() {
    let now = Instant::now();
    for offer_tls in [true, false] {
        let mut session = Session::new(Arc::new(Policy { offer_tls, ..Policy::default() }), now);
        session.handle_child(b"220 h\r\n", now);
        assert_eq!((session.offers_tls(), session.starttls_so_far()), (offer_tls, Starttls::default()));
        session.handle_client(b"EHLO c\r\n", now);
        session.handle_child(b"250 h\r\n", now);
        session.handle_client(b"STARTTLS\r\n", now);
        let expected = Starttls { is_offered: offer_tls, asked: 1, refused: u32::from(!offer_tls) };
        assert_eq!(session.starttls_so_far(), expected);
    }
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
fn a_backend_gone_before_the_clients_tls_stands_is_named_with_way_and_step() {
    let now = Instant::now();
    let mut session = at(Phase::Announce, Way::Tls, now);
    session.handle_backend_eof(true, now);
    let end = session.end().map(ToString::to_string);
    assert_eq!(end.as_deref(), Some("way tls, announce failed: the backend closed"));
}

/// A close_notify can be missing in TLS alone.
#[test]
fn a_break_at_the_gate_is_named_as_the_backends_connection_knows_it() {
    let now = Instant::now();
    for (way, is_clean, expected) in [
        (Way::Tls, false, BackendEnd::Truncated),
        (Way::Plain, false, BackendEnd::BrokeOff),
        (Way::Tls, true, BackendEnd::Gone),
        (Way::Plain, true, BackendEnd::Gone),
    ] {
        let mut session = at(Phase::Gate, way, now);
        session.handle_backend_eof(is_clean, now);
        assert_eq!(session.end(), Some(&EndReason::Backend(expected)), "{way}");
    }
}

/// In words, once there is a TLS to say them in: to the client a handshake that breaks off is TLS that failed.
#[test]
fn a_backend_lost_while_the_client_shakes_hands_is_named_and_the_client_told_inside_its_tls() {
    type Loss = fn(&mut Session, Instant);
    let losses: [(Loss, &str); 3] = [
        (|session, now| session.handle_backend_eof(true, now), "the backend closed"),
        (|session, now| session.handle_backend(b"421 bye\r\n", now), "the backend spoke unasked"),
        (|session, now| session.handle_handover_failed("reset".to_owned(), now), "reset"),
    ];
    let now = Instant::now();
    for way in Way::EVERY.into_iter().filter(|way| Phase::steps(*way).contains(&Phase::SecureClient)) {
        for (loss, why) in losses {
            let lost = || {
                let mut session = at(Phase::SecureClient, way, now);
                loss(&mut session, now);
                assert!(session.end().is_none() && !session.wants_backend() && session.to_client.is_empty());
                // A second one changes nothing.
                session.handle_backend_eof(false, now);
                session
            };
            let line = format!("way {way}, client handshake failed: {why}");
            let mut session = lost();
            session.handle_client_secured(now);
            assert_eq!(session.end().map(ToString::to_string), Some(line.clone()));
            assert!(session.to_client.as_slice().starts_with(b"421 4.3.0 ") && session.ended_in().is_inside(way));
            // Who gives up before that gives up a session that had no server.
            let gives_up: [Loss; 3] = [
                Session::handle_client_eof,
                |session, now| session.handle_timeout(now + Policy::default().timeouts.handshake),
                |session, now| session.handle_end(EndReason::Handshake("no TLS".to_owned()), now),
            ];
            for gives_up in gives_up {
                let mut session = lost();
                gives_up(&mut session, now);
                assert_eq!(session.end().map(ToString::to_string), Some(line.clone()));
                assert!(session.to_client.is_empty());
            }
            // But for what is to be mended first.
            let mut session = lost();
            session.handle_end(EndReason::Engine("broken".to_owned()), now);
            assert_eq!(session.end(), Some(&EndReason::Engine("broken".to_owned())));
        }
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
    let counted = Starttls { is_offered: false, asked: limits::HANDOVERS + 2, refused: 2 };
    assert_eq!(session.starttls_so_far(), counted);
    let notes = notes(&mut session);
    let failed = notes.iter().filter(|note| matches!(note, Note::HandoverFailed(_))).count();
    assert_eq!((failed, notes.len()), (limits::HANDOVERS as usize, failed + 1), "{notes:?}");
    assert_eq!(notes.last(), Some(&Note::TooManyHandovers));
}

#[test]
fn a_child_gone_before_its_greeting_is_to_blame_and_not_a_client_that_has_said_all_it_had_to_say() {
    let now = Instant::now();
    let mut session = Session::new(Arc::new(Policy::default()), now);
    session.handle_client(b"QUIT\r\n", now);
    session.handle_client_eof(now);
    session.handle_child_eof(now);
    assert_eq!(session.end(), Some(&EndReason::Child(ChildEnd::Gone)));
}

#[test]
fn where_the_client_ends_the_child_is_waited_for_and_at_the_gate_nobody() {
    let now = Instant::now();
    let mut session = at(Phase::Snoop, Way::Tls, now);
    session.handle_client_eof(now);
    assert!(session.end().is_none() && session.wants_child_eof());
    let mut session = at(Phase::Gate, Way::Tls, now);
    session.handle_client_eof(now);
    assert_eq!(session.end(), Some(&EndReason::Client(ClientEnd::Gone)));
}

#[test]
fn an_ehlo_reply_is_edited_whose_lines_are_many_and_each_is_short() {
    let now = Instant::now();
    let mut session = at(Phase::Snoop, Way::Tls, now);
    session.handle_client(b"EHLO c\r\n", now);
    let line = [b"250-X", &[b'a'; 400][..], b"\r\n"].concat();
    session.handle_child(&[&line.repeat(40)[..], b"250 HELP\r\n"].concat(), now);
    let said = session.to_client.as_slice();
    assert_eq!(said[line.len()..][..b"250-STARTTLS\r\n".len()], *b"250-STARTTLS\r\n");
}

#[test]
fn what_is_recorded_fills_its_room_and_an_octet_more_is_too_long_to_be_replayed() {
    let now = Instant::now();
    for (replay, over, is_told) in [(Replay::All, 0, true), (Replay::All, 1, false), (Replay::Hello, 1, true)] {
        let policy = Policy { way: Way::Plain, replay, ..Policy::default() };
        let mut session = Session::new(Arc::new(policy), now);
        session.handle_child(b"220 h\r\n", now);
        // Each takes its CRLF more, but for the last.
        let lines = limits::TRANSCRIPT / 1024;
        for number in 1..=lines {
            let length = if number == lines { 1024 + over } else { 1022 };
            session.handle_client(&[b"NOOP ", &vec![b'a'; length - 5][..], b"\r\n"].concat(), now);
            session.handle_child(b"250 h\r\n", now);
            written(&mut session, now);
        }
        session.handle_client(b"STARTTLS\r\n", now);
        session.handle_dialled(now);
        assert_eq!(session.phase() == Phase::Greeting, is_told, "{replay:?}, {over} over");
        assert_eq!(session.to_client.as_slice().starts_with(b"454 "), !is_told);
    }
}

#[test]
fn a_backends_reply_is_as_long_as_the_limit_and_no_longer() {
    let now = Instant::now();
    for (over, is_heard) in [(0, true), (1, false)] {
        let mut session = at(Phase::Greeting, Way::Plain, now);
        let greeting = [b"220 ", &vec![b'a'; limits::BACKEND_REPLY + over - 6][..], b"\r\n"].concat();
        session.handle_backend(&greeting, now);
        assert_eq!(session.phase() == Phase::Replay, is_heard, "{over} over");
    }
}

#[test]
fn a_child_that_speaks_when_it_is_kept_already_can_not_be_followed_any_more() {
    for way in [Way::Keep, Way::UcspiTls] {
        let now = Instant::now();
        let mut session = at(Phase::Commit, way, now);
        session.handle_backend(b"250 Ok\r\n", now);
        assert_eq!(session.end(), Some(&EndReason::Child(ChildEnd::LostStep)));
        assert!(session.to_client.as_slice().starts_with(b"454 "));
    }
}

#[test]
fn an_unanswered_unknown_verb_cuts_off_when_its_own_time_is_over_and_only_if_more_has_come() {
    let start = Instant::now();
    let short = limits::UNKNOWN_VERB - Duration::from_secs(1);
    for (more, snoop) in [(&b"NOOP\r\n"[..], short), (b"", Duration::from_secs(300))] {
        let mut policy = Policy::default();
        policy.timeouts.snoop = snoop;
        let mut session = Session::new(Arc::new(policy), start);
        session.handle_child(b"220 h\r\n", start);
        session.handle_client(b"XYZZY\r\n", start);
        session.handle_client(more, start);
        session.handle_timeout(start + snoop);
        assert_eq!(session.end(), Some(&EndReason::Timeout(Phase::Snoop)), "{more:?}");
    }
}
