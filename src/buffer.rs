//! A queue of octets: appended at the back, taken from the front, without moving what remains.

/// Octets waiting to be written. Memory is kept while it is used and can be given back.
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

    /// For writers that append in place.
    pub fn as_mut_vec(&mut self) -> &mut Vec<u8> {
        &mut self.octets
    }
}
