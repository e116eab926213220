//! The child: PROG on two pipes, with the environment that it would have had without us.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

use super::spawner;

/// A started child, to be reaped by [`Child::try_reap`]. One that is dropped before, when a session ends in disorder, is killed
/// and reaped.
#[derive(Debug)]
pub struct Child {
    /// Our end of its stdin.
    pub stdin: Option<OwnedFd>,
    /// Our end of its stdout.
    pub stdout: Option<OwnedFd>,
    pid: Pid,
    /// Of a child that is not ours but a spawner's: over this its end comes.
    leash: Option<OwnedFd>,
    ended: Option<ExitStatus>,
}

impl Child {
    /// Starts `program`, found through PATH, without the variables named in `own`. Descriptor 2 is shared with us; nothing
    /// else is inherited if [`super::inherited::clean_up`] was called before.
    ///
    /// Rejected: fork and exec by hand. std uses vfork's speed here and resets SIGPIPE.
    ///
    /// # Errors
    /// The program can't be executed, or the system has no process or pipe left.
    pub fn start(program: &OsStr, arguments: &[OsString], own: &[&str]) -> io::Result<Self> {
        Self::spawn(command(program, arguments, own))
    }

    /// The same, with these variables besides.
    ///
    /// # Errors
    /// As of [`Child::start`].
    pub fn start_with<'a>(
        program: &OsStr,
        arguments: &[OsString],
        own: &[&str],
        variables: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> io::Result<Self> {
        let mut command = command(program, arguments, own);
        command.envs(variables);
        Self::spawn(command)
    }

    pub(super) fn spawn(mut command: Command) -> io::Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let stdin = process.stdin.take().map(OwnedFd::from);
        let stdout = process.stdout.take().map(OwnedFd::from);
        Ok(Self { stdin, stdout, pid: Pid::from_child(&process), leash: None, ended: None })
    }

    /// A process that was our child before we were this program.
    #[must_use]
    pub fn inherited(pid: Pid) -> Self {
        Self { stdin: None, stdout: None, pid, leash: None, ended: None }
    }

    /// A process that was forked, with our ends of its pipes.
    pub(super) fn forked(pid: Pid, stdin: OwnedFd, stdout: OwnedFd) -> Self {
        Self { stdin: Some(stdin), stdout: Some(stdout), pid, leash: None, ended: None }
    }

    /// A process that a spawner has started for us.
    pub(super) fn on_leash(pid: Pid, stdin: OwnedFd, stdout: OwnedFd, leash: OwnedFd) -> Self {
        Self { stdin: Some(stdin), stdout: Some(stdout), pid, leash: Some(leash), ended: None }
    }

    /// Reaps the child if it has ended.
    ///
    /// # Errors
    /// The system call's: there is no such child of ours.
    pub fn try_reap(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = match &self.leash {
                Some(leash) => spawner::exit_status(leash)?,
                None => waitpid(Some(self.pid), WaitOptions::NOHANG)?
                    .map(|(_, status)| ExitStatus::from_raw(status.as_raw())),
            };
        }
        Ok(self.ended)
    }

    /// A descriptor that becomes readable when the child ends.
    ///
    /// # Errors
    /// The system call's.
    pub fn exit_event(&self) -> io::Result<OwnedFd> {
        match &self.leash {
            Some(leash) => leash.try_clone(),
            None => Ok(pidfd_open(self.pid(), PidfdFlags::empty())?),
        }
    }

    /// Sends SIGTERM, or SIGKILL. The pid is still the child's: only [`Child::try_reap`] gives it up.
    ///
    /// # Errors
    /// The system call's: EPERM where our ids were dropped and the child's were not.
    pub fn kill(&self, forcibly: bool) -> io::Result<()> {
        match &self.leash {
            Some(leash) => spawner::signal(leash, forcibly),
            None => Ok(kill_process(self.pid(), if forcibly { Signal::KILL } else { Signal::TERM })?),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }
}

/// Becomes `program`, as [`Child::start`] would start it but with our own descriptors. Returns why it can't.
#[must_use]
pub fn become_program(program: &OsStr, arguments: &[OsString], own: &[&str]) -> io::Error {
    command(program, arguments, own).exec()
}

/// `program`, found through PATH, without these variables. Without any of them to remove, std need not copy the environment.
pub(super) fn command(program: &OsStr, arguments: &[OsString], without: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    for name in without.iter().filter(|name| std::env::var_os(name).is_some()) {
        command.env_remove(name);
    }
    command
}

impl Drop for Child {
    fn drop(&mut self) {
        if !matches!(self.try_reap(), Ok(None)) || self.kill(true).is_err() || self.leash.is_some() {
            return;
        }
        // It dies at once, or is stuck in the kernel, for which nobody waits.
        if let Ok(exit) = self.exit_event() {
            let _ = poll(&mut [PollFd::new(&exit, PollFlags::IN)], Some(&A_SECOND));
        }
        let _ = self.try_reap();
    }
}

const A_SECOND: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The signal that killed a child, if one did.
#[must_use]
pub fn killed_by(status: ExitStatus) -> Option<i32> {
    status.signal()
}
