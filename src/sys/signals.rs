//! SIGTERM and SIGINT as something to read, and a listener's SIGHUP. Blocked only after the child is started: a mask is inherited.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Blocks SIGTERM and SIGINT; the descriptor becomes readable when one comes.
///
/// # Errors
/// The system call's.
pub fn terminations() -> io::Result<OwnedFd> {
    readable(&[Signal::SIGTERM, Signal::SIGINT])
}

/// Has a SIGHUP wait until [`of_a_listener`], whose start it would end otherwise.
///
/// # Errors
/// The system call's.
pub fn put_off_renewals() -> io::Result<()> {
    Ok(SigSet::from(Signal::SIGHUP).thread_block()?)
}

/// The same with SIGHUP, to be told apart by [`next`].
///
/// # Errors
/// The system call's.
pub fn of_a_listener() -> io::Result<OwnedFd> {
    readable(&[Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP])
}

fn readable(signals: &[Signal]) -> io::Result<OwnedFd> {
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block()?;
    let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    Ok(descriptor.into())
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// SIGHUP.
    Renew,
    /// SIGTERM, SIGINT.
    End,
}

/// The next signal, if one has come.
#[must_use]
pub fn next(signals: impl AsFd) -> Option<Wish> {
    // signalfd(2): the number is the first field of 128 octets.
    let mut octets = [0; 128];
    let count = rustix::io::read(signals, &mut octets).ok()?;
    let number = octets[..count].first_chunk().map(|number| i32::from_ne_bytes(*number))?;
    Some(if number == Signal::SIGHUP as i32 { Wish::Renew } else { Wish::End })
}
