//! The command line: [`options`] is the table, [`args`] splits what was typed by it, [`config`] checks it and says what we run with.
//!
//! This runs at every connection: one pass over argv, one look-up for each variable that is ours, nothing else.

pub mod args;
pub mod config;
mod cutoff;
pub mod help;
mod listen;
mod mute;
mod network;
pub mod options;
mod probe;

use std::ffi::OsString;

use crate::error::Fatal;
pub use config::{Config, IdentitySource, Server};
pub use listen::Listen;
pub use mute::Mute;
pub use network::Network;
use options::Id;
pub use options::{LISTENER_VARIABLES, OWN_VARIABLES};
pub use probe::Probe;

/// What the command line comes to.
#[derive(Debug)]
pub enum Invocation {
    /// Print this on stdout, its last line end included, and exit 0 (`--help`, `--version`).
    Print(String),
    /// Run with this.
    Serve(Box<Config>),
    /// Say what would become of it (`--check`).
    Check(Box<Config>),
    /// Say what PROG says (`--probe`).
    Probe(Box<Probe>),
}

/// Reads `words` (argv without the program's name) and, through `environment`, the variables that are ours.
///
/// # Errors
/// [`Fatal::Usage`], its text one line, for everything that can't be right.
pub fn read(
    words: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Invocation, Fatal> {
    match args::split(words, environment)? {
        args::Request::Print(text) => Ok(Invocation::Print(text)),
        args::Request::Serve(typed) if typed.times(Id::Probe) > 0 => {
            Ok(Invocation::Probe(Box::new(probe::probe(*typed)?)))
        }
        args::Request::Serve(typed) => {
            let is_tried = typed.times(Id::Check) > 0;
            let config = Box::new(Config::check(*typed)?);
            Ok(if is_tried { Invocation::Check(config) } else { Invocation::Serve(config) })
        }
    }
}
