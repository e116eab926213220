//! The plaintext server of a session that begins without one: where it comes from, and its arrival.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use mio::{Interest, Token};
use rustix::process::Pid;

use crate::session::{ChildEnd, EndReason, Phase, StandIn};
use crate::sys::child::Child;
use crate::sys::dial::Target;
use crate::sys::end::{End, Registry};
use crate::sys::holder::Holder;
use crate::variables;

use super::conn::{Conn, end_of_pipe};
use super::handover::{Dial, Dialled};
use super::tokens::{CHILD_IN, CHILD_OUT};

/// The plaintext server, as a session begins with it.
#[derive(Debug)]
pub enum Front {
    /// PROG runs.
    Child(Child),
    /// There will be none: the session ends with that.
    Failed(EndReason),
    /// It is come to when the session wants it: at once, or, where somebody stands in for it, when only it can go on.
    Later(Source, Option<StandIn>),
}

impl Front {
    /// The process that is PROG, or will be.
    #[must_use]
    pub fn pid(&self) -> Option<Pid> {
        match self {
            Self::Child(child) => Some(child.pid()),
            Self::Later(Source::Held(holder), _) => Some(holder.pid()),
            Self::Later(Source::Asked(_) | Source::Dialled(_), _) | Self::Failed(_) => None,
        }
    }
}

/// Where a plaintext server comes from.
#[derive(Debug)]
pub enum Source {
    /// PROG is started by somebody else, who is told of the client's end and ours: [`super::Crowd::next_asking`].
    Asked([SocketAddr; 2]),
    /// PROG takes a place that was kept for it.
    Held(Holder),
    /// A daemon is connected to.
    Dialled(Arc<Target>),
}

impl Conn {
    /// In `Summon`: gets the server, and has the session know.
    pub(super) fn summon(&mut self, registry: &Registry, now: Instant) -> bool {
        let moved = self.read_client(now);
        if self.session.phase() != Phase::Summon {
            return moved;
        }
        let arrived = match self.source.take() {
            None => return moved,
            Some(Source::Asked(ends)) => {
                self.source = Some(Source::Asked(ends));
                return moved;
            }
            Some(Source::Held(holder)) => {
                let (child, told) = holder.tell(&variables::encode([]));
                told.map_err(|error| error.to_string()).and_then(|()| self.take_child(child, registry))
            }
            Some(Source::Dialled(target)) => match self.dial_plain(&target, registry, now) {
                Ok(false) => {
                    self.source = Some(Source::Dialled(target));
                    return moved;
                }
                Ok(true) => Ok(()),
                Err(why) => Err(format!("{}: {why}", target.place)),
            },
        };
        self.arrive(arrived, now);
        true
    }

    fn arrive(&mut self, outcome: Result<(), String>, now: Instant) {
        match outcome {
            Ok(()) => self.session.handle_summoned(now),
            Err(why) => self.session.handle_end(EndReason::Child(ChildEnd::NotStarted(why)), now),
        }
    }

    /// Both ends of the client's connection, once, when PROG is to be started.
    pub(super) fn asks(&mut self) -> Option<[SocketAddr; 2]> {
        match &self.source {
            Some(Source::Asked(ends)) if self.session.phase() == Phase::Summon => {
                let ends = *ends;
                self.source = None;
                Some(ends)
            }
            _ => None,
        }
    }

    /// PROG has been started for this session, or not: why.
    pub(super) fn hand_over(&mut self, child: Result<Child, String>, registry: &Registry, now: Instant) {
        let arrived = child.and_then(|child| self.take_child(child, registry));
        if self.session.phase() == Phase::Summon {
            self.arrive(arrived, now);
        } else {
            // It came too late, and is sent away.
            self.dismiss(true, registry, now);
        }
    }

    fn take_child(&mut self, mut child: Child, registry: &Registry) -> Result<(), String> {
        let ends = (child.stdin.take(), child.stdout.take());
        self.child = Some(child);
        self.take_pipes(ends, registry).map_err(|error| error.to_string())
    }

    /// Our ends of a child's pipes: what it is told, and what it says.
    pub(super) fn take_pipes(
        &mut self,
        ends: (Option<OwnedFd>, Option<OwnedFd>),
        registry: &Registry,
    ) -> std::io::Result<()> {
        let mut outcome = Ok(());
        self.child_in = end_of_pipe(ends.0, CHILD_IN, &mut outcome);
        self.child_out = end_of_pipe(ends.1, CHILD_OUT, &mut outcome);
        if let (Some(out), true) = (&mut self.child_out, outcome.is_ok()) {
            outcome = out.watch(registry, Interest::READABLE);
        }
        outcome
    }

    /// True: its connection stands.
    fn dial_plain(&mut self, target: &Arc<Target>, registry: &Registry, now: Instant) -> Result<bool, String> {
        let dial = self.dial.get_or_insert_with(|| {
            self.resolver.begin();
            Box::new(Dial::begin(target.clone(), self.policy.timeouts.dial, now))
        });
        let mut end = match dial.poll(&mut self.resolver, registry, now) {
            Dialled::Wait => return Ok(false),
            Dialled::Failed(why) => return Err(why),
            Dialled::Done(end) => end,
        };
        self.dial = None;
        // It is called otherwise from here on.
        end.unwatch(registry);
        let again = |token: Token| -> std::io::Result<End> { end.again(token) };
        let halves = || -> std::io::Result<(End, End)> {
            let mut from = again(CHILD_OUT)?;
            from.watch(registry, Interest::READABLE)?;
            Ok((from, again(CHILD_IN)?))
        };
        let (from, to) = halves().map_err(|error| error.to_string())?;
        (self.child_out, self.child_in) = (Some(from), Some(to));
        Ok(true)
    }
}
