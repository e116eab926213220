//! `--probe`: PROG alone, to see what it says to everybody.

use std::ffi::OsString;

use log::LevelFilter;

use super::args::Typed;
use super::config::{called, program, timeouts, usage, verbosity};
use super::options::{Id, OPTIONS};
use crate::error::Fatal;
use crate::session::policy::Timeouts;

/// What is probed, and how patiently.
#[derive(Debug)]
pub struct Probe {
    /// PROG, found through PATH.
    pub program: OsString,
    /// ARGS.
    pub arguments: Vec<OsString>,
    /// Those for its greeting, its replies and its farewell.
    pub timeouts: Timeouts,
    /// What is said on stderr.
    pub verbosity: LevelFilter,
}

/// The options that say something here.
const OF_A_PROBE: [Id; 6] =
    [Id::Probe, Id::GreetingTimeout, Id::ReplayTimeout, Id::FarewellTimeout, Id::Verbose, Id::Quiet];

pub(super) fn probe(typed: Typed) -> Result<Probe, Fatal> {
    if let Some(spec) = OPTIONS.iter().find(|spec| typed.times(spec.id) > 0 && !OF_A_PROBE.contains(&spec.id)) {
        return usage(format!("{} says nothing with --probe", called(spec.id)));
    }
    Ok(Probe {
        timeouts: timeouts(&typed)?,
        verbosity: verbosity(typed.times(Id::Verbose), typed.times(Id::Quiet)),
        program: program(typed.program)?,
        arguments: typed.arguments,
    })
}
