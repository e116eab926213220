//! The child's farewell: QUIT, end of input, then SIGTERM, then SIGKILL, and always reaped. It goes on beside whatever the
//! session does, and nothing that the child still says reaches anyone.

use std::io;
use std::time::{Duration, Instant};

use log::{debug, warn};
use mio::Interest;

use crate::session::limits;
use crate::sys::child::Child;
use crate::sys::end::{End, Registry};

use super::tokens::CHILD_EXIT;

/// How far the farewell has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Asked,
    Terminated,
    Killed,
    /// We may not signal it (our ids were dropped, its were not): it has heard the end of its input.
    OutOfReach,
}

/// A child that is on its way out. Its stdout stays open and unread until it has ended: closing it would kill a child that
/// answers the QUIT.
#[derive(Debug)]
pub(super) struct Dismissal {
    child: Child,
    _stdout: Option<End>,
    exit: Option<End>,
    stage: Stage,
    due: Instant,
    patience: Duration,
    is_reaped: bool,
}

impl Dismissal {
    /// Says goodbye. `stdin` and `stdout` are our ends of its pipes; `polite`: it stands between two commands and can be
    /// told QUIT. In a relay it may stand inside a message, to which not an octet may be added.
    pub(super) fn begin(
        mut child: Child,
        stdin: Option<End>,
        mut stdout: Option<End>,
        polite: bool,
        patience: Duration,
        registry: &Registry,
        now: Instant,
    ) -> Self {
        if let (Some(mut stdin), true) = (stdin, polite) {
            // A child that has gone, or doesn't read, will not hear it.
            let _ = stdin.write(b"QUIT\r\n");
        }
        if let Some(stdout) = &mut stdout {
            stdout.unwatch(registry);
        }
        let ended = child.try_reap().ok().flatten();
        if let Some(status) = ended {
            debug!("child {} ended: {status}", child.pid().as_raw_nonzero());
        }
        let is_reaped = ended.is_some();
        let exit = if !is_reaped { watch_exit(&child, registry) } else { None };
        Self { child, _stdout: stdout, exit, stage: Stage::Asked, due: now + patience, patience, is_reaped }
    }

    /// Waits for one that ends by itself, and kills it if it does not. Where its end can't be watched it is not waited for in vain.
    pub(super) fn awaited(child: Child, patience: Duration, registry: &Registry, now: Instant) -> Self {
        let begun = Self::begin(child, None, None, false, patience, registry, now);
        let due = if begun.exit.is_some() { begun.due } else { now + patience.min(limits::LINGER) };
        Self { stage: Stage::Terminated, due, ..begun }
    }

    /// The end of the child, watched by the loop under [`CHILD_EXIT`].
    pub(super) fn exit_end(&mut self) -> Option<&mut End> {
        self.exit.as_mut()
    }

    /// When [`Dismissal::poll`] is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (!self.is_reaped).then_some(self.due)
    }

    /// Somebody waits for us: the next step comes at once.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.due = self.due.min(now);
    }

    /// Goes on. True: the child is reaped, or beyond all reach.
    pub(super) fn poll(&mut self, now: Instant) -> bool {
        if self.is_reaped {
            return true;
        }
        let told = self.exit.as_mut().is_some_and(|exit| core::mem::take(&mut exit.readable));
        if told || now >= self.due {
            match self.child.try_reap() {
                Ok(None) => {}
                Ok(Some(status)) => {
                    debug!("child {} ended: {status}", self.child.pid().as_raw_nonzero());
                    self.is_reaped = true;
                    return true;
                }
                Err(error) => {
                    warn!("can't reap the child: {error}");
                    return true;
                }
            }
        }
        now >= self.due && self.press(now)
    }

    fn press(&mut self, now: Instant) -> bool {
        let (next, forcibly) = match self.stage {
            Stage::Asked => (Stage::Terminated, false),
            Stage::Terminated => (Stage::Killed, true),
            // A killed child that does not die is stuck in the kernel.
            Stage::Killed | Stage::OutOfReach => return true,
        };
        self.due = now + self.patience;
        self.stage = match self.child.kill(forcibly) {
            Ok(()) => {
                debug!(
                    "child {} stays: sent {}",
                    self.child.pid().as_raw_nonzero(),
                    if forcibly { "SIGKILL" } else { "SIGTERM" }
                );
                next
            }
            Err(error) => {
                warn!(
                    "can't signal child {}, which stays after the session: {error}",
                    self.child.pid().as_raw_nonzero()
                );
                Stage::OutOfReach
            }
        };
        false
    }
}

/// Has the loop watch for the end of the child. Where that can't be had, the farewell's own deadlines look for it.
fn watch_exit(child: &Child, registry: &Registry) -> Option<End> {
    let watched = || -> io::Result<End> {
        let mut exit = End::event(child.exit_event()?, CHILD_EXIT);
        exit.watch(registry, Interest::READABLE)?;
        Ok(exit)
    };
    watched().inspect_err(|error| warn!("can't watch the child: {error}")).ok()
}
