//! The server behind the client's TLS, as the rest of the engine knows it: one interface, whether it speaks TLS of its own
//! on a socket, or in the clear on a socket or on a child's two pipes.
//!
//! In the clear the records of one read of the client's are gathered here and leave in one write; what is read is encrypted
//! from where it was read to. As long as any of it waits, [`Backend::takes_more`] is false and the client is read no
//! further, so that at most one read of the client's ever waits.
//!
//! Rejected: writing each record from where rustls has put it (it takes a record's buffer back before the next, so that
//! several can't share a write). It saves a copy and makes five times the calls; measured in turns, with letters that come in
//! pieces ([`super::batch`]), the processor time of either is the same, 0.5 s a GiB.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mio::{Interest, Token};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::buffer::{Outgoing, spare};
use crate::session::BackendEnd;
use crate::sys::end::{End, Registry};
use crate::sys::splice;
use crate::tls::{Agreed, CertificateDer, ClientConfig, Facts, Leg, ServerName, TlsError};

use super::bridge::{self, Received, Trouble};
use super::pump::is_gone;
use super::relay::end_input;
use super::tokens::{CHILD_IN, CHILD_OUT};

/// What is read at once from a server that speaks in the clear: what a pipe holds.
const ROOM: usize = 64 * 1024;

/// A write of this much is bulk, for which a pipe is grown.
const BULK: usize = 16 * 1024;

/// A backend that is being spoken to.
pub struct Backend {
    link: Link,
    /// It has closed its side.
    pub(super) is_over: bool,
    /// It takes nothing more.
    pub(super) is_deaf: bool,
    /// Why, where it is not that it reads no more.
    pub(super) failure: Option<io::Error>,
    /// It was told that the client has ended.
    pub(super) close_sent: bool,
    /// Writing is shut down.
    pub(super) is_shut: bool,
}

enum Link {
    /// TLS on a socket.
    Tls(End, Box<Leg>),
    Clear(Clear),
}

/// A server that speaks in the clear.
struct Clear {
    ends: Ends,
    /// What has not left.
    waiting: Outgoing,
    /// Its end has been read: as clean an end as there is without TLS.
    has_ended: bool,
    /// It broke as we wrote: the kernel says so once, and has an end for who reads then.
    is_broken: bool,
    is_grown: bool,
}

enum Ends {
    Socket(End),
    /// What a child says, and what it is told as long as its input is open.
    Pipes(End, Option<End>),
}

impl Ends {
    fn input(&mut self) -> &mut End {
        match self {
            Self::Socket(end) | Self::Pipes(end, _) => end,
        }
    }

    fn output(&mut self) -> Option<&mut End> {
        match self {
            Self::Socket(end) => Some(end),
            Self::Pipes(_, end) => end.as_mut(),
        }
    }
}

impl Backend {
    /// TLS on a socket that is connected. The ClientHello is queued.
    ///
    /// # Errors
    /// [`TlsError::Setup`].
    pub fn tls(end: End, config: &Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, TlsError> {
        let leg = Leg::connect(config, name)?;
        Ok(Self::over(Link::Tls(end, Box::new(leg))))
    }

    /// In the clear on a socket that is connected.
    #[must_use]
    pub fn socket(end: End) -> Self {
        Self::clear(Ends::Socket(end))
    }

    /// A child, by what it says and what it is told.
    #[must_use]
    pub fn child(from: End, to: Option<End>) -> Self {
        Self::clear(Ends::Pipes(from, to))
    }

    fn clear(ends: Ends) -> Self {
        let clear = Clear { ends, waiting: Outgoing::default(), has_ended: false, is_broken: false, is_grown: false };
        Self::over(Link::Clear(clear))
    }

    fn over(link: Link) -> Self {
        Self { link, is_over: false, is_deaf: false, failure: None, close_sent: false, is_shut: false }
    }

    /// The pipes of a backend that is a child: what it says, and what it is told.
    pub(super) fn into_pipes(self) -> Option<(End, Option<End>)> {
        match self.link {
            Link::Clear(Clear { ends: Ends::Pipes(from, to), .. }) => Some((from, to)),
            Link::Clear(_) | Link::Tls(..) => None,
        }
    }

    /// The socket of a backend that has been told nothing.
    pub(super) fn into_socket(self) -> Option<End> {
        match self.link {
            Link::Clear(Clear { ends: Ends::Socket(end), .. }) => Some(end),
            Link::Clear(_) | Link::Tls(..) => None,
        }
    }

    /// The two directions of a backend in the clear: what it says, and what it is told. `None`: it speaks TLS.
    pub(super) fn into_halves(self, registry: &Registry) -> io::Result<Option<(End, Option<End>)>> {
        Ok(match self.link {
            Link::Clear(Clear { ends: Ends::Pipes(from, to), .. }) => Some((from, to)),
            Link::Clear(Clear { ends: Ends::Socket(mut end), .. }) => {
                // It is open in its copies, and would go on to wake us.
                end.unwatch(registry);
                Some((end.again(CHILD_OUT)?, Some(end.again(CHILD_IN)?)))
            }
            Link::Tls(..) => None,
        })
    }

    /// What it says.
    pub(super) fn input(&mut self) -> &mut End {
        match &mut self.link {
            Link::Tls(end, _) => end,
            Link::Clear(clear) => clear.ends.input(),
        }
    }

    /// What it is told, as long as that is open; a socket's is its input too.
    pub(super) fn output(&mut self) -> Option<&mut End> {
        match &mut self.link {
            Link::Tls(end, _) => Some(end),
            Link::Clear(clear) => clear.ends.output(),
        }
    }

    /// The end that the loop calls so.
    pub(super) fn end_called(&mut self, token: Token) -> Option<&mut End> {
        if self.input().is_called(token) {
            Some(self.input())
        } else {
            self.output().filter(|end| end.is_called(token))
        }
    }

    /// For those without a loop: waits until there is something to read, or what waits can be written. False: not within `patience`.
    ///
    /// # Errors
    /// The system call's.
    pub fn wait(&mut self, patience: Duration) -> io::Result<bool> {
        let is_waiting = !self.takes_more();
        let (input, output) = match &mut self.link {
            Link::Tls(end, _) | Link::Clear(Clear { ends: Ends::Socket(end), .. }) => (end, None),
            Link::Clear(Clear { ends: Ends::Pipes(from, to), .. }) => (from, to.as_mut()),
        };
        let patience = Timespec::try_from(patience).unwrap_or_default();
        let wanted = if is_waiting && output.is_none() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let told = output.as_ref().filter(|_| is_waiting).map(|end| PollFd::new(&**end, PollFlags::OUT));
        let mut all: Vec<PollFd<'_>> = [PollFd::new(&*input, wanted)].into_iter().chain(told).collect();
        let ready = match poll(&mut all, Some(&patience)) {
            Ok(count) => count > 0,
            Err(Errno::INTR) => true,
            Err(error) => return Err(error.into()),
        };
        drop(all);
        // As far as is known: a read or a write says the rest.
        input.readable = true;
        input.writable = true;
        if let Some(end) = output {
            end.writable = true;
        }
        Ok(ready)
    }

    /// What its TLS came to, where it has one.
    #[must_use]
    pub fn facts(&self) -> Option<Facts> {
        match &self.link {
            Link::Tls(_, leg) => Some(leg.facts()),
            Link::Clear(_) => None,
        }
    }

    /// The same to be counted.
    pub(super) fn agreed(&self) -> Option<Agreed> {
        match &self.link {
            Link::Tls(_, leg) => Some(leg.agreed()),
            Link::Clear(_) => None,
        }
    }

    /// The certificates that it has shown, leaf first.
    #[must_use]
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        match &self.link {
            Link::Tls(_, leg) => leg.peer_certificates(),
            Link::Clear(_) => &[],
        }
    }

    /// Where a write would have blocked, the loop is to say when it would not.
    pub(super) fn watch_writes(&mut self, registry: &Registry) -> io::Result<()> {
        match self.output().filter(|end| !end.writable) {
            Some(end) => end.watch(registry, Interest::WRITABLE),
            None => Ok(()),
        }
    }

    /// Whether it may be spoken to: its TLS, where it has one, stands.
    #[must_use]
    pub fn is_secure(&self) -> bool {
        match &self.link {
            Link::Tls(_, leg) => !leg.is_handshaking(),
            Link::Clear(_) => true,
        }
    }

    /// Whether its end was seen, and nothing can be missing: in TLS a close_notify.
    #[must_use]
    pub fn has_ended_cleanly(&self) -> bool {
        match &self.link {
            Link::Tls(_, leg) => leg.peer_closed(),
            Link::Clear(clear) => clear.has_ended && !clear.is_broken,
        }
    }

    /// How it has ended, when not cleanly.
    pub(super) fn broken_end(&self) -> BackendEnd {
        match &self.link {
            Link::Tls(..) => BackendEnd::Truncated,
            Link::Clear(_) => BackendEnd::BrokeOff,
        }
    }

    /// Whether it is a child, whose exit says how its end is meant.
    pub(super) fn is_child(&self) -> bool {
        matches!(&self.link, Link::Clear(Clear { ends: Ends::Pipes(from, _), .. }) if !from.is_socket())
    }

    /// One read, and everything that it completes, given to `sink` piece by piece.
    ///
    /// # Errors
    /// It can't go on: [`Trouble`].
    pub fn receive(&mut self, sink: &mut dyn FnMut(&[u8])) -> Result<Received, Trouble> {
        match &mut self.link {
            Link::Tls(end, leg) => bridge::receive(end, leg, sink),
            Link::Clear(clear) => clear.receive(sink),
        }
    }

    /// Whether all that it was sent has left, so that more may be read for it.
    #[must_use]
    pub fn takes_more(&self) -> bool {
        self.is_deaf
            || match &self.link {
                Link::Tls(_, leg) => !leg.wants_write(),
                Link::Clear(clear) => clear.waiting.waiting().is_empty(),
            }
    }

    /// Takes `octets`, to leave with the next [`Backend::transmit`].
    ///
    /// # Errors
    /// [`TlsError::NotReady`] before its TLS stands, and those that stay.
    pub fn send(&mut self, octets: &[u8]) -> Result<(), TlsError> {
        if self.is_deaf {
            return Ok(());
        }
        match &mut self.link {
            Link::Tls(_, leg) => leg.send(octets)?,
            Link::Clear(clear) => {
                if let Err(error) = clear.send(octets) {
                    self.deafen(error);
                }
            }
        }
        Ok(())
    }

    /// What it said before is read until its end.
    fn deafen(&mut self, error: io::Error) {
        self.is_deaf = true;
        self.failure = self.output().is_some_and(|end| !is_gone(end, &error)).then_some(error);
    }

    /// Why it takes nothing more, to be said once.
    pub(super) fn why_deaf(&mut self) -> String {
        let failure = self.failure.take();
        failure.map_or_else(|| "it takes nothing more".to_owned(), |error| format!("can't write to it: {error}"))
    }

    /// Writes what waits, as far as it is taken. Returns the octets written.
    pub fn transmit(&mut self) -> usize {
        if self.is_deaf {
            return 0;
        }
        let written = match &mut self.link {
            Link::Tls(end, leg) => bridge::transmit(end, leg),
            Link::Clear(clear) => clear.transmit(),
        };
        written.unwrap_or_else(|error| {
            self.deafen(error);
            0
        })
    }

    /// Says that the client has ended, once. True: that was new.
    pub fn close(&mut self) -> bool {
        let new = !self.close_sent;
        if new {
            self.close_sent = true;
            self.send_close();
            self.transmit();
        }
        if !self.is_shut && self.takes_more() {
            self.is_shut = true;
            match &mut self.link {
                Link::Tls(end, _) | Link::Clear(Clear { ends: Ends::Socket(end), .. }) => end.shut_down(),
                Link::Clear(Clear { ends: Ends::Pipes(_, to), .. }) => end_input(to),
            }
        }
        new
    }

    /// Sends the end that TLS knows, if its handshake is done.
    pub(super) fn send_close(&mut self) {
        if let Link::Tls(_, leg) = &mut self.link
            && !leg.is_handshaking()
        {
            leg.send_close();
        }
    }

    /// Gives the buffers' memory back, but for what waits.
    pub(super) fn give_back(&mut self) {
        match &mut self.link {
            Link::Tls(_, leg) => leg.give_back(),
            Link::Clear(clear) => clear.waiting.give_back(),
        }
    }
}

impl Clear {
    fn receive(&mut self, sink: &mut dyn FnMut(&[u8])) -> Result<Received, Trouble> {
        let mut room = spare::of(ROOM);
        let received = match self.ends.input().read(&mut room[..ROOM]) {
            Ok(None) => Ok(Received::Nothing),
            Ok(Some(0)) => {
                self.has_ended = true;
                Ok(Received::End)
            }
            Ok(Some(count)) => {
                sink(&room[..count]);
                Ok(Received::Octets(count))
            }
            Err(error) => Err(Trouble::Broken(error)),
        };
        spare::give_back(room);
        received
    }

    fn send(&mut self, octets: &[u8]) -> io::Result<()> {
        let Some(end) = self.ends.output() else { return Err(io::ErrorKind::BrokenPipe.into()) };
        if octets.len() >= BULK && !self.is_grown {
            self.is_grown = true;
            splice::grow(&*end);
        }
        self.waiting.push(octets);
        Ok(())
    }

    fn transmit(&mut self) -> io::Result<usize> {
        let mut written = 0;
        let Some(end) = self.ends.output() else { return Ok(0) };
        while !self.waiting.waiting().is_empty() && end.writable {
            match end.write(self.waiting.waiting()) {
                Ok(Some(count)) => {
                    self.waiting.sent(count);
                    written += count;
                }
                Ok(None) => break,
                Err(error) => {
                    // Behind an end of its own it would be EPIPE.
                    self.is_broken = error.kind() != io::ErrorKind::BrokenPipe;
                    return Err(error);
                }
            }
        }
        Ok(written)
    }
}
