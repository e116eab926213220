//! One session on descriptors 0 and 1, as a child of tcpserver, s6-tcpserver, inetd or systemd.
//!
//! Start-up is part of the data path, and its order is the contract: with `--way respawn` the place of the second child, which
//! is a copy of us; the child, so that its greeting never waits for us, or its place, where a file says what it would greet with (`--greeting`); then certificate and keys, and roots are opened; then the
//! ids are dropped; then the sandbox; and only then is the client's first octet read. With `--require-tls` the certificate comes before the child: without it there is no service to start.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use log::{info, warn};
use mio::Poll;
use rustix::process::Pid;
use zeroize::Zeroizing;

use crate::cli::{Config, IdentitySource, OWN_VARIABLES, Server};
use crate::client_info::{self, ClientInfo};
use crate::engine::{
    self, CLIENT_IN, CLIENT_OUT, Conn, Ends, Front, Parts, Peer, SIGNALS, Secrets, Source, TLS_SERVER, TlsServer,
};
use crate::error::Fatal;
use crate::proxy::Header;
use crate::session::{ChildEnd, EndReason, PolicyEnd, StandIn, Way};
use crate::smtp::reply::Ours;
use crate::sys::child::{self, Child};
use crate::sys::dial::{Place, Target};
use crate::sys::end::{End, Registry};
use crate::sys::holder::Holder;
use crate::sys::sandbox;
use crate::sys::{inherited, privileges, signals};
use crate::tls::{Identity, Roots, UnixTime};
use crate::variables::NAMES;

use super::{greeting, needs, tickets};

/// What is said where HOST can't tell a client from this host.
const HAZARD: &str = "HOST takes every client in TLS for this host: an open relay, if it relays for loopback \
                      (--send-proxy, --backend-source; or --trusted-loopback, where it does not)";

/// Serves the one session. Returns the exit code.
///
/// # Errors
/// The session can't begin, and the client can't be told.
pub fn serve(config: Config) -> Result<u8, Fatal> {
    let started = Instant::now();
    let tls_server = tls_server(&config)?;
    inherited::clean_up().map_err(|error| turn_away("prepare the inherited descriptors", error))?;
    if config.mute.as_ref().is_some_and(|mute| !mute.is_for(std::env::var_os("TCPLOCALPORT").as_deref())) {
        // No wrapper has greeted this client: PROG does, as if we were not there.
        let error = child::become_program(&config.program, &config.arguments, &OWN_VARIABLES);
        return Err(turn_away("execute PROG", error));
    }
    let (holder, held) = match hold(&config) {
        Ok(holder) => (holder, Ok(())),
        Err(error) => (None, Err(not_started(&config, error))),
    };
    let identity =
        if config.policy.require_tls && config.policy.way.ends_tls() { Some(identity(&config.identity)) } else { None };
    let front = held.and_then(|()| match identity {
        Some(None) => Err(EndReason::Policy(PolicyEnd::NoCertificate)),
        None | Some(Some(_)) => start(&config),
    });
    let front = front.unwrap_or_else(Front::Failed);
    let identity = identity.unwrap_or_else(|| self::identity(&config.identity));
    // Where STARTTLS is not offered, nobody is dialled.
    let offers_tls = identity.is_some() || !config.policy.way.ends_tls();
    let (target, peer) = if offers_tls { (target(&config), peer(&config)) } else { (None, None) };
    let (uid, gid) = ids(&config);
    let dropped = privileges::become_user(uid, gid).and_then(|()| privileges::harden());
    let children = children(&front, holder.as_ref(), tls_server.as_ref());
    let needs = config.sandbox.then(|| needs::of_a_session(target.as_ref(), peer.as_ref(), children));
    let tickets = config.ticket_keys.as_deref().filter(|_| identity.is_some()).and_then(|path| {
        tickets::from_file(path).inspect_err(|why| warn!("clients get no session tickets: {why}")).ok()
    });
    let secrets = Secrets { identity, tickets, peer };
    let greeting = config.greeting.clone();
    let mut conn = Parted::new(config, secrets, target, front, holder, tls_server, started)
        .map_err(|error| turn_away("watch the client", error))?;
    if let Err(error) = dropped {
        conn.conn.end_with(EndReason::System(format!("can't drop privileges: {error}")));
    }
    match needs {
        Some(needs) => needs::say(&sandbox::confine(&needs)),
        None => info!("{}", needs::OFF),
    }
    let code = engine::run(&mut conn.poll, &mut conn.conn);
    if let (Some(EndReason::Child(ChildEnd::Differs(_))), Some(path)) = (conn.conn.end(), greeting) {
        warn!("{} is not what PROG says: run starttls-wrapper --probe again", path.display());
    }
    code.map_err(|error| Fatal::System("wait for events", error))
}

/// Whom the session signals and reaps: PROG, the place of a fresh one, and the server that we run under.
fn children(front: &Front, holder: Option<&Holder>, tls_server: Option<&TlsServer>) -> Vec<Pid> {
    let told = tls_server.and_then(|server| server.pid);
    front.pid().into_iter().chain(holder.map(Holder::pid)).chain(told).collect()
}

/// How HOST is known, where it speaks TLS. Its roots are opened here.
#[must_use]
pub fn peer(config: &Config) -> Option<Peer> {
    let Some(Server::Tcp { host, .. }) = config.server.as_ref().filter(|_| config.policy.way.secures_host()) else {
        return None;
    };
    let roots = match (&config.ca_file, &config.ca_dir) {
        _ if config.backend_insecure => Roots::default(),
        (None, None) => Roots::system(|name| std::env::var_os(name)),
        (file, folder) => Roots::listed(file.as_deref(), folder.as_deref()),
    };
    let name = config.backend_name.clone().unwrap_or_else(|| host.clone());
    Some(Peer { roots, name, insecure: config.backend_insecure })
}

/// Where HOST is, if the way has one.
#[must_use]
pub fn target(config: &Config) -> Option<Target> {
    let place = config.server.as_ref().map(|server| match server {
        Server::Tcp { host, port } => Place::Tcp(host.clone(), *port),
        Server::Unix(path) => Place::Unix(path.clone()),
    })?;
    let loopback_only = config.backend_insecure || config.policy.way.is_clear();
    Some(Target { place, source: config.backend_source, loopback_only })
}

/// Tells the client that the session can't begin, because this deed failed.
pub fn turn_away(deed: &'static str, error: io::Error) -> Fatal {
    inherited::say_to_client(Ours::NOT_AVAILABLE.octets());
    Fatal::System(deed, error)
}

/// PROG, or the place that is kept for it where somebody can stand in.
fn start(config: &Config) -> Result<Front, EndReason> {
    let (program, arguments) = (&config.program, &config.arguments);
    // In the clear there is no TLS to be told of, whatever whoever started us was told. `--mute` stands behind TLS.
    let claims = if config.policy.way == Way::Mute { &[][..] } else { &NAMES };
    let started = match stand_in(config) {
        None => Child::start(program, arguments, &[&OWN_VARIABLES, claims].concat()).map(Front::Child),
        Some(stand_in) => Holder::start(program, arguments, &OWN_VARIABLES)
            .map(|holder| Front::Later(Source::Held(holder), Some(stand_in))),
    };
    started.map_err(|error| not_started(config, error))
}

/// Who says what PROG would, where a file says what that is.
fn stand_in(config: &Config) -> Option<StandIn> {
    let path = config.greeting.as_deref()?;
    let found = greeting::read(path).and_then(|learned| {
        let address = ClientInfo::from_ucspi(|name| std::env::var_os(name)).address;
        let address = address.or_else(|| ClientInfo::from(inherited::peer(rustix::stdio::stdin())?).address);
        StandIn::new(Arc::new(learned), address)
            .ok_or_else(|| "it tells clients their address, which is unknown".to_owned())
    });
    found.inspect_err(|why| warn!("PROG is started at once: {why}")).ok()
}

/// The place of a fresh PROG, where one may be needed.
fn hold(config: &Config) -> io::Result<Option<Holder>> {
    let way = config.policy.way;
    let is_needed = way.respawns() && (config.identity != IdentitySource::None || !way.ends_tls());
    is_needed.then(|| Holder::start(&config.program, &config.arguments, &OWN_VARIABLES)).transpose()
}

/// The UCSPI-TLS server that we run under, where its TLS is to be the client's.
fn tls_server(config: &Config) -> Result<Option<TlsServer>, Fatal> {
    if !config.policy.way.is_ucspi_tls() {
        return Ok(None);
    }
    let [control, input, output] =
        inherited::tls_server(|name| std::env::var_os(name)).map_err(|fatal| match fatal {
            Fatal::System(deed, error) => turn_away(deed, error),
            other @ (Fatal::Usage(_) | Fatal::Listen(..)) => other,
        })?;
    let ends = || {
        let (input, output) = (End::shared(input, CLIENT_IN)?, End::shared(output, CLIENT_OUT)?);
        Ok(TlsServer { control: End::shared(control, TLS_SERVER)?, input, output, pid: inherited::only_child() })
    };
    ends().map(Some).map_err(|error| turn_away("use the UCSPI-TLS server's descriptors", error))
}

fn not_started(config: &Config, error: io::Error) -> EndReason {
    EndReason::Child(ChildEnd::NotStarted(format!("{}: {error}", config.program.to_string_lossy())))
}

/// TLS_UID and TLS_GID, where they are for us. A UCSPI-TLS server has them for itself, and who starts us behind it may have dropped to
/// another user already.
pub(crate) fn ids(config: &Config) -> (Option<u32>, Option<u32>) {
    let are_ours = !config.policy.way.is_ucspi_tls() || rustix::process::geteuid().is_root();
    if are_ours { (config.uid, config.gid) } else { (None, None) }
}

/// Says what is risky about what was asked for.
pub(super) fn warn_of(config: &Config) {
    if config.backend_insecure {
        warn!("the backend's certificate is not checked (--backend-insecure)");
    }
    if config.may_relay_for_all {
        warn!("{HAZARD}");
    }
}

/// A connection and its loop.
struct Parted {
    poll: Poll,
    conn: Conn,
}

impl Parted {
    fn new(
        config: Config,
        secrets: Secrets,
        target: Option<Target>,
        front: Front,
        holder: Option<Holder>,
        tls_server: Option<TlsServer>,
        started: Instant,
    ) -> io::Result<Self> {
        if target.is_some() {
            warn_of(&config);
        }
        let mut policy = config.policy;
        policy.offer_tls = secrets.identity.is_some() || !policy.way.ends_tls();
        // What can fail for want of descriptors comes before the client's are taken.
        let poll = Poll::new()?;
        let terminations = End::event(signals::terminations()?, SIGNALS);
        let (input, output) = inherited::client();
        // Under inetd and systemd there is no TCPREMOTEIP.
        let mut info = ClientInfo::from_ucspi(|name| std::env::var_os(name));
        if info.address.is_none() {
            info = inherited::peer(&input).map_or(info, ClientInfo::from);
        }
        let proxy = config.send_proxy.map(|version| {
            let [client, local] = client_info::ends(|name| std::env::var_os(name), || inherited::ends(&input))?;
            Some(Header { version, client, local, tls: policy.way.ends_tls() })
        });
        let parts = Parts {
            client: Ends::two(End::shared(input, CLIENT_IN)?, End::shared(output, CLIENT_OUT)?),
            front,
            holder,
            tls_server,
            info,
            policy: Arc::new(policy),
            secrets: Some(secrets),
            setups: None,
            target: target.map(Arc::new),
            proxy,
            relay: config.relay,
            terminations: Some(terminations),
            started,
            meter: None,
        };
        let conn = Conn::new(parts, &Registry::new(poll.registry(), 0));
        Ok(Self { poll, conn })
    }
}

/// Our certificate and key, or `None` where they are not usable, which is then said.
pub(super) fn identity(source: &IdentitySource) -> Option<Identity> {
    let found = match source {
        IdentitySource::None => return None,
        IdentitySource::SelfSigned(name) => Identity::self_signed(name).map_err(|error| error.to_string()),
        IdentitySource::Files { cert, key } => from_files(cert, key),
    };
    found.inspect_err(|why| warn!("STARTTLS is not offered: {why}")).ok()
}

pub(crate) fn from_files(cert: &Path, key: &Path) -> Result<Identity, String> {
    from_files_by(cert, key, |path| std::fs::read(path))
}

/// The same for one who has another way to read a file.
pub(super) fn from_files_by(
    cert: &Path,
    key: &Path,
    octets: impl Fn(&Path) -> io::Result<Vec<u8>>,
) -> Result<Identity, String> {
    // The certificate's file may hold the key too.
    let read = |path: &Path| match octets(path) {
        Ok(text) => Ok(Zeroizing::new(text)),
        Err(error) => Err(format!("can't read {}: {error}", path.display())),
    };
    let (chain, key_pem) = (read(cert)?, read(key)?);
    Identity::from_pem(&chain, &key_pem, UnixTime::now())
        .map_err(|error| format!("certificate {}, key {}: {error}", cert.display(), key.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::needs::tests::{LINES, config};

    /// An end of anything.
    fn end() -> End {
        let (end, _) = rustix::pipe::pipe().unwrap();
        End::shared(end, TLS_SERVER).unwrap()
    }

    #[test]
    fn prog_is_signalled_and_the_place_of_a_fresh_one_and_nobody_else() {
        for (way, line) in LINES {
            let config = config(line, &[("CERTFILE", "c")]);
            let (holder, front) = (hold(&config).unwrap(), start(&config).unwrap());
            let (prog, place) = (front.pid().unwrap(), holder.as_ref().map(Holder::pid));
            assert_eq!(place.is_some(), way.respawns(), "{way}");
            let own: Vec<Pid> = [prog].into_iter().chain(place).collect();
            assert_eq!(children(&front, holder.as_ref(), None), own, "{way}");
            let mut server = TlsServer { control: end(), input: end(), output: end(), pid: None };
            assert_eq!(children(&front, holder.as_ref(), Some(&server)), own, "{way}, and the server is no child");
            server.pid = Some(Pid::INIT);
            assert_eq!(children(&front, holder.as_ref(), Some(&server)), [own, vec![Pid::INIT]].concat(), "{way}");
        }
        let failed = Front::Failed(EndReason::Policy(PolicyEnd::NoCertificate));
        assert_eq!(children(&failed, None, None), []);
    }
}
