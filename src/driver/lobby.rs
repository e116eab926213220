//! Connections of which nobody knows yet whose they are: a load balancer made them, and its PROXY header is to come first.
//!
//! Contract: a header is looked at where it lies, and taken when it is whole, so that no octet behind it is touched: those are the
//! client's. Who waits has a place among the sessions, [`PATIENCE`], and costs no memory but his descriptor's; [`Lobby::drive`] says what
//! became of whom. Order is by arrival, and so is by deadline.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use log::debug;
use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::proxy;
use crate::sys::listener::Accepted;

use super::admission::Place;

/// How long a header may take from accept. The load balancer sends it with its SYN's answer; on its way there is our own network.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Tokens from here on are those of the lobby.
pub(super) const FIRST: usize = 1 << (usize::BITS - 1);

/// Who waits.
#[derive(Debug, Default)]
pub(super) struct Lobby {
    waiting: BTreeMap<usize, Waiting>,
    ready: Vec<usize>,
    next: usize,
}

#[derive(Debug)]
struct Waiting {
    accepted: Accepted,
    place: Place,
    due: Instant,
    /// The other side will send no more.
    has_ended: bool,
    is_watched: bool,
}

/// Whose header is whole, or who is to be refused: why.
pub(super) type Called = (Accepted, Result<Place, &'static str>);

impl Lobby {
    /// Has one wait, to be looked at when the lobby is next driven.
    pub(super) fn join(&mut self, accepted: Accepted, place: Place, now: Instant) {
        let number = self.next;
        self.next += 1;
        let waiting = Waiting { accepted, place, due: now + PATIENCE, has_ended: false, is_watched: false };
        self.waiting.insert(number, waiting);
        self.ready.push(number);
    }

    /// Takes down an event of one of them.
    pub(super) fn note(&mut self, event: &Event) {
        let number = event.token().0 - FIRST;
        if let Some(waiting) = self.waiting.get_mut(&number) {
            waiting.has_ended |= event.is_read_closed();
            self.ready.push(number);
        }
    }

    /// Looks at those of whom something has come, and at the clock.
    pub(super) fn drive(&mut self, registry: &Registry, now: Instant) -> Vec<Called> {
        let mut called = Vec::new();
        for number in core::mem::take(&mut self.ready) {
            let Some(waiting) = self.waiting.get_mut(&number) else { continue };
            let found = match waiting.look() {
                Ok(Some(ends)) => Ok(ends),
                Ok(None) if waiting.has_ended => Err("it closed before its PROXY header was whole"),
                Ok(None) => match waiting.watch(registry, number) {
                    Ok(()) => continue,
                    Err(_) => Err("it can't be watched"),
                },
                Err(why) => Err(why),
            };
            called.extend(self.remove(number, registry, found));
        }
        while let Some(entry) = self.waiting.first_entry().filter(|entry| entry.get().due <= now) {
            let number = *entry.key();
            called.extend(self.remove(number, registry, Err("its PROXY header did not come in time")));
        }
        called
    }

    fn remove(&mut self, number: usize, registry: &Registry, found: Result<Ends, &'static str>) -> Option<Called> {
        let Waiting { mut accepted, place, is_watched, .. } = self.waiting.remove(&number)?;
        if is_watched {
            let _ = registry.deregister(&mut SourceFd(&accepted.socket.as_raw_fd()));
        }
        let found = found.map(|ends| {
            if let Some(ends) = ends {
                debug!("client={}: through {}", ends[0], accepted.ends[0]);
                accepted.ends = ends;
            }
            place
        });
        Some((accepted, found))
    }

    /// When it is to be driven though nothing has come.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|(_, waiting)| waiting.due)
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Sends all of them away.
    pub(super) fn close(&mut self) {
        self.waiting.clear();
    }
}

/// Those of a header; `None`: the connection's own.
type Ends = Option<[std::net::SocketAddr; 2]>;

impl Waiting {
    /// Takes the header, if it is whole.
    fn look(&mut self) -> Result<Option<Ends>, &'static str> {
        let mut octets = [0; proxy::LONGEST];
        let socket = self.accepted.socket.as_fd();
        let count = match recv(socket, &mut octets[..], RecvFlags::PEEK) {
            Ok((0, _)) => return Err("it closed before its PROXY header was whole"),
            Ok((count, _)) => count,
            Err(Errno::AGAIN) => return Ok(None),
            Err(_) => return Err("it broke off before its PROXY header was whole"),
        };
        let Some(header) = proxy::parse(&octets[..count])? else { return Ok(None) };
        match rustix::io::read(socket, &mut octets[..header.length]) {
            Ok(taken) if taken == header.length => Ok(Some(header.ends)),
            _ => Err("its PROXY header could not be taken"),
        }
    }

    fn watch(&mut self, registry: &Registry, number: usize) -> std::io::Result<()> {
        if !self.is_watched {
            let descriptor = self.accepted.socket.as_raw_fd();
            registry.register(&mut SourceFd(&descriptor), Token(FIRST + number), Interest::READABLE)?;
            self.is_watched = true;
        }
        Ok(())
    }
}
