//! Many connections on one loop, each driven by itself: who is to be driven, and when.
//!
//! Contract: after every wait of the loop, [`Crowd::note`] for each event, then [`Crowd::drive`] once; it says how long the loop may
//! wait. Who wants a PROG is then in the queue of [`Crowd::next_asking`], to be answered by [`Crowd::hand_over`]. A connection that
//! panics, whatever is done with it, is ended alone, which is logged as the bug it is ([`Crowd::touch`]): the others never notice. What is
//! silent costs nothing: a deadline that moves away (each command moves one) is not moved here before it is the first of all, and wakes
//! nobody.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use log::error;
use mio::event::Event;
use mio::{Registry, Token};

use crate::client_info::ClientInfo;
use crate::session::{ChildEnd, EndReason};
use crate::sys::child::Child;
use crate::sys::end;

use super::conn::{Conn, Driven, Parts};
use super::report;

/// Descriptors of one connection, at most: a power of two over the last of `tokens`.
const STRIDE: usize = 16;

/// Entries that may be out of date before any are dropped.
const OUTDATED: usize = 1024;

/// Tokens below this are none of a connection's.
pub const OTHERS: usize = 1024;

/// The connections of one loop, each with something that its owner has to give back when it has ended, by dropping it.
pub struct Crowd<P> {
    members: Vec<Option<Member<P>>>,
    free: Vec<usize>,
    /// When to look at whom; an entry that its member knows nothing of any more is passed over, or dropped where there are many of them:
    /// sessions that have ended must not be remembered for as long as they might have lasted.
    due: BinaryHeap<Reverse<(Instant, usize)>>,
    ready: Vec<usize>,
    asking: VecDeque<Asking>,
    /// How many have joined.
    joined: u64,
    /// Somebody has met another server than the one that was learned of, or none.
    has_differed: bool,
    /// What is to be said of those whom their server has failed. Not more than were there since the owner has looked.
    failed: Vec<String>,
    is_ending: bool,
    /// Which of the next deeds panics, and whose that was.
    #[cfg(test)]
    bug: (Option<usize>, Option<usize>),
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

/// What a drive came to, for the others' sake.
enum CameTo {
    /// It wants a PROG for these ends, and is due then.
    Wait(Option<[SocketAddr; 2]>, Option<Instant>),
    Again,
    /// Whether it has met another server than the one that was learned of, or none; and what is to be said of its server.
    End(bool, Option<String>),
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
            failed: Vec::new(),
            is_ending: false,
            #[cfg(test)]
            bug: (None, None),
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
        self.joined += 1;
        let client = parts.info;
        let conn = catch_unwind(AssertUnwindSafe(|| Conn::new(parts, &end::Registry::new(registry, first(slot)))));
        let Ok(conn) = conn else {
            tell_bug(&client);
            return self.free.push(slot);
        };
        let member = Member { conn: Box::new(conn), _place: place, number: self.joined, due: None, is_ready: true };
        self.members[slot] = Some(member);
        self.ready.push(slot);
        if self.is_ending {
            self.touch(slot, |conn| conn.terminate(Instant::now()));
        }
    }

    /// Takes down an event of a connection's.
    pub fn note(&mut self, event: &Event) {
        let token = event.token().0;
        let Some(slot) = token.checked_sub(OTHERS).map(|own| own / STRIDE) else { return };
        self.touch(slot, |conn| conn.note(Token(token % STRIDE), event));
        self.wake(slot);
    }

    /// Drives all who are ready or due. `None`: nobody waits for a time; zero: there is more to do at once.
    pub fn drive(&mut self, registry: &Registry, now: Instant) -> Option<Duration> {
        while let Some(Reverse((at, slot))) = self.due.peek().copied().filter(|Reverse((at, _))| *at <= now) {
            self.due.pop();
            if let Some(member) = self.members[slot].as_mut().filter(|member| member.due == Some(at)) {
                member.due = None;
                match self.touch(slot, |conn| conn.deadline()) {
                    Some(Some(later)) if later > now => self.remember(slot, later),
                    _ => self.wake(slot),
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
            if self.members[slot].as_ref().is_some_and(|member| member.due == Some(at)) {
                let deadline = self.touch(slot, |conn| conn.deadline()).flatten();
                if deadline.is_some_and(|deadline| deadline <= at) {
                    return Some(at);
                }
                if let Some(member) = &mut self.members[slot] {
                    member.due = deadline;
                    self.due.extend(deadline.map(|later| Reverse((later, slot))));
                }
            }
            self.due.pop();
        }
    }

    fn drive_one(&mut self, slot: usize, registry: &Registry, now: Instant) {
        let Some(member) = self.members[slot].as_mut() else { return };
        member.is_ready = false;
        let (number, due) = (member.number, member.due);
        let registry = end::Registry::new(registry, first(slot));
        let came_to = self.touch(slot, |conn| match conn.drive(&registry, now) {
            Driven::Wait => CameTo::Wait(conn.asks(), conn.deadline()),
            Driven::Again => CameTo::Again,
            Driven::Over => match conn.end() {
                Some(reason @ EndReason::Child(end)) => {
                    let has_differed = matches!(end, ChildEnd::Differs(_) | ChildEnd::NotStarted(_));
                    CameTo::End(has_differed, Some(report::warning(conn.client(), reason)))
                }
                _ => CameTo::End(false, None),
            },
        });
        match came_to {
            Some(CameTo::Wait(asks, deadline)) => {
                self.asking.extend(asks.map(|ends| Asking { slot, number, ends }));
                if let Some(deadline) = deadline.filter(|deadline| due.is_none_or(|due| *deadline < due)) {
                    self.remember(slot, deadline);
                }
            }
            Some(CameTo::Again) => self.wake(slot),
            Some(CameTo::End(has_differed, failed)) => {
                self.has_differed |= has_differed;
                self.failed.extend(failed);
                self.remove(slot);
            }
            // It is removed.
            None => {}
        }
    }

    /// Does something with a connection, if it is there. One that panics is removed, whatever state that has left it in; `None`: it
    /// is not there, or no longer.
    fn touch<R>(&mut self, slot: usize, deed: impl FnOnce(&mut Conn) -> R) -> Option<R> {
        let conn = &mut self.members.get_mut(slot)?.as_mut()?.conn;
        let whole = || {
            #[cfg(test)]
            tests::provoke(&mut self.bug, slot);
            deed(conn)
        };
        match catch_unwind(AssertUnwindSafe(whole)) {
            Ok(done) => Some(done),
            Err(_) => {
                tell_bug(conn.client());
                self.remove(slot);
                None
            }
        }
    }

    fn remember(&mut self, slot: usize, deadline: Instant) {
        if let Some(member) = &mut self.members[slot] {
            member.due = Some(deadline);
            self.due.push(Reverse((deadline, slot)));
        }
        if self.due.len() > 2 * self.members.len() + OUTDATED {
            let is_meant = |at, slot: usize| self.members[slot].as_ref().is_some_and(|member| member.due == Some(at));
            self.due.retain(|Reverse((at, slot))| is_meant(*at, *slot));
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

    /// Whether somebody is to be driven at once, by what was done since the last drive.
    #[must_use]
    pub fn is_awake(&self) -> bool {
        !self.ready.is_empty()
    }

    /// What came of what it asked for. One that is gone meanwhile needs nothing any more.
    pub fn hand_over(&mut self, asking: &Asking, child: Result<Child, String>, registry: &Registry, now: Instant) {
        let (slot, member) = (asking.slot, self.members.get(asking.slot).and_then(Option::as_ref));
        if member.is_some_and(|member| member.number == asking.number) {
            let registry = end::Registry::new(registry, first(slot));
            self.touch(slot, |conn| conn.hand_over(child, &registry, now));
            self.wake(slot);
        }
    }

    /// Whether, since the last call, somebody has met another server than the one that was learned of, or none.
    pub fn take_differences(&mut self) -> bool {
        core::mem::take(&mut self.has_differed)
    }

    /// What is to be said of those whom, since the last call, their server has failed. It may fail all: the owner says it sparingly.
    pub fn take_failed(&mut self) -> Vec<String> {
        core::mem::take(&mut self.failed)
    }

    /// Has every connection end, those that still join too.
    pub fn terminate(&mut self, now: Instant) {
        self.is_ending = true;
        for slot in 0..self.members.len() {
            self.touch(slot, |conn| conn.terminate(now));
            self.wake(slot);
        }
    }

    /// Has it be driven, if it is there.
    fn wake(&mut self, slot: usize) {
        if let Some(member) = self.members.get_mut(slot).and_then(Option::as_mut)
            && !core::mem::replace(&mut member.is_ready, true)
        {
            self.ready.push(slot);
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

fn tell_bug(client: &ClientInfo) {
    error!("client={client}: a bug of ours has ended this session");
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use mio::{Events, Poll};

    use super::*;
    use crate::engine::{CLIENT_IN, Ends, Front, Source};
    use crate::session::policy::RelayMode;
    use crate::sys::end::End;

    pub(super) fn provoke(bug: &mut (Option<usize>, Option<usize>), slot: usize) {
        let left = bug.0.take();
        if left == Some(0) {
            bug.1 = Some(slot);
        }
        assert!(left != Some(0), "provoked");
        bug.0 = left.map(|left| left - 1);
    }

    /// A place, which counts how many of its kind are taken.
    struct Place<'a>(&'a AtomicUsize);

    impl Drop for Place<'_> {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// One that wants a PROG at once.
    fn parts(client: UnixStream, now: Instant) -> Parts {
        client.set_nonblocking(true).unwrap();
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 25));
        Parts {
            client: Ends::one(End::socket(client.into(), CLIENT_IN)),
            front: Front::Later(Source::Asked([anywhere; 2]), None),
            holder: None,
            tls_server: None,
            info: ClientInfo::default(),
            policy: Arc::default(),
            target: None,
            proxy: None,
            secrets: None,
            setups: None,
            relay: RelayMode::Splice,
            terminations: None,
            started: now,
            meter: None,
        }
    }

    /// Two sessions from their beginning to their end; what is done with one of them at that place panics. What both clients heard, and
    /// whose bug it was.
    fn life(bug: usize) -> ([String; 2], Option<usize>) {
        let (mut poll, mut events, taken) = (Poll::new().unwrap(), Events::with_capacity(8), AtomicUsize::new(2));
        let (mut crowd, mut now) = (Crowd::default(), Instant::now());
        crowd.bug.0 = Some(bug);
        let mut clients = [(); 2].map(|()| {
            let (client, ours) = UnixStream::pair().unwrap();
            crowd.join(parts(ours, now), Place(&taken), poll.registry());
            client
        });
        crowd.drive(poll.registry(), now);
        // They are early, which their sessions hear of.
        clients.iter().for_each(|mut client| drop(std::io::Write::write_all(&mut client, b"NOOP\r\n")));
        poll.poll(&mut events, Some(Duration::from_secs(9))).unwrap();
        events.iter().for_each(|event| crowd.note(event));
        crowd.drive(poll.registry(), now);
        let asking: Vec<Asking> = std::iter::from_fn(|| crowd.next_asking()).collect();
        assert_eq!(asking.len(), crowd.len(), "who is gone asks for nothing");
        for one in asking.iter().filter(|one| one.slot == 0) {
            crowd.hand_over(one, Err("no PROG".to_owned()), poll.registry(), now);
        }
        crowd.drive(poll.registry(), now);
        crowd.terminate(now);
        for _ in 0..99 {
            let wait = crowd.drive(poll.registry(), now);
            now += wait.unwrap_or_default();
        }
        assert!(crowd.is_empty() && taken.load(Ordering::Relaxed) == 0, "bug {bug}: {} are left", crowd.len());
        let mut said = [String::new(), String::new()];
        clients.iter_mut().zip(&mut said).for_each(|(client, said)| drop(client.read_to_string(said)));
        (said, crowd.bug.1)
    }

    #[test]
    fn who_has_ended_is_not_remembered_until_the_time_that_was_his() {
        let (poll, place) = (Poll::new().unwrap(), AtomicUsize::new(0));
        let (mut crowd, mut now) = (Crowd::default(), Instant::now());
        // One stays, and is still meant when others are dropped.
        let (_first, stays) = UnixStream::pair().unwrap();
        crowd.join(parts(stays, now), Place(&place), poll.registry());
        let due = crowd.drive(poll.registry(), now).map(|wait| now + wait);
        for _ in 0..2 * OUTDATED {
            now += Duration::from_millis(1);
            let (_client, ours) = UnixStream::pair().unwrap();
            crowd.join(parts(ours, now), Place(&place), poll.registry());
            crowd.drive(poll.registry(), now);
            crowd.remove(1);
        }
        assert_eq!((crowd.len(), crowd.members.len()), (1, 2));
        assert!(crowd.due.len() <= 2 * crowd.members.len() + OUTDATED, "{} entries", crowd.due.len());
        assert_eq!(crowd.drive(poll.registry(), now).map(|wait| now + wait), due);
    }

    #[test]
    fn whatever_panics_with_one_session_the_other_lives_and_dies_as_it_would() {
        let (whole, nobody) = life(usize::MAX);
        assert_eq!(whole, ["421 4.3.0 Mail server not available\r\n", "421 4.3.2 Service shutting down\r\n"]);
        assert_eq!(nobody, None);
        let mut met = [0; 2];
        for bug in 0.. {
            let (said, whose) = life(bug);
            let Some(whose) = whose else { break };
            met[whose] += 1;
            assert_eq!(said[1 - whose], whole[1 - whose], "bug {bug}");
        }
        // Joined, woken, handed a PROG, ended; and looked at for the time in between.
        assert!(met.iter().all(|bugs| *bugs > 5), "{met:?}");
    }
}
