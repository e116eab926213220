//! The way to the backend: its addresses, one connection attempt after the other, and what TLS with it needs.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Interest, Registry, Waker};

use crate::sys::dial::{self, Resolver, Target};
use crate::sys::end::End;
use crate::tls::{
    ClientConfig, Identity, Leg, Roots, ServerConfig, ServerName, TlsError, Trust, client_setup, server_name,
    server_setup,
};

use super::tokens::{BACKEND, RESOLVED};

/// What both TLS legs are made from. Nothing of it is touched before a STARTTLS comes.
#[derive(Debug)]
pub struct Secrets {
    /// Our certificate and key, where they are usable.
    pub identity: Option<Identity>,
    /// Who may vouch for the backend besides our own certificate.
    pub roots: Roots,
    /// The name that the backend's certificate must bear.
    pub backend_name: String,
    /// Believe any backend: `--backend-insecure`.
    pub insecure: bool,
}

/// The TLS configurations of one session.
#[derive(Debug)]
pub(super) struct Setups {
    pub(super) server: Arc<ServerConfig>,
    pub(super) client: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
}

impl Secrets {
    /// Makes both configurations around [`Secrets::identity`]: the key is loaded here, and the provider touched.
    pub(super) fn set_up(&self, identity: &Identity) -> Result<Setups, TlsError> {
        let name = server_name(&self.backend_name)?;
        let trust = Trust {
            own_leaf: Some(identity.leaf().clone()),
            roots: self.roots.clone(),
            name: name.clone(),
            insecure: self.insecure,
        };
        Ok(Setups { server: server_setup(identity)?, client: client_setup(trust)?, name })
    }
}

/// A backend that is being spoken to.
pub(super) struct Backend {
    pub(super) end: End,
    pub(super) leg: Leg,
    /// It has closed its connection.
    pub(super) is_over: bool,
    /// It takes nothing more.
    pub(super) is_deaf: bool,
    /// Our close_notify is queued.
    pub(super) close_sent: bool,
    /// Writing is shut down.
    pub(super) is_shut: bool,
}

impl Backend {
    pub(super) fn new(end: End, setups: &Setups) -> Result<Self, TlsError> {
        let leg = Leg::connect(&setups.client, setups.name.clone())?;
        Ok(Self { end, leg, is_over: false, is_deaf: false, close_sent: false, is_shut: false })
    }
}

/// Where a dial stands.
#[derive(Debug)]
pub(super) enum Dialled {
    /// Not yet.
    Wait,
    /// Connected.
    Done(End),
    /// No address is left: why the last one failed.
    Failed(String),
}

/// One dial: all addresses within the session's dial time-out, each with its share of what is left of it.
#[derive(Debug)]
pub(super) struct Dial {
    target: Target,
    is_resolved: bool,
    left: VecDeque<SocketAddr>,
    attempt: Option<(End, SocketAddr, Instant)>,
    last_error: String,
    due: Instant,
}

impl Dial {
    pub(super) fn begin(target: &Target, patience: Duration, now: Instant) -> Self {
        Self {
            target: target.clone(),
            is_resolved: false,
            left: VecDeque::new(),
            attempt: None,
            last_error: "it has no usable address".to_owned(),
            due: now + patience,
        }
    }

    /// The end that is being connected, for the loop's events.
    pub(super) fn end(&mut self) -> Option<&mut End> {
        self.attempt.as_mut().map(|(end, ..)| end)
    }

    /// When the present attempt has had its share.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.attempt.as_ref().map(|&(_, _, due)| due)
    }

    /// Goes on.
    pub(super) fn poll(&mut self, resolver: &mut Resolver, registry: &Registry, now: Instant) -> Dialled {
        if !self.is_resolved {
            match resolver.poll(&self.target, || Waker::new(registry, RESOLVED)) {
                None => return Dialled::Wait,
                Some(Ok(found)) => self.left = self.target.usable(found).into(),
                Some(Err(error)) => self.last_error = format!("{}: {error}", self.target.host),
            }
            self.is_resolved = true;
        }
        loop {
            if let Some((end, address, due)) = self.attempt.take() {
                if end.writable {
                    match dial::finish(&end) {
                        Ok(()) => return Dialled::Done(end),
                        Err(error) => self.last_error = format!("{address}: {error}"),
                    }
                } else if now < due {
                    self.attempt = Some((end, address, due));
                    return Dialled::Wait;
                } else {
                    self.last_error = format!("{address}: no answer");
                }
            }
            let share = u32::try_from(self.left.len()).unwrap_or(u32::MAX).max(1);
            let Some(address) = self.left.pop_front() else {
                return Dialled::Failed(core::mem::take(&mut self.last_error));
            };
            match self.attempt(address, registry) {
                Ok(end) => self.attempt = Some((end, address, now + self.due.saturating_duration_since(now) / share)),
                Err(error) => self.last_error = format!("{address}: {error}"),
            }
        }
    }

    fn attempt(&self, address: SocketAddr, registry: &Registry) -> io::Result<End> {
        let mut end = End::socket(self.target.begin(address)?, BACKEND);
        end.writable = false;
        end.watch(registry, Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY)?;
        Ok(end)
    }
}
