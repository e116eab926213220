//! The client's TLS done by the UCSPI-TLS server that we run under (s6-ucspitlsd, sslserver -n): it is told to begin, tells what
//! it has agreed on, and from then on the client is a pair of pipes.
//!
//! Contract: before the server is told `Y` the client's flags are given back, and from then on only one reads it. A copy of its
//! socket is kept as long as the handshake lasts, to cut it off if the session ends in there: the server knows nothing of our
//! time-outs, and would be left with a client that is silent, uncounted by whoever started us. A server that is gone before the
//! 220 is a 454, behind it the end of a handshake that failed. It has told all, or nothing: what breaks off counts for nothing.

use std::time::Instant;

use mio::Interest;
use rustix::process::Pid;

use crate::sys::child::Child;
use crate::sys::end::{End, Registry};
use crate::variables::{self, Variable};

use super::closing;
use super::conn::{Client, Conn, Ends};
use super::dismissal::Dismissal;
use super::tokens::CLIENT_IN;

/// The most that it may tell: sslserver tells of certificates too.
const MOST: usize = 64 * 1024;

/// The server, as long as it waits for a command or does the handshake.
#[derive(Debug)]
pub struct TlsServer {
    /// Its control socket.
    pub control: End,
    /// What the client says inside TLS.
    pub input: End,
    /// What it is told there.
    pub output: End,
    /// Its process, where that is a child of ours.
    pub pid: Option<Pid>,
}

/// The server, while it does the handshake.
#[derive(Debug)]
pub(super) struct TlsHandshake {
    /// Its control socket, and what it has told there.
    pub(super) control: End,
    told: Vec<u8>,
    /// The client's socket, to be cut off.
    client: Option<End>,
}

impl Conn {
    /// Whether the server can still be told anything.
    pub(super) fn look_at_tls_server(&mut self) -> Result<(), String> {
        let Some(server) = &mut self.tls_server else { return Err("there is no UCSPI-TLS server".to_owned()) };
        match server.control.read(&mut [0]) {
            Ok(None) => Ok(()),
            Ok(Some(0)) => Err("the UCSPI-TLS server is gone".to_owned()),
            Ok(Some(_)) => Err("the UCSPI-TLS server spoke unasked".to_owned()),
            Err(error) => Err(format!("the UCSPI-TLS server: {error}")),
        }
    }

    /// The 220 is out: the server is told to begin.
    pub(super) fn start_tls_server(&mut self, registry: &Registry, now: Instant) {
        let Some(server) = self.tls_server.take() else { return };
        let TlsServer { mut control, input, output, pid } = *server;
        let socket = self.client.take().and_then(|mut client| {
            client.ends.input.unwatch(registry);
            client.ends.output().unwatch(registry);
            client.ends.input.again(CLIENT_IN).ok()
        });
        self.tls_pid = pid;
        let mut client = Client::new(Ends::two(input, output));
        let told = client.ends.input.watch(registry, Interest::READABLE).and_then(|()| control.write(b"Y"));
        control.shut_down();
        self.tls_handshake = Some(Box::new(TlsHandshake { control, told: Vec::new(), client: socket }));
        self.client = Some(client);
        if !matches!(told, Ok(Some(1))) {
            self.session.handle_tls_server_failed("the UCSPI-TLS server takes no command", now);
        }
    }

    /// The server does the handshake, and tells when it is done.
    pub(super) fn await_tls_server(&mut self, now: Instant) -> bool {
        let Some(handshake) = self.tls_handshake.as_mut().filter(|handshake| handshake.control.readable) else {
            return false;
        };
        let TlsHandshake { control, told, .. } = &mut **handshake;
        let mut room = [0; 4096];
        let has_ended = match control.read(&mut room) {
            Ok(None) => return false,
            Ok(Some(count)) => {
                told.extend_from_slice(&room[..count]);
                count == 0
            }
            Err(_) => true,
        };
        let is_whole = variables::is_whole(told);
        if told.len() > MOST || has_ended && !is_whole {
            // Its own fault or the client's: to us they look alike.
            let why = "the UCSPI-TLS server gave up, its own log may say why";
            self.session.handle_tls_server_failed(why, now);
        } else if is_whole {
            self.told = Some(variables::decode(told));
            self.tls_handshake = None;
            self.session.handle_client_secured(now);
        }
        true
    }

    /// The session is over: a handshake that is still under way is, too.
    pub(super) fn end_tls_handshake(&mut self) {
        if let Some(client) = self.tls_handshake.take().and_then(|handshake| handshake.client) {
            client.cut_off();
        }
    }

    /// There will be no TLS, or it is over: the server, where it is our child, ends by itself and is reaped. Behind TLS it has as
    /// long as we would take to have the client read what is owed; then it is killed, or every client that never closes would
    /// leave one behind that nobody counts.
    pub(super) fn release_tls_server(&mut self, registry: &Registry, now: Instant) {
        let waiting = self.tls_server.take().and_then(|server| server.pid);
        let is_over = self.client.is_none();
        let (pid, patience) = match waiting {
            Some(pid) => (Some(pid), self.policy.timeouts.farewell),
            None => (self.tls_pid.take_if(|_| is_over), closing::patience(self.session.end())),
        };
        if let Some(pid) = pid {
            self.dismissals.push(Dismissal::awaited(Child::inherited(pid), patience, registry, now));
        }
    }

    /// What the server has told, for a fresh child.
    pub(super) fn told_octets(&self) -> Vec<u8> {
        variables::encode(self.told.iter().flatten().map(|(name, value): &Variable| (name.as_str(), value.as_slice())))
    }
}
