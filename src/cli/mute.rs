//! `--mute`, behind the TLS that `--way raw` leads to: whose greeting is swallowed, and what PROG is told in its place.

use std::ffi::OsStr;

use super::args::Typed;
use super::config::{called, parsed, text, usage};
use super::options::Id;
use crate::error::Fatal;
use crate::session::Way;
use crate::smtp::command::{Kind, Verb};
use crate::smtp::line::LIMIT;

/// Which connections come from a wrapper, so that their client has been greeted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mute {
    /// All.
    Always,
    /// Those whose client has dialled one of these ports: on them STARTTLS is spoken, and not TLS from the first octet.
    Ports(Vec<u16>),
}

impl Mute {
    /// Whether that holds for a connection to this TCPLOCALPORT, which a PROXY header has set to the port of the wrapper's.
    #[must_use]
    pub fn is_for(&self, local_port: Option<&OsStr>) -> bool {
        match self {
            Self::Always => true,
            Self::Ports(ports) => {
                local_port.and_then(OsStr::to_str).and_then(parsed).is_some_and(|port| ports.contains(&port))
            }
        }
    }
}

/// `--mute`, and which clients it is for.
pub(super) fn mute(typed: &Typed) -> Result<Option<Mute>, Fatal> {
    const STARTTLS: [u16; 2] = [25, 587];
    if typed.way != Way::Mute {
        return Ok(None);
    }
    let Some(word) = text(typed, Id::Mute)? else { return Ok(Some(Mute::Ports(STARTTLS.into()))) };
    if word == "always" {
        return Ok(Some(Mute::Always));
    }
    match word.split(',').map(parsed).collect() {
        Some(ports) => Ok(Some(Mute::Ports(ports))),
        None => usage(format!("--mute= takes always, or ports and commas, not {word:?}")),
    }
}

/// What changes nothing but who the client says it is, each on its line: nothing of a mail, and nothing that a server could
/// read as two commands.
pub(super) fn told(typed: &Typed) -> Result<Vec<(Verb, Vec<u8>)>, Fatal> {
    let lines =
        text(typed, Id::Told)?.unwrap_or_default().split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
    let command = |line: &str| {
        let verb = Verb::of(line.as_bytes());
        let is_harmless = matches!(verb.kind(), Kind::Hello | Kind::Harmless) && verb != Verb::Quit;
        let is_line = line.len() < LIMIT && !line.bytes().any(|octet| octet.is_ascii_control());
        match is_harmless && is_line {
            true => Ok((verb, line.as_bytes().to_vec())),
            false => usage(format!("{}: no command that may be replayed: {line:?}", called(Id::Told))),
        }
    };
    lines.filter(|line| !line.is_empty()).map(command).collect()
}
