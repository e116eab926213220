//! Dialling the backend: names resolved off the loop, addresses tried one after the other without blocking.

use core::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};

use mio::{Interest, Token};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with, sockopt};

use super::end::{End, Registry};

/// Threads that ask the system's resolver at a time, in the whole process: each outlives its session until the resolver gives up (with a
/// dead name server tens of seconds), and has a stack.
const LOOK_UPS: usize = 64;

static UNDER_WAY: LookUps = LookUps(AtomicUsize::new(0));

/// Where to dial.
#[derive(Clone, Debug)]
pub struct Target {
    /// The server's place.
    pub place: Place,
    /// The local address to connect from.
    pub source: Option<IpAddr>,
    /// Refuse every address but a loopback one: the certificate is not going to be checked.
    pub loopback_only: bool,
}

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Place {
    /// A name or an address literal, and the TCP port.
    Tcp(String, u16),
    /// A name that was looked up already, and all of its addresses.
    Found(String, Vec<SocketAddr>),
    /// A UNIX stream socket.
    Unix(PathBuf),
}

/// One address of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Over TCP.
    Tcp(SocketAddr),
    /// A UNIX stream socket.
    Unix(PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, _) | Self::Found(host, _) => f.write_str(host),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// The addresses of a target, as they become known. One for all dials of a session: what wakes it must outlive every wait of the
/// loop (closing it takes the wake-up back), and a question that hangs is not asked again.
#[derive(Debug, Default)]
pub struct Resolver {
    /// Readable when an answer has come (eventfd(2)); the thread that asks has a copy of its own.
    answered: Option<End>,
    asked: Option<Receiver<io::Result<Vec<Address>>>>,
}

impl Target {
    /// The addresses that need no resolver.
    #[must_use]
    pub fn literal(&self) -> Option<Vec<Address>> {
        let (host, port) = match &self.place {
            Place::Tcp(host, port) => (host, *port),
            Place::Found(_, found) => return Some(found.iter().copied().map(Address::Tcp).collect()),
            Place::Unix(path) => return Some(vec![Address::Unix(path.clone())]),
        };
        if let Ok(address) = host.parse::<IpAddr>() {
            return Some(vec![Address::Tcp(SocketAddr::new(address, port))]);
        }
        let both = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        let is_local = host.eq_ignore_ascii_case("localhost");
        is_local.then(|| both.iter().map(|address| Address::Tcp(SocketAddr::new(*address, port))).collect())
    }

    /// Those of `found` that may be dialled: of the source's family, and on loopback where that is demanded.
    #[must_use]
    pub fn usable(&self, found: Vec<Address>) -> Vec<Address> {
        let family = |a: &SocketAddr| self.source.is_none_or(|source| source.is_ipv4() == a.is_ipv4());
        let near = |a: &SocketAddr| !self.loopback_only || a.ip().to_canonical().is_loopback();
        let fits = |a: &Address| match a {
            Address::Tcp(a) => family(a) && near(a),
            Address::Unix(_) => true,
        };
        found.into_iter().filter(fits).collect()
    }

    /// Begins a connection to `address`. The socket becomes writable when it stands or has failed: see [`finish`].
    ///
    /// # Errors
    /// It failed at once; at a UNIX socket that is EAGAIN where its queue is full, which can't be waited for.
    pub fn begin(&self, address: &Address) -> io::Result<OwnedFd> {
        match address {
            Address::Tcp(address) => self.begin_tcp(*address),
            Address::Unix(path) => {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                connect(&socket, &SocketAddrUnix::new(path.as_path())?)?;
                Ok(socket)
            }
        }
    }

    fn begin_tcp(&self, address: SocketAddr) -> io::Result<OwnedFd> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        if let Some(source) = self.source {
            bind(&socket, &SocketAddr::new(source, 0))?;
        }
        match connect(&socket, &address) {
            // After EINTR the connection goes on by itself, as after EINPROGRESS.
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket),
            Err(error) => Err(error.into()),
        }
    }
}

impl Resolver {
    /// A new dial begins: what an older question has brought meanwhile is not its answer.
    pub fn begin(&mut self) {
        let is_open = self.asked.as_ref().is_some_and(|asked| matches!(asked.try_recv(), Err(TryRecvError::Empty)));
        if !is_open {
            self.asked = None;
        }
    }

    /// The addresses of `target`, or `None` as long as they are not known: ask again when the loop was woken. Literals and
    /// `localhost` (RFC 6761 6.3) are known at once; for other names a thread asks the system's resolver, which may block
    /// for long, and then wakes the loop, which calls us `token`.
    ///
    /// # Errors
    /// The name has no address, or the question can't be asked.
    pub fn poll(&mut self, target: &Target, registry: &Registry, token: Token) -> Option<io::Result<Vec<Address>>> {
        if let Some(known) = target.literal() {
            return Some(Ok(known));
        }
        if self.asked.is_none()
            && let Err(error) = self.ask(target, registry, token)
        {
            return Some(Err(error));
        }
        let answer = match self.asked.as_ref()?.try_recv() {
            Err(TryRecvError::Empty) => return None,
            Ok(found) => found,
            Err(TryRecvError::Disconnected) => Err(io::Error::other("the resolver's thread died")),
        };
        self.asked = None;
        Some(answer)
    }

    /// What the loop watches for us.
    pub fn end(&mut self) -> Option<&mut End> {
        self.answered.as_mut()
    }

    fn ask(&mut self, target: &Target, registry: &Registry, token: Token) -> io::Result<()> {
        let answered = match &mut self.answered {
            Some(answered) => answered,
            None => {
                let mut new = End::event(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?, token);
                new.watch(registry, Interest::READABLE)?;
                self.answered.insert(new)
            }
        };
        let waker = answered.as_fd().try_clone_to_owned()?;
        let Place::Tcp(host, port) = &target.place else { return Ok(()) };
        let name = (host.clone(), *port);
        let place = UNDER_WAY.enter().ok_or_else(|| io::Error::other("too many look-ups are under way"))?;
        let (sender, receiver) = channel();
        std::thread::Builder::new().name("resolver".to_owned()).spawn(move || {
            let _place = place;
            // Both fail only when the session has ended meanwhile.
            let _ = sender.send(name.to_socket_addrs().map(|found| found.map(Address::Tcp).collect()));
            let _ = rustix::io::write(&waker, &1_u64.to_ne_bytes());
        })?;
        self.asked = Some(receiver);
        Ok(())
    }
}

/// Counts look-ups, up to [`LOOK_UPS`].
struct LookUps(AtomicUsize);

/// The place of one, given back when it is dropped.
struct LookUp(&'static LookUps);

impl LookUps {
    fn enter(&'static self) -> Option<LookUp> {
        let more = |count| (count < LOOK_UPS).then_some(count + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| LookUp(self))
    }
}

impl Drop for LookUp {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether the connection that was begun on `socket`, now writable, stands.
///
/// # Errors
/// Why it does not.
pub fn finish(socket: &impl AsFd) -> io::Result<()> {
    sockopt::socket_error(socket)?.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(source: Option<&str>, loopback_only: bool) -> Target {
        let source = source.map(|s| s.parse().unwrap());
        Target { place: Place::Tcp("h".to_owned(), 587), source, loopback_only }
    }

    #[test]
    fn so_many_look_ups_and_no_more_until_one_has_ended() {
        static ALL: LookUps = LookUps(AtomicUsize::new(0));
        let mut taken: Vec<_> = (0..LOOK_UPS).map(|_| ALL.enter().unwrap()).collect();
        assert!(ALL.enter().is_none());
        taken.pop();
        taken.extend(ALL.enter());
        assert_eq!((taken.len(), ALL.enter().is_none()), (LOOK_UPS, true));
    }

    #[test]
    fn only_addresses_that_fit_are_dialled() {
        let all: Vec<Address> =
            ["192.0.2.1:587", "127.0.0.1:587", "[::1]:587"].iter().map(|a| Address::Tcp(a.parse().unwrap())).collect();
        assert_eq!(target(None, false).usable(all.clone()), all);
        assert_eq!(target(None, true).usable(all.clone()), all[1..]);
        assert_eq!(target(Some("127.0.0.53"), false).usable(all.clone()), all[..2]);
        assert_eq!(target(Some("::1"), true).usable(all.clone()), all[2..]);
    }
}
