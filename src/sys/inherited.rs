//! What a UCSPI server, an inetd or a shell left us: descriptors, dispositions, a stderr that may be the client.

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::Pid;

use super::raw;
use crate::error::Fatal;

/// Where stderr is the client itself (an inetd passes one socket as 0, 1 and 2) it becomes `/dev/null`, for us and for the
/// child, so that no log line is ever part of the dialogue. To be called before anything is said.
///
/// # Errors
/// The system call's.
pub fn keep_stderr_from_the_client() -> io::Result<()> {
    let stderr = rustix::fs::fstat(rustix::stdio::stderr())?;
    if !is_socket(&stderr) {
        return Ok(());
    }
    let client = [rustix::fs::fstat(rustix::stdio::stdin())?, rustix::fs::fstat(rustix::stdio::stdout())?];
    if client.iter().any(|end| is_same(end, &stderr)) {
        rustix::stdio::dup2_stderr(null()?)?;
    }
    Ok(())
}

/// Makes this process one that a child may be started from: nothing above descriptor 2 is inherited by it, no signal is
/// ignored or blocked.
///
/// # Errors
/// The system call's.
pub fn clean_up() -> io::Result<()> {
    raw::close_on_exec_above_stderr()?;
    raw::default_dispositions()?;
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// The client's descriptors, 0 and 1. To be called once.
#[must_use]
pub fn client() -> (OwnedFd, OwnedFd) {
    raw::take_stdin_and_stdout()
}

/// Last words to the client of a session that can't begin, as far as one write takes them. For a program that ends now: its
/// stdout may have been closed already, and stdin is mostly the same socket.
pub fn say_to_client(octets: &[u8]) {
    if rustix::io::write(rustix::stdio::stdout(), octets).is_err() {
        let _ = rustix::io::write(rustix::stdio::stdin(), octets);
    }
}

/// What a UCSPI-TLS server has left us: its control socket, and what is read and written once it has begun. `environment` gives
/// a variable's value.
///
/// # Errors
/// A variable is not there, or names no descriptor of ours; or the system call's.
pub fn tls_server(environment: impl Fn(&str) -> Option<OsString>) -> Result<[OwnedFd; 3], Fatal> {
    let usage = |what: String| Err(Fatal::Usage(what));
    let mut numbers = Vec::with_capacity(3);
    for name in ["SSLCTLFD", "SSLREADFD", "SSLWRITEFD"] {
        let Some(word) = environment(name) else {
            return usage(format!("{name} is not set: run under s6-ucspitlsd or sslserver -n"));
        };
        let number = word.to_str().and_then(|word| word.parse::<i32>().ok()).filter(|number| *number > 2);
        match number.filter(|number| !numbers.contains(number)) {
            Some(number) => numbers.push(number),
            None => return usage(format!("{name} must be the number of a descriptor, not {word:?}")),
        }
    }
    let taken = |at: usize| {
        raw::take_inherited(numbers[at]).map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::BADF) => Fatal::Usage(format!("descriptor {}: {error}", numbers[at])),
            _ => Fatal::System("take over a descriptor of the UCSPI-TLS server", error),
        })
    };
    Ok([taken(0)?, taken(1)?, taken(2)?])
}

/// The one process that was our child before we were this program, as the other half of s6-ucspitlsd is: nobody else will reap it.
/// To be called before any other is started.
#[must_use]
pub fn only_child() -> Option<Pid> {
    let children = std::fs::read_to_string("/proc/thread-self/children").ok()?;
    let mut pids = children.split_whitespace().map(|word| word.parse().ok().and_then(Pid::from_raw));
    pids.next().filter(|_| pids.next().is_none()).flatten()
}

/// The TCP peer of `client`, if it has one.
#[must_use]
pub fn peer(client: impl AsFd) -> Option<SocketAddr> {
    rustix::net::getpeername(client).ok()?.and_then(|peer| peer.try_into().ok())
}

/// Both ends of the TCP connection `client`, if it is one: the peer's, and ours.
#[must_use]
pub fn ends(client: impl AsFd) -> Option<[SocketAddr; 2]> {
    let ours = rustix::net::getsockname(&client).ok()?.try_into().ok()?;
    Some([peer(client)?, ours])
}

fn is_socket(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Socket
}

fn is_same(a: &Stat, b: &Stat) -> bool {
    (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
}

fn null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}
