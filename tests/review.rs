//! What a second pair of eyes found once and nobody shall find again, as far as no dialogue can say it: each test stands
//! for one defect that was there.
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

#[path = "review/ends.rs"]
mod ends;
#[path = "review/floods.rs"]
mod floods;
#[path = "review/handover.rs"]
mod handover;
#[path = "review/log.rs"]
mod log;
