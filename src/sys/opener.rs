//! Opening files again when ids and rights are gone: a small process, forked before that, does it on request.
//!
//! Contract: single-threaded at the fork, and no secret read yet. The opener has the rights of the start, never hears a client and never
//! holds an octet of a file: a request is the place of a path in a list that was fixed at the fork, the answer is the file, opened for
//! reading alone, or why it can't be. Links are followed anew each time: a renewed certificate is mostly a link that leads elsewhere. It
//! outlives the signals that a terminal or systemd sends to all, and ends when nobody can ask any more.
//!
//! Rejected: descriptors of the folders, opened at the start. Links lead out of them, and the ids count at each opening. Rejected: having the
//! spawner do it. It has PROG's rights, and hands PROG's pipes about.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::raw;
use crate::error::exit;

/// How long a file may take to be opened: it may lie on another machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// A request: the place of the path. An answer: the same, and the error's number, or 0 and the file.
const REQUEST: usize = size_of::<u32>();
const ANSWER: usize = REQUEST + size_of::<i32>();

/// One who may ask, one question at a time.
#[derive(Debug)]
pub struct Opener {
    socket: OwnedFd,
    paths: Vec<PathBuf>,
}

impl Opener {
    /// Forks the opener of these files.
    ///
    /// # Errors
    /// The system has no process or socket left.
    pub fn start(paths: Vec<PathBuf>) -> io::Result<Self> {
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        match raw::fork()? {
            Some(_) => Ok(Self { socket, paths }),
            None => {
                let _ = (rustix::process::setpgid(None, None), rustix::thread::set_name(c"opener"));
                raw::keep_only(&[theirs.as_fd()]);
                let code =
                    match raw::outlive_terminations().map_err(io::Error::from).and_then(|()| serve(&theirs, &paths)) {
                        Ok(()) => exit::OVER,
                        Err(_) => exit::SYSTEM,
                    };
                raw::exit_now(code)
            }
        }
    }

    /// Opens the file at this path, which is one of the list.
    ///
    /// # Errors
    /// It can't be opened; NotFound also if it is none of the list. Or the opener is gone, or takes too long.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        let place = self.paths.iter().position(|listed| listed == path).and_then(|place| u32::try_from(place).ok());
        let request = place.ok_or(io::ErrorKind::NotFound)?.to_ne_bytes();
        rustix::io::write(&self.socket, &request)?;
        let due = Instant::now() + PATIENCE;
        loop {
            let left = due.saturating_duration_since(Instant::now());
            let left_over = Timespec::try_from(left).unwrap_or_default();
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&left_over)) {
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
                Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "it is not opened in time")),
                Ok(_) => {}
            }
            let (told, outcome) = self.answer()?;
            // One that came too late for its question is no answer to this one.
            if told == request {
                return outcome.map(File::from);
            }
        }
    }

    fn answer(&self) -> io::Result<([u8; REQUEST], io::Result<OwnedFd>)> {
        let (mut octets, mut room) = ([0; ANSWER], [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))]);
        let mut ancillary = RecvAncillaryBuffer::new(&mut room);
        let mut into = [IoSliceMut::new(&mut octets)];
        let count = recvmsg(&self.socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
        let rights = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        let file = rights.flatten().next();
        let (place, error) = octets.split_at(REQUEST);
        match (count, place.first_chunk(), error.first_chunk()) {
            (ANSWER, Some(place), Some(error)) => {
                let outcome = match i32::from_ne_bytes(*error) {
                    0 => file.ok_or_else(|| io::Error::other("no descriptor left for it")),
                    number => Err(io::Error::from_raw_os_error(number)),
                };
                Ok((*place, outcome))
            }
            _ => Err(io::Error::other("the process that opens files is gone")),
        }
    }
}

/// In the new process: opens until nobody can ask any more.
fn serve(socket: &OwnedFd, paths: &[PathBuf]) -> io::Result<()> {
    loop {
        let mut request = [0; REQUEST];
        match rustix::io::read(socket, &mut request) {
            Ok(REQUEST) => {}
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        // What is no file must not hold us up.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let opened = match paths.get(u32::from_ne_bytes(request) as usize) {
            Some(path) => rustix::fs::open(path, flags, Mode::empty()),
            None => Err(Errno::NOENT),
        };
        let number = opened.as_ref().err().map_or(0, |error| error.raw_os_error());
        let answer = [request, number.to_ne_bytes()].concat();
        let files: Vec<_> = opened.iter().map(AsFd::as_fd).collect();
        let mut room = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut room);
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&files));
        }
        sendmsg(socket, &[IoSlice::new(&answer)], &mut ancillary, SendFlags::NOSIGNAL)?;
    }
}
