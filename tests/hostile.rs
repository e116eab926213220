//! Clients, children, backends and systems that do their worst to the program; every wait has a deadline, and after every
//! session the child is gone. What a dialogue file can say is said there; here is what needs a real process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking
#![allow(dead_code)] // each test program uses its part of tests/support

#[path = "support/backend.rs"]
mod backend;
#[path = "support/child.rs"]
mod child;
#[path = "support/dialogue.rs"]
mod dialogue;
#[path = "support/door.rs"]
mod door;
#[path = "support/octets.rs"]
mod octets;
#[path = "support/steps.rs"]
mod steps;
#[path = "support/stream.rs"]
mod stream;
#[path = "support/wire.rs"]
mod wire;

#[path = "hostile/backends.rs"]
mod backends;
#[path = "hostile/bulk.rs"]
mod bulk;
#[path = "hostile/children.rs"]
mod children;
#[path = "hostile/clients.rs"]
mod clients;
#[path = "hostile/phases.rs"]
mod phases;
#[path = "hostile/scarcity.rs"]
mod scarcity;
#[path = "hostile/stalls.rs"]
mod stalls;
