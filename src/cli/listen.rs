//! `--listen`: where, by how many loops, for how many sessions, and as whom PROG runs.

use core::net::SocketAddr;
use std::thread::available_parallelism;

use super::args::{Typed, called as way_called, socket_path};
use super::config::{Server, called, number, unprivileged, usage};
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
    /// Whether a server is put off until a client needs it.
    pub lazy: bool,
    /// Sessions at once, at least one.
    pub most: usize,
    /// User and group that PROG is to have; neither 0 nor -1.
    pub ids: (Option<u32>, Option<u32>),
}

/// More loops than any machine has use for.
const MOST_WORKERS: u32 = 256;

/// Sessions at once, where nothing else is said.
const SESSIONS: u32 = 10_000;

/// `--plain`: where the daemon is that takes PROG's place.
pub(super) fn plain(typed: &Typed) -> Result<Option<Server>, Fatal> {
    let Some(word) = typed.value(Id::Plain) else { return Ok(None) };
    if let Some(path) = socket_path(word) {
        return if path.is_empty() {
            usage("unix: wants a path".to_owned())
        } else {
            Ok(Some(Server::Unix(path.into())))
        };
    }
    // An IPv6 address stands in brackets (RFC 3986 3.2.2).
    let parts = word.to_str().and_then(|text| text.rsplit_once(':'));
    let bare = parts
        .map(|(host, port)| (host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host), port));
    match bare.map(|(host, port)| (host, port.parse::<u16>())) {
        Some((host, Ok(port)))
            if port > 0 && !host.is_empty() && (!host.contains(':') || word.as_encoded_bytes()[0] == b'[') =>
        {
            Ok(Some(Server::Tcp { host: host.to_owned(), port }))
        }
        _ => usage(format!("--plain wants HOST:PORT or unix:PATH, not {word:?}")),
    }
}

pub(super) fn listen(typed: &Typed) -> Result<Option<Listen>, Fatal> {
    if typed.listen.is_empty() {
        return match [Id::Plain, Id::Lazy, Id::Workers, Id::MaxSessions].into_iter().find(|id| typed.times(*id) > 0) {
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
    let lazy = match typed.value(Id::Lazy).map(std::ffi::OsStr::as_encoded_bytes) {
        None | Some(b"yes") => true,
        Some(b"no") => false,
        Some(_) => return usage("--lazy takes nothing, =yes or =no".to_owned()),
    };
    Ok(Some(Listen {
        lazy,
        addresses: addresses.collect::<Result<_, _>>()?,
        workers,
        most,
        ids: (unprivileged(typed, Id::Uid)?, unprivileged(typed, Id::Gid)?),
    }))
}
