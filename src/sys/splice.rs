//! splice(2), from a socket to a pipe or back: octets move inside the kernel.

use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, fcntl_setpipe_size};

/// The most that is asked for in one call. The kernel takes what the pipe has room for; over 2 GiB it refuses.
const MOST: usize = 1 << 20;

/// What a pipe is grown to once bulk is seen: with segments of 1500 octets the default's 16 slots hold 23 KiB. It holds what
/// `engine::batch` has a long letter come in.
pub const BULK: usize = 512 * 1024;

/// What one call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spliced {
    /// So many octets moved.
    Moved(usize),
    /// The source has ended.
    End,
    /// Nothing to take or no room to put it; the kernel doesn't say which.
    WouldBlock,
    /// This pair of descriptors can't be spliced (a file, a terminal, /dev/null). Nothing was moved.
    Unsupported,
}

/// Moves what there is from `source` to `sink`; one of them is a pipe. Both must be non-blocking: the flag is for the pipe.
///
/// # Errors
/// EPIPE: the sink's reader is gone, and nothing was taken from the source. Others: the socket is broken, or between two pipes the system
/// can't do it, which ENOMEM says of both.
pub fn splice(source: impl AsFd, sink: impl AsFd) -> io::Result<Spliced> {
    loop {
        return match rustix::pipe::splice(&source, None, &sink, None, MOST, SpliceFlags::NONBLOCK | SpliceFlags::MOVE) {
            Ok(0) => Ok(Spliced::End),
            Ok(count) => Ok(Spliced::Moved(count)),
            Err(Errno::AGAIN) => Ok(Spliced::WouldBlock),
            Err(Errno::INVAL | Errno::NOSYS) => Ok(Spliced::Unsupported),
            Err(Errno::INTR) => continue,
            Err(error) => Err(error.into()),
        };
    }
}

/// Grows the pipe for bulk. A refusal (the user's pipe quota, facts: 1024 pipes) leaves it as it is, which is no error.
pub fn grow(pipe: impl AsFd) {
    let _ = fcntl_setpipe_size(pipe, BULK);
}
