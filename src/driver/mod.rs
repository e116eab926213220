//! The doors through which connections come to the engine.

pub mod listen;
mod probe;
mod renewal;
pub(crate) mod tickets;
pub mod ucspi;
mod watch;
mod worker;
