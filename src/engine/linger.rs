//! A close that the client can read: what is owed leaves, writing is shut down, the client's last octets are drained for a
//! little. A plain close with unread input resets the connection and eats the last reply (RFC 1122 4.2.2.13).

use std::time::{Duration, Instant};

use crate::session::limits;
use crate::sys::end::End;

use super::conn::Ends;

/// The end of a client's connection.
#[derive(Debug)]
pub(super) struct Linger {
    due: Instant,
    is_shut: bool,
    drained: usize,
}

impl Linger {
    /// Begins the end. What is not written yet gets `patience`.
    pub(super) fn begin(patience: Duration, now: Instant) -> Self {
        Self { due: now + patience, is_shut: false, drained: 0 }
    }

    pub(super) fn deadline(&self) -> Instant {
        self.due
    }

    /// Goes on. `is_flushed`: nothing is left to be written. True: the descriptors may be closed.
    pub(super) fn poll(&mut self, client: &mut Ends, is_flushed: bool, now: Instant) -> bool {
        if now >= self.due {
            return true;
        }
        if !is_flushed {
            return false;
        }
        if !self.is_shut {
            self.is_shut = true;
            self.due = now + limits::LINGER;
            client.output().shut_down();
        }
        // Only a socket is reset by unread input.
        !client.input.is_socket() || self.drain(&mut client.input)
    }

    fn drain(&mut self, input: &mut End) -> bool {
        let mut scratch = [0; 4096];
        while input.readable {
            match input.read(&mut scratch) {
                Ok(None) => return false,
                Ok(Some(0)) | Err(_) => return true,
                Ok(Some(count)) => self.drained += count,
            }
            if self.drained >= limits::DRAIN {
                return true;
            }
        }
        false
    }
}
