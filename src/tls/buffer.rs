//! The ciphertext that came in to a leg and is not consumed. What waits to be written is an [`Outgoing`](crate::buffer::Outgoing).
//!
//! Contract: plain memory with a cap, borrowed from the thread's spares while something is held. It does not know TLS. No operation
//! allocates or moves bytes per record: the leftover of a read (less than one record) is moved at most once per read.
//! Rejected: `VecDeque`, whose two halves rustls can't decrypt in place.

use crate::buffer::{FIRST_ROOM, is_worth_a_copy, spare};

/// Largest incoming buffer before the handshake is done: what one unauthenticated peer can make us hold. A handshake message may
/// be 64 KB by RFC 8446 4; cut in one-byte fragments it would occupy 392 KB.
pub(super) const HANDSHAKE_CAP: usize = 64 * 1024;
/// Largest incoming buffer in traffic. Reading 256 KiB at once costs a quarter less processor time than 64 KiB.
pub(super) const TRAFFIC_CAP: usize = 256 * 1024;

/// Ciphertext read from the peer. `storage[begin..end]` is held, of which `storage[begin..seen]` was shown to rustls before.
///
/// rustls keeps offsets into the held bytes while a handshake message is incomplete, and works in place: held bytes are only
/// appended to, moved as a whole, or discarded from the front by as much as rustls says.
#[derive(Default)]
pub(super) struct Incoming {
    storage: Vec<u8>,
    begin: usize,
    seen: usize,
    end: usize,
    /// Where the room ends that was given last.
    limit: usize,
    /// The last read left no room: offer more next time.
    was_filled: bool,
}

impl Incoming {
    /// Spare space, at least one byte unless `cap` octets are held; grows to at most `cap` octets in all.
    /// `eager`: grow fourfold when the last read filled what was offered, and not only when nothing is left.
    pub(super) fn room(&mut self, cap: usize, eager: bool) -> &mut [u8] {
        let held = self.end - self.begin;
        if self.storage.is_empty() {
            self.storage = spare::borrow();
        }
        let wanted = match self.storage.len() {
            0 => FIRST_ROOM,
            size if eager && self.was_filled => size.saturating_mul(4),
            size if held == size => size.saturating_mul(2),
            size => size,
        };
        // At least the first size, because `give_back` may have cut the buffer to its exact content.
        let wanted = wanted.max(FIRST_ROOM).min(cap);
        if wanted > self.storage.len() {
            // Only leftovers are copied.
            let mut larger = spare::of(wanted);
            larger[..held].copy_from_slice(&self.storage[self.begin..self.end]);
            self.storage = larger;
            self.rebase();
        }
        // A buffer that another has made large is not for this one's cap.
        self.limit = self.storage.len().min(cap);
        if self.begin > 0 && self.limit.saturating_sub(self.end) < self.limit / 2 {
            self.storage.copy_within(self.begin..self.end, 0);
            self.rebase();
        }
        self.was_filled = false;
        let limit = self.limit.max(self.end);
        &mut self.storage[self.end..limit]
    }

    /// `n` octets were read into what [`Incoming::room`] gave last; more than that counts as that.
    pub(super) fn filled(&mut self, n: usize) {
        let room = self.limit.min(self.storage.len()).saturating_sub(self.end);
        self.end += n.min(room);
        self.was_filled = n > 0 && n >= room;
    }

    /// All held bytes, for rustls to consume; from now on they are seen.
    pub(super) fn all(&mut self) -> &mut [u8] {
        self.seen = self.end;
        &mut self.storage[self.begin..self.end]
    }

    /// The held bytes that rustls has seen before: shown again they yield no new record.
    pub(super) fn seen(&mut self) -> &mut [u8] {
        &mut self.storage[self.begin..self.seen]
    }

    /// Drops `n` octets from the front.
    pub(super) fn discard(&mut self, n: usize) {
        self.begin = (self.begin + n).min(self.end);
        self.seen = self.seen.max(self.begin);
        if self.begin == self.end {
            self.begin = 0;
            self.seen = 0;
            self.end = 0;
            spare::give_back(core::mem::take(&mut self.storage));
        }
    }

    /// Drops everything held.
    pub(super) fn clear(&mut self) {
        self.discard(self.end - self.begin);
    }

    /// Octets held.
    pub(super) fn len(&self) -> usize {
        self.end - self.begin
    }

    /// Octets of memory occupied.
    pub(super) fn footprint(&self) -> usize {
        self.storage.capacity()
    }

    /// Gives memory back where far more is occupied than held. What is held then has its own, exactly.
    pub(super) fn give_back(&mut self) {
        if is_worth_a_copy(self.storage.len(), self.len()) {
            let held = self.storage[self.begin..self.end].to_vec();
            spare::give_back(core::mem::replace(&mut self.storage, held));
            self.rebase();
            self.was_filled = false;
        }
    }

    /// The held bytes now start at index 0.
    fn rebase(&mut self) {
        self.end -= self.begin;
        self.seen -= self.begin;
        self.begin = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Outgoing;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn read_into(incoming: &mut Incoming, bytes: &[u8], cap: usize, eager: bool) -> usize {
        let room = incoming.room(cap, eager);
        let n = room.len().min(bytes.len());
        room[..n].copy_from_slice(&bytes[..n]);
        incoming.filled(n);
        n
    }

    #[test]
    fn incoming_starts_small_and_stops_at_its_cap() {
        let mut incoming = Incoming::default();
        assert_eq!(incoming.room(HANDSHAKE_CAP, false).len(), FIRST_ROOM);
        let flood = vec![7; TRAFFIC_CAP];
        let mut total = 0;
        loop {
            let n = read_into(&mut incoming, &flood, HANDSHAKE_CAP, false);
            if n == 0 {
                break;
            }
            total += n;
        }
        assert_eq!(total, HANDSHAKE_CAP);
        assert_eq!(incoming.footprint(), HANDSHAKE_CAP);
    }

    #[test]
    fn incoming_grows_in_traffic_when_a_read_fills_it_and_never_beyond_256_kib() {
        let mut incoming = Incoming::default();
        let flood = vec![7; 2 * TRAFFIC_CAP];
        let mut sizes = Vec::new();
        for _ in 0..6 {
            sizes.push(read_into(&mut incoming, &flood, TRAFFIC_CAP, true));
            incoming.discard(incoming.len());
        }
        let kib = 1024;
        assert_eq!(sizes, [4 * kib, 16 * kib, 64 * kib, 256 * kib, 256 * kib, 256 * kib]);
        let quiet = read_into(&mut incoming, b"one short line", TRAFFIC_CAP, true);
        assert_eq!(quiet, 14);
        assert_eq!(incoming.footprint(), TRAFFIC_CAP);
        incoming.discard(14);
        assert_eq!(incoming.footprint(), 0);
    }

    #[test]
    fn a_buffer_that_another_has_made_large_is_no_way_round_a_cap() {
        let flood = vec![7; 2 * TRAFFIC_CAP];
        let mut first = Incoming::default();
        for _ in 0..5 {
            read_into(&mut first, &flood, TRAFFIC_CAP, true);
            first.clear();
        }
        let mut second = Incoming::default();
        read_into(&mut second, &flood[..10], HANDSHAKE_CAP, false);
        second.discard(1);
        while read_into(&mut second, &flood, HANDSHAKE_CAP, false) > 0 {}
        assert_eq!(second.len(), HANDSHAKE_CAP);
        // Nor is a little that is held a reason to keep it.
        second.discard(HANDSHAKE_CAP - 5);
        second.give_back();
        assert_eq!((second.len(), second.footprint()), (5, 5));
    }

    #[test]
    fn incoming_stays_small_in_a_quiet_dialogue() {
        let mut incoming = Incoming::default();
        for _ in 0..100 {
            read_into(&mut incoming, &[7; FIRST_ROOM - 1], TRAFFIC_CAP, true);
            assert_eq!(incoming.footprint(), FIRST_ROOM);
            incoming.discard(incoming.len());
        }
    }

    #[test]
    fn incoming_shows_only_what_was_seen_before() {
        let mut incoming = Incoming::default();
        read_into(&mut incoming, b"abc", TRAFFIC_CAP, true);
        assert_eq!(incoming.seen(), b"");
        assert_eq!(incoming.all(), b"abc");
        incoming.discard(1);
        read_into(&mut incoming, b"def", TRAFFIC_CAP, true);
        assert_eq!(incoming.seen(), b"bc");
        assert_eq!(incoming.all(), b"bcdef");
    }

    #[test]
    fn give_back_keeps_what_is_held_exactly() {
        let mut incoming = Incoming::default();
        read_into(&mut incoming, b"abc", TRAFFIC_CAP, true);
        incoming.all();
        incoming.discard(1);
        incoming.give_back();
        assert_eq!(incoming.footprint(), 2);
        assert_eq!(incoming.seen(), b"bc");
        assert!(read_into(&mut incoming, b"d", TRAFFIC_CAP, true) == 1);
        assert_eq!(incoming.all(), b"bcd");
        incoming.clear();
        incoming.give_back();
        assert_eq!(incoming.footprint(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn both_buffers_are_queues(steps in proptest::collection::vec((0_usize..9000, 0_usize..9000, any::<bool>()), 1..60)) {
            let (mut incoming, mut outgoing) = (Incoming::default(), Outgoing::default());
            let (mut model_in, mut model_out) = (VecDeque::new(), VecDeque::new());
            let mut next = 0_u8;
            for (put, take, idle) in steps {
                let fresh: Vec<u8> = (0..put).map(|_| { next = next.wrapping_mul(31).wrapping_add(7); next }).collect();
                let n = read_into(&mut incoming, &fresh, HANDSHAKE_CAP, put % 2 == 0);
                model_in.extend(&fresh[..n]);
                incoming.discard(take);
                model_in.drain(..take.min(model_in.len()));
                outgoing.spare(put)[..put].copy_from_slice(&fresh);
                outgoing.queued(put);
                model_out.extend(&fresh);
                outgoing.sent(take);
                model_out.drain(..take.min(model_out.len()));
                if idle {
                    incoming.give_back();
                    outgoing.give_back();
                }
                prop_assert_eq!(&*incoming.all(), model_in.make_contiguous());
                prop_assert_eq!(outgoing.waiting(), model_out.make_contiguous());
            }
        }
    }
}
