//! The only code that touches file descriptors, processes and signals. Thin: what to do is decided in `engine`.

pub mod child;
pub mod dial;
pub mod end;
mod filter;
pub mod handed;
pub mod holder;
pub mod inherited;
pub mod listener;
pub mod notify;
pub mod opener;
pub mod privileges;
mod raw;
pub mod sandbox;
pub mod signals;
pub mod spawner;
pub mod splice;

pub use raw::exit_now;
