//! One side of a session as a test plays it: a stream, later with TLS on it, and a deadline for each wait. TLS here
//! is rustls' buffered connections: the program under test uses the unbuffered ones, so that each checks the other.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustls::Connection;

use crate::octets::Octets;
use crate::stream::Stream;

/// How long each expectation may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// How the other side ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// FIN; inside TLS behind a close_notify.
    Clean,
    /// FIN inside TLS without close_notify.
    Cut,
    /// RST.
    Reset,
}

/// One stream with what has been received and not been looked at.
pub(crate) struct Wire {
    socket: Stream,
    tls: Option<Connection>,
    received: Vec<u8>,
    end: Option<End>,
}

impl Wire {
    pub(crate) fn new(socket: TcpStream) -> Self {
        Self::over(Stream::socket(socket))
    }

    /// The same over anything else.
    pub(crate) fn over(socket: Stream) -> Self {
        Self { socket, tls: None, received: Vec::new(), end: None }
    }

    /// Does the handshake; what was received in clear and not looked at is an error.
    pub(crate) fn secure(&mut self, tls: Connection) -> Result<(), String> {
        if !self.received.is_empty() {
            return Err(format!("octets in clear before the handshake: {}", shown(&self.received)));
        }
        let mut tls = tls;
        self.socket.deadline = Some(Instant::now() + PATIENCE);
        while tls.is_handshaking() {
            flush(&mut tls, &mut self.socket).map_err(|e| format!("handshake: {e}"))?;
            if tls.is_handshaking() {
                let read = tls.read_tls(&mut self.socket).map_err(|e| format!("handshake: {e}"))?;
                if read == 0 {
                    return Err("handshake: the other side closed".to_owned());
                }
                if let Err(e) = tls.process_new_packets() {
                    let _ = flush(&mut tls, &mut self.socket);
                    return Err(format!("handshake: {e}"));
                }
            }
        }
        flush(&mut tls, &mut self.socket).map_err(|e| format!("handshake: {e}"))?;
        // What came with its last flight; that no more is there is no error.
        let _ = tls.reader().read_to_end(&mut self.received);
        self.tls = Some(tls);
        Ok(())
    }

    /// Sends; a side that is gone takes nothing, which later expectations will tell.
    pub(crate) fn send(&mut self, octets: &[u8]) {
        self.socket.deadline = Some(Instant::now() + PATIENCE);
        match &mut self.tls {
            None => drop(self.socket.write_all(octets)),
            Some(tls) => {
                // rustls holds back what exceeds its buffer: small pieces, each on its way before the next.
                for piece in octets.chunks(16 * 1024) {
                    if tls.writer().write_all(piece).is_err() || flush(tls, &mut self.socket).is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Ends our side: close_notify where there is TLS, then FIN.
    pub(crate) fn end(&mut self) {
        if let Some(tls) = &mut self.tls {
            self.socket.deadline = Some(Instant::now() + PATIENCE);
            tls.send_close_notify();
            let _ = flush(tls, &mut self.socket);
        }
        self.socket.end();
    }

    /// Ends our side without close_notify.
    pub(crate) fn cut(&mut self) {
        self.socket.end();
    }

    /// What is beneath: for out-of-band octets, options of the socket, or octets that are no TLS.
    pub(crate) fn stream(&mut self) -> &mut Stream {
        self.socket.deadline = Some(Instant::now() + PATIENCE);
        &mut self.socket
    }

    /// Our TLS, for what is no ordinary traffic.
    pub(crate) fn tls(&mut self) -> Option<&mut Connection> {
        self.tls.as_mut()
    }

    /// Sends what TLS has queued.
    pub(crate) fn flush(&mut self) {
        self.socket.deadline = Some(Instant::now() + PATIENCE);
        if let Some(tls) = &mut self.tls {
            let _ = flush(tls, &mut self.socket);
        }
    }

    /// Sends all of `ours` and receives all of `theirs`, both at once, within `patience` of the last octet moved.
    pub(crate) fn exchange(
        &mut self,
        ours: &mut Octets,
        theirs: &mut Octets,
        patience: Duration,
    ) -> Result<(), String> {
        theirs.check(&std::mem::take(&mut self.received))?;
        let mut deadline = Instant::now() + patience;
        let mut unsent: Vec<u8> = Vec::new();
        loop {
            self.socket.deadline = None;
            if unsent.is_empty() {
                unsent = ours.take(16 * 1024);
            }
            let sent = match &mut self.tls {
                None if unsent.is_empty() => false,
                None => match self.socket.write(&unsent) {
                    Ok(count) => {
                        unsent.drain(..count);
                        true
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => false,
                    Err(e) => return Err(format!("sending: {e}, {theirs}")),
                },
                Some(tls) => {
                    if !tls.wants_write() && !unsent.is_empty() {
                        tls.writer().write_all(&unsent).map_err(|e| e.to_string())?;
                        unsent.clear();
                    }
                    match tls.write_tls(&mut self.socket) {
                        Ok(count) => count > 0,
                        Err(e) if e.kind() == ErrorKind::WouldBlock => false,
                        Err(e) => return Err(format!("sending: {e}, {theirs}")),
                    }
                }
            };
            let writes = !unsent.is_empty() || self.tls.as_ref().is_some_and(|tls| tls.wants_write());
            let received = match self.read() {
                Ok(()) => {
                    theirs.check(&std::mem::take(&mut self.received))?;
                    true
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => false,
                Err(e) => return Err(format!("receiving: {e}, {theirs}")),
            };
            if theirs.is_done() && ours.is_done() && !writes {
                return Ok(());
            }
            if self.end.is_some() && !theirs.is_done() {
                return Err(format!("the connection ended ({:?}), {theirs}", self.end));
            }
            if sent || received {
                deadline = Instant::now() + patience;
            } else if !self.socket.wait(self.end.is_none(), writes, deadline) {
                return Err(format!("nothing moves, {theirs}"));
            }
        }
    }

    /// Resets the connection, at once: a close with SO_LINGER would wait for the fork of another test that holds the socket.
    pub(crate) fn reset(self) {
        rustix::net::connect_unspec(self.socket.input()).unwrap();
    }

    /// A PROXY header of version 2, and not an octet of what follows it.
    pub(crate) fn proxy_header(&mut self) -> Result<Vec<u8>, String> {
        let mut header = vec![0; 16];
        self.socket.deadline = Some(Instant::now() + PATIENCE);
        self.socket.read_exact(&mut header).map_err(|e| format!("no PROXY header: {e}"))?;
        if !header.starts_with(b"\r\n\r\n\0\r\nQUIT\n\x21") {
            return Err(format!("no PROXY header of version 2: {}", shown(&header)));
        }
        header.resize(16 + usize::from(u16::from_be_bytes([header[14], header[15]])), 0);
        self.socket.read_exact(&mut header[16..]).map_err(|e| format!("half a PROXY header: {e}"))?;
        Ok(header)
    }

    /// The next octets must be `expected`.
    pub(crate) fn get(&mut self, expected: &[u8]) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        while self.received.len() < expected.len() && expected.starts_with(&self.received) && self.end.is_none() {
            if let Err(e) = self.receive(deadline) {
                return Err(self.differs(expected, &e.to_string()));
            }
        }
        if !self.received.starts_with(expected) {
            let state = self.end.map_or("open".to_owned(), |end| format!("{end:?}"));
            return Err(self.differs(expected, &state));
        }
        self.received.drain(..expected.len());
        Ok(())
    }

    fn differs(&self, expected: &[u8], state: &str) -> String {
        format!("expected {}\n    received {}\n    (the connection: {state})", shown(expected), shown(&self.received))
    }

    /// The other side must end, with nothing said before.
    pub(crate) fn get_end(&mut self) -> Result<End, String> {
        let (octets, end) = self.rest()?;
        if octets.is_empty() { Ok(end) } else { Err(format!("expected the end, received {}", shown(&octets))) }
    }

    /// All that comes until the end.
    pub(crate) fn rest(&mut self) -> Result<(Vec<u8>, End), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(end) = self.end {
                return Ok((std::mem::take(&mut self.received), end));
            }
            self.receive(deadline).map_err(|e| format!("expected the end: {e}; received {}", shown(&self.received)))?;
        }
    }

    /// What one read gives: of a socket that keeps bounds, one write of the other side.
    pub(crate) fn piece(&mut self) -> Result<Vec<u8>, String> {
        self.receive(Instant::now() + PATIENCE).map_err(|e| e.to_string())?;
        Ok(std::mem::take(&mut self.received))
    }

    /// The same stream once more, in clear, for a second thread.
    pub(crate) fn twin(&self) -> Self {
        Self::over(self.socket.twin())
    }

    /// Notes what comes within `time`, and how it ends.
    pub(crate) fn listen_for(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while self.end.is_none() && self.receive(deadline).is_ok() {}
    }

    /// Notes what comes until a line has, or the end.
    pub(crate) fn listen_for_line(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.end.is_none() && !self.received.contains(&b'\n') && self.receive(deadline).is_ok() {}
    }

    /// Whether the other side has not ended, as far as we have listened.
    pub(crate) fn is_open(&self) -> bool {
        self.end.is_none()
    }

    /// Whether anything has come that was not looked at.
    pub(crate) fn has_received(&self) -> bool {
        !self.received.is_empty()
    }

    /// Sends as much as is taken now, in clear.
    pub(crate) fn send_some(&mut self, octets: &[u8]) -> usize {
        self.socket.deadline = None;
        self.socket.write(octets).unwrap_or(0)
    }

    /// What has arrived and was not asked for.
    pub(crate) fn left_over(&mut self) -> Vec<u8> {
        let soon = Instant::now() + Duration::from_millis(1);
        while self.end.is_none() && self.receive(soon).is_ok() {}
        std::mem::take(&mut self.received)
    }

    /// One read by `deadline`, its octets and its end noted.
    fn receive(&mut self, deadline: Instant) -> io::Result<()> {
        self.socket.deadline = Some(deadline);
        self.read()
    }

    fn read(&mut self) -> io::Result<()> {
        if self.end.is_some() {
            return Err(ErrorKind::WouldBlock.into());
        }
        let read = match &mut self.tls {
            None => {
                let mut piece = [0; 64 * 1024];
                self.socket.read(&mut piece).inspect(|&n| self.received.extend_from_slice(&piece[..n]))
            }
            Some(tls) => tls.read_tls(&mut self.socket),
        };
        let closed = match read {
            Ok(n) => n == 0,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                self.end = Some(End::Reset);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let Some(tls) = &mut self.tls else {
            self.end = closed.then_some(End::Clean);
            return Ok(());
        };
        let state = tls.process_new_packets().map_err(io::Error::other)?;
        let mut plain = vec![0; state.plaintext_bytes_to_read()];
        tls.reader().read_exact(&mut plain)?;
        self.received.extend_from_slice(&plain);
        if state.peer_has_closed() {
            self.end = Some(End::Clean);
        } else if closed {
            self.end = Some(End::Cut);
        }
        Ok(())
    }
}

fn flush(tls: &mut Connection, socket: &mut Stream) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(socket)?;
    }
    Ok(())
}

/// Octets as a person can read them, cut in the middle when there are many.
pub(crate) fn shown(octets: &[u8]) -> String {
    const MANY: usize = 600;
    if octets.len() <= MANY {
        return format!("\"{}\"", octets.escape_ascii());
    }
    let (head, tail) = (&octets[..MANY / 2], &octets[octets.len() - MANY / 2..]);
    format!("\"{}\" ... ({} octets) ... \"{}\"", head.escape_ascii(), octets.len(), tail.escape_ascii())
}
