//! Many connections on one loop, each driven by itself: who is to be driven, and when.
//!
//! Contract: after every wait of the loop, [`Crowd::note`] for each event, then [`Crowd::drive`] once; it says how long the loop may
//! wait. Who wants a PROG is then in the queue of [`Crowd::next_asking`], to be answered by [`Crowd::hand_over`]. A connection that panics is ended alone, which is logged as the bug it is: the others never notice. What is silent costs
//! nothing: a deadline that moves away (each command moves one) is not moved here before it is the first of all, and wakes nobody.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use log::error;
use mio::event::Event;
use mio::{Registry, Token};

use crate::session::{ChildEnd, EndReason};
use crate::sys::child::Child;
use crate::sys::end;

use super::conn::{Conn, Driven, Parts};
use super::report;

/// Descriptors of one connection, at most: a power of two over the last of `tokens`.
const STRIDE: usize = 16;

/// Tokens below this are none of a connection's.
pub const OTHERS: usize = 1024;

/// The connections of one loop, each with something that its owner has to give back when it has ended, by dropping it.
pub struct Crowd<P> {
    members: Vec<Option<Member<P>>>,
    free: Vec<usize>,
    /// When to look at whom; an entry that its member knows nothing of any more is passed over.
    due: BinaryHeap<Reverse<(Instant, usize)>>,
    ready: Vec<usize>,
    asking: VecDeque<Asking>,
    /// How many have joined.
    joined: u64,
    /// Somebody has met another server than the one that was learned of, or none.
    has_differed: bool,
    /// What is to be said of those who got no server. Not more than have joined since the owner has looked.
    unserved: Vec<String>,
    is_ending: bool,
}

/// A connection that waits for a PROG.
#[derive(Debug)]
pub struct Asking {
    slot: usize,
    number: u64,
    /// The client's end, and ours.
    pub ends: [SocketAddr; 2],
}

struct Member<P> {
    conn: Box<Conn>,
    /// Dropped with the connection, however that ends.
    _place: P,
    /// Which of all it is: slots are taken again.
    number: u64,
    /// The one entry in `due` that counts.
    due: Option<Instant>,
    is_ready: bool,
}

impl<P> Default for Crowd<P> {
    fn default() -> Self {
        Self {
            members: Vec::new(),
            free: Vec::new(),
            due: BinaryHeap::new(),
            ready: Vec::new(),
            asking: VecDeque::new(),
            joined: 0,
            has_differed: false,
            unserved: Vec::new(),
            is_ending: false,
        }
    }
}

impl<P> Crowd<P> {
    /// Has a connection join, to be driven at once.
    pub fn join(&mut self, parts: Parts, place: P, registry: &Registry) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.members.push(None);
            self.members.len() - 1
        });
        let mut conn = Box::new(Conn::new(parts, &end::Registry::new(registry, first(slot))));
        if self.is_ending {
            conn.terminate(Instant::now());
        }
        self.joined += 1;
        self.members[slot] = Some(Member { conn, _place: place, number: self.joined, due: None, is_ready: true });
        self.ready.push(slot);
    }

    /// Takes down an event of a connection's.
    pub fn note(&mut self, event: &Event) {
        let token = event.token().0;
        let Some(slot) = token.checked_sub(OTHERS).map(|own| own / STRIDE) else { return };
        if let Some(member) = self.members.get_mut(slot).and_then(Option::as_mut) {
            member.conn.note(Token(token % STRIDE), event);
            wake(member, slot, &mut self.ready);
        }
    }

    /// Drives all who are ready or due. `None`: nobody waits for a time; zero: there is more to do at once.
    pub fn drive(&mut self, registry: &Registry, now: Instant) -> Option<Duration> {
        while let Some(Reverse((at, slot))) = self.due.peek().copied().filter(|Reverse((at, _))| *at <= now) {
            self.due.pop();
            if let Some(member) = self.members[slot].as_mut().filter(|member| member.due == Some(at)) {
                member.due = None;
                match member.conn.deadline() {
                    Some(later) if later > now => self.remember(slot, later),
                    _ => wake(member, slot, &mut self.ready),
                }
            }
        }
        let mut ready = core::mem::take(&mut self.ready);
        ready.drain(..).for_each(|slot| self.drive_one(slot, registry, now));
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        self.ready = ready;
        self.next_due().map(|at| at.saturating_duration_since(now))
    }

    /// The first time that is still meant.
    fn next_due(&mut self) -> Option<Instant> {
        loop {
            let Reverse((at, slot)) = *self.due.peek()?;
            let member = self.members[slot].as_mut().filter(|member| member.due == Some(at));
            match member.map(|member| (member.conn.deadline(), &mut member.due)) {
                Some((Some(deadline), _)) if deadline <= at => return Some(at),
                Some((Some(later), due)) => {
                    *due = Some(later);
                    self.due.push(Reverse((later, slot)));
                }
                Some((None, due)) => *due = None,
                None => {}
            }
            self.due.pop();
        }
    }

    fn drive_one(&mut self, slot: usize, registry: &Registry, now: Instant) {
        let Some(member) = self.members[slot].as_mut() else { return };
        member.is_ready = false;
        let registry = end::Registry::new(registry, first(slot));
        // Whatever state a panic has left it in, it is dropped.
        match catch_unwind(AssertUnwindSafe(|| member.conn.drive(&registry, now))) {
            Ok(Driven::Wait) => {
                if let Some(ends) = member.conn.asks() {
                    self.asking.push_back(Asking { slot, number: member.number, ends });
                }
                if let Some(deadline) = member.conn.deadline()
                    && member.due.is_none_or(|due| deadline < due)
                {
                    self.remember(slot, deadline);
                }
            }
            Ok(Driven::Again) => wake(member, slot, &mut self.ready),
            Ok(Driven::Over) => {
                match member.conn.end() {
                    Some(EndReason::Child(ChildEnd::Differs(_))) => self.has_differed = true,
                    Some(reason @ EndReason::Child(ChildEnd::NotStarted(_))) => {
                        self.has_differed = true;
                        self.unserved.push(report::warning(member.conn.client(), reason));
                    }
                    _ => {}
                }
                self.remove(slot);
            }
            Err(_) => {
                error!("client={}: a bug of ours has ended this session", member.conn.client());
                self.remove(slot);
            }
        }
    }

    fn remember(&mut self, slot: usize, deadline: Instant) {
        if let Some(member) = &mut self.members[slot] {
            member.due = Some(deadline);
            self.due.push(Reverse((deadline, slot)));
        }
    }

    fn remove(&mut self, slot: usize) {
        // Its descriptors are closed, and with that no longer watched.
        let _ = catch_unwind(AssertUnwindSafe(|| self.members[slot] = None));
        self.free.push(slot);
    }

    /// The next one who wants a PROG, and still does.
    pub fn next_asking(&mut self) -> Option<Asking> {
        while let Some(asking) = self.asking.pop_front() {
            if self.waits(&asking) {
                return Some(asking);
            }
        }
        None
    }

    fn waits(&self, asking: &Asking) -> bool {
        let member = self.members.get(asking.slot).and_then(Option::as_ref);
        member.is_some_and(|member| member.number == asking.number && member.conn.end().is_none())
    }

    /// What came of what it asked for. One that is gone meanwhile needs nothing any more.
    pub fn hand_over(&mut self, asking: &Asking, child: Result<Child, String>, registry: &Registry, now: Instant) {
        let member = self.members.get_mut(asking.slot).and_then(Option::as_mut);
        if let Some(member) = member.filter(|member| member.number == asking.number) {
            member.conn.hand_over(child, &end::Registry::new(registry, first(asking.slot)), now);
            wake(member, asking.slot, &mut self.ready);
        }
    }

    /// Whether, since the last call, somebody has met another server than the one that was learned of, or none.
    pub fn take_differences(&mut self) -> bool {
        core::mem::take(&mut self.has_differed)
    }

    /// What is to be said of those who, since the last call, got no server. Where one does nobody does: the owner says it sparingly.
    pub fn take_unserved(&mut self) -> Vec<String> {
        core::mem::take(&mut self.unserved)
    }

    /// Has every connection end, those that still join too.
    pub fn terminate(&mut self, now: Instant) {
        self.is_ending = true;
        for (slot, member) in self.members.iter_mut().enumerate() {
            if let Some(member) = member {
                member.conn.terminate(now);
                wake(member, slot, &mut self.ready);
            }
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.len() - self.free.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn first(slot: usize) -> usize {
    OTHERS + slot * STRIDE
}

fn wake<P>(member: &mut Member<P>, slot: usize, ready: &mut Vec<usize>) {
    if !core::mem::replace(&mut member.is_ready, true) {
        ready.push(slot);
    }
}
