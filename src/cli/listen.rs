//! `--listen`: where, by how many loops, for how many sessions, and as whom PROG runs; who is told that it does, and how it ends.

use core::net::SocketAddr;
use core::time::Duration;
use std::ffi::OsString;
use std::thread::available_parallelism;

use super::args::{Typed, called as way_called, socket_path};
use super::config::{Server, called, number, text, unprivileged, usage};
use super::network::Network;
use super::options::Id;
use crate::error::Fatal;
use crate::session::Way;

/// What a listener is told besides what a session is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Where it listens; no port is 0.
    pub addresses: Vec<SocketAddr>,
    /// Sockets that listen already: descriptors that were left open for us, each named once and above 2.
    pub inherited: Vec<i32>,
    /// Loops, at least one.
    pub workers: usize,
    /// Where its figures are told.
    pub metrics: Option<SocketAddr>,
    /// Whether a server is put off until a client needs it.
    pub lazy: bool,
    /// Sessions at once, at least one.
    pub most: usize,
    /// Sessions at once from one address, at least one; `None`: as many as there may be at all.
    pub most_per_address: Option<u32>,
    /// New sessions a second from one address, at least one; `None`: any number.
    pub rate_per_address: Option<u32>,
    /// Who may say by a PROXY header who the client is, and must; `None`: nobody, and the connection's own end counts.
    pub proxies: Option<Vec<Network>>,
    /// User and group that PROG is to have; neither 0 nor -1.
    pub ids: (Option<u32>, Option<u32>),
    /// How long sessions may go on behind a SIGTERM.
    pub drain: Duration,
    /// The descriptor that gets a line feed once clients are served; above 2, and none of `inherited`.
    pub notify_fd: Option<i32>,
    /// systemd's socket for the same.
    pub notify_socket: Option<OsString>,
}

/// More loops than any machine has use for.
const MOST_WORKERS: u32 = 256;

/// Sessions at once, where nothing else is said.
const SESSIONS: u32 = 10_000;

/// Seconds of `--drain`, where nothing else is said. A mail takes less; systemd waits for 90.
const DRAIN: u32 = 30;

/// More sockets than any systemd unit has.
const MOST_SOCKETS: i32 = 1024;

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

/// `--metrics`.
fn metrics(typed: &Typed) -> Result<Option<SocketAddr>, Fatal> {
    let Some(word) = typed.value(Id::Metrics) else { return Ok(None) };
    match word.to_str().map(str::parse::<SocketAddr>) {
        Some(Ok(address)) if address.port() > 0 => Ok(Some(address)),
        _ => usage(format!("--metrics wants ADDR:PORT, as 127.0.0.1:9125, not {word:?}")),
    }
}

pub(super) fn listen(typed: &Typed) -> Result<Option<Listen>, Fatal> {
    if typed.listen.is_empty() {
        let ours = [
            Id::Plain,
            Id::Lazy,
            Id::Workers,
            Id::MaxSessions,
            Id::MaxPerIp,
            Id::RatePerIp,
            Id::ProxyProtocol,
            Id::ProxyFrom,
            Id::Drain,
            Id::NotifyFd,
            Id::Metrics,
        ];
        return match ours.into_iter().find(|id| typed.times(*id) > 0) {
            Some(id) => usage(format!("{} is a listener's: --listen is missing", called(id))),
            None => Ok(None),
        };
    }
    if typed.times(Id::Greeting) > 0 {
        return usage("--greeting is a UCSPI child's: a listener asks PROG itself (--lazy)".to_owned());
    }
    // There PROG has other ids, or is a daemon (--plain): what was tried would not be what runs.
    if typed.times(Id::Check) > 0 {
        return usage("--check tries one session: check the line without --listen and its options".to_owned());
    }
    if !matches!(typed.way, Way::Tls | Way::Plain | Way::Keep | Way::Raw) {
        return usage(format!("--listen and {} can't be had together", way_called(typed.way)));
    }
    let (mut addresses, mut inherited) = (Vec::new(), Vec::new());
    for word in &typed.listen {
        let text = word.to_str().unwrap_or_default();
        match (text.strip_prefix("fd:").map(str::parse), text.parse::<SocketAddr>()) {
            (Some(Ok(number @ 3..)), _) => inherited.push(number),
            (None, Ok(address)) if address.port() > 0 => addresses.push(address),
            (None, Err(_)) if text == "systemd" => inherited.extend(systemds(typed)?),
            _ => {
                return usage(format!(
                    "--listen wants ADDR:PORT, as 0.0.0.0:25 or [::]:25, fd:N with N above 2, or systemd, not {word:?}"
                ));
            }
        }
    }
    let notify_fd = match typed.value(Id::NotifyFd).map(|word| word.to_str().map(str::parse)) {
        None => None,
        Some(Some(Ok(number @ 3..))) => Some(number),
        Some(_) => return usage("--notify-fd takes the number of a descriptor above 2".to_owned()),
    };
    let mut numbers: Vec<i32> = inherited.iter().copied().chain(notify_fd).collect();
    numbers.sort_unstable();
    let metrics = metrics(typed)?;
    if let Some(both) = metrics.filter(|metrics| addresses.contains(metrics)) {
        return usage(format!("--listen and --metrics can't both have {both}"));
    }
    if let Some(twice) = numbers.windows(2).find(|two| two[0] == two[1]) {
        return usage(format!("descriptor {} is named twice", twice[0]));
    }
    let workers = match number(typed, Id::Workers)? {
        Some(count @ 1..=MOST_WORKERS) => count as usize,
        Some(_) => return usage(format!("--workers takes a number from 1 to {MOST_WORKERS}")),
        None => available_parallelism().map_or(1, usize::from),
    };
    let most = match number(typed, Id::MaxSessions)?.unwrap_or(SESSIONS) {
        0 => return usage("--max-sessions must be at least 1".to_owned()),
        most => most as usize,
    };
    let at_least_one = |id: Id| match number(typed, id)? {
        Some(0) => usage(format!("{} must be at least 1", called(id))),
        count => Ok(count),
    };
    let lazy = match typed.value(Id::Lazy).map(std::ffi::OsStr::as_encoded_bytes) {
        None | Some(b"yes") => true,
        Some(b"no") => false,
        Some(_) => return usage("--lazy takes nothing, =yes or =no".to_owned()),
    };
    Ok(Some(Listen {
        lazy,
        metrics,
        addresses,
        inherited,
        workers,
        most,
        most_per_address: at_least_one(Id::MaxPerIp)?,
        rate_per_address: at_least_one(Id::RatePerIp)?,
        proxies: proxies(typed)?,
        ids: (unprivileged(typed, Id::Uid)?, unprivileged(typed, Id::Gid)?),
        drain: Duration::from_secs(number(typed, Id::Drain)?.unwrap_or(DRAIN).into()),
        notify_fd,
        notify_socket: typed.value(Id::NotifySocket).map(OsString::from),
    }))
}

/// `--listen systemd`: the descriptors of sd_listen_fds(3). To be asked for, because a UCSPI child of systemd finds its client there.
fn systemds(typed: &Typed) -> Result<core::ops::Range<i32>, Fatal> {
    let said = |id| typed.value(id).and_then(|word| word.to_str()).map(str::parse::<i32>);
    match (said(Id::ListenPid), said(Id::ListenFds)) {
        (None, _) | (_, None) => usage("--listen systemd, but LISTEN_FDS and LISTEN_PID are not set".to_owned()),
        (Some(pid), _) if pid != Ok(std::process::id().cast_signed()) => {
            usage("--listen systemd, but LISTEN_PID says that the sockets are another process's".to_owned())
        }
        (_, Some(Ok(count @ 1..=MOST_SOCKETS))) => Ok(3..3 + count),
        (_, Some(_)) => usage(format!("--listen systemd: LISTEN_FDS must be a number from 1 to {MOST_SOCKETS}")),
    }
}

/// `--proxy-protocol` and `--proxy-from`, neither without the other: whose word is believed is for nobody to guess.
fn proxies(typed: &Typed) -> Result<Option<Vec<Network>>, Fatal> {
    match (typed.times(Id::ProxyProtocol) > 0, text(typed, Id::ProxyFrom)?) {
        (false, None) => Ok(None),
        (false, Some(_)) => usage("--proxy-from counts only with --proxy-protocol".to_owned()),
        (true, None) => usage("--proxy-protocol wants --proxy-from, the addresses of the load balancers".to_owned()),
        (true, Some(list)) => {
            let network = |item: &str| match item.parse() {
                Ok(network) => Ok(network),
                Err(why) => usage(format!(
                    "--proxy-from takes networks, as 192.0.2.0/24 or ::1, comma-separated: {item:?} is {why}"
                )),
            };
            list.split(',').map(network).collect::<Result<_, _>>().map(Some)
        }
    }
}
