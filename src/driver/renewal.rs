//! What SIGHUP reads again: certificate and key, the keys for session tickets, and the file of those who may vouch for HOST.
//!
//! Contract: all of it or nothing. What is read is made into the TLS of new sessions first, and takes the old one's place only then; where
//! anything is wrong the old stays in force, and one line says why. Sessions that run keep what they began with. A folder of roots (CADIR)
//! is read when a new session first needs it, as at the start.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use log::{info, warn};

use crate::cli::{Config, IdentitySource};
use crate::engine::meter::Count;
use crate::engine::{Peer, Secrets, Setups};
use crate::sys::opener::Opener;
use crate::tls::{Identity, Tickets};

use super::tickets;
use super::ucspi::from_files_by;

/// The longest certificate or key file that is read again: a chain with its key has some KiB.
const MOST: u64 = 1 << 20;

/// What reading again came to.
pub(super) const RENEWALS: [&str; 2] = ["done", "failed"];

/// The TLS of new sessions, for all loops; `None`: there is no usable certificate.
#[derive(Debug, Default)]
pub(super) struct Current {
    setups: Mutex<Option<Setups>>,
    /// How many times it came to each of [`RENEWALS`].
    pub(super) renewals: [Count; RENEWALS.len()],
}

impl Current {
    pub(super) fn get(&self) -> Option<Setups> {
        self.setups.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, setups: Option<Setups>) {
        *self.setups.lock().unwrap_or_else(PoisonError::into_inner) = setups;
    }
}

/// What is read again, and by whom.
#[derive(Debug)]
pub(super) struct Renewal {
    opener: Opener,
    identity: Source,
    /// Where tickets come from: a file, or what was made at the start.
    ticket_keys: Option<PathBuf>,
    tickets: Option<Tickets>,
    peer: Option<Peer>,
    current: Arc<Current>,
}

#[derive(Debug)]
enum Source {
    Files {
        cert: PathBuf,
        key: PathBuf,
    },
    /// Made by us; nothing makes it anew.
    Made(Identity),
}

/// The files that a configuration names, for [`Opener::start`].
pub(super) fn files(config: &Config, peer: Option<&Peer>) -> Vec<PathBuf> {
    let identity = match &config.identity {
        IdentitySource::Files { cert, key } => vec![cert.clone(), key.clone()],
        IdentitySource::None | IdentitySource::SelfSigned(_) => Vec::new(),
    };
    identity
        .into_iter()
        .chain(config.ticket_keys.clone())
        .chain(peer.and_then(|peer| peer.roots.file()).map(Path::to_owned))
        .collect()
}

impl Renewal {
    /// `made` is the identity of `--self-signed`. `None`: there is no TLS of ours that could be made anew.
    pub(super) fn new(
        opener: Opener,
        config: &Config,
        made: Option<Identity>,
        secrets: Secrets,
        current: Arc<Current>,
    ) -> Option<Self> {
        let identity = match (&config.identity, made) {
            (IdentitySource::Files { cert, key }, _) => Source::Files { cert: cert.clone(), key: key.clone() },
            (IdentitySource::SelfSigned(_), Some(made)) => Source::Made(made),
            (IdentitySource::SelfSigned(_), None) | (IdentitySource::None, _) => return None,
        };
        let ticket_keys = config.ticket_keys.clone();
        let Secrets { tickets, peer, .. } = secrets;
        Some(Self { opener, identity, ticket_keys, tickets, peer, current })
    }

    /// Reads all again, and says what came of it.
    pub(super) fn renew(&mut self) {
        match self.read() {
            Ok(setups) => {
                self.current.set(Some(setups));
                self.current.renewals[0].up();
                info!("SIGHUP: certificate, keys and roots were read again, for new sessions");
            }
            Err(why) => {
                self.current.renewals[1].up();
                warn!("SIGHUP: what was read before stays in force: {why}");
            }
        }
    }

    fn read(&mut self) -> Result<Setups, String> {
        let read;
        let identity = match &self.identity {
            Source::Made(identity) => identity,
            Source::Files { cert, key } => {
                read = from_files_by(cert, key, |path| whole(self.opener.open(path)?))?;
                &read
            }
        };
        let again = |peer: &Peer| {
            let roots = peer.roots.again(|path| self.opener.open(path))?;
            Ok::<_, String>(Peer { roots, name: peer.name.clone(), insecure: peer.insecure })
        };
        let tickets = match &self.ticket_keys {
            Some(path) => Some(tickets::from_file_by(path, |path| self.opener.open(path))?),
            None => self.tickets.clone(),
        };
        let secrets = Secrets { identity: None, tickets, peer: self.peer.as_ref().map(again).transpose()? };
        secrets.set_up(identity).map_err(|error| error.to_string())
    }
}

/// The octets of a file.
fn whole(file: File) -> io::Result<Vec<u8>> {
    // Room for all of it at once: what a vector leaves behind when it grows is not wiped.
    let mut octets = Vec::with_capacity(MOST as usize + 1);
    file.take(MOST + 1).read_to_end(&mut octets)?;
    if octets.len() as u64 > MOST { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(octets) }
}
