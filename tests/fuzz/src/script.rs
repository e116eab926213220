//! The session target's input: a dialogue as tests/dialogues/FORMAT.md has it, read without mercy for what it means and with
//! mercy for how it is written. Every file of tests/dialogues is a seed, and a finding is nearly a dialogue.
//!
//! A line that is none of these is passed over. What is expected there (`S:`, `k:`, `b:`) is: here the invariants judge.
//!
//! | line | beyond FORMAT.md |
//! |---|---|
//! | `C: text` `K: text` `B: text` | raw octets are allowed; every line is a segment of its own |
//! | `way: plain` | as there; `keep` is not followed here: its backend is the child |
//! | `cut: N` | segments come in pieces of N octets |
//! | `! stall s` `! stall k` `! stall b` | client, child, backend takes nothing from here on |
//! | `! flow` | all take again |

use std::time::Duration;

use starttls_wrapper::cli::{Invocation, read};
use starttls_wrapper::session::{Policy, Way};

/// Octets of one input, once expanded.
const MOST: usize = 160 * 1024;

/// Who speaks or listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Client,
    Child,
    Backend,
}

/// What happens when the backend is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Accepts,
    Refused,
    Untrusted,
    NoHandshake,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deed {
    Sends(Side, Vec<u8>),
    Ends(Side),
    ClientResets,
    BackendDies,
    Backend(Backend),
    ClientTls,
    Waits(Duration),
    Terminates,
    Stalls(Side),
    Flows,
}

/// One input, read.
#[derive(Debug)]
pub struct Script {
    pub policy: Policy,
    pub piece: usize,
    pub deeds: Vec<Deed>,
}

/// `None` where the options are none.
#[must_use]
pub fn parse(input: &[u8]) -> Option<Script> {
    let mut way = Way::default().name();
    let (mut options, mut certificate, mut piece, mut deeds, mut left) =
        (Vec::new(), true, usize::MAX, Vec::new(), MOST);
    for line in input.split(|octet| *octet == b'\n') {
        if let Some(text) = line.strip_prefix(b"! ") {
            deeds.extend(event(std::str::from_utf8(text).unwrap_or_default()));
        } else if let Some(words) = line.strip_prefix(b"options:") {
            options.extend(String::from_utf8_lossy(words).split_whitespace().map(str::to_owned));
        } else if line == b"way: plain" {
            way = "plain";
        } else if line == b"way: keep" {
            return None;
        } else if line == b"cert: none" {
            certificate = false;
        } else if let Some(size) = line.strip_prefix(b"cut: ") {
            piece =
                std::str::from_utf8(size).ok().and_then(|text| text.parse().ok()).filter(|n| *n > 0).unwrap_or(piece);
        } else if let [who @ (b'C' | b'K' | b'B'), b':', b' ', text @ ..] = line {
            let side = match who {
                b'C' => Side::Client,
                b'K' => Side::Child,
                _ => Side::Backend,
            };
            let octets = unescape(text, &mut left);
            deeds.push(Deed::Sends(side, octets));
        }
    }
    options.extend(["--way".to_owned(), way.to_owned()]);
    if certificate {
        options.extend(["--cert".to_owned(), "none.pem".to_owned()]);
    }
    options.extend(["localhost", "465", "smtpd"].map(str::to_owned));
    match read(options.into_iter().map(Into::into), |_| None) {
        Ok(Invocation::Serve(config)) => Some(Script { policy: config.policy, piece, deeds }),
        Ok(Invocation::Print(_)) | Err(_) => None,
    }
}

fn event(text: &str) -> Option<Deed> {
    Some(match text {
        "client-eof" => Deed::Ends(Side::Client),
        "child-eof" => Deed::Ends(Side::Child),
        "backend-eof" => Deed::Ends(Side::Backend),
        "client-reset" => Deed::ClientResets,
        "backend-dies" => Deed::BackendDies,
        "backend refused" => Deed::Backend(Backend::Refused),
        "backend untrusted" | "backend plaintext" => Deed::Backend(Backend::Untrusted),
        "backend no-handshake" => Deed::Backend(Backend::NoHandshake),
        "backend accepts" | "backend silent" => Deed::Backend(Backend::Accepts),
        "client-tls" => Deed::ClientTls,
        "terminate" => Deed::Terminates,
        "stall s" => Deed::Stalls(Side::Client),
        "stall k" => Deed::Stalls(Side::Child),
        "stall b" => Deed::Stalls(Side::Backend),
        "flow" => Deed::Flows,
        wait => Deed::Waits(Duration::from_secs(u64::from(wait.strip_prefix("wait ")?.parse::<u16>().ok()?))),
    })
}

/// Undoes the escapes; a wrong one stands for itself.
fn unescape(text: &[u8], left: &mut usize) -> Vec<u8> {
    let mut octets = Vec::new();
    let ended = expand(text, &mut octets, *left);
    if ended {
        octets.extend_from_slice(b"\r\n");
    }
    octets.truncate(*left);
    *left -= octets.len();
    octets
}

/// Whether the text stands for a line, and not for a piece of one.
fn expand(mut text: &[u8], octets: &mut Vec<u8>, most: usize) -> bool {
    while let [first, rest @ ..] = text {
        if octets.len() >= most {
            return true;
        }
        text = rest;
        if *first != b'\\' {
            octets.push(*first);
            continue;
        }
        match rest {
            [b'c'] => return false,
            [b'x', high, low, ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                let digit = |d: &u8| char::from(*d).to_digit(16).unwrap_or_default() as u8;
                octets.push(digit(high) << 4 | digit(low));
                text = &rest[3..];
            }
            [b'*', rest @ ..] => {
                let digits = rest.iter().take_while(|o| o.is_ascii_digit()).count();
                let times =
                    std::str::from_utf8(&rest[..digits]).ok().and_then(|t| t.parse::<usize>().ok()).unwrap_or(0);
                let close = rest.iter().position(|o| *o == b'}').unwrap_or(rest.len());
                let mut unit = Vec::new();
                if rest.get(digits) == Some(&b'{') && digits < close {
                    expand(&rest[digits + 1..close], &mut unit, most);
                }
                let times = times.min(most / unit.len().max(1));
                octets.extend(unit.iter().cycle().take(unit.len() * times));
                text = rest.get(close + 1..).unwrap_or_default();
            }
            [letter, ..] => {
                octets.push(match letter {
                    b'r' => b'\r',
                    b'n' => b'\n',
                    b'0' => 0,
                    b't' => b'\t',
                    other => *other,
                });
                text = &rest[1..];
            }
            [] => octets.push(b'\\'),
        }
    }
    true
}
