//! The doors through which connections come to the engine.

pub mod listen;
pub mod ucspi;
mod worker;
