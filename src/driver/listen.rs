//! Many sessions in one process (`--listen`): one loop for each processor, PROG started by a process of its own.
//!
//! The order of the start is the contract: the descriptors that were left for us, before others have their numbers; the spawner, which
//! keeps the rights that PROG is to have and never hears a client, and the opener, which keeps those of the start for SIGHUP; the
//! sockets, so that a port below 1024 needs no rights later;
//! certificate, key and roots, and what TLS is made from, once for all sessions; then the ids are dropped; then each loop gives up what it
//! will not need; only then is anybody accepted, and the supervisor told. What is wrong is found out here and ends the program, before
//! it has promised anything to anyone.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU8;
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;

use log::{error, info, warn};

use crate::cli::{self, Config, IdentitySource, LISTENER_VARIABLES, Listen, OWN_VARIABLES};
use crate::engine::meter::Meter;
use crate::engine::{Peer, Secrets};
use crate::error::{Fatal, exit};
use crate::session::Policy;
use crate::sys::dial::{Place, Target};
use crate::sys::listener::{self, Listening};
use crate::sys::notify::Supervisor;
use crate::sys::opener::Opener;
use crate::sys::sandbox::{self, Confined, Needs};
use crate::sys::spawner::{Order, Spawner};
use crate::sys::{handed, inherited, privileges, signals};
use crate::tls::Tickets;

use super::addresses::Addresses;
use super::admission::Admission;
use super::again;
use super::metrics::{Figures, Running};
use super::needs;
use super::probe::{Prober, Server, Shared};
use super::renewal::{self, Current, Renewal};
use super::scrape;
use super::tickets;
use super::ucspi::{identity, peer, target, warn_of};
use super::watch::{self, Loop, Over, Watch, event};
use super::worker::{House, Stage, Worker};

/// What a UCSPI server says of a client and we do not: nothing of an older one may be found in its place.
pub(super) const UCSPI_VARIABLES: [&str; 3] = ["TCPREMOTEHOST", "TCPREMOTEINFO", "TCPLOCALHOST"];

/// What is said where the plaintext server can't tell a client from this host.
const HAZARD: &str = "the server of --plain takes every client for this host: an open relay, if it relays for loopback \
                      (--trusted-loopback, where it does not)";

/// Descriptors that are no session's: log, the opener, signals, a probe, those who ask for metrics, with room to spare.
const OUR_OWN: u64 = 100;

/// Without that room.
const OUR_LEAST: u64 = 16;

/// And of a loop, without its listening sockets: what it waits by, the two ends of its stop, the spawner, the word for its end, one
/// to accept who is turned away, and its spare pipes.
const OF_A_LOOP: u64 = 6 + 2 * crate::engine::SPARE_PIPES as u64;

/// Descriptors of a session at most: client, HOST twice, PROG's pipes and leash, and a name's resolver. A relay that has no descriptors
/// left for a pipe copies.
const EACH: u64 = 9;

/// Serves until SIGTERM or SIGINT. Returns the exit code.
///
/// # Errors
/// It can't begin, or can't wait for its end.
pub fn serve(config: Config, listen: &Listen) -> Result<u8, Fatal> {
    let fatal = |doing| move |error| Fatal::System(doing, error);
    let left_for_us =
        listen.inherited.iter().map(|number| handed::listening(*number)).collect::<Result<Vec<_>, _>>()?;
    let line = listen.notify_fd.map(|number| handed::descriptor("--notify-fd", number)).transpose()?;
    let mut supervisor = Supervisor::new(line);
    inherited::clean_up().map_err(fatal("prepare the inherited descriptors"))?;
    let (descriptors, before) = listener::raise_descriptors();
    let room = room(listen, descriptors)?;
    let own = [&OWN_VARIABLES[..], &LISTENER_VARIABLES, &UCSPI_VARIABLES, &crate::variables::NAMES].concat();
    let (program, arguments) = (&config.program, &config.arguments);
    let order = Order { program, arguments, own: &own, ids: listen.ids, descriptors: before };
    let plain = plain_target(&config)?;
    // One who asks for each loop, and one for the probes.
    let askers = if plain.is_none() { listen.workers + 1 } else { 0 };
    let mut spawners =
        if askers > 0 { Spawner::start(&order, askers).map_err(fatal("start the spawner"))? } else { Vec::new() };
    let is_meant = config.identity != IdentitySource::None || !config.policy.way.ends_tls();
    let peer = if is_meant { peer(&config) } else { None };
    let files = renewal::files(&config, peer.as_ref());
    let opener = if files.is_empty() { None } else { Some(Opener::start(files).map_err(fatal("start the opener"))?) };
    signals::put_off_renewals().map_err(fatal("wait for signals"))?;
    // Where no certificate is named nobody is ever led to HOST.
    if is_meant {
        warn_of(&config);
    }
    if config.may_relay_in_clear {
        warn!("{HAZARD}");
    }
    if rustix::process::geteuid().is_root() {
        warn_of_root(&config, listen);
    }
    if let Some(Err(error)) = listen.notify_socket.as_deref().map(|place| supervisor.connect(place)) {
        warn!("NOTIFY_SOCKET is told nothing: {error}");
    }
    let places = places(listen, &left_for_us);
    let sockets = open(listen, left_for_us)?;
    let metrics = listen.metrics.map(scrape::open).transpose()?;
    let name = config.program.to_string_lossy().into_owned();
    let probed = match (&plain, spawners.pop()) {
        (Some(target), _) => Some(Server::Daemon(target.clone())),
        (None, spawner) => spawner.map(|spawner| Server::Started(spawner, name)),
    };
    let times = config.policy.timeouts;
    let learned = Arc::new(Shared::new().map_err(fatal("make a loop"))?);
    if room < listen.most {
        info!("at most {room} sessions, not {}: {descriptors} descriptors may be open", listen.most);
    }
    let most = listen.most.min(room);
    let (house, renewal, needs) = house(config, listen, most, plain, learned.clone(), peer, opener)?;
    let house = Arc::new(house);
    let prober = probed.filter(|_| listen.lazy).map(|server| Prober::begin(server, times, learned)).transpose();
    let prober = prober.map_err(|why| Fatal::System("learn what the server says", io::Error::other(why)))?;
    let signals = signals::of_a_listener().map_err(fatal("wait for signals"))?;
    let ended = event().map_err(fatal("make a loop"))?;
    let meters: Vec<Arc<Meter>> = (0..listen.workers).map(|_| Arc::default()).collect();
    let figures = Arc::new(Figures::of(meters.clone(), &house));
    // Their memory is one: nobody is accepted while a thread has rights left.
    let threads = listen.workers + 1 + usize::from(prober.is_some()) + usize::from(metrics.is_some());
    let all = Arc::new(Barrier::new(threads));
    let (tell, came) = channel();
    let give_up = |needs: Option<Needs>| {
        let (all, tell) = (all.clone(), tell.clone());
        move || {
            // We hear all of it: the other end stays with us.
            let _ = needs.iter().try_for_each(|needs| tell.send(sandbox::confine(needs)));
            all.wait();
        }
    };
    let mut loops = Vec::with_capacity(listen.workers);
    let spawners = spawners.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    for (number, ((sockets, spawner), meter)) in sockets.into_iter().zip(spawners).zip(meters).enumerate() {
        let stop = event().map_err(fatal("make a loop"))?;
        let heard = stop.try_clone().map_err(fatal("make a loop"))?;
        let running = Running::new(meter.clone());
        let worker = Worker::new(house.clone(), sockets, heard, spawner, meter).map_err(fatal("make a loop"))?;
        let (give_up, over) = (give_up(needs.clone()), Over(ended.try_clone().map_err(fatal("make a loop"))?));
        let thread = thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || {
                give_up();
                let _running = running;
                run(worker, &over)
            })
            .map_err(fatal("start a loop"))?;
        loops.push(Loop { thread, stop });
    }
    if let Some(prober) = prober {
        let give_up = give_up(needs.clone());
        let probe = move || {
            give_up();
            prober.serve();
        };
        thread::Builder::new().name("prober".to_owned()).spawn(probe).map_err(fatal("start a loop"))?;
    }
    if let Some(socket) = metrics {
        let needs = needs.as_ref().map(|_| needs::of_who_is_asked());
        scrape::start(socket, figures.clone(), give_up(needs)).map_err(fatal("start a thread"))?;
    }
    give_up(needs)();
    say_confined(came.try_iter());
    info!("listening on {}, loops={} sessions={}", places.join(" "), loops.len(), house.admission.most());
    supervisor.ready();
    let last = watch::last(times.farewell);
    let watch = Watch { signals, ended, loops, house, supervisor, drain: listen.drain, last, renewal };
    watch.until_the_end().map_err(fatal("wait for signals"))
}

/// Says who will hear strangers as root. Under a UCSPI server that is for the server to say, which has ids to give as well.
fn warn_of_root(config: &Config, listen: &Listen) {
    if config.uid.is_none() {
        warn!("it faces the network as root (TLS_UID, TLS_GID)");
    }
    if config.plain.is_none() && listen.ids.0.is_none() {
        warn!("{} runs as root (UID, GID)", config.program.display());
    }
}

/// Where it listens, for the log.
fn places(listen: &Listen, left_for_us: &[OwnedFd]) -> Vec<String> {
    let own = listen.addresses.iter().map(ToString::to_string);
    let others = listen.inherited.iter().zip(left_for_us).map(|(number, socket)| {
        let address = rustix::net::getsockname(socket).ok().and_then(|address| SocketAddr::try_from(address).ok());
        format!("fd:{number}{}", address.map_or(String::new(), |address| format!("={address}")))
    });
    own.chain(others).collect()
}

/// Where the plaintext server is, if it is a daemon. A name is looked up here, once.
fn plain_target(config: &Config) -> Result<Option<Target>, Fatal> {
    let place = match &config.plain {
        None => return Ok(None),
        Some(cli::Server::Unix(path)) => Place::Unix(path.clone()),
        Some(cli::Server::Tcp { host, port }) if host.eq_ignore_ascii_case("localhost") => {
            Place::Tcp(host.clone(), *port)
        }
        Some(cli::Server::Tcp { host, port }) => {
            let found = (host.as_str(), *port).to_socket_addrs();
            Place::Found(
                host.clone(),
                found.map_err(|error| Fatal::System("find the plaintext server", error))?.collect(),
            )
        }
    };
    Ok(Some(Target { place, source: None, loopback_only: false }))
}

/// The sockets of each loop: of an address one for each, of what was left for us the same for all.
fn open(listen: &Listen, left_for_us: Vec<OwnedFd>) -> Result<Vec<Vec<Listening>>, Fatal> {
    let own = |address: &SocketAddr| {
        let socket = listener::open(*address).map_err(|error| Fatal::Listen(*address, error))?;
        Ok(Listening { socket, is_shared: false })
    };
    let shared = |socket: &OwnedFd| {
        let again = socket.as_fd().try_clone_to_owned().map_err(|error| Fatal::System("share a socket", error))?;
        Ok(Listening { socket: again, is_shared: true })
    };
    let of_a_loop = |_| listen.addresses.iter().map(own).chain(left_for_us.iter().map(shared)).collect();
    (0..listen.workers).map(of_a_loop).collect()
}

/// What the sessions are served by, and what serving them will need, where the rest is to be given up. The ids are dropped here, once
/// the key is read.
fn house(
    config: Config,
    listen: &Listen,
    most: usize,
    plain: Option<Target>,
    learned: Arc<Shared>,
    peer: Option<Peer>,
    opener: Option<Opener>,
) -> Result<(House, Option<Renewal>, Option<Needs>), Fatal> {
    let identity = identity(&config.identity);
    let is_served = identity.is_some() || !config.policy.way.ends_tls();
    if config.policy.require_tls && !is_served {
        return Err(Fatal::Usage("--require-tls, but there is no usable certificate".to_owned()));
    }
    // One that is unusable now may be there at the next SIGHUP.
    let target = if is_served || config.identity != IdentitySource::None { target(&config) } else { None };
    let peeks = listen.proxies.is_some();
    let needs = config.sandbox.then(|| needs::of_a_listener(target.as_ref(), plain.as_ref(), peer.as_ref(), peeks));
    peer.iter().for_each(|peer| peer.roots.keep());
    let tickets = tickets(&config)?;
    let secrets = Secrets { identity: None, tickets, peer };
    let setups = identity.as_ref().map(|identity| secrets.set_up(identity));
    let setups =
        setups.transpose().map_err(|error| Fatal::System("set up TLS", io::Error::other(error.to_string())))?;
    let current = Arc::new(Current::default());
    current.set(setups);
    let made = identity.filter(|_| matches!(config.identity, IdentitySource::SelfSigned(_)));
    let renewal = opener.and_then(|opener| Renewal::new(opener, &config, made, secrets, current.clone()));
    let bare = Policy { offer_tls: false, ..config.policy.clone() };
    let policy = Policy { offer_tls: true, ..config.policy };
    let brief =
        [&policy, &bare].map(|usual| Arc::new(Policy { timeouts: usual.timeouts.under_stress(), ..usual.clone() }));
    privileges::become_user(config.uid, config.gid)
        .and_then(|()| privileges::harden())
        .map_err(|error| Fatal::System("drop privileges", error))?;
    let addresses = Addresses::new(listen.most_per_address, listen.rate_per_address);
    let house = House {
        brief,
        policy: Arc::new(policy),
        bare: Arc::new(bare),
        setups: current,
        target: target.map(Arc::new),
        send_proxy: config.send_proxy,
        relay: config.relay,
        plain: plain.map(Arc::new),
        learned,
        program: config.program.to_string_lossy().into_owned(),
        proxies: listen.proxies.clone(),
        admission: Admission::new(most, addresses),
        stage: Arc::new(AtomicU8::new(Stage::Serve as u8)),
    };
    Ok((house, renewal, needs))
}

/// For how many sessions there is room: for one at least.
fn room(listen: &Listen, descriptors: u64) -> Result<usize, Fatal> {
    fitting(descriptors, listen.workers, listen.addresses.len() + listen.inherited.len())
        .map_err(|least| format!("{descriptors} descriptors may be open, and {least} are needed"))
        .map_err(|why| Fatal::System("serve", io::Error::other(why)))
}

/// How many sessions so many descriptors are enough for, beside loops with so many sockets each.
///
/// # Errors
/// Not for one, and who comes would wait unheard: how many would be.
fn fitting(descriptors: u64, loops: usize, sockets: usize) -> Result<usize, u64> {
    let [loops, sockets] = [loops, sockets].map(|count| u64::try_from(count).unwrap_or(u64::MAX));
    let of_loops = loops.saturating_mul(sockets.saturating_add(OF_A_LOOP));
    let least = of_loops.saturating_add(OUR_LEAST + EACH);
    let room = descriptors.saturating_sub(of_loops.saturating_add(OUR_OWN));
    if descriptors < least { Err(least) } else { Ok(usize::try_from(room / EACH).unwrap_or(usize::MAX).max(1)) }
}

/// Where tickets come from, if there may be TLS of ours: of one source for all loops.
fn tickets(config: &Config) -> Result<Option<Tickets>, Fatal> {
    let unusable = |why| Fatal::System("give session tickets", io::Error::other(why));
    let found = match &config.ticket_keys {
        _ if config.identity == IdentitySource::None => return Ok(None),
        Some(path) => tickets::from_file(path),
        None => Tickets::in_memory().map_err(|error| error.to_string()),
    };
    found.map(Some).map_err(unusable)
}

/// A loop's thread. Returns its exit code.
fn run(worker: Worker, _over: &Over) -> u8 {
    match again::serve("a loop and its sessions", worker, Worker::run, Worker::anew) {
        Ok(()) => exit::OVER,
        Err(error) => {
            error!("a loop ends: {error}");
            exit::SYSTEM
        }
    }
}

/// Says what the threads' sandboxes came to: once, where it is the same for all.
fn say_confined(came: impl Iterator<Item = Confined>) {
    let mut said = Vec::new();
    for confined in came {
        if !said.contains(&confined) {
            needs::say(&confined);
            said.push(confined);
        }
    }
    if said.is_empty() {
        info!("{}", needs::OFF);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_loops_and_their_sockets_are_none_of_a_sessions() {
        let of = |loops, sockets| fitting(1024, loops, sockets);
        assert_eq!([of(1, 1), of(2, 3), of(32, 4)], [Ok(101), Ok(98), Ok(38)]);
        assert_eq!([fitting(39, 1, 1), fitting(40, 1, 1)], [Err(40), Ok(1)]);
        assert_eq!(of(usize::MAX, 1), Err(u64::MAX));
    }
}
