//! `--listen`: where, by how many loops, for how many sessions, and as whom PROG runs.

use core::net::SocketAddr;
use std::thread::available_parallelism;

use super::args::{Typed, called as way_called};
use super::config::{called, number, unprivileged, usage};
use super::options::Id;
use crate::error::Fatal;
use crate::session::Way;

/// What a listener is told besides what a session is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Where it listens; no port is 0.
    pub addresses: Vec<SocketAddr>,
    /// Loops, at least one.
    pub workers: usize,
    /// Sessions at once, at least one.
    pub most: usize,
    /// User and group that PROG is to have; neither 0 nor -1.
    pub ids: (Option<u32>, Option<u32>),
}

/// More loops than any machine has use for.
const MOST_WORKERS: u32 = 256;

/// Sessions at once, where nothing else is said.
const SESSIONS: u32 = 10_000;

pub(super) fn listen(typed: &Typed) -> Result<Option<Listen>, Fatal> {
    if typed.listen.is_empty() {
        return match [Id::Workers, Id::MaxSessions].into_iter().find(|id| typed.times(*id) > 0) {
            Some(id) => usage(format!("{} is a listener's: --listen is missing", called(id))),
            None => Ok(None),
        };
    }
    if !matches!(typed.way, Way::Tls | Way::Plain | Way::Keep | Way::Raw) {
        return usage(format!("--listen and {} can't be had together", way_called(typed.way)));
    }
    let addresses = typed.listen.iter().map(|word| match word.to_str().map(str::parse::<SocketAddr>) {
        Some(Ok(address)) if address.port() > 0 => Ok(address),
        _ => usage(format!("--listen wants ADDR:PORT, as 0.0.0.0:25 or [::]:25, not {word:?}")),
    });
    let workers = match number(typed, Id::Workers)? {
        Some(count @ 1..=MOST_WORKERS) => count as usize,
        Some(_) => return usage(format!("--workers takes a number from 1 to {MOST_WORKERS}")),
        None => available_parallelism().map_or(1, usize::from),
    };
    let most = match number(typed, Id::MaxSessions)?.unwrap_or(SESSIONS) {
        0 => return usage("--max-sessions must be at least 1".to_owned()),
        most => most as usize,
    };
    Ok(Some(Listen {
        addresses: addresses.collect::<Result<_, _>>()?,
        workers,
        most,
        ids: (unprivileged(typed, Id::Uid)?, unprivileged(typed, Id::Gid)?),
    }))
}
