//! Who may come in: the places that all loops share, and whether they are scarce.
//!
//! Contract: [`Admission::enter`] gives a [`Place`], which its owner keeps as long as the session lasts and [`Place::belong_to`] counts for
//! the client's address. However a session ends, a panic included, its place is back when that is dropped. There is no other count.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{info, warn};

use super::addresses::{Addresses, Origin, Refusal};

/// Above so many of a hundred places they are scarce. (Postfix: when all are taken, which is when it is too late for who waits.)
const SCARCE: usize = 80;

/// How often the log may be told that stress begins.
const QUIET: Duration = Duration::from_secs(60);

/// All places.
#[derive(Debug)]
pub(super) struct Admission {
    most: usize,
    taken: AtomicUsize,
    addresses: Option<Addresses>,
    stress: Stress,
}

impl Admission {
    pub(super) fn new(most: usize, addresses: Option<Addresses>) -> Arc<Self> {
        Arc::new(Self { most, taken: AtomicUsize::new(0), addresses, stress: Stress::default() })
    }

    /// How many sessions there may be.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// How many there are now.
    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// A place, if one is free.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Place> {
        let before = self.taken.fetch_add(1, Ordering::Relaxed);
        let place = Place { admission: self.clone(), origin: None };
        (before < self.most).then_some(place)
    }

    /// Whether places are scarce: who begins now is to be brief.
    pub(super) fn is_scarce(&self) -> bool {
        self.taken().saturating_mul(100) > self.most.saturating_mul(SCARCE)
    }

    /// Has the log told when stress begins and when it is over.
    pub(super) fn tell(&self, now: Instant) {
        match self.stress.turn(self.is_scarce(), now) {
            Some(true) => {
                warn!("over {SCARCE}% of {} sessions: those that begin now have short time-outs", self.most);
            }
            Some(false) => info!("below {SCARCE}% of {} sessions again: time-outs are as usual", self.most),
            None => {}
        }
    }
}

/// A session's place.
#[derive(Debug)]
pub(super) struct Place {
    admission: Arc<Admission>,
    origin: Option<Origin>,
}

impl Place {
    /// Counts it for this address. To be asked once.
    pub(super) fn belong_to(&mut self, address: IpAddr, now: Instant) -> Result<(), Refusal> {
        if let Some(addresses) = &self.admission.addresses {
            let origin = Origin::from(address);
            addresses.join(origin, now)?;
            self.origin = Some(origin);
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let (Some(addresses), Some(origin)) = (&self.admission.addresses, self.origin) {
            addresses.leave(origin, Instant::now());
        }
        self.admission.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the log knows.
#[derive(Debug, Default)]
struct Stress {
    is_told: AtomicBool,
    begun: Mutex<Option<Instant>>,
}

impl Stress {
    /// Whether this is news, and what.
    fn turn(&self, is_scarce: bool, now: Instant) -> Option<bool> {
        if self.is_told.load(Ordering::Relaxed) == is_scarce {
            return None;
        }
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        if is_scarce && begun.is_some_and(|begun| now < begun + QUIET) {
            return None;
        }
        if self.is_told.swap(is_scarce, Ordering::Relaxed) == is_scarce {
            return None;
        }
        if is_scarce {
            *begun = Some(now);
        }
        Some(is_scarce)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_given_back_however_its_owner_ends() {
        let (admission, now) = (Admission::new(1, Addresses::new(Some(1), None)), Instant::now());
        let address: IpAddr = "2001:db8::1".parse().unwrap();
        let enter = || {
            let mut place = admission.enter()?;
            place.belong_to(address, now).ok().map(|()| place)
        };
        let place = enter().unwrap();
        assert!(admission.enter().is_none() && admission.enter().is_none(), "one refused costs nothing");
        drop(place);
        let panics = std::panic::catch_unwind(|| {
            let _place = enter().unwrap();
            panic!("as a bug would");
        });
        assert!(panics.is_err());
        assert!(enter().is_some() && enter().is_some());
        assert_eq!(admission.taken(), 0);
    }

    #[test]
    fn who_is_refused_for_his_address_leaves_his_place_to_others() {
        let (admission, now) = (Admission::new(2, Addresses::new(Some(1), None)), Instant::now());
        let [one, other] = ["192.0.2.1", "192.0.2.2"].map(|address| address.parse().unwrap());
        let mut first = admission.enter().unwrap();
        assert_eq!(first.belong_to(one, now), Ok(()));
        assert_eq!(admission.enter().unwrap().belong_to(one, now), Err(Refusal::TooMany));
        assert_eq!(admission.enter().unwrap().belong_to(other, now), Ok(()));
        drop(first);
        assert_eq!(admission.enter().unwrap().belong_to(one, now), Ok(()), "the refused one has given nothing back");
    }

    #[test]
    fn places_are_scarce_above_80_of_100_and_no_more_when_they_are_free_again() {
        let admission = Admission::new(10, None);
        let mut places: Vec<_> = (0..8).map(|_| admission.enter().unwrap()).collect();
        assert!(!admission.is_scarce());
        places.push(admission.enter().unwrap());
        assert!(admission.is_scarce());
        places.pop();
        assert!(!admission.is_scarce());
    }

    #[test]
    fn the_log_is_told_of_each_stress_that_lasts_and_once_a_minute_at_most() {
        let (stress, begin) = (Stress::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(stress.turn(false, at(0)), None);
        assert_eq!(stress.turn(true, at(1)), Some(true));
        assert_eq!(stress.turn(true, at(2)), None);
        assert_eq!(stress.turn(false, at(3)), Some(false));
        assert_eq!(stress.turn(true, at(4)), None, "within the minute");
        assert_eq!(stress.turn(false, at(5)), None, "nothing was told of it");
        assert_eq!(stress.turn(true, at(60)), None);
        assert_eq!(stress.turn(true, at(61)), Some(true), "it lasts");
        assert_eq!(stress.turn(false, at(200)), Some(false));
    }
}
