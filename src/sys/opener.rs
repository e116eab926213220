//! Opening files again when ids and rights are gone: a small process, forked before that, does it on request.
//!
//! Contract: single-threaded at the fork, and no secret read yet. The opener has the rights of the start, never hears a client and never
//! holds an octet of a file: a request is its running number and the place of a path in a list that was fixed at the fork, the answer is
//! that number and the file, opened for reading alone, or why it can't be. Links are followed anew each time: a renewed certificate is mostly a link that leads elsewhere. It
//! outlives the signals that a terminal or systemd sends to all, and ends when nobody can ask any more.
//!
//! Rejected: descriptors of the folders, opened at the start. Links lead out of them, and the ids count at each opening. Rejected: having the
//! spawner do it. It has PROG's rights, and hands PROG's pipes about.

use std::cell::Cell;
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

/// A request: its running number, and the place of the path. An answer: the same number, and the error's, or 0 and the file.
const NUMBER: usize = size_of::<u32>();
const REQUEST: usize = NUMBER + size_of::<u32>();
const ANSWER: usize = NUMBER + size_of::<i32>();

/// One who may ask, one question at a time.
#[derive(Debug)]
pub struct Opener {
    socket: OwnedFd,
    paths: Vec<PathBuf>,
    /// The number of the last question. An answer that came too late for its own may be of the same path.
    asked: Cell<u32>,
}

impl Opener {
    /// Forks the opener of these files.
    ///
    /// # Errors
    /// The system has no process or socket left.
    pub fn start(paths: Vec<PathBuf>) -> io::Result<Self> {
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        match raw::fork()? {
            Some(_) => Ok(Self { socket, paths, asked: Cell::default() }),
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
        let number = self.ask(path)?;
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
            if told == number {
                return outcome.map(File::from);
            }
        }
    }

    /// Asks, and returns the question's number.
    fn ask(&self, path: &Path) -> io::Result<[u8; NUMBER]> {
        let place = self.paths.iter().position(|listed| listed == path).and_then(|place| u32::try_from(place).ok());
        let place = place.ok_or(io::ErrorKind::NotFound)?.to_ne_bytes();
        self.asked.set(self.asked.get().wrapping_add(1));
        let number = self.asked.get().to_ne_bytes();
        rustix::io::write(&self.socket, &[number, place].concat())?;
        Ok(number)
    }

    fn answer(&self) -> io::Result<([u8; NUMBER], io::Result<OwnedFd>)> {
        let (mut octets, mut room) = ([0; ANSWER], [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))]);
        let mut ancillary = RecvAncillaryBuffer::new(&mut room);
        let mut into = [IoSliceMut::new(&mut octets)];
        let count = recvmsg(&self.socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
        let rights = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        let file = rights.flatten().next();
        let (number, error) = octets.split_at(NUMBER);
        match (count, number.first_chunk(), error.first_chunk()) {
            (ANSWER, Some(told), Some(error)) => {
                let outcome = match i32::from_ne_bytes(*error) {
                    0 => file.ok_or_else(|| io::Error::other("no descriptor left for it")),
                    number => Err(io::Error::from_raw_os_error(number)),
                };
                Ok((*told, outcome))
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
        let (told, place) = request.split_at(NUMBER);
        let place = place.first_chunk().map_or(usize::MAX, |place| u32::from_ne_bytes(*place) as usize);
        let opened = match paths.get(place) {
            Some(path) => rustix::fs::open(path, flags, Mode::empty()),
            None => Err(Errno::NOENT),
        };
        let number = opened.as_ref().err().map_or(0, |error| error.raw_os_error());
        let answer = [told, &number.to_ne_bytes()].concat();
        let files: Vec<_> = opened.iter().map(AsFd::as_fd).collect();
        let mut room = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut room);
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&files));
        }
        sendmsg(socket, &[IoSlice::new(&answer)], &mut ancillary, SendFlags::NOSIGNAL)?;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::io::Read;

    use super::*;

    #[test]
    fn an_answer_that_comes_too_late_is_no_answer_to_the_same_question() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("both.pem");
        fs::write(&path, "old").unwrap();
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let paths = vec![path.clone()];
        let opener = Opener { socket, paths: paths.clone(), asked: Cell::default() };
        let serving = std::thread::spawn(move || serve(&theirs, &paths));
        opener.ask(&path).unwrap();
        // Who asked has given up by the time it is there, and the file is another one.
        poll(&mut [PollFd::new(&opener.socket, PollFlags::IN)], None).unwrap();
        fs::write(folder.path().join("new"), "new").unwrap();
        fs::rename(folder.path().join("new"), &path).unwrap();
        let mut text = String::new();
        opener.open(&path).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "new");
        drop(opener);
        serving.join().unwrap().unwrap();
    }
}
