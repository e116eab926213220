//! How many sessions each address has, and how fast it begins them: the table that all loops share.
//!
//! It is in parts, each with a lock of its own that is held for one look-up. Known are the addresses that have a session, which the limit of
//! all sessions bounds, and for a second those that had one; of these each part keeps [`SPARE`], or forgives them all.
//!
//! The rate is a bucket of as many tokens as may be taken in a second, kept as the one time at which it will be full again. Rejected: a
//! count for each second of the clock, which lets twice as many pass around its turn.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A power of two; loops rarely meet in one.
const PARTS: usize = 16;

/// Addresses without a session that a part remembers: 64 octets each, a mebibyte in all.
const SPARE: usize = 1024;

const SECOND: Duration = Duration::from_secs(1);

/// Clients that count as one: an IPv4 address, or the 64 bits of IPv6 that one household has (RFC 6177 gives it that or more).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Origin {
    V4(Ipv4Addr),
    V6([u16; 4]),
}

impl From<IpAddr> for Origin {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self::V6([a, b, c, d])
            }
        }
    }
}

/// Why an address may not begin a session now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    TooMany,
    TooFast,
}

/// The table.
#[derive(Debug)]
pub(super) struct Addresses {
    most: Option<u32>,
    /// What one session takes of its address's second.
    share: Option<Duration>,
    parts: [Mutex<Part>; PARTS],
    hashes: RandomState,
}

#[derive(Debug, Default)]
struct Part {
    known: HashMap<Origin, Known>,
    /// Those of them that have no session.
    spare: usize,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Known {
    sessions: u32,
    /// When its bucket is full again; over, if it is.
    full: Instant,
}

impl Addresses {
    /// One with these limits, each at least one; `None` where there is none to keep.
    pub(super) fn new(most: Option<u32>, rate: Option<u32>) -> Option<Self> {
        let (parts, hashes) = (Default::default(), RandomState::new());
        (most.is_some() || rate.is_some()).then(|| Self { most, share: rate.map(|rate| SECOND / rate), parts, hashes })
    }

    /// Counts a session that begins.
    pub(super) fn join(&self, origin: Origin, now: Instant) -> Result<(), Refusal> {
        let mut part = self.part(origin);
        part.sweep(now);
        let known = part.known.get(&origin);
        let (sessions, full) = known.map_or((0, now), |known| (known.sessions, known.full.max(now)));
        let full = full + self.share.unwrap_or_default();
        if self.share.is_some() && full > now + SECOND {
            return Err(Refusal::TooFast);
        }
        if self.most.is_some_and(|most| sessions >= most) {
            return Err(Refusal::TooMany);
        }
        if known.is_some() && sessions == 0 {
            part.spare -= 1;
        }
        part.known.insert(origin, Known { sessions: sessions + 1, full });
        Ok(())
    }

    /// One that joined has ended.
    pub(super) fn leave(&self, origin: Origin, now: Instant) {
        let mut part = self.part(origin);
        let Some(known) = part.known.get_mut(&origin) else { return };
        known.sessions = known.sessions.saturating_sub(1);
        if known.sessions > 0 {
            return;
        }
        if known.full <= now {
            part.known.remove(&origin);
        } else {
            part.spare += 1;
        }
    }

    fn part(&self, origin: Origin) -> MutexGuard<'_, Part> {
        // Of the low bits, whatever the width: the remainder is below PARTS.
        let number = self.hashes.hash_one(origin) % PARTS as u64;
        let part = &self.parts[usize::try_from(number).unwrap_or(0)];
        // Nothing that panics is done under the lock.
        part.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.parts.iter().map(|part| part.lock().unwrap().known.len()).sum()
    }
}

impl Part {
    /// Forgets whose second is over; everybody who has no session, where there are too many of them.
    fn sweep(&mut self, now: Instant) {
        let is_over_full = self.spare >= SPARE;
        if is_over_full || self.swept.is_none_or(|swept| now >= swept + SECOND) {
            self.known.retain(|_, known| known.sessions > 0 || (known.full > now && !is_over_full));
            self.spare = self.known.values().filter(|known| known.sessions == 0).count();
            self.swept = Some(now);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn origin(address: &str) -> Origin {
        Origin::from(address.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn an_address_is_one_client_in_ipv4_and_64_bits_are_in_ipv6() {
        assert_eq!(origin("192.0.2.1"), origin("::ffff:192.0.2.1"));
        assert_ne!(origin("192.0.2.1"), origin("192.0.2.2"));
        assert_eq!(origin("2001:db8:1:2::1"), origin("2001:db8:1:2:ffff:ffff:ffff:ffff"));
        assert_ne!(origin("2001:db8:1:2::1"), origin("2001:db8:1:3::1"));
        assert_ne!(origin("::1"), origin("0.0.0.0"));
    }

    #[test]
    fn so_many_sessions_and_no_more_until_one_has_ended() {
        let (table, now) = (Addresses::new(Some(2), None).unwrap(), Instant::now());
        let [one, other] = ["192.0.2.1", "192.0.2.2"].map(origin);
        assert_eq!([one, one, one, other].map(|who| table.join(who, now).is_ok()), [true, true, false, true]);
        assert_eq!(table.join(one, now), Err(Refusal::TooMany));
        table.leave(one, now);
        assert_eq!(table.join(one, now), Ok(()));
        assert_eq!(table.join(one, now), Err(Refusal::TooMany));
        table.leave(one, now);
        table.leave(one, now);
        table.leave(other, now);
        assert_eq!(table.len(), 0, "nobody is remembered without a reason");
    }

    #[test]
    fn so_many_begin_in_a_second_wherever_it_begins() {
        let (table, begin) = (Addresses::new(None, Some(3)).unwrap(), Instant::now());
        let one = origin("2001:db8::1");
        let at = |milliseconds| begin + Duration::from_millis(milliseconds);
        let join = |time| table.join(one, at(time)).inspect(|()| table.leave(one, at(time)));
        assert_eq!([0, 0, 0, 0].map(|time| join(time).is_ok()), [true, true, true, false]);
        assert_eq!(join(333), Err(Refusal::TooFast));
        // A third of a second is one more, and what was refused took nothing.
        assert_eq!([334, 334].map(|time| join(time).is_ok()), [true, false]);
        // Nobody saves up more than a second's.
        assert_eq!([9000, 9000, 9000, 9000].map(|time| join(time).is_ok()), [true, true, true, false]);
        assert!(join(9999).is_ok());
        assert_eq!([10_000, 10_000].map(|time| join(time).is_ok()), [true, true]);
    }

    #[test]
    fn who_is_gone_is_forgotten_when_his_second_is_over() {
        let (table, begin) = (Addresses::new(None, Some(1)).unwrap(), Instant::now());
        for number in 0..1000_u32 {
            let who = Origin::V4(number.into());
            table.join(who, begin).unwrap();
            table.leave(who, begin);
        }
        assert_eq!(table.len(), 1000);
        // One newcomer for each part sweeps it.
        for number in 0..1000_u32 {
            table.join(Origin::V4((5000 + number).into()), begin + SECOND).unwrap();
        }
        assert_eq!(table.len(), 1000);
    }

    #[test]
    fn the_table_has_an_end_and_a_session_outlives_it() {
        let (table, now) = (Addresses::new(Some(1), Some(1)).unwrap(), Instant::now());
        let stays = origin("192.0.2.1");
        table.join(stays, now).unwrap();
        for number in 0..100_000_u32 {
            let who = Origin::V6([0x2001, 0xdb8, (number >> 16) as u16, number as u16]);
            table.join(who, now).unwrap();
            table.leave(who, now);
        }
        assert!(table.len() <= PARTS * (SPARE + 1), "{}", table.len());
        assert_eq!(table.join(stays, now + 2 * SECOND), Err(Refusal::TooMany));
    }
}
