//! Target: the EHLO editor. First octet: the edit, and how the rest is cut; the rest: what a child says to EHLO.
//!
//! Alone, [`edit`] must make one reply of one reply: the same code and lines in the same order, STARTTLS once, second, and only if
//! offered, AUTH gone if hidden; anything but an all-250 reply stays. Inside a session the client must get the same whatever
//! the cuts, and an edited reply in one piece.

use std::sync::Arc;
use std::time::Instant;

use starttls_wrapper::session::{Phase, Policy, Session, limits};
use starttls_wrapper::smtp::ehlo::{Edit, edit};
use starttls_wrapper::smtp::reply::{Scanned, Scanner};

/// One input.
pub fn run(octets: &[u8]) {
    let Some((&choice, said)) = octets.split_first() else { return };
    let how = Edit { offer_starttls: choice & 1 != 0, hide_auth: choice & 2 != 0 };
    if let Some(length) = reply_length(said) {
        alone(&said[..length], how);
    }
    let piece = usize::from(choice >> 2) + 1;
    let whole = heard(said, said.len().max(1), how);
    let cut = heard(said, piece, how);
    assert!(whole == cut, "whole \"{}\"\ncut   \"{}\"", whole.escape_ascii(), cut.escape_ascii());
}

/// How many octets of `said` are one whole reply.
fn reply_length(said: &[u8]) -> Option<usize> {
    let (mut scanner, mut at) = (Scanner::default(), 0);
    loop {
        let (used, scanned) = scanner.scan(&said[at..]);
        at += used;
        match scanned {
            Scanned::Line(_) => {}
            Scanned::Final(_) => return Some(at),
            Scanned::Inside | Scanned::NotSmtp => return None,
        }
    }
}

/// Code and text of a line: what an edit may not touch.
fn content(line: &[u8]) -> (&[u8], &[u8]) {
    let (code, rest) = line.split_at(3);
    let text = rest.strip_prefix(b" ").or_else(|| rest.strip_prefix(b"-")).unwrap_or(rest);
    (code, text)
}

/// The keyword in upper case.
fn keyword(line: &[u8]) -> Vec<u8> {
    let (_, text) = content(line);
    let words = text.split(u8::is_ascii_whitespace);
    words.map(<[u8]>::to_ascii_uppercase).find(|word| !word.is_empty()).unwrap_or_default()
}

fn alone(reply: &[u8], how: Edit) {
    let mut out = Vec::new();
    edit(reply, how, &mut out);
    let given: Vec<&[u8]> = reply.split_inclusive(|o| *o == b'\n').collect();
    if !given.iter().all(|line| line.starts_with(b"250")) {
        assert_eq!(out, reply, "a reply that is not all 250 was edited");
        return;
    }
    assert_eq!(reply_length(&out), Some(out.len()), "\"{}\" became \"{}\"", reply.escape_ascii(), out.escape_ascii());
    let mut kept: Vec<&[u8]> = out.split_inclusive(|o| *o == b'\n').collect();
    if how.offer_starttls {
        assert_eq!(content(kept.remove(1)), (&b"250"[..], &b"STARTTLS\r\n"[..]));
    }
    let is_auth = |word: &[u8]| word == b"AUTH" || word.starts_with(b"AUTH=");
    let goes = |line: &&[u8]| {
        let word = keyword(line);
        word == b"STARTTLS" || how.hide_auth && is_auth(&word)
    };
    let expected: Vec<_> = given.iter().take(1).chain(given[1..].iter().filter(|line| !goes(line))).collect();
    let expected: Vec<_> = expected.into_iter().map(|line| content(line)).collect();
    let kept: Vec<_> = kept.into_iter().map(content).collect();
    assert_eq!(kept, expected, "\"{}\" became \"{}\"", reply.escape_ascii(), out.escape_ascii());
    let mut again = Vec::new();
    edit(&out, how, &mut again);
    assert_eq!(out, again, "an edit of an edited reply changes it");
}

/// What the client gets when the child answers EHLO with `said`, in pieces.
fn heard(said: &[u8], piece: usize, how: Edit) -> Vec<u8> {
    let policy = Policy { offer_tls: how.offer_starttls, require_tls: how.hide_auth, ..Policy::default() };
    let now = Instant::now();
    let mut session = Session::new(Arc::new(policy), now);
    session.handle_child(b"220 h\r\n", now);
    session.handle_client(b"EHLO a\r\n", now);
    let mut client = session.to_client.as_slice().to_vec();
    session.to_client.clear();
    let edited = edited_reply(said, how);
    let mut given = 0;
    for piece in said.chunks(piece) {
        match session.phase() {
            Phase::Snoop => session.handle_child(piece, now),
            Phase::RelayPlain => session.to_client.push(piece),
            phase => {
                assert_eq!(phase, Phase::Close);
                break;
            }
        }
        let (before, fresh) = (given, session.to_client.as_slice());
        given += piece.len();
        if let Some((length, edited)) = edited.as_ref().filter(|(length, _)| before < *length) {
            let at_once = if given < *length { fresh.is_empty() } else { fresh.starts_with(edited) };
            assert!(at_once, "behind {given} of {length} octets the client got \"{}\"", fresh.escape_ascii());
        }
        client.extend_from_slice(fresh);
        session.to_client.clear();
    }
    client
}

/// The first reply in `said`, if it is one that must be edited as a whole: its length, and what it becomes.
fn edited_reply(said: &[u8], how: Edit) -> Option<(usize, Vec<u8>)> {
    let length = reply_length(said)?;
    let longest = said[..length].split_inclusive(|o| *o == b'\n').map(<[u8]>::len).max()?;
    let mut edited = Vec::new();
    edit(&said[..length], how, &mut edited);
    (length <= limits::EHLO_REPLY && longest <= limits::EHLO_LINE).then_some((length, edited))
}
