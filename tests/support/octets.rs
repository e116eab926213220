//! A long run of octets that is made, and checked, piece by piece: the same seed gives the same run. All 256 values come,
//! and what SMTP looks at comes often: lines of one dot, lone CR, lone LF.

use std::fmt;

use crate::wire::shown;

/// See the file's head.
pub(crate) struct Octets {
    state: u64,
    at: u64,
    total: u64,
    made: Vec<u8>,
}

impl Octets {
    /// So many octets.
    pub(crate) fn new(seed: u64, total: u64) -> Self {
        Self { state: seed.wrapping_mul(2).wrapping_add(1), at: 0, total, made: Vec::new() }
    }

    /// None at all.
    pub(crate) fn none() -> Self {
        Self::new(0, 0)
    }

    /// Whether all were taken, or checked.
    pub(crate) fn is_done(&self) -> bool {
        self.at == self.total
    }

    /// The next `most` or fewer.
    pub(crate) fn take(&mut self, most: usize) -> Vec<u8> {
        let left = self.total - self.at;
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(most);
        while self.made.len() < count {
            // Marsaglia's xorshift: fast is all that is asked of it.
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            self.made.extend_from_slice(&self.state.to_le_bytes());
            if self.state & 0xFF == 0 {
                self.made.extend_from_slice(b"\n.\n\r.\r\r\n.\r\nQUIT\r\n");
            }
        }
        self.at += count as u64;
        let rest = self.made.split_off(count);
        std::mem::replace(&mut self.made, rest)
    }

    /// `octets` must be the next of the run.
    pub(crate) fn check(&mut self, octets: &[u8]) -> Result<(), String> {
        let from = self.at;
        let expected = self.take(octets.len());
        if expected == octets {
            return Ok(());
        }
        let differ = expected.iter().zip(octets).take_while(|(a, b)| a == b).count();
        Err(format!(
            "octet {} of {} differs: received {}, expected {}",
            from + differ as u64,
            self.total,
            shown(&octets[differ..octets.len().min(differ + 40)]),
            shown(&expected[differ..expected.len().min(differ + 40)])
        ))
    }
}

impl fmt::Display for Octets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} octets received", self.at, self.total)
    }
}
