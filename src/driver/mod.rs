//! The doors through which connections come to the engine.

pub mod ucspi;
