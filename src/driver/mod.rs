//! The doors through which connections come to the engine.

mod addresses;
mod admission;
mod again;
pub mod greeting;
pub mod listen;
mod lobby;
mod metrics;
pub mod needs;
mod probe;
mod renewal;
mod scrape;
mod sparing;
pub(crate) mod tickets;
pub mod ucspi;
mod watch;
mod worker;
