//! Two descriptors that a test speaks through, in and out: a TCP socket, a UNIX one, or two pipes. Never blocks longer than
//! its deadline: our open file is non-blocking, which is nobody else's business, since the other end is another open file.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// See the file's head.
pub(crate) struct Stream {
    input: OwnedFd,
    output: Option<OwnedFd>,
    /// When a read or a write gives up with `TimedOut`; with `None` at once, with `WouldBlock`.
    pub(crate) deadline: Option<Instant>,
}

impl Stream {
    /// One socket.
    pub(crate) fn socket(socket: impl Into<OwnedFd>) -> Self {
        let socket = socket.into();
        Self::pipes(socket.try_clone().unwrap(), socket)
    }

    /// What is read and what is written.
    pub(crate) fn pipes(input: OwnedFd, output: OwnedFd) -> Self {
        for fd in [&input, &output] {
            fcntl_setfl(fd, fcntl_getfl(fd).unwrap() | OFlags::NONBLOCK).unwrap();
        }
        Self { input, output: Some(output), deadline: None }
    }

    /// The same descriptors once more.
    pub(crate) fn twin(&self) -> Self {
        let clone = |fd: &OwnedFd| fd.try_clone().unwrap();
        Self { input: clone(&self.input), output: self.output.as_ref().map(clone), deadline: None }
    }

    /// What is read: one socket's only descriptor that matters for its options.
    pub(crate) fn input(&self) -> &OwnedFd {
        &self.input
    }

    /// Ends our side: FIN, or the pipe closed.
    pub(crate) fn end(&mut self) {
        if let Some(output) = self.output.take() {
            let _ = rustix::net::shutdown(&output, rustix::net::Shutdown::Write);
        }
    }

    /// Waits until it can be read, or written where that is wanted too, or `deadline`. False: the deadline.
    pub(crate) fn wait(&self, reads: bool, writes: bool, deadline: Instant) -> bool {
        let mut fds = Vec::new();
        if reads {
            fds.push(PollFd::new(&self.input, PollFlags::IN));
        }
        if let (true, Some(output)) = (writes, &self.output) {
            fds.push(PollFd::new(output, PollFlags::OUT));
        }
        wait(&mut fds, deadline)
    }

    fn patient<T>(&self, for_reading: bool, mut attempt: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let deadline = self.deadline.ok_or(ErrorKind::WouldBlock)?;
                    if !self.wait(for_reading, !for_reading, deadline) {
                        return Err(ErrorKind::TimedOut.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.patient(true, || rustix::io::read(&self.input, &mut *room))
    }
}

impl Write for Stream {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let Some(output) = &self.output else { return Err(ErrorKind::BrokenPipe.into()) };
        self.patient(false, || rustix::io::write(output, octets))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until `fd` can be read, or has ended.
pub(crate) fn wait_readable(fd: impl AsFd, deadline: Instant) -> Result<(), String> {
    if wait(&mut [PollFd::new(&fd, PollFlags::IN)], deadline) { Ok(()) } else { Err("nothing came".to_owned()) }
}

/// Waits until nobody has the other end of this pipe any more, or `deadline`. False: the deadline.
pub(crate) fn wait_hangup(pipe: impl AsFd, deadline: Instant) -> bool {
    wait(&mut [PollFd::new(&pipe, PollFlags::empty())], deadline)
}

fn wait(fds: &mut [PollFd<'_>], deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        match rustix::event::poll(fds, Some(&timeout)) {
            Err(Errno::INTR) => {}
            Ok(0) => return false,
            Ok(_) => return true,
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// Waits until `is_so`, looking every millisecond. False: `patience` was over first.
pub(crate) fn wait_until(patience: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !is_so() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::park_timeout(Duration::from_millis(1));
    }
    true
}
