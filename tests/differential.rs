//! What qmail, Postfix and Exim would make of a stream, and what the snooper lets through: no server may ever run a guarded command
//! behind its back. And what a deterministic server says to a client directly and through the session: the same, but for the keyword.
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

use lines::accounts_for;
use models::{GUARDED, MODELS, Model, knows};
use server::Server;
use snoop::{Outcome, Setting, play};
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

/// What is wrong with how the stream was treated before a server of this model.
fn judge(model: Model, stream: &[u8], setting: &Setting) -> Result<Outcome, String> {
    let outcome = play(stream, setting, &mut |line, number| answer(model, line, number));
    let (snooped, tail) = outcome.child.split_at(outcome.snooped);
    if let Some(at) = guarded(model, snooped) {
        return Err(format!("it runs \"{}\"", snooped[at..].escape_ascii()));
    }
    if !accounts_for(stream, &outcome.child, outcome.relayed) || !outcome.relayed && !tail.is_empty() {
        return Err(format!("it got \"{}\"", outcome.child.escape_ascii()));
    }
    Ok(outcome)
}

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
    let (mut would_run, mut relayed, mut refused) = ([0_u64; 3], [0_u64; 3], [0_u64; 3]);
    for seed in first..first + streams {
        let mut random = Random::new(seed);
        let stream = random.stream();
        let setting = setting(&mut random, stream.len());
        for (index, (name, model)) in MODELS.into_iter().enumerate() {
            match judge(model, &stream, &setting) {
                Ok(outcome) if guarded(model, &stream).is_some() => {
                    would_run[index] += 1;
                    relayed[index] += u64::from(outcome.relayed);
                    refused[index] += u64::from(!outcome.relayed);
                }
                Ok(_) => {}
                Err(_) => {
                    let stream = smallest(stream, |fewer| judge(model, fewer, &setting).is_err());
                    let why = judge(model, &stream, &setting).unwrap_err();
                    panic!("{name}, seed {seed}, {setting:?}: of \"{}\" {why}", stream.escape_ascii());
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
        let outcome = server::play(&stream, &setting, &mut child, &mut random);
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
