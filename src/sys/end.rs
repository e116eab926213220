//! One descriptor on the loop: reading and writing without blocking, what is known of its readiness, and what the loop is
//! to watch it for.
//!
//! mio is edge-triggered. The rule that makes that safe: readiness is forgotten only when the kernel said EAGAIN, or gave
//! less than was asked for and neither end of stream nor urgent mark had been announced (epoll(7), Questions and answers 9).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Token};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown, sockopt};

use super::raw;

/// What a dialogue moves at a time. A pipe that is full of less wakes the pump when it is read.
const LITTLE: usize = 4096;

/// What a loop watches, in which one connection's descriptors are called from `first` on.
#[derive(Clone, Copy, Debug)]
pub struct Registry<'a> {
    all: &'a mio::Registry,
    first: usize,
}

impl<'a> Registry<'a> {
    /// Of the connection whose tokens begin with `first`.
    #[must_use]
    pub fn new(all: &'a mio::Registry, first: usize) -> Self {
        Self { all, first }
    }

    fn token(&self, own: Token) -> Token {
        Token(self.first + own.0)
    }
}

/// A watched descriptor.
#[derive(Debug)]
pub struct End {
    fd: OwnedFd,
    token: Token,
    /// Reading may give something.
    pub readable: bool,
    /// Writing may take something.
    pub writable: bool,
    /// The other side has closed: read until 0, whatever a short read seems to say.
    hung_up: bool,
    /// The connection is broken; reading says so once all that came before is read.
    pub is_broken: bool,
    /// Out-of-band data has come (TCP's urgent mark), at which splice stops for ever.
    pub urgent: bool,
    watched: Option<Interest>,
    /// The flags to give back: O_NONBLOCK belongs to the open file, which others may share.
    restore: Option<OFlags>,
    is_socket: bool,
    /// `/dev/null`, which takes a pipe's place when no more will be written: opened while files can be (see `sandbox`).
    null: Option<OwnedFd>,
}

impl End {
    /// Takes a descriptor that others may share: made non-blocking now, as it was again when dropped.
    ///
    /// # Errors
    /// The system call's; the descriptor then stays open, for last words.
    pub fn shared(fd: OwnedFd, token: Token) -> io::Result<Self> {
        let restore = match make_non_blocking(&fd) {
            Ok(flags) => (!flags.contains(OFlags::NONBLOCK)).then_some(flags),
            Err(error) => {
                core::mem::forget(fd);
                return Err(error);
            }
        };
        let is_socket = sockopt::set_tcp_nodelay(&fd, true).is_ok() || sockopt::socket_type(&fd).is_ok();
        let mut end = Self::plain(fd, token, is_socket);
        end.restore = restore;
        if !is_socket {
            // Without it the other side waits until the session's end.
            end.null = rustix::fs::open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        }
        Ok(end)
    }

    /// Takes a pipe end of ours, made non-blocking.
    ///
    /// # Errors
    /// The system call's.
    pub fn pipe(fd: OwnedFd, token: Token) -> io::Result<Self> {
        make_non_blocking(&fd)?;
        Ok(Self::plain(fd, token, false))
    }

    /// Whether the loop calls it so.
    #[must_use]
    pub fn is_called(&self, token: Token) -> bool {
        self.token == token
    }

    /// Takes a socket of ours that is non-blocking already.
    #[must_use]
    pub fn socket(fd: OwnedFd, token: Token) -> Self {
        Self::plain(fd, token, true)
    }

    /// Takes a descriptor that is only waited for, such as a pidfd.
    #[must_use]
    pub fn event(fd: OwnedFd, token: Token) -> Self {
        Self::plain(fd, token, false)
    }

    /// The same socket once more, to be watched for itself.
    ///
    /// # Errors
    /// The system call's.
    pub fn again(&self, token: Token) -> io::Result<Self> {
        Ok(Self::plain(self.fd.as_fd().try_clone_to_owned()?, token, self.is_socket))
    }

    fn plain(fd: OwnedFd, token: Token, is_socket: bool) -> Self {
        Self {
            fd,
            token,
            readable: false,
            writable: true,
            hung_up: false,
            is_broken: false,
            urgent: false,
            watched: None,
            restore: None,
            is_socket,
            null: None,
        }
    }

    /// Has the loop watch for `interest` too. What epoll refuses (a file, /dev/null) never blocks and counts as ready.
    ///
    /// # Errors
    /// The system call's.
    pub fn watch(&mut self, registry: &Registry, interest: Interest) -> io::Result<()> {
        let wanted = self.watched.map_or(interest, |have| have | interest);
        if self.watched == Some(wanted) {
            return Ok(());
        }
        let raw = self.fd.as_raw_fd();
        let done = match self.watched {
            None => registry.all.register(&mut SourceFd(&raw), registry.token(self.token), wanted),
            Some(_) => registry.all.reregister(&mut SourceFd(&raw), registry.token(self.token), wanted),
        };
        match done {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
                self.readable = true;
                self.writable = true;
                self.hung_up = true;
            }
            Err(error) => return Err(error),
        }
        self.watched = Some(wanted);
        Ok(())
    }

    /// Stops the watching; the descriptor stays open.
    pub fn unwatch(&mut self, registry: &Registry) {
        if self.watched.take().is_some() {
            let raw = self.fd.as_raw_fd();
            // Fails only for what epoll had refused.
            let _ = registry.all.deregister(&mut SourceFd(&raw));
        }
    }

    /// The loop saw this.
    pub fn note(&mut self, event: &Event) {
        self.is_broken |= event.is_error();
        self.hung_up |= event.is_read_closed() || event.is_error();
        self.readable |= event.is_readable() || self.hung_up;
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
        self.urgent |= event.is_priority();
    }

    /// Reads into `room`, which must not be empty: `Some(0)` is the end, `None` nothing now.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn read(&mut self, room: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.fd, &mut *room) {
                Ok(count) => {
                    // A read stops at an urgent mark too, with more behind it.
                    if count < room.len() && !self.hung_up && !self.urgent {
                        self.readable = false;
                    }
                    return Ok(Some(count));
                }
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes from `octets`: `None` means that nothing can be taken now.
    ///
    /// # Errors
    /// The connection is broken; of a pipe EPIPE, or what keeps the system from it.
    pub fn write(&mut self, octets: &[u8]) -> io::Result<Option<usize>> {
        self.give(octets, |fd, octets| rustix::io::write(fd, octets))
    }

    /// The same where nothing follows but the end, which a socket sends in the same segment.
    ///
    /// # Errors
    /// Those of [`End::write`].
    pub fn write_last(&mut self, octets: &[u8]) -> io::Result<Option<usize>> {
        if !self.is_socket {
            return self.write(octets);
        }
        self.give(octets, |fd, octets| send(fd, octets, SendFlags::MORE | SendFlags::NOSIGNAL))
    }

    fn give(
        &mut self,
        octets: &[u8],
        call: impl Fn(&OwnedFd, &[u8]) -> rustix::io::Result<usize>,
    ) -> io::Result<Option<usize>> {
        loop {
            match call(&self.fd, octets) {
                Ok(count) => return Ok(Some(count)),
                Err(Errno::AGAIN) => {
                    self.writable = false;
                    return Ok(None);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Asks to be told of a socket's octets when there are so many, or its end. What the kernel can't do it leaves.
    pub fn wake_for(&self, octets: usize) {
        if self.is_socket {
            raw::wake_for(self.fd.as_fd(), i32::try_from(octets).unwrap_or(i32::MAX));
        }
    }

    /// Whether all that can be taken now has been, if the last `moved` octets were less than a page: neither the end nor an urgent
    /// mark was announced, behind which there would be more to find.
    #[must_use]
    pub fn is_drained_by(&self, moved: usize) -> bool {
        moved < LITTLE && !self.hung_up && !self.urgent
    }

    /// Says that no more will be written: a socket's writing side is shut down; a shared pipe is closed, by `/dev/null` taking
    /// its place.
    pub fn shut_down(&mut self) {
        if self.is_socket {
            // ENOTCONN: the other side was faster.
            let _ = shutdown(&self.fd, Shutdown::Write);
        } else if let Some(null) = self.null.take() {
            self.give_back_flags();
            let _ = rustix::io::dup2(&null, &mut self.fd);
            self.watched = None;
        }
    }

    /// Ends a socket for everyone who shares it: nothing more is read or written, by nobody.
    pub fn cut_off(&self) {
        if self.is_socket {
            let _ = shutdown(&self.fd, Shutdown::Both);
        }
    }

    /// Makes the open file what it was for those who share it.
    fn give_back_flags(&mut self) {
        if let Some(flags) = self.restore.take() {
            // Nobody is left to be told if it fails.
            let _ = fcntl_setfl(&self.fd, flags);
        }
    }

    /// Whether this is a socket.
    #[must_use]
    pub fn is_socket(&self) -> bool {
        self.is_socket
    }
}

/// Sets O_NONBLOCK where it is not set. Returns the flags as they were.
fn make_non_blocking(fd: &OwnedFd) -> io::Result<OFlags> {
    let flags = fcntl_getfl(fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(flags)
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.give_back_flags();
    }
}
