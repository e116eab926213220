//! The client's TLS done by the UCSPI-TLS server that we run under (s6-ucspitlsd, sslserver -n): it is told to begin, tells what
//! it has agreed on, and from then on the client is a pair of pipes.
//!
//! Contract: our copies of the client's socket are gone, its flags given back, before the server is told `Y`: from then on only
//! one reads it. A server that is gone before the 220 is a 454, behind it the end of a handshake that failed.

use std::time::Instant;

use mio::Interest;
use rustix::process::Pid;

use crate::session::EndReason;
use crate::sys::child::Child;
use crate::sys::end::{End, Registry};
use crate::variables::{self, Variable};

use super::conn::{Client, Conn};
use super::dismissal::Dismissal;

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
        let Some(TlsServer { mut control, input, output, pid }) = self.tls_server.take() else { return };
        if let Some(mut client) = self.client.take() {
            client.input.unwatch(registry);
            client.output.unwatch(registry);
        }
        self.tls_pid = pid;
        let mut client = Client::new(input, output);
        let told = client.input.watch(registry, Interest::READABLE).and_then(|()| control.write(b"Y"));
        control.shut_down();
        self.tls_control = Some((control, Vec::new()));
        self.client = Some(client);
        if !matches!(told, Ok(Some(1))) {
            let why = "the UCSPI-TLS server takes no command".to_owned();
            self.session.handle_end(EndReason::Handshake(why), now);
        }
    }

    /// The server does the handshake, and tells when it is done.
    pub(super) fn await_tls_server(&mut self, now: Instant) -> bool {
        let Some((control, told)) = self.tls_control.as_mut().filter(|(control, _)| control.readable) else {
            return false;
        };
        let mut room = [0; 4096];
        let has_ended = match control.read(&mut room) {
            Ok(None) => return false,
            Ok(Some(count)) => {
                told.extend_from_slice(&room[..count]);
                count == 0
            }
            Err(_) => true,
        };
        if told.len() > MOST || has_ended && told.is_empty() {
            let why = "the UCSPI-TLS server gave up".to_owned();
            self.session.handle_end(EndReason::Handshake(why), now);
        } else if has_ended || variables::is_whole(told) {
            self.told = variables::decode(told);
            self.tls_control = None;
            self.session.handle_client_secured(now);
        }
        true
    }

    /// There will be no TLS: the server, where it is our child, ends by itself and is reaped. It is not ours to kill.
    pub(super) fn release_tls_server(&mut self, registry: &Registry, now: Instant) {
        let waiting = self.tls_server.take().and_then(|server| server.pid);
        let is_over = self.client.is_none();
        if let Some(pid) = waiting.or_else(|| self.tls_pid.take_if(|_| is_over)) {
            let child = Child::inherited(pid);
            let patience = self.policy.timeouts.farewell;
            self.dismissals.push(Dismissal::awaited(child, patience, registry, now));
        }
    }

    /// What the server has told, for a fresh child.
    pub(super) fn told_octets(&self) -> Vec<u8> {
        variables::encode(self.told.iter().map(|(name, value): &Variable| (name.as_str(), value.as_slice())))
    }
}
