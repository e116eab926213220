//! What PROG says to everybody, on paper: written by `--probe`, and believed by a UCSPI child with `--greeting`.
//!
//! Contract: [`probe`] asks PROG twice, as two clients, and prints only what both were told. `read` takes nothing that is not such a text;
//! a session without it begins as ever, with PROG. Whether PROG still says so, only a session that needs it finds out: then the client
//! hears 421, and the log says to probe again. Rejected: to have the child write the file anew by itself. It runs as whoever it runs
//! as, and many at once.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::thread;

use log::warn;

use crate::cli::{OWN_VARIABLES, Probe};
use crate::error::{Fatal, exit};
use crate::session::learned::{Heard, Learned, Prober};
use crate::sys::child::Child;
use crate::sys::inherited;

use super::listen::UCSPI_VARIABLES;
use super::probe::{NAMES, SECOND, probe_child};
use super::worker::variables;

/// More than the replies of any server.
const LONGEST: u64 = 64 * 1024;

/// Probes PROG and prints what is learned. Returns the exit code: 1 if it does not say the same to everybody.
///
/// # Errors
/// PROG can't be started, or does not serve.
pub fn probe(probe: &Probe) -> Result<u8, Fatal> {
    inherited::clean_up().map_err(|error| Fatal::System("prepare the inherited descriptors", error))?;
    let name = probe.program.to_string_lossy();
    let unlearned = |why: String| Fatal::System("learn what PROG says", io::Error::other(format!("{name}: {why}")));
    let (heard, prober) = hear(probe, 0)?;
    let learned = Learned::from_probe(&heard, prober).map_err(unlearned)?;
    thread::sleep(SECOND);
    let (heard, prober) = hear(probe, 1)?;
    let again = Learned::from_probe(&heard, prober).map_err(unlearned)?;
    if let Err(why) = learned.agrees(&again) {
        warn!("{name}: {why}: it can't be put off");
        return Ok(exit::CLIENT);
    }
    let text = format!("# What {} says to everybody, for --greeting\n{learned}", name.escape_default());
    io::stdout().write_all(text.as_bytes()).map_err(|error| Fatal::System("write to stdout", error))?;
    Ok(exit::OVER)
}

/// Whether PROG says what `learned` says.
///
/// # Errors
/// What it says otherwise, or why it does not serve.
pub(crate) fn check(learned: &Learned, probe: &Probe) -> Result<(), String> {
    let (heard, prober) = hear(probe, 0).map_err(|fatal| fatal.to_string())?;
    learned.is_true_of(&heard, prober)
}

/// One of the two probes.
fn hear(probe: &Probe, number: usize) -> Result<(Heard, Prober<'static>), Fatal> {
    let (name, address) = NAMES[number];
    let ends = [SocketAddr::from((address, 25)), SocketAddr::from((Ipv4Addr::LOCALHOST, 25))];
    let variables: Vec<(&str, String)> = variables(ends).collect();
    let without = [&OWN_VARIABLES[..], &UCSPI_VARIABLES, &crate::variables::NAMES].concat();
    let told = variables.iter().map(|(name, value)| (*name, value.as_str()));
    let child = Child::start_with(&probe.program, &probe.arguments, &without, told);
    let child = child.map_err(|error| Fatal::System("start PROG", error))?;
    let heard = probe_child(child, name, probe.timeouts);
    let heard = heard.map_err(|why| Fatal::System("learn what PROG says", io::Error::other(why)))?;
    Ok((heard, Prober { name, address: Some(IpAddr::V4(address)) }))
}

/// What this file says that PROG says.
///
/// # Errors
/// Why it can't be believed, with its name.
pub(crate) fn read(path: &Path) -> Result<Learned, String> {
    let mut text = String::new();
    let count = File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_string(&mut text));
    let read = match count {
        Ok(count) if count as u64 > LONGEST => Err(format!("longer than {LONGEST} octets")),
        Ok(_) => Learned::parse(&text),
        Err(error) => Err(format!("can't read it: {error}")),
    };
    read.map_err(|why| format!("greeting {}: {why}", path.display()))
}
