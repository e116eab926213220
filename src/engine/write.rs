//! Writing: what waits leaves, as far as it is taken. A side that takes nothing more is deaf; what it still says is heard.

use std::io;
use std::time::Instant;

use crate::session::{ClientEnd, EndReason, Phase};

use super::bridge;
use super::conn::Conn;
use super::pump::is_gone;
use super::secure::{Whose, tls_trouble};

impl Conn {
    /// Writes what waits, as far as it is taken. True: something left.
    pub(super) fn write_out(&mut self, now: Instant) -> bool {
        let moved = self.write_client(now) | self.write_child(now) | self.write_backend(now);
        if moved {
            self.session.handle_written(now);
        }
        moved
    }

    fn write_client(&mut self, now: Instant) -> bool {
        let Some(client) = &mut self.client else { return false };
        // Whose own end has come is closed without a shutdown, and others may hold the socket: nothing would push the reply out.
        let is_last = self.session.phase() == Phase::Close && !client.is_over;
        if client.is_deaf {
            self.session.to_client.clear();
            return false;
        }
        let written = match &mut client.leg {
            None => {
                let mut written = Ok(0);
                while !self.session.to_client.is_empty() && client.ends.output().writable {
                    let end = client.ends.output();
                    let octets = self.session.to_client.as_slice();
                    match if is_last { end.write_last(octets) } else { end.write(octets) } {
                        Ok(Some(count)) => {
                            self.session.to_client.consume(count);
                            written = written.map(|sum| sum + count);
                        }
                        Ok(None) => break,
                        Err(error) => {
                            written = Err(error);
                            break;
                        }
                    }
                }
                written
            }
            // What waits is encrypted when the queue has left, so that it is the session that sees the backpressure.
            Some(leg) => bridge::transmit(client.ends.output(), leg).and_then(|written| {
                if self.session.to_client.is_empty() || leg.is_handshaking() || leg.wants_write() {
                    return Ok(written);
                }
                // A leg that has failed takes nothing; its alert has left.
                leg.send(self.session.to_client.as_slice()).map_err(io::Error::other)?;
                self.session.to_client.clear();
                Ok(written + bridge::transmit(client.ends.output(), leg)?)
            }),
        };
        match written {
            Ok(count) => {
                self.tally.sent += count as u64;
                count > 0
            }
            Err(_) => {
                client.is_deaf = true;
                self.session.to_client.clear();
                // After the close_notify nothing was left to say.
                let reason = if client.close_sent { EndReason::Over } else { EndReason::Client(ClientEnd::BrokeOff) };
                self.session.handle_end(reason, now);
                true
            }
        }
    }

    fn write_child(&mut self, now: Instant) -> bool {
        let Some(end) = &mut self.child_in else {
            self.session.to_child.clear();
            return false;
        };
        let mut moved = false;
        while !self.session.to_child.is_empty() && end.writable {
            match end.write(self.session.to_child.as_slice()) {
                Ok(Some(count)) => self.session.to_child.consume(count),
                Ok(None) => break,
                // It no longer reads; what it still says is heard until it closes.
                Err(error) if is_gone(end, &error) => {
                    self.child_in = None;
                    return true;
                }
                Err(error) => {
                    self.child_in = None;
                    self.session.handle_end(cannot_write(&error), now);
                    return true;
                }
            }
            moved = true;
        }
        moved
    }

    pub(super) fn write_backend(&mut self, now: Instant) -> bool {
        let Some(backend) = &mut self.backend else {
            self.session.to_backend.clear();
            return false;
        };
        let was_deaf = backend.is_deaf;
        let mut written = 0;
        if was_deaf {
            self.session.to_backend.clear();
        } else {
            written += backend.transmit();
            if !self.session.to_backend.is_empty() && backend.is_secure() && backend.takes_more() {
                if let Err(error) = backend.send(self.session.to_backend.as_slice()) {
                    tls_trouble(&mut self.session, Whose::Backend, error, now);
                }
                self.session.to_backend.clear();
                written += backend.transmit();
            }
        }
        let is_deafened = backend.is_deaf && !was_deaf;
        if is_deafened && (self.session.is_handover() || self.session.phase().is_reaching()) {
            self.session.handle_handover_failed(backend.why_deaf(), now);
        } else if let Some(error) = backend.failure.take() {
            self.session.handle_end(cannot_write(&error), now);
            return true;
        }
        written > 0 || is_deafened
    }
}

fn cannot_write(error: &io::Error) -> EndReason {
    EndReason::System(format!("can't write to the server: {error}"))
}
