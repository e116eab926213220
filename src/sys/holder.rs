//! A place kept for a PROG that may yet be needed: a process that is forked at the start, as long as this one has all its rights and no secret,
//! and becomes PROG when it is told of the client's TLS. What the process that faces the client gives up after that (programs,
//! ids, setuid), PROG has not lost.
//!
//! Contract: single-threaded at the fork; nothing but its two pipes and the one for the variables is open in it; what it reads is
//! at most [`variables::MOST`] octets, and nothing in them but values of `SSL_*`. If the pipe ends before they are whole, because
//! the session needs no second PROG or was killed, it just ends.
//!
//! Rejected: vfork, whose parent waits until the exec. Rejected: a program of its own to wait: an exec costs more than all of
//! this. Rejected: starting PROG before the 220. It could not be told what TLS it is spoken to in.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;

use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;

use super::child::{self, Child};
use super::raw;
use crate::error::exit;
use crate::variables::{self, MOST, NAMES};

/// The place, not yet taken.
#[derive(Debug)]
pub struct Holder {
    child: Child,
    variables: OwnedFd,
}

impl Holder {
    /// Forks. Arguments as of [`Child::start`].
    ///
    /// # Errors
    /// The system has no process or pipe left.
    pub fn start(program: &OsStr, arguments: &[OsString], own: &[&str]) -> io::Result<Self> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC);
        let ((stdin, to_child), (from_child, stdout), (waiting, variables)) = (pipe()?, pipe()?, pipe()?);
        match raw::fork()? {
            Some(pid) => Ok(Self { child: Child::forked(pid, to_child, from_child), variables }),
            None => {
                drop((to_child, from_child, variables));
                let code = match become_prog(stdin, stdout, waiting, program, arguments, own) {
                    Ok(()) => exit::OVER,
                    Err(error) => {
                        let why = format!("starttls-wrapper: can't start {}: {error}\n", program.display());
                        let _ = rustix::io::write(rustix::stdio::stderr(), why.as_bytes());
                        exit::SYSTEM
                    }
                };
                raw::exit_now(code)
            }
        }
    }

    /// Whether it still waits.
    #[must_use]
    pub fn waits(&mut self) -> bool {
        matches!(self.child.try_reap(), Ok(None))
    }

    /// Has it become PROG, which is told these variables.
    ///
    /// # Errors
    /// It is gone; what is left of it is to be dismissed.
    pub fn tell(self, octets: &[u8]) -> (Child, io::Result<()>) {
        let told = retry_on_intr(|| rustix::io::write(&self.variables, octets));
        let whole = told
            .map_err(io::Error::from)
            .and_then(|count| if count == octets.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) });
        (self.child, whole)
    }

    /// It is not needed: what is left of it is to be dismissed.
    #[must_use]
    pub fn release(self) -> Child {
        self.child
    }

    /// Its process id, and PROG's.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.child.pid()
    }
}

/// In the new process: waits, and executes. Returns if there is nothing to be told any more, or with what went wrong.
fn become_prog(
    stdin: OwnedFd,
    stdout: OwnedFd,
    waiting: OwnedFd,
    program: &OsStr,
    arguments: &[OsString],
    own: &[&str],
) -> io::Result<()> {
    rustix::stdio::dup2_stdin(&stdin)?;
    rustix::stdio::dup2_stdout(&stdout)?;
    drop((stdin, stdout));
    raw::keep_only(&[waiting.as_fd()]);
    let Some(octets) = read_whole(waiting.as_fd())? else { return Ok(()) };
    let mut command = child::command(program, arguments, &[own, &NAMES].concat());
    for (name, value) in variables::decode(&octets) {
        command.env(name, OsString::from_vec(value));
    }
    drop(waiting);
    Err(command.exec())
}

fn read_whole(waiting: impl AsFd) -> io::Result<Option<Vec<u8>>> {
    let (mut octets, mut length) = (vec![0; MOST], 0);
    while !variables::is_whole(&octets[..length]) {
        match rustix::io::read(&waiting, &mut octets[length..]) {
            Ok(0) => return Ok(None),
            Ok(count) => length += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    octets.truncate(length);
    Ok(Some(octets))
}
