//! What qmail, Postfix, Exim and mailfront would make of a stream, and what the snooper lets through: no server may ever run a guarded
//! command behind its back. And what a deterministic server says to a client directly and through the session: the same, but for the
//! keyword. Both also where somebody stands in for the server until it is needed.
//!
//! A short form of each runs here; `scripts/differential STREAMS` sets `$STREAMS`, and `$SEED` where the numbers begin.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking
#![allow(dead_code, unreachable_pub, missing_docs)] // the parts are shared with tests/fuzz

#[path = "fuzz/src/lines.rs"]
mod lines;
#[path = "differential/models.rs"]
mod models;
#[path = "differential/server.rs"]
mod server;
#[path = "fuzz/src/snoop.rs"]
mod snoop;
#[path = "differential/streams.rs"]
mod streams;

use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use lines::accounts_for;
use models::{GUARDED, MODELS, Model, knows};
use server::Server;
use snoop::{Outcome, Setting, play, play_lazily};
use starttls_wrapper::session::StandIn;
use starttls_wrapper::session::learned::Learned;
use streams::Random;

/// The program's own; musl's is slow.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name}: not a number")))
}

/// Whether the server would run something guarded, and where the first such line begins.
fn guarded(model: Model, octets: &[u8]) -> Option<usize> {
    model(octets).into_iter().find(|command| GUARDED.contains(&&command.verb[..])).map(|command| command.at)
}

/// The child of one model: it knows what the server knows. It answers a line that it has been given alone.
fn answer(model: Model, line: &[u8], number: usize) -> String {
    let line = [line, b"\r\n"].concat();
    let class = if model(&line).iter().any(|command| knows(&command.verb)) { "250" } else { "500" };
    format!("{class} {number}\r\n")
}

/// What is wrong with how the stream was treated before a server of this model; `lazily`: one that comes when it is needed.
///
/// Where the cutoff is, is seen when the stream comes line by line; cut otherwise, the server gets the same.
fn judge(model: Model, stream: &[u8], setting: &Setting, lazily: bool) -> Result<Outcome, String> {
    let go = |setting: &Setting| {
        let mut answer = |line: &[u8], number| answer(model, line, number);
        match StandIn::new(LEARNED.clone(), None).filter(|_| lazily) {
            Some(stand_in) => play_lazily(stream, setting, stand_in, &mut answer),
            None => play(stream, setting, &mut answer),
        }
    };
    let (outcome, by_line) = (go(setting), go(&Setting { by_line: true, lazy_child: false, ..*setting }));
    let (snooped, tail) = by_line.child.split_at(by_line.snooped);
    if let Some(at) = guarded(model, snooped) {
        return Err(format!("it runs \"{}\"", snooped[at..].escape_ascii()));
    }
    if !accounts_for(stream, &outcome.child, outcome.relayed) || !outcome.relayed && !tail.is_empty() {
        return Err(format!("it got \"{}\"", outcome.child.escape_ascii()));
    }
    if (&outcome.child, outcome.relayed) != (&by_line.child, by_line.relayed) {
        let [got, otherwise] = [&outcome, &by_line].map(|outcome| outcome.child.escape_ascii());
        return Err(format!("it got \"{got}\", and line by line \"{otherwise}\""));
    }
    Ok(outcome)
}

/// What each of them could be learned to say.
static LEARNED: LazyLock<Arc<Learned>> = LazyLock::new(|| {
    let text = "greeting 220 0\nehlo 250-0 %h\nehlo 250 X\nhelo 250 0\nnoop 250 0\nrset 250 0\nquit 221 0\n";
    Arc::new(Learned::parse(text).unwrap())
});

/// The same failure with as few octets as removing pieces can do.
fn smallest(mut stream: Vec<u8>, fails: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut piece = stream.len();
    while piece > 0 {
        let mut at = 0;
        while at < stream.len() {
            let mut fewer = stream.clone();
            fewer.drain(at..(at + piece).min(stream.len()));
            if fails(&fewer) {
                stream = fewer;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    stream
}

/// The policy and the cuts of a stream of `length` octets.
fn setting(random: &mut Random, length: usize) -> Setting {
    // The options that make the snooper stricter are rare; the cutoff after N commands is left out.
    let flags = [0, 0, 0, 16, 16, 1, 4][random.below(7)];
    let mut setting = Setting::of([flags, [255, 255, 0, 1, 4, 60][random.below(6)]]);
    // A line of 16 KiB octet by octet takes as long as some thousand short streams.
    setting.piece = setting.piece.max(length / 100);
    setting
}

#[test]
fn no_server_runs_a_guarded_command_behind_our_back() {
    let (streams, first) = (number("STREAMS", 20_000), number("SEED", 1));
    let (mut would_run, mut relayed, mut refused) = ([0_u64; 4], [0_u64; 4], [0_u64; 4]);
    for seed in first..first + streams {
        let mut random = Random::new(seed);
        let stream = random.stream();
        let setting = setting(&mut random, stream.len());
        for (index, (name, model)) in MODELS.into_iter().enumerate() {
            let lazily = random.one_in(2);
            match judge(model, &stream, &setting, lazily) {
                Ok(outcome) if guarded(model, &stream).is_some() => {
                    would_run[index] += 1;
                    relayed[index] += u64::from(outcome.relayed);
                    refused[index] += u64::from(!outcome.relayed);
                }
                Ok(_) => {}
                Err(_) => {
                    let stream = smallest(stream, |fewer| judge(model, fewer, &setting, lazily).is_err());
                    let why = judge(model, &stream, &setting, lazily).unwrap_err();
                    panic!("{name}, seed {seed}, {setting:?}, lazily {lazily}: of \"{}\" {why}", stream.escape_ascii());
                }
            }
        }
    }
    for (index, (name, _)) in MODELS.into_iter().enumerate() {
        let (run, relayed, refused) = (would_run[index], relayed[index], refused[index]);
        println!("{name}: {streams} streams; {run} with a guarded command: {relayed} relayed, {refused} refused");
        // A grammar that never says MAIL shows nothing.
        assert!(run * 5 > streams && relayed > 0 && refused > 0, "{name}: the streams are too tame");
    }
}

/// Takes our keyword out of what a client saw: how often it stood there. The server never says it.
fn without_keyword(seen: &str) -> (String, usize) {
    let count = seen.matches("STARTTLS").count();
    (seen.replace("250-one\r\n250 STARTTLS\r\n", "250 one\r\n").replace("250-STARTTLS\r\n", ""), count)
}

#[test]
fn a_session_without_starttls_is_the_bare_servers() {
    let (streams, first) = (number("STREAMS", 20_000), number("SEED", 1));
    let (mut keywords, mut relayed) = (0, 0);
    for seed in first..first + streams {
        let mut random = Random::new(seed);
        let stream = random.plain_session();
        let setting = Setting::of([0, [255, 0, 3, 40][random.below(4)]]);
        let style = random.below(8) as u8;
        let mut bare = Server::new(style);
        let direct = bare.hear(&stream);
        let mut child = Server::new(style);
        let outcome = server::play(&stream, &setting, None, &mut child, &mut random);
        let shown = || format!("seed {seed}, {setting:?}, \"{}\"", stream.escape_ascii());
        assert!(outcome.child == stream, "{}: the child got \"{}\"", shown(), outcome.child.escape_ascii());
        let (seen, count) = without_keyword(&String::from_utf8_lossy(&outcome.client));
        assert_eq!(seen, direct, "{}", shown());
        // Snooping ends at the first MAIL; no EHLO of these sessions comes later.
        assert_eq!(count, outcome.ehlos, "{}: STARTTLS is shown with each EHLO and nowhere else", shown());
        keywords += count;
        relayed += usize::from(outcome.relayed);
    }
    println!("{streams} sessions, {keywords} EHLO replies, {relayed} relayed");
    assert!(keywords > 0 && relayed > 0);
}

/// What of these streams the server need not be there for: the last hello in it, how many of all were EHLO, and what is left.
fn answered_elsewhere(stream: &[u8]) -> (&[u8], usize, &[u8]) {
    let (mut hello, mut ehlos, mut at) = (&b""[..], 0, 0);
    for line in stream.split_inclusive(|octet| *octet == b'\n') {
        match line {
            b"EHLO a\r\n" | b"HELO a\r\n" => {
                hello = line;
                ehlos += usize::from(line.starts_with(b"E"));
            }
            b"NOOP\r\n" | b"QUIT\r\n" => {}
            // Its reply says who the client is.
            b"RSET\r\n" if !hello.is_empty() => {}
            _ => break,
        }
        at += line.len();
    }
    (hello, ehlos, &stream[at..])
}

#[test]
fn a_session_with_a_stand_in_is_the_bare_servers() {
    let (streams, first) = (number("STREAMS", 20_000), number("SEED", 1));
    let client = IpAddr::from([203, 0, 113, 7]);
    let learned: Vec<_> = (0..8).map(|style| Arc::new(Server::learn(style))).collect();
    let (mut alone, mut relayed) = (0, 0);
    for seed in first..first + streams {
        let mut random = Random::new(seed);
        let stream = random.plain_session();
        let setting = Setting::of([0, [255, 0, 3, 40][random.below(4)]]);
        let style = random.below(8) as u8;
        let direct = Server::learnable(style, client).hear(&stream);
        let mut child = Server::learnable(style, client);
        let stand_in = StandIn::new(learned[usize::from(style)].clone(), Some(client));
        let outcome = server::play(&stream, &setting, stand_in, &mut child, &mut random);
        let shown = || format!("seed {seed}, {setting:?}, style {style}, \"{}\"", stream.escape_ascii());
        let (hello, ehlos, left) = answered_elsewhere(&stream);
        let expected = if left.is_empty() { Vec::new() } else { [hello, left].concat() };
        assert!(outcome.child == expected, "{}: the child got \"{}\"", shown(), outcome.child.escape_ascii());
        let (seen, count) = without_keyword(&String::from_utf8_lossy(&outcome.client));
        assert_eq!(seen, direct, "{}", shown());
        let told = usize::from(!left.is_empty() && hello.starts_with(b"E"));
        assert_eq!(
            count,
            ehlos + outcome.ehlos - told,
            "{}: STARTTLS is shown with each EHLO and nowhere else",
            shown()
        );
        alone += usize::from(left.is_empty());
        relayed += usize::from(outcome.relayed);
    }
    println!("{streams} sessions with a stand-in, {alone} without a server, {relayed} relayed");
    assert!(alone > 0 && relayed > 0);
}
