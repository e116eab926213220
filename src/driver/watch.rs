//! The main thread of a listener, once all loops run: what a signal, or the end of a loop, makes of them all.
//!
//! SIGTERM or SIGINT: nobody new is accepted, and sessions have `--drain` seconds; a second one, or their end, and each hears 421. Without
//! one of the loops the others are to end too, and the supervisor starts us anew. SIGHUP: files are read again, and what the plaintext server
//! says is learned anew.
//!
//! At the end a loop that hangs is not waited for: there is a time by which each session is over.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{error, info};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::error::exit;
use crate::session::limits;
use crate::sys::notify::Supervisor;
use crate::sys::signals::{self, Wish};

use super::renewal::Renewal;
use super::worker::{House, Stage};

/// A loop that runs.
pub(super) struct Loop {
    /// Its thread, which ends with an exit code.
    pub(super) thread: JoinHandle<u8>,
    /// Wakes it when the stage has changed.
    pub(super) stop: OwnedFd,
}

/// Whatever there is to wait for.
pub(super) struct Watch {
    pub(super) signals: OwnedFd,
    /// Counts the loops that have ended ([`Over`]).
    pub(super) ended: OwnedFd,
    pub(super) loops: Vec<Loop>,
    pub(super) house: Arc<House>,
    pub(super) supervisor: Supervisor,
    /// How long sessions may go on behind the first signal.
    pub(super) drain: Duration,
    /// How long loops may take behind the last ([`last`]).
    pub(super) last: Duration,
    /// What SIGHUP reads again, if there is anything.
    pub(super) renewal: Option<Renewal>,
}

impl Watch {
    /// Waits until all loops have ended. Returns the exit code.
    ///
    /// # Errors
    /// It can't wait.
    pub(super) fn until_the_end(mut self) -> io::Result<u8> {
        let (mut ended, mut due) = (0_u64, None::<Instant>);
        while ended == 0 || due.is_some() && ended < self.loops.len() as u64 {
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            match self.wait(left, &mut ended)? {
                Some(Wish::End) if due.is_some() || self.drain.is_zero() => break,
                Some(Wish::End) => {
                    let count = self.house.admission.taken();
                    info!("nobody new is served: sessions={count} have {} s to end", self.drain.as_secs());
                    due = Some(Instant::now() + self.drain);
                    self.tell(Stage::Drain);
                }
                Some(Wish::Renew) if due.is_none() => self.renew(),
                Some(Wish::Renew) | None => {}
            }
        }
        self.tell(Stage::End);
        let due = Instant::now() + self.last;
        while ended < self.loops.len() as u64 {
            let left = due.saturating_duration_since(Instant::now());
            // Whoever will not wait for so long has SIGKILL. A signal more, as supervisors send, must not cost anybody the farewell.
            self.wait(Some(left), &mut ended)?;
            if ended < self.loops.len() as u64 && left.is_zero() {
                error!("a loop has not ended: its sessions end without a word");
                return Ok(exit::SYSTEM);
            }
        }
        Ok(self.loops.into_iter().map(|one| one.thread.join().unwrap_or(exit::BUG)).max().unwrap_or(exit::OVER))
    }

    /// Waits until something happens, so long at most: counts the loops that have ended, and returns the next signal.
    fn wait(&self, left: Option<Duration>, ended: &mut u64) -> io::Result<Option<Wish>> {
        let left = left.map(|left| Timespec::try_from(left).unwrap_or_default());
        let mut both = [&self.signals, &self.ended].map(|one| PollFd::new(one, PollFlags::IN));
        match poll(&mut both, left.as_ref()) {
            Err(Errno::INTR) | Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut count = [0; 8];
        if rustix::io::read(&self.ended, &mut count).is_ok() {
            *ended += u64::from_ne_bytes(count);
        }
        Ok(signals::next(&self.signals))
    }

    fn renew(&mut self) {
        self.supervisor.reloading();
        self.renewal.iter_mut().for_each(Renewal::renew);
        self.house.learned.renew();
        self.supervisor.ready();
    }

    fn tell(&self, stage: Stage) {
        self.supervisor.stopping();
        self.house.stage.store(stage as u8, Ordering::Release);
        self.loops.iter().for_each(|one| say(&one.stop));
    }
}

/// What a session takes at most when it is told to end: what is owed to its client, and PROG's exit before SIGTERM, before SIGKILL, and
/// behind it.
pub(super) fn last(farewell: Duration) -> Duration {
    limits::FLUSH + 3 * farewell
}

/// Says that a loop has ended, however it did.
pub(super) struct Over(pub(super) OwnedFd);

impl Drop for Over {
    fn drop(&mut self) {
        say(&self.0);
    }
}

/// A counter that can be waited for.
pub(super) fn event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Counts one.
pub(super) fn say(event: impl AsFd) {
    // It can't be full, and nobody is there to be told.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    /// What comes of so many signals to a listener whose loop hangs, and its loop.
    fn end(signals: usize, last: Duration) -> u8 {
        let (heard, sent) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let mut one = [0; 128];
        one[..4].copy_from_slice(&rustix::process::Signal::TERM.as_raw().to_ne_bytes());
        for _ in 0..signals {
            rustix::io::write(&sent, &one).unwrap();
        }
        let (release, hangs) = channel::<()>();
        let thread = thread::spawn(move || {
            let _ = hangs.recv();
            exit::OVER
        });
        let watch = Watch {
            signals: heard,
            ended: event().unwrap(),
            loops: vec![Loop { thread, stop: event().unwrap() }],
            house: House::bare_one(9),
            supervisor: Supervisor::default(),
            drain: Duration::ZERO,
            last,
            renewal: None,
        };
        let (tell, told) = channel();
        thread::spawn(move || tell.send(watch.until_the_end().unwrap()));
        let code = told.recv_timeout(Duration::from_secs(20)).unwrap_or(exit::BUG);
        drop(release);
        code
    }

    #[test]
    fn a_loop_that_hangs_holds_up_the_end_for_its_time_however_many_signals_come() {
        for signals in 1..=3 {
            let begin = Instant::now();
            assert_eq!(end(signals, Duration::from_millis(200)), exit::SYSTEM);
            assert!(begin.elapsed() >= Duration::from_millis(200), "{signals}");
        }
    }
}
