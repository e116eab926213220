//! TLS on one descriptor: ciphertext is read into the leg's buffer, as much as there is; decrypted there; what it holds goes
//! on at once, into the other leg's outgoing queue or to the session; and the queue leaves in as few writes as the socket
//! allows. Backpressure is written here once: where the outgoing queue has not left, nothing more is read.

use std::io;

use crate::sys::end::End;
use crate::tls::{Leg, TlsError};

/// Why a leg can't go on.
#[derive(Debug)]
pub enum Trouble {
    /// The connection broke.
    Broken(io::Error),
    /// TLS failed on these octets, so many of them; an alert is queued.
    Tls(TlsError, usize),
}

/// What a read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Nothing is there now.
    Nothing,
    /// So many octets of ciphertext.
    Octets(usize),
    /// The connection has ended; whether that is a clean end, [`Leg::peer_closed`] knows.
    End,
}

/// One read, and everything that it completes; each record's plaintext goes to `sink`.
pub(super) fn receive(end: &mut End, leg: &mut Leg, sink: &mut dyn FnMut(&[u8])) -> Result<Received, Trouble> {
    let room = leg.room();
    if room.is_empty() {
        // After its close_notify nothing of the peer's counts.
        return Ok(Received::Nothing);
    }
    match end.read(room) {
        Ok(None) => Ok(Received::Nothing),
        Ok(Some(0)) => Ok(Received::End),
        Ok(Some(count)) => {
            leg.filled(count);
            leg.handle_records(sink).map_err(|error| Trouble::Tls(error, count))?;
            Ok(Received::Octets(count))
        }
        Err(error) => Err(Trouble::Broken(error)),
    }
}

/// Writes what the leg has queued, until all is out or the socket takes no more. Returns the octets written.
pub(super) fn transmit(end: &mut End, leg: &mut Leg) -> io::Result<usize> {
    let mut written = 0;
    while leg.wants_write() && end.writable {
        match end.write(leg.outgoing())? {
            Some(count) => {
                leg.sent(count);
                written += count;
            }
            None => break,
        }
    }
    Ok(written)
}
