//! The way to HOST: its addresses, one after the other, the PROXY header, and TLS; each step named, with the session's time-outs.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use crate::cli::Config;
use crate::engine::talk::Talk;
use crate::engine::{Backend, tell};
use crate::proxy::{Details, Header};
use crate::sys::dial::{self, Address, Resolver, Target};
use crate::sys::end::{End, Registry};
use crate::tls::{ClientConfig, ServerName};

/// A client's TLS, for the header that tells of it.
const DETAILS: Details<'static> =
    Details { version: "TLSv1.3", suite: "TLS_AES_128_GCM_SHA256", server_name: None, protocol: None };

/// What leads to HOST. Made before the sandbox, in which it goes on.
pub(super) struct Road<'a> {
    config: &'a Config,
    target: Target,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    resolver: Resolver,
    /// For the resolver, which has a loop woken.
    poll: Poll,
}

/// Where it stopped, and why.
pub(super) struct Stopped {
    pub(super) step: &'static str,
    pub(super) why: String,
}

impl<'a> Road<'a> {
    pub(super) fn new(
        config: &'a Config,
        target: Target,
        tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    ) -> io::Result<Self> {
        Ok(Self { config, target, tls, resolver: Resolver::default(), poll: Poll::new()? })
    }

    /// Up to the point where HOST may be spoken to. `client`: the two ends that a header names, where one is sent.
    pub(super) fn go(&mut self, client: Option<[SocketAddr; 2]>) -> Result<(Talk, Address), Stopped> {
        let stopped = |step| move |why| Stopped { step, why };
        let (end, address) = self.connect().map_err(stopped(REACHED))?;
        let mut end = End::socket(end, Token(0));
        if let (Some(version), Some([client, local])) = (self.config.send_proxy, client) {
            let header = Header { version, client, local, tls: self.config.policy.way.ends_tls() };
            let details = self.config.policy.way.is_late().then_some(&DETAILS);
            tell(&mut end, &header.octets(details)).map_err(stopped(REACHED))?;
        }
        let backend = match &self.tls {
            Some((config, name)) => {
                Backend::tls(end, config, name.clone()).map_err(|error| error.to_string()).map_err(stopped(TLS))?
            }
            None => Backend::socket(end),
        };
        let mut talk = Talk::new(backend);
        talk.secure(self.config.policy.timeouts.backend_handshake).map_err(stopped(TLS))?;
        Ok((talk, address))
    }

    /// All addresses within the dial time-out, each with its share of what is left, as in a session.
    fn connect(&mut self) -> Result<(std::os::fd::OwnedFd, Address), String> {
        let due = Instant::now() + self.config.policy.timeouts.dial;
        let mut addresses = self.addresses(due).map_err(|error| format!("{}: {error}", self.target.place))?;
        let mut why = "it has no usable address".to_owned();
        addresses.reverse();
        while let Some(address) = addresses.pop() {
            let share = u32::try_from(addresses.len()).unwrap_or(u32::MAX).saturating_add(1);
            let patience = due.saturating_duration_since(Instant::now()) / share;
            match self.attempt(&address, patience) {
                Ok(socket) => return Ok((socket, address)),
                Err(error) => why = format!("{address}: {error}"),
            }
        }
        Err(why)
    }

    fn attempt(&self, address: &Address, patience: Duration) -> io::Result<std::os::fd::OwnedFd> {
        let socket = self.target.begin(address)?;
        let due = Instant::now() + patience;
        let ready = retry_on_intr(|| {
            let left = Timespec::try_from(due.saturating_duration_since(Instant::now())).unwrap_or_default();
            poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&left))
        });
        match ready? {
            0 => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer")),
            _ => dial::finish(&socket).map(|()| socket),
        }
    }

    fn addresses(&mut self, due: Instant) -> io::Result<Vec<Address>> {
        let mut events = Events::with_capacity(1);
        self.resolver.begin();
        loop {
            let registry = Registry::new(self.poll.registry(), 0);
            if let Some(found) = self.resolver.poll(&self.target, &registry, Token(0)) {
                return found.map(|found| self.target.usable(found));
            }
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the resolver does not answer"));
            }
            match self.poll.poll(&mut events, Some(left)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
    }
}

/// The steps, as the table calls them.
pub(super) const REACHED: &str = "HOST is reached";
pub(super) const TLS: &str = "HOST's TLS";
