//! Many sessions in one process (`--listen`): one loop for each processor, PROG started by a process of its own.
//!
//! The order of the start is the contract: the spawner, which keeps the rights that PROG is to have and never hears a client; the
//! sockets, so that a port below 1024 needs no rights later; certificate, key and roots, and what TLS is made from, once for all
//! sessions; then the ids are dropped; then each loop gives up what it will not need; and only then is anybody accepted. What is
//! wrong is found out here and ends the program, before it has promised anything to anyone.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread;

use log::{debug, error, info};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::cli::{self, Config, LISTENER_VARIABLES, Listen, OWN_VARIABLES};
use crate::engine::Secrets;
use crate::error::{Fatal, exit};
use crate::sys::dial::{Place, Target};
use crate::sys::listener;
use crate::sys::sandbox::{self, Confined, Needs};
use crate::sys::spawner::{Order, Spawner};
use crate::sys::{inherited, privileges, signals};

use super::probe::{Prober, Server, Shared};
use super::ucspi::{identity, needs, peer, target, warn_of};
use super::worker::{House, Worker};

/// What a UCSPI server says of a client and we do not: nothing of an older one may be found in its place.
const UCSPI_VARIABLES: [&str; 3] = ["TCPREMOTEHOST", "TCPREMOTEINFO", "TCPLOCALHOST"];

/// Descriptors that are no session's: log, sockets, loops, the spawner, with room to spare.
const OUR_OWN: u64 = 128;

/// Descriptors of a session at most: client and HOST twice, PROG's pipes and leash, and a name's resolver.
const EACH: u64 = 10;

/// Serves until SIGTERM or SIGINT. Returns the exit code.
///
/// # Errors
/// It can't begin, or can't wait for its end.
pub fn serve(config: Config, listen: &Listen) -> Result<u8, Fatal> {
    let fatal = |doing| move |error| Fatal::System(doing, error);
    inherited::clean_up().map_err(fatal("prepare the inherited descriptors"))?;
    let descriptors = listener::raise_descriptors();
    let own = [&OWN_VARIABLES[..], &LISTENER_VARIABLES, &UCSPI_VARIABLES].concat();
    let order = Order { program: &config.program, arguments: &config.arguments, own: &own, ids: listen.ids };
    let plain = plain_target(&config)?;
    // One who asks for each loop, and one for the probes.
    let askers = if plain.is_none() { listen.workers + 1 } else { 0 };
    let mut spawners =
        if askers > 0 { Spawner::start(&order, askers).map_err(fatal("start the spawner"))? } else { Vec::new() };
    warn_of(&config);
    let sockets = open(listen)?;
    let name = config.program.to_string_lossy().into_owned();
    let probed = match (&plain, spawners.pop()) {
        (Some(target), _) => Some(Server::Daemon(target.clone())),
        (None, spawner) => spawner.map(|spawner| Server::Started(spawner, name)),
    };
    let times = config.policy.timeouts;
    let learned = Arc::new(Shared::new().map_err(fatal("make a loop"))?);
    let (house, needs) = house(config, listen, descriptors, plain, learned.clone())?;
    let house = Arc::new(house);
    let prober = probed.filter(|_| listen.lazy).map(|server| Prober::begin(server, times, learned)).transpose();
    let mut prober = prober.map_err(|why| Fatal::System("learn what the server says", io::Error::other(why)))?;
    let terminations = signals::terminations().map_err(fatal("wait for signals"))?;
    let end = event().map_err(fatal("make a loop"))?;
    let mut loops = Vec::with_capacity(listen.workers);
    let spawners = spawners.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    for (number, (sockets, spawner)) in sockets.into_iter().zip(spawners).enumerate() {
        let stop = event().map_err(fatal("make a loop"))?;
        let heard = stop.try_clone().map_err(fatal("make a loop"))?;
        let worker = Worker::new(house.clone(), sockets, heard, spawner).map_err(fatal("make a loop"))?;
        let (needs, over) = (needs.clone(), Over(end.try_clone().map_err(fatal("make a loop"))?));
        let thread = thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || run(worker, needs.as_ref(), &over))
            .map_err(fatal("start a loop"))?;
        loops.push((thread, stop));
    }
    needs.iter().for_each(confine);
    let addresses: Vec<String> = listen.addresses.iter().map(ToString::to_string).collect();
    info!("listening on {}, loops={} sessions={}", addresses.join(" "), loops.len(), house.most);
    wait(&terminations, &end, &house.learned, prober.as_mut()).map_err(fatal("wait for signals"))?;
    loops.iter().for_each(|(_, stop)| say(stop));
    Ok(loops.into_iter().map(|(thread, _)| thread.join().unwrap_or(exit::BUG)).max().unwrap_or(exit::OVER))
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
            let found = (host.as_str(), *port)
                .to_socket_addrs()
                .and_then(|mut found| found.next().ok_or_else(|| io::Error::other(format!("{host} has no address"))));
            Place::Tcp(
                found.map_err(|error| Fatal::System("find the plaintext server", error))?.ip().to_string(),
                *port,
            )
        }
    };
    Ok(Some(Target { place, source: None, loopback_only: false }))
}

/// The sockets of each loop.
fn open(listen: &Listen) -> Result<Vec<Vec<OwnedFd>>, Fatal> {
    let one = |address: &SocketAddr| listener::open(*address).map_err(|error| Fatal::Listen(*address, error));
    (0..listen.workers).map(|_| listen.addresses.iter().map(one).collect()).collect()
}

/// What the sessions are served by, and what serving them will need, where the rest is to be given up. The ids are dropped here, once
/// the key is read.
fn house(
    config: Config,
    listen: &Listen,
    descriptors: u64,
    plain: Option<Target>,
    learned: Arc<Shared>,
) -> Result<(House, Option<Needs>), Fatal> {
    let identity = identity(&config.identity);
    let is_served = identity.is_some() || !config.policy.way.ends_tls();
    if config.policy.require_tls && !is_served {
        return Err(Fatal::Usage("--require-tls, but there is no usable certificate".to_owned()));
    }
    let (target, peer) = if is_served { (target(&config), peer(&config)) } else { (None, None) };
    let mut needs = needs(target.as_ref(), peer.as_ref(), Vec::new());
    needs.targets.extend(plain.clone());
    let secrets = Secrets { identity, peer };
    let setups = secrets.identity.as_ref().map(|identity| secrets.set_up(identity));
    let setups =
        setups.transpose().map_err(|error| Fatal::System("set up TLS", io::Error::other(error.to_string())))?;
    let mut policy = config.policy;
    policy.offer_tls = is_served;
    privileges::become_user(config.uid, config.gid)
        .and_then(|()| privileges::harden())
        .map_err(|error| Fatal::System("drop privileges", error))?;
    let fitting = usize::try_from(descriptors.saturating_sub(OUR_OWN) / EACH).unwrap_or(usize::MAX).max(1);
    if fitting < listen.most {
        info!("at most {fitting} sessions, not {}: {descriptors} descriptors may be open", listen.most);
    }
    let house = House {
        policy: Arc::new(policy),
        setups,
        target,
        send_proxy: config.send_proxy,
        relay: config.relay,
        plain,
        learned,
        program: config.program.to_string_lossy().into_owned(),
        sessions: AtomicUsize::new(0),
        most: listen.most.min(fitting),
    };
    Ok((house, config.sandbox.then_some(Needs { listens: true, ..needs })))
}

/// A loop's thread. Returns its exit code.
fn run(mut worker: Worker, needs: Option<&Needs>, _over: &Over) -> u8 {
    needs.into_iter().for_each(confine);
    match worker.run() {
        Ok(()) => exit::OVER,
        Err(error) => {
            error!("a loop ends: {error}");
            exit::SYSTEM
        }
    }
}

fn confine(needs: &Needs) {
    match sandbox::confine(needs) {
        Confined::Wholly => debug!("sandbox: Landlock and seccomp"),
        Confined::OlderLandlock => debug!("sandbox: Landlock, as far as this kernel has it, and seccomp"),
        Confined::Without(what) => info!("sandbox: without {what}"),
    }
}

/// Says that a loop has ended, however it did: without one of them the others are to end too.
struct Over(OwnedFd);

impl Drop for Over {
    fn drop(&mut self) {
        say(&self.0);
    }
}

fn event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

fn say(event: &OwnedFd) {
    // It can't be full, and nobody is there to be told.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

/// Waits for a signal, or the end of a loop; probes meanwhile.
fn wait(terminations: &OwnedFd, end: &OwnedFd, learned: &Shared, mut prober: Option<&mut Prober>) -> io::Result<()> {
    loop {
        let patience = prober.as_ref().and_then(|prober| prober.wait());
        let patience = patience.map(|time| Timespec::try_from(time).unwrap_or_default());
        let mut all = [terminations.as_fd(), end.as_fd(), learned.as_fd()]
            .map(|one| PollFd::from_borrowed_fd(one, PollFlags::IN));
        match poll(&mut all, patience.as_ref()) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) if all[..2].iter().any(|one| !one.revents().is_empty()) => return Ok(()),
            Ok(_) => prober.iter_mut().for_each(|prober| prober.tend()),
        }
    }
}
