//! What one loop counts. Each loop has a [`Meter`] of its own and writes it alone; whoever wants to see it reads it at any time and
//! adds the loops up. Nothing is locked, found by a name, or allocated for a session.
//!
//! Contract: a session that is counted has a `Metered`, which is told of each phase it comes to ([`super::Conn`]'s `notice`) and of its
//! end. It gives its place in the gauge back when it is dropped, whoever drops it. Every STARTTLS that is asked for is done or failed in one
//! step, exactly once. A UCSPI child counts nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::session::{EndReason, Phase, Session, Starttls};
use crate::tls::{Agreed, GROUPS, KINDS, SUITES, VERSIONS};

use super::labels::{REASONS, reason};
use super::report::Tally;

/// A figure. Relaxed: no other memory depends on it.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub fn up(&self) {
        self.add(1);
    }

    fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn down(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// What it is now.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One figure for each name of a list.
pub type Counts<const N: usize> = [Count; N];

fn counts<const N: usize>() -> Counts<N> {
    core::array::from_fn(|_| Count::default())
}

/// Upper bounds of the times, in microseconds: from a connection on this host to a client's whole time-out.
pub const BOUNDS: [u64; 14] = [
    250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 5_000_000, 30_000_000,
];

/// How long something took.
#[derive(Debug)]
pub struct Times {
    /// How many up to each of [`BOUNDS`] and above the one before; the last ones are above all.
    pub counts: Counts<{ BOUNDS.len() + 1 }>,
    /// All together, in microseconds.
    pub sum: Count,
}

impl Times {
    fn note(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.counts[BOUNDS.partition_point(|bound| *bound < micros)].up();
        self.sum.add(micros);
    }
}

/// The steps whose times are kept.
pub const TIMED: [Phase; 7] = [
    Phase::Summon,
    Phase::Brief,
    Phase::Dial,
    Phase::SecureBackend,
    Phase::Greeting,
    Phase::Replay,
    Phase::SecureClient,
];

/// Where a STARTTLS failed that led to no step: there is no certificate; it has failed too often.
pub const AT_ONCE: [&str; 2] = ["no_certificate", "too_often"];

/// Whose TLS, in [`Meter::handshakes`].
pub const LEGS: [&str; 2] = ["client", "backend"];

/// How octets of the client's connection went, in [`Meter::octets`].
pub const MODES: [&str; 3] = ["plain", "tls", "raw"];

/// Why a connection was not served.
pub const REFUSED: [&str; 4] = ["sessions", "address", "rate", "proxy"];

/// Which of [`REFUSED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There are as many sessions as may be.
    Sessions,
    /// Its address has as many as it may have.
    Address,
    /// Its address begins more of them than it may.
    Rate,
    /// It is no load balancer's, or has no PROXY header.
    Proxy,
}

/// TLS handshakes of one side.
#[derive(Debug)]
pub struct Handshakes {
    /// By version and kind.
    pub done: [Counts<{ KINDS.len() }>; VERSIONS.len()],
    /// By suite.
    pub suites: Counts<{ SUITES.len() }>,
    /// By group.
    pub groups: Counts<{ GROUPS.len() }>,
}

/// The figures of one loop. Two of them never share a cache line, nor a pair that is fetched together.
#[derive(Debug)]
#[repr(align(128))]
#[expect(missing_docs, reason = "driver::metrics has a table of what each one means")]
pub struct Meter {
    pub is_running: AtomicBool,
    pub restarts: Count,
    pub accepted: Count,
    pub refused: Counts<{ REFUSED.len() }>,
    pub pauses: Count,
    pub begun: Count,
    pub states: Counts<{ Phase::ALL.len() }>,
    pub ended: Counts<{ REASONS.len() }>,
    pub offered: Count,
    pub asked: Count,
    pub done: Count,
    pub failed: Counts<{ Phase::ALL.len() }>,
    pub failed_at_once: Counts<{ AT_ONCE.len() }>,
    pub handshakes: [Handshakes; LEGS.len()],
    /// Received, sent.
    pub octets: [Counts<{ MODES.len() }>; 2],
    pub summoned: Count,
    pub avoided: Count,
    pub times: [Times; TIMED.len()],
}

impl Default for Meter {
    fn default() -> Self {
        let handshakes = || Handshakes { done: core::array::from_fn(|_| counts()), suites: counts(), groups: counts() };
        Self {
            is_running: AtomicBool::new(false),
            restarts: Count::default(),
            accepted: Count::default(),
            refused: counts(),
            pauses: Count::default(),
            begun: Count::default(),
            states: counts(),
            ended: counts(),
            offered: Count::default(),
            asked: Count::default(),
            done: Count::default(),
            failed: counts(),
            failed_at_once: counts(),
            handshakes: core::array::from_fn(|_| handshakes()),
            octets: core::array::from_fn(|_| counts()),
            summoned: Count::default(),
            avoided: Count::default(),
            times: core::array::from_fn(|_| Times { counts: counts(), sum: Count::default() }),
        }
    }
}

impl Meter {
    /// A connection is not served.
    pub fn refuse(&self, why: Refused) {
        self.refused[why as usize].up();
    }
}

/// Whose TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Backend,
}

/// How octets went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Went {
    Plain,
    Tls,
    Raw,
}

/// A session that is counted, as far as it has been.
#[derive(Debug)]
pub(super) struct Metered {
    meter: Arc<Meter>,
    phase: Phase,
    /// When that phase began, where its time is kept.
    since: Instant,
    octets: Tally,
    starttls: Starttls,
    /// STARTTLS that have neither been done nor failed.
    open: u32,
    is_lazy: bool,
    has_ended: bool,
}

impl Metered {
    pub(super) fn begin(meter: Arc<Meter>, session: &Session, now: Instant) -> Self {
        let phase = session.phase();
        meter.begun.up();
        meter.states[phase as usize].up();
        if phase == Phase::Summon {
            meter.summoned.up();
        }
        Self {
            meter,
            phase,
            since: now,
            octets: Tally::default(),
            starttls: Starttls::default(),
            open: 0,
            is_lazy: session.is_lazy(),
            has_ended: false,
        }
    }

    /// What has become of STARTTLS up to now.
    pub(super) fn asked(&mut self, session: &Session) {
        let (now, before) = (session.starttls_so_far(), self.starttls);
        if now == before {
            return;
        }
        self.starttls = now;
        if now.is_offered && !before.is_offered {
            self.meter.offered.up();
        }
        let (asked, refused) = (now.asked - before.asked, now.refused - before.refused);
        self.meter.asked.add(asked.into());
        let why = usize::from(session.offers_tls());
        self.meter.failed_at_once[why].add(refused.into());
        self.open += asked - refused;
    }

    /// A hand-over failed in this step, and the session goes on without.
    pub(super) fn failed(&mut self, step: Phase) {
        self.open = self.open.saturating_sub(1);
        self.meter.failed[step as usize].up();
    }

    /// The session has come to another phase.
    pub(super) fn moved(&mut self, session: &Session) {
        let (from, to) = (core::mem::replace(&mut self.phase, session.phase()), session.phase());
        self.meter.states[to as usize].up();
        self.meter.states[from as usize].down();
        // The furthest that it came: several phases may have passed at once.
        let reached = if to == Phase::Close { session.ended_in() } else { to };
        let timed = |phase| TIMED.iter().position(|step| *step == phase);
        let (ended, begun) = (timed(from), timed(to));
        if ended.is_some() || begun.is_some() {
            let now = Instant::now();
            let is_back = matches!(reached, Phase::Snoop | Phase::RelayPlain);
            let went_on = reached != from && (!is_back || matches!(from, Phase::Summon | Phase::Brief));
            if let Some(step) = ended.filter(|_| went_on) {
                self.meter.times[step].note(now.saturating_duration_since(self.since));
            }
            self.since = now;
        }
        if to == Phase::Summon {
            self.meter.summoned.up();
            self.is_lazy = false;
        }
        let open = core::mem::take(&mut self.open);
        match reached {
            Phase::Gate | Phase::RelayTls => self.meter.done.add(open.into()),
            _ if to == Phase::Close => self.meter.failed[reached as usize].add(open.into()),
            _ => self.open = open,
        }
    }

    pub(super) fn secured(&self, side: Side, agreed: Agreed) {
        let handshakes = &self.meter.handshakes[side as usize];
        handshakes.done[agreed.version][agreed.kind].up();
        handshakes.suites[agreed.suite].up();
        if let Some(group) = agreed.group {
            handshakes.groups[group].up();
        }
    }

    /// What has come and gone up to now; what was not counted yet went so.
    pub(super) fn count(&mut self, octets: Tally, went: Went) {
        let before = core::mem::replace(&mut self.octets, octets);
        for (direction, now, before) in [(0, octets.received, before.received), (1, octets.sent, before.sent)] {
            if now != before {
                self.meter.octets[direction][went as usize].add(now - before);
            }
        }
    }

    /// Its summary has been said.
    pub(super) fn ended(&mut self, why: &EndReason) {
        self.has_ended = true;
        self.meter.ended[reason(why)].up();
        if self.is_lazy {
            self.meter.avoided.up();
        }
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.meter.states[self.phase as usize].down();
        if !self.has_ended {
            // It has panicked, or its loop has.
            self.meter.failed[self.phase as usize].add(self.open.into());
            self.meter.ended[reason(&EndReason::Bug(String::new()))].up();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Policy;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn states(meter: &Meter) -> Vec<u64> {
        meter.states.iter().map(Count::value).collect()
    }

    #[test]
    fn a_session_that_is_dropped_anywhere_gives_its_place_back_and_passes_for_a_bug() {
        let (meter, now) = (Arc::new(Meter::default()), Instant::now());
        let mut session = Session::new(Arc::new(Policy::default()), now);
        session.handle_child(b"220 mx\r\n", now);
        session.handle_client(b"STARTTLS\r\n", now);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mut metered = Metered::begin(meter.clone(), &Session::new(Arc::new(Policy::default()), now), now);
            assert_eq!(meter.states[Phase::Snoop as usize].value(), 1);
            metered.asked(&session);
            metered.moved(&session);
            assert_eq!(meter.states[Phase::Dial as usize].value(), 1);
            panic!("as it may");
        }));
        assert!(outcome.is_err());
        assert!(states(&meter).iter().all(|count| *count == 0), "{:?}", states(&meter));
        assert_eq!((meter.begun.value(), meter.asked.value(), meter.done.value()), (1, 1, 0));
        assert_eq!(meter.failed[Phase::Dial as usize].value(), 1);
        let ended: Vec<_> =
            REASONS.into_iter().zip(meter.ended.iter().map(Count::value)).filter(|(_, n)| *n > 0).collect();
        assert_eq!(ended, [("bug", 1)]);
    }

    #[test]
    fn a_time_is_in_the_first_bucket_that_holds_it() {
        let times = Times { counts: counts(), sum: Count::default() };
        for micros in [0, 250, 251, 30_000_000, 30_000_001] {
            times.note(Duration::from_micros(micros));
        }
        let counts: Vec<u64> = times.counts.iter().map(Count::value).collect();
        assert_eq!((counts[0], counts[1], counts[BOUNDS.len() - 1], counts[BOUNDS.len()]), (2, 1, 1, 1));
        assert_eq!((counts.iter().sum::<u64>(), times.sum.value()), (5, 60_000_502));
    }
}
