//! Children that die, linger, lie, flood or speak something else.

use std::fs::File;
use std::time::{Duration, Instant};

use starttls_wrapper::session::Way;

use crate::child::Child;
use crate::door::{Door, Start, tls_client};
use crate::octets::Octets;
use crate::steps::{At, Standing, all_of, ask_child, greet};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

const GONE: &[u8] = b"421 4.3.0 Mail server not available\r\n";

#[test]
fn a_child_that_dies_before_its_greeting_is_a_421() {
    all_of(&["exit 0", "exit 111", "kill -9 $$", "kill -15 $$", "exec >&-; exit 0"], |words| {
        let mut door = Door::open(&Start { program: Some(&["/bin/sh", "-c", words]), ..Start::default() });
        let (said, end) = door.client.as_mut().unwrap().rest().unwrap();
        assert_eq!((said.as_slice(), end), (GONE, End::Clean));
        door.client = None;
        assert_eq!(door.code(), 111, "{}", door.said());
    });
}

#[test]
fn a_child_that_dies_between_two_replies_is_a_421() {
    all_of(&[true, false], |&owed| {
        let at = if owed { At::Owed } else { At::Snoop };
        let mut standing = Standing::at(at, &Start::default());
        standing.child.exit(0);
        let (said, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
        assert_eq!((said.as_slice(), end), (GONE, End::Clean));
        assert_eq!(standing.close(), 111);
    });
}

#[test]
fn a_child_that_dies_inside_a_reply_ends_the_session_without_a_word_of_ours() {
    all_of(&["250-mail.example\r\n250-SI", "250-mail.example\r\n", "25", "250 no end"], |part| {
        let mut standing = Standing::at(At::Owed, &Start::default());
        standing.child.send(part.as_bytes());
        standing.child.exit(0);
        let (said, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
        assert_eq!(end, End::Clean);
        // Of "25" nothing was passed on: it is no code yet.
        assert!(part.as_bytes().starts_with(&said) || (*part == "25" && said == GONE), "{}", said.escape_ascii());
        assert_eq!(standing.close(), 111);
    });
}

#[test]
fn a_child_that_dies_after_354_is_passed_on() {
    let mut standing = Standing::at(At::RelayPlain, &Start::default());
    ask_child(&mut standing.door, &mut standing.child, "DATA\r\n", "354 Go\r\n").unwrap();
    standing.child.exit(1);
    let client = standing.door.client.as_mut().unwrap();
    client.send(b"Subject: too late\r\n\r\n.\r\n");
    let (said, _) = client.rest().unwrap();
    assert!(said.is_empty());
    assert_eq!(standing.close(), 0);
}

#[test]
fn a_child_killed_in_the_relay_is_told_by_the_exit_code() {
    let program = ["/bin/sh", "-c", "echo 220 hello; read line; echo 250 ok; read line; kill -9 $$"];
    let mut door = Door::open(&Start { program: Some(&program), ..Start::default() });
    let client = door.client.as_mut().unwrap();
    client.get(b"220 hello\n").unwrap();
    client.send(b"MAIL FROM:<>\r\n");
    client.get(b"250 ok\n").unwrap();
    client.send(b"QUIT\r\n");
    assert_eq!(client.get_end(), Ok(End::Clean));
    door.client = None;
    assert_eq!(door.code(), 111, "{}", door.said());
}

#[test]
fn a_kept_child_killed_in_the_relay_is_an_abort_for_the_client() {
    for (how, end, code) in [("kill -9 $$", End::Cut, 111), ("exit 1", End::Clean, 0)] {
        let script =
            format!("echo 220 hello; for n in 1 2 3; do read line; echo 250 ok; done; read line; printf half; {how}");
        let start = Start { program: Some(&["/bin/sh", "-c", &script]), way: Way::Keep, ..Start::default() };
        let mut door = Door::open(&start);
        let client = door.client.as_mut().unwrap();
        client.get(b"220 hello\n").unwrap();
        client.send(b"EHLO client.example\r\n");
        client.get(b"250-ok\n250 STARTTLS\r\n").unwrap();
        client.send(b"STARTTLS\r\n");
        client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
        client.secure(tls_client()).unwrap();
        client.send(b"EHLO client.example\r\n");
        client.get(b"250 ok\n").unwrap();
        client.send(b"NOOP\r\n");
        client.get(b"half").unwrap();
        assert_eq!(client.get_end(), Ok(end), "{how}");
        door.client = None;
        assert_eq!(door.code(), code, "{how}: {}", door.said());
    }
}

#[test]
fn a_greeting_in_drops_is_a_greeting() {
    let mut standing = Standing::at(At::Ungreeted, &Start::default());
    let client = standing.door.client.as_mut().unwrap();
    for octet in b"220-mail.example\r\n220 ESMTP\r\n" {
        standing.child.send(&[*octet]);
        client.listen_for(Duration::from_millis(2));
    }
    client.get(b"220-mail.example\r\n220 ESMTP\r\n").unwrap();
    standing.close();
}

#[test]
fn a_flood_before_the_greeting_ends_is_passed_on_and_kept_nowhere() {
    let mut standing = Standing::at(At::Ungreeted, &Start::default());
    let memory = standing.door.memory("VmHWM");
    let flood = b"220-all of this is one greeting\r\n".repeat(250_000);
    let mut there = standing.child.wire();
    let client = standing.door.client.as_mut().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| there.send(&flood));
        for piece in flood.chunks(64 * 1024) {
            client.get(piece).unwrap();
        }
    });
    there.send(b"220 end\r\n");
    drop(there);
    client.get(b"220 end\r\n").unwrap();
    let grown = standing.door.memory("VmHWM") - memory;
    assert!(grown < 2048, "{grown} KiB more");
    ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").unwrap();
    standing.close();
}

#[test]
fn an_endless_ehlo_reply_is_passed_on_and_kept_nowhere() {
    all_of(&["250-KEYWORD\r\n", "250-A long keyword", "250-\r\n"], |line| {
        let mut standing = Standing::at(At::Ungreeted, &Start::default());
        standing.child.send(b"220 mail.example\r\n");
        let client = standing.door.client.as_mut().unwrap();
        client.get(b"220 mail.example\r\n").unwrap();
        client.send(b"EHLO c\r\n");
        standing.child.get(b"EHLO c\r\n").unwrap();
        let memory = standing.door.memory("VmHWM");
        let client = standing.door.client.as_mut().unwrap();
        let flood = line.repeat((8 << 20) / line.len());
        let mut there = standing.child.wire();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                there.send(b"250-mail.example\r\n");
                there.send(flood.as_bytes());
            });
            client.get(b"250-mail.example\r\n").unwrap();
            for piece in flood.as_bytes().chunks(64 * 1024) {
                client.get(piece).unwrap();
            }
        });
        drop(there);
        let grown = standing.door.memory("VmHWM") - memory;
        assert!(grown < 2048, "{grown} KiB more");
        standing.close();
    });
}

#[test]
fn a_child_that_speaks_binary_is_relayed_octet_for_octet() {
    let mut standing = Standing::at(At::Ungreeted, &Start::default());
    let mut there = standing.child.wire();
    let client = standing.door.client.as_mut().unwrap();
    // Let the reply's code be none: what begins with three digits would be waited for.
    let all: Vec<u8> = (0..=255).rev().collect();
    there.send(&all);
    client.get(&all).unwrap();
    let (to, from) = (|| Octets::new(7, 1 << 20), || Octets::new(8, 1 << 20));
    std::thread::scope(|scope| {
        let server = scope.spawn(move || there.exchange(&mut from(), &mut to(), PATIENCE));
        client.exchange(&mut to(), &mut from(), PATIENCE).unwrap();
        server.join().unwrap().unwrap();
    });
    standing.close();
}

#[test]
fn a_child_that_no_longer_reads_is_still_heard() {
    all_of(&[At::Snoop, At::RelayPlain], |&at| {
        let mut standing = Standing::at(at, &Start::default());
        standing.child.close_stdin();
        let client = standing.door.client.as_mut().unwrap();
        for _ in 0..20 {
            client.send(b"NOOP\r\n");
        }
        standing.child.send(b"421 4.3.0 Going\r\n");
        client.get(b"421 4.3.0 Going\r\n").unwrap();
        standing.child.exit(0);
        client.rest().unwrap();
        assert_eq!(standing.close(), 0);
    });
}

#[test]
fn a_child_that_closes_its_stdout_and_stays_is_ended() {
    all_of(&[At::Snoop, At::RelayPlain], |&at| {
        let options = ["--farewell-timeout", "1", "--relay-timeout", "1"];
        let mut standing = Standing::at(at, &Start { options: &options, ..Start::default() });
        standing.child.close_stdout();
        let client = standing.door.client.as_mut().unwrap();
        let (said, end) = client.rest().unwrap();
        assert_eq!((said.as_slice(), end), (if at == At::Snoop { GONE } else { b"" }, End::Clean));
        // It neither exits nor closes anything more; SIGTERM ends it.
        let code = standing.door.code();
        assert_eq!(code, if at == At::Snoop { 111 } else { 0 });
        standing.must_be_gone();
    });
}

#[test]
fn a_grandchild_that_holds_stdout_holds_the_session_no_longer_than_its_timer() {
    // It keeps the pipe for as long as the file is there. Nobody can tell a dead child's heir from the child by the pipe.
    let words = [
        "(while [ -e $0 ]; do sleep 0.1; done) </dev/null & echo 220 hello; read line; echo 221 bye",
        "(while [ -e $0 ]; do sleep 0.1; done) </dev/null & echo 220 hello; read l; echo 250 ok; read l; echo 221 bye",
    ];
    all_of(&words, |words| {
        let folder = tempfile::TempDir::new().unwrap();
        let held = folder.path().join("held");
        File::create(&held).unwrap();
        let program = ["/bin/sh", "-c", words, held.to_str().unwrap()];
        let options = ["--snoop-timeout", "1", "--relay-timeout", "1"];
        let mut door = Door::open(&Start { program: Some(&program), options: &options, ..Start::default() });
        let client = door.client.as_mut().unwrap();
        client.get(b"220 hello\n").unwrap();
        if words.contains("250 ok") {
            client.send(b"MAIL FROM:<>\r\n");
            client.get(b"250 ok\n").unwrap();
        }
        client.send(b"QUIT\r\n");
        client.get(b"221 bye\n").unwrap();
        client.end();
        let started = Instant::now();
        door.wait().unwrap();
        let took = started.elapsed();
        std::fs::remove_file(&held).unwrap();
        assert!(took < PATIENCE, "{took:?}: {}", door.said());
    });
}

#[test]
fn a_child_that_ignores_the_end_of_its_input_is_terminated() {
    let options = ["--farewell-timeout", "1"];
    let mut standing = Standing::at(At::Snoop, &Start { options: &options, ..Start::default() });
    let client = standing.door.client.as_mut().unwrap();
    client.send(b"QUIT\r\n");
    standing.child.get(b"QUIT\r\n").unwrap();
    standing.child.send(b"221 Bye\r\n");
    client.get(b"221 Bye\r\n").unwrap();
    standing.door.client = None;
    standing.child.get_end().unwrap();
    standing.child.close_stdout();
    assert_eq!(standing.door.code(), 0);
    standing.must_be_gone();
}

#[test]
fn many_sessions_in_a_row_leave_no_child() {
    let mut pids = Vec::new();
    for _ in 0..20 {
        let mut door = Door::open(&Start::default());
        let mut child = Child::accept(&door.puppets).unwrap();
        greet(&mut door, &mut child).unwrap();
        door.client = None;
        // Were the child gone before the client's end is seen, that would be what ended the session.
        let _ = child.rest();
        child.exit(0);
        assert_eq!(door.code(), 1);
        pids.push(child);
    }
    assert!(pids.iter().all(|child| child.is_gone(Duration::ZERO)));
}

#[test]
fn a_child_that_reads_no_more_is_not_kept_and_nobody_waits_for_it() {
    let Standing { mut door, mut child, .. } = Standing::at(At::Snoop, &Start { way: Way::Keep, ..Start::default() });
    child.close_stdin();
    let asked = Instant::now();
    let client = door.client.as_mut().unwrap();
    client.send(b"STARTTLS\r\n");
    client.get(b"454 4.7.0 TLS not available\r\n").unwrap();
    // The replay's time-out is 30 s.
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert!(door.said().contains("it takes nothing more"), "{}", door.said());
}

/// What refuses RSET, and what the log says of it, once.
#[test]
fn a_child_that_is_not_kept_is_a_454_and_one_line_that_names_the_way_and_the_step() {
    let ends: [(&str, &str); 5] = [
        ("550 5.5.1 No\r\n", "it answered 550 to RSET"),
        ("451 4.3.0 Later\r\n", "it answered 451 to RSET"),
        ("354 Go on\r\n", "it answered 354 to RSET"),
        ("", "time-out"),
        ("dies", "the backend closed"),
    ];
    let cases: Vec<_> = [Way::Keep, Way::UcspiTls].iter().flat_map(|&way| ends.map(|end| (way, end))).collect();
    all_of(&cases, |&(way, (answer, why))| {
        let tls_server = way.is_ucspi_tls().then_some("serve");
        let options = ["--replay-timeout", "2"];
        let start = Start { options: &options, way, tls_server, ..Start::default() };
        let mut standing = Standing::at(At::Snoop, &start);
        standing.door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
        standing.child.get(b"RSET\r\n").unwrap();
        match answer {
            "dies" => standing.child.exit(0),
            answer => standing.child.send(answer.as_bytes()),
        }
        standing.door.client.as_mut().unwrap().get(b"454 4.7.0 TLS not available\r\n").unwrap();
        let told = format!("STARTTLS answered 454: way {way}, replay failed: {why}");
        assert!(wait_until(PATIENCE, || standing.door.said().contains(&told)), "{told}: {}", standing.door.said());
        assert_eq!(standing.door.said().matches("replay failed").count(), 1, "{}", standing.door.said());
        standing.close();
    });
}
