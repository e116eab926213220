//! Towards the backend: its addresses, one connection attempt after the other; and what TLS with client and backend needs.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::Interest;

use crate::sys::dial::{self, Address, Resolver, Target};
use crate::sys::end::{End, Registry};
use crate::tls::{
    CertificateDer, ClientConfig, Identity, Roots, ServerConfig, ServerName, Tickets, TlsError, Trust, client_setup,
    server_name, server_setup,
};

use super::backend::Backend;
use super::tokens::{BACKEND, RESOLVED};

/// What the TLS legs are made from. Nothing of it is touched before a STARTTLS comes.
#[derive(Debug, Default)]
pub struct Secrets {
    /// Our certificate and key, where they are usable.
    pub identity: Option<Identity>,
    /// Where tickets for clients come from; `None`: there are none.
    pub tickets: Option<Tickets>,
    /// How the backend is known, where it speaks TLS.
    pub peer: Option<Peer>,
}

/// How a backend is known.
#[derive(Debug)]
pub struct Peer {
    /// Who may vouch for the backend besides our own certificate.
    pub roots: Roots,
    /// The name that its certificate must bear.
    pub name: String,
    /// Believe any backend: `--backend-insecure`.
    pub insecure: bool,
}

/// The TLS configurations of a session, or of many.
#[derive(Clone, Debug)]
pub struct Setups {
    pub(super) server: Arc<ServerConfig>,
    pub(super) client: Option<Arc<(Arc<ClientConfig>, ServerName<'static>)>>,
}

impl Secrets {
    /// Makes the configurations around [`Secrets::identity`]: the key is loaded here, and the provider touched.
    ///
    /// # Errors
    /// The key fits no provider, or HOST's name is none.
    pub fn set_up(&self, identity: &Identity) -> Result<Setups, TlsError> {
        let client = self.peer.as_ref().map(|peer| peer.set_up(Some(identity.leaf().clone())));
        let client = client.transpose()?.map(Arc::new);
        Ok(Setups { server: server_setup(identity, self.tickets.as_ref())?, client })
    }
}

impl Setups {
    /// TLS towards the backend, on a socket that is connected.
    pub(super) fn connect(&self, end: End) -> Result<Backend, TlsError> {
        let (config, name) = &**self.client.as_ref().ok_or(TlsError::Unexpected("no TLS towards the backend"))?;
        Backend::tls(end, config, name.clone())
    }
}

impl Peer {
    /// The configuration towards it, and the name to ask it for; `own_leaf` is believed whatever its name.
    ///
    /// # Errors
    /// [`TlsError::Name`], [`TlsError::Setup`].
    pub fn set_up(
        &self,
        own_leaf: Option<CertificateDer<'static>>,
    ) -> Result<(Arc<ClientConfig>, ServerName<'static>), TlsError> {
        let name = server_name(&self.name)?;
        let trust = Trust { own_leaf, roots: self.roots.clone(), name: name.clone(), insecure: self.insecure };
        Ok((client_setup(trust)?, name))
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
    target: Arc<Target>,
    is_resolved: bool,
    left: VecDeque<Address>,
    attempt: Option<(End, Address, Instant)>,
    last_error: String,
    due: Instant,
}

impl Dial {
    pub(super) fn begin(target: Arc<Target>, patience: Duration, now: Instant) -> Self {
        Self {
            target,
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
        self.attempt.as_ref().map(|(_, _, due)| *due)
    }

    /// Goes on.
    pub(super) fn poll(&mut self, resolver: &mut Resolver, registry: &Registry, now: Instant) -> Dialled {
        if !self.is_resolved {
            match resolver.poll(&self.target, registry, RESOLVED) {
                None => return Dialled::Wait,
                Some(Ok(found)) => self.left = self.target.usable(found).into(),
                Some(Err(error)) => self.last_error = format!("{}: {error}", self.target.place),
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
            match self.begin_attempt(&address, registry) {
                Ok(end) => self.attempt = Some((end, address, now + self.due.saturating_duration_since(now) / share)),
                Err(error) => self.last_error = format!("{address}: {error}"),
            }
        }
    }

    fn begin_attempt(&self, address: &Address, registry: &Registry) -> io::Result<End> {
        let mut end = End::socket(self.target.begin(address)?, BACKEND);
        end.writable = false;
        end.watch(registry, Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY)?;
        Ok(end)
    }
}
