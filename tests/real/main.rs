//! The wrapper between real programs: real UCSPI servers, mail servers and clients on loopback, and every letter compared byte for byte.
//!
//! Each test is a [`stage::Stage`] of its own: a loopback address, a scratch folder, and processes that end with it. `scripts/setup`
//! installs the programs; where one is missing a test fails and says so, it is never skipped. Some tests need root, as mail servers do.
//! A letter sent in clear must reach the child's queue and no other, one sent through STARTTLS the backend's: so each delivery also
//! shows which way it went.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod backends;
mod balance;
mod check;
mod clients;
mod front;
mod injection;
mod jail;
mod letter;
#[path = "../fuzz/src/lines.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)] // of what others test
mod lines;
mod listener;
mod load;
#[path = "../differential/models.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)] // of what others test
mod models;
mod mute;
mod privileges;
mod proxy;
mod readings;
mod readme;
mod relay;
mod s6;
mod secrets;
#[path = "../fuzz/src/snoop.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)] // of what others test
mod snoop;
mod stage;
#[path = "../differential/streams.rs"]
mod streams;
mod supervisors;
mod tickets;
mod transparency;
mod untouched;
mod ways;

#[path = "../support/mod.rs"]
mod support;

use support::*;
