//! Listening sockets: bound for one loop each, so that loops share nothing (SO_REUSEPORT, socket(7)), and connections off them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, acceptfrom_with, bind, listen, socket_with, sockopt};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Connections that the kernel holds ready; it cuts this to net.core.somaxconn.
pub const BACKLOG: i32 = 4096;

/// Binds a TCP socket to `address` and listens. One of IPv6 takes no IPv4: that is an address of its own.
///
/// # Errors
/// The system call's: the address is in use, or not ours.
pub fn open(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A socket that listens.
#[derive(Debug)]
pub struct Listening {
    /// Its descriptor.
    pub socket: OwnedFd,
    /// Somebody else may accept from its queue: the other loops, and whoever has left it for us.
    pub is_shared: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Accepted {
    /// Its socket, non-blocking.
    pub socket: OwnedFd,
    /// Both ends: the client's, and ours.
    pub ends: [SocketAddr; 2],
}

/// Has a loop wait for connections, told of by `token`. Of those who wait at a shared socket the kernel wakes one for each (EPOLLEXCLUSIVE,
/// epoll_ctl(2)): mio knows only how to wake them all. What comes while that one is awake wakes the next. The data of an event is its
/// token, which is how mio reads it.
///
/// # Errors
/// The system call's.
pub fn watch(listening: &Listening, token: Token, registry: &Registry) -> io::Result<()> {
    if listening.is_shared {
        let events = EventFlags::IN | EventFlags::ET | EventFlags::EXCLUSIVE;
        return Ok(epoll::add(registry, &listening.socket, EventData::new_u64(token.0 as u64), events)?);
    }
    registry.register(&mut SourceFd(&listening.socket.as_raw_fd()), token, Interest::READABLE)
}

/// Has nothing wait for more to come in the connections of this listening socket, which inherit that (TCP_NODELAY, tcp(7)).
pub fn hurry(listener: impl AsFd) {
    let _ = sockopt::set_tcp_nodelay(listener, true);
}

/// Takes the next connection of a listening socket that was told to [`hurry`]; `None`: there is none now.
///
/// # Errors
/// EMFILE, ENFILE, ENOBUFS, ENOMEM: it can't be had now, and stays in the queue; one whose own end the system can't tell is closed.
/// Or the socket itself is of no use, as EINVAL after a shutdown(2) by somebody who has it too. Either lasts. What is wrong with one
/// connection alone is passed over.
pub fn accept(listener: impl AsFd) -> io::Result<Option<Accepted>> {
    loop {
        let (socket, peer) = match acceptfrom_with(&listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(accepted) => accepted,
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) if is_one_connections(error) => continue,
            Err(error) => return Err(error.into()),
        };
        let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
        let local = SocketAddr::try_from(rustix::net::getsockname(&socket)?).ok();
        if let Some(ends) = peer.zip(local) {
            return Ok(Some(Accepted { socket, ends: [ends.0, ends.1] }));
        }
    }
}

/// accept(2): pending errors of the network come this way too, and are the connection's. Not in this list: EPERM and EOPNOTSUPP, which
/// can be the socket's, and last.
fn is_one_connections(error: Errno) -> bool {
    matches!(
        error,
        Errno::INTR
            | Errno::CONNABORTED
            | Errno::PROTO
            | Errno::NOPROTOOPT
            | Errno::NETDOWN
            | Errno::NETUNREACH
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::NONET
            | Errno::TIMEDOUT
    )
}

/// Raises the limit of open descriptors as far as it may be. Returns it, and what it was where that was less.
pub fn raise_descriptors() -> (u64, Option<Rlimit>) {
    let was = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: was.maximum, maximum: was.maximum };
    let most = raised.current.unwrap_or(u64::MAX);
    if raised == was || setrlimit(Resource::Nofile, raised).is_err() {
        return (was.current.unwrap_or(u64::MAX), None);
    }
    (most, Some(was))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn all_of_ipv6_is_none_of_ipv4() {
        let listener = open("[::]:0".parse().unwrap()).unwrap();
        let port = SocketAddr::try_from(rustix::net::getsockname(&listener).unwrap()).unwrap().port();
        assert!(std::net::TcpStream::connect(("::1", port)).is_ok());
        let refused = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn nothing_waits_for_more_to_come_in_a_connection_whose_listener_was_told_so() {
        for is_told in [false, true] {
            let listener = open("127.0.0.1:0".parse().unwrap()).unwrap();
            if is_told {
                hurry(&listener);
            }
            let address: SocketAddr = rustix::net::getsockname(&listener).unwrap().try_into().unwrap();
            let client = std::net::TcpStream::connect(address).unwrap();
            let accepted = accept(&listener).unwrap().unwrap();
            assert_eq!(sockopt::tcp_nodelay(&accepted.socket).unwrap(), is_told);
            assert_eq!(accepted.ends, [client.local_addr().unwrap(), address]);
        }
    }

    #[test]
    fn a_socket_that_is_of_no_use_any_more_is_an_error_and_no_wait() {
        let listener = open("127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(accept(&listener).unwrap().is_none());
        rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
        assert_eq!(accept(&listener).unwrap_err().raw_os_error(), Some(Errno::INVAL.raw_os_error()));
        let no_socket = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(accept(&no_socket).unwrap_err().raw_os_error(), Some(Errno::NOTSOCK.raw_os_error()));
    }
}
