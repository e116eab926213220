//! Queues of octets: appended at the back, taken from the front, without moving what remains; and the large buffers that all
//! connections of a thread share ([`spare`]): who holds nothing has none.

/// First size of a buffer for what a socket gives or takes. A ClientHello with a post-quantum share is about 1.5 KB, an SMTP command less.
pub const FIRST_ROOM: usize = 4 * 1024;

/// How much more may be occupied than is held before it is copied away from there: each copy is paid for by so much that came or went.
const SLACK: usize = 2;

/// Whether what is held in `occupied` octets should have memory of its own.
#[must_use]
pub fn is_worth_a_copy(occupied: usize, held: usize) -> bool {
    occupied > SLACK * held
}

/// The spare buffers of this thread. What they hold is nobody's; who borrows one shows no more of it than it has written.
pub mod spare {
    use core::cell::RefCell;

    use super::FIRST_ROOM;

    /// How many are kept: what one connection uses while it is driven (in and out on either leg, and what is read in the clear).
    const KEPT: usize = 5;

    /// One that is larger was grown by somebody who let much wait.
    const MOST: usize = 1 << 20;

    thread_local! {
        static SPARES: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    }

    /// The one that was used last; an empty one, if there is none.
    #[must_use]
    pub fn borrow() -> Vec<u8> {
        SPARES.with_borrow_mut(Vec::pop).unwrap_or_default()
    }

    /// One of at least `n` octets.
    #[must_use]
    pub fn of(n: usize) -> Vec<u8> {
        let found = borrow();
        // A new one of zeroes costs no memory traffic of its own where it is large.
        if found.len() >= n { found } else { vec![0; n] }
    }

    /// Takes one back, if it is worth it.
    pub fn give_back(buffer: Vec<u8>) {
        if (FIRST_ROOM..=MOST).contains(&buffer.len()) {
            SPARES.with_borrow_mut(|spares| {
                if spares.len() < KEPT {
                    spares.push(buffer);
                }
            });
        }
    }

    /// Whether there are any.
    #[must_use]
    pub fn are_kept() -> bool {
        SPARES.with_borrow(|spares| !spares.is_empty())
    }

    /// Gives them all to the allocator.
    pub fn drop_all() {
        SPARES.with_borrow_mut(Vec::clear);
    }
}

/// Octets waiting to be written: a few. Memory is kept while it is used and can be given back.
#[derive(Debug, Default)]
pub struct Buffer {
    octets: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// Appends.
    pub fn push(&mut self, octets: &[u8]) {
        self.octets.extend_from_slice(octets);
    }

    /// What waits, in order.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.octets[self.start..]
    }

    /// How many octets wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.octets.len() - self.start
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `count` octets have been written.
    pub fn consume(&mut self, count: usize) {
        self.start += count.min(self.len());
        if self.is_empty() {
            self.clear();
        }
    }

    /// Drops all that waits.
    pub fn clear(&mut self) {
        self.octets.clear();
        self.start = 0;
    }

    /// Gives the memory back, if nothing waits.
    pub fn give_back(&mut self) {
        if self.is_empty() {
            self.octets = Vec::new();
        }
    }

    /// For writers that append in place.
    pub fn as_mut_vec(&mut self) -> &mut Vec<u8> {
        &mut self.octets
    }
}

/// Octets waiting to be written: many. `storage[begin..end]` waits; what lies behind `end` is initialised space for who appends in place.
///
/// What is unsent is moved only when at least as much was sent before it, so that each octet sent pays for at most one that is moved.
#[derive(Debug, Default)]
pub struct Outgoing {
    storage: Vec<u8>,
    begin: usize,
    end: usize,
}

impl Outgoing {
    /// Spare space of at least `n` octets behind what waits.
    pub fn spare(&mut self, n: usize) -> &mut [u8] {
        if self.storage.is_empty() {
            self.storage = spare::borrow();
        }
        let waiting = self.end - self.begin;
        if self.storage.len() - self.end < n {
            if self.begin >= waiting && self.storage.len() - waiting >= n {
                self.storage.copy_within(self.begin..self.end, 0);
            } else {
                let size = (waiting + n).max(waiting.saturating_mul(2)).next_multiple_of(FIRST_ROOM);
                let mut larger = spare::of(size);
                larger[..waiting].copy_from_slice(&self.storage[self.begin..self.end]);
                self.storage = larger;
            }
            self.begin = 0;
            self.end = waiting;
        }
        &mut self.storage[self.end..]
    }

    /// `n` octets were put into the spare space.
    pub fn queued(&mut self, n: usize) {
        self.end = (self.end + n).min(self.storage.len());
    }

    /// Appends.
    pub fn push(&mut self, octets: &[u8]) {
        self.spare(octets.len())[..octets.len()].copy_from_slice(octets);
        self.queued(octets.len());
    }

    /// What waits, oldest first.
    #[must_use]
    pub fn waiting(&self) -> &[u8] {
        &self.storage[self.begin..self.end]
    }

    /// `n` octets of it were written.
    pub fn sent(&mut self, n: usize) {
        self.begin = (self.begin + n).min(self.end);
        if self.begin == self.end {
            self.begin = 0;
            self.end = 0;
            spare::give_back(core::mem::take(&mut self.storage));
        }
    }

    /// Octets of memory occupied.
    #[must_use]
    pub fn footprint(&self) -> usize {
        self.storage.capacity()
    }

    /// Gives memory back where far more is occupied than waits. What waits then has its own, exactly.
    pub fn give_back(&mut self) {
        let waiting = self.end - self.begin;
        if is_worth_a_copy(self.storage.len(), waiting) {
            let own = self.storage[self.begin..self.end].to_vec();
            spare::give_back(core::mem::replace(&mut self.storage, own));
            self.begin = 0;
            self.end = waiting;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outgoing_reuses_its_space_when_everything_was_sent() {
        let mut outgoing = Outgoing::default();
        for round in 0..100_u8 {
            outgoing.spare(3000)[..3000].fill(round);
            outgoing.queued(3000);
            assert!(outgoing.waiting().iter().all(|byte| *byte == round));
            outgoing.sent(1000);
            outgoing.sent(2000);
            assert_eq!(outgoing.footprint(), 0, "it has none that holds nothing");
            // From its beginning, where the memory is still in the processor's cache.
            assert_eq!(outgoing.spare(1).len(), FIRST_ROOM);
        }
        outgoing.give_back();
        assert_eq!(outgoing.footprint(), 0);
    }

    #[test]
    fn outgoing_neither_grows_nor_moves_to_new_memory_when_it_never_drains() {
        let mut outgoing = Outgoing::default();
        outgoing.spare(10_000);
        outgoing.queued(10_000);
        let (mut place, mut moves) = (outgoing.storage.as_ptr(), 0);
        for _ in 0..1000 {
            outgoing.spare(5000);
            outgoing.queued(5000);
            outgoing.sent(5000);
            moves += usize::from(outgoing.storage.as_ptr() != place);
            place = outgoing.storage.as_ptr();
        }
        assert!(moves < 5, "{moves} allocations");
        assert_eq!(outgoing.waiting().len(), 10_000);
        assert!(outgoing.footprint() <= 64 * 1024, "{}", outgoing.footprint());
    }

    #[test]
    fn a_thread_keeps_a_few_buffers_and_lends_the_last_one_first() {
        for size in [FIRST_ROOM - 1, FIRST_ROOM, 3 * FIRST_ROOM, 2 << 20] {
            spare::give_back(vec![1; size]);
        }
        assert_eq!(
            [spare::borrow().len(), spare::borrow().len(), spare::borrow().len()],
            [3 * FIRST_ROOM, FIRST_ROOM, 0]
        );
        (0..100).for_each(|_| spare::give_back(vec![1; FIRST_ROOM]));
        let kept = core::iter::from_fn(|| Some(spare::borrow()).filter(|buffer| !buffer.is_empty())).count();
        assert!((1..10).contains(&kept), "{kept}");
        spare::give_back(vec![1; FIRST_ROOM]);
        spare::drop_all();
        assert!(!spare::are_kept());
    }
}
