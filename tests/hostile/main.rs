//! Clients, children, backends and systems that do their worst to the program; every wait has a deadline, and after every
//! session the child is gone. What a dialogue file can say is said there; here is what needs a real process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

#[path = "../support/mod.rs"]
mod support;

mod backends;
mod batch;
mod bulk;
mod check;
mod children;
mod clients;
mod faults;
mod greeting;
mod header;
mod lazy;
mod limits;
mod listener;
mod metrics;
mod mute;
mod operation;
mod page;
mod phases;
mod proxy;
mod proxy_in;
mod raw;
mod renewal;
mod respawn;
mod sandbox;
mod scarcity;
mod scripted;
mod stalls;
mod supervised;
mod takeover;
mod tickets;
mod ucspi_tls;

use support::*;
